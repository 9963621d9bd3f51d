"""Activation checkpointing of foreign backbones, with routing outside of it.

A host's block with ``with_cp=True`` recomputes all of itself in backward, its
MoE layer included: tokens would be routed twice and could choose other
experts the second time, and the hosts' checkpoints are reentrant, which drops
the gradient of auxiliary losses. So such a block no longer recomputes itself;
its attention and the experts of its MoE layer do so, each by itself.
"""
from functools import cache
from typing import Any

import torch
from torch import nn

from rmoe import compat
from rmoe.backbones.base import recompute
from rmoe.moe import MoELayer


def keep_routing_outside(host: nn.Module) -> None:
    """Recompute what the host's blocks would recompute, but for routing.

    Blocks without a MoE layer stay as they are.

    Args:
        host: a backbone with MoE layers, changed in place.

    Raises:
        ValueError: if something recomputes activations around a MoE layer
            that is not the MoE layer's own block.
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
            # A backbone keeps the flag that it has passed on to its blocks.
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
                # Norms have vectors alone; what they save is not worth it.
                kind: Any = type(child)
                child.__class__ = _recomputed(kind)


class _Recomputed(nn.Module):
    """Mixed into a module's class: the module recomputes itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The class has no name under which pickle could find it.
        return _empty, (type(self).__bases__[1], ), self.__dict__

    def forward(self, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and not compat.is_compiling():
            return recompute(self, super().forward, *args, **options)
        return super().forward(*args, **options)


@cache
def _recomputed(kind: Any) -> Any:
    return type(kind.__name__, (_Recomputed, kind), {})


def _empty(kind: Any) -> Any:
    recomputed = _recomputed(kind)
    return recomputed.__new__(recomputed)
