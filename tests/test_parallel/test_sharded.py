"""However parameters are laid out over ranks, they learn the same."""
import pytest
import torch
from routers import ROUTERS
from sharded_ranks import LAYOUTS, train_alone, train_sharded
from two_ranks import run_two_ranks

pytestmark = pytest.mark.torch('2.6')
ALL = tuple(LAYOUTS)
CASES = {
    name: dict(model=dict(router=dict(router)), layouts=('both', ))
    for name, router in ROUTERS.items()}
CASES |= {
    'no core': dict(model=dict(router=ROUTERS['token choice'], core=False),
                    layouts=('sharded', 'both')),
    'low rank': dict(model=dict(router=ROUTERS['token choice'], rank=2),
                     layouts=('sharded', 'both')),
    'collapsed': dict(model=dict(router=ROUTERS['token choice']),
                      collapsed=True, layouts=ALL),
    'padded': dict(model=dict(router=ROUTERS['token choice, capacity']),
                   padded=True, layouts=ALL),
    'recomputed': dict(model=dict(router=ROUTERS['token choice k=2'],
                                  with_cp=True), layouts=ALL),
}


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return run_two_ranks(train_sharded, str(tmp_path_factory.mktemp('ranks')),
                         CASES)


def close(one, other, what, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=tolerance, rtol=tolerance,
            msg=lambda text, name=name: f'{what} {name}: {text}')


@pytest.mark.parametrize('name', CASES)
def test_ranks_learn_what_one_process_does(ranks, name):
    alone = train_alone(CASES[name], 2, joined=False)
    for layout in CASES[name]['layouts']:
        first, second = (rank[name, layout] for rank in ranks)
        mean = [sum(pair) / 2 for pair in zip(first['losses'],
                                              second['losses'])]
        assert mean == pytest.approx(alone['losses'], abs=1e-5)
        for result in (first, second):
            close(result['grads'], alone['grads'], (layout, 'gradient'))
            assert result['norms'] == pytest.approx(alone['norms'], abs=1e-4)
            close(result['weights'], alone['weights'], (layout, 'weight'))
