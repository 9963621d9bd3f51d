"""Conversion of E experts to another number of experts.

Every new expert is the mean of a group of old ones. There are several ways to
choose the groups. The router's weights are grouped in the same way. Axis
letters: E experts, P all weights of one expert.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

EXPERT_MISMATCH = ('raise', 'tile', 'slice', 'merge')


def choose_groups(how: str, experts_EP: Tensor, num_experts: int,
                  loads_E: Tensor | None = None) -> list[list[int]]:
    """Choose the old experts from which each new one is made.

    Args:
        how: 'tile' repeats the experts in order; 'slice' takes the first
            ones; 'merge' joins the two groups with the smallest average
            distance between their members until few enough groups are left;
            'prune' drops the experts with the lowest load.
        experts_EP: weights of each expert.
        num_experts: number of groups to make.
        loads_E: number of tokens that each expert took, for 'prune'.

    Returns:
        For each new expert, the indices of the old ones.

    Raises:
        ValueError: if there are fewer experts than asked for, and ``how`` is
            not 'tile', which alone can make more.
    """
    count = len(experts_EP)
    if how == 'tile':
        return [[i % count] for i in range(num_experts)]
    if num_experts > count:
        raise ValueError(f"{how!r} cannot make {num_experts} experts out of "
                         f"{count}: use 'tile', which can")
    if how == 'slice':
        return [[i] for i in range(num_experts)]
    if how == 'prune':
        assert loads_E is not None
        most = torch.sort(loads_E, descending=True, stable=True).indices
        return [[i] for i in sorted(most[:num_experts].tolist())]
    return _closest(experts_EP, num_experts)


def _closest(experts_EP: Tensor, num_groups: int) -> list[list[int]]:
    # The mean of all experts is subtracted, because the core that they share
    # would make rounding errors larger than their differences.
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
    """Take the means over groups of experts in a tensor that is stacked over
    experts.

    Args:
        tensor: a tensor that has E times some number of entries along one
            axis.
        shape: shape of the result, which has the number of groups times the
            same number of entries along that axis.
        groups: for each new expert, the indices of the old ones.
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
