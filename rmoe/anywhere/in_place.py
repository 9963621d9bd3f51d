"""Upcycling of any model in place: its FFNs get experts, or lose them again."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rmoe.anywhere.losses import start_collecting, stop_collecting
from rmoe.anywhere.stages import release
from rmoe.moe import moe_layers
from rmoe.moe.found import choose_ffns, find_ffns, put_layers, take_out

# The attribute of a model that holds its Record. It is written to the model's
# __dict__, so that neither parameters nor state dicts include its modules.
RECORD = '_rmoe'


@dataclass
class Record:
    """The settings of a call of :func:`upcycle`, and the dense modules that it
    replaced, by name."""
    settings: dict[str, Any]
    dense: dict[str, nn.Module]


@dataclass
class UpcycleReport:
    """A report on a call of :func:`upcycle`.

    Attributes:
        layers: the classes of the dense modules that got experts, by name.
        left_dense: the same for FFNs that could have got experts, but were
            not chosen.
        num_experts: E.
        parameters: numbers of parameters before and after.
    """
    layers: dict[str, str]
    left_dense: dict[str, str]
    num_experts: int
    parameters: tuple[int, int]

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f'{len(self.layers)} FFNs have {self.num_experts} experts, '
                 f'{len(self.left_dense)} stay dense; {before:,} parameters '
                 f'became {after:,}']
        lines += [f'  experts  {name} ({kind})'
                  for name, kind in self.layers.items()]
        lines += [f'  dense    {name} ({kind})'
                  for name, kind in self.left_dense.items()]
        return '\n'.join(lines)


def upcycle(model: nn.Module, layers: Any, num_experts: int = 8,
            router: Mapping | None = None, rank: int | None = None,
            align: str | None = None) -> UpcycleReport:
    """Give FFNs of a model experts, in place.

    Each expert is the dense FFN (the core) plus a residual that starts at
    zero (2204.09636), so the model computes what it did before. The dense
    weights keep their names, so that dense checkpoints load with
    ``strict=False``, before or after this call. These count as FFNs: modules
    of the form linear - activation - linear under any name, with or without a
    gate; the two halves that an FFN has in Hugging Face's ViT, Swin and
    others; the MixFFNs of SegFormer and PVT; and mmcv's FFN.

    Args:
        model: any module; timm's, Hugging Face's, torchvision's, your own.
        layers: the FFNs that get experts, which are numbered in the order of
            the model's modules: indices, module names (the report lists all
            FFNs), ``dict(every=n)`` for each n-th one, or ``dict(last=n)``,
            the last n of every second one.
        num_experts: E.
        router: its type and options (docs/routers.md); None means
            ``dict(type='TokenChoiceRouter')``.
        rank: rank of the residuals; None for full rank.
        align: how the outputs of experts are weighted by their gates, see
            :class:`rmoe.moe.MoEFFN`.

    Returns:
        A report of the FFNs that got experts and of those that stay dense.

    Raises:
        ValueError: if the model has no FFN or not one that is named, an
            option is wrong, or the model has experts already; the model is
            then unchanged.
    """
    name = type(model).__name__
    _check_options(num_experts, router, layers)
    if moe_layers(model):
        raise ValueError(f'{name} has MoE layers already: upcycle it once, '
                         'with all the layers that you want')
    found = find_ffns(model)
    if not found:
        raise ValueError(
            f'{name} has no FFN that can become a MoE FFN: no module of it '
            'is linear (with bias) - activation - linear back to the same '
            'width, with or without a gate. FFNs that are written out inside '
            'a block (as in torch.nn.TransformerEncoderLayer), traced models '
            '(torch.fx) and the model itself do not count')
    chosen = choose_ffns(layers, list(found), name)
    before = sum(p.numel() for p in model.parameters())
    options = dict(num_experts=num_experts, router=router, rank=rank,
                   align=align)
    put_layers(model, {key: found[key] for key in chosen}, **options)
    start_collecting(model)
    settings = dict(options, layers=chosen,
                    router=None if router is None else dict(router))
    vars(model)[RECORD] = Record(
        settings, {key: found[key].replaced for key in chosen})
    return UpcycleReport(
        {key: found[key].kind for key in chosen},
        {key: one.kind for key, one in found.items() if key not in chosen},
        num_experts, (before, sum(p.numel() for p in model.parameters())))


def to_dense(model: nn.Module) -> nn.Module:
    """Take the experts out again, in place: each FFN becomes its core.

    If the core was frozen in training, this is the model as it was before
    :func:`upcycle`. Parameters that :func:`rmoe.set_stage` froze are
    trainable again.

    Returns:
        The model.

    Raises:
        ValueError: if :func:`upcycle` was not called with this model.
    """
    record = record_of(model)
    release(model)
    for key, dense in record.dense.items():
        take_out(model, key, dense)
    stop_collecting(model)
    del vars(model)[RECORD]
    return model


def record_of(model: nn.Module) -> Record:
    """The record that :func:`upcycle` left on a model.

    Raises:
        ValueError: if :func:`upcycle` was not called with this model.
    """
    record = vars(model).get(RECORD)
    if record is None:
        raise ValueError(
            f'{type(model).__name__} is not what rmoe.upcycle changed: give '
            'the model that it was called with, without a wrapper. For an '
            'OpenMMLab model, rmoe.upcycling.to_dense(model) gives the dense '
            'weights')
    return record


def _check_options(num_experts: Any, router: Any, layers: Any) -> None:
    """Check the options, as far as that does not depend on the model."""
    if not isinstance(num_experts, int) or isinstance(num_experts, bool):
        raise ValueError(f'num_experts={num_experts!r} must be a whole number')
    if router is not None and (not isinstance(router, Mapping)
                               or 'type' not in router):
        raise ValueError(f'router={router!r} must be a dict with its type, '
                         "e.g. dict(type='TokenChoiceRouter')")
    if not isinstance(layers, (str, Mapping, Sequence)):
        raise ValueError(
            f'layers={layers!r} must be indices or names of FFNs, '
            'dict(every=n) or dict(last=n)')
