"""Say what is wrong with an installation, and which commands fix it.

Runs on Python 3.10 and newer with the standard library only. The exit code is 1
if something is wrong.

    python tools/doctor.py
"""
import importlib
import importlib.util
import os
import platform
import re
import shlex
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 1)
FIRST_TORCH_FOR_NUMPY_2 = (2, 3)
FORK = {'mmengine': 'onedl-mmengine', 'mmcv': 'onedl-mmcv',
        'mmdet': 'onedl-mmdetection', 'mmseg': 'onedl-mmsegmentation'}
SHOWN = ('torch', 'torchvision', 'timm', 'numpy', *FORK, 'rmoe', 'setuptools')
REQUIRED = {'torch', 'torchvision', 'mmengine', 'mmcv', 'rmoe'}
LOOKED_FOR = (*SHOWN, 'pkg_resources', 'ftfy', 'regex')


@dataclass(frozen=True)
class Facts:
    """The facts about this Python and its packages. Keys are the names by which
    packages are imported.

    Attributes:
        versions: the version of each package, and of Python.
        owners: the distributions that have installed each package.
        modules: the packages that can be found.
        errors: the error of each import that fails.
        stand_in: the Python file that is imported as mmcv._ext, '' if there
            is none.
        stand_in_of_rmoe: whether this file is that of rmoe.
        read_only: whether pip cannot write where it would install.
        gpu: the name of the GPU, '' if there is none.
        executable: the path of this Python.
    """
    versions: Mapping[str, str]
    owners: Mapping[str, tuple[str, ...]]
    modules: frozenset[str]
    errors: Mapping[str, str]
    stand_in: str
    stand_in_of_rmoe: bool
    read_only: bool
    gpu: str
    executable: str

    @property
    def pip(self) -> str:
        return f'{shlex.quote(self.executable)} -m pip'


@dataclass(frozen=True)
class Finding:
    """One row of the report. It is a problem if ``problem`` is not empty, and
    then ``remedy`` has the commands that fix it."""
    name: str
    value: str
    problem: str = ''
    remedy: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problem


def examine(facts: Facts) -> list[Finding]:
    """Judge the facts. Every rule of the doctor is called from here."""
    findings = [
        Finding('python', facts.versions['python']),
        *(package_finding(facts, package) for package in SHOWN),
        required_finding(facts), torch_finding(facts),
        torchvision_finding(facts), numpy_finding(facts),
        mmcv_version_finding(facts), ops_finding(facts),
        undeclared_finding(facts, 'pkg_resources', 'mmengine',
                           "'setuptools<81'"),
        undeclared_finding(facts, 'ftfy', 'mmseg', 'ftfy'),
        undeclared_finding(facts, 'regex', 'mmseg', 'regex'),
        Finding('GPU', facts.gpu or 'none (the CPU works too)')]
    # A folder that pip cannot write to is a problem only if something has to
    # be installed.
    if facts.read_only and not all(row.ok for row in findings):
        findings.insert(0, Finding('site-packages', 'read-only', (
            'pip cannot write to the folder of the packages of this Python'), (
            f'{shlex.quote(facts.executable)} -m venv --system-site-packages '
            '.venv-own  # sees what is installed',
            '.venv-own/bin/python tools/doctor.py  # and go on with that')))
    return findings


def package_finding(facts: Facts, package: str) -> Finding:
    if package not in facts.modules:
        return Finding(package, 'not installed')
    value = facts.versions.get(package, 'found, without package metadata')
    owners = facts.owners.get(package, ()) if package in FORK else ()
    if owners:
        value += ', from ' + ' and '.join(
            f'{name} ({"maintained fork" if is_fork(name) else "original"})'
            for name in owners)
    if len(owners) > 1:
        return Finding(package, value, (
            f'{" and ".join(owners)} both install {package} and overwrite '
            "each other's files"), replace(facts, package))
    if package in ('torch', 'rmoe') and package in facts.errors:
        what = '--force-reinstall torch torchvision'
        return Finding(package, value, (
            f'import {package} fails: {facts.errors[package]}'), (
            f'{facts.pip} install {what if package == "torch" else "-e ."}',))
    return Finding(package, value)


def required_finding(facts: Facts) -> Finding:
    missing = REQUIRED - facts.modules
    # One of the two is enough, because segmentation needs no mmdet, and
    # detection no mmseg.
    if not facts.modules & {'mmdet', 'mmseg'}:
        missing |= {'mmdet', 'mmseg'}
    if not missing:
        return Finding('requirements', 'all installed')
    names = ', '.join(name for name in SHOWN if name in missing)
    return Finding('requirements', 'not all installed',
                   f'not installed: {names}', (
                       'make env && .venv/bin/python tools/doctor.py',
                       '# or, for the Python this was run with:',
                       *install_missing(facts, missing)))


def torch_finding(facts: Facts) -> Finding:
    version = facts.versions.get('torch', '')
    if not version or release(version) >= OLDEST_TORCH:
        return Finding('torch >= 2.1', 'yes' if version else 'not checked')
    return Finding('torch >= 2.1', 'no', (
        f'rmoe needs torch >= 2.1, this is {version}'), (
        f"{facts.pip} install 'torch>=2.1' torchvision",))


def torchvision_finding(facts: Facts) -> Finding:
    """Check that torchvision was built for this torch. Otherwise its operators,
    of which rmoe uses some, are missing."""
    name = 'torchvision ops'
    if {'torch', 'torchvision'} - facts.modules or 'torch' in facts.errors:
        return Finding(name, 'not checked')
    error = facts.errors.get('torchvision', '')
    if not error:
        return Finding(name, 'they import')
    # torch 2.N belongs to torchvision 0.(N + 15).
    minor = release(facts.versions['torch'])[1] + 15
    return Finding(name, 'missing', (
        f'torchvision does not fit torch {facts.versions["torch"]}: {error}'),
        (f"{facts.pip} install --force-reinstall --no-deps "
         f"'torchvision==0.{minor}.*'",))


def numpy_finding(facts: Facts) -> Finding:
    numpy, torch = (facts.versions.get(name, '')
                    for name in ('numpy', 'torch'))
    old = bool(torch) and release(torch) < FIRST_TORCH_FOR_NUMPY_2
    if not (old and numpy and release(numpy) >= (2, 0)):
        return Finding('numpy fits torch', 'yes' if numpy else 'not checked')
    return Finding('numpy fits torch', 'no', (
        f'torch {torch} was compiled for numpy 1 and cannot use numpy '
        f'{numpy}'), (
        f"{facts.pip} install 'numpy<2' 'opencv-python<4.12'",))


def mmcv_version_finding(facts: Facts) -> Finding:
    version = facts.versions.get('mmcv', '')
    if not version or uses_fork(facts):
        return Finding('mmcv < 2.2', 'does not apply')
    if (2, 0) <= release(version) < (2, 2):
        return Finding('mmcv < 2.2', 'yes')
    return Finding('mmcv < 2.2', 'no', (
        f'mmdet 3.3.0 and mmsegmentation 1.2.2 refuse mmcv {version}: it '
        'must be >= 2.0 and < 2.2'), replace(facts, 'mmcv'))


def ops_finding(facts: Facts) -> Finding:
    if {'torch', 'mmengine', 'mmcv'} - facts.modules or (
            'torch' in facts.errors):
        return Finding('mmcv ops', 'not checked')
    error = facts.errors.get('mmcv._ext', '')
    if facts.stand_in and not facts.stand_in_of_rmoe:
        return Finding('mmcv ops', "another library's", (
            f"{facts.stand_in} stands in for mmcv's operators and is not "
            'that of rmoe: which operators it has, and what they compute, is '
            'unknown'), (
            f'rm {shlex.quote(facts.stand_in)}',
            f'{shlex.quote(facts.executable)} -m rmoe.mmcv_ops status'))
    if facts.stand_in:
        return Finding('mmcv ops', f"rmoe's, for every program "
                       f'({facts.stand_in})')
    if not error:
        return Finding('mmcv ops', 'compiled, and they import')
    if 'libGL' in error:
        return Finding('mmcv ops', 'not checked', (
            f'OpenCV does not import: {error}'), (
            f'{facts.pip} install --force-reinstall --no-deps '
            'opencv-python-headless',))
    if "'mmcv._ext'" in error:
        return Finding('mmcv ops', "rmoe's, where rmoe is imported before "
                       'mmseg and mmdet')
    return Finding('mmcv ops', 'broken', (
        f"mmcv's compiled ops do not import: {error}"), replace(facts, 'mmcv'))


def undeclared_finding(facts: Facts, module: str, package: str,
                       requirement: str) -> Finding:
    """Check for a module that one of the original packages imports without
    declaring it as a requirement."""
    if module in facts.modules:
        return Finding(module, 'found')
    if package not in facts.modules or uses_fork(facts):
        return Finding(module, 'not found, not needed')
    return Finding(module, 'not found', (
        f'{package} imports {module} without requiring it'), (
        f'{facts.pip} install {requirement}',))


def install_missing(facts: Facts, missing: set[str]) -> tuple[str, ...]:
    wanted = [distribution(facts, name) for name in FORK if name in missing]
    torch = [f'{facts.pip} install torch torchvision']
    return (*(torch if missing & {'torch', 'torchvision'} else ()),
            f'{facts.pip} install -e . {" ".join(wanted)}'.rstrip())


def replace(facts: Facts, package: str) -> tuple[str, ...]:
    """The commands after which there is one working copy of an OpenMMLab
    package."""
    found = ' '.join(facts.owners.get(package, (package,)))
    return (f'{facts.pip} uninstall -y {found}',
            f'{facts.pip} install {distribution(facts, package)}')


def distribution(facts: Facts, package: str) -> str:
    """The name, with the version, by which pip installs a package. For mmcv it
    is one that needs no compiler."""
    if uses_fork(facts):
        return FORK[package]
    names = {'mmengine': 'mmengine', 'mmcv': 'mmcv-lite', 'mmdet': 'mmdet',
             'mmseg': 'mmsegmentation'}
    for name in ('mmcv.txt', 'openmmlab.txt'):
        for line in (ROOT / 'requirements' / name).read_text().split():
            if line.startswith(f'{names[package]}=='):
                return line
    raise AssertionError(package)


def is_fork(distribution: str) -> bool:
    return distribution.startswith('onedl-')


def uses_fork(facts: Facts) -> bool:
    """Whether missing packages should be taken from the fork. They should if
    the installed mmdet and mmseg are those of the fork, or, without these, the
    installed mmengine and mmcv."""
    found = {package: facts.owners.get(package, ()) for package in FORK}
    deciding = found['mmdet'] + found['mmseg'] or (
        found['mmengine'] + found['mmcv'])
    return bool(deciding) and all(map(is_fork, deciding))


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def gather() -> Facts:
    """Collect the facts about this machine and this Python."""
    # A folder that is left over after a package was uninstalled is also found,
    # but its spec has no origin.
    modules = frozenset(
        name for name in LOOKED_FOR
        if (spec := importlib.util.find_spec(name)) and spec.origin)
    installed = metadata.packages_distributions()
    owners = {name: tuple(sorted({
        re.sub(r'[-_.]+', '-', owner).lower() for owner in installed[name]}))
        for name in LOOKED_FOR if name in installed}
    errors = {name: error for name in (
        'torch', 'torchvision', 'mmcv._ext', 'rmoe')
        if (error := import_error(name))}
    stand_in = stand_in_file()
    return Facts(
        versions={'python': platform.python_version(), **{
            name: metadata.version(names[0])
            for name, names in owners.items()}},
        owners=owners, modules=modules, errors=errors,
        stand_in=str(stand_in or ''), stand_in_of_rmoe=bool(
            stand_in and 'rmoe.mmcv_ops' in stand_in.read_text()),
        read_only=not os.access(sysconfig.get_path('purelib'), os.W_OK),
        gpu=gpu(), executable=sys.executable)


def import_error(module: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            importlib.import_module(module)
            if module == 'torchvision':
                # If torchvision was built for another torch, it can be
                # imported, but its operators are missing.
                sys.modules['torch'].ops.torchvision.nms  # noqa: B018
    except Exception as error:  # A broken package can raise any exception.
        return ' '.join(f'{type(error).__name__}: {error}'.split())
    return ''


def stand_in_file() -> Path | None:
    """The Python file beside mmcv that is imported as mmcv._ext."""
    spec = importlib.util.find_spec('mmcv')
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name('_ext.py')
    # If there is also a compiled module, Python imports that one.
    compiled = list(file.parent.glob('_ext.*.so'))
    return file if file.exists() and not compiled else None


def gpu() -> str:
    torch = sys.modules.get('torch')
    if torch is None or not torch.cuda.is_available():
        return ''
    return f'{torch.cuda.get_device_name()} (x{torch.cuda.device_count()})'


def report(findings: list[Finding]) -> str:
    """The report as text: the table, and then the problems. Problems with the
    same remedy are listed together."""
    lines = [f'{"  " if row.ok else "! "}{row.name:<17}{row.value}'
             for row in findings]
    problems: dict[tuple[str, ...], list[str]] = {}
    for row in findings:
        if not row.ok:
            problems.setdefault(row.remedy, []).append(f'! {row.problem}')
    if not problems:
        return '\n'.join([*lines, '', 'Nothing is wrong.'])
    lines += ['', f'Something is wrong. Type this in {ROOT}']
    for remedy, texts in problems.items():
        lines += ['', *texts, *(f'    {command}' for command in remedy)]
    return '\n'.join(lines)


def main() -> int:
    findings = examine(gather())
    print(report(findings))
    return int(not all(row.ok for row in findings))


if __name__ == '__main__':
    sys.exit(main())
