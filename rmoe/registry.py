"""Children of mmengine's registries, so that a config under any default
scope can name ``type='rmoe.SwinMoE'`` without ``custom_imports``.

Only mmengine is imported here: an error while mmengine imports this file
would surface as "not in the registry" and hide its cause. The modules whose
classes register themselves are named in ``locations``; mmengine imports them
when a type is first looked up.
"""
from collections.abc import Mapping

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS,
)
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='rmoe',
    locations=['rmoe.moe.registered', 'rmoe.backbones', 'rmoe.classification'])
MODEL_WRAPPERS = Registry(
    'model_wrapper', parent=MMENGINE_MODEL_WRAPPERS, scope='rmoe',
    locations=['rmoe.parallel'])
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='rmoe',
    locations=['rmoe.engine', 'rmoe.checks', 'rmoe.classification'])
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', parent=MMENGINE_WRAPPERS, scope='rmoe',
    locations=['rmoe.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_CONSTRUCTORS,
    scope='rmoe',
    locations=['rmoe.engine'])
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='rmoe',
    locations=['rmoe.classification'])
METRICS = Registry(
    'metric', parent=MMENGINE_METRICS, scope='rmoe',
    locations=['rmoe.classification'])


def type_name(config: Mapping) -> str:
    """Class name in ``config['type']``, without the registry scope.

    The type is a string or, in new-style configs, a class. The name is empty
    if the config has no type.
    """
    kind = config.get('type') or ''
    return kind.split('.')[-1] if isinstance(kind, str) else kind.__name__
