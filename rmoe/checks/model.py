"""Checks that the parts of a model fit each other, the data, and the hooks of
the config."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from rmoe.moe import BiasBalancedRouter, collect_losses, moe_layers
from rmoe.registry import type_name


def check_channels(model: Mapping, parts: Mapping[str, nn.Module],
                   images: Tensor) -> list[str]:
    """Find parts of the model that expect another number of channels than they
    get.

    Args:
        model: the config of the model.
        parts: the 'backbone' that was built from it and, if there is one, the
            'neck'.
        images: (B, C, H, W) images, as the backbone gets them.

    Returns:
        The problems.
    """
    stem = next((module for module in parts['backbone'].modules()
                 if isinstance(module, nn.Conv2d)), None)
    channels = images.shape[1]
    if stem is not None and stem.in_channels != channels:
        return [f'images have {channels} channels and the backbone takes '
                f'{stem.in_channels}: set model.backbone.in_channels='
                f'{channels}, or color_type in LoadImageFromFile']
    problems = []
    outs = _run(parts['backbone'], images)
    widths, source = _widths(outs), 'the backbone'
    if model.get('neck'):
        neck, name = model['neck'], 'model.neck'
        if isinstance(neck, (list, tuple)):
            neck, name = neck[0], 'model.neck.0'
        problems += _compare(name, neck, widths, source)
        if problems:
            return problems
        widths, source = _widths(_run(parts['neck'], outs)), 'the neck'
    for name, head in heads(model):
        problems += _compare(name, head, widths, source)
    # rmoe.ImageClassifier has in_channels itself, and no head.
    return problems + _compare('model', model, widths, source)


@torch.no_grad()
def _run(module: nn.Module, inputs: Any) -> Sequence:
    training = module.training
    module.eval()
    outs = module(inputs)
    module.train(training)
    return outs if isinstance(outs, (tuple, list)) else [outs]


def _widths(outs: Sequence) -> list[int]:
    # A ViT may return pairs of a feature map and the class token.
    return [(out if isinstance(out, Tensor) else out[0]).shape[1]
            for out in outs]


def heads(model: Any, name: str = 'model') -> Iterator[tuple[str, Mapping]]:
    """The name and the config of every head of a model that takes feature
    maps."""
    for key in ('decode_head', 'auxiliary_head', 'rpn_head', 'bbox_head',
                'mask_head', 'roi_head'):
        found = model.get(key)
        many = isinstance(found, (list, tuple))
        for i, head in enumerate(found if many else [found]):
            if isinstance(head, Mapping):
                where = f'{name}.{key}.{i}' if many else f'{name}.{key}'
                yield where, head
                # A shared head changes the maps before the other heads get
                # them, so their channels are not known here.
                if not head.get('shared_head'):
                    yield from heads(head, where)


def _compare(name: str, part: Mapping, widths: list[int],
             source: str) -> list[str]:
    given, index = part.get('in_channels'), part.get('in_index')
    if given is None:
        return []
    many = isinstance(given, (list, tuple))
    indices = ([index] if isinstance(index, int) else
               index if index is not None else
               range(len(widths)) if many else [-1])
    bad = [i for i in indices if not -len(widths) <= i < len(widths)]
    if bad:
        return [f'{name}.in_index={index} points at map {bad[0]}; {source} '
                f'gives {len(widths)}, of {widths} channels']
    right = [widths[i] for i in indices]
    if (list(given) if many else [given]) == right:
        return []
    return [f'{name}.in_channels={given}, and {source} gives '
            f'{right if many else right[0]}: set {name}.in_channels='
            f'{right if many else right[0]}']


def losses_of(model: Any, batch: Any
              ) -> tuple[dict[str, float], list[str]]:
    """Run one forward pass in training mode.

    Returns:
        The losses of the model, and the names of the auxiliary losses of its
        routers.
    """
    model.train()
    collect_losses(model, start=True)
    with torch.no_grad():
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
        _, logged = model.parse_losses(losses)
        auxiliary = collect_losses(model, start=False)
    return ({name: float(value) for name, value in logged.items()},
            list(auxiliary))


def check_losses(losses: Mapping[str, float], auxiliary: Sequence[str],
                 hooks: set[str]) -> list[str]:
    """Find losses that are nan or inf, and auxiliary losses of routers that no
    hook adds to the others.

    Args:
        losses: the losses of the model.
        auxiliary: the names of the auxiliary losses.
        hooks: the names of the hooks in the config.
    """
    problems = [f'{name} is {value} in the first batch'
                for name, value in losses.items()
                if value != value or abs(value) == float('inf')]
    if auxiliary and 'MoELossHook' not in hooks:
        problems.append(
            f'routers produce the losses {", ".join(auxiliary)}, but no hook '
            "collects them: add dict(type='rmoe.MoELossHook') to "
            'custom_hooks, or set loss_weights={} in the router')
    return problems


def check_routers(model: nn.Module, hooks: set[str]) -> list[str]:
    """Find routers that need a hook which the config does not have."""
    balanced = any(isinstance(layer.router, BiasBalancedRouter)
                   for layer in moe_layers(model).values())
    if balanced and 'BalanceBiasHook' not in hooks:
        return ['a BiasBalancedRouter does not balance the load without '
                "dict(type='rmoe.BalanceBiasHook') in custom_hooks: add it"]
    return []


def hook_names(cfg: Config) -> set[str]:
    hooks = [*(cfg.get('default_hooks') or {}).values(),
             *(cfg.get('custom_hooks') or [])]
    return {type_name(hook) for hook in hooks if isinstance(hook, Mapping)}


def describe_layers(model: nn.Module) -> list[str]:
    """A line for each MoE layer, with its number of experts E, the experts per
    token K, and its router."""
    return [
        f'{name}: E={layer.num_experts} K={layer.router.experts_per_token:g} '
        f'{type(layer.router).__name__}'
        + ('' if layer.experts.rank is None else
           f' rank {layer.experts.rank}')
        for name, layer in moe_layers(model).items()]
