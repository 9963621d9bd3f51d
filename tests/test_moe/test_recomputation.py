"""Activation checkpoints around a MoE layer, of both kinds."""
import copy
import warnings

import pytest
import torch
from routers import ROUTERS, D, build_layer, images
from torch.utils.checkpoint import checkpoint

from rmoe import compat
from rmoe.moe import MoELayer, collect_losses

LOSSES = dict(type='TokenChoiceRouter', top_k=2, noise_std=1.,
              loss_weights=dict(importance=1., load=1., gshard=1., z=1.))
TABLE = {**ROUTERS, 'all losses and noise': LOSSES}
every_router = pytest.mark.parametrize('name', TABLE)


def step(layer: MoELayer, reentrant: bool | None, x: torch.Tensor,
         task: float = 1.) -> dict[str, torch.Tensor]:
    """Gradients of one training step with activation checkpointing;
    ``reentrant=None`` is without."""
    torch.manual_seed(1)
    layer.zero_grad()
    collect_losses(layer, start=True)
    y = layer(x) if reentrant is None else checkpoint(
        layer, x, use_reentrant=reentrant)
    losses = collect_losses(layer, start=False)
    # Losses are not collected during backward, which must not cause a warning.
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        (task * y.square().sum() + sum(losses.values())).backward()
    return {name: parameter.grad
            for name, parameter in layer.named_parameters()}


def counters(layer: MoELayer) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                found[name], value, atol=1e-6, rtol=1e-5,
                msg=lambda m, name=name: f'{name}: {m}')


@every_router
def test_a_checkpoint_without_reentry_changes_nothing(name):
    plain = build_layer(TABLE[name])
    saved = copy.deepcopy(plain)
    x = images().requires_grad_()
    assert_equal(step(saved, False, x), step(plain, None, x))
    assert_equal(counters(saved), counters(plain))
    assert plain.token_counts[0] == x.numel() // D


def test_auxiliary_gradients_are_those_without_a_checkpoint():
    plain = build_layer(LOSSES)
    saved = copy.deepcopy(plain)
    x = images().requires_grad_()
    expected = step(plain, None, x, task=0.)
    assert expected['router.scorer.weight'].norm() > 1e-3
    assert_equal(step(saved, False, x, task=0.), expected)


def test_nested_checkpoints_count_once():
    plain = build_layer(LOSSES)
    saved = copy.deepcopy(plain)
    saved.with_cp = True
    x = images().requires_grad_()
    assert_equal(step(saved, False, x), step(plain, None, x))
    assert_equal(counters(saved), counters(plain))


def test_a_reentrant_checkpoint_is_right_where_nothing_is_collected():
    router = dict(LOSSES, loss_weights={})
    plain = build_layer(router)
    saved = copy.deepcopy(plain)
    x = images().requires_grad_()
    assert_equal(step(saved, True, x), step(plain, None, x))
    assert_equal(counters(saved), counters(plain))


def test_a_loss_without_gradient_is_refused():
    layer = build_layer(LOSSES)
    layer.name = 'MoE layer of stage 1, block 2'
    x = images().requires_grad_()
    with pytest.raises(ValueError, match=r"auxiliary loss 'importance' of MoE "
                       r'layer of stage 1, block 2 .* with_cp=True .* '
                       r'use_reentrant=False'):
        step(layer, True, x)
    # After the error, losses are no longer collected; the next step starts
    # anew.
    assert layer.losses is None
    step(layer, None, x)


def test_a_loss_without_gradient_is_right_where_none_is_wanted():
    x = images()
    layer = build_layer(LOSSES)
    with torch.no_grad():
        collect_losses(layer, start=True)
        layer(x)
        assert collect_losses(layer, start=False)['z'] > 0
    layer.router.requires_grad_(False)
    collect_losses(layer, start=True)
    checkpoint(layer, x.requires_grad_(), use_reentrant=True)
    assert collect_losses(layer, start=False)['z'] > 0


def test_a_backward_pass_is_known_from_inside():
    seen = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.in_backward())
        return x.sin()

    for reentrant in (False, True):
        x = torch.ones(2, requires_grad=True)
        y = checkpoint(note, x, use_reentrant=reentrant)
        y.register_hook(lambda grad: note(grad))
        assert not compat.in_backward()
        y.sum().backward()
        assert not compat.in_backward()
    assert seen == 2 * [False, True, True]
