"""Chooses one set of weights of a file: that of the teacher or of the student,
averaged over training or not. Names that wrappers have added are removed.
"""
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# The keys under which files of known projects have weights. Of several in one
# file the first is taken. Weights averaged over training evaluate better than
# the last ones, and so does the teacher of self-distillation, which is such an
# average. If mmengine averages weights, the average is under 'state_dict', and
# 'ema_state_dict' has the weights that are not averaged.
SETS = (
    'state_dict_ema', 'model_ema', 'ema_model', 'ema', 'teacher',
    'target_encoder', 'state_dict', 'model', 'module', 'encoder', 'student',
    'ema_state_dict',
)
# Keys in torch's and mmengine's averaged models that hold no weights, but the
# number of models that were averaged.
COUNTERS = ('n_averaged', 'steps')
# Keys of dicts that have tensors in them, but no weights.
STATES = re.compile(r'(optim|sched|scaler|amp|loss|rng|rank_)')
# Names that torch.compile, FSDP, activation checkpointing and Lightning put
# anywhere into the name of a parameter. DDP's 'module.' is an ordinary word, so
# it is removed only at the beginning of a name.
WRAPPERS = re.compile(
    r'(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|'
    r'_checkpoint_wrapped_module|_forward_module)\.')


@dataclass(frozen=True)
class WeightSet:
    """One of the sets of weights in a file.

    Attributes:
        name: the key of the set in the file, such as 'teacher', or
            'model.teacher' if it is in a dict inside of another; '' if the
            weights are at the top of the file.
        state: the weights, without the names of wrappers.
        others: names of the other sets in the file.
        rest: keys of everything else in the file.
    """
    name: str
    state: dict[str, Tensor]
    others: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()


def choose_set(content: Mapping[str, Any], weights: str | None = None
               ) -> WeightSet:
    """Choose one set of weights in the content of a checkpoint.

    Args:
        content: the result of :func:`read_checkpoint`.
        weights: the name of a set; None takes the one that evaluates best
            (:data:`SETS`).

    Raises:
        ValueError: if there are no weights, or none of that name, or if they
            are empty, as in files of sharded training.
    """
    found = _sets(content)
    if not found:
        raise ValueError(
            'the checkpoint holds no weights: give one with a state dict. '
            'Its top-level keys are '
            f'{[str(key)[:40] for key in list(content)[:8]]}')
    if weights is None:
        name = next(iter(found))
        if name and name.split('.')[0] not in SETS and len(found) > 1:
            raise ValueError(
                f'the checkpoint holds several sets of weights, {list(found)}'
                f': choose one, weights={name!r}')
    else:
        named = [name for name in found
                 if name == weights or name.endswith(f'.{weights}')]
        if not named:
            raise ValueError(
                f'weights={weights!r} are not in the checkpoint: choose one '
                f'of {[name for name in found if name]}')
        name = named[0]
    state = {str(key): value for key, value in found[name].items()
             if isinstance(value, Tensor)
             and not (key in COUNTERS and value.dim() == 0)}
    _check_content(state)
    top = {each.split('.')[0] for each in found}
    return WeightSet(
        name, without_wrappers(state),
        tuple(each for each in found if each and each != name),
        tuple(str(key) for key, value in content.items() if key not in top
              and not (name == '' and isinstance(value, Tensor))))


def state_dict_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that :func:`choose_set` takes by default.

    Raises:
        ValueError: if there are no tensors.
    """
    return choose_set(content).state


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by the names that they have in a model without wrappers (DDP,
    torch.compile, FSDP, activation checkpointing), in any nesting.

    If two names would become the same, all names stay as they are.
    """
    names = {key: _without_wrapper(key) for key in state}
    if len(set(names.values())) < len(names):
        return dict(state)
    return {names[key]: value for key, value in state.items()}


def _without_wrapper(key: str) -> str:
    key = WRAPPERS.sub('', key)
    while key.startswith('module.'):
        key = key.removeprefix('module.')
    return key


def _sets(content: Mapping[str, Any], depth: int = 0
          ) -> dict[str, Mapping[str, Any]]:
    """All sets of weights by name, the preferred ones first. Only dicts at the
    top and dicts inside of these are searched."""
    found: dict[str, Mapping[str, Any]] = {}
    if depth == 0 or not _has_tensors(content):
        unknown = sorted(str(key) for key in content if key not in SETS
                         and not STATES.search(str(key).lower()))
        for name in (*SETS, *unknown):
            value = content.get(name)
            if not isinstance(value, Mapping):
                continue
            if _has_tensors(value) and (name in SETS or _looks_like_model(
                    value)):
                found[name] = value
            elif depth == 0 and name in SETS:
                found.update({f'{name}.{inner}': state for inner, state in
                              _sets(value, 1).items()})
    # If there are tensors at the top, a dict of an unknown name is no set.
    if depth == 0 and _has_tensors(content):
        found = {name: state for name, state in found.items()
                 if name.split('.')[0] in SETS}
        found[''] = content
    return found


def _has_tensors(value: Mapping[str, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value.values())


def _looks_like_model(state: Mapping[str, Any]) -> bool:
    return sum(isinstance(item, Tensor) and item.dim() > 1
               for item in state.values()) > 3


def _check_content(state: Mapping[str, Tensor]) -> None:
    empty = [key for key, value in state.items() if value.numel() == 0
             and key.endswith(('weight', 'bias'))]
    if empty and len(empty) > len(state) // 2:
        raise ValueError(
            f'{len(empty)} of the {len(state)} weights are empty; the first '
            f'is {empty[0]}. DeepSpeed ZeRO-3 keeps them in other files. The '
            'script zero_to_fp32.py beside them makes one file: python '
            'zero_to_fp32.py . OUT')
