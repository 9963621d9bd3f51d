"""One gradient norm over parameters of several layouts."""
import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float,
                    norm_type: float = 2.0, error_if_nonfinite: bool = False
                    ) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for parameters that are DTensors.

    torch's own takes DTensors of one mesh; experts that are divided lie on
    another mesh than the rest.

    Args:
        parameters: DTensors, of whose gradients each process has its part, or
            tensors whose gradients are the same in all.
        max_norm: of all gradients together.
        norm_type: p of the norm, or inf.
        error_if_nonfinite: whether a norm of nan or inf is an error.

    Returns:
        The norm before clipping, the same in every process.

    Raises:
        RuntimeError: for such a norm, if asked for.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    grads = [parameter.grad for parameter in parameters
             if parameter.grad is not None]
    if not grads:
        return torch.tensor(0.)
    total = _total_norm(grads, float(norm_type))
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f'the norm of order {norm_type} of the gradients is {total}: '
            'nothing was clipped')
    factor = (max_norm / (total + 1e-6)).clamp_max(1.)
    torch._foreach_mul_([_local(grad) for grad in grads], factor)
    return total


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _total_norm(grads: list[Tensor], order: float) -> Tensor:
    """Each element counts once, however often it is kept."""
    layouts = defaultdict(list)
    for grad in grads:
        # A part is in one process of such a dimension.
        sharded = tuple(not place.is_replicate() for place in grad.placements
                        ) if isinstance(grad, DTensor) else ()
        layouts[getattr(grad, 'device_mesh', None), sharded].append(
            _local(grad))
    largest = math.isinf(order)
    operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    parts = []
    for (mesh, sharded), local in layouts.items():
        # The last processes have nothing of a short parameter.
        norms = torch._foreach_norm([one for one in local if one.numel()],
                                    order)
        whole = torch.stack([*norms, local[0].new_zeros(())])
        part = whole.max() if largest else (whole**order).sum()
        for dimension, divided in enumerate(sharded):
            if mesh is not None and divided and mesh.size(dimension) > 1:
                dist.all_reduce(part, operation, mesh.get_group(dimension))
        parts.append(part)
    total = torch.stack(parts)
    return total.max() if largest else total.sum()**(1 / order)
