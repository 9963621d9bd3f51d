"""Tables of runs side by side."""
import pytest
from run_folder import DENSE, LOG, cost, dense_and_moe, write_run

from rmoe.report.tables import (
    backbone_table,
    cost_table,
    count,
    dense_twin_of,
    main_scores,
    operations,
    score_table,
    seconds,
    size,
    stage_table,
)
from rmoe.report.work_dir import read_runs


@pytest.fixture
def runs(tmp_path):
    return read_runs(dense_and_moe(tmp_path))


def test_scores(runs):
    table = score_table(runs)
    assert table.head == ('', 'moe', 'dense')
    assert table.rows == (
        ('mIoU', '49', '40'), ('aAcc', '81', '80'),
        ('at iteration', '60', '60'), ('best mIoU', '50', '40'),
        ('at iteration', '20', '60'), ('last loss of the task', '0.375',
                                       '0.5'))
    assert main_scores(runs) == ['mIoU']


def test_the_best_score_is_a_number(tmp_path):
    nan = dict(mIoU=float('nan'), step=60)
    run, = read_runs([write_run(tmp_path, [
        dict(mIoU=3., step=20), dict(mIoU=3., step=40), nan])])
    rows = [row[1] for row in score_table([run]).rows]
    assert rows == ['nan', '60', '3', '40', '-']


def test_costs_are_compared_with_the_dense_run(runs):
    rows = dict((row[0], row[1:]) for row in cost_table(runs).rows)
    assert rows['seconds of training'] == ('0:02:30 (1.50x)', '0:01:40')
    assert rows['seconds with validation and saving'] == (
        '0:02:50 (1.42x)', '0:02:00')
    assert rows['operations per image'] == ('1 MFLOP', '1 MFLOP')
    assert rows['peak memory'] == ('3.00 GB (1.00x)', '3.00 GB')
    assert rows['trainable parameters, at the end'] == ('5,000', '5,000')
    assert rows['ranks'] == ('2', '2')
    assert dense_twin_of(runs) is runs[1]


def test_a_run_alone_and_a_run_without_costs(runs, tmp_path):
    assert dense_twin_of(runs[1:]) is None
    alone = cost_table(runs[1:]).rows
    assert alone[0] == ('seconds of training', '0:01:40')
    run, = read_runs([write_run(tmp_path / 'bare', DENSE)])
    assert all(row[1] == '-' for row in cost_table([run]).rows)


def test_stages_have_the_names_of_the_log(runs, tmp_path):
    table = stage_table(runs[0])
    assert table.head == ('', 'core', 'joint')
    rows = dict((row[0], row[1:]) for row in table.rows)
    assert rows['iterations'] == ('20', '40')
    assert rows['operations'] == ('40 MFLOP', '80 MFLOP')
    assert rows['MoE layers that route'] == ('0', '1')
    assert stage_table(runs[1]) is None, 'all of it is one'
    # The log has other stages than the costs.
    one = LOG[:LOG.index("2030/01/01 00:00:09")]
    run, = read_runs([write_run(tmp_path / 'x', log=one, costs=cost(1))])
    assert stage_table(run).head == ('', 'part 1', 'part 2')


def test_a_backbone_beside_its_twin():
    # Imports the libraries of models.
    from rmoe.moe.complexity import Complexity
    from rmoe.report.experts import Experts
    assert backbone_table(Experts()) is None
    table = backbone_table(Experts(costs={
        'this model': Complexity(3000, 1100, 2_200_000_000),
        'dense twin': Complexity(1000, 1000, 2_000_000_000)}))
    assert table.rows == (
        ('parameters', '3,000', '1,000', '3.000'),
        ('of these, active for a token', '1,100', '1,000', '1.100'),
        ('operations of a forward pass', '2.2 GFLOP', '2 GFLOP', '1.100'))


def test_numbers_as_text():
    assert [seconds(value) for value in (0, 59.6, 3725)] == [
        '0:00:00', '0:01:00', '1:02:05']
    assert count(1234567) == '1,234,567'
    assert operations(1.5e15) == '1.5 PFLOP'
    assert [size(value) for value in (2_670_000_000, 109_867_505)] == [
        '2.67 GB', '109.9 MB']
