"""Finds how many bytes a training step keeps of its forward pass for backward.

The backbone is traced with fake tensors, which have a shape but no values, at
the full image size and with the implementation of MoE layers that the planned
machine uses. The neck, heads and losses look at values and cannot be traced.
So they are run on images of two small sizes, and a line through the two results
gives the bytes at the full size.
"""
import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F

from _plan.model import build, fill, set_stage
from _plan.samples import loss_inputs
from _plan.saved import SavedTensors
from rmoe.moe import collect_losses, host, moe_layers

BACKBONE, REST = 'backbone', ''
# Batch norms need two values of a channel, and after global pooling there is
# only one for each image.
MEASURED_BATCH = 2
# Images with at most so many pixels are measured at their full size.
SMALL = 256 * 256
STRIDE = 32


@dataclass(frozen=True)
class Activations:
    """The bytes that are kept for backward.

    Attributes:
        backbone: bytes of the backbone without its MoE layers.
        moe: bytes of the MoE layers, by the number of experts that a process
            has in each.
        rest: bytes of neck, heads and losses.
        copies: bytes of copies of the backbone's parameters that autocast
            keeps in its own type, by the same number of experts.
        copies_of_rest: bytes of such copies for neck and heads.
        recomputed: bytes of one part that is recomputed in backward. Only one
            of these parts is in memory at a time.
        tokens: number of tokens of each MoE layer.
        notes: lines that say how the numbers were found.
    """
    backbone: int
    moe: Mapping[int, int]
    rest: int
    copies: Mapping[int, int]
    copies_of_rest: int
    recomputed: int
    tokens: Mapping[str, int]
    notes: tuple[str, ...]

    def total(self, experts: int, converted: bool) -> int:
        """All bytes of a process.

        Args:
            experts: the number of experts that it has in each MoE layer.
            converted: whether blocks are gathered in the type in which they
                compute, so that autocast makes no copies.
        """
        return (self.backbone + self.moe[experts] + self.rest +
                self.recomputed + self.copies_of_rest +
                (0 if converted else self.copies[experts]))


@dataclass(frozen=True)
class Run:
    """The settings of a training step.

    Attributes:
        size: height and width of the images.
        batch: number of images per process.
        bfloat16: whether autocast is on.
        gpu: whether MoE layers run as on an accelerator.
        stages: the roles that train in each stage.
    """
    size: tuple[int, int]
    batch: int
    bfloat16: bool
    gpu: bool
    stages: list[tuple[str, ...]]


def find(cfg: Config, run: Run, experts: set[int]) -> Activations:
    """Find the bytes by tracing the backbone and measuring the rest.

    Args:
        cfg: the config of the model, with E experts.
        run: the settings of the step.
        experts: the numbers of experts that a process may have in a layer,
            with E among them.
    """
    whole = experts_of(cfg)
    small = _sizes(run.size)
    notes = []
    try:
        traced = {count: trace(cfg, run, count) for count in experts}
        maps = [maps_of(cfg, run, size) for size in small]
    except (DataDependentOutputException,
            DynamicOutputShapeException) as error:
        traced, maps = {}, []
        notes.append(f'backbone, with all {whole} experts: measured, because '
                     f'it cannot be traced ({type(error).__name__})')
    if traced:
        notes.append(
            f'backbone: traced at {run.size[0]}x{run.size[1]} without values, '
            + ("on an accelerator's path" if run.gpu else
               'its MoE layers: measured'))
    # On the CPU, MoE layers look at values, so that they cannot be traced. Then
    # the backbone is measured together with the rest.
    found = [measure(cfg, run, size, one) for size, one in zip(
        small, maps if traced and run.gpu else [None] * len(small))]
    x = [MEASURED_BATCH * height * width for height, width in small]
    full = run.batch * run.size[0] * run.size[1]
    scaled = {place: _line(x, [one.bytes[place] for one in found], full)
              for place in found[-1].bytes}
    rest = scaled.pop(REST, 0)
    sizes = ' and '.join(f'{height}x{width}' for height, width in small)
    notes += ['neck, heads and losses: measured',
              f'measured: in {len(small)} real '
              f'step{"s" * (len(small) > 1)} of {MEASURED_BATCH} images of '
              f'{sizes}, scaled to {run.batch} of '
              f'{run.size[0]}x{run.size[1]}']
    tokens = _tokens(traced[whole]) if traced else {
        name: _line(x, [_tokens(one)[name] for one in found], full)
        for name in _tokens(found[-1])}
    of_moe = sum(count for place, count in scaled.items()
                 if place != BACKBONE)
    return Activations(
        traced[whole].bytes[BACKBONE] if traced else scaled[BACKBONE],
        {count: traced[count].bytes.total() - traced[count].bytes[BACKBONE]
         if traced and run.gpu else of_moe for count in experts},
        rest,
        {count: traced[count].copies.total() if traced else 0
         for count in experts},
        found[-1].copies[REST], _recomputed(cfg, run) if traced else 0,
        tokens, tuple(notes))


def experts_of(cfg: Config) -> int:
    """The number E of experts in every MoE layer of a config."""
    return cfg.model.backbone.moe.get('num_experts', 8)


def _tokens(saved: SavedTensors) -> dict[str, int]:
    return {name: shape.numel() // shape[-1]
            for name, shape in saved.shapes.items() if name != BACKBONE}


def _sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The image sizes to measure. Their sides are multiples of the stride of a
    backbone."""
    if size[0] * size[1] <= SMALL:
        return [size]
    return [(_stride_up(size[0] // part), _stride_up(size[1] // part))
            for part in (4, 2)]


def _stride_up(side: int) -> int:
    return max(side + -side % STRIDE, 2 * STRIDE)


def _line(x: list[int], y: list[int], at: int) -> int:
    """The value at ``at`` of the line through two points, or through zero if
    there is only one point."""
    if len(x) == 1:
        return round(y[0] / x[0] * at)
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return round(max(y[0] + slope * (at - x[0]), 0))


def measure(cfg: Config, run: Run, size: tuple[int, int], maps: Any = None
            ) -> SavedTensors:
    """Run the forward pass of a step on the CPU with small images, and count
    what it keeps.

    Args:
        cfg: the config of the model.
        run: the settings of the step.
        size: height and width of the images.
        maps: the feature maps that the backbone would return for them. They
            are used instead of running the backbone; None runs it.
    """
    model = build(cfg)
    set_stage(model, run.stages, run.bfloat16)
    places = _places(model)
    if maps is not None:
        model.backbone, places = _Returns(maps), {}
    fill(model)
    inputs = loss_inputs(model, MEASURED_BATCH, size)
    with _settings(run), SavedTensors(model, places) as saved:
        collect_losses(model, start=True)
        losses = model(**inputs, mode='loss')
        loss, _ = model.parse_losses(losses)
    del loss
    return saved


class _Returns(nn.Module):
    """Stands in for a backbone, and returns maps that were made before."""

    def __init__(self, maps: Any) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> Any:
        return self.maps


def maps_of(cfg: Config, run: Run, size: tuple[int, int]) -> Any:
    """Random maps with the shapes that the backbone returns for a batch of
    MEASURED_BATCH images."""
    model = _fake(cfg, run, experts_of(cfg))
    _, outs = _traced(model, run, {}, MEASURED_BATCH, size)

    def filled(node: Any) -> Any:
        if isinstance(node, Tensor):
            return torch.randn(node.shape).to(node.dtype).requires_grad_()
        return type(node)(map(filled, node))

    return filled(outs)


def trace(cfg: Config, run: Run, experts: int) -> SavedTensors:
    """Trace the backbone at the full image size, with ``experts`` experts in
    each MoE layer, and count what it keeps.

    Raises:
        DataDependentOutputException: if the backbone looks at values.
        DynamicOutputShapeException: if shapes in it depend on values.
    """
    model = _fake(cfg, run, experts)
    return _traced(model, run, _places(model), run.batch, run.size)[0]


def _recomputed(cfg: Config, run: Run) -> int:
    """The largest number of bytes that one recomputed part keeps while the
    backward pass is inside it."""
    model = _fake(cfg, run, experts_of(cfg))
    parts = {name: module for name, module in model.backbone.named_modules()
             if getattr(module, 'with_cp', False) is True}
    for module in parts.values():
        module.with_cp = False  # type: ignore[assignment]
        if hasattr(module, 'ffn_with_cp'):
            module.ffn_with_cp = False  # type: ignore[assignment]
    if not parts:
        return 0
    saved, _ = _traced(model, run, parts, run.batch, run.size)
    return max(saved.bytes[name] for name in parts)


def _fake(cfg: Config, run: Run, experts: int) -> nn.Module:
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.moe.num_experts = experts
    model = build(cfg)
    set_stage(model, run.stages, run.bfloat16)
    return model


def _traced(model: nn.Module, run: Run, places: dict[str, nn.Module],
            batch: int, size: tuple[int, int]) -> tuple[SavedTensors, Any]:
    """Trace the backbone.

    Returns:
        What it keeps, by place, and the fake tensors that it returns.
    """
    backbone: Any = model.backbone
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in backbone.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(
                    torch.empty(parameter.shape),
                    requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, mode.from_tensor(buffer))
        image = torch.empty(batch, 3, *size)
        # A trace always takes the accelerator's path through MoE layers, as
        # that of the CPU looks at values.
        with _settings(run, traced=True), SavedTensors(
                backbone, places) as saved:
            collect_losses(backbone, start=True)
            outs = backbone(image)
    return saved, outs


def _places(model: nn.Module) -> dict[str, nn.Module]:
    return {BACKBONE: model.backbone, **moe_layers(model)}


@contextmanager
def _settings(run: Run, traced: bool = False) -> Iterator[None]:
    """Context with the precision of a step and with its implementation of MoE
    layers and attention."""
    before, host.force_accelerator = host.force_accelerator, traced
    attention = F.scaled_dot_product_attention
    if traced and run.gpu:
        F.scaled_dot_product_attention = _attention
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter('ignore')
            stack.enter_context(torch.autocast(
                'cpu', torch.bfloat16, enabled=run.bfloat16))
            yield
    finally:
        host.force_accelerator = before
        F.scaled_dot_product_attention = attention


def _attention(query: Tensor, key: Tensor, value: Tensor,
               attn_mask: Tensor | None = None, dropout_p: float = 0.,
               is_causal: bool = False, scale: float | None = None) -> Tensor:
    return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """Attention that computes nothing, but keeps the same tensors for backward
    as the fused kernels of a GPU. The CPU's attention would also keep the
    attention weights if a bias requires a gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor,
                bias: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError('a trace has no backward pass')
