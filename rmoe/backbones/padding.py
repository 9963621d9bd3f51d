"""Padded batches: which tokens of a map stand for an image.

mmdet and mmseg pad the images of a batch at the right and at the bottom to one
size and note each image's own size in its data sample. A backbone is handed
the pixels alone; so the model that is called with the data samples tells every
MoE backbone inside the sizes, at every forward pass, in training, evaluation
and inferencers alike.

T tokens, B images.
"""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from rmoe import compat
from rmoe.moe import moe_layers

# Strides of the maps of foreign backbones.
STRIDES = (16, 4, 8, 32, 14)


@dataclass(frozen=True)
class ValidArea:
    """The part of a padded batch that holds images.

    Attributes:
        sizes_B2: (B, 2) int64, height and width of each image in pixels. A
            tensor, on the CPU: torch.compile would compile numbers anew for
            every batch.
        padded: (height, width) of all after padding.
    """
    sizes_B2: Tensor
    padded: tuple[int, int]

    def covers(self, images: Tensor) -> bool:
        """Is it about this batch? A window of sliding inference is not."""
        return (len(images) == len(self.sizes_B2) and
                tuple(images.shape[2:]) == self.padded)

    def tokens(self, hw: tuple[int, int], stride: int,
               device: torch.device, leading: int = 0) -> Tensor:
        """(B, leading + h w) bool: tokens whose patch has a pixel of the
        image, after ``leading`` class tokens, which are always valid.

        Args:
            hw: tokens down and across the map.
            stride: pixels from token to token. Not padded / hw, which is
                less where the map's last token hangs over the edge.
            device: of the result.
            leading: tokens before those of the map.
        """
        rows, columns = (torch.arange(n) * stride < size_B1
                         for n, size_B1 in zip(hw, self.sizes_B2.split(1, 1)))
        map_BT = (rows[:, :, None] & columns[:, None]).flatten(1)
        first_BT = map_BT.new_ones(len(map_BT), leading)
        return torch.cat([first_BT, map_BT], 1).to(device)


def image_sizes(images: Any, samples: Any) -> tuple[tuple[int, int], ...]:
    """Height and width of each image of a batch without its padding; empty
    if they are not known.

    Args:
        images: (B, C, height, width).
        samples: B data samples with ``img_shape`` in their metainfo.
    """
    if not isinstance(samples, Sequence) or not isinstance(images, Tensor):
        return ()
    shapes: list[Any] = [getattr(sample, 'metainfo', {}).get('img_shape')
                         for sample in samples]
    if len(images) != len(shapes) or not all(shapes):
        return ()
    return tuple((int(shape[0]), int(shape[1])) for shape in shapes)


def valid_area(images: Tensor, sizes: Sequence[tuple[int, int]]
               ) -> ValidArea | None:
    """Of a batch and the sizes of its images; None if nothing is padded."""
    padded = (images.shape[2], images.shape[3])
    if all(height >= padded[0] and width >= padded[1]
           for height, width in sizes):
        return None
    return ValidArea(torch.tensor(sizes), padded)


@dataclass(frozen=True)
class KnownBatch:
    """A batch of which a model knows what is padding.

    Attributes:
        teller: id of the module that knows it.
        images: (B, C, height, width).
        area: None if nothing is padded.
    """
    teller: int
    images: Tensor
    area: ValidArea | None


def install_padding(model: nn.Module) -> None:
    """Let a model tell its MoE backbones, wherever they are in it and
    whatever is around them, which part of a batch is padding.

    The model is called with ``inputs`` and ``data_samples``, or with dicts of
    both by branch, as semi-supervised models are. A second call changes
    nothing. A module that has a MoE backbone as its ``backbone`` needs no
    call.

    Args:
        model: the top model, or what is called with the data samples.
    """
    if _tell not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_tell, with_kwargs=True)
        model.register_forward_hook(_forget, always_call=True)


def _become_owner(owner: nn.Module, name: str, module: nn.Module | None
                  ) -> None:
    """Called for every module that is put into another. For inferencers and
    models in use by themselves, in which nobody installs anything."""
    if name == 'backbone' and module is not None and moe_layers(module):
        install_padding(owner)


register_module_module_registration_hook(_become_owner)


# Hooks are functions of the module they get, so that copies of a model work.
def _tell(owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    named = dict(zip(('inputs', 'data_samples'), args), **kwargs)
    inputs, samples = named.get('inputs'), named.get('data_samples')
    if not isinstance(inputs, Mapping) or not isinstance(samples, Mapping):
        inputs, samples = {'': inputs}, {'': samples}
    batches: tuple[KnownBatch, ...] = ()
    for branch, images in inputs.items():
        sizes = image_sizes(images, samples.get(branch))
        if sizes:
            batches += (KnownBatch(id(owner), images,
                                   valid_area(images, sizes)), )
    # What is known to a module around this one stays known.
    for backbone in _backbones(owner) if batches else ():
        backbone.known_batches = batches + backbone.known_batches


def _forget(owner: nn.Module, args: tuple, output: Any) -> None:
    for backbone in _backbones(owner):
        backbone.known_batches = tuple(
            batch for batch in backbone.known_batches
            if batch.teller != id(owner))


def _backbones(model: nn.Module) -> list[Any]:
    # Not hasattr: wrappers have the attributes of what they wrap.
    return [module for module in model.modules()
            if 'known_batches' in vars(module)]


def area_of(backbone: Any, images: Tensor) -> ValidArea | None:
    """What a backbone was told of (B, C, height, width) images; None means
    that nothing is padded, or that nothing is known."""
    known: tuple[KnownBatch, ...] = backbone.known_batches
    # Branches may have one shape. A trace compares no tensors if there is
    # only one batch.
    if len(known) > 1:
        for batch in known:
            if batch.images is images:
                return batch.area
    for batch in known:
        if batch.area and batch.area.covers(images):
            return batch.area
    # Windows of sliding inference are not masked; training has none.
    if backbone.training and not compat.is_compiling() and any(
            batch.area for batch in known):
        warnings.warn(
            f'{type(backbone).__name__} got images of another shape than the '
            'padded ones its model was called with: which of their tokens '
            'are padding is not known, and all of them are routed',
            stacklevel=3)
    return None


def mask_foreign_layers(backbone: Any) -> None:
    """Let the MoE layers of a backbone that is not ours know the padding.

    Their grid is read off the number of their tokens. FFNs that convolve
    are left out: they need the outputs of all tokens.
    """
    backbone.known_batches = ()
    backbone.register_forward_pre_hook(_share)
    layers: Any = moe_layers(backbone).values()
    for layer in layers:
        layer.valid_area = None
        if not layer.needs_all_rows:
            layer.register_forward_pre_hook(_mask, with_kwargs=True)


def _share(backbone: Any, args: tuple) -> None:
    area = area_of(backbone, args[0])
    layers: Any = moe_layers(backbone).values()
    for layer in layers:
        layer.valid_area = area


def _mask(layer: Any, args: tuple, kwargs: dict[str, Any]
          ) -> tuple[tuple, dict[str, Any]] | None:
    area, x = layer.valid_area, args[0]
    if area is None or layer.core_only:
        return None
    valid = _tokens_like(area, x)
    if valid is None:
        warnings.warn(
            f'{layer.name}: {tuple(x.shape)} tokens of images padded to '
            f'{area.padded} are no map of stride {STRIDES}; padding is '
            'routed like everything else', stacklevel=2)
        return None
    return args, dict(kwargs, valid=valid)


def _tokens_like(area: ValidArea, x: Tensor) -> Tensor | None:
    """A mask for (B, T, D) or (B, h, w, D) tokens of some stride."""
    tokens = x.shape[1:-1].numel()
    for stride in STRIDES:
        height, width = (-(-side // stride) for side in area.padded)
        leading = tokens - height * width
        if leading in (0, 1):
            return area.tokens((height, width), stride, x.device,
                               leading).view(x.shape[:-1])
    return None
