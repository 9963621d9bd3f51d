"""The parts of the benchmark's tables: work and rates against values worked
out by hand, numbers of operators, precisions, and peaks of memory."""
import warnings
from functools import partial

import pytest
import torch
from _bench import ceilings, counting, limit, precision, timing
from _bench.ceilings import COPY, PRODUCT, Ceilings
from _bench.layers import FastFFN, dense_ffn, moe_layer
from _bench.limit import RateProbe, Rates, Work, work_of_ffn
from _bench.memory import PeakOfTensors
from _bench.passes import FORWARD, LOSSES, TRAIN, step
from _bench.timing import DEVICE, interleave

on_cpu = pytest.mark.skipif(DEVICE != 'cpu', reason='numbers of the CPU')


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Little is copied and multiplied."""
    monkeypatch.setattr(limit, 'STREAM_ELEMENTS', 1024)
    monkeypatch.setattr(ceilings, 'COPIED_ELEMENTS', 1024)
    monkeypatch.setattr(ceilings, 'PRODUCT_SIDE', 8)


def test_interleave_takes_turns(monkeypatch):
    monkeypatch.setattr(timing, 'WARM_UP', 1)
    seen = []
    times = {'a': iter([9, 1, 7, 3]), 'b': iter([9, 10, 20, 60])}
    monkeypatch.setattr(timing, 'seconds_of',
                        lambda run: run() or next(times[seen[-1]]))
    steps = {name: partial(seen.append, name) for name in times}
    assert interleave(steps, 3) == {'a': 3, 'b': 20}
    turns = [''.join(seen[start:start + 2]) for start in range(0, 8, 2)]
    assert set(turns) == {'ab', 'ba'}  # each in every turn, in both orders


# T = 5, D = 2, H = 8, E = 3, R = 1
@pytest.mark.parametrize('mode, options, flops, elements', [
    # 4 * 5 * 2 * 8; 32 weights, 80 hidden, 20 in and out
    (FORWARD, {}, 320, 132),
    # three times; 96 weights, 80 + 120 hidden, 20 + 30
    (TRAIN, {}, 960, 346),
    # 2 * 5 * 2 * 3 of the router; 3 * 32 weights, 80, 6 * 10
    (FORWARD, dict(experts=3, core=False), 380, 236),
    # 4 * 32 weights
    (FORWARD, dict(experts=3), 380, 268),
    (TRAIN, dict(experts=3), 1140, 3 * 128 + 200 + 130),
    # 4 * 5 * 1 * 10 more; 32 + 2 * 3 * 1 * 10 weights
    (FORWARD, dict(experts=3, rank=1), 580, 92 + 80 + 60),
])
def test_work_by_hand(mode, options, flops, elements):
    assert work_of_ffn(5, 2, 8, mode, activation_bytes=4, **options) == Work(
        flops, 4 * elements)


def test_small_activations_count_less():
    # 132 elements: 32 of weights, 100 of activations
    assert work_of_ffn(5, 2, 8, FORWARD, activation_bytes=2).bytes == (
        4 * 32 + 2 * 100)


def test_time_of_work():
    assert Work(flops=600, bytes=80).seconds(
        Rates(multiply=200, stream=40)) == 3 + 2


def test_work_of_two_experts_by_hand():
    # 2 * 320 of the FFN, 60 of the router; 3 * 32 weights, 2 * 80 hidden,
    # 2 * 10 in and out, 8 * 10 of rows
    assert work_of_ffn(5, 2, 8, FORWARD, experts=3, core=False, top_k=2,
                       activation_bytes=4) == Work(
        640 + 60, 4 * (96 + 160 + 20 + 80))
    # 5 * 80 hidden each; 4 * 10 of inputs and outputs, 18 * 10 of rows
    assert work_of_ffn(5, 2, 8, TRAIN, experts=3, core=False, top_k=2,
                       activation_bytes=4) == Work(
        3 * 700, 4 * (3 * 96 + 400 + 40 + 180))


def test_activations_are_as_small_as_the_precision():
    with precision.use('bf16'):
        small = work_of_ffn(5, 2, 8, FORWARD)
    with precision.use('fp32'):
        large = work_of_ffn(5, 2, 8, FORWARD)
    assert small == work_of_ffn(5, 2, 8, FORWARD, activation_bytes=2)
    assert large == work_of_ffn(5, 2, 8, FORWARD, activation_bytes=4)


def test_ceilings_by_hand():
    probe = Ceilings()
    assert set(probe.steps()) == {PRODUCT, COPY}
    for run in probe.steps().values():
        run()
    wanted = probe.factors[0] @ probe.factors[1]
    assert torch.equal(probe.product, wanted)
    # 2 * 8^3 operations; 1,024 elements of 4 bytes, read and written
    assert probe.rates({PRODUCT: 2., COPY: 4.}, TRAIN) == Rates(
        512., 2 * 4096 / 4)


def test_a_gpu_is_measured_by_its_ceilings(monkeypatch):
    assert isinstance(ceilings.probe_of(32, 16, 64, 4), (
        RateProbe if DEVICE == 'cpu' else Ceilings))
    monkeypatch.setattr(ceilings, 'DEVICE', 'cuda')
    monkeypatch.setattr(ceilings, 'Ceilings', lambda: 'ceilings')
    assert ceilings.probe_of(32, 16, 64, 4) == 'ceilings'


def test_precision_is_put_back():
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = precision.now(), [each.allow_tf32 for each in backends]
    with precision.use('bf16'):
        assert not any(each.allow_tf32 for each in backends)
        with precision.autocast():
            x = torch.ones(2, 2, device=DEVICE)
            assert (x @ x).dtype == torch.bfloat16
    assert before == (precision.now(),
                      [each.allow_tf32 for each in backends])


def test_tf32_is_switched_on(monkeypatch):
    monkeypatch.setattr(precision, 'DEVICE', 'cuda')
    with precision.use('tf32'):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32


def test_operators_by_hand():
    x = torch.ones(4, 6, device=DEVICE, requires_grad=True)

    def forward() -> None:
        # two views, an allocation; a product, an addition
        (x.t().view(6, 4) @ torch.empty_like(x)).add_(1)

    def backward() -> None:
        # exponential, sum; ones, expand (a view), product
        x.grad = None
        x.exp().sum().backward()

    assert counting.operators_of(forward) == 2
    assert counting.operators_of(backward) == 4
    with counting.Operators() as operators:
        int(x.detach().sum())
    assert set(operators.seen) == {'aten.sum.default',
                                   'aten._local_scalar_dense.default'}


def test_synchronisations_are_warnings_of_torch(monkeypatch):
    """The mode that warns of synchronisation, without a GPU."""
    modes = ['default']
    monkeypatch.setattr(counting, 'DEVICE', 'cuda')
    for name, stand_in in (('get_sync_debug_mode', lambda: modes[-1]),
                           ('set_sync_debug_mode', modes.append),
                           ('synchronize', lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def run() -> None:
        assert modes[-1] == 'warn'
        for text in ('called a synchronizing CUDA operation', 'another',
                     'called a synchronizing CUDA operation'):
            warnings.warn(text, stacklevel=1)

    assert counting.synchronisations_of(run) == 2
    assert modes == ['default', 'warn', 'default']


def test_losses_reach_the_router():
    """The gradient of a step with losses is more than that of one without,
    and by just the auxiliary losses' own."""
    layer = moe_layer(16, 4, losses=True, router=dict(
        type='TokenChoiceRouter', noise_std=0.))
    weight = layer.router.scorer.weight
    x = torch.randn(32, 16, device=DEVICE, requires_grad=True)
    step(layer, x, LOSSES)()
    assert layer.losses is None  # no longer collected
    found = weight.grad.clone()
    weights, layer.router.loss_weights = layer.router.loss_weights, {}
    step(layer, x, TRAIN)()
    task = weight.grad.clone()
    layer.router.loss_weights = weights
    own, = torch.autograd.grad(
        sum(layer.router(x).losses.values()), weight)
    assert own.abs().max() > 0
    torch.testing.assert_close(found, task + own)


def test_rates_by_hand():
    probe = RateProbe(rows=5, dim=2, hidden=8, times=3)
    assert probe.flops == 160
    assert len(probe.steps()) == 1 + 4 * 2
    seconds = {('stream', ): 2.}
    for name, torch_s, rmoe_s in (('fc1', 4, 1), ('fc2', 2, 3),
                                  ('fc1 weight', 5, 9),
                                  ('fc2 weight', 6, 7)):
        seconds[name, 'torch'], seconds[name, 'rmoe'] = torch_s, rmoe_s
    # 1 and 2 seconds are the best of the forward's; backward adds the same
    # shapes again, and 5 and 6 for the weights
    assert probe.rates(seconds, FORWARD) == Rates(
        2 * 3 * 160 / 3, 2 * 4 * 1024 / 2)
    assert probe.rates(seconds, TRAIN).multiply == 6 * 3 * 160 / (6 + 11)


def test_products_of_the_probe_have_the_shapes_of_the_layer():
    """(N, I) times (O, I) transposed, all of 2 N I O operations."""
    probe = RateProbe(rows=5, dim=2, hidden=8, times=1)
    for left, right in probe.shapes.values():
        assert left[1] == right[1]
        assert 2 * left[0] * left[1] * right[0] == probe.flops


@on_cpu
def test_same_products_compute_the_same():
    ffn = dense_ffn(16)
    found = {}
    for model in (ffn, FastFFN(ffn)):
        x = torch.randn(6, 16, generator=torch.manual_seed(1)
                        ).requires_grad_()
        ffn.zero_grad()
        y = model(x)
        y.square().sum().backward()
        found[model] = [y, x.grad, *(p.grad for p in ffn.parameters())]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_step_in_training_gives_fresh_gradients():
    layer = moe_layer(8, 2)
    x = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    layer.router.noise_std = 0.
    run = step(layer, x, TRAIN)
    run()
    assert layer.training
    first = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    run()
    again = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(map(torch.equal, first, again))
    step(layer, x, FORWARD)()
    assert not layer.training and torch.equal(x.grad, first[0])


@on_cpu
def test_peak_of_tensors_by_hand():
    linear = torch.nn.Linear(1000, 2000)
    x = torch.randn(500, 1000)
    with PeakOfTensors() as peak:
        y = linear(x)  # 500 * 2000
        # + 500 * 2000 of ones, 2000 * 1000 and 2000 of gradients
        y.backward(torch.ones_like(y))
    assert peak.bytes == 4 * (1_000_000 + 1_000_000 + 2_000_000 + 2000)


@on_cpu
def test_peak_of_tensors_counts_what_is_released():
    with PeakOfTensors() as peak:
        torch.zeros(1500)  # released at once
        held = torch.zeros(1000)
        torch.zeros(700)
    assert peak.bytes == 4 * 1700
    assert len(held) == 1000
