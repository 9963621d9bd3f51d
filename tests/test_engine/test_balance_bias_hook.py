"""When the bias of a BiasBalancedRouter is updated, and when it is not."""
import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from toy import BACKBONE, STAGES, copied_state, toy_config, toy_runner
from two_ranks import run_two_ranks, train_bias

from rmoe.engine.balance_bias_hook import update_biases
from rmoe.moe import BiasBalancedRouter, moe_layers

HOOK = dict(type='rmoe.BalanceBiasHook')
RATE = 0.125


def backbone(**router):
    config = copy.deepcopy(BACKBONE)
    config['moe']['router'] = dict(type='BiasBalancedRouter',
                                   update_rate=RATE, **router)
    return config


def biases(model):
    return {name: layer.router.balance_bias.clone()
            for name, layer in moe_layers(model).items()}


def test_the_bias_steps_against_the_load_and_changes_no_gate():
    # 2408.15664: b += rate * sign(mean - load); loads 6, 2, 0 have mean 8/3
    router = BiasBalancedRouter(4, 3, update_rate=RATE)
    bias = router.balance_bias
    router.update_bias(torch.tensor([6, 2, 0]))
    assert router.balance_bias is bias
    assert bias.tolist() == [-RATE, RATE, RATE]
    router.update_bias(torch.tensor([2, 2, 2]))
    assert bias.tolist() == [-RATE, RATE, RATE]
    x = torch.randn(50, 4)
    router.eval()
    routing = router(x)
    scores = routing.logits_TE.sigmoid()
    chosen = (scores + bias).argmax(1)
    assert torch.equal(routing.expert_ids_N, chosen.sort(stable=True).values)
    torch.testing.assert_close(
        routing.weights_N, scores[routing.token_ids_N, routing.expert_ids_N])
    assert routing.losses == {}


def test_an_overloaded_router_is_balanced_without_a_loss():
    torch.manual_seed(0)
    router = BiasBalancedRouter(8, 4, update_rate=0.02)
    router.scorer.weight.data.normal_()
    x = torch.randn(400, 8) + 2 * router.scorer.weight.data[0]
    before = router(x).counts_E
    for _ in range(100):
        router(x)
        update_biases(router)
    after = router(x).counts_E
    assert before.max() > 200 and before.min() < 50
    assert after.max() < 130 and after.min() > 70


def test_nothing_moves_in_evaluation():
    router = BiasBalancedRouter(4, 3, update_rate=RATE).eval()
    router(torch.randn(10, 4))
    assert router.recent_load_E.tolist() == [0, 0, 0]
    update_biases(router)
    assert router.balance_bias.tolist() == [0, 0, 0]


def test_a_frozen_router_keeps_its_bias():
    router = BiasBalancedRouter(4, 3, update_rate=RATE).requires_grad_(False)
    router(torch.randn(10, 4))
    update_biases(router)
    assert router.balance_bias.tolist() == [0, 0, 0]
    assert router.recent_load_E.tolist() == [0, 0, 0]


def test_a_frozen_router_is_no_forgotten_one(monkeypatch, recwarn):
    monkeypatch.setattr('rmoe.moe.routers.bias_balanced.PATIENCE', 3)
    router = BiasBalancedRouter(4, 3).requires_grad_(False)
    for _ in range(5):
        router(torch.randn(10, 4))
        update_biases(router)
    assert not recwarn.list


def test_the_bias_is_not_cast_with_the_model():
    router = BiasBalancedRouter(4, 3, update_rate=0.001).bfloat16()
    assert router.balance_bias.dtype == torch.float32
    for _ in range(2000):
        router.update_bias(torch.tensor([6, 2, 0]))
    torch.testing.assert_close(router.balance_bias, torch.tensor(
        [-2., 2, 2]), atol=1e-3, rtol=0)


@pytest.mark.parametrize('accumulative_counts', [1, 3])
def test_once_per_optimizer_step(tmp_path, accumulative_counts):
    config = toy_config(tmp_path, max_iters=6, hooks=(HOOK, ),
                        backbone=backbone())
    config.optim_wrapper.accumulative_counts = accumulative_counts
    runner, watch = Runner.from_cfg(config), Steps()
    runner.register_hook(watch)
    runner.train()
    moved = [not torch.equal(a, b) for a, b in zip(watch.seen,
                                                   watch.seen[1:])]
    every = [i % accumulative_counts == accumulative_counts - 1
             for i in range(6)]
    assert moved == every
    # all accumulated batches count: each has four images of 4 x 4 tokens
    assert watch.loads[accumulative_counts - 1] == 64 * accumulative_counts


class Steps(Hook):
    """Records the bias of the first layer before every iteration, and the load
    that its router has counted just before BalanceBiasHook runs."""
    priority = 'HIGH'

    def before_train(self, runner):
        self.layer = next(iter(moe_layers(runner.model).values()))
        self.seen, self.loads = [self.layer.router.balance_bias.clone()], []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.loads.append(int(self.layer.router.recent_load_E.sum()))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx:
            self.seen.append(self.layer.router.balance_bias.clone())

    def after_train(self, runner):
        self.seen.append(self.layer.router.balance_bias.clone())


def test_core_stage_routes_nothing_and_moves_nothing(tmp_path):
    runner = toy_runner(
        tmp_path, max_iters=4, backbone=backbone(), hooks=(
            HOOK, dict(type='rmoe.ResidualMoEHook', stages=[
                dict(roles=('core', 'head'))])))
    runner.train()
    assert all((bias == 0).all() for bias in biases(runner.model).values())


def test_resume_goes_on_from_the_saved_bias(tmp_path):
    hooks = (HOOK, dict(type='rmoe.ResidualMoEHook', stages=STAGES))
    straight = toy_runner(tmp_path / 'a', hooks=hooks, backbone=backbone())
    straight.train()
    resumed = toy_runner(
        tmp_path / 'b', hooks=hooks, backbone=backbone(), resume=True,
        load_from=str(tmp_path / 'a' / 'iter_4.pth'))
    resumed.train()
    assert any((bias != 0).any() for bias in biases(straight.model).values())
    other = copied_state(resumed.model)
    for key, value in copied_state(straight.model).items():
        assert torch.equal(value, other[key]), key


def test_needs_a_router_with_a_bias(tmp_path):
    with pytest.raises(ValueError, match='BiasBalancedRouter'):
        toy_runner(tmp_path, hooks=(HOOK, )).train()


def test_a_bias_that_nobody_updates_is_told(monkeypatch):
    monkeypatch.setattr('rmoe.moe.routers.bias_balanced.PATIENCE', 3)
    router = BiasBalancedRouter(4, 3)
    x = torch.randn(10, 4)
    router(x), router(x)
    with pytest.warns(UserWarning, match='rmoe.BalanceBiasHook'):
        router(x)


def test_two_ranks_step_alike_from_the_loads_of_both(tmp_path):
    ranks = run_two_ranks(train_bias, str(tmp_path), backbone(), HOOK)
    assert ranks[0]['loads'] != ranks[1]['loads']
    # loads 6 0 3 and 0 9 3 sum to 6 9 6, of mean 7
    assert [rank['opposed'] for rank in ranks] == [[1, -1, 1]] * 2
    # statistics are summed over both ranks too, and start again at zero
    for rank in ranks:
        assert rank['counted'] == ([10, 12, 14, 16], [100, 11], [0] * 4)
    for name, bias in ranks[0]['bias'].items():
        assert torch.equal(bias, ranks[1]['bias'][name])
        load = (torch.tensor(ranks[0]['loads'][name]) +
                torch.tensor(ranks[1]['loads'][name])).float()
        assert torch.equal(bias, RATE * torch.sign(load.mean() - load))
