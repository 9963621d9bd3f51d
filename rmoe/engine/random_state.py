"""Reads and restores the states of torch's random number generators, which
differ from rank to rank."""
import hashlib

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size

State = dict[str, torch.Tensor]


def random_state() -> State:
    """The state of this rank's default generators, of the CPU and the GPU."""
    state = {'cpu': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore(state: State) -> None:
    """Set this rank's default generators to a state."""
    torch.set_rng_state(state['cpu'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def states_of_all_ranks() -> list[State]:
    """The states of all ranks in their order. All ranks must call this, and
    all get the list."""
    return all_gather_object(random_state())


def own_state(states: list[State]) -> State:
    """The state that this rank resumes from.

    Args:
        states: the states of the ranks that wrote a checkpoint.

    Returns:
        The state that this rank saved, if the number of ranks has not
        changed. Otherwise the first rank gets the first state, and each other
        rank another one derived from it, so that no two ranks have the same.
    """
    rank = get_rank()
    if len(states) == get_world_size():
        return states[rank]
    return states[0] if rank == 0 else _derived(states[0], rank)


def separate_ranks() -> None:
    """Make ranks that were seeded alike draw different numbers from now on.

    Router noise, dropout and stochastic depth then differ between ranks, as
    they differ between the images of one rank. The first rank keeps its
    state.
    """
    if get_rank() > 0:
        restore(_derived(random_state(), get_rank()))


def _derived(state: State, rank: int) -> State:
    digest = hashlib.sha256(state['cpu'].cpu().numpy().tobytes() +
                            rank.to_bytes(8, 'little')).digest()
    seed = int.from_bytes(digest[:7], 'little')
    derived = {'cpu': torch.Generator().manual_seed(seed).get_state()}
    if torch.cuda.is_available():
        derived['cuda'] = torch.Generator('cuda').manual_seed(
            seed).get_state()
    return derived
