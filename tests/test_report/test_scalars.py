"""Numbers of a run from its scalars.json, worked out by hand."""
from run_folder import DENSE, LAYER, MOE, load_line, train_line, write_run

from rmoe.report.scalars import read_scalars


def read(folder, epoch_length=None):
    return read_scalars(sorted(folder.glob('*/vis_data/scalars.json')),
                        epoch_length)


def test_each_number_is_where_it_belongs(tmp_path):
    found = read(write_run(tmp_path))
    assert found.scores == dict(mIoU={20: 50., 60: 49.},
                                aAcc={20: 80., 60: 81.})
    assert found.train['time'] == {20: .5, 40: .5, 60: .5}
    assert set(found.layers) == {LAYER}
    assert found.layers[LAYER]['load_0'] == {40: .5, 60: .25}
    assert found.layers[LAYER]['load_3'] == {40: 0., 60: .25}
    assert found.layers[LAYER]['dropped'] == {40: .125, 60: .125}
    assert found.last_iteration() == 60


def test_the_loss_of_the_task_is_without_auxiliary_losses(tmp_path):
    found = read(write_run(tmp_path / 'moe'))
    assert found.task_loss() == {20: .875, 40: .5, 60: .375}
    assert set(found.losses()) == {'loss_moe_load'}
    assert read(write_run(tmp_path / 'dense', DENSE)).task_loss() == {
        20: .9, 40: .6, 60: .5}


def test_a_resumed_run_takes_the_place_of_what_it_did_again(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, [load_line(40, .4, .4, .1, .1), train_line(40, .7)],
              start='20300102_000000')
    found = read(tmp_path)
    assert found.train['loss'] == {20: 1., 40: .7}
    assert found.layers[LAYER]['load_0'] == {40: .4}
    assert found.scores['mIoU'] == {20: 50.}
    assert found.last_iteration() == 40


def test_a_run_that_began_anew_has_nothing_of_the_first(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, DENSE[:1], start='20300102_000000')
    found = read(tmp_path)
    assert found.train['loss'] == {20: .9}
    assert not any(found.scores.values())
    assert not any(found.layers[LAYER].values())


def test_validation_by_epoch_is_put_at_its_iteration(tmp_path):
    lines = [train_line(8, 2., epoch=1), dict(mAP=.1, step=1),
             train_line(18, 1., epoch=2), dict(mAP=.2, step=2)]
    write_run(tmp_path, lines)
    assert read(tmp_path, 10).scores['mAP'] == {10: .1, 20: .2}
    # Nobody knows how long an epoch is: the last iteration that was logged.
    assert read(tmp_path).scores['mAP'] == {8: .1, 18: .2}


def test_what_a_kill_or_a_test_left_does_no_harm(tmp_path):
    write_run(tmp_path)
    file, = tmp_path.glob('*/vis_data/scalars.json')
    file.write_text(file.read_text() + '{"loss": 1.0, "st')
    # a validation without training
    write_run(tmp_path, [dict(mIoU=1., step=0)], start='20300102_000000')
    whole = write_run(tmp_path / 'whole', MOE)
    assert read(tmp_path) == read(whole)
