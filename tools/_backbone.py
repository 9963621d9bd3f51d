"""The backbone of a config, its dense twin, and images to run them on."""
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from rmoe.moe import moe_layers
from rmoe.registry import MODELS
from rmoe.visualization.recording import record_routing

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])


def backbone_config(cfg: Config) -> dict:
    """A config's MoE backbone, without its pretrained weights.

    Raises:
        ValueError: if it is dense.
    """
    init_default_scope(cfg.get('default_scope') or 'rmoe')
    backbone = deepcopy(cfg.model.backbone)
    backbone.init_cfg = None
    # Imports the host library, as the first lookup would.
    with MODELS.switch_scope_and_registry(None) as registry:
        registry.import_from_location()
    if MODELS.get(backbone.type) is None:
        raise ValueError(f'model.backbone.type={backbone.type!r} is not '
                         'registered; see custom_imports')
    if not backbone.get('moe'):
        raise ValueError(f'{cfg.filename} has no model.backbone.moe: it is a '
                         'dense model')
    return backbone


def build(backbone: dict) -> nn.Module:
    """In evaluation mode."""
    model = MODELS.build(deepcopy(backbone))
    model.eval()  # which returns None in some of mmseg's
    return model


def load_images(folder: str, size: int, cfg: Config) -> Iterator[Tensor]:
    """(1, 3, size, size) each image, normalised as the config does.

    Raises:
        ValueError: if there is no image, or one that does not decode.
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


@torch.no_grad()
def measure_loads(model: nn.Module, images: list[Tensor]
                  ) -> dict[str, Tensor]:
    """(E,) tokens that each expert of each MoE layer takes."""
    loads = {}
    for image in images:
        with record_routing(model) as records:
            model(image)
        for name, routings in records.items():
            for routing in routings:
                loads[name] = loads.get(name, 0) + routing.load_E
    return loads


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module,
                       images: list[Tensor]) -> dict[str, float]:
    """Between the feature maps of two backbones: the largest absolute one,
    and the norm of all over the norm of the first's."""
    largest = squares = total = 0.
    for image in images:
        for a, b in zip(one(image), other(image), strict=True):
            largest = max(largest, float((a - b).abs().max()))
            squares += float((a - b).square().sum())
            total += float(a.square().sum())
    return dict(largest=largest, relative=(squares / total)**0.5)


def layers_that_change_the_function(model: nn.Module) -> str:
    """Why upcycling alone changes the model in its present mode, even with
    zero residuals; empty if it does not."""
    kinds: dict[str, int] = {}
    for layer in moe_layers(model).values():
        if not layer.preserves_function:
            kind = (f'{type(layer.router).__name__} with align='
                    f'{layer.align!r}, unrouted={layer.unrouted!r}, '
                    f'core={layer.experts.core}')
            kinds[kind] = kinds.get(kind, 0) + 1
    return '; '.join(f'{count} MoE layers are {kind}'
                     for kind, count in kinds.items())
