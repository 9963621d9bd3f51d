"""Random states of torch's generators: one's own on every rank."""
import hashlib

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size

State = dict[str, torch.Tensor]


def random_state() -> State:
    """The state of this rank's default generators."""
    state = {'cpu': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore(state: State) -> None:
    """Go on from a state."""
    torch.set_rng_state(state['cpu'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def states_of_all_ranks() -> list[State]:
    """In the order of the ranks, on every rank; all must call this."""
    return all_gather_object(random_state())


def own_state(states: list[State]) -> State:
    """The state that this rank resumes from.

    Args:
        states: those of the ranks that wrote a checkpoint.

    Returns:
        Its own, if there are as many ranks now. Otherwise the first rank goes
        on from the first, and every other from one derived of that: no two
        are equal.
    """
    rank = get_rank()
    if len(states) == get_world_size():
        return states[rank]
    return states[0] if rank == 0 else _derived(states[0], rank)


def separate_ranks() -> None:
    """Let ranks that were seeded alike draw different numbers from now on.

    Router noise, dropout and stochastic depth are then another on each rank,
    as they are for each image on one. The first rank keeps its state.
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
