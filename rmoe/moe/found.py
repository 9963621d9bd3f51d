"""Which FFNs of a model can become MoE FFNs, and how they get their place."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from rmoe.moe.ffn import MoEFFN
from rmoe.moe.halves import MoEHalves
from rmoe.moe.layer import MoELayer
from rmoe.moe.mix_ffn import MoEConvMlp, MoEMixFFN, MoESegformerFFN
from rmoe.moe.mlp import MoEMlp
from rmoe.moe.mlp_form import form_of, small_mlps
from rmoe.moe.placement import choose_blocks
from rmoe.moe.plain_core import HOOKS, PassedOn

# By the name of the dense class: no library need be installed.
LAYERS: Mapping[str, Callable[..., MoELayer]] = {
    'mmcv.cnn.bricks.transformer.FFN': MoEFFN.from_dense,
    'mmseg.models.backbones.mit.MixFFN': MoEMixFFN,
    'mmdet.models.backbones.pvt.MixFFN': MoEMixFFN,
    'mmseg.models.backbones.mscan.Mlp': MoEConvMlp,
    'transformers.models.segformer.modeling_segformer.SegformerMixFFN':
        MoESegformerFFN,
}


@dataclass(frozen=True)
class Found:
    """A FFN that can become a MoE FFN.

    Attributes:
        kind: the class of the dense module, for reports.
        build: makes the layer from those arguments of
            :class:`rmoe.moe.MoEFFN` that concern experts and routing, and
            leaves the model as it is.
        replaced: the module that the layer stands for.
    """
    kind: str
    build: Callable[..., MoELayer]
    replaced: nn.Module


def find_ffns(model: nn.Module) -> dict[str, Found]:
    """The FFNs of a model by module name, in the order of its modules.

    They are those of ``LAYERS``, the halves of Hugging Face, and whatever
    computes what a MLP does (:mod:`rmoe.moe.mlp_form`).
    """
    traced = [name for name, module in model.named_modules()
              if isinstance(module, fx.GraphModule)]
    mlps = set(small_mlps(model))
    found: dict[str, Found] = {}
    for name, module in model.named_modules():
        # A traced model calls the layers of a FFN, never the FFN; and mmcv's
        # FFN has one inside.
        if any(name == at or not at or name.startswith(f'{at}.')
               for at in (*traced, *found)):
            continue
        first, build = _builder(module, name in mlps)
        at = '.'.join(part for part in (name, first) if part)
        if build is not None and at:
            replaced = model.get_submodule(at)
            found[at] = Found(type(replaced).__name__, build, replaced)
    return found


def choose_ffns(layers: Any, names: Sequence[str], model: str,
                option: str = 'layers') -> list[str]:
    """Which of a model's FFNs are meant.

    Args:
        layers: indices, names, or a placement
            (:func:`rmoe.moe.placement.choose_blocks`).
        names: of all FFNs, in order.
        model: its name, for messages.
        option: what the user calls ``layers``.

    Raises:
        ValueError: if one is named that is not there, or none is chosen.
    """
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, Sequence) and any(
            isinstance(one, str) for one in layers):
        unknown = [one for one in layers if one not in names]
        if unknown:
            raise ValueError(
                f'{option} names {unknown[0]!r}, which is no FFN of {model}; '
                f'those are {", ".join(names)}')
        return [one for one in names if one in layers]
    indices = choose_blocks(layers, len(names), option)
    for index in indices:
        if not 0 <= index < len(names):
            raise ValueError(f'{option} names FFN {index}; {model} has FFNs '
                             f'0 to {len(names) - 1}')
    if not indices:
        raise ValueError(f'{option}={layers} selects none of the '
                         f'{len(names)} FFNs of {model}')
    return [names[index] for index in sorted(set(indices))]


def put_layers(model: nn.Module, found: Mapping[str, Found],
               **options: Any) -> None:
    """Turn FFNs into MoE layers, in place.

    Args:
        model: what they are in.
        found: those that are to have experts, by name.
        options: see :attr:`Found.build`.

    Raises:
        ValueError: if one cannot have such experts; the model is then
            unchanged.
    """
    built = {key: _build(one, options) for key, one in found.items()}
    for key, layer in built.items():
        layer.name = f'MoE layer {key} of {type(model).__name__}'
        layer.check_core()
    for key, layer in built.items():
        put(model, key, layer)
        if isinstance(layer, MoEHalves):
            # The object stays: whoever refers to it, or has hooks on it,
            # goes on.
            second: Any = layer.second[0].dense
            second.__class__, second.owner = PassedOn, (layer, )


def put(model: nn.Module, key: str, module: nn.Module) -> None:
    """Put a module where another one is, everywhere in the model."""
    old = model.get_submodule(key)
    for name in [name for name, other in model.named_modules(
            remove_duplicate=False) if other is old]:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, module)


def take_out(model: nn.Module, key: str, dense: nn.Module) -> None:
    """Undo :func:`put_layers` for one layer: its core is the FFN again.

    Args:
        model: what it is in.
        key: its name.
        dense: the module that it replaced.
    """
    layer = model.get_submodule(key)
    if isinstance(layer, MoEHalves):
        second: Any = layer.second[0].dense
        second.__class__ = nn.Linear
        del second.owner
    for child, module in layer.named_children():
        # Those that a library has put in since.
        if child in dict(dense.named_children()):
            setattr(dense, child, module)
    dense.train(layer.training)
    put(model, key, dense)


def _build(one: Found, options: Mapping[str, Any]) -> MoELayer:
    for hooks in HOOKS:
        if getattr(one.replaced, hooks):
            raise ValueError(
                f'a {one.kind} that is to have experts has hooks ({hooks}), '
                'which nobody would call: register them on its MoE layer '
                'afterwards, or name other layers')
    layer = one.build(**options)
    weight = next(one.replaced.parameters())
    layer.experts.to(weight.device, weight.dtype)
    # Routers decide in float32 whatever the model is in.
    return layer.to(weight.device).train(one.replaced.training)


def _builder(module: Any, may_be_mlp: bool
             ) -> tuple[str, Callable[..., MoELayer] | None]:
    """The part of a module that a MoE layer can replace ('' for all of it),
    and what makes the layer."""
    kind = f'{type(module).__module__}.{type(module).__name__}'
    if kind in LAYERS:
        return '', partial(LAYERS[kind], module)
    first, second = (getattr(module, half, None)
                     for half in ('intermediate', 'output'))
    if isinstance(first, nn.Module) and isinstance(second, nn.Module) and (
            _are_halves(first, second)):
        return 'intermediate', partial(MoEHalves, first, second)
    form = form_of(module) if may_be_mlp else None
    return '', None if form is None else partial(
        MoEMlp, module, form=form)


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
    return x.is_meta or torch.equal(first(x), act(fc1(x)))
