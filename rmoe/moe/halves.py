"""FFNs of Hugging Face's transformers that are two modules, with experts."""
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rmoe.moe.experts import Core
from rmoe.moe.layer import MoELayer


class MoEHalves(MoELayer):
    """The FFN of ViT, DeiT, BEiT, Swin and others, with experts.

    There a block has ``intermediate`` (dense, activation) and ``output``
    (dense, dropout, and in some the identity). This takes the place of
    ``intermediate`` and computes the whole FFN; ``output.dense`` passes it
    on, and what follows in ``output`` works as it did.

    Args:
        intermediate: the first half; it keeps its names.
        output: the second half. Its ``dense`` is left as it is: the caller
            makes it :class:`rmoe.moe.plain_core.PassedOn`.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        core: must be True.
        rank: rank of the residuals.
        align: how gates meet outputs.
        unrouted: what a token gets that no expert kept.
        with_cp: recompute the experts in backward.

    Raises:
        ValueError: without a core.
    """
    dense: nn.Linear
    intermediate_act_fn: nn.Module
    shares_core = 'second half'

    def __init__(self, intermediate: Any, output: Any, num_experts: int = 8,
                 router: Mapping | None = None, core: bool = True,
                 rank: int | None = None, align: str | None = None,
                 unrouted: str | None = None, with_cp: bool = False) -> None:
        fc1, fc2 = intermediate.dense, output.dense
        super().__init__(
            fc1.in_features, fc1.out_features,
            intermediate.intermediate_act_fn,
            core=dict(intermediate.named_children()) if core else None,
            num_experts=num_experts, router=router, rank=rank, align=align,
            unrouted=unrouted, dropout=0., fc2_bias=fc2.bias is not None,
            with_cp=with_cp)
        # In a tuple it is no submodule: it belongs to the other half.
        self.second = (output, )
        # Whether the other half is next: a copy of it is not the one.
        self.passes_on = False

    @property
    def core(self) -> Core:
        return Core((self.dense, ), (self.second[0].dense, ), self._dense)

    def core_names(self, place: str, linear: str) -> tuple[str, ...]:
        if linear == 'fc1':
            return (f'{place}.dense', )
        block = place.rpartition('.')[0]
        return (f'{block}.output.dense' if block else 'output.dense', )

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """(..., D) tokens to (..., D); ``valid`` as in MoEFFN."""
        out = self._dense(x) if self.core_only else self.mixture(x, valid)
        self.passes_on = True
        return out

    def _dense(self, x: Tensor) -> Tensor:
        fc2 = self.second[0].dense
        return nn.functional.linear(
            self.intermediate_act_fn(self.dense(x)), fc2.weight, fc2.bias)
