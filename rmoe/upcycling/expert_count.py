"""E experts into another number of experts.

Every new expert is the mean of a group of old ones; what differs between the
ways is who is in a group. The router's weights follow. Axis letters: E
experts, P all weights of one expert.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

EXPERT_MISMATCH = ('raise', 'tile', 'slice', 'merge')


def choose_groups(how: str, experts_EP: Tensor, num_experts: int,
                  loads_E: Tensor | None = None) -> list[list[int]]:
    """Which old experts make each new one.

    Args:
        how: 'tile' repeats the experts in order; 'slice' takes the first;
            'merge' joins the two groups that lie closest (average distance
            of their members) until few enough are left; 'prune' drops those
            with the least load.
        experts_EP: weights of each expert.
        num_experts: groups to make.
        loads_E: tokens each expert took, for 'prune'.

    Raises:
        ValueError: if more experts are asked for than there are, which only
            'tile' can make.
    """
    count = len(experts_EP)
    if how == 'tile':
        return [[i % count] for i in range(num_experts)]
    if num_experts > count:
        raise ValueError(f"{how!r} cannot make {num_experts} experts out of "
                         f"{count}; 'tile' can")
    if how == 'slice':
        return [[i] for i in range(num_experts)]
    if how == 'prune':
        assert loads_E is not None
        most = torch.sort(loads_E, descending=True, stable=True).indices
        return [[i] for i in sorted(most[:num_experts].tolist())]
    return _closest(experts_EP, num_experts)


def _closest(experts_EP: Tensor, num_groups: int) -> list[list[int]]:
    # Against their mean: the core would drown the differences in rounding.
    experts_EP = experts_EP.double() - experts_EP.double().mean(0)
    distance = torch.cdist(experts_EP[None], experts_EP[None])[0]
    groups = [[i] for i in range(len(experts_EP))]
    while len(groups) > num_groups:
        pairs = [(float(distance[a][:, b].mean()), i, j)
                 for i, a in enumerate(groups)
                 for j, b in enumerate(groups) if i < j]
        _, i, j = min(pairs)
        groups[i] += groups.pop(j)
    return groups


def regroup(tensor: Tensor, shape: Sequence[int],
            groups: Sequence[Sequence[int]], num_experts: int) -> Tensor:
    """A tensor that is stacked over experts, after their regrouping.

    Args:
        tensor: with E times some number along one axis.
        shape: the result's, with the number of groups times the same along
            that axis.
        groups: old experts of each new one.
        num_experts: E.

    Raises:
        ValueError: if the shapes differ in anything but the expert count.
    """
    axes = [axis for axis, (old, new) in enumerate(zip(tensor.shape, shape))
            if old != new]
    if tensor.dim() != len(shape) or len(axes) != 1 or (
            tensor.shape[axes[0]] * len(groups)
            != shape[axes[0]] * num_experts):
        raise ValueError(f'{tuple(tensor.shape)} cannot become '
                         f'{tuple(shape)} by changing the number of experts '
                         f'from {num_experts} to {len(groups)}')
    axis = axes[0]
    stacked = tensor.unflatten(axis, (num_experts, -1)).movedim(axis, 0)
    joined = torch.stack([
        stacked[group].float().mean(0).to(tensor.dtype)
        if len(group) > 1 else stacked[group[0]] for group in groups])
    return joined.movedim(0, axis).flatten(axis, axis + 1)
