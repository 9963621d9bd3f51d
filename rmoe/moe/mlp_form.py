"""Finds out, by running it, whether a module is a MLP that can get experts.

Class and attribute names do not tell, since each library has its own. So
:func:`form_of` observes which submodules a module calls, assumes a form (the
two linear layers, what is called between and after them, and possibly a gate),
computes that form, and compares the result with the module's output.
"""
import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe.plain_core import HOOKS

# Modules that do nothing in evaluation.
SILENT = (nn.Dropout, nn.Identity)
NORMS = ('LayerNorm', 'RMSNorm')
# Allowed difference, relative to the largest value: float32 sums in another
# order differ by rounding.
TOLERANCE = 1e-4
# Shapes without the channel axis, and magnitudes, of the tokens that a module
# is run on. A module that mixes tokens or images, clips values or depends on
# the shape gives another result than a MLP for at least one of them. A MLP has
# to accept the first two; the others are skipped if it refuses them.
TRIALS = (((1, 4), 1.), ((3, 5), 1000.), ((2, 3, 2), 1.), ((7, ), 1.))


@dataclass(frozen=True)
class Form:
    """The parts of a MLP, by the names of its submodules.

    Attributes:
        fc1: the first linear layer, D to H. A MLP with a gate (2002.05202)
            has one layer D to 2 H, or two layers D to H each, in the order of
            their calls.
        act: the activation; '' if SiLU is called as a function.
        gate: the half of the hidden values, 'first' or 'last', to which the
            activation applies before it multiplies the other half; ''
            without a gate.
        norm: the norm before the second linear layer; '' for none.
        fc2: the second linear layer, H to D.
        middle: activation, norm and dropouts before the second linear layer,
            in the order of their calls.
        after: dropouts after the second linear layer.
    """
    fc1: tuple[str, ...]
    act: str
    gate: str
    norm: str
    fc2: str
    middle: tuple[str, ...]
    after: tuple[str, ...]


def small_mlps(model: nn.Module) -> list[str]:
    """Names of modules that may be MLPs: the smallest ones that contain two or
    three linear layers and, except for norms, no other parameters."""
    found: list[str] = []
    for name, module in model.named_modules():
        linears = [child for child in module.modules()
                   if isinstance(child, nn.Linear)]
        own = {id(p) for child in module.modules()
               if isinstance(child, nn.Linear) or _is_norm(child)
               for p in child.parameters()}
        if len(linears) in (2, 3) and module not in linears and all(
                id(p) in own for p in module.parameters()):
            # Parents come before their children, so a smaller module replaces
            # the ones that contain it.
            found = [other for other in found if not (
                other == '' or name.startswith(f'{other}.'))] + [name]
    return found


@torch.no_grad()
def form_of(mlp: nn.Module) -> Form | None:
    """Return the form of a MLP, or None if the module is not a MLP of a form
    that experts can have.

    A copy of the module with random weights is run on a few made-up tokens.
    Its own weights would not do: many models initialise some with zeros, and
    with zeros any form fits. The module and the state of random generators do
    not change, and no hook is called.
    """
    try:
        # The MoE layer that replaces the module is called with tokens alone.
        if len(inspect.signature(mlp.forward).parameters) != 1:
            return None
        with torch.random.fork_rng(devices=[]):
            return _form_of(_twin(mlp))
    except Exception:
        # The module does not accept tokens, so it is not a MLP. Code of other
        # libraries may raise any exception.
        return None


def _twin(mlp: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 and evaluation mode, with random weights
    and without hooks."""
    on_meta = any(p.is_meta for p in mlp.parameters())
    twin = copy.deepcopy(mlp)
    twin = twin.to_empty(device='cpu') if on_meta else twin.cpu()
    twin = twin.float().eval()
    for part in twin.modules():
        for hooks in HOOKS:
            getattr(part, hooks).clear()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.normal_(0, parameter[0].numel()**-0.5, generator=generator)
    return twin


def _form_of(twin: nn.Module) -> Form | None:
    # Observe the calls of linear layers and of modules without children. A
    # linear layer with a parametrization has children, which are left out.
    linears = {child: name for name, child in twin.named_modules()
               if isinstance(child, nn.Linear)}
    inside = tuple(f'{name}.' for name in linears.values())
    names = {child: name for name, child in twin.named_modules()
             if child in linears or not (any(True for _ in child.children())
                                         or name.startswith(inside))}
    order: list[str] = []
    handles = [child.register_forward_hook(
        lambda child, *_: order.append(names[child])) for child in names]
    dim = next(iter(linears)).in_features
    out = twin(_tokens((1, 4), dim, 1.))
    for handle in handles:
        handle.remove()
    if not isinstance(out, Tensor):
        return None
    for form in _candidates(twin, tuple(order)):
        if _has_form(twin, form, dim):
            return form
    return None


def _has_form(twin: nn.Module, form: Form, dim: int) -> bool:
    """Return True if the module computes what the form computes."""
    for number, (shape, size) in enumerate(TRIALS):
        x = _tokens(shape, dim, size)
        try:
            outs = [twin(x)]
            # Setting ``training`` on the module alone leaves its dropouts
            # off. If the output now changes, its own code is random.
            twin.training = True
            outs.append(twin(x))
        except Exception:
            if number < 2:
                raise
            continue  # The module accepts only maps, or only sequences.
        finally:
            twin.training = False
        # Experts get a list of tokens in another order, without axes for
        # images or positions.
        rows = run(twin, form, x.flatten(0, -2).flip(0))
        wanted = rows.flip(0).view(*x.shape[:-1], -1)
        limit = TOLERANCE * wanted.abs().max().clamp_min(1.)
        if not all(wanted.shape == out.shape and
                   (wanted - out).abs().max() <= limit for out in outs):
            return False
    return True


def _tokens(shape: tuple[int, ...], dim: int, size: float) -> Tensor:
    """Made-up tokens, no two of them alike."""
    count = dim * math.prod(shape)
    return size * torch.linspace(-1, 3, count).mul(9).sin().view(*shape, dim)


def run(mlp: nn.Module, form: Form, x: Tensor) -> Tensor:
    """Compute the MLP of (..., D) tokens from its parts, without the dropouts
    after the second linear layer.

    Args:
        mlp: the MLP, or a MoE layer that has its submodules.
        form: the names of the parts.
        x: (..., D) tokens.
    """
    part = mlp.get_submodule
    hidden = [part(name)(x) for name in form.fc1]
    x = hidden[0]
    if form.gate:
        first, last = hidden if len(hidden) == 2 else x.chunk(2, -1)
        x = gated(first, last, part(form.act) if form.act else nn.SiLU(),
                  form.gate)
    for name in form.middle:
        if not form.gate or name != form.act:
            x = part(name)(x)
    return part(form.fc2)(x)


def gated(first: Tensor, last: Tensor, act: nn.Module, gate: str) -> Tensor:
    """(..., H), the activation of one half times the other half.

    Args:
        first: (..., H).
        last: (..., H).
        act: activation.
        gate: the half that it applies to, 'first' or 'last'.
    """
    # An activation that works in place would change the tensor of which both
    # halves are views.
    if any(getattr(part, 'inplace', False) for part in act.modules()):
        first, last = first.clone(), last.clone()
    return act(first) * last if gate == 'first' else first * act(last)


def _candidates(twin: nn.Module, called: tuple[str, ...]) -> Iterator[Form]:
    """The forms that a module may have which calls these submodules in this
    order."""
    parts = [twin.get_submodule(name) for name in called]
    linears = [i for i, part in enumerate(parts)
               if isinstance(part, nn.Linear)]
    if len(linears) not in (2, 3) or linears[0] != 0:
        return
    middle = [name for name, part in zip(called[:linears[-1]], parts)
              if not isinstance(part, nn.Linear)]
    after = called[linears[-1] + 1:]
    others: list[str] = []
    norms: list[str] = []
    for name in middle:
        part = twin.get_submodule(name)
        if not isinstance(part, SILENT):
            (norms if _is_norm(part) else others).append(name)
    if len(others) > 1 or len(norms) > 1 or not all(
            isinstance(twin.get_submodule(name), SILENT) for name in after):
        return
    fc1 = tuple(called[i] for i in linears[:-1])
    if not _fit(twin, fc1, called[linears[-1]]):
        return
    width: Any = parts[linears[-1]]
    packed = _hidden(twin, fc1) == 2 * width.in_features
    # A module without an activation is not a MLP. With a gate the activation
    # may be a function, which the observation of submodules does not see.
    if not packed and not others:
        return
    for gate in ('first', 'last') if packed else ('', ):
        yield Form(fc1, others[0] if others else '', gate,
                   norms[0] if norms else '', called[linears[-1]],
                   tuple(middle), after)


def _fit(twin: nn.Module, fc1: tuple[str, ...], fc2: str) -> bool:
    """Return True if the linear layers have the widths of a MLP, and the first
    ones a bias."""
    first: list[Any] = [twin.get_submodule(name) for name in fc1]
    last: Any = twin.get_submodule(fc2)
    sizes = {(one.in_features, one.out_features) for one in first}
    hidden = _hidden(twin, fc1)
    return (len(sizes) == 1 and first[0].in_features == last.out_features
            and hidden in (last.in_features, 2 * last.in_features)
            and (len(first) == 1 or hidden == 2 * last.in_features)
            and all(one.bias is not None for one in first))


def _hidden(twin: Any, fc1: tuple[str, ...]) -> int:
    """The number of outputs of the first linear layers together."""
    return sum(twin.get_submodule(name).out_features for name in fc1)


def _is_norm(module: nn.Module) -> bool:
    """Return True for a norm that treats each token by itself."""
    return any(kind in type(module).__name__ for kind in NORMS)
