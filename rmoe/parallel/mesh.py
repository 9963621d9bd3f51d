"""The arrangement of the processes of a run in meshes, for parameters that are
divided among them.

There are W processes, of which S share one copy of the parameters and N one
set of experts. Processes with neighbouring ranks are put together first,
because they run on the same machine.
"""
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Names of the dimensions of a mesh that FSDP works on: the first runs over the
# copies of the parameters, the second over the processes that share one copy.
COPIES = ('replicate', 'shard')


@dataclass(frozen=True)
class Meshes:
    """Meshes of processes.

    Attributes:
        dense: (W / S, S), for all parameters but those of experts; (S,) if
            there is only one copy of them.
        experts: for the copies of each expert: (W / S, S / N), or (W / N, 1)
            where every process has all other parameters; one-dimensional if
            there is only one copy.
        expert: (N,), the processes among which experts are divided; None if
            experts are not divided.
    """
    dense: DeviceMesh
    experts: DeviceMesh
    expert: DeviceMesh | None


def lay_out(device: str, world_size: int, shard: int | None,
            expert_parallel: int) -> Meshes:
    """Arrange all processes in meshes. This is a collective call.

    Args:
        device: 'cpu' or 'cuda'.
        world_size: W.
        shard: S; None for W.
        expert_parallel: N; 1 if experts are not divided.

    Raises:
        ValueError: if the numbers do not divide each other.
    """
    size = world_size if shard is None else shard
    if size < 1 or world_size % size:
        raise ValueError(
            f'shard={shard} does not divide the {world_size} processes of '
            'this run: set it to a divisor, or leave it out to shard over all')
    if expert_parallel < 1 or world_size % expert_parallel:
        raise ValueError(
            f'expert_parallel={expert_parallel} does not divide the '
            f'{world_size} processes of this run: set it to a divisor, or '
            'start another number of processes')
    if size > 1 and size % expert_parallel:
        raise ValueError(
            f'expert_parallel={expert_parallel} does not divide shard={size}:'
            ' experts are divided inside one copy of the parameters. Set '
            'shard to a multiple of it, or to 1 for a copy in each process')
    dense = _copies(init_device_mesh(device, (world_size // size, size),
                                     mesh_dim_names=COPIES))
    if expert_parallel == 1:
        return Meshes(dense, dense, None)
    inside = max(size // expert_parallel, 1)
    root = init_device_mesh(
        device, (world_size // (inside * expert_parallel), inside,
                 expert_parallel), mesh_dim_names=(*COPIES, 'expert'))
    return Meshes(dense, _copies(root), root['expert'])


def _copies(mesh: DeviceMesh) -> DeviceMesh:
    """The part of a mesh that FSDP works on. If there is a single copy of the
    parameters, it has no dimension over copies, as nothing is summed over
    them."""
    return mesh[COPIES if mesh.size(0) > 1 else 'shard']
