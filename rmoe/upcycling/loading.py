"""Checks on every checkpoint that a backbone loads, so that none is loaded in
part without a message."""
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from rmoe import compat
from rmoe.upcycling.choosing import choose_weights
from rmoe.upcycling.expert_count import EXPERT_MISMATCH
from rmoe.upcycling.fit import fit
from rmoe.upcycling.formats import (
    choose_set,
    state_dict_of,
    without_wrappers,
)
from rmoe.upcycling.say import say


def check_loading(backbone: nn.Module, expert_mismatch: str) -> None:
    """Make sure that every later load of this backbone is complete or raises.

    A dense file is upcycled, the names of any known source are translated, and
    a table of what happened to each key is logged. This works for mmengine's
    load_from, resume and init_cfg and for torch's load_state_dict alike,
    strict or not.

    Args:
        backbone: the module; its ``architecture`` says which checkpoints it
            can load.
        expert_mismatch: see :func:`rmoe.upcycling.fit`.

    Raises:
        ValueError: for an unknown ``expert_mismatch``.
    """
    if expert_mismatch not in EXPERT_MISMATCH:
        raise ValueError(f'moe.expert_mismatch={expert_mismatch!r} is not '
                         f'one of {EXPERT_MISMATCH}')
    compat.register_load_hook(
        backbone, partial(_fit_in_place, expert_mismatch))


def _fit_in_place(expert_mismatch: str, backbone: Any,
                  state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    inside = prefix
    if not prefix:
        _unwrap(state_dict)
        # Flax nests its parameters under 'params/'. The prefix of an init_cfg
        # cannot name that, because mmengine ends every prefix with a dot.
        found = backbone.architecture.find_prefix(state_dict) or ''
        inside = found if found.endswith('/') else ''
    state = {key[len(inside):]: value for key, value in state_dict.items()
             if key.startswith(inside)}
    check_prefix(backbone, state_dict, inside)
    fitted, report = fit(backbone, state, expert_mismatch)
    say(report.table())
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
    state_dict.update({prefix + key: value for key, value in fitted.items()})


def _unwrap(content: dict[str, Any]) -> None:
    """Reduce the content of a file to its weights, in place.

    mmengine passes on the content as it is: DeiT and the original Swin keep
    their weights under 'model', and torch.compile changes names.
    """
    whole = any(isinstance(value, Tensor) for value in content.values())
    weights = without_wrappers(content) if whole else state_dict_of(content)
    if list(weights) != list(content):
        content.clear()
        content.update(weights)


def pretrained_weights(content: Mapping[str, Any], backbone: Any,
                       init_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a file that a backbone's ``init_cfg`` asks for.

    Args:
        content: the content of the file.
        backbone: the backbone; its ``architecture`` says which checkpoints it
            can load.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` and optionally
            ``prefix`` and ``weights``, see
            :func:`rmoe.upcycling.choosing.choose_weights`.

    Returns:
        ``dict(state_dict=...)`` with the backbone's weights alone or, if
        ``init_cfg`` has a ``prefix``, with all weights of the set.
    """
    which = init_cfg.get('weights')
    prefix = init_cfg.get('prefix')
    if prefix is None:
        choice = choose_weights(content, backbone.architecture, which)
        if choice.line:
            say(f"{init_cfg['checkpoint']}: {choice.line}")
        return dict(state_dict=choice.backbone)
    taken = choose_set(content, which)
    if any(key.startswith(prefix) for key in taken.state):
        return dict(state_dict=taken.state)
    # The prefix is the name of a wrapper, which choose_set removes, or it is
    # wrong.
    return dict(content)


def check_prefix(backbone: Any, state_dict: dict[str, Tensor],
                 prefix: str) -> None:
    """Check that the weights of a backbone are under this prefix.

    Raises:
        ValueError: if they are not. Names the prefix under which they are, if
            there is one.
    """
    if backbone.architecture.recognise(state_dict, prefix) is not None:
        return
    found = backbone.architecture.find_prefix(state_dict)
    if found is not None and found != prefix:
        remedy = (f"init_cfg=dict(type='Pretrained', checkpoint=..., "
                  f'prefix={found!r})' if found else
                  "init_cfg=dict(type='Pretrained', checkpoint=...)")
        raise ValueError(
            f'the backbone looked for weights under the prefix {prefix!r}; '
            f'the checkpoint has them under {found!r}. Load it through the '
            f"backbone's {remedy}")
    if not any(key.startswith(prefix) for key in state_dict):
        raise ValueError(
            f'no key of the checkpoint starts with {prefix!r}, where this '
            'model has its backbone; load a bare backbone through the '
            "backbone's init_cfg=dict(type='Pretrained', checkpoint=...)")
