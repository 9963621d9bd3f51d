"""Finds the weights of a backbone in a file that may hold more: a pre-training
run with a teacher, a detector, a wrapped model."""
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmoe.upcycling.formats import WeightSet, choose_set
from rmoe.upcycling.keymaps import Architecture

# Words in the prefixes of weights. Weights under a prefix with a word of
# PREFERRED are taken first, because averages over training evaluate better than
# the last weights. Those with a word of SECOND are taken last, because MoCo v3
# and MoBY evaluate the encoder that was trained, and not its momentum copy.
PREFERRED = {'teacher', 'ema', 'model_ema', 'ema_model', 'target_encoder'}
SECOND = {'student', 'momentum_encoder', 'encoder_k', 'target_generator',
          'target_network', 'momentum'}


@dataclass(frozen=True)
class Choice:
    """The weights that were chosen in a file.

    Attributes:
        state: all weights of the set that was chosen.
        prefix: first part of the names of the backbone's weights in the set.
        line: a sentence for the log that says what was taken and what was
            left out; empty if the file has nothing but the backbone.
        pretraining: whether the weights beside the backbone belong to a
            pre-training task, so that a segmentor or detector has no use for
            them.
    """
    state: dict[str, Tensor]
    prefix: str
    line: str
    pretraining: bool

    @property
    def backbone(self) -> dict[str, Tensor]:
        """The backbone's weights, without the prefix."""
        return {key[len(self.prefix):]: value
                for key, value in self.state.items()
                if key.startswith(self.prefix)}


def choose_weights(content: Mapping[str, Any], architecture: Architecture,
                   weights: str | None = None) -> Choice:
    """Choose the weights in a file that a backbone can load.

    Args:
        content: the result of ``read_checkpoint``.
        architecture: the architecture of the backbone.
        weights: names the weights to take where there are several: a set of
            the file ('student', 'state_dict') or a part of a prefix
            ('momentum_encoder'). None takes those that evaluate best.

    Raises:
        ValueError: if the file has no weights, or none of that name.
    """
    taken, word = _set_or_word(content, weights)
    prefixes = sorted(architecture.find_prefixes(taken.state), key=_rank)
    if word is not None:
        named = [prefix for prefix in prefixes
                 if word.strip('.') in _words(prefix)
                 or prefix.rstrip('.') == word.strip('.')]
        if not named:
            raise ValueError(
                f'weights={word!r} are not in the checkpoint: it has the sets '
                f'{[taken.name, *taken.others]} and, in {taken.name!r}, '
                f'weights under the prefixes {prefixes}. Choose one of these')
        prefixes = named + [prefix for prefix in prefixes
                            if prefix not in named]
    prefix = prefixes[0] if prefixes else ''
    # A prefix inside of the one that was taken is not another choice.
    prefixes = [other for other in prefixes if other == prefix
                or not prefix or not other.startswith(prefix)]
    pretraining = taken.name.split('.')[-1] in ('teacher', 'student') or any(
        'mask_token' in key for key in taken.state)
    return Choice(taken.state, prefix, _line(taken, prefix, prefixes[1:]),
                  pretraining)


def _set_or_word(content: Mapping[str, Any], weights: str | None
                 ) -> tuple[WeightSet, str | None]:
    if weights is None:
        return choose_set(content), None
    try:
        return choose_set(content, weights), None
    except ValueError:
        # This is no name of a set, so it must be a word of a prefix.
        return choose_set(content), weights


def _words(prefix: str) -> set[str]:
    """The parts of a prefix, and the words that these are made of."""
    parts = prefix.replace('/', '.').split('.')
    return {*parts, *(word for part in parts for word in part.split('_'))}


def _rank(prefix: str) -> int:
    """Sort key of a prefix; those with a lower one are preferred. Prefixes with
    equal keys stay in the order in which they were found."""
    words = _words(prefix)
    return 0 if words & PREFERRED else 2 if words & SECOND else 1


def _line(taken: WeightSet, prefix: str, other_prefixes: list[str]) -> str:
    inside = sum(key.startswith(prefix) for key in taken.state)
    beside = Counter(key.split('.')[0] for key in taken.state
                     if not key.startswith(prefix))
    if not (taken.name or prefix or taken.rest):
        return ''
    where = [f'{taken.name!r}'] if taken.name else []
    where += [f'the prefix {prefix!r}'] if prefix else []
    line = f'took {inside} weights'
    if where:
        line += f' of {" under ".join(where)}'
    left = [repr(name) for name in (*taken.others, *other_prefixes)]
    left += [f'{name} ({count})' for name, count in beside.items()]
    left += taken.rest
    if left:
        line += f'; left out {", ".join(left[:8])}'
        line += ', ...' if len(left) > 8 else ''
    choices = [*taken.others, *(prefix.strip('./')
                                for prefix in other_prefixes)]
    if choices:
        line += f"; weights={choices[0]!r} takes the other"
    return line
