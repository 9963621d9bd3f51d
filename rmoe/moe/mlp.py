"""The mixture-of-experts MLP, a drop-in for timm's and Hugging Face's."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rmoe.moe.layer import MoELayer


@dataclass(frozen=True)
class Layout:
    """Where a library's MLP has its parts.

    Attributes:
        library: what the name of its module starts with.
        kind: name of its class.
        fc1: name of the first linear layer, which is packed in a MLP with a
            gate: it gives 2 H.
        fc2: name of the second.
        act: name of the activation; '' for SiLU, called as a function.
        gated: whether half of what fc1 gives is the other half's factor.
    """
    library: str
    kind: str
    fc1: str = 'fc1'
    fc2: str = 'fc2'
    act: str = 'act'
    gated: bool = False


LAYOUTS = (
    Layout('timm.', 'Mlp'),
    Layout('timm.', 'GluMlp', gated=True),
    Layout('transformers.', 'Dinov2MLP', act='activation'),
    Layout('transformers.', 'Dinov2WithRegistersMLP', act='activation'),
    *(Layout('transformers.', kind, 'weights_in', 'weights_out', '', True)
      for kind in ('Dinov2SwiGLUFFN', 'Dinov2WithRegistersSwiGLUFFN')),
    Layout('transformers.', 'DINOv3ViTMLP', 'up_proj', 'down_proj', 'act_fn'),
    Layout('transformers.', 'HieraMlp', act='activation_fn'),
    Layout('transformers.', 'VitDetMlp'),
)


def layout_of(module: nn.Module) -> Layout | None:
    """Of a MLP that can become a MoE layer; known by name, so that no library
    need be installed."""
    kind = type(module)
    for layout in LAYOUTS:
        if kind.__name__ == layout.kind and kind.__module__.startswith(
                layout.library):
            return layout
    return None


class MoEMlp(MoELayer):
    """A trained or fresh MLP of timm or Hugging Face, with experts.

    Its modules and weights become the core and keep their names (``fc1``,
    ``fc2``). What a block adds around it (drop path, LayerScale, identity)
    stays with the block. In a MLP with a gate (2002.05202: DINOv2-g, EVA-02,
    timm's ``GluMlp``) an expert has both halves of the first layer.

    Args:
        mlp: one of ``LAYOUTS``.
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

    def __init__(self, mlp: Any, num_experts: int = 8,
                 router: Mapping | None = None, core: bool = True,
                 rank: int | None = None, align: str | None = None,
                 unrouted: str | None = None, with_cp: bool = False) -> None:
        layout = layout_of(mlp)
        assert layout is not None
        fc1, fc2 = getattr(mlp, layout.fc1), getattr(mlp, layout.fc2)
        if not (type(fc1) is type(fc2) is nn.Linear and fc1.bias is not None
                and fc1.in_features == fc2.out_features
                and isinstance(getattr(mlp, 'norm', nn.Identity()),
                               nn.Identity)):
            raise ValueError(f'{mlp} is not a linear layer with bias, an '
                             'activation and a linear layer back: it cannot '
                             'become a MoE layer')
        act = getattr(mlp, layout.act) if layout.act else nn.SiLU()
        if layout.gated:
            act = Gate(act, getattr(mlp, 'gate_last', False))
        modules = {name: module for name, module in mlp.named_children()
                   if name not in ('norm', 'drop2')}
        # ViTDet has one for both places.
        drop1, drop2 = (getattr(mlp, name, getattr(mlp, 'drop', None))
                        for name in ('drop1', 'drop2'))
        super().__init__(
            fc1.in_features, fc2.in_features, act,
            core=modules if core else None, num_experts=num_experts,
            router=router, rank=rank, align=align, unrouted=unrouted,
            dropout=drop1.p if drop1 else 0., fc2_bias=fc2.bias is not None,
            with_cp=with_cp, gated=layout.gated)
        self.core_keys = {'fc1': layout.fc1, 'fc2': layout.fc2}
        self.drop2 = drop2 or nn.Identity()
        if not core:
            self.experts.copy_from(fc1, fc2)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(..., D) tokens to (..., D); ``valid`` as in MoEFFN."""
        out = self._dense(x) if self.core_only else self.mixture(x, valid)
        return self.drop2(out)

    def _dense(self, x: Tensor) -> Tensor:
        fc1, fc2 = (self.get_submodule(self.core_keys[name])
                    for name in ('fc1', 'fc2'))
        return fc2(self.experts.dropout(self.experts.act(fc1(x))))


class Gate(nn.Module):
    """(..., 2 H) to (..., H), one half by the activation of the other.

    Args:
        act: of the half that is the gate.
        last: whether that is the second half.
    """

    def __init__(self, act: nn.Module, last: bool) -> None:
        super().__init__()
        self.act = act
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        if self.last:
            return first * self.act(second)
        return self.act(first) * second
