"""How the processes of a run are arranged.

W processes, of which S share one copy of the parameters and N one set of
experts. Neighbours in rank come together first, as they sit in one machine.
"""
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# The dimensions of a mesh that FSDP works on: what is between copies, and what
# is inside one.
COPIES = ('replicate', 'shard')


@dataclass(frozen=True)
class Meshes:
    """Meshes of processes.

    Attributes:
        dense: (W / S, S), copies of everything but experts; (S,) for one.
        experts: copies of each expert: (W / S, S / N), or (W / N, 1) where
            every process has all other parameters; one-dimensional for one.
        expert: (N,), the processes between which experts are divided; None
            where they are not.
    """
    dense: DeviceMesh
    experts: DeviceMesh
    expert: DeviceMesh | None


def lay_out(device: str, world_size: int, shard: int | None,
            expert_parallel: int) -> Meshes:
    """Arrange all processes; a collective call.

    Args:
        device: 'cpu' or 'cuda'.
        world_size: W.
        shard: S; None for W.
        expert_parallel: N; 1 for experts that are not divided.

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
    """The dimensions that FSDP works on: of a single copy there is nothing to
    sum over copies."""
    return mesh[COPIES if mesh.size(0) > 1 else 'shard']
