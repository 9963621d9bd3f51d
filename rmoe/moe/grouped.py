"""Linear layers and FFNs of all experts, computed one expert at a time.

This is the CPU's path. The data of the current expert stay in the cache while
it is computed: its weight (core + residual), the hidden activations of its
rows, the gradient of its weight. Axis letters as in routing.py; O and I are
the output and input width of a linear layer, R the rank of a low-rank
residual.
"""
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmoe.moe.products import linear, pad_rows


class ExpertLinear(ABC):
    """One linear layer of every expert, w_e = core + r_e.

    Args:
        core_OI: weight of the core; None for plain experts, whose residual is
            the whole weight.
        core_bias_O: bias of the core; None for none.
        bias_EO: residual biases; None for none, and then the core has none
            either.
        residual: the parameters of r_e: (E, O, I), or (E, O, R) and
            (E, R, I).
        dtype: type of the rows.
    """

    def __init__(self, core_OI: Tensor | None, core_bias_O: Tensor | None,
                 bias_EO: Tensor | None, *residual: Tensor,
                 dtype: torch.dtype) -> None:
        self.core_OI, self.residual, self.dtype = core_OI, residual, dtype
        self.bias_EO = bias_EO
        if bias_EO is not None and core_bias_O is not None:
            self.bias_EO = bias_EO + core_bias_O

    def bias(self, expert: int) -> Tensor | None:
        if self.bias_EO is None:
            return None
        return self.bias_EO[expert].to(self.dtype)

    @abstractmethod
    def forward(self, expert: int, rows_NI: Tensor) -> Tensor:
        """(N, O), the linear layer of one expert applied to its rows."""

    def prepare_backward(self, counts: Sequence[int],
                         needs: Sequence[bool]) -> None:
        """Allocate the gradients.

        Args:
            counts: number of rows of each expert.
            needs: whether core_OI, core_bias_O, bias_EO and the parameters of
                the residual need a gradient, in this order.
        """
        self.needs_core, self.needs_core_bias, self.needs_bias = needs[:3]
        self.needs_residual = any(needs[3:])
        # An expert without rows gets a zero gradient. If all have rows, every
        # value will be written and need not be zeroed before.
        empty = torch.empty_like if all(counts) else torch.zeros_like
        self.residual_grads = [empty(part) for part in self.residual
                               ] if self.needs_residual else []
        self.core_grad = (torch.zeros_like(self.core_OI)
                          if self.needs_core and self.core_OI is not None
                          else None)
        self.bias_grad = None
        if self.bias_EO is not None and (self.needs_bias or
                                         self.needs_core_bias):
            self.bias_grad = torch.zeros_like(self.bias_EO,
                                              dtype=torch.float32)

    def keep_grads(self, expert: int, rows_NI: Tensor, grad_NO: Tensor
                   ) -> None:
        """Compute the gradients of one expert's parameters, and add its share
        to those of the core."""
        if self.bias_grad is not None:
            torch.sum(grad_NO, 0, dtype=torch.float32,
                      out=self.bias_grad[expert])
        if self.needs_core or self.needs_residual:
            self._weight_grads(expert, rows_NI, grad_NO)

    @abstractmethod
    def _weight_grads(self, expert: int, rows_NI: Tensor, grad_NO: Tensor
                      ) -> None:
        ...

    @abstractmethod
    def rows_grad(self, expert: int, grad_NO: Tensor) -> Tensor:
        """(N, I), the gradient with respect to one expert's rows."""

    def grads(self) -> tuple[Tensor | None, ...]:
        """The gradients in the order of the constructor's parameters; None
        for those that need none."""
        core_bias = (self.bias_grad.sum(0)
                     if self.needs_core_bias and self.bias_grad is not None
                     else None)
        return (self.core_grad, core_bias,
                self.bias_grad if self.needs_bias else None,
                *(self.residual_grads or len(self.residual) * (None, )))


class FullRank(ExpertLinear):
    """Full-rank residuals: r_e is a whole matrix. The sum core + r_e of each
    expert is written into the same buffer."""

    def __init__(self, *parameters: Tensor | None, dtype: torch.dtype
                 ) -> None:
        super().__init__(*parameters, dtype=dtype)  # type: ignore[arg-type]
        if self.core_OI is not None:
            self.folded_OI = torch.empty_like(self.core_OI)

    def _weight(self, expert: int) -> Tensor:
        residual_OI = self.residual[0][expert]
        if self.core_OI is None:
            return residual_OI.to(self.dtype)
        return torch.add(self.core_OI, residual_OI,
                         out=self.folded_OI).to(self.dtype)

    def forward(self, expert: int, rows_NI: Tensor) -> Tensor:
        return linear(rows_NI, self._weight(expert), self.bias(expert))

    def rows_grad(self, expert: int, grad_NO: Tensor) -> Tensor:
        return linear(grad_NO, self._weight(expert).t())

    def _weight_grads(self, expert: int, rows_NI: Tensor, grad_NO: Tensor
                      ) -> None:
        grad_OI = linear(grad_NO.t(), rows_NI.t())
        if self.residual_grads:
            self.residual_grads[0][expert] = grad_OI
        if self.core_grad is not None:
            self.core_grad += grad_OI


class LowRank(ExpertLinear):
    """Low-rank residuals: r_e = up_e down_e. The two factors are applied to
    the rows beside the core. That costs R (O + I) operations per row, which
    for few rows is less than adding the product to the core's weight."""

    def __init__(self, *parameters: Tensor | None, dtype: torch.dtype
                 ) -> None:
        super().__init__(*parameters, dtype=dtype)  # type: ignore[arg-type]
        self.up_EOR, self.down_ERI = (part.to(dtype)
                                      for part in self.residual)
        assert self.core_OI is not None
        self.core = self.core_OI.to(dtype)

    def forward(self, expert: int, rows_NI: Tensor) -> Tensor:
        low_NR = rows_NI @ self.down_ERI[expert].t()
        return linear(rows_NI, self.core, self.bias(expert)).addmm_(
            low_NR, self.up_EOR[expert].t())

    def rows_grad(self, expert: int, grad_NO: Tensor) -> Tensor:
        low_NR = grad_NO @ self.up_EOR[expert]
        return linear(grad_NO, self.core.t()).addmm_(
            low_NR, self.down_ERI[expert])

    def _weight_grads(self, expert: int, rows_NI: Tensor, grad_NO: Tensor
                      ) -> None:
        if self.residual_grads:
            up_grad_EOR, down_grad_ERI = self.residual_grads
            low_NR = rows_NI @ self.down_ERI[expert].t()
            up_grad_EOR[expert] = grad_NO.t() @ low_NR
            low_NR = grad_NO @ self.up_EOR[expert]
            down_grad_ERI[expert] = low_NR.t() @ rows_NI
        if self.core_grad is not None:
            self.core_grad += linear(grad_NO.t(), rows_NI.t())


def _layer(parameters: Sequence[Tensor | None], dtype: torch.dtype
           ) -> ExpertLinear:
    """Build the layer from (core weight, core bias, residual bias, residual
    weight) or from (core weight, core bias, residual bias, up, down)."""
    kind = FullRank if len(parameters) == 4 else LowRank
    return kind(*parameters, dtype=dtype)  # type: ignore[arg-type]


class GroupedLinear(torch.autograd.Function):
    """Apply the linear layer of each expert to its rows."""

    @staticmethod
    def forward(ctx, rows_NI: Tensor, counts: Sequence[int],
                *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows_NI, *parameters)
        ctx.counts = counts
        layer = _layer(parameters, rows_NI.dtype)
        return _join([
            layer.forward(expert, pad_rows(rows_NI[rows]))[:_size(rows)]
            for expert, rows in _segments(counts)
        ], rows_NI, layer.residual[0].shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO: Tensor):
        rows_NI, *parameters = ctx.saved_tensors
        needs_rows, _, *needs = ctx.needs_input_grad
        layer = _layer(parameters, rows_NI.dtype)
        layer.prepare_backward(ctx.counts, needs)
        grad_NO = grad_NO.contiguous()
        grads = []
        for expert, rows in _segments(ctx.counts):
            grad = pad_rows(grad_NO[rows])
            layer.keep_grads(expert, pad_rows(rows_NI[rows]), grad)
            if needs_rows:
                grads.append(layer.rows_grad(expert, grad)[:_size(rows)])
        return (_join(grads, rows_NI, rows_NI.shape[1])
                if needs_rows else None, None, *layer.grads())


class GroupedFFN(torch.autograd.Function):
    """Apply the FFN of each expert to its rows.

    Forward keeps the inputs of the activation function and not its outputs,
    which backward computes again. So only half of the hidden values that a
    dense FFN keeps are in memory.
    """

    @staticmethod
    def forward(ctx, rows_ND: Tensor, counts: Sequence[int],
                act: Callable[[Tensor], Tensor], *parameters: Tensor | None
                ) -> Tensor:
        fc1, fc2 = _two_layers(parameters, rows_ND.dtype)
        hidden, out = [], []
        for expert, rows in _segments(counts):
            hidden_NH = fc1.forward(expert, pad_rows(rows_ND[rows]))
            hidden.append(hidden_NH)
            out.append(fc2.forward(expert, act(hidden_NH))[:_size(rows)])
        ctx.save_for_backward(rows_ND, *parameters, *hidden)
        ctx.counts, ctx.act = counts, act
        return _join(out, rows_ND, fc2.residual[0].shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        needs_rows, _, _, *needs = ctx.needs_input_grad
        rows_ND, *saved = ctx.saved_tensors
        parameters, hidden = saved[:len(needs)], saved[len(needs):]
        fc1, fc2 = _two_layers(parameters, rows_ND.dtype)
        fc1.prepare_backward(ctx.counts, needs[:len(needs) // 2])
        fc2.prepare_backward(ctx.counts, needs[len(needs) // 2:])
        grad_ND = grad_ND.contiguous()
        grads = []
        for (expert, rows), hidden_NH in zip(_segments(ctx.counts), hidden):
            with torch.enable_grad():
                hidden_NH = hidden_NH.detach().requires_grad_()
                active_NH = ctx.act(hidden_NH)
            grad = pad_rows(grad_ND[rows])
            fc2.keep_grads(expert, active_NH.detach(), grad)
            torch.autograd.backward(active_NH, fc2.rows_grad(expert, grad))
            grad = hidden_NH.grad
            fc1.keep_grads(expert, pad_rows(rows_ND[rows]), grad)
            if needs_rows:
                grads.append(fc1.rows_grad(expert, grad)[:_size(rows)])
        return (_join(grads, rows_ND, rows_ND.shape[1])
                if needs_rows else None, None, None,
                *fc1.grads(), *fc2.grads())


def _two_layers(parameters: Sequence[Tensor | None], dtype: torch.dtype
                ) -> tuple[ExpertLinear, ExpertLinear]:
    half = len(parameters) // 2
    return _layer(parameters[:half], dtype), _layer(parameters[half:], dtype)


def _segments(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, slice of its rows) for every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _size(rows: slice) -> int:
    return rows.stop - rows.start


def _join(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0, width)
