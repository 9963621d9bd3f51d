"""python -m rmoe.mmcv_ops, and how the stand-in is found."""
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from rmoe.mmcv_ops import __main__ as command
from rmoe.mmcv_ops.finder import ExtensionFinder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mmcv(tmp_path):
    """A package of that name without operators."""
    folder = tmp_path / 'mmcv'
    folder.mkdir()
    (folder / '__init__.py').touch()
    return folder


def run(folder, code):
    """In a process that finds this mmcv first."""
    return subprocess.run(
        [sys.executable, *code], text=True, capture_output=True,
        cwd=folder.parent, env={'PYTHONPATH': f'{folder.parent}:{ROOT}'})


def operators(folder, before=''):
    """Where ``mmcv._ext`` comes from; '' if there is none."""
    done = run(folder, ['-c', f'{before}\nimport mmcv._ext as ext\n'
                        'assert callable(ext.nms)\nprint(ext.__file__)'])
    return done.stdout.strip()


def test_add_and_remove(mmcv):
    file = mmcv / '_ext.py'
    status = run(mmcv, ['-m', 'rmoe.mmcv_ops', 'status'])
    assert status.stdout.startswith('mmcv has no operators; programs that')
    assert operators(mmcv) == ''
    done = run(mmcv, ['-m', 'rmoe.mmcv_ops', 'add'])
    assert done.stdout == (f'wrote {file}: mmseg and mmdet now find operators '
                           'in it\n')
    assert len(file.read_text().splitlines()) == 1
    # Also in a program that knows nothing of rmoe, with every name.
    assert operators(mmcv) == str(file)
    assert 'carafe_forward is compiled' in run(
        mmcv, ['-c', 'import mmcv._ext; mmcv._ext.carafe_forward()']).stderr
    assert 'is there already' in command.add(mmcv)
    assert str(file) in command.status(mmcv)
    assert command.remove(mmcv) == f'removed {file}'
    assert sorted(path.name for path in mmcv.iterdir()) == [
        '__init__.py', '__pycache__']
    assert 'nothing to remove' in command.remove(mmcv)


def test_import_rmoe_is_enough(mmcv):
    assert operators(mmcv, 'import rmoe') == str(
        ROOT / 'rmoe/mmcv_ops/extension.py')


@pytest.mark.parametrize('suffix', ['.py', EXTENSION_SUFFIXES[0]])
def test_what_mmcv_has_is_used(mmcv, suffix):
    """Also where it is broken: another torch's operators are an error."""
    (mmcv / f'_ext{suffix}').write_text('def nms(): pass')
    found = operators(mmcv, 'import rmoe')
    assert found == (str(mmcv / '_ext.py') if suffix == '.py' else '')


def test_compiled_operators_need_no_file(mmcv):
    compiled = mmcv / f'_ext{EXTENSION_SUFFIXES[0]}'
    compiled.touch()
    with pytest.raises(ValueError, match='mmcv has its own operators'):
        command.add(mmcv)
    assert str(compiled) in command.status(mmcv)


@pytest.mark.parametrize('action', [command.add, command.remove,
                                    command.status])
def test_another_librarys_file_is_left_alone(mmcv, action):
    (mmcv / '_ext.py').write_text('nms = None\n')
    with pytest.raises(ValueError, match=r'_ext\.py was not written by'):
        action(mmcv)
    assert (mmcv / '_ext.py').read_text() == 'nms = None\n'


def test_a_folder_that_cannot_be_written_gets_nothing(mmcv, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'write_text', refuse)
    with pytest.raises(ValueError, match=r'cannot be written.*Import rmoe bef'):
        command.add(mmcv)
    assert os.listdir(mmcv) == ['__init__.py']


def test_no_mmcv_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', 'import importlib.util as u\n'
         'from rmoe.mmcv_ops import __main__ as m\n'
         'm.find_spec = lambda name: None\nimport sys\n'
         'sys.argv = ["mmcv_ops", "add"]\nm.main()'], text=True,
        capture_output=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: {sys.executable} has no mmcv')


def test_installing_twice_adds_one_finder():
    from rmoe.mmcv_ops import finder
    finder.install()
    finder.install()
    assert sum(isinstance(one, ExtensionFinder)
               for one in sys.meta_path) == 1
