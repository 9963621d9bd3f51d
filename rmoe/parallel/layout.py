"""The layout of a tensor over processes, and the conversion between DTensors
and whole tensors.

Functions import torch's DTensor only when they meet one, so that this module
can be imported with torch 2.1, which has none.
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Says which part of a DTensor each process has.

    Attributes:
        mesh: torch's DeviceMesh.
        placements: Shard or Replicate for each dimension of the mesh.
    """
    mesh: Any
    placements: tuple[Any, ...]

    def cut(self, whole: Tensor) -> Tensor:
        """Make a DTensor of a whole tensor that every rank has.

        The ranks do not communicate, and the DTensor shares no memory with
        the whole tensor.

        Args:
            whole: a plain tensor of the global shape.

        Returns:
            A DTensor of that shape.
        """
        part = self._part(whole)
        local = torch.empty(part.shape, dtype=whole.dtype,
                            device=self.mesh.device_type)
        return self._around(local.copy_(part), whole.shape)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A DTensor of a global shape, with uninitialised values."""
        part = self._part(torch.empty((), dtype=dtype).expand(shape))
        return self._around(torch.empty(part.shape, dtype=dtype,
                                        device=self.mesh.device_type), shape)

    def _part(self, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import Replicate, Shard
        part = whole
        for dimension, placement in enumerate(self.placements):
            if isinstance(placement, Replicate):
                continue
            # Subclasses of Shard divide along the dimensions of the mesh in
            # another order.
            assert type(placement) is Shard, placement
            # As DTensor does, the tensor is divided along the first dimension
            # of the mesh first. The last ranks may get a shorter part, or an
            # empty one.
            parts = part.chunk(self.mesh.size(dimension), placement.dim)
            mine = self.mesh.get_local_rank(dimension)
            part = parts[mine] if mine < len(parts) else part.narrow(
                placement.dim, 0, 0)
        return part

    def _around(self, local: Tensor, shape: torch.Size) -> Tensor:
        from torch.distributed.tensor import DTensor
        stride = torch.empty(shape, device='meta').stride()
        return DTensor.from_local(local, self.mesh, self.placements,
                                  run_check=False, shape=shape, stride=stride)


def layout_of(value: Any) -> Layout | None:
    """The layout of a DTensor; None for anything else."""
    mesh = getattr(value, 'device_mesh', None)
    if mesh is None or not isinstance(value, Tensor):
        return None
    return Layout(mesh, tuple(value.placements))  # type: ignore[attr-defined]


def is_laid_out(model: nn.Module) -> bool:
    """Whether any parameter of a model is a DTensor."""
    return any(layout_of(value) for value in model.parameters())


def whole(value: Any) -> Tensor:
    """Gather the global tensor of a DTensor on every rank; all must call this.

    This rank's part may have been copied to the CPU. It is copied back to the
    device on which its mesh communicates.

    Args:
        value: a DTensor.
    """
    layout = layout_of(value)
    assert layout is not None
    return layout._around(value.to_local().to(layout.mesh.device_type),
                          value.shape).full_tensor()  # type: ignore
