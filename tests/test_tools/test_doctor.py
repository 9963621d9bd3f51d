"""tools/doctor.py: faked installations, and two real runs."""
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import bootstrap
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
    modules=frozenset(doctor.LOOKED_FOR), errors={}, compiler='g++',
    compiler_version='g++ 12.2.0', standards=frozenset({'c++17', 'c++20'}),
    gpu='', executable='/env/bin/python')
FORKED = replace(
    GOOD, versions=VERSIONS | {'mmcv': '2.3.3'},
    owners={name: (fork,) for name, fork in doctor.FORK.items()})
PIP = '/env/bin/python -m pip'
NO_OPS = {'mmcv._ext': "ModuleNotFoundError: No module named 'mmcv._ext'"}
WRAPPER = ("mkdir -p build && printf '#!/bin/sh\\nexec %s \"$@\" "
           "-std=c++20\\n' \"${CXX:-g++}\" > build/cxx "
           '&& chmod +x build/cxx')
BUILD = (f"{PIP} install 'setuptools<81' wheel ninja psutil", WRAPPER,
         'PATH=/env/bin:"$PATH" CXX="$PWD/build/cxx" MMCV_WITH_OPS=1 '
         f'{PIP} install --no-build-isolation --no-cache-dir '
         '--no-binary mmcv mmcv==2.1.0')
REBUILD = (f'{PIP} uninstall -y mmcv', *BUILD)


def without(facts: doctor.Facts, *names: str) -> doctor.Facts:
    """The facts where these packages were never installed."""
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
         f'{PIP} install -r requirements/openmmlab.txt')),
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
         f'{PIP} install -r requirements/openmmlab.txt')),
    'mmcv_and_lite': (
        replace(GOOD, owners=GOOD.owners | {'mmcv': ('mmcv', 'mmcv-lite')}),
        'mmcv and mmcv-lite both install mmcv',
        (f'{PIP} uninstall -y mmcv mmcv-lite', *BUILD)),
    'no_ops': (
        replace(GOOD, errors=NO_OPS),
        'mmcv was installed without its compiled ops', REBUILD),
    'no_ops_in_the_fork': (
        replace(FORKED, errors=NO_OPS),
        'mmcv was installed without its compiled ops',
        (f'{PIP} uninstall -y onedl-mmcv', BUILD[0], WRAPPER,
         BUILD[2].replace('mmcv mmcv==2.1.0', 'onedl-mmcv onedl-mmcv'))),
    'no_ops_older_torch': (
        replace(GOOD, errors=NO_OPS, versions=VERSIONS | {
            'torch': '2.9.1'}, standards=frozenset({'c++17'})),
        'mmcv was installed without its compiled ops',
        tuple(line.replace('c++20', 'c++17') for line in REBUILD)),
    'no_ops_no_metadata': (
        replace(GOOD, errors=NO_OPS, owners={}),
        'mmcv was installed without its compiled ops', REBUILD),
    'lite': (
        replace(GOOD, errors=NO_OPS, owners=GOOD.owners | {
            'mmcv': ('mmcv-lite',)}),
        'mmcv-lite is installed: it is mmcv without compiled ops',
        (f'{PIP} uninstall -y mmcv-lite', *BUILD)),
    'ops_of_another_torch': (
        replace(GOOD, errors={'mmcv._ext': 'ImportError: undefined symbol'}),
        "mmcv's compiled ops do not import: ImportError: undefined symbol",
        REBUILD),
    'no_libgl': (
        replace(GOOD, errors={'mmcv._ext': 'ImportError: libGL.so.1: no'}),
        'OpenCV does not import: ImportError: libGL.so.1',
        (f'{PIP} install --force-reinstall --no-deps '
         'opencv-python-headless',)),
    'mmcv_too_new': (
        replace(GOOD, versions=VERSIONS | {'mmcv': '2.2.0'}),
        'mmdet 3.3.0 and mmsegmentation 1.2.2 refuse mmcv 2.2.0', REBUILD),
    'mmcv_too_old': (
        replace(GOOD, versions=VERSIONS | {'mmcv': '1.7.2'}),
        'refuse mmcv 1.7.2', REBUILD),
    'mmcv_of_the_fork_under_original_frameworks': (
        replace(FORKED, owners=GOOD.owners | {'mmcv': ('onedl-mmcv',)}),
        'refuse mmcv 2.3.3', (f'{PIP} uninstall -y onedl-mmcv', *BUILD)),
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
                              'mmcv._ext': 'OSError: libcudart'}),
        'import torch fails: OSError: libcudart',
        (f'{PIP} install --force-reinstall torch torchvision',)),
    'rmoe_broken': (
        replace(GOOD, errors={'rmoe': 'ImportError: half'}),
        'import rmoe fails: ImportError: half', (f'{PIP} install -e .',)),
    'rmoe_missing': (
        without(GOOD, 'rmoe'), 'not installed: rmoe',
        ('make env && .venv/bin/python tools/doctor.py',
         '# or, for the Python this was run with:',
         f"{PIP} install -e '.[openmmlab]'")),
    'no_openmmlab': (
        replace(without(GOOD, *doctor.FORK), errors=NO_OPS),
        'not installed: mmengine, mmcv, mmdet, mmseg',
        ('make env && .venv/bin/python tools/doctor.py',
         '# or, for the Python this was run with:',
         *BUILD, f"{PIP} install -e '.[openmmlab]'")),
    'part_of_the_fork': (
        without(FORKED, 'mmdet', 'mmseg'), 'not installed: mmdet, mmseg',
        ('make env && .venv/bin/python tools/doctor.py',
         '# or, for the Python this was run with:',
         f'{PIP} install -e . onedl-mmdetection onedl-mmsegmentation')),
    'mmcv_of_the_fork_missing': (
        replace(without(FORKED, 'mmcv'), errors=NO_OPS),
        'not installed: mmcv',
        ('make env && .venv/bin/python tools/doctor.py',
         '# or, for the Python this was run with:', BUILD[0], WRAPPER,
         BUILD[2].replace('mmcv mmcv==2.1.0', 'onedl-mmcv onedl-mmcv'),
         f'{PIP} install -e .')),
    'no_torch': (
        without(GOOD, 'torch', 'torchvision'),
        'not installed: torch, torchvision',
        ('make env && .venv/bin/python tools/doctor.py',
         '# or, for the Python this was run with:',
         f'{PIP} install torch torchvision',
         f"{PIP} install -e '.[openmmlab]'")),
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


@pytest.mark.parametrize('compiler, standards, problem', [
    ('', set(), 'and none was found'),
    ('g++-9', {'c++17'}, 'and g++-9 is none')])
@pytest.mark.parametrize('facts', [GOOD, without(GOOD, 'mmcv')])
def test_no_compiler_for_missing_ops(facts, compiler, standards, problem,
                                     monkeypatch, capsys):
    facts = replace(facts, errors=NO_OPS, compiler=compiler,
                    standards=frozenset(standards))
    status, output = diagnose(facts, monkeypatch, capsys)
    assert status == 1
    assert f'a compiler for c++20 is needed to build mmcv {problem}' in output
    assert '    sudo apt-get install g++-12' in output
    # The compiler comes first: the build below it uses it.
    assert output.index('export CXX=g++-12') < output.index('MMCV_WITH_OPS')


@pytest.mark.parametrize('facts', [
    GOOD, FORKED, without(GOOD, 'mmdet', 'timm'),
    without(FORKED, 'pkg_resources'),
    without(GOOD, 'mmseg', 'ftfy', 'regex'),
    replace(GOOD, compiler='', compiler_version='', standards=frozenset()),
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
    assert re.search(r'compiler +g\+\+ 12.2.0 \(torch needs c\+\+20', output)
    assert re.search(r'GPU +none', output)
    _, output = diagnose(FORKED, monkeypatch, capsys)
    assert re.search(r'mmcv +2.3.3, from onedl-mmcv \(maintained fork\)',
                     output)


def test_one_remedy_for_two_problems_is_printed_once(monkeypatch, capsys):
    facts = replace(GOOD, errors=NO_OPS,
                    versions=VERSIONS | {'mmcv': '2.2.0'})
    _, output = diagnose(facts, monkeypatch, capsys)
    assert output.count('without its compiled ops') == 1
    assert output.count('refuse mmcv 2.2.0') == 1
    assert output.count('MMCV_WITH_OPS=1') == 1


def test_the_printed_wrapper_is_the_compiler_with_the_standard(tmp_path):
    """Paste the command, with a compiler that shows its arguments."""
    subprocess.run(['sh', '-c', WRAPPER], cwd=tmp_path, check=True,
                   env={'CXX': 'echo', 'PATH': '/usr/bin:/bin'})
    shown = subprocess.check_output(
        [tmp_path / 'build' / 'cxx', '-std=c++17', 'a b.cpp'], text=True)
    assert shown == '-std=c++17 a b.cpp -std=c++20\n'


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


@pytest.mark.parametrize('script, version, standards', [
    ('case "$*" in *c++20*) exit 1;; esac; echo made-up 9', 'made-up 9',
     {'c++17'}),
    ('echo what?; exit 1', '', set())])
def test_gather_asks_the_compiler(script, version, standards, tmp_path,
                                  monkeypatch):
    compiler = tmp_path / 'cxx'
    compiler.write_text(f'#!/bin/sh\n{script}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setattr(doctor, 'import_error', lambda module: '')
    facts = doctor.gather()
    assert facts.compiler == str(compiler)
    assert facts.compiler_version == version
    assert facts.standards == standards


def test_gather_survives_a_compiler_that_is_not_there(monkeypatch):
    monkeypatch.setenv('CXX', '/no/such/compiler')
    monkeypatch.setattr(doctor, 'import_error', lambda module: '')
    facts = doctor.gather()
    assert facts.compiler_version == '' and facts.standards == set()


@pytest.mark.parametrize('available, shown', [
    (True, 'Some GPU (x2)'), (False, '')])
def test_gpu(available, shown, monkeypatch):
    cuda = SimpleNamespace(
        is_available=lambda: available, device_count=lambda: 2,
        get_device_name=lambda: 'Some GPU')
    monkeypatch.setitem(sys.modules, 'torch', SimpleNamespace(cuda=cuda))
    assert doctor.gpu() == shown


def test_it_builds_the_mmcv_that_make_builds():
    assert doctor.MMCV_VERSION == bootstrap.MMCV_VERSION


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
