"""Routers that group images, and batches that they will not divide.

The last batch of an epoch may be short. A router that groups n images meets
it after hours, or on one rank while the others wait.
"""
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object
from torch import nn
from torch.utils.data import DataLoader

from rmoe.moe import moe_layers


def check_groups(model: nn.Module, option: str, split: str,
                 loader: DataLoader) -> None:
    """Check the groups of all routers against the batches of all ranks.

    Args:
        model: not wrapped.
        option: of the routers, 'group' in training and 'eval_group' else.
        split: 'train', 'val' or 'test'.
        loader: what the model will be fed from, on this rank.

    Raises:
        ValueError: on all ranks, if on one of them a batch will not consist
            of whole groups.
    """
    problems = []
    for key, layer in moe_layers(model).items():
        group = getattr(layer.router, option)
        problem = isinstance(group, int) and _problem(group, split, loader)
        if problem:
            problems.append(f'{option}={group} of the router of '
                            f'{layer.name or key} {problem}')
    # Ranks may have different numbers of images; all stop, or none.
    of_ranks = all_gather_object(problems[:1])
    for rank, found in enumerate(of_ranks):
        for problem in found:
            raise ValueError(
                f'rank {rank}: {problem}' if len(of_ranks) > 1 else problem)


def _problem(group: int, split: str, loader: DataLoader) -> str:
    """What is wrong with groups of that size; empty if nothing is."""
    batches: Any = loader.batch_sampler
    size = getattr(batches, 'batch_size', None)
    if size is None:
        return ''
    if size % group:
        return (f'does not divide {split}_dataloader.batch_size={size}, the '
                f'images of one process: set one to a divisor of the other, '
                "or the group to 'image' or 'batch'")
    images = _images(batches)
    if images is None or batches.drop_last or images % size % group == 0:
        return ''
    return (f'does not divide the last batch of {split}_dataloader: '
            f'{images} images in batches of batch_size={size} leave '
            f'{images % size}. ' + (
                'Set drop_last=True in train_dataloader' if split == 'train'
                else f'An evaluation drops nothing: choose a batch_size that '
                f'leaves none or a multiple of {group}, or the group '
                "'image'"))


def _images(batches: Any) -> int | None:
    """Images of one pass over the data on this rank; None if it never ends
    or nobody knows."""
    sampler: Any = getattr(batches, 'sampler', None)
    if isinstance(sampler, InfiniteSampler) or not hasattr(
            sampler, '__len__'):
        return None
    return len(sampler)
