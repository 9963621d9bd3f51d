"""Padded batches: which tokens of a map belong to an image.

mmdet and mmseg pad the images of a batch at the right and at the bottom to one
size, and note each image's own size in its data sample. Padded tokens must not
be routed, but a backbone gets the pixels alone and does not know them. So the
model that is called with the data samples passes the sizes on to every MoE
backbone inside it, by forward hooks, at every forward pass: in training, in
evaluation and in inferencers.

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

# Strides that maps of other libraries' backbones may have, in the order in
# which they are tried.
STRIDES = (16, 4, 8, 32, 14)


@dataclass(frozen=True)
class ValidArea:
    """The part of a padded batch that holds images.

    Attributes:
        sizes_B2: (B, 2) int64, on the CPU, height and width of each image in
            pixels. It is a tensor, because with plain numbers torch.compile
            would compile anew for every batch.
        padded: (height, width) of all images after padding.
    """
    sizes_B2: Tensor
    padded: tuple[int, int]

    def covers(self, images: Tensor) -> bool:
        """Return True if this area fits a batch: the same number of images
        and the padded size. It does not fit windows of sliding inference."""
        return (len(images) == len(self.sizes_B2) and
                tuple(images.shape[2:]) == self.padded)

    def tokens(self, hw: tuple[int, int], stride: int,
               device: torch.device, leading: int = 0) -> Tensor:
        """(B, leading + h w) bool, True for tokens whose patch contains a
        pixel of the image. Leading class tokens are always valid.

        Args:
            hw: height and width of the map, in tokens.
            stride: pixels from one token to the next. It is not computed as
                padded / hw, which is too small if the last patch extends
                beyond the edge of the images.
            device: device of the result.
            leading: number of tokens before those of the map.
        """
        rows, columns = (torch.arange(n) * stride < size_B1
                         for n, size_B1 in zip(hw, self.sizes_B2.split(1, 1)))
        map_BT = (rows[:, :, None] & columns[:, None]).flatten(1)
        first_BT = map_BT.new_ones(len(map_BT), leading)
        return torch.cat([first_BT, map_BT], 1).to(device)


def image_sizes(images: Any, samples: Any) -> tuple[tuple[int, int], ...]:
    """Return height and width of each image of a batch without its padding;
    an empty tuple if they are not known.

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
    """Return the valid area of a batch; None if nothing is padded.

    Args:
        images: (B, C, height, width).
        sizes: height and width of each image without its padding.
    """
    padded = (images.shape[2], images.shape[3])
    if all(height >= padded[0] and width >= padded[1]
           for height, width in sizes):
        return None
    return ValidArea(torch.tensor(sizes), padded)


@dataclass(frozen=True)
class KnownBatch:
    """A batch whose padding is known, during the forward pass of a model.

    Attributes:
        teller: ``id`` of the module that was called with the data samples.
        images: (B, C, height, width).
        area: the part that is not padding; None if nothing is padded.
    """
    teller: int
    images: Tensor
    area: ValidArea | None


def install_padding(model: nn.Module) -> None:
    """Let a model pass the padding of each batch on to its MoE backbones,
    wherever inside the model they are.

    The model must be called with ``inputs`` and ``data_samples``, or with
    dicts that hold both by branch, as in semi-supervised models. Calling this
    function twice has no further effect. It need not be called for a module
    with a MoE backbone as its attribute ``backbone``: such modules are
    prepared as soon as they get the backbone.

    Args:
        model: the top model, or another module that is called with the data
            samples.
    """
    if _tell not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_tell, with_kwargs=True)
        model.register_forward_hook(_forget, always_call=True)


def _become_owner(owner: nn.Module, name: str, module: nn.Module | None
                  ) -> None:
    """Prepare a module that gets a MoE backbone as its ``backbone``.

    PyTorch calls this whenever a submodule is registered in a module. It is
    for inferencers and for models used on their own, where no hook or runner
    calls :func:`install_padding`.
    """
    if name == 'backbone' and module is not None and moe_layers(module):
        install_padding(owner)


register_module_module_registration_hook(_become_owner)


# The hooks are plain functions that use the module they are called with.
# Bound to one module, they would still refer to it in a copy of the model.
def _tell(owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: pass the padding of the batch on to the backbones."""
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
    # Batches that a module around this one has passed on are kept.
    for backbone in _backbones(owner) if batches else ():
        backbone.known_batches = batches + backbone.known_batches


def _forget(owner: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook: take back what ``_tell`` has passed on."""
    for backbone in _backbones(owner):
        backbone.known_batches = tuple(
            batch for batch in backbone.known_batches
            if batch.teller != id(owner))


def _backbones(model: nn.Module) -> list[Any]:
    """The MoE backbones inside a model."""
    # hasattr would also find wrappers, which pass on the attributes of the
    # module that they wrap.
    return [module for module in model.modules()
            if 'known_batches' in vars(module)]


def area_of(backbone: Any, images: Tensor) -> ValidArea | None:
    """Return the valid area of images that a backbone is called with.

    Args:
        backbone: a backbone with ``known_batches``.
        images: (B, C, height, width).

    Returns:
        The area; None if nothing is padded or nothing is known.
    """
    known: tuple[KnownBatch, ...] = backbone.known_batches
    # The batches of several branches may have the same shape, so the tensors
    # themselves are compared. With one batch that is not needed, and a traced
    # graph then contains no such comparison.
    if len(known) > 1:
        for batch in known:
            if batch.images is images:
                return batch.area
    for batch in known:
        if batch.area and batch.area.covers(images):
            return batch.area
    # Windows of sliding inference have another shape and are not masked.
    # There are none in training, so there another shape deserves a warning.
    if backbone.training and not compat.is_compiling() and any(
            batch.area for batch in known):
        warnings.warn(
            f'{type(backbone).__name__} got images of another shape than the '
            'padded ones its model was called with. So it is not known which '
            'of their tokens are padding, and all of them are routed',
            stacklevel=3)
    return None


def mask_foreign_layers(backbone: Any) -> None:
    """Let the MoE layers of another library's backbone know the padding.

    The stride of their map is found from the number of their tokens. FFNs
    with a convolution are left out, because they need the outputs of all
    tokens.

    Args:
        backbone: the backbone with its MoE layers, which gets forward hooks.
    """
    backbone.known_batches = ()
    backbone.register_forward_pre_hook(_share)
    layers: Any = moe_layers(backbone).values()
    for layer in layers:
        layer.valid_area = None
        if not layer.needs_all_rows:
            layer.register_forward_pre_hook(_mask, with_kwargs=True)


def _share(backbone: Any, args: tuple) -> None:
    """Forward pre-hook of a backbone: give its MoE layers the valid area."""
    images = args[0]
    # A decode head is called with feature maps, of which it is not known here
    # how they come from the images.
    area = area_of(backbone, images) if isinstance(images, Tensor) else None
    layers: Any = moe_layers(backbone).values()
    for layer in layers:
        layer.valid_area = area


def _mask(layer: Any, args: tuple, kwargs: dict[str, Any]
          ) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a MoE layer: add ``valid`` to its arguments."""
    area, x = layer.valid_area, args[0]
    if area is None or layer.core_only:
        return None
    valid = _tokens_like(area, x)
    if valid is None:
        warnings.warn(
            f'{layer.name}: {tuple(x.shape)} tokens of images padded to '
            f'{area.padded} are no map of stride {STRIDES}, so it is not '
            'known which of them are padding, and all of them are routed',
            stacklevel=2)
        return None
    return args, dict(kwargs, valid=valid)


def _tokens_like(area: ValidArea, x: Tensor) -> Tensor | None:
    """Return the mask of (B, T, D) or (B, h, w, D) tokens, for the first of
    ``STRIDES`` whose map has so many tokens, with or without one class token;
    None if none has."""
    tokens = x.shape[1:-1].numel()
    for stride in STRIDES:
        height, width = (-(-side // stride) for side in area.padded)
        leading = tokens - height * width
        if leading in (0, 1):
            return area.tokens((height, width), stride, x.device,
                               leading).view(x.shape[:-1])
    return None
