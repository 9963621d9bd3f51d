"""A config's backbone, its dense twin, and pictures as it takes them."""
import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from toy import BACKBONE

from rmoe.backbones import SwinMoE
from rmoe.backbones.from_config import (
    backbone_config,
    build_backbone,
    dense_twin,
    load_images,
)
from rmoe.moe import moe_layers


def config(**backbone) -> Config:
    return Config(dict(default_scope='mmseg',
                       model=dict(backbone=dict(BACKBONE, **backbone))))


def test_backbone_and_its_twin():
    cfg = config(init_cfg=dict(type='Pretrained', checkpoint='gone.pth'))
    settings = backbone_config(cfg)
    assert settings.init_cfg is None and cfg.model.backbone.init_cfg
    moe, dense = build_backbone(settings), build_backbone(
        dense_twin(settings))
    assert len(moe_layers(moe)) == 2 and not moe_layers(dense)
    assert not moe.training and not dense.training
    assert {name for name in moe.state_dict() if '.router.' not in name
            and '.experts.' not in name} == set(dense.state_dict())


def test_the_twin_of_a_type_that_is_a_class():
    """As new-style configs have it."""
    twin = dense_twin(dict(BACKBONE, type=SwinMoE))
    assert twin == dict(BACKBONE, type=SwinMoE, moe=None)


def test_a_dense_backbone_is_refused():
    with pytest.raises(ValueError, match='it is a dense model'):
        backbone_config(config(moe=None))


def test_pictures_are_normalised_as_the_config_does(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'),
                np.full((9, 7, 3), (10, 20, 30), np.uint8))  # b, g, r
    settings = dict(mean=[1., 2., 3.], std=[2., 2., 2.])
    for bgr_to_rgb, expected in ((True, [14.5, 9., 3.5]),
                                 (False, [4.5, 9., 13.5])):
        cfg = Config(dict(model=dict(data_preprocessor=dict(
            settings, bgr_to_rgb=bgr_to_rgb))))
        image, = load_images(tmp_path, 16, cfg)
        assert image.shape == (1, 3, 16, 16)
        torch.testing.assert_close(image[0, :, 0, 0], torch.tensor(expected))
