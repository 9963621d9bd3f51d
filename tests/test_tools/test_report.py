"""tools/report.py on work dirs that tools/train.py wrote."""
import pytest
import report
import train
from commands import command, options
from mmengine.config import Config

from rmoe.report import write

ON = 'default_hooks.report.enabled=True'


@pytest.fixture(scope='module')
def trained(work, configs):
    """A MoE model, whose hook wrote a report."""
    command(train, configs['moe'], *options(
        work, 'reported', ON, 'train_cfg.val_interval=4', 'load_from=None',
        'custom_hooks.2.interval=1'))
    return work / 'reported'


def test_the_hook_of_the_configs(trained):
    pytest.importorskip('plotly')
    page = (trained / 'report.html').read_text()
    assert '<canvas' in page and 'best mIoU' in page
    assert 'Which expert takes which class' in page
    # Nothing is missing; the one note is for browsers without scripts.
    assert page.count('class="note"') == 1
    assert page.count('data:image/jpeg') == 3  # validation images


def test_from_the_work_dir_alone(trained, tmp_path, capsys):
    pytest.importorskip('plotly')
    first = (trained / 'report.html').read_text()
    command(report, trained, '--out', tmp_path / 'again.html')
    assert f'wrote {tmp_path / "again.html"}' in capsys.readouterr().out
    # The log has grown by what the hook said in the end; pictures and
    # numbers are the same.
    assert (tmp_path / 'again.html').read_text() == first


def test_data_and_checkpoint_may_be_gone(trained, tmp_path, work):
    pytest.importorskip('plotly')
    folder = tmp_path / 'copy'
    folder.mkdir()
    for file in trained.glob('*/vis_data/*'):
        copy = folder / file.relative_to(trained)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text().replace(str(work / 'scenes'),
                                                 str(tmp_path / 'gone')))
    command(report, folder, '--images', 1)
    page = (folder / 'report.html').read_text()
    assert 'the work dir has no checkpoint' in page
    (folder / 'iter_4.pth').write_bytes(
        (trained / 'iter_4.pth').read_bytes())
    command(report, folder)
    page = (folder / 'report.html').read_text()
    assert 'FileNotFoundError' in page and str(tmp_path / 'gone') in page
    assert 'Load of experts' in page


def test_what_is_missing_has_a_command(trained, monkeypatch):
    monkeypatch.setattr(write, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='python -m pip install plotly'):
        command(report, trained)


def test_no_work_dir(tmp_path):
    pytest.importorskip('plotly')
    with pytest.raises(SystemExit, match='nowhere is no folder'):
        command(report, tmp_path / 'nowhere')


def test_every_runtime_has_the_hook(configs):
    for name in configs.values():
        assert Config.fromfile(name).default_hooks.report.type == (
            'rmoe.ReportHook')
