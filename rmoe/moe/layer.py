"""What every MoE layer does: route, dispatch, mix, count.

Axis letters as in routing.py.
"""
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmoe import compat
from rmoe.moe.buffers import ExactBuffers
from rmoe.moe.experts import Core, Experts
from rmoe.moe.mixing import (
    MEANS,
    SOFT_ALIGNMENTS,
    SPARSE_ALIGNMENTS,
    Middle,
    mix_soft,
    mix_sparse,
)
from rmoe.moe.plain_core import check_plain
from rmoe.moe.registry import MODELS
from rmoe.moe.routers.base import NotFiniteError
from rmoe.moe.routing import Routing, SoftRouting

UNROUTED = ('core', 'zero')


class MoELayer(ExactBuffers):
    """Mixture of a dense FFN (the core) and its residuals (2204.09636).

    A subclass is a drop-in for one library's FFN: it owns the core under that
    library's parameter names and adds what that library adds around it.

    1. The router chooses experts for each token, in float32.
    2. Tokens are copied to rows sorted by expert.
    3. Experts (core + residual) transform their rows.
    4. Rows are summed back into their tokens; ``align`` says with what
       weight. Tokens that no expert kept get the core or nothing.

    Args:
        embed_dims: D.
        feedforward_channels: H.
        act: activation between the two linear layers of an expert.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        core: the modules of the core under the names they get here, or None
            for plain experts.
        rank: of the residuals.
        align: how gates meet outputs.
        unrouted: what a token gets that no expert kept.
        dropout: on the hidden activations of an expert.
        fc2_bias: whether the second linear layer has a bias.
        with_cp: recompute the experts in backward.
        gated: the first linear layer gives 2 H, of which ``act`` makes H.

    Attributes:
        core_keys: the names that the core's linear layers have in this
            module, of 'fc1' and of 'fc2'.
        shares_core: what of the core, beside its linear layers, all experts
            use; '' if they can be without a core.
        needs_all_rows: whether the experts of a token look at the hidden rows
            of others, which then must not leave their process.
        core_only: True makes the layer its dense core, at dense cost.
        name: where the layer stands, for messages.
        losses: auxiliary losses of the forward passes since
            ``collect_losses(True)``, or None while nobody collects.
        loads_2E: (2, E) int64, ``demand_E`` and ``kept_E`` in training, since
            they were last zeroed.
        token_counts: (2,) int64 valid tokens, and those no expert kept.

    Raises:
        ValueError: for an unknown option or a contradictory pair.
    """
    core_keys: Mapping[str, tuple[str, ...]] = {}
    shares_core: str = ''
    needs_all_rows: bool = False
    loads_2E: Tensor
    token_counts: Tensor
    exact_buffers = ('loads_2E', 'token_counts')

    def __init__(self, embed_dims: int, feedforward_channels: int,
                 act: nn.Module, core: Mapping[str, nn.Module] | None,
                 num_experts: int, router: Mapping | None,
                 rank: int | None, align: str | None,
                 unrouted: str | None, dropout: float, fc2_bias: bool,
                 with_cp: bool, gated: bool = False) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f'num_experts={num_experts} must be at least 1')
        if core is None and self.shares_core:
            raise ValueError('core=False: the experts of this FFN keep its '
                             f'core, whose {self.shares_core} they share. '
                             'Set core=True')
        for name, module in (core or {}).items():
            self.add_module(name, module)
        if unrouted is None:
            unrouted = 'core' if core else 'zero'
        if unrouted not in UNROUTED:
            raise ValueError(f'unrouted={unrouted!r} is not one of {UNROUTED}')
        if unrouted == 'core' and core is None:
            raise ValueError("unrouted='core' needs core=True; with "
                             "core=False set unrouted='zero'")
        self.unrouted = unrouted
        self.with_cp = with_cp
        self.router = MODELS.build(
            dict(router or dict(type='TokenChoiceRouter')),
            # The scope, or a host library's default scope would hide ours.
            default_args=dict(
                _scope_='rmoe', dim=embed_dims, num_experts=num_experts))
        self.align = _check_align(align, self.router.soft, core is not None)
        self.experts = Experts(
            embed_dims, feedforward_channels, num_experts, act=act,
            dropout=dropout, rank=rank, core=core is not None,
            fc2_bias=fc2_bias, gated=gated)
        self.core_only = False
        self.name = ''
        self.losses: list[Mapping[str, Tensor]] | None = None
        self._checked: tuple[object, ...] = ()
        for name, shape in (('loads_2E', (2, num_experts)),
                            ('token_counts', (2, ))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64),
                                 persistent=False)

    @property
    def demand_E(self) -> Tensor:
        """(E,) tokens that asked for each expert; for a soft router the sum of
        its combine weights, of each pass in whole tokens. A view."""
        return self.loads_2E[0]

    @property
    def kept_E(self) -> Tensor:
        """(E,) tokens that each expert kept. A view."""
        return self.loads_2E[1]

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def core(self) -> Core | None:
        """The dense FFN inside, without what stands around it."""
        if not self.experts.core:
            return None
        fc1, fc2 = ([self.get_submodule(key) for key in self.core_keys[layer]]
                    for layer in ('fc1', 'fc2'))
        return Core(fc1, fc2, self._dense)

    def core_names(self, place: str, linear: str) -> tuple[str, ...]:
        """Names of the core's 'fc1' or 'fc2' in a model.

        Args:
            place: the layer's own name there.
            linear: which of the two.
        """
        return tuple(f'{place}.{key}' for key in self.core_keys[linear])

    def _dense(self, x: Tensor) -> Tensor:
        """The core's function."""
        raise NotImplementedError

    def check_core(self, place: str = '') -> None:
        """Refuse a core that experts would bypass.

        Args:
            place: where the layer stands, if it has no ``name``.

        Raises:
            ValueError: see :func:`rmoe.moe.plain_core.check_plain`.
        """
        core, where = self.core, self.name or place or 'a MoE layer'
        for layer in ('fc1', 'fc2') if core is not None else ():
            for linear, key in zip(getattr(core, layer),
                                   self.core_names('', layer)):
                check_plain(linear, f'{where}: {key.removeprefix(".")}')

    def _check_new(self, core: Core) -> None:
        """Check at the first forward pass, and again when a library has put
        other modules in."""
        linears = *core.fc1, *core.fc2
        found = (*map(id, linears), *map(type, linears))
        if found != self._checked:
            self.check_core()
            self._checked = found

    @property
    def preserves_function(self) -> bool:
        """Does the layer compute the dense function while residuals are
        zero, in the present mode?"""
        if not self.experts.core:
            # Equal experts, whose gates must then sum to one.
            return self.align in (*MEANS, 'renormalize') and (
                self.router.keeps_every_token)
        return self.align == 'difference' or (
            self.align in (*MEANS, 'renormalize') and
            (self.unrouted == 'core' or self.router.keeps_every_token))

    def mixture(self, x: Tensor, valid: Tensor | None,
                middle: Middle | None = None) -> Tensor:
        """(..., D), each token's experts summed; see ``forward`` of the
        subclasses, and for ``middle`` :func:`rmoe.moe.mixing.mix_sparse`."""
        x_TD = x.reshape(-1, x.shape[-1])
        valid_T = None if valid is None else valid.reshape(-1)
        try:
            routing = self.router(x_TD, valid_T,
                                  len(x) if x.dim() > 2 else 1)
        except NotFiniteError as error:
            raise NotFiniteError(
                f'{self.name or "a MoE layer"}: {error}') from None
        # A checkpoint around the layer repeats its forward in backward.
        if self.training and not compat.in_backward():
            self._record(routing, valid_T)
        if self.with_cp and torch.is_grad_enabled() and (
                not compat.is_compiling()):
            y_TD = checkpoint(self._apply_experts, x_TD, routing, middle,
                              use_reentrant=False)
        else:
            y_TD = self._apply_experts(x_TD, routing, middle)
        return y_TD.to(x.dtype).reshape(x.shape)

    def _apply_experts(self, x_TD: Tensor, routing: Routing | SoftRouting,
                       middle: Middle | None) -> Tensor:
        core = self.core
        if core is not None and not compat.is_compiling():
            self._check_new(core)
        if isinstance(routing, SoftRouting):
            return mix_soft(x_TD, routing, self.experts, core, self.align)
        return mix_sparse(x_TD, routing, self.experts, core, self.align,
                          self.unrouted, middle)

    def _record(self, routing: Routing | SoftRouting,
                valid_T: Tensor | None) -> None:
        self._count(routing, valid_T)
        if not routing.losses:
            return
        if self.losses is not None:
            self.losses.append(routing.losses)
        elif not compat.is_compiling():  # a trace cannot warn
            warnings.warn(
                'a MoE layer produced auxiliary losses that nobody collects: '
                "add dict(type='rmoe.MoELossHook') to custom_hooks of an "
                'OpenMMLab config, or rmoe.auxiliary_loss(model) to the loss '
                'of any other loop, or set loss_weights={} in the router to '
                'train without them',
                stacklevel=2)

    def _count(self, routing: Routing | SoftRouting,
               valid_T: Tensor | None) -> None:
        loads = routing.load_E
        if isinstance(routing, SoftRouting):
            loads = loads.round().long()
        elif routing.demand_E is not loads:
            loads = torch.stack([routing.demand_E, loads])
        self.loads_2E += loads
        tokens, lost = self.token_counts.unbind()
        tokens.add_(routing.num_tokens if valid_T is None else valid_T.sum())
        if isinstance(routing, Routing) and routing.rows.lonely_T is not None:
            lonely_T = routing.rows.lonely_T
            if valid_T is not None:
                lonely_T = lonely_T & valid_T
            lost.add_(lonely_T.sum())


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


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by their module name, in forward order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
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

    Raises:
        ValueError: for a loss without a gradient whose router trains.
    """
    total: dict[str, Tensor] = {}
    for key, layer in moe_layers(model).items():
        collected, layer.losses = layer.losses, [] if start else None
        if start:
            continue
        for losses in collected or ():
            for name, loss in losses.items():
                _check_gradient(loss, name, layer, layer.name or key)
                total[name] = total[name] + loss if name in total else loss
    return total


def _check_gradient(loss: Tensor, name: str, layer: MoELayer, place: str
                    ) -> None:
    """Refuse a loss that would be logged and never train its router."""
    if not torch.is_grad_enabled() or loss.requires_grad or not any(
            p.requires_grad for p in layer.router.parameters()):
        return
    raise ValueError(
        f'the auxiliary loss {name!r} of {place or "a MoE layer"} has no '
        'gradient, although its router trains: the layer ran under '
        'torch.no_grad(), as inside a reentrant activation checkpoint '
        "(torch.utils.checkpoint's default, and mmengine's "
        'activation_checkpointing). Use with_cp=True of the backbone or in '
        'moe, or use_reentrant=False; where the router is not to train, '
        'freeze it')
