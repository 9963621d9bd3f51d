"""However parameters are laid out over ranks, they learn the same."""
import pytest
import torch
from routers import ROUTERS
from sharded_ranks import (
    average_whole_gradients,
    batch,
    build,
    compute_in_bfloat16,
    evaluate,
    refuse_optimizers,
    train_alone,
    train_sharded,
)
from torch import nn
from two_ranks import run_ranks, run_two_ranks

pytestmark = pytest.mark.torch('2.8')
OF_TWO = ('sharded', 'experts', 'both', 'copies')
OF_FOUR = (*OF_TWO, 'two copies', 'two copies of both', 'an expert each')
ONE = ROUTERS['token choice']
# One process computes all ranks' images at once.
CASES = {name: dict(model=dict(router=router), layouts=('both', ))
         for name, router in ROUTERS.items()}
CASES |= {
    'no core': dict(model=dict(router=ONE, core=False), layouts=('both', )),
    'low rank': dict(model=dict(router=ONE, rank=2), layouts=('both', )),
    # Rank 1 sends away all its tokens, and gets none.
    'collapsed': dict(model=dict(router=ONE), collapsed=True, layouts=OF_TWO),
    'recomputed': dict(model=dict(router=ROUTERS['token choice k=2'],
                                  with_cp=True), layouts=('sharded', 'both')),
    'unrouted': dict(model=dict(router=ROUTERS['token choice, capacity'],
                                unrouted='zero'), layouts=('both', )),
}
for name in ('token choice', 'token choice, capacity', 'expert choice',
             'sparse expert choice', 'soft', 'collapsed'):
    CASES[f'{name} on an accelerator'] = dict(
        CASES[name], accelerated=True, layouts=('both', ))
# These look at all tokens of a process: one process takes turns.
IN_TURNS = {
    f'{name}, balanced': dict(model=dict(router=ROUTERS[name]), balanced=True,
                              layouts=('sharded', 'both'))
    for name in ('token choice k=2', 'token choice, capacity', 'cosine')}
IN_TURNS['padded'] = dict(
    model=dict(router=ROUTERS['token choice, capacity']), padded=True,
    layouts=('sharded', 'both'))
ALL = CASES | IN_TURNS


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    return run_two_ranks(train_sharded, str(tmp_path_factory.mktemp('two')),
                         ALL)


def close(one, other, what, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=tolerance, rtol=tolerance,
            msg=lambda text, name=name: f'{what} {name}: {text}')


def check(ranks, name, layouts):
    alone = train_alone(ALL[name], len(ranks), joined=name in CASES)
    for layout in layouts:
        results = [rank[name, layout] for rank in ranks]
        losses = torch.tensor([one['losses'] for one in results]).mean(0)
        assert losses.tolist() == pytest.approx(alone['losses'], abs=1e-5)
        for result in results:
            close(result['grads'], alone['grads'], (layout, 'gradient'))
            assert result['norms'] == pytest.approx(alone['norms'], abs=1e-4)
            close(result['weights'], alone['weights'], (layout, 'weight'))


@pytest.mark.parametrize('name', ALL)
def test_two_ranks_learn_what_one_process_does(two, name):
    check(two, name, ALL[name]['layouts'])


@pytest.mark.slow
def test_four_ranks_learn_what_one_process_does(tmp_path):
    cases = {name: dict(case, layouts=('two copies of both', ))
             for name, case in ALL.items()}
    for name in ('collapsed', 'padded', 'token choice k=2, balanced'):
        cases[name]['layouts'] = OF_FOUR
    ranks = run_ranks(4, train_sharded, str(tmp_path), cases)
    for name, case in cases.items():
        check(ranks, name, case['layouts'])


def test_each_rank_keeps_its_part(two):
    model = build(ONE)
    size = {name: parameter.numel()
            for name, parameter in model.named_parameters()}
    experts = sum(count for name, count in size.items() if 'residual' in name)
    rest = sum(size.values()) - experts
    kept = {layout: [rank['collapsed', layout]['local'] for rank in two]
            for layout in OF_TWO}
    assert kept['copies'] == [experts + rest] * 2
    assert kept['experts'] == [experts // 2 + rest] * 2
    for layout in ('sharded', 'both'):
        assert sum(kept[layout]) == experts + rest
        # A bias of three is cut in two and one.
        assert max(kept[layout]) - min(kept[layout]) < .02 * rest


def test_evaluation_waits_for_nobody(tmp_path):
    layouts = ('sharded', 'experts', 'both')
    model = build(dict(type='TokenChoiceRouter', top_k=2))
    model.head = nn.Sequential(nn.BatchNorm2d(16), model.head)
    model.eval()
    ranks = run_two_ranks(evaluate, str(tmp_path), layouts)
    total = sum(parameter.numel() for parameter in model.parameters())
    for rank, results in enumerate(ranks):
        for layout, result in results.items():
            assert len(result['maps']) == 3 - 2 * rank
            for step, map_ in enumerate(result['maps']):
                with torch.no_grad():
                    expected = model(batch(step, rank, 2)[0])
                torch.testing.assert_close(map_, expected)
            # Afterwards they are divided as before.
            assert result['local'] < .9 * total, layout


def test_blocks_compute_in_bfloat16_and_routers_do_not(tmp_path):
    ranks = run_two_ranks(compute_in_bfloat16, str(tmp_path))
    alone = train_alone(dict(model=dict(router=ONE)), 2, joined=True, steps=1)
    mean = sum(rank['loss'] for rank in ranks) / 2
    assert mean == pytest.approx(alone['losses'][0], rel=.02)
    for name, gradient in alone['grads'].items():
        for rank in ranks:
            found = rank['grads'][name]
            assert found.dtype == torch.float32
            assert (found - gradient).norm() <= .1 * gradient.norm(), name
    for name, dtypes in ranks[0]['seen'].items():
        if name.endswith(' input'):
            wanted = torch.bfloat16 if 'experts' in name else torch.float32
            assert dtypes == wanted, name
            continue
        wanted = (torch.bfloat16 if name.endswith(('qkv', 'experts'))
                  else torch.float32)
        assert set(dtypes.values()) == {wanted}, name


def test_whole_parameters_get_the_mean_gradient(tmp_path):
    """Also of a loss that one rank alone has; of two passes, the sum."""
    for found in run_two_ranks(average_whole_gradients, str(tmp_path)):
        assert found == [[12., 12.], [6., 6.]]


def test_one_kernel_takes_parameters_of_one_kind(tmp_path):
    for same, mixed in run_two_ranks(refuse_optimizers, str(tmp_path)):
        assert same == ''
        assert mixed.startswith('optimizer.fused=True takes no group of')
