"""Any registered dense transformer backbone, with experts in its FFNs."""
import re
from collections.abc import Mapping
from typing import Any

from mmcv.cnn.bricks.transformer import FFN
from torch import nn

from rmoe.backbones.ffn import layer_args
from rmoe.backbones.padding import mask_foreign_layers
from rmoe.backbones.recomputation import keep_routing_outside
from rmoe.moe import (
    MoEConvMlp,
    MoEFFN,
    MoELayer,
    MoEMixFFN,
    MoEMlp,
    moe_layers,
)
from rmoe.moe.mlp import layout_of
from rmoe.moe.placement import choose_blocks
from rmoe.registry import MODELS
from rmoe.upcycling import check_loading
from rmoe.upcycling.keymaps import Architecture, Source


@MODELS.register_module(name='UpcycledBackbone')
def upcycled_backbone(backbone: Mapping, moe: Mapping,
                      init_cfg: Mapping | None = None) -> nn.Module:
    """Build a dense backbone and turn FFNs of it into MoE FFNs.

    What comes back is the backbone itself: its class, its options and its
    parameter names, so that its checkpoints load as they are. FFNs are known
    by their type: mmcv's FFN (mmseg's ViT, BEiT, Swin, Twins, ...), the
    MixFFN of mmseg and mmdet (SegFormer, PVT), the Mlp of MSCAN, timm's Mlp
    and GluMlp, and Hugging Face's (:data:`rmoe.moe.mlp.LAYOUTS`). A block of
    the host with ``with_cp=True`` recomputes its attention and its experts, and
    routes outside of that.

    Args:
        backbone: config of the dense backbone, e.g.
            ``dict(type='mmseg.VisionTransformer', ...)``.
        moe: ``layers`` (which FFNs in the order of the backbone's modules:
            indices, ``dict(every=n)`` or ``dict(last=n)``),
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
    finish(host, moe)
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
    dense = {key: module for key, module in host.named_modules()
             if _moe_class(module) is not None}
    if not dense:
        kinds = sorted({type(module).__name__ for module in host.modules()})
        raise ValueError(
            f'{name} has no FFN that can become a MoE FFN: none of its '
            "modules is mmcv's FFN, a MixFFN, MSCAN's Mlp, timm's Mlp or "
            "GluMlp, or one of Hugging Face's, but "
            f'{", ".join(kinds)}')
    for i in _chosen(moe, len(dense), name):
        key = list(dense)[i]
        layer = _with_experts(dense[key], layer_args(moe))
        layer.name = f'MoE layer {key} of {name}'
        parent, _, child = key.rpartition('.')
        setattr(host.get_submodule(parent), child, layer)
    keep_routing_outside(host)
    mask_foreign_layers(host)


def finish(host: Any, moe: Mapping | None, inner: str = '') -> None:
    """Make every load of a backbone complete or an error.

    Args:
        host: the backbone, with its experts.
        moe: its ``expert_mismatch`` is read.
        inner: prefix of the names that files of the host leave out.
    """
    host.architecture = _architecture(host, inner)
    check_loading(host, (moe or {}).get('expert_mismatch', 'raise'))


def _moe_class(module: nn.Module) -> type[MoELayer] | None:
    if type(module) is FFN:
        return MoEFFN
    # Known by name: neither timm nor mmseg and mmdet need be installed.
    kind = type(module)
    if kind.__name__ == 'MixFFN' and kind.__module__.startswith(
            ('mmseg.', 'mmdet.')):
        return MoEMixFFN
    if (kind.__name__, kind.__module__) == (
            'Mlp', 'mmseg.models.backbones.mscan'):
        return MoEConvMlp
    return MoEMlp if layout_of(module) else None


def _with_experts(module: Any, options: dict[str, Any]) -> MoELayer:
    kind: Any = _moe_class(module)
    build = MoEFFN.from_dense if kind is MoEFFN else kind
    return build(module, **options)


def _chosen(moe: Mapping, count: int, name: str) -> tuple[int, ...]:
    if not moe or 'layers' not in moe:
        raise ValueError('moe needs layers: which of the FFNs become MoE, '
                         'e.g. layers=dict(every=2)')
    chosen = choose_blocks(moe['layers'], count)
    for index in chosen:
        if not 0 <= index < count:
            raise ValueError(f'moe.layers names FFN {index}; {name} has '
                             f'FFNs 0 to {count - 1}')
    if not chosen:
        raise ValueError(f'moe.layers={moe["layers"]} selects none of the '
                         f'{count} FFNs of {name}')
    return chosen


def _architecture(host: nn.Module, inner: str) -> Architecture:
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
        sources.append(Source(
            f'{name} without {inner!r}', marks=(mark.removeprefix(inner), ),
            rules=((r'(.+)', rf'{inner}\1', None), )))
    return Architecture(
        name,
        sources=tuple(sources),
        new=buffers,
        spare=((rf'({re.escape(inner)})?'
                r'(head|fc|classifier|pooler|norm|fc_norm)\..+',
                'head or norm, which the model has not'), ))
