"""Finds the weights outside the backbone that a checkpoint cannot fill.

A backbone checks its own loads (rmoe/upcycling/loading.py). A head with another
number of classes is normal when a model is fine-tuned, but a mistake when it
is evaluated. So the caller decides whether to warn or to raise.
"""
from collections.abc import Mapping
from typing import Any

from torch import nn

from rmoe.engine.roles import role_of
from rmoe.upcycling import state_dict_of

SHOWN = 4


def unfilled(model: nn.Module, checkpoint: Mapping[str, Any]) -> str:
    """Name the tensors outside the backbone that a checkpoint does not have,
    or has in another shape.

    Args:
        model: a segmentor, detector or classifier without a wrapper.
        checkpoint: the content of a file.

    Returns:
        Their names and both shapes, and the classes that the checkpoint was
        trained for; empty if there are no such tensors.

    Raises:
        ValueError: if there are no weights in the file.
    """
    state = state_dict_of(dict(checkpoint))
    # Old checkpoints lack num_batches_tracked, the counter of batch norms,
    # and batch norms work without it.
    head = {name: tensor for name, tensor in model.state_dict().items()
            if role_of(name) == 'head' and
            not name.endswith('num_batches_tracked')}
    found = [
        f'{name} {tuple(tensor.shape)} (in the checkpoint: ' +
        (f'{tuple(state[name].shape)})' if name in state else 'missing)')
        for name, tensor in head.items()
        if name not in state or state[name].shape != tensor.shape]
    if not found:
        return ''
    shown = ', '.join(found[:SHOWN])
    if len(found) > SHOWN:
        shown += f' and {len(found) - SHOWN} more'
    return (f'{len(found)} of {len(head)} tensors outside the backbone: '
            f'{shown}{_classes(checkpoint)}')


def _classes(checkpoint: Mapping[str, Any]) -> str:
    meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    names = meta.get('classes')
    if not names:
        return ''
    return (f'. The checkpoint is for {len(names)} classes '
            f'({", ".join(map(str, names[:3]))}, ...)')
