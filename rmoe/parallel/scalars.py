"""Parameters that are one number each, which cannot be sharded."""
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ScalarGradients:
    """Keeps a copy of scalar parameters in every process, and takes the mean
    of their gradients over all processes at the end of each backward pass.

    torch's ``fully_shard`` refuses them: a router's temperature, or the scale
    of a detection head.

    Args:
        parameters: 0-dimensional ones that need a gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._queued = False
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._queue)

    def _queue(self, parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(
                self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = False
        # What no loss of this process reached counts as zero.
        trained = [one for one in self.parameters if one.requires_grad]
        flat = torch.stack([one.new_zeros(()) if one.grad is None else one.grad
                            for one in trained])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for one, gradient in zip(trained, flat):
            one.grad = gradient.clone()
