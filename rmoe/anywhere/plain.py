"""FFNs that are linear - activation - linear, known by what they compute.

Names of classes say little: each library has its own. A module is a plain FFN
if its two linear layers, and what is called between and after them, give
exactly its output.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmoe.moe.layer import MoELayer

SILENT = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Calls:
    """What a FFN calls, by the names of its submodules.

    Attributes:
        fc1: D to H.
        between: activation and dropouts, in order.
        fc2: H to D.
        after: dropouts.
    """
    fc1: str
    between: tuple[str, ...]
    fc2: str
    after: tuple[str, ...]


def linear_pairs(model: nn.Module) -> list[str]:
    """Names of the smallest modules that hold exactly two linear layers and
    no other parameters; some are FFNs."""
    found: list[str] = []
    for name, module in model.named_modules():
        linears = [child for child in module.modules()
                   if isinstance(child, nn.Linear)]
        own = {id(p) for linear in linears for p in linear.parameters()}
        if len(linears) == 2 and module not in linears and all(
                id(p) in own for p in module.parameters()):
            # Parents come first: a smaller one replaces what is around it.
            found = [other for other in found if not (
                other == '' or name.startswith(f'{other}.'))] + [name]
    return found


@torch.no_grad()
def calls_of(module: nn.Module) -> Calls | None:
    """How a module is a plain FFN, or None if it is none.

    The module is run once on a few made-up tokens. Its modes, and the state
    of random generators, are as before.
    """
    names = {id(child): name for name, child in module.named_modules()
             if not any(True for _ in child.children())}
    order: list[str] = []
    handles = [child.register_forward_hook(
        lambda child, *_: order.append(names[id(child)]))
        for child in module.modules() if id(child) in names]
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        linears = [child for child in module.modules()
                   if isinstance(child, nn.Linear)]
        weight = linears[0].weight
        if weight.is_meta:
            raise ValueError('the model has no weights yet (device meta): '
                             'call to_empty() and load them, then upcycle')
        x = torch.linspace(-1, 1, 4 * linears[0].in_features).sin().view(
            1, 4, -1).to(weight)
        out = module(x)
        calls = _split(module, order)
        if calls is None or not isinstance(out, Tensor):
            return None
        # With the dropouts off, only code of the module itself is random.
        module.training = True
        same = [torch.equal(_run(module, calls, x), other)
                for other in (out, module(x))]
        return calls if all(same) else None
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return None  # it takes something else than tokens
    finally:
        for handle in handles:
            handle.remove()
        for child, mode in modes.items():
            child.training = mode


def _split(module: nn.Module, order: list[str]) -> Calls | None:
    parts = [module.get_submodule(name) for name in order]
    places = [i for i, part in enumerate(parts)
              if isinstance(part, nn.Linear)]
    if len(places) != 2 or places[0] != 0:
        return None
    first, second = (parts[place] for place in places)
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    between, after = order[1:places[1]], order[places[1] + 1:]
    acts = [name for name in between
            if not isinstance(module.get_submodule(name), SILENT)]
    if (first.in_features, first.out_features) != (
            second.out_features, second.in_features):
        return None
    if first.bias is None or len(acts) != 1 or not all(
            isinstance(module.get_submodule(name), SILENT) for name in after):
        return None
    return Calls(order[0], tuple(between), order[places[1]], tuple(after))


def _run(module: nn.Module, calls: Calls, x: Tensor) -> Tensor:
    for name in (calls.fc1, *calls.between, calls.fc2, *calls.after):
        x = module.get_submodule(name)(x)
    return x


class MoEPlainFFN(MoELayer):
    """Any library's plain FFN with experts.

    Its submodules become the core and keep their names.

    Args:
        ffn: the FFN.
        calls: what it calls.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow.
        rank: rank of the residuals.
        align: how gates meet outputs.

    Raises:
        ValueError: if a submodule has a name that the layer needs.
    """
    core_keys: ClassVar[Mapping[str, str]] = {}

    def __init__(self, ffn: nn.Module, calls: Calls, num_experts: int = 8,
                 router: Mapping | None = None, rank: int | None = None,
                 align: str | None = None) -> None:
        children = dict(ffn.named_children())
        taken = {'experts', 'router', 'core', 'forward'} & set(children)
        if taken:
            raise ValueError(f'{type(ffn).__name__} has a submodule named '
                             f'{sorted(taken)}, which a MoE layer has too')
        fc1: Any = ffn.get_submodule(calls.fc1)
        fc2: Any = ffn.get_submodule(calls.fc2)
        parts = [ffn.get_submodule(name) for name in calls.between]
        super().__init__(
            fc1.in_features, fc1.out_features,
            next(p for p in parts if not isinstance(p, SILENT)),
            core=children, num_experts=num_experts, router=router, rank=rank,
            align=align, unrouted=None, fc2_bias=fc2.bias is not None,
            dropout=dropout_of(parts), with_cp=False)
        self.calls = calls
        # Of this module, not of the class: each library has its own names.
        self.core_keys = {  # type: ignore[misc]
            'fc1': calls.fc1, 'fc2': calls.fc2}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) tokens to (..., D)."""
        out = self._dense(x) if self.core_only else self.mixture(x, None)
        for name in self.calls.after:
            out = self.get_submodule(name)(out)
        return out

    def _dense(self, x: Tensor) -> Tensor:
        for name in (self.calls.fc1, *self.calls.between, self.calls.fc2):
            x = self.get_submodule(name)(x)
        return x


def dropout_of(parts: list[nn.Module]) -> float:
    """What the dropouts among these modules drop together."""
    kept = 1.
    for part in parts:
        if isinstance(part, nn.Dropout):
            kept *= 1 - part.p
    return 1 - kept
