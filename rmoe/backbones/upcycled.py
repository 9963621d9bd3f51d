"""Any registered dense transformer backbone, with experts in its FFNs."""
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

# Where TIMMBackbone keeps timm's model, whose own files do without.
INNER = ('timm_model.model.', 'timm_model.')
# What timm makes of layers.0. where it takes features.
JOINED = re.compile(r'([a-z]+)_(\d+)\.')


@MODELS.register_module(name='UpcycledBackbone')
def upcycled_backbone(backbone: Mapping, moe: Mapping,
                      init_cfg: Mapping | None = None) -> nn.Module:
    """Build a dense backbone and turn FFNs of it into MoE FFNs.

    What comes back is the backbone itself: its class, its options and its
    parameter names, so that its checkpoints load as they are. Which modules
    are FFNs is said in :func:`rmoe.moe.found.find_ffns`: mmcv's FFN (mmseg's
    ViT, BEiT, Swin, Twins, ...), the MixFFN of mmseg and mmdet (SegFormer,
    PVT), the Mlp of MSCAN, and the MLPs of any library. A block of the host
    with ``with_cp=True`` recomputes its attention and its experts, and routes
    outside of that.

    Args:
        backbone: config of the dense backbone, e.g.
            ``dict(type='mmseg.VisionTransformer', ...)``.
        moe: ``layers`` (which FFNs in the order of the backbone's modules:
            indices, names, ``dict(every=n)`` or ``dict(last=n)``),
            ``expert_mismatch``, and arguments of :class:`rmoe.moe.MoEFFN`
            that concern experts and routing.
        init_cfg: the backbone's, for those who write it here.

    Raises:
        ValueError: if the backbone has no such FFN, ``layers`` is missing or
            points outside, or the backbone recomputes more than blocks.
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
    """Make every load of a backbone complete or an error.

    Args:
        host: the backbone, with its experts.
        moe: its ``expert_mismatch`` is read.
        inner: prefix of the names that files of the host leave out.
        new: patterns of weights that files may lack.
    """
    host.architecture = _architecture(host, inner, new)
    check_loading(host, (moe or {}).get('expert_mismatch', 'raise'))


def _architecture(host: nn.Module, inner: str, new: tuple[str, ...]
                  ) -> Architecture:
    """Own names only; whatever the file lacks or has too much is an error."""
    name = type(host).__name__
    inside = tuple(f'{key}.' for key in moe_layers(host))
    mark = next(key for key, _ in host.named_parameters()
                if not key.startswith(inside))
    # Tables that follow from the config; statistics are weights.
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
    """Of a file whose names lack the prefix ``inner``.

    Args:
        name: of the host.
        inner: where the host keeps the model of the file.
        keys: dense weights of that model, as the host names them.
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
