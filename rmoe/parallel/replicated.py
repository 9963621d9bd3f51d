"""Gradients of the parameters that every process keeps whole."""
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ReplicatedGradients:
    """Takes the mean of gradients over all processes at the end of each
    backward pass, in one all-reduce.

    torch's ``fully_shard`` takes no parameter without a dimension, such as a
    router's temperature or the scale of a detection head, and computes all of
    a block in one type. Parameters that are small and have to stay in float32
    cost less if every process keeps them whole than if they are gathered.

    Args:
        parameters: parameters that need a gradient, all of one type.
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
        grads = [_gradient(one) for one in self.parameters
                 if one.requires_grad]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, mean in zip(grads, flat.split(
                [grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        # The loss of this process gave it no gradient, but the loss of another
        # process may have.
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
