"""FFNs of Hugging Face's transformers that are no module of their own, or
that need more than tokens.
"""
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from rmoe.moe.experts import Core
from rmoe.moe.layer import MoELayer
from rmoe.moe.mix_ffn import check_keeps_every_token, convolve_maps


class PassedOn(nn.Linear):
    """A linear layer whose product was computed before: it hands over what it
    gets. Its weights keep their name and belong to the layer before."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.out_features:
            raise ValueError(
                f'the second half of a MoE FFN got tokens of {x.shape[-1]} '
                f'channels instead of {self.out_features}: its library calls '
                'the two halves in another way, so these FFNs cannot become '
                'MoE layers')
        return x


class MoEHalves(MoELayer):
    """The FFN of ViT, DeiT, BEiT, Swin and others, with experts.

    There a block has ``intermediate`` (dense, activation) and ``output``
    (dense, dropout, and in some the identity). This takes the place of
    ``intermediate`` and computes the whole FFN; ``output.dense`` passes it
    on, and what follows in ``output`` works as it did.

    Args:
        intermediate: the first half; it keeps its names.
        output: the second half. Its ``dense`` is left as it is: the caller
            makes it :class:`PassedOn`.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        rank: rank of the residuals.
        align: how gates meet outputs.
    """
    dense: nn.Linear
    intermediate_act_fn: nn.Module
    core_keys: ClassVar[Mapping[str, str]] = {'fc1': 'dense'}

    def __init__(self, intermediate: Any, output: Any, num_experts: int = 8,
                 router: Mapping | None = None, rank: int | None = None,
                 align: str | None = None) -> None:
        fc1, fc2 = intermediate.dense, output.dense
        super().__init__(
            fc1.in_features, fc1.out_features,
            intermediate.intermediate_act_fn,
            core=dict(intermediate.named_children()),
            num_experts=num_experts, router=router, rank=rank, align=align,
            unrouted=None, dropout=0., fc2_bias=fc2.bias is not None,
            with_cp=False)
        # In a tuple it is no submodule: it belongs to the other half.
        self.second = (output, )

    @property
    def core(self) -> Core:
        return Core(self.dense, self.second[0].dense, self._dense)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) tokens to (..., D)."""
        return self._dense(x) if self.core_only else self.mixture(x, None)

    def _dense(self, x: Tensor) -> Tensor:
        fc2 = self.second[0].dense
        return nn.functional.linear(
            self.intermediate_act_fn(self.dense(x)), fc2.weight, fc2.bias)


class MoESegformerFFN(MoELayer):
    """The MixFFN of Hugging Face's SegFormer with experts; how is said in
    :class:`rmoe.moe.MoEMixFFN`.

    Args:
        ffn: the SegformerMixFFN; its modules become the core.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow. It must
            keep every token: a map with holes cannot be convolved.
        rank: rank of the residuals.
        align: how gates meet outputs.

    Raises:
        ValueError: for a router that drops tokens or mixes them.
    """
    dense1: nn.Module
    dwconv: Any
    intermediate_act_fn: nn.Module
    dense2: nn.Module
    dropout: nn.Module
    core_keys: ClassVar[Mapping[str, str]] = {
        'fc1': 'dense1', 'fc2': 'dense2'}
    needs_all_rows: ClassVar[bool] = True

    def __init__(self, ffn: Any, num_experts: int = 8,
                 router: Mapping | None = None, rank: int | None = None,
                 align: str | None = None) -> None:
        super().__init__(
            ffn.dense1.in_features, ffn.dense1.out_features,
            ffn.intermediate_act_fn, core=dict(ffn.named_children()),
            num_experts=num_experts, router=router, rank=rank, align=align,
            unrouted=None, dropout=ffn.dropout.p,
            fc2_bias=ffn.dense2.bias is not None, with_cp=False)
        check_keeps_every_token(self.router)

    def forward(self, hidden_states: Tensor, height: int, width: int
                ) -> Tensor:
        """(B, h w, D) tokens of a map to (B, h w, D)."""
        if self.core_only:
            hidden = self.dwconv(self.dense1(hidden_states), height, width)
            out = self.dense2(self.dropout(self.intermediate_act_fn(hidden)))
        else:
            out = self.mixture(hidden_states, None, partial(
                convolve_maps, self.dwconv.dwconv, (height, width)))
        return self.dropout(out)
