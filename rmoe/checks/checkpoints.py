"""Checks that the checkpoints from which a config starts fit its model."""
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rmoe.backbones.base import MoEBackbone
from rmoe.checks.findings import explain
from rmoe.engine.head_check import unfilled
from rmoe.upcycling import (
    check_prefix,
    pretrained_weights,
    read_checkpoint,
    state_dict_of,
)

PRETRAINED = ('Pretrained', 'PretrainedInit')


def take_pretrained(config: Any, where: str = 'model'
                    ) -> list[tuple[str, Mapping]]:
    """Remove from the config of a model every init_cfg that loads a checkpoint.

    Args:
        config: the config, which is changed.
        where: its place in the whole config.

    Returns:
        For each of them the place of its module in the config, and the
        init_cfg.
    """
    found: list[tuple[str, Mapping]] = []
    if isinstance(config, MutableMapping):
        if config.get('pretrained'):  # the older option of mmseg
            config['pretrained'] = None
        init = config.get('init_cfg')
        inits = [init] if isinstance(init, Mapping) else list(init or ())
        rest = [item for item in inits if item.get('type') not in PRETRAINED]
        if len(rest) < len(inits):
            found += [(where, item) for item in inits if item not in rest]
            config['init_cfg'] = rest or None
        for key, value in config.items():
            found += take_pretrained(value, f'{where}.{key}')
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            found += take_pretrained(value, f'{where}.{i}')
    return found


def check_init(model: nn.Module, where: str, init: Mapping
               ) -> tuple[str, list[str]]:
    """Check the checkpoint from which a part of the model starts.

    Args:
        model: the whole model.
        where: the place of the part in the config, such as 'model.backbone'.
        init: the init_cfg of the part.

    Returns:
        A line for the report, and the problems.
    """
    path, prefix = init['checkpoint'], init.get('prefix')
    what = f'{where}.init_cfg {path}'
    if not _is_file(path):
        return f'{what}: not checked, because it would be downloaded', []
    try:
        # In the config, UpcycledBackbone has the backbone inside it. Once
        # built, it is that backbone itself.
        place = where.removeprefix('model').removeprefix('.').replace(
            'backbone.backbone', 'backbone')
        module: Any = model.get_submodule(place)
        content = read_checkpoint(path)
        state = state_dict_of(
            pretrained_weights(content, module, init)
            if isinstance(module, MoEBackbone) else content)
        if prefix:
            prefix = prefix if prefix.endswith('.') else f'{prefix}.'
            state = {key.removeprefix(prefix): value
                     for key, value in state.items()
                     if key.startswith(prefix)}
            if not state:
                raise ValueError(f'no key of {path} starts with {prefix!r}')
        if hasattr(module, 'architecture'):
            # A backbone of rmoe raises if the weights do not fit.
            module.load_state_dict(state, strict=False)
            return f'{what}: fits', []
        return _matches(what, module, state)
    except (FileNotFoundError, ValueError, AttributeError) as error:
        return what, [f'{what}: {explain(error)}']


def check_load_from(model: Any, path: str) -> tuple[str, list[str]]:
    """Check the checkpoint from which the whole model starts.

    Arguments and result are as in :func:`check_init`.
    """
    what = f'load_from {path}'
    if not _is_file(path):
        return f'{what}: not checked, because it would be downloaded', []
    try:
        content = read_checkpoint(path)
        state = state_dict_of(content)
        backbone: Any = getattr(model, 'backbone', None)
        if not hasattr(backbone, 'architecture'):
            return _matches(what, model, state)
        check_prefix(backbone, state, 'backbone.')
        backbone.load_state_dict({
            key.removeprefix('backbone.'): value for key, value in
            state.items() if key.startswith('backbone.')}, strict=False)
        fresh = unfilled(model, content)
        return (f'{what}: fits' + (f', except for {fresh}; these weights keep '
                                   'their initial values' if fresh else '')), []
    except (FileNotFoundError, ValueError) as error:
        return what, [f'{what}: {explain(error)}']


def _is_file(path: str) -> bool:
    return ':' not in str(path) or Path(path).exists()


def _shape(state: Mapping[str, Tensor], key: str) -> tuple | str:
    return tuple(state[key].shape) if key in state else 'missing'


def _matches(what: str, module: nn.Module, state: Mapping[str, Tensor]
             ) -> tuple[str, list[str]]:
    own = module.state_dict()
    same = sum(_shape(state, key) == tuple(value.shape)
               for key, value in own.items())
    line = f'{what}: {same} of {len(own)} tensors'
    if same:
        return line, []
    return line, [f'{what} has no tensor of {type(module).__name__}: it has '
                  f'{list(state)[:3]}, the model {list(own)[:3]}']
