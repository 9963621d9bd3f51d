"""What an environment lacks is said at import, and pip replaces nothing."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmoe import compat

ROOT = Path(__file__).parents[1]
# What users have whose mmcv is compiled for its torch.
THEIRS = {'torch': '2.1.2', 'torchvision': '0.16.2', 'mmcv': '2.1.0',
          'mmengine': '0.10.4', 'mmdet': '3.2.0', 'mmsegmentation': '1.2.1'}


def python(code, **environment):
    return subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True,
        cwd=ROOT, env=environment)


def test_pip_leaves_what_is_there(tmp_path):
    """pip sees the metadata of these packages before the real ones."""
    for name, version in THEIRS.items():
        info = tmp_path / f'{name}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    report = tmp_path / 'report.json'
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--dry-run', '--no-index',
         '--no-build-isolation', '--report', report, ROOT], text=True,
        capture_output=True, env={'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    seen = subprocess.check_output(
        [sys.executable, '-m', 'pip', 'freeze', '--all'], text=True,
        env={'PYTHONPATH': str(tmp_path)})
    for name, version in THEIRS.items():
        assert f'{name}=={version}' in seen
    installed = {one['metadata']['name']
                 for one in json.loads(report.read_text())['install']}
    assert installed == {'rmoe'}


@pytest.mark.parametrize('name, module', [
    ('torch', 'rmoe'), ('mmengine', 'rmoe.backbones'),
    ('mmcv', 'rmoe.engine')])
def test_what_is_missing_is_one_error_at_import(name, module):
    done = python(
        'import importlib.util\n'
        'find = importlib.util.find_spec\n'
        f'importlib.util.find_spec = lambda n, *a: None if n == {name!r} '
        'else find(n, *a)\n'
        f'import {module}')
    assert done.returncode == 1
    assert f'ImportError: rmoe needs {name}, which' in done.stderr
    assert 'tools/doctor.py' in done.stderr.splitlines()[-1]


def test_a_torch_that_is_too_old_is_named():
    done = python('import torch; torch.__version__ = "2.0.1+cu117"\n'
                  'import rmoe.moe')
    assert done.returncode == 1
    assert ('RuntimeError: rmoe needs torch >= 2.1, this is torch '
            '2.0.1+cu117') in done.stderr


def test_importing_is_fast_and_imports_no_torch():
    done = python('import sys, time; begin = time.perf_counter(); import rmoe;'
                  'print(time.perf_counter() - begin);'
                  'assert not {"torch", "mmengine", "mmcv", "numpy"} & '
                  'set(sys.modules)')
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


def test_importing_the_packages_leaves_mmengine_as_it_is():
    done = python(
        'from mmengine.runner import checkpoint\n'
        'from mmengine.runner.checkpoint import CheckpointLoader as Loader\n'
        'before = dict(Loader._schemes), checkpoint.load_from_http\n'
        'import rmoe.backbones, rmoe.engine, rmoe.upcycling\n'
        'assert before == (dict(Loader._schemes), checkpoint.load_from_http)')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('version, release', [
    ('2.14.1+cu130', (2, 14)), ('2.1.2', (2, 1)), ('2.9.0a0+git1', (2, 9))])
def test_release(version, release):
    assert compat.release(version) == release


def test_what_torch_is_too_old_for_is_named(monkeypatch):
    monkeypatch.setitem(compat.NEEDS, 'flying', '2.10')
    monkeypatch.setitem(compat.NEEDS, 'walking', '2.5')
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    compat.require('walking')
    assert compat.has_torch('2.5') and not compat.has_torch('2.10')
    with pytest.raises(ValueError, match=r'^flying needs torch >= 2\.10, this '
                                         r'is torch 2\.5\.1: install a newer'):
        compat.require('flying')


@pytest.mark.parametrize('dtype', [torch.bfloat16])
def test_autocast_is_seen(dtype):
    assert not compat.is_autocast_enabled('cpu')
    with torch.autocast('cpu', dtype):
        assert compat.is_autocast_enabled('cpu')
        assert compat.get_autocast_dtype('cpu') == dtype


def test_attention_is_counted_as_plain_products():
    from torch.utils.flop_counter import FlopCounterMode
    query = torch.randn(1, 2, 8, 4)
    with compat.plain_attention(), FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * 2 * 2 * 8 * 8 * 4
