"""Checks before training that routers can divide each batch into groups.

A router may route groups of n images together. Then every batch must consist
of whole groups, but the last batch of an epoch may be short. Without this
check the router would raise only after hours of training, or on one rank while
the others wait for it.
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
        model: the model without a wrapper.
        option: the option of the routers that holds for this data: 'group' in
            training and 'eval_group' otherwise.
        split: 'train', 'val' or 'test'.
        loader: the dataloader of this rank.

    Raises:
        ValueError: on all ranks, if on any of them a batch will not consist
            of whole groups.
    """
    problems = []
    for key, layer in moe_layers(model).items():
        group = getattr(layer.router, option)
        problem = isinstance(group, int) and _problem(group, split, loader)
        if problem:
            problems.append(f'{option}={group} of the router of '
                            f'{layer.name or key} {problem}')
    # Ranks may have different numbers of images. All ranks have to raise if
    # one does, because a rank that stops alone lets the others wait.
    of_ranks = all_gather_object(problems[:1])
    for rank, found in enumerate(of_ranks):
        for problem in found:
            raise ValueError(
                f'rank {rank}: {problem}' if len(of_ranks) > 1 else problem)


def _problem(group: int, split: str, loader: DataLoader) -> str:
    """Say why groups of that size do not fit; empty if they do."""
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
    """The number of images in one pass over the data on this rank; None if
    the pass never ends or the sampler has no length."""
    sampler: Any = getattr(batches, 'sampler', None)
    if isinstance(sampler, InfiniteSampler) or not hasattr(
            sampler, '__len__'):
        return None
    return len(sampler)
