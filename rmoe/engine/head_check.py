"""What a checkpoint cannot fill outside the backbone.

A backbone checks its own loads (rmoe/upcycling/loading.py). A head of another
class count is an everyday thing in fine-tuning, and a mistake in evaluation.
"""
from collections.abc import Mapping
from typing import Any

from torch import nn

from rmoe.engine.roles import role_of
from rmoe.upcycling import state_dict_of

SHOWN = 4


def unfilled(model: nn.Module, checkpoint: Mapping[str, Any]) -> str:
    """Tensors outside the backbone that a checkpoint lacks or has in another
    shape.

    Args:
        model: a segmentor, detector or classifier, not wrapped.
        checkpoint: a file's content.

    Returns:
        Their names and both shapes, and the classes the file was made for;
        empty if there are none.

    Raises:
        ValueError: if there are no weights in the file.
    """
    state = state_dict_of(dict(checkpoint))
    # Old batch norms have no such counter, and need none.
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
