"""What the log of a run says."""
from run_folder import LOG

from rmoe.report.log import StageSpan, read_logs


def read(folder, *texts):
    files = []
    for i, text in enumerate(texts):
        files.append(folder / f'{i}.log')
        files[-1].write_text(text)
    return read_logs(files)


def test_stages_versions_and_upcycling(tmp_path):
    log = read(tmp_path, LOG)
    assert log.stages == [
        StageSpan('core', 'core, head', 0, 20),
        StageSpan('joint', 'core, residual, router, head', 20, 60)]
    assert log.environment == {
        'sys.platform': 'linux', 'Python': '3.11.7 (main) [GCC 12]',
        'PyTorch': '2.9.0', 'MMEngine': '0.10.7', 'seed': '0',
        'rmoe': '0.1.0'}
    table, = log.upcycling
    assert table.splitlines()[0] == 'checkpoint of a mmseg Swin:'
    assert '  upcycled      2  ' in table and len(table.splitlines()) == 3
    assert log.epoch_length is None


def test_a_resumed_run_keeps_earlier_stages_and_the_first_load(tmp_path):
    head, _, tail = LOG.partition("2030/01/01 00:00:02 - mmengine - INFO - "
                                  "stage 'core'")
    resumed = (head + '2030/01/02 00:00:00 - mmengine - INFO - resumed epoch: '
               '0, iter: 30\n' + tail[tail.index('2030'):])
    resumed = resumed.replace('PyTorch: 2.9.0', 'PyTorch: 2.9.1')
    log = read(tmp_path, LOG, resumed)
    assert [stage.name for stage in log.stages] == ['core', 'joint']
    assert len(log.upcycling) == 1
    assert log.environment['PyTorch'] == '2.9.1'


def test_a_run_that_began_anew_has_nothing_of_the_first(tmp_path):
    log = read(tmp_path, LOG, '2030/01/02 00:00:00 - mmengine - INFO - x\n')
    assert not (log.stages or log.upcycling or log.environment)


def test_the_length_of_an_epoch(tmp_path):
    assert read(tmp_path, '2030/01/01 00:00:00 - mmengine - INFO - '
                'Epoch(train)  [1][ 50/51]  lr: 1.0\n').epoch_length == 51
