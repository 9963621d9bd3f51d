"""Describes as data how a source (a project that publishes checkpoints) names
its weights, and translates the names.

The names are translated to those of our backbones. A rule is (pattern,
replacement, transform); the first rule whose pattern matches the whole key is
applied. A replacement that ends in ``[i/n]`` says that the tensor is the i-th
of n parts, which are joined along their first axis.
"""
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rename = str | Callable[[re.Match], str]
Rule = tuple[str, Rename, Callable[[Tensor], Tensor] | None]
# A function of the file's tensor, the model's tensor and the model. The type of
# the model is Any, because each backbone has attributes of its own.
Resize = Callable[[Tensor, Tensor, Any], Tensor | None]
PART = re.compile(r'(.+)\[(\d+)/(\d+)\]')


@dataclass(frozen=True)
class Source:
    """One way to name the weights of one architecture.

    Attributes:
        name: name of the source in messages.
        marks: keys that every file of this source has.
        rules: ordered (pattern, replacement, transform).
        left_out: (pattern, reason) of keys that a dense-prediction backbone
            has no use for.
        absent: keys that no file of this source has, but files of another
            source with the same marks have.
        verify: a function of the model and the file's weights that raises a
            ValueError if the model is set up for another source.
    """
    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    verify: Callable[[Any, Mapping[str, Tensor]], None] | None = None


@dataclass(frozen=True)
class Architecture:
    """The checkpoints that a backbone can load.

    Attributes:
        name: name of the architecture in messages.
        sources: its sources; the first has the names of the backbone itself.
        new: patterns of keys that keep their initial values if a file lacks
            them.
        spare: (pattern, reason) of keys that a file may have although the
            model does not.
        resize: (pattern, function) of keys that can be resized. The function
            gets the file's tensor, the model's tensor and the model, and
            returns None if it cannot resize.
        computed: patterns of buffers that the model computes itself.
    """
    name: str
    sources: tuple[Source, ...]
    new: tuple[str, ...] = ()
    spare: tuple[tuple[str, str], ...] = ()
    resize: tuple[tuple[str, Resize], ...] = ()
    computed: tuple[str, ...] = ()

    def recognise(self, keys: Iterable[str], prefix: str = ''
                  ) -> Source | None:
        """The source whose marks are among the keys under a prefix; None if
        there is none.

        Raises:
            ValueError: if there are two.
        """
        keys = set(keys)
        found = [source for source in self.sources
                 if _has_marks(source, keys, prefix)]
        if len(found) > 1:
            raise ValueError(
                'the file holds weights named as two sources name them: '
                f'{found[0].name} ({prefix}{found[0].marks[0]}) and '
                f'{found[1].name} ({prefix}{found[1].marks[0]}). Keep the '
                'weights of one of them')
        return found[0] if found else None

    def find_prefix(self, keys: Iterable[str]) -> str | None:
        """The shortest prefix under which some source's weights lie, or
        None."""
        return next(iter(self.find_prefixes(keys)), None)

    def find_prefixes(self, keys: Iterable[str]) -> list[str]:
        """All prefixes under which some source's weights lie, in the order of
        the sources, and for each source the shortest first."""
        keys = set(keys)
        found: list[str] = []
        for source in self.sources:
            mark = source.marks[0]
            prefixes = [key[:-len(mark)] for key in keys
                        if key.endswith(mark)]
            found += [
                prefix for prefix in sorted(
                    prefixes, key=lambda key: (len(key), key))
                if (not prefix or prefix[-1] in './') and prefix not in found
                and _has_marks(source, keys, prefix)]
        return found


def _has_marks(source: Source, keys: set[str], prefix: str) -> bool:
    return (all(prefix + mark in keys for mark in source.marks) and
            not any(prefix + mark in keys for mark in source.absent))


def rename(state: Mapping[str, Tensor], source: Source
           ) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Translate a source's state dict to our names.

    Returns:
        The renamed weights, and the reason for each key left out.

    Raises:
        ValueError: for a key that no rule matches, a tensor that a rule cannot
            transform, or a part of a tensor without the other parts.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    left_out: dict[str, str] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        reason = matching(key, source.left_out)
        if reason:
            left_out[key] = reason
            continue
        if not matching(key, [(rule[0], key) for rule in source.rules]):
            unknown.append(key)
            continue
        name, tensor = _apply_rules(key, tensor, source)
        part = PART.fullmatch(name)
        if part is None:
            renamed[name] = tensor
        else:
            whole = parts.setdefault(part[1], dict.fromkeys(
                range(int(part[3]))))  # type: ignore[arg-type]
            whole[int(part[2])] = tensor
    if unknown:
        raise ValueError(
            f'{unknown[0]!r} is no weight of a {source.name} checkpoint; '
            'is this another architecture?' + _more(unknown))
    for name, pieces in parts.items():
        missing = [i for i, piece in pieces.items() if piece is None]
        if missing:
            raise ValueError(
                f'of the {len(pieces)} parts that {name} is joined from, '
                f'numbers {missing} are not in the {source.name} checkpoint')
        renamed[name] = torch.cat([pieces[i] for i in sorted(pieces)])
    return renamed, left_out


def matching(key: str, reasons: Iterable[tuple[str, str]]) -> str | None:
    """The reason of the first pattern that matches the whole key; None if none
    does."""
    return next((reason for pattern, reason in reasons
                 if re.fullmatch(pattern, key)), None)


def _apply_rules(key: str, tensor: Tensor, source: Source
                 ) -> tuple[str, Tensor]:
    for pattern, replacement, transform in source.rules:
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        name = (replacement(match) if callable(replacement)
                else match.expand(replacement))
        try:
            return name, transform(tensor) if transform else tensor
        except RuntimeError as error:
            raise ValueError(
                f'{key} {tuple(tensor.shape)} does not have the shape that it '
                f'has in a {source.name} checkpoint: {error}') from None
    raise AssertionError(key)


def _more(unknown: list[str]) -> str:
    if len(unknown) == 1:
        return ''
    return (f' {len(unknown)} names are unknown, the first '
            f'{", ".join(unknown[:3])}')
