"""Experts = core + one residual per expert.

Axis letters as in routing.py; R is the rank of a low-rank residual.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmoe import compat
from rmoe.moe.grouped import (
    GROUPED_MM_MULTIPLE,
    GroupedFFN,
    GroupedLinear,
    grouped_mm,
)


@dataclass
class Core:
    """The dense FFN of a MoE layer, without what stands around it.

    Attributes:
        fc1: D to H.
        fc2: H to D.
        function: tokens (..., D) through both.
    """
    fc1: nn.Module
    fc2: nn.Module
    function: Callable[[Tensor], Tensor]

    def weight(self, layer: str) -> Tensor:
        """(out, in) of 'fc1' or 'fc2', which may be 1x1 convolutions."""
        return getattr(self, layer).weight.flatten(1)

    def bias(self, layer: str) -> Tensor | None:
        return getattr(self, layer).bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


class Experts(nn.Module):
    """Two-layer FFNs whose weights are w_e = w_core + r_e (2204.09636).

    The core belongs to the caller (it keeps the host library's parameter
    names) and is passed to ``forward``; this module owns the residuals, which
    start at zero. Parameters are stacked over experts, so every expert is in
    the graph whatever it received.

    Args:
        embed_dims: D.
        feedforward_channels: H.
        num_experts: E.
        act: activation between the two layers.
        dropout: dropout on the hidden activations.
        rank: None for full-rank residuals; R for r_e = up_e down_e, with up
            zero at the start.
        core: False for plain experts, whose "residual" is the whole weight
            and starts as a normal layer would.
        fc2_bias: whether the second linear layer has a bias.

    Attributes:
        folded: None, or a buffer where the "residuals" hold core + residual
            (:func:`rmoe.upcycling.fold`); a core is then passed but not
            added again.

    Raises:
        ValueError: for a rank out of range, or a rank without a core.
    """
    folded: Tensor | None

    def __init__(self,
                 embed_dims: int,
                 feedforward_channels: int,
                 num_experts: int,
                 act: nn.Module,
                 dropout: float = 0.,
                 rank: int | None = None,
                 core: bool = True,
                 fc2_bias: bool = True) -> None:
        super().__init__()
        if rank is not None and not core:
            raise ValueError(f'rank={rank} needs a core: a low-rank matrix '
                             'alone is no expert. Set rank=None or core=True')
        if rank is not None and not 1 <= rank <= embed_dims:
            raise ValueError(f'rank={rank} must lie between 1 and '
                             f'embed_dims={embed_dims}')
        self.num_experts = num_experts
        self.widths = (embed_dims, feedforward_channels)
        self.rank = rank
        self.core = core
        self.act = act
        self.dropout = nn.Dropout(dropout)
        # A buffer, so that a state dict says what its "residuals" are.
        self.register_buffer('folded', None)
        for layer, out_dim, in_dim in (
                ('fc1', feedforward_channels, embed_dims),
                ('fc2', embed_dims, feedforward_channels)):
            if layer == 'fc1' or fc2_bias:
                self._add(f'{layer}_bias', num_experts, out_dim)
            else:
                self.register_parameter(f'residual_{layer}_bias', None)
            if rank is None:
                self._add(f'{layer}_weight', num_experts, out_dim, in_dim)
            else:
                self._add(f'{layer}_up', num_experts, out_dim, rank)
                self._add(f'{layer}_down', num_experts, rank, in_dim)
        self.init_weights()

    def _add(self, name: str, *shape: int) -> None:
        # The name carries the role: freezing and optimizer groups match
        # on "residual_".
        self.register_parameter(f'residual_{name}',
                                nn.Parameter(torch.empty(shape)))

    def init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            # up = 0 makes the product zero; down must then be random, or
            # neither would ever get a gradient.
            random = name.endswith('_down') or (
                not self.core and name.endswith('_weight'))
            if random:
                std = 0.02 if not self.core else parameter.shape[-1]**-0.5
                nn.init.trunc_normal_(parameter, std=std)
            else:
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def copy_from(self, fc1: nn.Linear, fc2: nn.Linear) -> None:
        """Make every plain expert the dense FFN of these two layers."""
        assert not self.core
        for layer, linear in (('fc1', fc1), ('fc2', fc2)):
            for part in ('weight', 'bias'):
                stacked = getattr(self, f'residual_{layer}_{part}')
                if stacked is not None:
                    stacked.copy_(getattr(linear, part))

    def forward(self, rows_ND: Tensor, counts_E: Tensor,
                core: Core | None = None,
                middle: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Apply expert e to its rows.

        Args:
            rows_ND: (N, D) rows sorted by expert.
            counts_E: (E,) rows of each expert, summing to N.
            core: None if and only if this was built with ``core=False``.
            middle: applied to the (N, H) hidden rows before the activation.

        Returns:
            (N, D), in the autocast type where autocast is on.
        """
        assert (core is None) == (not self.core)
        device = rows_ND.device.type
        if compat.is_autocast_enabled(device):
            rows_ND = rows_ND.to(compat.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            if self._fits_grouped_mm(rows_ND):
                hidden_NH = grouped_mm(rows_ND, counts_E,
                                       *self.stacked('fc1', core))
                if middle is not None:
                    hidden_NH = middle(hidden_NH)
                return grouped_mm(self.dropout(self.act(hidden_NH)), counts_E,
                                  *self.stacked('fc2', core))
            counts = counts_E.tolist()
            if middle is None and self._act_can_run_twice:
                return GroupedFFN.apply(
                    rows_ND, counts, self.act,
                    *self._parameters_of('fc1', core),
                    *self._parameters_of('fc2', core))
            hidden_NH = GroupedLinear.apply(
                rows_ND, counts, *self._parameters_of('fc1', core))
            if middle is not None:
                hidden_NH = middle(hidden_NH)
            hidden_NH = self.dropout(self.act(hidden_NH))
            return GroupedLinear.apply(
                hidden_NH, counts, *self._parameters_of('fc2', core))

    def _fits_grouped_mm(self, rows_ND: Tensor) -> bool:
        """One kernel for all experts, on GPUs that have it for these rows."""
        return (rows_ND.is_cuda and rows_ND.dtype == torch.bfloat16 and
                compat.grouped_mm is not None and
                not any(width % GROUPED_MM_MULTIPLE
                        for width in self.widths) and
                torch.cuda.get_device_capability(rows_ND.device) >= (8, 0))

    @property
    def _act_can_run_twice(self) -> bool:
        """Is what stands between the layers a function of its input alone?"""
        random = self.training and self.dropout.p > 0
        in_place = getattr(self.act, 'inplace', False)
        return not (random or in_place or any(
            True for _ in self.act.parameters()))

    def _parameters_of(self, layer: str, core: Core | None
                       ) -> tuple[Tensor | None, ...]:
        weight = bias = None
        if core is not None and self.folded is None:
            weight, bias = core.weight(layer), core.bias(layer)
        return (weight, bias, getattr(self, f'residual_{layer}_bias'),
                *self._residual(layer))

    def _residual(self, layer: str) -> tuple[Tensor, ...]:
        parts = ('weight', ) if self.rank is None else ('up', 'down')
        return tuple(
            getattr(self, f'residual_{layer}_{part}') for part in parts)

    def stacked(self, layer: str, core: Core | None
                ) -> tuple[Tensor, Tensor | None]:
        """Weights (E, out, in) and biases (E, out) of 'fc1' or 'fc2', folded
        with the core's; differentiable. For paths that need all experts at
        once: the default one folds an expert at a time."""
        weight_EOI = self.residual_weight(layer)
        bias_EO = getattr(self, f'residual_{layer}_bias')
        if core is None or self.folded is not None:
            return weight_EOI, bias_EO
        if bias_EO is not None:
            bias_EO = bias_EO + core.bias(layer)
        return weight_EOI + core.weight(layer), bias_EO

    def residual_weight(self, layer: str) -> Tensor:
        """(E, out, in), the residual of 'fc1' or 'fc2' as full matrices."""
        parts = self._residual(layer)
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, rank={self.rank}'

