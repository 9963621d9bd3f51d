"""Gradient clipping for parameters with different layouts over processes."""
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
    """Clip gradients as torch.nn.utils.clip_grad_norm_ does, also where the
    parameters are DTensors of several meshes.

    torch's function takes only DTensors of one mesh, but experts that are
    divided among processes lie on another mesh than the other parameters.

    Args:
        parameters: DTensors, for which each process has a part of the
            gradient, or plain tensors, whose gradients are the same in all
            processes.
        max_norm: largest norm of all gradients together.
        norm_type: p of the norm, or inf.
        error_if_nonfinite: whether a norm of nan or inf is an error.

    Returns:
        The norm before clipping, the same in every process.

    Raises:
        RuntimeError: if the norm is nan or inf and ``error_if_nonfinite`` is
            True.
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
            f'the norm of order {norm_type} of the gradients is {total}, so '
            'they were not clipped. Look for nan or inf in the losses, or set '
            'error_if_nonfinite=False')
    factor = (max_norm / (total + 1e-6)).clamp_max(1.)
    torch._foreach_mul_([_local(grad) for grad in grads], factor)
    return total


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _total_norm(grads: list[Tensor], order: float) -> Tensor:
    """The norm over all gradients, in which each element counts once, however
    many processes hold a copy of it."""
    layouts = defaultdict(list)
    for grad in grads:
        # True for the dimensions of the mesh along which each process has
        # another part of the tensor.
        sharded = tuple(not place.is_replicate() for place in grad.placements
                        ) if isinstance(grad, DTensor) else ()
        layouts[getattr(grad, 'device_mesh', None), sharded].append(
            _local(grad))
    largest = math.isinf(order)
    operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    parts = []
    for (mesh, sharded), local in layouts.items():
        # The last processes have an empty part of a short parameter, and may
        # have nothing else of this layout.
        filled = [one for one in local if one.numel()]
        norms = torch._foreach_norm(filled, order) if filled else []
        whole = torch.stack([*norms, local[0].new_zeros(())])
        part = whole.max() if largest else (whole**order).sum()
        for dimension, divided in enumerate(sharded):
            if mesh is not None and divided and mesh.size(dimension) > 1:
                dist.all_reduce(part, operation, mesh.get_group(dimension))
        parts.append(part)
    total = torch.stack(parts)
    return total.max() if largest else total.sum()**(1 / order)
