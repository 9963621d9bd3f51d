"""The mixture-of-experts FFN, a drop-in for mmcv's FFN.

Axis letters as in routing.py.
"""
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmoe.moe.buffers import ExactBuffers
from rmoe.moe.experts import Experts
from rmoe.moe.mixing import (
    SOFT_ALIGNMENTS,
    SPARSE_ALIGNMENTS,
    mix_soft,
    mix_sparse,
)
from rmoe.moe.routers.base import NotFiniteError
from rmoe.moe.routing import Routing, SoftRouting
from rmoe.registry import MODELS

UNROUTED = ('core', 'zero')


@MODELS.register_module()
class MoEFFN(ExactBuffers):
    """A FFN whose weights depend on the token: core + residual (2204.09636).

    The core has the parameter names of mmcv's FFN (``layers.0.0``,
    ``layers.1``), so a dense checkpoint is a valid core, and a fresh layer
    computes the dense function exactly.

    1. The router chooses experts for each token, in float32.
    2. Tokens are copied to rows sorted by expert.
    3. Experts (core + residual) transform their rows.
    4. Rows are summed back into their tokens; ``align`` says with what
       weight. Tokens that no expert kept get the core or nothing.

    Args:
        embed_dims: D.
        feedforward_channels: H.
        num_experts: E.
        router: config of a registered router; ``dim`` and ``num_experts``
            are filled in. None means ``dict(type='TokenChoiceRouter')``.
        core: False for plain experts without a core (the upper-bound MoE).
        rank: rank of the residuals; None for full rank.
        align: how gates w meet the outputs of the n experts that kept a
            token. 'stopgrad' (RMoE): sum sg[(1/n - w) E] + w E, the scale of
            the dense FFN forward, the gradients of the gated sum backward.
            'none': sum w E. 'renormalize': sum (w / sum w) E; at n = 1 its
            gate is the constant 1 and teaches the router nothing.
            With a soft router, E being applied to slots: 'difference':
            core(x) + sum w (E - core), the dense function as long as
            residuals are zero, for one more FFN on the tokens and one more
            on the slots; 'none': sum w E, as published.
            None means 'stopgrad', or for a soft router 'difference' where
            there is a core.
        unrouted: what a token gets that no expert kept: 'core', or 'zero'.
            None means 'core' where there is one.
        act_cfg: activation; None means exact GELU.
        ffn_drop: dropout on hidden activations and on the output.
        dropout_layer: config of the layer (DropPath) applied before the
            identity is added; None for none.
        add_identity: whether to add the input or ``identity``.
        with_cp: recompute the experts in backward. Routing stays outside, so
            a token cannot change its expert between the two passes.

    Attributes:
        core_only: True makes the layer its dense core, at dense cost.
        name: where the layer stands, for messages.
        losses: auxiliary losses of the forward passes since
            ``collect_losses(True)``, or None while nobody collects.
        demand_E: (E,) float64 tokens that asked for each expert in training,
            since they were last zeroed; for a soft router the sum of its
            combine weights.
        kept_E: (E,) float64 tokens that each expert kept.
        token_counts: (2,) float64 valid tokens, and those no expert kept.

    Raises:
        ValueError: for an unknown option or a contradictory pair.
    """
    demand_E: Tensor
    kept_E: Tensor
    token_counts: Tensor
    exact_buffers = ('demand_E', 'kept_E', 'token_counts')

    def __init__(self,
                 embed_dims: int,
                 feedforward_channels: int,
                 num_experts: int = 8,
                 router: Mapping | None = None,
                 core: bool = True,
                 rank: int | None = None,
                 align: str | None = None,
                 unrouted: str | None = None,
                 act_cfg: Mapping | None = None,
                 ffn_drop: float = 0.,
                 dropout_layer: Mapping | None = None,
                 add_identity: bool = True,
                 with_cp: bool = False) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f'num_experts={num_experts} must be at least 1')
        if unrouted is None:
            unrouted = 'core' if core else 'zero'
        if unrouted not in UNROUTED:
            raise ValueError(f'unrouted={unrouted!r} is not one of {UNROUTED}')
        if unrouted == 'core' and not core:
            raise ValueError("unrouted='core' needs core=True; with "
                             "core=False set unrouted='zero'")
        self.unrouted = unrouted
        self.add_identity = add_identity
        self.with_cp = with_cp
        act_cfg = act_cfg or dict(type='GELU')
        self.layers = nn.Sequential(
            nn.Sequential(
                nn.Linear(embed_dims, feedforward_channels),
                MODELS.build(act_cfg), nn.Dropout(ffn_drop)),
            nn.Linear(feedforward_channels, embed_dims),
            nn.Dropout(ffn_drop)) if core else None
        self.router = MODELS.build(
            dict(router or dict(type='TokenChoiceRouter')),
            # The scope, or a host library's default scope would hide ours.
            default_args=dict(
                _scope_='rmoe', dim=embed_dims, num_experts=num_experts))
        self.align = _check_align(align, self.router.soft, core)
        self.experts = Experts(
            embed_dims, feedforward_channels, num_experts,
            act=MODELS.build(act_cfg), dropout=ffn_drop, rank=rank, core=core)
        self.out_drop = nn.Dropout(ffn_drop)
        self.dropout_layer = (
            MODELS.build(dropout_layer) if dropout_layer else nn.Identity())
        self.core_only = False
        self.name = ''
        self.losses: list[Mapping[str, Tensor]] | None = None
        for name, size in (('demand_E', num_experts), ('kept_E', num_experts),
                           ('token_counts', 2)):
            self.register_buffer(
                name, torch.zeros(size, dtype=torch.float64),
                persistent=False)

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def preserves_function(self) -> bool:
        """Does the layer compute the dense function while residuals are
        zero, in the present mode?"""
        if self.layers is None:
            # Equal experts, whose gates must then sum to one.
            return self.align in ('stopgrad', 'renormalize') and (
                self.router.keeps_every_token)
        return self.align == 'difference' or (
            self.align in ('stopgrad', 'renormalize') and
            (self.unrouted == 'core' or self.router.keeps_every_token))

    def forward(self, x: Tensor, identity: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:
        """Same signature and residual behaviour as mmcv's FFN.

        Args:
            x: (..., D) tokens.
            identity: (..., D), added to the output; None means ``x``.
            valid: (...) bool, False for padded tokens, which are routed to
                nobody; None means all are valid.
        """
        if self.core_only:
            assert self.layers is not None
            out = self.layers(x)
        else:
            out = self.out_drop(self._mixture(x, valid))
        out = self.dropout_layer(out)
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out

    def _mixture(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        valid_T = None if valid is None else valid.reshape(-1)
        try:
            routing = self.router(x_TD, valid_T,
                                  len(x) if x.dim() > 2 else 1)
        except NotFiniteError as error:
            raise NotFiniteError(
                f'{self.name or "a MoE layer"}: {error}') from None
        if self.training:
            self._record(routing, valid_T)
        if self.with_cp and torch.is_grad_enabled():
            y_TD = checkpoint(self._apply_experts, x_TD, routing,
                              use_reentrant=False)
        else:
            y_TD = self._apply_experts(x_TD, routing)
        return y_TD.to(x.dtype).reshape(x.shape)

    def _apply_experts(self, x_TD: Tensor,
                       routing: Routing | SoftRouting) -> Tensor:
        if isinstance(routing, SoftRouting):
            return mix_soft(x_TD, routing, self.experts, self.layers,
                            self.align)
        return mix_sparse(x_TD, routing, self.experts, self.layers,
                          self.align, self.unrouted)

    def _record(self, routing: Routing | SoftRouting,
                valid_T: Tensor | None) -> None:
        self.demand_E += routing.demand_E
        self.kept_E += routing.load_E
        lost_T = routing.kept_per_token() == 0
        if valid_T is not None:
            lost_T &= valid_T
        self.token_counts[0] += (len(lost_T) if valid_T is None
                                 else valid_T.sum())
        self.token_counts[1] += lost_T.sum()
        if not routing.losses:
            return
        if self.losses is None:
            warnings.warn(
                'a MoE layer produced auxiliary losses that nobody collects: '
                "add dict(type='rmoe.MoELossHook') to custom_hooks, or set "
                'loss_weights={} in the router to train without them',
                stacklevel=2)
        else:
            self.losses.append(routing.losses)


def _check_align(align: str | None, soft: bool, core: bool) -> str:
    allowed = SOFT_ALIGNMENTS if soft else SPARSE_ALIGNMENTS
    if align is None:
        return 'none' if soft and not core else allowed[0]
    if align not in allowed:
        raise ValueError(
            f'align={align!r} is not one of {allowed}, which a router that '
            f'{"mixes tokens into slots" if soft else "chooses experts"} '
            'takes')
    if align == 'difference' and not core:
        raise ValueError("align='difference' needs core=True; with core=False "
                         "set align='none'")
    return align


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The MoE layers of a model by their module name, in forward order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoEFFN)
    }


def collect_losses(model: nn.Module, start: bool) -> dict[str, Tensor]:
    """Start or stop collecting auxiliary losses.

    Args:
        model: any module with MoE layers inside.
        start: True drops what was there and collects from now on; False
            stops and returns.

    Returns:
        Losses collected so far, by name, summed over layers and calls; empty
        when starting.
    """
    total: dict[str, Tensor] = {}
    for layer in moe_layers(model).values():
        for losses in layer.losses or ():
            for name, loss in losses.items():
                total[name] = total[name] + loss if name in total else loss
        layer.losses = [] if start else None
    return {} if start else total
