"""The weights of a backbone in a file of anything: a pre-training run with a
teacher, a detector, a wrapped model."""
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmoe.upcycling.formats import WeightSet, choose_set
from rmoe.upcycling.keymaps import Architecture

# Words of prefixes. Averages over training evaluate better than the last
# weights; MoCo v3 and MoBY evaluate the encoder that was trained.
PREFERRED = {'teacher', 'ema', 'model_ema', 'ema_model', 'target_encoder'}
SECOND = {'student', 'momentum_encoder', 'encoder_k', 'target_generator',
          'target_network', 'momentum'}


@dataclass(frozen=True)
class Choice:
    """What was taken of a file.

    Attributes:
        state: all weights of the set that was chosen.
        prefix: where in it the backbone's weights lie.
        line: what was taken and what was left out; empty if the file is
            nothing but the backbone.
        pretraining: whether what lies beside the backbone is of a
            pre-training task, of no use to a segmentor or detector.
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
    """The weights in a file that a backbone can load.

    Args:
        content: what ``read_checkpoint`` gives.
        architecture: of the backbone.
        weights: which, where there are several: a set of the file
            ('student', 'state_dict') or a part of a prefix
            ('momentum_encoder'). None takes those that evaluate best.

    Raises:
        ValueError: if there are no weights or none of that name.
    """
    taken, word = _set_or_word(content, weights)
    prefixes = sorted(architecture.find_prefixes(taken.state), key=_rank)
    if word is not None:
        named = [prefix for prefix in prefixes
                 if word.strip('.') in _words(prefix)
                 or prefix.rstrip('.') == word.strip('.')]
        if not named:
            raise ValueError(
                f'weights={word!r} are not in the checkpoint; it has the sets '
                f'{[taken.name, *taken.others]} and, in {taken.name!r}, '
                f'weights under {prefixes}')
        prefixes = named + [prefix for prefix in prefixes
                            if prefix not in named]
    prefix = prefixes[0] if prefixes else ''
    # A name inside the one that was taken is no other choice.
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
        # Not the name of a set, so of a part of one.
        return choose_set(content), weights


def _words(prefix: str) -> set[str]:
    """The parts of a prefix, and what they are made of."""
    parts = prefix.replace('/', '.').split('.')
    return {*parts, *(word for part in parts for word in part.split('_'))}


def _rank(prefix: str) -> int:
    """Equal ranks stay in the order in which they were found."""
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
