"""Builds the backbone of a config or its dense twin, and loads images to run
them on."""
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from rmoe.registry import MODELS, type_name

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])


def backbone_config(cfg: Config) -> dict:
    """The config of the MoE backbone in a config of a model, without
    pretrained weights. The default scope of the config becomes the current
    one.

    Raises:
        ValueError: if the backbone is not registered or is dense.
    """
    init_default_scope(cfg.get('default_scope') or 'rmoe')
    backbone = deepcopy(cfg.model.backbone)
    backbone.init_cfg = None
    # This imports the host library, as its runner would do.
    with MODELS.switch_scope_and_registry(None) as registry:
        registry.import_from_location()
    if MODELS.get(backbone.type) is None:
        raise ValueError(f'model.backbone.type={backbone.type!r} is not '
                         'registered; see custom_imports')
    if not backbone.get('moe'):
        raise ValueError(f'{cfg.filename} has no model.backbone.moe: it is a '
                         'dense model')
    return backbone


def dense_twin(backbone: dict) -> dict:
    """The config of the same backbone without experts."""
    if type_name(backbone) == 'UpcycledBackbone':
        return deepcopy(backbone['backbone'])
    return dict(deepcopy(backbone), moe=None)


def build_backbone(backbone: dict) -> nn.Module:
    """Build a backbone in evaluation mode."""
    model = MODELS.build(deepcopy(backbone))
    # eval() is not chained, because that of some models of mmseg returns None.
    model.eval()
    return model


def load_images(folder: str, size: int, cfg: Config) -> Iterator[Tensor]:
    """Load all images of a folder, normalised as the config says.

    Args:
        folder: the folder, which is searched with all folders in it.
        size: height and width to which images are resized.
        cfg: config whose ``data_preprocessor`` has the mean and deviation.

    Yields:
        (1, 3, size, size) tensors.

    Raises:
        ValueError: if there is no image, or one that cannot be decoded.
    """
    paths = sorted(path for path in Path(folder).rglob('*')
                   if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f'--images {folder} holds no image '
                         f'({", ".join(IMAGE_SUFFIXES)})')
    settings = cfg.model.get('data_preprocessor') or {}
    mean, std = (np.array(settings.get(key) or IMAGENET[key], np.float32)
                 for key in ('mean', 'std'))
    for path in paths:
        image = cv2.imread(str(path))
        if image is None:
            raise ValueError(f'{path} is no image that can be read')
        image = cv2.resize(image, (size, size))
        if settings.get('bgr_to_rgb', True):
            image = image[..., ::-1]
        yield torch.from_numpy(((image - mean) / std).transpose(
            2, 0, 1).astype(np.float32))[None]
