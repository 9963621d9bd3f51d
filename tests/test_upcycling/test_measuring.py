"""Loads and differences, by hand."""
import pytest
import torch
from toy import toy_model

from rmoe.moe import moe_layers
from rmoe.upcycling import (
    largest_difference,
    layers_that_change_the_function,
    measure_loads,
)


def test_loads_are_those_of_all_images():
    model = toy_model().backbone.eval()
    first, second = moe_layers(model).values()
    torch.nn.init.zeros_(first.router.scorer.weight)  # ties go to expert 0
    images = [torch.randn(1, 3, 32, 32), torch.randn(2, 3, 32, 32)]
    loads = measure_loads(model, images)
    # Three images of 32 x 32 at stride 8.
    assert list(loads) == list(moe_layers(model))
    one, other = loads.values()
    assert one.tolist() == [48, 0, 0, 0]
    assert int(other.sum()) == 48 and (other > 0).sum() > 1
    assert not first.router._forward_hooks and not (
        second.router._forward_hooks)


def test_differences_of_feature_maps():
    def maps(x):
        return x, 2 * x

    def shifted(x):
        return x + 4, 2 * x - 1

    found = largest_difference(maps, shifted, [torch.tensor([0., 3.])])
    # 16 + 16 + 1 + 1 over 9 + 36
    assert found['largest'] == 4
    assert found['relative'] == pytest.approx((34 / 45)**.5)


@pytest.mark.parametrize('moe, expected', [
    (dict(), ''),
    (dict(align='none'), '2 MoE layers are TokenChoiceRouter with align='
     "'none', unrouted='core', core=True"),
])
def test_layers_that_change_the_function_are_named(moe, expected):
    assert layers_that_change_the_function(toy_model(**moe)) == expected
