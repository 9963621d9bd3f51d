"""Checks that a core's linear layers do nothing but what their weights say.

Experts add their residuals to the weights of the core's linear layers, and
never call these layers. If a library has wrapped such a layer (LoRA,
quantisation, hooks), the effect would silently be lost for the experts. So
such a core is refused.
"""
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# mmcv's wrappers are allowed, since they only add support for empty batches.
# They are recognised by name, so that mmcv need not be imported.
WRAPPERS = 'mmcv.cnn.bricks.wrappers'
HOOKS = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks',
         '_backward_hooks')


class PassedOn(nn.Linear):
    """The second linear layer of a FFN that consists of two modules, after
    :class:`rmoe.moe.halves.MoEHalves` has replaced the first module.

    The MoE layer has already computed the whole FFN with this layer's
    weights, so this layer returns its input. Its weights keep their names.

    Attributes:
        owner: the MoE layer, in a tuple, which keeps PyTorch from registering
            it as a submodule.
    """
    owner: tuple[Any, ...]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.owner[0]
        ours = layer.second[0].dense is self and layer.passes_on
        layer.passes_on = False
        if not ours:
            raise ValueError(
                'the second half of a MoE FFN was replaced, but its MoE layer '
                'still computes with the weights of the old one. Change the '
                'weights in place instead, or call rmoe.to_dense first')
        if x.shape[-1] != self.out_features:
            raise ValueError(
                f'the second half of a MoE FFN got tokens of {x.shape[-1]} '
                f'channels instead of {self.out_features}: its library calls '
                'the two halves in another way, so these FFNs cannot become '
                'MoE layers')
        return x


def check_plain(linear: nn.Module, place: str) -> None:
    """Refuse a linear layer that does more than its weight and bias say.

    A weight with ``torch.nn.utils.parametrize`` is allowed, because it is
    computed whenever it is read, with its gradient.

    Args:
        linear: one of a core's linear layers.
        place: its name in the message.

    Raises:
        ValueError: for another class than ``nn.Linear``, a 1x1
            ``nn.Conv2d`` and mmcv's wrappers of the two; for hooks, and for
            a ``forward`` of its own.
    """
    problem = _problem(linear)
    if problem:
        raise ValueError(
            f'{place} {problem}. Experts read its weight and do not call it, '
            'so that would have no effect. Leave the linear layers of MoE '
            'FFNs out of what LoRA, quantisation, float8 or hooks are '
            'applied to, or merge adapters into the weight first (merge_and_'
            "unload of peft); moe=dict(rank=...) makes experts' residuals "
            'low-rank')


def _problem(linear: nn.Module) -> str:
    """The reason to refuse a linear layer, as the end of a sentence; '' if
    there is none."""
    kind = type(linear)
    if parametrize.is_parametrized(linear):
        # torch gives each parametrized module a subclass of its own.
        kind = kind.__bases__[0]
    name = f'{kind.__module__}.{kind.__qualname__}'
    if kind is nn.Conv2d or name == f'{WRAPPERS}.Conv2d':
        if not _is_pointwise(linear):
            return f'is no 1x1 convolution but {linear}'
    elif kind not in (nn.Linear, PassedOn) and name != f'{WRAPPERS}.Linear':
        return f'is a {name}, not an nn.Linear or a 1x1 nn.Conv2d'
    if 'forward' in vars(linear):
        return 'has a forward() put in place of its own'
    # While torch.jit traces, tools put hooks on modules that count operations
    # or name scopes. These do not change results.
    if torch.jit.is_tracing():
        return ''
    for hooks in HOOKS:
        for hook in getattr(linear, hooks).values():
            function = getattr(hook, '__qualname__', type(hook).__qualname__)
            return f'has a hook in {hooks}, {function}'
    return ''


def _is_pointwise(conv: Any) -> bool:
    return (conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
            and conv.padding == (0, 0))
