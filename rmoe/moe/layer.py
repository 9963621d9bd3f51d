"""The base class of all MoE layers, and the collection of auxiliary losses.

A MoE layer routes its tokens, applies the experts, combines their outputs and
counts loads. Each FFN of a library that can get experts has a subclass.
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

    A subclass is a drop-in replacement for one library's FFN: it owns the
    core under that library's parameter names and adds what that library does
    around the two linear layers.

    1. The router chooses experts for each token, in float32.
    2. Dispatch: tokens are copied to rows sorted by expert.
    3. Experts (core + residual) transform their rows.
    4. Combine: rows are summed back into their tokens, with weights that
       ``align`` defines. Tokens that no expert kept get the core's output or
       zero, as ``unrouted`` says.

    Args:
        embed_dims: D.
        feedforward_channels: H.
        act: activation between the two linear layers of an expert.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        core: the modules of the core by the names they get in this layer, or
            None for plain experts.
        rank: rank of the residuals.
        align: how gates weight the experts' outputs.
        unrouted: what a token gets that no expert kept.
        dropout: on the hidden activations of an expert.
        fc2_bias: whether the second linear layer has a bias.
        with_cp: recompute the experts in backward.
        gated: True if the first linear layer has 2 H outputs, from which
            ``act`` computes H.

    Attributes:
        core_keys: for 'fc1' and 'fc2', the names of the core's linear layers
            in this module.
        shares_core: the part of the core, beside its linear layers, that all
            experts use, for messages. Experts then need a core. '' if they can
            do without one.
        needs_all_rows: True if an expert's result for one token depends on
            the hidden rows of other tokens. Rows then must not be sent to
            other processes.
        core_only: True makes the layer compute its dense core alone, at dense
            cost.
        name: the place of the layer in the model, for messages.
        losses: auxiliary losses of the forward passes since
            ``collect_losses(start=True)``; None while they are not collected.
        loads_2E: (2, E) int64, ``demand_E`` and ``kept_E`` of training,
            summed since they were last zeroed.
        token_counts: (2,) int64, the number of valid tokens, and of those
            that no expert kept, summed likewise.

    Raises:
        ValueError: for an unknown option, or two options that contradict each
            other.
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
            # Without the scope, a registry would look the name up in the
            # default scope, which is the host library's, and not find it.
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
        """(E,), tokens that each expert would have kept without a capacity
        limit. For a soft router it is the sum of the expert's combine
        weights, of each pass rounded to whole tokens. A view."""
        return self.loads_2E[0]

    @property
    def kept_E(self) -> Tensor:
        """(E,), tokens that each expert kept. A view."""
        return self.loads_2E[1]

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def core(self) -> Core | None:
        """The dense FFN inside the layer, see :class:`Core`; None for plain
        experts."""
        if not self.experts.core:
            return None
        fc1, fc2 = ([self.get_submodule(key) for key in self.core_keys[layer]]
                    for layer in ('fc1', 'fc2'))
        return Core(fc1, fc2, self._dense)

    def core_names(self, place: str, linear: str) -> tuple[str, ...]:
        """The names of the core's linear layers in a model.

        Args:
            place: the name of this MoE layer in the model.
            linear: 'fc1' or 'fc2'.
        """
        return tuple(f'{place}.{key}' for key in self.core_keys[linear])

    def _dense(self, x: Tensor) -> Tensor:
        """Compute the core's function of (..., D) tokens."""
        raise NotImplementedError

    def check_core(self, place: str = '') -> None:
        """Refuse a core whose linear layers do more than their weights say.

        Experts use the weights and do not call the layers.

        Args:
            place: the layer's place in the model for the message, if it has
                no ``name``.

        Raises:
            ValueError: see :func:`rmoe.moe.plain_core.check_plain`.
        """
        core, where = self.core, self.name or place or 'a MoE layer'
        for layer in ('fc1', 'fc2') if core is not None else ():
            for linear, key in zip(getattr(core, layer),
                                   self.core_names('', layer)):
                check_plain(linear, f'{where}: {key.removeprefix(".")}')

    def _check_new(self, core: Core) -> None:
        """Check the core at the first forward pass, and again whenever a
        library (of LoRA or quantisation, for example) has replaced its linear
        layers since."""
        linears = *core.fc1, *core.fc2
        found = (*map(id, linears), *map(type, linears))
        if found != self._checked:
            self.check_core()
            self._checked = found

    @property
    def preserves_function(self) -> bool:
        """True if the layer computes the dense function as long as residuals
        are zero. This may differ between training and evaluation."""
        if not self.experts.core:
            # Plain experts that are copies of one FFN compute its function if
            # every token has one and its weights sum to one.
            return self.align in (*MEANS, 'renormalize') and (
                self.router.keeps_every_token)
        return self.align == 'difference' or (
            self.align in (*MEANS, 'renormalize') and
            (self.unrouted == 'core' or self.router.keeps_every_token))

    def mixture(self, x: Tensor, valid: Tensor | None,
                middle: Middle | None = None) -> Tensor:
        """Route the tokens, apply their experts and combine the outputs.

        Args:
            x: (..., D) tokens; with three or more axes, the first is that of
                the images.
            valid: (...) bool, False for padding; None means all are valid.
            middle: see :func:`rmoe.moe.mixing.mix_sparse`.

        Returns:
            (..., D), what the experts give each token, without the identity.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        valid_T = None if valid is None else valid.reshape(-1)
        try:
            routing = self.router(x_TD, valid_T,
                                  len(x) if x.dim() > 2 else 1)
        except NotFiniteError as error:
            raise NotFiniteError(
                f'{self.name or "a MoE layer"}: {error}') from None
        # Activation checkpointing around the layer repeats its forward during
        # backward, which must not count loads and losses a second time.
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
        """Count loads and keep the auxiliary losses of a forward pass."""
        self._count(routing, valid_T)
        if not routing.losses:
            return
        if self.losses is not None:
            self.losses.append(routing.losses)
        elif not compat.is_compiling():  # A traced graph cannot warn.
            warnings.warn(
                'a MoE layer produced auxiliary losses that are not collected '
                'and so do not train the router. Add '
                "dict(type='rmoe.MoELossHook') to custom_hooks of an OpenMMLab "
                'config, or rmoe.auxiliary_loss(model) to the loss of any '
                'other training loop, or set loss_weights={} in the router to '
                'train without them',
                stacklevel=2)

    def _count(self, routing: Routing | SoftRouting,
               valid_T: Tensor | None) -> None:
        """Add the loads and token numbers of a forward pass to the totals."""
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
            f'align={align!r} is not one of {allowed}, the alignments for a '
            'router that '
            f'{"mixes tokens into slots" if soft else "chooses experts"}')
    if align == 'difference' and not core:
        raise ValueError("align='difference' needs core=True; with core=False "
                         "set align='none'")
    return align


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by their module names, in the order in which
    ``model.named_modules()`` gives them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
    }


def collect_losses(model: nn.Module, start: bool) -> dict[str, Tensor]:
    """Start or stop collecting auxiliary losses.

    Args:
        model: any module with MoE layers inside.
        start: True forgets earlier losses and collects from now on; False
            stops collecting and returns the losses.

    Returns:
        The losses collected since the start, by name, summed over layers and
        forward passes; empty with ``start=True``.

    Raises:
        ValueError: if a loss has no gradient although its router trains.
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
    """Refuse a loss that would appear in the log but not train its router."""
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
