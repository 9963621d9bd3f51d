"""Experts for FFNs of Hugging Face's transformers that consist of two modules.

:mod:`rmoe.moe.found` puts them in.
"""
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rmoe.moe.experts import Core
from rmoe.moe.layer import MoELayer


class MoEHalves(MoELayer):
    """The FFN of transformers' ViT, DeiT, BEiT, Swin and others, with experts.

    In these models the FFN of a block is split into ``intermediate`` (dense,
    activation) and ``output`` (dense, dropout, and in some models the
    identity). This layer replaces ``intermediate`` and computes the whole
    FFN. ``output.dense`` then returns its input unchanged, and the rest of
    ``output`` works as before.

    Args:
        intermediate: the first half; its submodules keep their names.
        output: the second half. Its ``dense`` is not changed here: the caller
            turns it into :class:`rmoe.moe.plain_core.PassedOn`.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        core: must be True.
        rank: rank of the residuals.
        align: how gates weight the experts' outputs.
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
        # The second half stays a submodule of its block. The tuple keeps
        # PyTorch from registering it here too.
        self.second = (output, )
        # True from this layer's forward until that of ``output.dense``, which
        # checks it: so a replaced second half is noticed.
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
