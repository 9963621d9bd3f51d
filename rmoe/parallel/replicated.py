"""Parameters that every process keeps whole."""
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ReplicatedGradients:
    """Takes the mean of gradients over all processes at the end of each
    backward pass, in one all-reduce.

    torch's ``fully_shard`` takes no parameter without a dimension, such as a
    router's temperature or the scale of a detection head, and computes all of
    a block in one type. What is small and has to stay in float32 costs less
    whole than gathered.

    Args:
        parameters: that need a gradient, of one type.
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
        trained = [one for one in self.parameters if one.requires_grad]
        for one in trained:
            if one.grad is None:
                # No loss of this process reached it; one of another may have.
                one.grad = torch.zeros_like(one)
        flat = torch.cat([one.grad.flatten() for one in trained])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for one, gradient in zip(trained, flat.split(
                [one.numel() for one in trained])):
            one.grad.copy_(gradient.view_as(one))
