"""The experts of a MoE layer: the weights of each are core + its residual.

:class:`Experts` chooses how they are computed: one expert after the other on
the CPU, all at once on an accelerator. Axis letters as in routing.py; R is
the rank of a low-rank residual.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rmoe import compat
from rmoe.moe import blocks, grouped_mm
from rmoe.moe.grouped import GroupedFFN, GroupedLinear
from rmoe.moe.host import host_may_read
from rmoe.moe.rows import Rows
from rmoe.moe.weights import add_core


@dataclass
class Core:
    """The dense FFN of a MoE layer, without output dropout, LayerScale, drop
    path and identity.

    Attributes:
        fc1: the first linear layer, D to H, or D to 2 H in a FFN with a gate.
            Usually one module; the outputs of several are concatenated.
        fc2: the second linear layer, H to D, likewise.
        function: computes the FFN of (..., D) tokens.
    """
    fc1: Sequence[nn.Module]
    fc2: Sequence[nn.Module]
    function: Callable[[Tensor], Tensor]

    def weight(self, layer: str) -> Tensor:
        """(out, in), the weight of 'fc1' or 'fc2'. That of a 1x1 convolution
        is flattened."""
        weight = join(getattr(self, layer), 'weight')
        assert weight is not None
        return weight.flatten(1)

    def bias(self, layer: str) -> Tensor | None:
        return join(getattr(self, layer), 'bias')

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def join(linears: Sequence[Any], part: str) -> Tensor | None:
    """Concatenate the weights or biases of linear layers along their outputs.

    Args:
        linears: linear layers or 1x1 convolutions.
        part: 'weight' or 'bias'.

    Returns:
        One tensor; None if the only layer has no bias.
    """
    parts = [getattr(linear, part) for linear in linears]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Elsewhere(Protocol):
    """Interface for experts that are spread over processes (expert
    parallelism), which ``rmoe.parallel`` implements.

    Each process holds all rows of its own tokens, and some of the experts.
    """

    def local(self, name: str, parameter: Tensor) -> Tensor:
        """Return the part of a parameter that belongs to this process's
        experts.

        Args:
            name: the name of the parameter in :class:`Experts`.
            parameter: the parameter as it is registered there, for (E, ...)
                stacked experts.

        Returns:
            (E', ...), differentiable, for the E' experts of this process.
        """
        ...

    def apply(self, compute: Callable[[Tensor, Rows | None], Tensor],
              rows_ND: Tensor, rows: Rows | None) -> Tensor:
        """Apply to each row its expert, in whichever process that expert is.

        Args:
            compute: applies this process's experts to their rows.
            rows_ND: as for :meth:`Experts.forward`.
            rows: as for :meth:`Experts.forward`.

        Returns:
            (M, D), where M is N, or the number of served rows.
        """
        ...


class Experts(nn.Module):
    """Two-layer FFNs whose weights are w_e = w_core + r_e (2204.09636).

    The core belongs to the caller (it keeps the host library's parameter
    names) and is passed to ``forward``; this module owns the residuals, which
    start at zero. Parameters are stacked over experts. So every expert is part
    of the autograd graph and gets a gradient, even if it received no token;
    DDP then needs no ``find_unused_parameters``.

    Args:
        embed_dims: D.
        feedforward_channels: H.
        num_experts: E.
        act: activation between the two layers.
        dropout: dropout on the hidden activations.
        rank: None for full-rank residuals. A number R makes them low-rank,
            r_e = up_e down_e, with up_e zero at the start.
        core: False for plain experts without a core. Their "residual" is the
            whole weight and is initialised at random like any layer's.
        fc2_bias: whether the second linear layer has a bias.
        gated: True if the first linear layer has 2 H outputs, from which
            ``act`` computes H.

    Attributes:
        folded: None, or a buffer whose presence says that the "residuals"
            hold core + residual (:func:`rmoe.upcycling.fold`). A core that is
            passed is then not added again.
        elsewhere: None if this process has all experts. Otherwise the object,
            set by ``rmoe.parallel``, that sends rows to the processes of
            their experts.

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
                 fc2_bias: bool = True,
                 gated: bool = False) -> None:
        super().__init__()
        if rank is not None and not core:
            raise ValueError(f'rank={rank} needs a core: a low-rank matrix '
                             'without one cannot be a whole expert. Set '
                             'rank=None or core=True')
        if rank is not None and not 1 <= rank <= embed_dims:
            raise ValueError(f'rank={rank} must lie between 1 and '
                             f'embed_dims={embed_dims}')
        self.num_experts = num_experts
        self.widths = (embed_dims, feedforward_channels)
        self.rank = rank
        self.core = core
        self.act = act
        self.dropout = nn.Dropout(dropout)
        self.elsewhere: Elsewhere | None = None
        # This is a buffer so that a state dict says whether its "residuals"
        # are folded.
        self.register_buffer('folded', None)
        for layer, out_dim, in_dim in (
                ('fc1', (1 + gated) * feedforward_channels, embed_dims),
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
        # Freezing and optimizer groups recognise residuals by "residual_" in
        # the name.
        self.register_parameter(f'residual_{name}',
                                nn.Parameter(torch.empty(shape)))

    def init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            # A low-rank residual, up @ down, starts at zero through up = 0.
            # Then down must be random: if both were zero, each would multiply
            # the other's gradient by zero and neither would ever change.
            random = name.endswith('_down') or (
                not self.core and name.endswith('_weight'))
            if random:
                std = 0.02 if not self.core else parameter.shape[-1]**-0.5
                nn.init.trunc_normal_(parameter, std=std)
            else:
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def copy_from(self, fc1: Sequence[nn.Module], fc2: Sequence[nn.Module]
                  ) -> None:
        """Copy the weights of a dense FFN to every plain expert.

        Args:
            fc1: the first linear layer, as in :class:`Core`.
            fc2: the second linear layer, as in :class:`Core`.
        """
        assert not self.core
        for layer, linears in (('fc1', fc1), ('fc2', fc2)):
            for part in ('weight', 'bias'):
                stacked = getattr(self, f'residual_{layer}_{part}')
                if stacked is not None:
                    stacked.copy_(join(linears, part))

    def forward(self, rows_ND: Tensor, rows: Rows | None,
                core: Core | None = None,
                middle: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Apply to each row its expert.

        Args:
            rows_ND: (N, D) rows sorted by expert.
            rows: the expert of each row; None means that each expert has
                N / E rows.
            core: the dense FFN; None if and only if this module was built
                with ``core=False``.
            middle: applied to the (N, H) hidden rows before the activation.

        Returns:
            (N, D), in the autocast type if autocast is on. Unserved rows hold
            arbitrary values; with ``elsewhere`` they may be missing.
        """
        assert (core is None) == (not self.core)
        if self.folded is not None:
            core = None  # The folded weights contain it already.
        device = rows_ND.device.type
        if compat.is_autocast_enabled(device):
            rows_ND = rows_ND.to(compat.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            if self.elsewhere is None:
                return self._compute(core, middle, rows_ND, rows)
            return self.elsewhere.apply(
                partial(self._compute, core, middle), rows_ND, rows)

    def _compute(self, core: Core | None,
                 middle: Callable[[Tensor], Tensor] | None, rows_ND: Tensor,
                 rows: Rows | None) -> Tensor:
        """(N, D), the experts of this process applied to their rows."""
        if host_may_read(rows_ND):
            return self._one_by_one(rows_ND, rows, core, middle)
        if rows is None or rows.even:
            num_experts = (self.num_experts if rows is None
                           else len(rows.counts_E))
            x_EBD = rows_ND.unflatten(0, (num_experts, -1))
            return self._batched(x_EBD, None, core, middle).flatten(0, 1)
        if not grouped_mm.fits(rows_ND, self.widths):
            plan = blocks.lay_out(rows)
            return plan.rows(self._batched(plan.fill(rows_ND), plan, core,
                                           middle))
        hidden_NH = self._between(
            self._grouped('fc1', rows_ND, rows, core), middle)
        return self._grouped('fc2', hidden_NH, rows, core)

    def _grouped(self, layer: str, rows_NI: Tensor, rows: Rows,
                 core: Core | None) -> Tensor:
        """(N, O), one linear layer of all experts, by one kernel."""
        return grouped_mm.linear(
            rows_NI, rows, self.weight(layer, core, rows_NI.dtype),
            None if core is None else core.bias(layer),
            self._part(layer, 'bias'))

    def _one_by_one(self, rows_ND: Tensor, rows: Rows | None,
                    core: Core | None,
                    middle: Callable[[Tensor], Tensor] | None) -> Tensor:
        """(N, D), computed one expert after the other, so that the data of
        the current expert stay in the CPU's cache."""
        counts = (rows.counts_E.tolist() if rows is not None else
                  [len(rows_ND) // self.num_experts] * self.num_experts)
        fc1, fc2 = (self._parameters_of(layer, core)
                    for layer in ('fc1', 'fc2'))
        if middle is None and self._act_can_run_twice:
            return GroupedFFN.apply(rows_ND, counts, self.act, *fc1, *fc2)
        hidden_NH = GroupedLinear.apply(rows_ND, counts, *fc1)
        return GroupedLinear.apply(self._between(hidden_NH, middle), counts,
                                   *fc2)

    def _batched(self, x_JBD: Tensor, plan: blocks.Blocks | None,
                 core: Core | None,
                 middle: Callable[[Tensor], Tensor] | None) -> Tensor:
        """(J, b, D), to each block of rows its expert applied. The plan says
        which expert that is; without a plan block e belongs to expert e."""
        hidden_JBH = self._in_blocks('fc1', x_JBD, plan, core)
        if middle is not None:
            # ``middle`` takes rows, not blocks of rows.
            if plan is None:
                hidden_JBH = middle(hidden_JBH.flatten(0, 1)).view_as(
                    hidden_JBH)
            else:
                hidden_JBH = plan.fill(middle(plan.rows(hidden_JBH)))
        return self._in_blocks('fc2', self._between(hidden_JBH, None), plan,
                               core)

    def _in_blocks(self, layer: str, x_JBI: Tensor,
                   plan: blocks.Blocks | None, core: Core | None) -> Tensor:
        """(J, b, O), one linear layer of all blocks, by one batched
        product."""
        weight = self.weight(layer, core, x_JBI.dtype)
        bias = self.bias(layer, core)
        if plan is not None:
            weight = plan.weights(weight)
            bias = None if bias is None else plan.weights(bias)
        return blocks.linear(x_JBI, weight, bias)

    def _between(self, hidden: Tensor,
                 middle: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Apply what is between the two linear layers: ``middle``, activation
        and dropout."""
        if middle is not None:
            hidden = middle(hidden)
        return self.dropout(self.act(hidden))

    @property
    def _act_can_run_twice(self) -> bool:
        """True if activation and dropout are deterministic, have no
        parameters and leave their input as it is. Then backward may compute
        them again instead of keeping their results."""
        random = self.training and self.dropout.p > 0
        in_place = any(getattr(part, 'inplace', False)
                       for part in self.act.modules())
        return (getattr(self.act, 'can_run_twice', True)
                and not (random or in_place or any(
                    True for _ in self.act.parameters())))

    def _parameters_of(self, layer: str, core: Core | None
                       ) -> tuple[Tensor | None, ...]:
        """The parameters of one linear layer, in the order that
        :class:`rmoe.moe.grouped.ExpertLinear` takes them."""
        weight = bias = None
        if core is not None:
            weight, bias = core.weight(layer), core.bias(layer)
        return (weight, bias, self._part(layer, 'bias'),
                *self._residual(layer))

    def _residual(self, layer: str) -> tuple[Tensor, ...]:
        names = ('weight', ) if self.rank is None else ('up', 'down')
        parts = (self._part(layer, name) for name in names)
        return tuple(part for part in parts if part is not None)

    def _part(self, layer: str, part: str) -> Tensor | None:
        """(E, ...), a stacked parameter, or this process's share of it if
        experts are spread over processes; None for a bias that is absent."""
        name = f'residual_{layer}_{part}'
        parameter = getattr(self, name)
        if parameter is None or self.elsewhere is None:
            return parameter
        return self.elsewhere.local(name, parameter)

    def weight(self, layer: str, core: Core | None,
               dtype: torch.dtype = torch.float32) -> Tensor:
        """(E, out, in), the weights of all experts, core + residual;
        differentiable.

        The paths that compute all experts at once use this. The CPU's default
        path adds core and residual for one expert at a time.

        Args:
            layer: 'fc1' or 'fc2'.
            core: the dense FFN that the experts are residuals of; None for
                plain experts.
            dtype: type of the result.
        """
        if core is None or self.folded is not None:
            return self.residual_weight(layer).to(dtype)
        return add_core(core.weight(layer), self._residual(layer), dtype)

    def bias(self, layer: str, core: Core | None) -> Tensor | None:
        """(E, out), the biases of all experts, core + residual, in the type
        of the parameters; None if the layer has no bias."""
        bias_EO = self._part(layer, 'bias')
        if core is None or bias_EO is None or self.folded is not None:
            return bias_EO
        core_O = core.bias(layer)
        assert core_O is not None
        return bias_EO + core_O

    def residual_weight(self, layer: str) -> Tensor:
        """(E, out, in), the residual of 'fc1' or 'fc2' as full matrices."""
        parts = self._residual(layer)
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, rank={self.rank}'

