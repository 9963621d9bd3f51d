"""The mixture-of-experts MLP, a drop-in for timm's Mlp."""
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from rmoe.moe.layer import MoELayer


class MoEMlp(MoELayer):
    """A trained or fresh timm Mlp with experts.

    Its modules and weights become the core and keep their names (``fc1``,
    ``fc2``). What a block adds around it (drop path, LayerScale, identity)
    stays with the block.

    Args:
        mlp: timm's Mlp.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        core: False makes every expert a copy of the Mlp instead.
        rank: rank of the residuals.
        align: how gates meet outputs.
        unrouted: what a token gets that no expert kept.
        with_cp: recompute the experts in backward.

    Raises:
        ValueError: for a Mlp that is not linear - activation - linear.
    """
    fc1: nn.Module
    act: nn.Module
    drop1: nn.Module
    fc2: nn.Module
    core_keys: ClassVar[Mapping[str, str]] = {'fc1': 'fc1', 'fc2': 'fc2'}

    def __init__(self, mlp: Any, num_experts: int = 8,
                 router: Mapping | None = None, core: bool = True,
                 rank: int | None = None, align: str | None = None,
                 unrouted: str | None = None, with_cp: bool = False) -> None:
        fc1, fc2 = mlp.fc1, mlp.fc2
        if not (type(fc1) is type(fc2) is nn.Linear and fc1.bias is not None
                and fc1.in_features == fc2.out_features
                and isinstance(mlp.norm, nn.Identity)):
            raise ValueError(f'{mlp} is not a linear layer with bias, an '
                             'activation and a linear layer back: it cannot '
                             'become a MoE layer')
        modules = {name: module for name, module in mlp.named_children()
                   if name not in ('norm', 'drop2')}
        super().__init__(
            fc1.in_features, fc1.out_features, mlp.act,
            core=modules if core else None, num_experts=num_experts,
            router=router, rank=rank, align=align, unrouted=unrouted,
            dropout=mlp.drop1.p, fc2_bias=fc2.bias is not None,
            with_cp=with_cp)
        self.drop2 = mlp.drop2
        if not core:
            self.experts.copy_from(fc1, fc2)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(..., D) tokens to (..., D); ``valid`` as in MoEFFN."""
        out = self._dense(x) if self.core_only else self.mixture(x, valid)
        return self.drop2(out)

    def _dense(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop1(self.act(self.fc1(x))))
