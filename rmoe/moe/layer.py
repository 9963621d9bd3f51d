"""The mixture-of-experts FFN, a drop-in for mmcv's FFN.

Axis letters as in routing.py.
"""
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmoe.moe.dispatch import Combine, Dispatch, rows_of_tokens
from rmoe.moe.experts import Experts
from rmoe.moe.routing import Routing
from rmoe.registry import MODELS

ALIGNMENTS = ('stopgrad', 'none', 'renormalize')
UNROUTED = ('core', 'zero')


@MODELS.register_module()
class MoEFFN(nn.Module):
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
        losses: auxiliary losses of the forward passes since
            ``collect_losses(True)``, or None while nobody collects.
        demand_E: (E,) int64 tokens that asked for each expert in training,
            since they were last zeroed.
        kept_E: (E,) int64 tokens that each expert kept.

    Raises:
        ValueError: for an unknown option or a contradictory pair.
    """
    demand_E: Tensor
    kept_E: Tensor

    def __init__(self,
                 embed_dims: int,
                 feedforward_channels: int,
                 num_experts: int = 8,
                 router: Mapping | None = None,
                 core: bool = True,
                 rank: int | None = None,
                 align: str = 'stopgrad',
                 unrouted: str | None = None,
                 act_cfg: Mapping | None = None,
                 ffn_drop: float = 0.,
                 dropout_layer: Mapping | None = None,
                 add_identity: bool = True,
                 with_cp: bool = False) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f'num_experts={num_experts} must be at least 1')
        if align not in ALIGNMENTS:
            raise ValueError(f'align={align!r} is not one of {ALIGNMENTS}')
        if unrouted is None:
            unrouted = 'core' if core else 'zero'
        if unrouted not in UNROUTED:
            raise ValueError(f'unrouted={unrouted!r} is not one of {UNROUTED}')
        if unrouted == 'core' and not core:
            raise ValueError("unrouted='core' needs core=True; with "
                             "core=False set unrouted='zero'")
        self.align = align
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
        self.experts = Experts(
            embed_dims, feedforward_channels, num_experts,
            act=MODELS.build(act_cfg), dropout=ffn_drop, rank=rank, core=core)
        self.out_drop = nn.Dropout(ffn_drop)
        self.dropout_layer = (
            MODELS.build(dropout_layer) if dropout_layer else nn.Identity())
        self.core_only = False
        self.losses: list[Mapping[str, Tensor]] | None = None
        for name in ('demand_E', 'kept_E'):
            self.register_buffer(
                name, torch.zeros(num_experts, dtype=torch.int64),
                persistent=False)

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

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
        routing = self.router(
            x_TD, None if valid is None else valid.reshape(-1))
        if self.training:
            self._record(routing)
        if self.with_cp and torch.is_grad_enabled():
            y_TD = checkpoint(self._apply_experts, x_TD, routing,
                              use_reentrant=False)
        else:
            y_TD = self._apply_experts(x_TD, routing)
        return y_TD.to(x.dtype).reshape(x.shape)

    def _apply_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        token_ids_N = routing.token_ids_N
        table_TK = rows_of_tokens(token_ids_N, len(x_TD))
        rows_ND = Dispatch.apply(x_TD, token_ids_N, table_TK)
        rows_ND = self.experts(rows_ND, routing.counts_E, self.layers)
        kept_T = None
        if table_TK.numel() != len(token_ids_N) or not len(token_ids_N):
            kept_T = routing.kept_per_token()
        gates_N, scale_N = self._gates(routing, table_TK, kept_T)
        y_TD = Combine.apply(rows_ND, gates_N, scale_N, token_ids_N, table_TK)
        if kept_T is not None and self.unrouted == 'core':
            assert self.layers is not None
            lonely = torch.nonzero(kept_T == 0).flatten()
            core = self.layers(x_TD.index_select(0, lonely))
            y_TD = y_TD.index_copy(0, lonely, core.to(y_TD.dtype))
        return y_TD

    def _gates(self, routing: Routing, table_TK: Tensor,
               kept_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What rows are multiplied by in backward and in forward."""
        weights_N, token_ids_N = routing.weights_N, routing.token_ids_N
        if self.align == 'stopgrad':
            if kept_T is not None:
                return weights_N, 1 / kept_T[token_ids_N].to(weights_N.dtype)
            # Every token was kept equally often.
            most = table_TK.shape[1]
            return weights_N, None if most == 1 else torch.full_like(
                weights_N, 1 / most)
        if self.align == 'renormalize':
            total_T1 = Combine.apply(weights_N[:, None],
                                     torch.ones_like(weights_N), None,
                                     token_ids_N, table_TK)
            weights_N = weights_N / Dispatch.apply(total_T1, token_ids_N,
                                                   table_TK)[:, 0]
        return weights_N, weights_N.detach()

    def _record(self, routing: Routing) -> None:
        self.demand_E += routing.demand_E
        self.kept_E += routing.counts_E
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
