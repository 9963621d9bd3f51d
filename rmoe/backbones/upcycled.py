"""Gives experts to any dense transformer backbone that is registered.

The backbone may come from mmseg, mmdet, mmpretrain or timm.
"""
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from rmoe.backbones.ffn import layer_args
from rmoe.backbones.padding import mask_foreign_layers
from rmoe.backbones.recomputation import keep_routing_outside
from rmoe.moe import moe_layers
from rmoe.moe.found import choose_ffns, find_ffns, put_layers
from rmoe.registry import MODELS
from rmoe.upcycling import check_loading
from rmoe.upcycling.keymaps import Architecture, Source

# Prefixes under which TIMMBackbone keeps timm's model. Files of timm name the
# weights without them.
INNER = ('timm_model.model.', 'timm_model.')
# timm renames layers.0. to layers_0. in models that return feature maps.
JOINED = re.compile(r'([a-z]+)_(\d+)\.')


@MODELS.register_module(name='UpcycledBackbone')
def upcycled_backbone(backbone: Mapping, moe: Mapping,
                      init_cfg: Mapping | None = None) -> nn.Module:
    """Build a dense backbone and turn some of its FFNs into MoE FFNs.

    The result is the backbone itself, with its class, its options and its
    parameter names, so that its checkpoints load as they are.
    :func:`rmoe.moe.found.find_ffns` finds the FFNs: mmcv's FFN (mmseg's ViT,
    BEiT, Swin, Twins, ...), the MixFFN of mmseg and mmdet (SegFormer, PVT),
    the Mlp of MSCAN, and the MLPs of any library. A block with
    ``with_cp=True`` recomputes its attention and its experts in backward, but
    not its router.

    Args:
        backbone: config of the dense backbone, e.g.
            ``dict(type='mmseg.VisionTransformer', ...)``, or of a decode head
            that has FFNs, e.g. ``dict(type='mmseg.Mask2FormerHead', ...)``.
        moe: ``layers`` (the FFNs that become MoE: indices in the order of the
            backbone's modules, names, ``dict(every=n)`` or
            ``dict(last=n)``), ``expert_mismatch`` ('raise', 'tile', 'slice'
            or 'merge': what to do with a checkpoint of another expert
            count), and arguments of :class:`rmoe.moe.MoEFFN` that concern
            experts and routing.
        init_cfg: the ``init_cfg`` of the backbone, which may be written here
            or in ``backbone``.

    Raises:
        ValueError: if the backbone has no such FFN, if ``layers`` is missing
            or out of range, or if the backbone recomputes activations of
            more than single blocks.
    """
    config = dict(backbone)
    if init_cfg is not None:
        config['init_cfg'] = init_cfg
    host = MODELS.build(config)
    put_experts(host, moe)
    finish(host, moe, next((inner for inner in INNER if any(
        key.startswith(inner) for key, _ in host.named_parameters())), ''))
    return host


def put_experts(host: nn.Module, moe: Mapping) -> None:
    """Turn FFNs of a dense backbone into MoE FFNs, in place.

    Args:
        host: the backbone.
        moe: see :func:`upcycled_backbone`.

    Raises:
        ValueError: see :func:`upcycled_backbone`.
    """
    name = type(host).__name__
    found = find_ffns(host)
    if not found:
        kinds = sorted({type(module).__name__ for module in host.modules()})
        raise ValueError(
            f'{name} has no FFN that can become a MoE FFN: none of its '
            "modules is mmcv's FFN, a MixFFN, MSCAN's Mlp, or linear (with "
            'bias) - activation - linear, with or without a gate; they are '
            f'{", ".join(kinds)}')
    if not moe or 'layers' not in moe:
        raise ValueError('moe needs layers: which of the FFNs become MoE, '
                         'e.g. layers=dict(every=2)')
    chosen = choose_ffns(moe['layers'], list(found), name, 'moe.layers')
    put_layers(host, {key: found[key] for key in chosen}, **layer_args(moe))
    keep_routing_outside(host)
    mask_foreign_layers(host)


def finish(host: Any, moe: Mapping | None, inner: str = '',
           new: tuple[str, ...] = ()) -> None:
    """Let every load of a checkpoint be either complete or an error.

    Args:
        host: the backbone, with its experts.
        moe: the option ``moe``; its ``expert_mismatch`` is read.
        inner: prefix of parameter names that checkpoint files leave out.
        new: patterns of weights that a file may lack.
    """
    host.architecture = _architecture(host, inner, new)
    check_loading(host, (moe or {}).get('expert_mismatch', 'raise'))


def _architecture(host: nn.Module, inner: str, new: tuple[str, ...]
                  ) -> Architecture:
    """Describe the checkpoints of a backbone: their weights have its own
    names, and a missing or superfluous weight is an error."""
    name = type(host).__name__
    inside = tuple(f'{key}.' for key in moe_layers(host))
    mark = next(key for key, _ in host.named_parameters()
                if not key.startswith(inside))
    # A file may lack buffers, which are tables that follow from the config.
    # The statistics of batch norms are not: they must be there like weights.
    buffers = tuple(re.escape(key) for key, _ in host.named_buffers()
                    if not key.endswith(('running_mean', 'running_var')))
    sources = [Source(name, marks=(mark, ), rules=((r'(.+)', r'\1', None), ))]
    if inner:
        sources.append(_bare_source(name, inner, [
            key.removeprefix(inner) for key, _ in host.named_parameters()
            if not key.startswith(inside)]))
    return Architecture(
        name,
        sources=tuple(sources),
        new=(*buffers, *new),
        spare=((rf'({re.escape(inner)})?'
                r'(head|fc|classifier|pooler|norm|fc_norm|layernorm)\..+',
                'head or norm, which the model has not'), ))


def _bare_source(name: str, inner: str, keys: list[str]) -> Source:
    """Describe a file whose names lack the prefix ``inner``.

    Args:
        name: class name of the backbone.
        inner: prefix under which the backbone keeps the model of the file.
        keys: names of that model's dense weights in the backbone, without the
            prefix.
    """
    rule = (r'(.+)', rf'{inner}\1', None)
    joined = next((key for key in keys if JOINED.match(key)), None)
    if joined is None:
        return Source(f'{name} without {inner!r}', marks=(keys[0], ),
                      rules=(rule, ))
    return Source(
        f'{name} without {inner!r}',
        marks=(JOINED.sub(r'\1.\2.', joined, count=1), ),
        rules=((r'([a-z]+)\.(\d+)\.(.+)', rf'{inner}\1_\2.\3', None), rule))
