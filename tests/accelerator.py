"""An accelerator's path on the CPU, and what must not happen there."""
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmoe.moe import host

# What reads a tensor's values to go on, or makes a shape of them.
WAITING = {
    '_local_scalar_dense', 'nonzero', 'nonzero_numpy', 'bincount',
    'masked_select', '_unique2', 'unique_dim', 'unique_consecutive',
    'is_nonzero', 'equal', 'item', 'repeat_interleave'}
# What launches nothing.
FREE = {
    'empty', 'empty_like', 'empty_strided', 'new_empty',
    'new_empty_strided', 'detach', 'alias', '_unsafe_view', 'lift_fresh'}


@contextmanager
def accelerated(on: bool = True) -> Iterator[None]:
    """Run what an accelerator would run."""
    before, host.force_accelerator = host.force_accelerator, on
    try:
        yield
    finally:
        host.force_accelerator = before


class NoWaiting(TorchDispatchMode):
    """Fails on any operator that would wait for an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith('index') and len(args) > 1 and (
            isinstance(args[1], (list, tuple))) else ()
        by_mask = any(index is not None and index.dtype == torch.bool
                      for index in indices)
        if name in WAITING or by_mask:
            raise AssertionError(f'{func} waits for the accelerator')
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators; views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def results(layer, x, valid=None) -> dict[str, torch.Tensor]:
    """Output, losses, counters and every gradient of one training step."""
    torch.manual_seed(1)  # of the router's noise
    x = x.clone().requires_grad_()
    layer.losses = []
    layer.zero_grad()
    for counter in (layer.demand_E, layer.kept_E, layer.token_counts):
        counter.zero_()
    y = layer(x, valid=valid)
    losses = {f'loss {i} {name}': loss
              for i, found in enumerate(layer.losses)
              for name, loss in found.items()}
    if valid is not None:
        y = y.masked_fill(~valid[..., None], 0)
    (y.square().mean() + sum(losses.values())).backward()
    gradients = {f'gradient of {name}': parameter.grad.clone()
                 for name, parameter in layer.named_parameters()
                 if parameter.grad is not None}
    return {'y': y.detach(), 'x': x.grad, 'demand': layer.demand_E.clone(),
            'kept': layer.kept_E.clone(), 'tokens': layer.token_counts.clone(),
            **losses, **gradients}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6,
                                   msg=lambda text, name=name:
                                   f'{name}: {text}')
