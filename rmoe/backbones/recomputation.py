"""Activation checkpointing of other libraries' backbones, without their
routers.

A block of a host library with ``with_cp=True`` recomputes all of itself in
backward, including its MoE layer. Tokens would then be routed twice and could
choose other experts the second time. Also, the host libraries' checkpointing
is reentrant, which drops the gradient of auxiliary losses. So this module
switches it off in such a block. Instead, the block's attention and the experts
of its MoE layer recompute themselves, each on its own.
"""
from functools import cache
from typing import Any

import torch
from torch import nn

from rmoe import compat
from rmoe.backbones.base import recompute
from rmoe.moe import MoELayer


def keep_routing_outside(host: nn.Module) -> None:
    """Let the blocks of a backbone recompute what they did, except the
    routers of MoE layers.

    Blocks without a MoE layer stay as they are.

    Args:
        host: a backbone with MoE layers, changed in place.

    Raises:
        ValueError: if a module around a MoE layer recomputes its activations
            and is not the block that directly contains the layer.
    """
    around = {name: [child for child in module.modules()
                     if isinstance(child, MoELayer)]
              for name, module in host.named_modules()
              if not isinstance(module, MoELayer)}
    blocks = [(name, module) for name, module in host.named_modules()
              if getattr(module, 'with_cp', False) is True
              and not isinstance(module, MoELayer) and any(
                  isinstance(child, MoELayer) for child in module.children())]
    covered = {layer for name, _ in blocks for layer in around[name]}
    for name, module in host.named_modules():
        for flag in ('with_cp', 'grad_checkpointing'):
            if getattr(module, flag, False) is not True or isinstance(
                    module, MoELayer):
                continue
            # A backbone keeps the flag after passing it on to its blocks. If
            # all MoE layers inside are in such blocks, there is no problem.
            if flag == 'with_cp' and covered.issuperset(around[name]):
                continue
            if around[name]:
                raise ValueError(
                    f'{name or type(host).__name__} has {flag}=True: the host '
                    'would route tokens twice and could choose other experts '
                    f'the second time. Set {flag}=False there and with_cp='
                    'True in moe, which recomputes the experts alone')
    for _, block in blocks:
        block.with_cp = False  # type: ignore[assignment]
        for child in block.children():
            if isinstance(child, MoELayer):
                child.with_cp = True
            elif any(p.dim() > 1 for p in child.parameters()):
                # Norms, which have only vectors as parameters, are not
                # recomputed: that would save little memory.
                kind: Any = type(child)
                child.__class__ = _recomputed(kind)


class _Recomputed(nn.Module):
    """Mixin for the class of a module that recomputes itself in backward."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so pickle would not find it by name.
        return _empty, (type(self).__bases__[1], ), self.__dict__

    def forward(self, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and not compat.is_compiling():
            return recompute(self, super().forward, *args, **options)
        return super().forward(*args, **options)


@cache
def _recomputed(kind: Any) -> Any:
    """The subclass of ``kind`` whose modules recompute themselves."""
    return type(kind.__name__, (_Recomputed, kind), {})


def _empty(kind: Any) -> Any:
    """A module of the subclass, not initialised; pickle then sets its
    state."""
    recomputed = _recomputed(kind)
    return recomputed.__new__(recomputed)
