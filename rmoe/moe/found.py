"""Finds the FFNs of a model that can become MoE layers, and replaces them.

``rmoe.upcycle`` and ``rmoe.UpcycledBackbone`` use it for models that were not
written for experts.
"""
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

# The keys are names of dense classes and not the classes themselves, so that
# none of these libraries has to be installed.
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
        build: builds the MoE layer from those arguments of
            :class:`rmoe.moe.MoEFFN` that concern experts and routing; it does
            not change the model.
        replaced: the module that the MoE layer will replace.
    """
    kind: str
    build: Callable[..., MoELayer]
    replaced: nn.Module


def find_ffns(model: nn.Module) -> dict[str, Found]:
    """Find the FFNs of a model that can become MoE layers.

    These are the classes of ``LAYERS``, the FFNs of Hugging Face that consist
    of two modules (:mod:`rmoe.moe.halves`), and any other module that
    computes what a MLP computes (:mod:`rmoe.moe.mlp_form`).

    Returns:
        The FFNs by module name, in the order of the model's modules.
    """
    traced = [name for name, module in model.named_modules()
              if isinstance(module, fx.GraphModule)]
    mlps = set(small_mlps(model))
    found: dict[str, Found] = {}
    for name, module in model.named_modules():
        # Modules inside two kinds of others are skipped. A model traced by
        # torch.fx calls the layers of a FFN but never the FFN module, so a
        # replacement would not be called. And a FFN that was found may
        # contain a smaller one, as mmcv's does.
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
    """Return the names of the FFNs that ``layers`` selects.

    Args:
        layers: indices, names, or a placement
            (:func:`rmoe.moe.placement.choose_blocks`).
        names: the names of all FFNs of the model, in order.
        model: the name of the model, for messages.
        option: the name of the user's option that holds ``layers``, for
            messages.

    Raises:
        ValueError: if ``layers`` names a FFN that does not exist, or selects
            none.
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
    """Turn FFNs of a model into MoE layers, in place.

    Args:
        model: the model that contains the FFNs.
        found: the FFNs to turn into MoE layers, by name.
        options: arguments of :attr:`Found.build`.

    Raises:
        ValueError: if one of the FFNs cannot have such experts. The model is
            then unchanged.
    """
    built = {key: _build(one, options) for key, one in found.items()}
    for key, layer in built.items():
        layer.name = f'MoE layer {key} of {type(model).__name__}'
        layer.check_core()
    for key, layer in built.items():
        put(model, key, layer)
        if isinstance(layer, MoEHalves):
            # The class of the second linear layer is changed instead of
            # replacing the object, so that references to it and hooks on it
            # stay valid.
            second: Any = layer.second[0].dense
            second.__class__, second.owner = PassedOn, (layer, )


def put(model: nn.Module, key: str, module: nn.Module) -> None:
    """Replace a module of a model, wherever in the model it is used.

    Args:
        model: the model, changed in place.
        key: the name of the module to replace.
        module: the module that takes its place.
    """
    old = model.get_submodule(key)
    for name in [name for name, other in model.named_modules(
            remove_duplicate=False) if other is old]:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, module)


def take_out(model: nn.Module, key: str, dense: nn.Module) -> None:
    """Undo :func:`put_layers` for one layer: its core becomes the FFN again.

    Args:
        model: the model that contains the MoE layer, changed in place.
        key: the name of the MoE layer.
        dense: the module that the MoE layer replaced.
    """
    layer = model.get_submodule(key)
    if isinstance(layer, MoEHalves):
        second: Any = layer.second[0].dense
        second.__class__ = nn.Linear
        del second.owner
    for child, module in layer.named_children():
        # A library may have replaced a submodule since; the current one goes
        # into the dense FFN.
        if child in dict(dense.named_children()):
            setattr(dense, child, module)
    dense.train(layer.training)
    put(model, key, dense)


def _build(one: Found, options: Mapping[str, Any]) -> MoELayer:
    """Build the MoE layer of a FFN, on its device and in its type and mode."""
    for hooks in HOOKS:
        if getattr(one.replaced, hooks):
            raise ValueError(
                f'a {one.kind} that is to have experts has hooks ({hooks}), '
                'which would no longer be called. Remove them and register '
                'them on its MoE layer afterwards, or choose other layers')
    layer = one.build(**options)
    weight = next(one.replaced.parameters())
    layer.experts.to(weight.device, weight.dtype)
    # The router keeps its float32 parameters, whatever type the model has.
    return layer.to(weight.device).train(one.replaced.training)


def _builder(module: Any, may_be_mlp: bool
             ) -> tuple[str, Callable[..., MoELayer] | None]:
    """Find out how a MoE layer can replace a module or a part of it.

    Args:
        module: the module.
        may_be_mlp: whether to find out, by running it, if it is a MLP.

    Returns:
        The name of the part to replace, '' for the whole module; and the
        function that builds the MoE layer, None if there is none.
    """
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
    """Return True if two modules are the halves of a FFN as
    :class:`rmoe.moe.halves.MoEHalves` takes them. The first half is also run
    on a few tokens, to see that it computes what its parts say."""
    fc1, fc2 = (getattr(half, 'dense', None) for half in (first, second))
    act = getattr(first, 'intermediate_act_fn', None)
    if not (type(fc1) is type(fc2) is nn.Linear and isinstance(act, nn.Module)
            and fc1.bias is not None and fc1.in_features == fc2.out_features
            and fc1.out_features == fc2.in_features):
        return False
    x = torch.linspace(-1, 1, 4 * fc1.in_features).sin().view(1, 4, -1).to(
        fc1.weight)
    return x.is_meta or torch.equal(first(x), act(fc1(x)))
