"""Which FFNs of a model can become MoE FFNs."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from rmoe.anywhere.hugging_face import MoEHalves, MoESegformerFFN, PassedOn
from rmoe.anywhere.plain import MoEPlainFFN, calls_of, linear_pairs
from rmoe.moe import MoEFFN, MoELayer, MoEMixFFN


@dataclass
class Found:
    """A FFN that can become a MoE FFN.

    Attributes:
        kind: the class of the dense module, for reports.
        build: makes the layer from ``num_experts``, ``router``, ``rank`` and
            ``align``, and leaves the model as it is.
        replaced: the modules that the layer stands for.
    """
    kind: str
    build: Callable[..., MoELayer]
    replaced: nn.Module


def find_ffns(model: nn.Module) -> dict[str, Found]:
    """The FFNs of a model by module name, in the order of its modules.

    Raises:
        ValueError: if weights are missing (device meta).
    """
    traced = [name for name, module in model.named_modules()
              if isinstance(module, fx.GraphModule)]
    pairs = set(linear_pairs(model))
    found: dict[str, Found] = {}
    for name, module in model.named_modules():
        # A traced model calls the layers of a FFN, never the FFN; and mmcv's
        # FFN has one inside.
        if any(name == at or not at or name.startswith(f'{at}.')
               for at in (*traced, *found)):
            continue
        build = _builder(module, name in pairs)
        if build is not None:
            found[name] = Found(type(module).__name__, build, module)
    return found


def _builder(module: Any, pair: bool) -> Callable[..., MoELayer] | None:
    """Known by what they are called: no library need be installed."""
    kind = f'{type(module).__module__}.{type(module).__name__}'
    if kind == 'mmcv.cnn.bricks.transformer.FFN':
        return partial(MoEFFN.from_dense, module)
    if kind.endswith('.MixFFN') and kind.startswith(('mmseg.', 'mmdet.')):
        six = isinstance(module.layers, nn.Sequential) and len(
            module.layers) == 6
        return partial(MoEMixFFN, module) if six else None
    if kind.endswith('.SegformerMixFFN'):
        return partial(MoESegformerFFN, module)
    if pair and (calls := calls_of(module)) is not None:
        return partial(MoEPlainFFN, module, calls)
    return None


def find_halves(model: nn.Module) -> dict[str, Found]:
    """FFNs of Hugging Face in two halves, by the name of the first."""
    found = {}
    for name, block in model.named_modules():
        first, second = (getattr(block, half, None)
                         for half in ('intermediate', 'output'))
        if isinstance(first, nn.Module) and isinstance(second, nn.Module) and (
                _are_halves(first, second)):
            found[f'{name}.intermediate' if name else 'intermediate'] = Found(
                type(first).__name__, partial(MoEHalves, first, second), first)
    return found


@torch.no_grad()
def _are_halves(first: Any, second: Any) -> bool:
    fc1, fc2 = (getattr(half, 'dense', None) for half in (first, second))
    act = getattr(first, 'intermediate_act_fn', None)
    if not (type(fc1) is type(fc2) is nn.Linear and isinstance(act, nn.Module)
            and fc1.bias is not None and fc1.in_features == fc2.out_features
            and fc1.out_features == fc2.in_features):
        return False
    x = torch.linspace(-1, 1, 4 * fc1.in_features).sin().view(1, 4, -1).to(
        fc1.weight)
    return torch.equal(first(x), act(fc1(x)))


def join(layer: MoELayer) -> None:
    """After the layer is in its place: let its other half pass on what it
    computes."""
    if isinstance(layer, MoEHalves):
        # The object stays: whoever refers to it, or has hooks on it, goes on.
        layer.second[0].dense.__class__ = PassedOn


def part(layer: MoELayer) -> None:
    """The opposite of :func:`join`."""
    if isinstance(layer, MoEHalves):
        layer.second[0].dense.__class__ = nn.Linear
