"""Options of routers: what they change, and which are refused."""
import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from routers import ROUTERS, B, D, E, H, S, build_layer, images, route

from rmoe.moe import MoEFFN
from rmoe.moe.routers.base import NotFiniteError


@pytest.mark.parametrize('options', [
    dict(type='ExpertChoiceRouter', noise_std=5.),
    dict(type='SinkhornTokenChoiceRouter', noise_std=5.),
    dict(type='SinkhornExpertChoiceRouter', noise_std=5.),
    dict(type='SoftRouter', noise_std=5., slots_per_expert=2),
], ids=str)
def test_noise_is_for_training_only(options):
    layer = build_layer(options)
    x = images()
    assert not torch.equal(route(layer, x).combine_tensor(),
                           route(layer, x).combine_tensor())
    layer.eval()
    assert torch.equal(route(layer, x).combine_tensor(),
                       route(layer, x).combine_tensor())


def test_k_and_capacity_change_at_test_time():
    layer = build_layer(dict(type='TokenChoiceRouter', top_k=2)).eval()
    x = images()
    assert route(layer, x).counts_E.sum() == 2 * B * S
    layer.router.top_k = 1
    assert route(layer, x).counts_E.sum() == B * S
    layer.router.eval_capacity_factor = 0.4
    layer.router.capacity_multiple = 1
    # one slot per image and expert: ceil(10 * .4 / 4)
    assert route(layer, x).counts_E.max() <= B
    layer.router.priority = 'bpr'
    kept = route(layer, x)
    scores = kept.scores_TE.view(B, S, E)
    for token, expert in zip(kept.token_ids_N, kept.expert_ids_N):
        group = scores[token // S]
        rivals = group[group.argmax(1) == expert].amax(1)
        assert group[token % S].max() == rivals.max()


def test_a_k_out_of_range_is_found_when_it_is_set_late():
    for name in ('token choice', 'bias balanced'):
        layer = build_layer(ROUTERS[name])
        layer.router.top_k = E + 1
        with pytest.raises(ValueError, match=f'top_k={E + 1} must lie'):
            layer(images())


def test_gates_that_underflow_count_alike():
    layer = build_layer(dict(type='ExpertChoiceRouter', noise_std=0.),
                        randomise=False, num_experts=3, align='renormalize')
    dense = FFN(D, H, act_cfg=dict(type='GELU'), ffn_drop=0.)
    layer.load_state_dict(dense.state_dict(), strict=False)
    layer.router.scorer.weight.data.copy_(torch.eye(3, D))
    x = torch.zeros(3, D)
    x[:, :3] = torch.tensor([[150., 150, 0], [200, 0, 0], [0, 200, 0]])
    # expert 2 takes token 0 with a gate of exp(-150) = 0
    routing = layer.router(x)
    assert routing.token_ids_N.tolist() == [1, 2, 0]
    assert routing.weights_N[2] == 0
    torch.testing.assert_close(layer(x), dense(x))


def test_tokens_too_large_for_float32_are_no_direction():
    with pytest.raises(NotFiniteError, match='for 1 of 30 tokens'):
        x = images()
        x[0, 0] = 1e25
        build_layer(ROUTERS['soft'])(x)


def test_evaluation_capacity_of_expert_choice():
    layer = build_layer(dict(type='ExpertChoiceRouter', noise_std=0.,
                             eval_capacity_factor=2.))
    x = images()
    # ceil(10 / 4) and ceil(20 / 4) per image
    assert route(layer, x).counts_E.tolist() == [3 * B] * E
    assert layer.router.experts_per_token == 1
    layer.eval()
    assert route(layer, x).counts_E.tolist() == [5 * B] * E
    assert layer.router.experts_per_token == 2


def test_sparse_plan_that_cannot_converge_is_told_once():
    layer = build_layer(dict(type='SparseExpertChoiceRouter',
                             capacity_factor=0.5))
    with pytest.warns(UserWarning, match=r'did not converge.*raise '
                      r'capacity_factor \(now 0.5'):
        layer(images())
    assert layer.router.plan_error > 0.1
    layer(images())  # a warning would be an error
    good = build_layer(ROUTERS['sparse expert choice'])
    good(images())
    assert good.router.plan_error < 1e-4


@pytest.mark.parametrize('router, options, message', [
    ('ExpertChoiceRouter', dict(capacity_factor=0.), 'capacity_factor=0.0'),
    ('ExpertChoiceRouter', dict(eval_capacity_factor=-1.),
     'capacity_factor=-1.0'),
    ('ExpertChoiceRouter', dict(noise_std=-1.), 'noise_std=-1.0'),
    ('ExpertChoiceRouter', dict(group=0), 'group=0 must'),
    ('ExpertChoiceRouter', dict(group=True), 'group=True must'),
    ('ExpertChoiceRouter', dict(eval_group='images'),
     "eval_group='images' must"),
    ('ExpertChoiceRouter', dict(capacity_multiple=0), 'capacity_multiple=0'),
    ('TokenChoiceRouter', dict(capacity_multiple=0), 'capacity_multiple=0'),
    ('SinkhornExpertChoiceRouter', dict(iterations=0), 'iterations=0'),
    ('SinkhornExpertChoiceRouter', dict(combine='gate'), "combine='gate'"),
    ('SinkhornTokenChoiceRouter', dict(combine='gate'), "combine='gate'"),
    ('SparseExpertChoiceRouter', dict(solver='lp'), "solver='lp'"),
    ('SoftRouter', dict(slots_per_expert=0), 'slots_per_expert=0'),
    ('BiasBalancedRouter', dict(top_k=9), 'top_k=9'),
    ('BiasBalancedRouter', dict(update_rate=0.), 'update_rate=0.0'),
    ('TokenChoiceRouter', dict(priority='batch'), "priority='batch'"),
    ('TokenChoiceRouter', dict(scorer=dict(type='CosineScorer',
                                           init_temperature=0.)),
     'init_temperature=0.0'),
])
def test_bad_arguments_name_the_value(router, options, message):
    with pytest.raises(ValueError, match=message):
        build_layer(dict(type=router, **options))


@pytest.mark.parametrize('router, options, message', [
    ('soft', dict(align='stopgrad'), "align='stopgrad'.*mixes tokens"),
    ('token choice', dict(align='difference'),
     "align='difference'.*chooses experts"),
    ('soft', dict(align='difference', core=False), 'needs core=True'),
])
def test_alignments_that_do_not_fit_the_router(router, options, message):
    with pytest.raises(ValueError, match=message):
        build_layer(ROUTERS[router], **options)


@pytest.mark.parametrize('name', ROUTERS)
@pytest.mark.usefixtures('host_scope')
def test_builds_under_a_host_scope(name):
    layer = MoEFFN(D, H, E, router=copy.deepcopy(ROUTERS[name]))
    assert layer.num_experts == E
