"""Reads Swin-MoE checkpoints, which Tutel spreads over one file per rank.

Tutel (2206.03382) gives each of R ranks E / R experts. If there are more ranks
than experts, R / E neighbouring ranks share an expert, and each holds some of
its hidden units. In both cases the pieces of all ranks, laid end to end, are
the weights of all experts.

A set of files is ``X.pth.rank0``, ``X.pth.rank1``, ..., each with all weights,
or with experts alone if there is a ``X.pth.master`` with the other weights. Or
it is a single ``X.pth.global``.

Axis letters: E experts, D width, R ranks, N numbers that a rank holds.
"""
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmoe.upcycling.formats.pickles import read_pickle

MEMBER = re.compile(r'(.+)\.(rank\d+|master|global)')
PIECE = re.compile(r'(.+\.)experts\.batched_(fc[12]_(?:w|bias))')
COUNT = '_num_global_experts'


def rank_files(path: str | os.PathLike) -> list[Path]:
    """The set of files that a checkpoint is spread over.

    Args:
        path: any file of the set, or its name without ``.rank0``.

    Returns:
        ``[X.global]``; or ``X.master``, if there is one, and the ranks in
        order; empty if the path is an ordinary file or there is no set.

    Raises:
        ValueError: if the name stands for a set and for a ``.global`` file.
    """
    path = Path(path).expanduser()
    match = MEMBER.fullmatch(path.name)
    if (match is None and path.exists()) or not path.parent.is_dir():
        return []
    name, ending = match.groups() if match else (path.name, None)
    members = {}
    for file in path.parent.iterdir():
        member = MEMBER.fullmatch(file.name)
        if member and member[1] == name:
            members[member[2]] = file
    whole = members.pop('global', None)
    ranks = sorted(members.values(), key=_rank)
    if whole and ranks and ending is None:
        raise ValueError(
            f'{path} stands for two checkpoints, {whole.name} and '
            f'{ranks[0].name}: give the name of the one to read')
    return [whole] if whole and (ending == 'global' or not ranks) else ranks


def read_rank_files(path: str | os.PathLike, map_location: Any = 'cpu'
                    ) -> dict[str, Any]:
    """Gather a set of files into one checkpoint.

    One rank is read at a time and its experts are copied into place, so that
    little more than one copy of the weights is ever in memory.

    Args:
        path: see :func:`rank_files`.
        map_location: as for torch.load.

    Returns:
        dict(state_dict=...) with Tutel's names. Experts' weights are
        (E, hidden, D), their biases (E, hidden) and (E, D). If the bias of the
        experts' second layer is zero and no dense FFN has one, it is left
        out, because Swin-MoE models without this bias have it frozen at zero.

    Raises:
        FileNotFoundError: if there is no such set.
        ValueError: if ranks are missing or do not fit together, or there is
            no router to tell the number of experts from.
    """
    files = rank_files(path)
    if not files:
        raise FileNotFoundError(f'{path} and its rank files (.rank0, .rank1, '
                                '...) do not exist')
    master: dict[str, Tensor] = {}
    if files[0].suffix == '.master':
        master = _read(files[0], map_location)
    ranks = [file for file in files if file.suffix != '.master']
    _check_numbers(ranks)
    first = _read(ranks[0], map_location) if ranks else {}
    shared = {key: value for key, value in {**first, **master}.items()
              if not PIECE.fullmatch(key)}
    layers = _moe_layers(shared, first, files[0])
    _check_pieces(layers, first, len(ranks), files[-1])

    for key, value in master.items():
        if PIECE.fullmatch(key) and key not in first:
            _check_unused(key, value, files[0])
    state = {key: value for key, value in shared.items()
             if not key.endswith(COUNT)}
    has_bias = any(key.endswith('.fc2.bias') for key in state)
    gathered = _gather(first, master, ranks, map_location)
    for key, value_RN in gathered.items():
        value = _split_by_expert(key, value_RN, *layers[_layer(key)])
        if has_bias or not key.endswith('fc2_bias') or value.any():
            state[key] = value
    return dict(state_dict=state)


def _rank(file: Path) -> int:
    if file.suffix == '.master':
        return -1
    return int(file.suffix.removeprefix('.rank').replace('.global', '0'))


def _layer(key: str) -> str:
    match = PIECE.fullmatch(key)
    assert match is not None
    return match[1]


def _read(file: Path, map_location: Any) -> dict[str, Tensor]:
    content = read_pickle(file, map_location)
    if isinstance(content, dict) and isinstance(content.get('model'), dict):
        content = content['model']
    if not isinstance(content, dict):
        raise ValueError(f'checkpoint {file} holds a '
                         f'{type(content).__name__}, not a state dict')
    # Tutel's own tools write the number of experts as an int, not as a tensor.
    return {key: torch.as_tensor(value) for key, value in content.items()
            if isinstance(value, Tensor) or str(key).endswith(COUNT)}


def _check_numbers(ranks: Sequence[Path]) -> None:
    for number, file in enumerate(ranks):
        if _rank(file) != number:
            missing = file.with_suffix(f'.rank{number}')
            raise ValueError(
                f'{missing} is missing: the last rank is {ranks[-1].name}. '
                'Every rank holds other experts, so put all files into one '
                'folder')


def _moe_layers(shared: Mapping[str, Tensor], first: Mapping[str, Tensor],
                file: Path) -> dict[str, tuple[int, int]]:
    """(E, D) of each MoE layer, by its prefix. They are read from the shape of
    its router, because several files may share an expert."""
    layers: dict[str, tuple[int, int]] = {}
    for key, value in shared.items():
        prefix = key.rpartition('gates.0.')[0]
        if key.endswith('.gates.0.wg.weight'):
            layers[prefix] = (value.shape[0], value.shape[1])
        elif key.endswith('.gates.0.cosine_projector.weight'):
            embeddings = shared.get(f'{prefix}gates.0.sim_matrix')
            if embeddings is not None:
                layers[prefix] = (embeddings.shape[1], value.shape[1])
    for key in first:
        if PIECE.fullmatch(key) and _layer(key) not in layers:
            raise ValueError(
                f'{file} has no router for {key}: {_layer(key)}gates.0. is '
                'missing, without which the number of experts is unknown. '
                'Where rank files hold experts alone, the .master file '
                'belongs beside them')
    for prefix, (num_experts, _) in layers.items():
        if f'{prefix}experts.batched_fc1_w' not in first:
            raise ValueError(
                f'{file} has a router, {prefix}gates.0., but no rank file '
                'has its experts: put .rank0, .rank1, ... beside it')
        count = shared.get(prefix + COUNT)
        if count is not None and int(count) != num_experts:
            raise ValueError(
                f'{file}: {prefix}{COUNT} is {int(count)}, but the router is '
                f'that of {num_experts} experts. Save the checkpoint again')
    return layers


def _check_pieces(layers: Mapping[str, tuple[int, int]],
                  first: Mapping[str, Tensor], num_ranks: int,
                  last: Path) -> None:
    """Check that the first rank holds as many numbers as it should if there are
    ``num_ranks`` ranks."""
    for prefix, (num_experts, width) in layers.items():
        if num_experts % num_ranks and num_ranks % num_experts:
            raise ValueError(
                f'{last} is the last of {num_ranks} rank files, over which '
                f'the {num_experts} experts of {prefix} cannot be spread: '
                'ranks are missing, or there are some of another run')
        local = max(num_experts // num_ranks, 1)
        sharers = max(num_ranks // num_experts, 1)
        weight = first[f'{prefix}experts.batched_fc1_w'].numel()
        hidden = weight // (local * width)
        numbers = dict(fc1_w=local * hidden * width,
                       fc2_w=local * hidden * width, fc1_bias=local * hidden,
                       fc2_bias=local * math.ceil(width / sharers))
        for name, number in numbers.items():
            key = f'{prefix}experts.batched_{name}'
            piece = first.get(key)
            # If ranks share an expert, only the number of elements is checked,
            # because the shape may be another: Tutel's scatter tool makes
            # pieces of (128, 32) from (1, 64, 64).
            if piece is not None and (piece.numel() != number or (
                    sharers == 1 and piece.shape[:1] != (local, ))):
                raise ValueError(
                    f'{key} {tuple(piece.shape)} is not what one of '
                    f'{num_ranks} ranks holds of {num_experts} experts of '
                    f'width {width}. {last} is the last file there is; the '
                    'experts of other ranks are missing')


def _gather(first: Mapping[str, Tensor], master: Mapping[str, Tensor],
            ranks: Sequence[Path], map_location: Any) -> dict[str, Tensor]:
    """The pieces (R, N) of each expert weight, from all ranks. ``first`` has
    the weights of rank 0, which are read already."""
    pieces = {key: value for key, value in first.items()
              if PIECE.fullmatch(key)}
    if len(ranks) <= 1:
        return pieces
    gathered = {key: value.new_empty(len(ranks), value.numel())
                for key, value in pieces.items()}
    for number, file in enumerate(ranks):
        rank = _read(file, map_location) if number else first
        _check_alike(first, ranks[0], rank, file, master)
        for key, value_RN in gathered.items():
            value_RN[number] = rank[key].flatten()
    return gathered


def _check_alike(first: Mapping[str, Tensor], first_file: Path,
                 rank: Mapping[str, Tensor], file: Path,
                 master: Mapping[str, Tensor]) -> None:
    """Check that two ranks have the same weights, except for their experts."""
    if first.keys() != rank.keys():
        key = min(first.keys() ^ rank.keys())
        raise ValueError(
            f'{first_file} and {file} hold different weights: only one has '
            f'{key}. Take all rank files from one checkpoint')
    for key, value in first.items():
        other = rank[key]
        if value.shape != other.shape or value.dtype != other.dtype:
            raise ValueError(
                f'{key} is {tuple(value.shape)} {value.dtype} in '
                f'{first_file} and {tuple(other.shape)} {other.dtype} in '
                f'{file}. Take all rank files from one checkpoint')
        if PIECE.fullmatch(key) or key in master or torch.equal(value, other):
            continue
        largest = (value.double() - other.double()).abs().max()
        raise ValueError(
            f'{first_file} and {file} differ by {largest:.3g} in {key}, which '
            'all ranks share. If they are of one checkpoint (each rank '
            'clipped its gradients by a norm of its own, which lets them '
            f'drift apart), copy {first_file.name} to '
            f'{first_file.with_suffix(".master").name}: shared weights are '
            'then taken from that file')


def _split_by_expert(key: str, value_RN: Tensor, num_experts: int,
                     width: int) -> Tensor:
    """Reshape the pieces of a weight to (E, hidden, D), or those of a bias to
    (E, width)."""
    value = value_RN.reshape(num_experts, -1)
    if key.endswith('_w'):
        return value.unflatten(1, (-1, width))
    # Ranks that share an expert hold shards of D that are rounded up.
    return value[:, :width] if key.endswith('fc2_bias') else value


def _check_unused(key: str, value: Tensor, master: Path) -> None:
    """Raise unless a piece that only the master file has is a bias of zeros."""
    if not key.endswith('fc2_bias') or value.any():
        raise ValueError(
            f'{key} {tuple(value.shape)} is in {master} and in no rank file: '
            'the parts of the other ranks are missing. Save full rank files. '
            'Only an unused bias of the second layer, which is all zero, may '
            f'be there; the largest value is {value.abs().max():.3g}')
