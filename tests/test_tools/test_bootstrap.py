"""tools/bootstrap.py, without installing anything."""
import subprocess
import sys
from pathlib import Path

import bootstrap
import pytest

ROOT = Path(bootstrap.__file__).parents[1]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project in which commands are recorded instead of run."""
    (tmp_path / 'requirements').mkdir()
    for file in (ROOT / 'requirements').glob('*.txt'):
        (tmp_path / 'requirements' / file.name).write_text(file.read_text())
    (tmp_path / 'setup.py').touch()
    monkeypatch.setattr(bootstrap, 'ROOT', tmp_path)
    monkeypatch.setattr(bootstrap, 'REQUIREMENTS', tmp_path / 'requirements')
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    ran = []

    def record(self, command, label='', env=None):
        ran.append([str(part) for part in command])
        self.venv.mkdir(exist_ok=True)

    monkeypatch.setattr(bootstrap.Setup, 'command', record)
    monkeypatch.setattr(bootstrap.Setup, 'use_headless_opencv_if_needed',
                        lambda self: None)
    return ran


def make(what):
    bootstrap.Setup(bootstrap.ENVIRONMENTS[what]).run()


def test_a_larger_environment_serves_a_smaller_one(root, commands):
    make('test')
    first = len(commands)
    assert any('dev.txt' in part for part in commands[-2])
    make('test')
    make('run')
    assert len(commands) == first
    (root / 'requirements/run.txt').write_text('timm\n')
    make('run')
    assert len(commands) > first, 'what it would install has changed'
    assert not any('dev.txt' in part for command in commands[first:]
                   for part in command)
    before = len(commands)
    make('test')
    assert len(commands) > before, 'the smaller one does not do'


def test_nothing_is_compiled(root, commands):
    for what in bootstrap.ENVIRONMENTS:
        make(what)
    assert not any('mmcv==' in part or 'wheel' == part
                   for command in commands for part in command[3:])
    installed = (root / 'requirements/mmcv.txt').read_text()
    assert 'mmcv-lite==' in installed


def test_the_site_needs_nothing_of_the_project(root, commands):
    make('docs')
    assert not any('-e' in command for command in commands)
    assert any('docs.txt' in part for part in commands[-1])


def test_each_environment_is_held_to_its_constraints(root, commands):
    make('oldest')
    for command in commands[1:]:
        assert command[command.index('-c') + 1].endswith('oldest.txt')


def test_the_first_python_that_runs_makes_the_oldest(root, monkeypatch):
    monkeypatch.setattr(bootstrap.shutil, 'which', lambda name: name)
    monkeypatch.setattr(
        bootstrap.subprocess, 'run', lambda command, **_:
        subprocess.CompletedProcess(command, '3.10' in command[0]))
    setup = bootstrap.Setup(bootstrap.ENVIRONMENTS['oldest'])
    assert setup.maker() == 'python3.11'
    monkeypatch.setattr(bootstrap.shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit, match=r'needs one of python3\.10, python3'):
        setup.maker()


@pytest.mark.parametrize('line, shown', [
    ('  Downloading torch-2.14.1-cp311-manylinux.whl (532.6 MB)',
     'downloading torch (532.6 MB),'),
    ('[12/77] c++ -MMD -MF x.o', 'compiled 12 of 77 files,'),
    ('Installing collected packages: torch', 'unpacking,'),
    ('Requirement already satisfied: numpy', '')])
def test_progress(line, shown):
    assert bootstrap.progress(line) == shown


def test_what_fails_says_what_to_do(root, capsys):
    setup = bootstrap.Setup(bootstrap.ENVIRONMENTS['run'])
    with pytest.raises(SystemExit) as error:
        setup.command([sys.executable, '-c',
                       'print("no route to the index"); raise SystemExit(1)'])
    assert 'no route to the index' in capsys.readouterr().out
    assert 'the package registry can be reached' in str(error.value)
    assert not (setup.venv / 'rmoe-ready').exists()
    assert 'no route' in setup.log.read_text()


def test_without_a_compiler_only_the_full_mmcv_is_refused(root, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(bootstrap.shutil, 'which', lambda name: None)
    setup = bootstrap.Setup(bootstrap.ENVIRONMENTS['test'])
    with pytest.raises(SystemExit, match='leave MMCV=full out'):
        setup.build_mmcv(root)
