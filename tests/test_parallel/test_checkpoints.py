"""Checkpoints do not depend on how parameters lie over processes."""
import pytest
import torch
from sharded_toy import PLAIN, run_jobs
from toy import ToySegmentor
from two_ranks import run_ranks, run_two_ranks

pytestmark = pytest.mark.torch('2.8')
SHARDED = dict(sharded=True)
EXPERTS = dict(expert_parallel=2)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """Weights that every training begins with."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp('start') / 'start.pth'
    torch.save(dict(state_dict=ToySegmentor(PLAIN).state_dict()), path)
    return str(path)


@pytest.fixture(scope='module')
def trained(start, tmp_path_factory):
    """Four iterations in one go: one process; two ranks, four ways."""
    folder = tmp_path_factory.mktemp('trained')
    one = run_jobs(0, folder, [dict(name='one', load_from=start)])
    ways = [
        dict(name='file', layout={}), dict(name='file-experts',
                                           layout=EXPERTS),
        dict(name='parts', layout={}, checkpoint=SHARDED),
        dict(name='parts-experts', layout=EXPERTS, checkpoint=SHARDED),
    ]
    again = [
        dict(way, name=f'again-{way["name"]}', resume=True,
             load_from=iteration_2(folder, way['name']))
        for way in ways if way['name'] in AGAIN]
    ranks = run_two_ranks(run_jobs, str(folder), [
        dict(job, load_from=job.get('load_from', start))
        for job in [*ways, *again]])
    return folder, one, ranks


def iteration_2(folder, name):
    return str(folder / name / 'iter_2') + ('.pth' if 'file' in name or
                                            name == 'one' else '')


WAYS = ('file', 'file-experts', 'parts', 'parts-experts')
AGAIN = ('file-experts', 'parts')


@pytest.mark.parametrize('way', WAYS)
def test_layouts_train_alike(trained, way):
    """What makes the comparisons below worth something."""
    _, one, ranks = trained
    for rank in ranks:
        same(rank[way]['weights'], one['one']['weights'], 1e-5)


@pytest.mark.parametrize('way', AGAIN)
def test_resume_equals_uninterrupted_to_the_bit(trained, way):
    _, _, ranks = trained
    for rank in ranks:
        whole, part = rank[way], rank[f'again-{way}']
        assert part['draws'] == whole['draws'][2:]
        same(part['weights'], whole['weights'], 0)
    # Ranks that were seeded alike.
    drawn = [rank[way]['draws'] for rank in ranks]
    assert not set(drawn[0]) & set(drawn[1])


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance,
                                   msg=lambda text, key=key: f'{key}: {text}')


def test_a_gathered_file_is_that_of_one_process(trained):
    folder, _, _ = trained
    one = torch.load(folder / 'one/iter_2.pth', weights_only=True)
    for way in ('file', 'file-experts'):
        found = torch.load(folder / way / 'iter_2.pth', weights_only=True)
        assert found.keys() == one.keys()
        assert found['meta'].keys() == one['meta'].keys()
        assert found['state_dict']._metadata == one['state_dict']._metadata
        assert list(found['state_dict']) == list(one['state_dict'])
        same(found['state_dict'], one['state_dict'], 1e-5)
        same_optimizer(found['optimizer'], one['optimizer'])
        assert found['param_schedulers'] == one['param_schedulers']
        assert [len(file['rng_state']) for file in (found, one)] == [2, 1]
        # No storage of a view is written beside it.
        for tensor in found['state_dict'].values():
            assert tensor.untyped_storage().nbytes() == (
                tensor.numel() * tensor.element_size())


def same_optimizer(found, one):
    assert found['param_groups'] == one['param_groups']
    assert found['state'].keys() == one['state'].keys()
    for index, values in one['state'].items():
        assert list(found['state'][index]) == list(values)
        same(found['state'][index], values, 1e-5)


@pytest.fixture(scope='module')
def resumed(trained, tmp_path_factory):
    """From iteration 2 of each in another layout."""
    folder, _, _ = trained
    out = tmp_path_factory.mktemp('resumed')

    def jobs(names, **options):
        return [dict(name=f'{"-".join(options["layout"] or ["dense"])}-'
                     f'of-{name}', resume=True,
                     load_from=iteration_2(folder, name), **options)
                for name in names]

    one = run_jobs(0, out, jobs(WAYS, layout=None))
    # A single process writes parts too.
    one |= run_jobs(0, out, [dict(
        jobs(['one'], layout=None, checkpoint=SHARDED)[0], name='parts-one',
        max_iters=3, interval=1)])
    at_3 = dict(resume=True, load_from=str(out / 'parts-one/iter_3'))
    ranks = run_two_ranks(run_jobs, str(out), [
        *jobs(['one', 'file-experts', 'parts-experts'], layout={}),
        *jobs(['one', 'file', 'parts'], layout=EXPERTS),
        *jobs(['parts', 'parts-experts'], layout=dict(shard=1)),
        dict(at_3, name='experts-of-parts-one', layout=EXPERTS)])
    return one, ranks


def test_one_process_resumes_what_two_wrote(trained, resumed):
    expected = trained[1]['one']['weights']
    for way in WAYS:
        found = resumed[0][f'dense-of-{way}']
        assert len(found['draws']) == 2
        same(found['weights'], expected, 1e-5)


def test_two_ranks_resume_any_layout(trained, resumed):
    expected = trained[1]['one']['weights']
    for rank in resumed[1]:
        assert len(rank) == 9
        for name, found in rank.items():
            assert not found['error'], name
            assert len(found['draws']) == (1 if 'parts-one' in name else 2)
            same(found['weights'], expected, 1e-5)
    # No two ranks go on alike where their number has changed.
    drawn = [rank['dense-of-one']['draws'] for rank in resumed[1]]
    assert not set(drawn[0]) & set(drawn[1])


@pytest.mark.slow
@pytest.mark.parametrize('sharded', [False, True])
@pytest.mark.parametrize('experts', [(2, 1, 2), (1, 2, 1)])
def test_four_two_one_two(start, tmp_path, sharded, experts):
    """From 4 ranks to 2 to 1 and to 2, two iterations each."""
    checkpoint = dict(sharded=sharded)
    whole = run_jobs(0, tmp_path, [dict(name='whole', load_from=start,
                                        max_iters=8)])['whole']
    last = start
    for i, world in enumerate((4, 2, 1, 2)):
        layout = None if world == 1 else dict(
            expert_parallel=experts[min(i, 2)],
            shard=2 if (world, experts[0]) == (4, 1) else None)
        job = dict(name=str(i), load_from=last, resume=i > 0,
                   max_iters=2 * i + 2, layout=layout, checkpoint=checkpoint)
        if world == 1:
            found = run_jobs(0, tmp_path, [job])[str(i)]
        else:
            found = run_ranks(world, run_jobs, str(tmp_path),
                              [job])[-1][str(i)]
        assert not found['error']
        last = str(tmp_path / str(i) / f'iter_{2 * i + 2}') + (
            '' if sharded else '.pth')
    same(found['weights'], whole['weights'], 1e-5)
