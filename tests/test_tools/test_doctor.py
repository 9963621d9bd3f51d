"""tools/doctor.py: faked installations, and two real runs."""
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import doctor
import pytest

DOCTOR = Path(doctor.__file__)
VERSIONS = {
    'python': '3.11.4', 'torch': '2.14.1+cpu', 'torchvision': '0.29.1',
    'timm': '1.0.29', 'numpy': '2.4.6', 'mmengine': '0.10.7',
    'mmcv': '2.1.0', 'mmdet': '3.3.0', 'mmseg': '1.2.2', 'rmoe': '0.1.0',
    'setuptools': '80.10.2'}
GOOD = doctor.Facts(
    versions=VERSIONS,
    owners={'mmengine': ('mmengine',), 'mmcv': ('mmcv',),
            'mmdet': ('mmdet',), 'mmseg': ('mmsegmentation',)},
    modules=frozenset(doctor.LOOKED_FOR), errors={}, stand_in='',
    stand_in_of_rmoe=False, read_only=False, gpu='',
    executable='/env/bin/python')
FORKED = replace(
    GOOD, versions=VERSIONS | {'mmcv': '2.3.3'},
    owners={name: (fork,) for name, fork in doctor.FORK.items()})
PIP = '/env/bin/python -m pip'
ENVIRONMENT = ('make env && .venv/bin/python tools/doctor.py',
               '# or, for the Python this was run with:')
NO_OPS = {'mmcv._ext': "ModuleNotFoundError: No module named 'mmcv._ext'"}
LITE = replace(GOOD, errors=NO_OPS, owners=GOOD.owners | {
    'mmcv': ('mmcv-lite',)})
BROKEN = {'mmcv._ext': 'ImportError: undefined symbol'}
REPLACE_MMCV = (f'{PIP} uninstall -y mmcv', f'{PIP} install mmcv-lite==2.1.0')
STAND_IN = '/env/lib/mmcv/_ext.py'
NO_NMS = {'torchvision': 'AttributeError: no operator torchvision::nms'}


def without(facts: doctor.Facts, *names: str) -> doctor.Facts:
    """The facts of an installation without these packages."""
    return replace(
        facts, modules=facts.modules - set(names),
        versions={k: v for k, v in facts.versions.items() if k not in names},
        owners={k: v for k, v in facts.owners.items() if k not in names})


def diagnose(facts: doctor.Facts, monkeypatch: pytest.MonkeyPatch,
             capsys: pytest.CaptureFixture) -> tuple[int, str]:
    monkeypatch.setattr(doctor, 'gather', lambda: facts)
    return doctor.main(), capsys.readouterr().out


# Each: the facts, what must be said, and the commands that must follow it.
PROBLEMS = {
    'two_owners': (
        replace(GOOD, owners=GOOD.owners | {
            'mmengine': ('mmengine', 'onedl-mmengine')}),
        'mmengine and onedl-mmengine both install mmengine',
        (f'{PIP} uninstall -y mmengine onedl-mmengine',
         f'{PIP} install mmengine==0.10.7')),
    'two_owners_in_the_fork': (
        replace(FORKED, owners=FORKED.owners | {
            'mmengine': ('mmengine', 'onedl-mmengine')}),
        'mmengine and onedl-mmengine both install mmengine',
        (f'{PIP} uninstall -y mmengine onedl-mmengine',
         f'{PIP} install onedl-mmengine')),
    'two_detectors_of_two_families': (
        replace(GOOD, owners=GOOD.owners | {
            'mmdet': ('mmdet', 'onedl-mmdetection')}),
        'mmdet and onedl-mmdetection both install mmdet',
        (f'{PIP} uninstall -y mmdet onedl-mmdetection',
         f'{PIP} install mmdet==3.3.0')),
    'mmcv_and_lite': (
        replace(GOOD, owners=GOOD.owners | {'mmcv': ('mmcv', 'mmcv-lite')}),
        'mmcv and mmcv-lite both install mmcv',
        (f'{PIP} uninstall -y mmcv mmcv-lite',
         f'{PIP} install mmcv-lite==2.1.0')),
    'ops_of_another_torch': (
        replace(GOOD, errors=BROKEN),
        "mmcv's compiled ops do not import: ImportError: undefined symbol",
        REPLACE_MMCV),
    'ops_of_another_torch_in_the_fork': (
        replace(FORKED, errors=BROKEN), "mmcv's compiled ops do not import",
        (f'{PIP} uninstall -y onedl-mmcv', f'{PIP} install onedl-mmcv')),
    'ops_of_another_torch_no_metadata': (
        replace(GOOD, errors=BROKEN, owners={}),
        "mmcv's compiled ops do not import", REPLACE_MMCV),
    'a_stand_in_of_another_library': (
        replace(LITE, errors={}, stand_in=STAND_IN),
        f"{STAND_IN} stands in for mmcv's operators and is not that of rmoe",
        (f'rm {STAND_IN}', '/env/bin/python -m rmoe.mmcv_ops status')),
    'torch_too_old': (
        replace(GOOD, versions=VERSIONS | {
            'torch': '2.0.1', 'numpy': '1.26.4'}),
        'rmoe needs torch >= 2.1, this is 2.0.1',
        (f"{PIP} install 'torch>=2.1' torchvision",)),
    'numpy_too_new': (
        replace(GOOD, versions=VERSIONS | {'torch': '2.1.2'}),
        'torch 2.1.2 was compiled for numpy 1 and cannot use numpy 2.4.6',
        (f"{PIP} install 'numpy<2' 'opencv-python<4.12'",)),
    'torchvision_of_another_torch': (
        replace(GOOD, errors=NO_NMS),
        'torchvision does not fit torch 2.14.1+cpu: AttributeError',
        (f"{PIP} install --force-reinstall --no-deps "
         "'torchvision==0.29.*'",)),
    'no_libgl': (
        replace(GOOD, errors={'mmcv._ext': 'ImportError: libGL.so.1: no'}),
        'OpenCV does not import: ImportError: libGL.so.1',
        (f'{PIP} install --force-reinstall --no-deps '
         'opencv-python-headless',)),
    'mmcv_too_new': (
        replace(GOOD, versions=VERSIONS | {'mmcv': '2.2.0'}),
        'mmdet 3.3.0 and mmsegmentation 1.2.2 refuse mmcv 2.2.0',
        REPLACE_MMCV),
    'mmcv_too_old': (
        replace(GOOD, versions=VERSIONS | {'mmcv': '1.7.2'}),
        'refuse mmcv 1.7.2', REPLACE_MMCV),
    'mmcv_of_the_fork_under_original_frameworks': (
        replace(FORKED, owners=GOOD.owners | {'mmcv': ('onedl-mmcv',)}),
        'refuse mmcv 2.3.3', (f'{PIP} uninstall -y onedl-mmcv',
                              f'{PIP} install mmcv-lite==2.1.0')),
    'no_pkg_resources': (
        without(GOOD, 'pkg_resources'),
        'mmengine imports pkg_resources',
        (f"{PIP} install 'setuptools<81'",)),
    'no_ftfy': (
        without(GOOD, 'ftfy'), 'mmseg imports ftfy', (f'{PIP} install ftfy',)),
    'no_regex': (
        without(GOOD, 'regex'), 'mmseg imports regex',
        (f'{PIP} install regex',)),
    'torch_broken': (
        replace(GOOD, errors={'torch': 'OSError: libcudart',
                              'torchvision': 'OSError: libcudart',
                              'mmcv._ext': 'OSError: libcudart'}),
        'import torch fails: OSError: libcudart',
        (f'{PIP} install --force-reinstall torch torchvision',)),
    'rmoe_broken': (
        replace(GOOD, errors={'rmoe': 'ImportError: half'}),
        'import rmoe fails: ImportError: half', (f'{PIP} install -e .',)),
    'rmoe_missing': (
        without(GOOD, 'rmoe'), 'not installed: rmoe',
        (*ENVIRONMENT, f'{PIP} install -e .')),
    'no_openmmlab': (
        replace(without(GOOD, *doctor.FORK), errors=NO_OPS),
        'not installed: mmengine, mmcv, mmdet, mmseg',
        (*ENVIRONMENT, f'{PIP} install -e . mmengine==0.10.7 '
         'mmcv-lite==2.1.0 mmdet==3.3.0 mmsegmentation==1.2.2')),
    'part_of_the_fork': (
        without(FORKED, 'mmdet', 'mmseg'), 'not installed: mmdet, mmseg',
        (*ENVIRONMENT, f'{PIP} install -e . onedl-mmdetection '
         'onedl-mmsegmentation')),
    'mmcv_of_the_fork_missing': (
        replace(without(FORKED, 'mmcv'), errors=NO_OPS),
        'not installed: mmcv', (*ENVIRONMENT,
                                f'{PIP} install -e . onedl-mmcv')),
    'no_torch': (
        without(GOOD, 'torch', 'torchvision'),
        'not installed: torch, torchvision',
        (*ENVIRONMENT, f'{PIP} install torch torchvision',
         f'{PIP} install -e .')),
}


@pytest.mark.parametrize('case', PROBLEMS)
def test_a_problem_is_named_with_its_commands(case, monkeypatch, capsys):
    facts, problem, commands = PROBLEMS[case]
    status, output = diagnose(facts, monkeypatch, capsys)
    assert status == 1
    told = output.partition('Something is wrong')[2]
    assert told.count('\n!') == 1, 'one cause, one problem'
    lines = told.splitlines()
    at = next(i for i, line in enumerate(lines) if problem in line)
    assert lines[at].startswith('! ')
    assert [line.strip() for line in lines[at + 1:]] == list(commands)


def test_who_cannot_install_is_told_so_first(monkeypatch, capsys):
    facts = replace(without(GOOD, 'ftfy'), read_only=True)
    status, output = diagnose(facts, monkeypatch, capsys)
    told = output.partition('Something is wrong')[2]
    assert status == 1
    assert told.index('pip cannot write') < told.index('mmseg imports ftfy')
    assert '-m venv --system-site-packages .venv-own' in told


@pytest.mark.parametrize('facts, shown', [
    (GOOD, 'compiled, and they import'),
    (LITE, "rmoe's, where rmoe is imported before"),
    (replace(GOOD, errors=NO_OPS), "rmoe's, where rmoe is imported before"),
    (replace(FORKED, errors=NO_OPS), "rmoe's, where rmoe is imported before"),
    (replace(LITE, errors={}, stand_in=STAND_IN, stand_in_of_rmoe=True),
     f"rmoe's, for every program ({STAND_IN})")])
def test_whose_operators_serve(facts, shown, monkeypatch, capsys):
    status, output = diagnose(facts, monkeypatch, capsys)
    assert status == 0
    assert re.search(rf'^  mmcv ops +{re.escape(shown)}', output, re.M)


@pytest.mark.parametrize('facts', [
    GOOD, FORKED, without(GOOD, 'mmdet', 'timm'),
    without(FORKED, 'pkg_resources'),
    without(GOOD, 'mmseg', 'ftfy', 'regex'),
    replace(GOOD, versions=VERSIONS | {'torch': '2.1.2', 'numpy': '1.26.4'}),
    replace(GOOD, read_only=True),
    replace(GOOD, gpu='Some GPU (x2)')])
def test_nothing_wrong(facts, monkeypatch, capsys):
    status, output = diagnose(facts, monkeypatch, capsys)
    assert output.endswith('\n\nNothing is wrong.\n')
    assert status == 0


def test_the_table_tells_versions_and_families(monkeypatch, capsys):
    _, output = diagnose(GOOD, monkeypatch, capsys)
    for name, version in VERSIONS.items():
        assert re.search(rf'^  {name} +{re.escape(version)}\b', output, re.M)
    assert re.search(r'mmseg +1.2.2, from mmsegmentation \(original\)', output)
    assert re.search(r'GPU +none', output)
    _, output = diagnose(FORKED, monkeypatch, capsys)
    assert re.search(r'mmcv +2.3.3, from onedl-mmcv \(maintained fork\)',
                     output)


def test_one_remedy_for_two_problems_is_printed_once(monkeypatch, capsys):
    facts = replace(GOOD, errors=BROKEN,
                    versions=VERSIONS | {'mmcv': '2.2.0'})
    _, output = diagnose(facts, monkeypatch, capsys)
    assert output.count('compiled ops do not import') == 1
    assert output.count('refuse mmcv 2.2.0') == 1
    assert output.count(REPLACE_MMCV[1]) == 1


def test_gather_sees_two_owners_a_leftover_and_a_broken_package(
        tmp_path, monkeypatch):
    """Real metadata and files instead of faked facts."""
    for name in ('mmcv', 'MMCV_lite'):
        info = tmp_path / f'{name}-2.1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Name: {name}\nVersion: 2.1.0\n')
        (info / 'top_level.txt').write_text('mmcv\n')
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text(
        'raise RuntimeError("first\\n second")')
    (tmp_path / 'ftfy').mkdir()
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    for name in ('mmcv', 'mmcv._ext', 'ftfy'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    facts = doctor.gather()
    assert facts.owners['mmcv'] == ('mmcv', 'mmcv-lite')
    assert facts.versions['mmcv'] == '2.1.0'
    assert 'mmcv' in facts.modules and 'ftfy' not in facts.modules
    assert facts.errors['mmcv._ext'] == 'RuntimeError: first second'


@pytest.mark.parametrize('line, ours', [
    ('from rmoe.mmcv_ops.extension import *', True), ('nms = None', False)])
def test_gather_sees_whose_file_stands_in(line, ours, tmp_path, monkeypatch):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').touch()
    (tmp_path / 'mmcv/_ext.py').write_text(line)
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'mmcv', raising=False)
    monkeypatch.setattr(doctor, 'import_error', lambda module: '')
    importlib.invalidate_caches()
    facts = doctor.gather()
    assert facts.stand_in == str(tmp_path / 'mmcv/_ext.py')
    assert facts.stand_in_of_rmoe == ours
    (tmp_path / 'mmcv/_ext.cpython-311-x86_64-linux-gnu.so').touch()
    assert doctor.gather().stand_in == ''


@pytest.mark.parametrize('available, shown', [
    (True, 'Some GPU (x2)'), (False, '')])
def test_gpu(available, shown, monkeypatch):
    cuda = SimpleNamespace(
        is_available=lambda: available, device_count=lambda: 2,
        get_device_name=lambda: 'Some GPU')
    monkeypatch.setitem(sys.modules, 'torch', SimpleNamespace(cuda=cuda))
    assert doctor.gpu() == shown


def test_real_run():
    done = subprocess.run([sys.executable, DOCTOR], text=True,
                          capture_output=True)
    assert done.stderr == '' and done.returncode in (0, 1)
    assert ('Nothing is wrong.' in done.stdout) == (done.returncode == 0)
    rows = dict(line[2:].split(maxsplit=1)
                for line in done.stdout.splitlines()[:11])
    assert list(rows) == ['python', *doctor.SHOWN][:11]
    for package in ('torch', 'mmcv', 'numpy'):
        try:
            expected = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        assert rows[package].startswith(expected)


def test_bare_interpreter():
    done = subprocess.run([sys.executable, '-I', '-S', DOCTOR], text=True,
                          capture_output=True)
    assert done.returncode == 1 and done.stderr == ''
    assert '! not installed: torch, torchvision, mmengine' in done.stdout
    assert '    make env && .venv/bin/python tools/doctor.py' in done.stdout
    assert '\033' not in done.stdout
