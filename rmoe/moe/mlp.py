"""The MoE layer that replaces a MLP of any library."""
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe.layer import MoELayer
from rmoe.moe.mlp_form import Form, form_of, gated, run

# Attributes that only instances of the layer have, not its class. The MLP's
# submodules must not have these names, since they become attributes too.
OWN = ('experts', 'router', 'out_drop', 'form', 'align', 'unrouted', 'with_cp',
       'core_only', 'name', 'losses', 'loads_2E', 'token_counts', '_checked')


class MoEMlp(MoELayer):
    """A trained or fresh MLP of timm, Hugging Face or any other library, with
    experts.

    Its modules and weights become the core and keep their names (``fc1``,
    ``fc2``). Drop path, LayerScale and identity stay in the block around the
    MLP. In a MLP with a gate (2002.05202: DINOv2-g, EVA-02, timm's ``GluMlp``
    and ``SwiGLU``) each expert has both halves of the first layer. A norm
    inside the MLP belongs to the core, and all experts share it.

    Args:
        mlp: the MLP; see :class:`rmoe.moe.mlp_form.Form` for the allowed
            forms.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        core: False makes every expert a copy of the MLP instead.
        rank: rank of the residuals.
        align: how gates weight the experts' outputs.
        unrouted: what a token gets that no expert kept.
        with_cp: recompute the experts in backward.
        form: the form of the MLP, if the caller knows it; None finds it out
            by :func:`rmoe.moe.mlp_form.form_of`.

    Raises:
        ValueError: for a MLP of another form, with a submodule whose name the
            layer needs, or with a norm and ``core=False``.
    """

    def __init__(self, mlp: nn.Module, num_experts: int = 8,
                 router: Any = None, core: bool = True,
                 rank: int | None = None, align: str | None = None,
                 unrouted: str | None = None, with_cp: bool = False,
                 form: Form | None = None) -> None:
        form = form or form_of(mlp)
        if form is None:
            raise ValueError(f'{mlp} does not consist of a linear layer with '
                             'bias, an activation and a linear layer back to '
                             'the first width, with or without a gate: it '
                             'cannot become a MoE layer')
        children = dict(mlp.named_children())
        taken = {*dir(MoEMlp), *OWN} & set(children)
        if taken:
            raise ValueError(f'{type(mlp).__name__} has a submodule named '
                             f'{sorted(taken)}. A MoE layer has an attribute '
                             'of that name too: rename the submodule, or '
                             'choose other layers')
        if form.norm and not core:
            raise ValueError(
                f'core=False: the experts of a {type(mlp).__name__} keep its '
                'core, whose norm they share. Set core=True')
        fc2: Any = mlp.get_submodule(form.fc2)
        dropout = dropout_of(mlp, form.middle)
        act = mlp.get_submodule(form.act) if form.act else nn.SiLU()
        if form.gate or form.norm:
            act = Between(act, form.gate, dropout if form.norm else 0.,
                          mlp.get_submodule(form.norm) if form.norm else None)
        super().__init__(
            fc2.out_features, fc2.in_features, act,
            core=children if core else None, num_experts=num_experts,
            router=router, rank=rank, align=align, unrouted=unrouted,
            dropout=0. if form.norm else dropout,
            fc2_bias=fc2.bias is not None, with_cp=with_cp,
            gated=bool(form.gate))
        self.form = form
        self.core_keys = {'fc1': form.fc1, 'fc2': (form.fc2, )}
        self.shares_core = 'norm' if form.norm else ''
        self.out_drop = nn.Dropout(dropout_of(mlp, form.after))
        if not core:
            self.experts.copy_from(
                [mlp.get_submodule(name) for name in form.fc1], [fc2])

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """(..., D) tokens to (..., D); ``valid`` as in MoEFFN."""
        if self.form.norm:
            # A library may have replaced the norm since the layer was built.
            between: Any = self.experts.act
            between.norm = (self.get_submodule(self.form.norm), )
        out = self._dense(x) if self.core_only else self.mixture(x, valid)
        return self.out_drop(out)

    def _dense(self, x: Tensor) -> Tensor:
        return run(self, self.form, x)


class Between(nn.Module):
    """The part of a MLP with a gate or a norm that is between its linear
    layers. Experts use it as their activation.

    Args:
        act: activation.
        gate: see :class:`rmoe.moe.mlp_form.Form`.
        drop: dropout before the norm.
        norm: the norm, which stays a submodule of the core; None for none.
    """

    def __init__(self, act: nn.Module, gate: str, drop: float,
                 norm: nn.Module | None) -> None:
        super().__init__()
        self.act = act
        self.gate = gate
        self.drop = nn.Dropout(drop)
        # The tuple keeps PyTorch from registering the norm here too; its
        # weights belong to the core.
        self.norm = (norm, )

    @property
    def can_run_twice(self) -> bool:
        """True without a norm. Only then the result depends on the input
        alone and on no weights, so that backward may compute it again."""
        return self.norm[0] is None

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) or, with a gate, (..., 2 H) to (..., H)."""
        if self.gate:
            first, last = x.chunk(2, -1)
            x = gated(first, last, self.act, self.gate)
        else:
            x = self.act(x)
        norm = self.norm[0]
        if norm is None:
            return x
        # Experts run with autocast switched off, so the type that the norm
        # needs has to be given here.
        weight = next(norm.parameters(), None)
        kind = torch.float32 if weight is None else weight.dtype
        return norm(self.drop(x).to(kind)).to(x.dtype)


def dropout_of(mlp: nn.Module, names: tuple[str, ...]) -> float:
    """The probability with which the dropouts among these modules, one after
    the other, drop a value."""
    kept = 1.
    for name in names:
        part = mlp.get_submodule(name)
        if isinstance(part, nn.Dropout):
            kept *= 1 - part.p
    return 1 - kept
