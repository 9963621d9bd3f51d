"""Whole detectors lose the same with the stand-in and with compiled mmcv."""
import copy
from importlib import import_module

import mmcv._ext
import mmdet.models  # noqa: F401
import pytest
import torch
from mmengine.registry import MODELS
from zoo import LEAVES, batch, load, scope, shrink

from rmoe.mmcv_ops import extension

NAMES = ('mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco',
         'cascade-mask-rcnn_swin-b-moe-e8k1-p4-w7_fpn_8xb2-ms-crop-3x_coco',
         'retinanet_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco',
         'dino-4scale_swin-t-moe-e8k1-p4-w7_8xb2-12e_coco')


@pytest.mark.mmcv_ops
@pytest.mark.skipif(mmcv._ext.__file__.endswith('.py'),
                    reason='make test MMCV=full builds them')
@pytest.mark.parametrize('name', NAMES)
def test_losses_and_gradients(name, monkeypatch):
    cfg = shrink(load(next(path for path in LEAVES if path.stem == name)))
    found = []
    for operators in (mmcv._ext, extension):
        for module in ('nms', 'roi_align', 'focal_loss',
                       'multi_scale_deform_attn'):
            # mmcv.ops has functions of the modules' names.
            monkeypatch.setattr(import_module(f'mmcv.ops.{module}'),
                                'ext_module', operators)
        torch.manual_seed(0)
        with scope(cfg):
            # DINO writes into its config.
            model = MODELS.build(copy.deepcopy(cfg.model)).train()
            model.init_weights()
            data = model.data_preprocessor(batch(cfg), True)
            torch.manual_seed(1)
            loss, logged = model.parse_losses(model(**data, mode='loss'))
            loss.backward()
        found.append((logged, {
            key: parameter.grad for key, parameter in
            model.named_parameters() if parameter.grad is not None}))
    for compiled, ours in zip(*found):
        assert compiled.keys() == ours.keys()
        for key, value in compiled.items():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-4, atol=1e-5,
                msg=lambda text, key=key: f'{key}: {text}')
