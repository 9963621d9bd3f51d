"""Say what is wrong with an installation, and what to type next.

Runs on a bare Python 3.10+. The exit code is 1 if something is wrong.

    python tools/doctor.py
"""
import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MMCV_VERSION = '2.1.0'
FORK = {'mmengine': 'onedl-mmengine', 'mmcv': 'onedl-mmcv',
        'mmdet': 'onedl-mmdetection', 'mmseg': 'onedl-mmsegmentation'}
SHOWN = ('torch', 'torchvision', 'timm', 'numpy', *FORK, 'rmoe', 'setuptools')
REQUIRED = {'torch', 'torchvision', 'mmengine', 'mmcv', 'rmoe'}
LOOKED_FOR = (*SHOWN, 'pkg_resources', 'ftfy', 'regex')


@dataclass(frozen=True)
class Facts:
    """What was found; packages go by the name one imports."""
    versions: Mapping[str, str]
    owners: Mapping[str, tuple[str, ...]]
    modules: frozenset[str]
    errors: Mapping[str, str]
    compiler: str
    compiler_version: str
    standards: frozenset[str]
    gpu: str
    executable: str

    @property
    def pip(self) -> str:
        return f'{shlex.quote(self.executable)} -m pip'


@dataclass(frozen=True)
class Finding:
    """One row of the report; it is a problem if it names one."""
    name: str
    value: str
    problem: str = ''
    remedy: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problem


def examine(facts: Facts) -> list[Finding]:
    """Judge the facts; every rule of the doctor is called from here."""
    return [Finding('python', facts.versions['python']),
            *(package_finding(facts, package) for package in SHOWN),
            compiler_finding(facts), required_finding(facts),
            mmcv_version_finding(facts), ops_finding(facts),
            undeclared_finding(facts, 'pkg_resources', 'mmengine',
                               "'setuptools<81'"),
            undeclared_finding(facts, 'ftfy', 'mmseg', 'ftfy'),
            undeclared_finding(facts, 'regex', 'mmseg', 'regex'),
            Finding('GPU', facts.gpu or 'none (the CPU works too)')]


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
    # One of the two is enough: segmentation needs no detector.
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


def compiler_finding(facts: Facts) -> Finding:
    standard = cpp_standard(facts)
    value = f'{facts.compiler_version or "none"} (torch needs {standard})'
    if not needs_build(facts) or standard in facts.standards:
        return Finding('compiler', value)
    lack = f'{facts.compiler} is none' if facts.compiler else 'none was found'
    return Finding('compiler', value, (
        f'a compiler for {standard} is needed to build mmcv and {lack}'), (
        'sudo apt-get install g++-12  # on Debian or Ubuntu',
        'export CXX=g++-12'))


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
    if not error:
        return Finding('mmcv ops', 'compiled, and they import')
    if not needs_build(facts):
        return Finding('mmcv ops', 'not checked', (
            f'OpenCV does not import: {error}'), (
            f'{facts.pip} install --force-reinstall --no-deps '
            'opencv-python-headless',))
    if "'mmcv._ext'" not in error:
        problem = f"mmcv's compiled ops do not import: {error}"
    elif 'mmcv-lite' in facts.owners.get('mmcv', ()):
        problem = 'mmcv-lite is installed: it is mmcv without compiled ops'
    else:
        problem = 'mmcv was installed without its compiled ops'
    return Finding('mmcv ops', 'missing', problem, replace(facts, 'mmcv'))


def undeclared_finding(facts: Facts, module: str, package: str,
                       requirement: str) -> Finding:
    """A module that the original packages import without requiring it."""
    if module in facts.modules:
        return Finding(module, 'found')
    if package not in facts.modules or uses_fork(facts):
        return Finding(module, 'not found, not needed')
    return Finding(module, 'not found', (
        f'{package} imports {module} without requiring it'), (
        f'{facts.pip} install {requirement}',))


def install_missing(facts: Facts, missing: set[str]) -> tuple[str, ...]:
    fork = [FORK[name] for name in FORK if name in missing - {'mmcv'}]
    rest = ['-e', '.', *fork] if uses_fork(facts) else ["-e '.[openmmlab]'"]
    torch = [f'{facts.pip} install torch torchvision']
    return (*(torch if missing & {'torch', 'torchvision'} else ()),
            *(build_mmcv(facts) if 'mmcv' in missing else ()),
            f'{facts.pip} install {" ".join(rest)}')


def replace(facts: Facts, package: str) -> tuple[str, ...]:
    """Commands that leave one sound copy of an OpenMMLab package."""
    found = ' '.join(facts.owners.get(package, (package,)))
    wanted = FORK[package] if uses_fork(facts) else (
        '-r requirements/openmmlab.txt')
    install = [f'{facts.pip} install {wanted}']
    return (f'{facts.pip} uninstall -y {found}',
            *(build_mmcv(facts) if package == 'mmcv' else install))


def build_mmcv(facts: Facts) -> tuple[str, ...]:
    """Commands that build mmcv with its ops for the torch that is here."""
    name, pin = (FORK['mmcv'], '') if uses_fork(facts) else (
        'mmcv', f'=={MMCV_VERSION}')
    # torch looks for ninja on the path, where this Python's may not be.
    path = shlex.quote(str(Path(facts.executable).parent))
    # mmcv's setup.py asks for C++17; the last -std on a line wins.
    return (f"{facts.pip} install 'setuptools<81' wheel ninja psutil",
            'mkdir -p build && printf \'#!/bin/sh\\nexec %s "$@" '
            f"-std={cpp_standard(facts)}\\n' "
            f'"${{CXX:-{facts.compiler or "g++"}}}" > build/cxx '
            '&& chmod +x build/cxx',
            f'PATH={path}:"$PATH" CXX="$PWD/build/cxx" MMCV_WITH_OPS=1 '
            f'{facts.pip} install --no-build-isolation --no-cache-dir '
            f'--no-binary {name} {name}{pin}')


def is_fork(distribution: str) -> bool:
    return distribution.startswith('onedl-')


def uses_fork(facts: Facts) -> bool:
    """Which family to mend with: that of the frameworks, if there are any."""
    found = {package: facts.owners.get(package, ()) for package in FORK}
    deciding = found['mmdet'] + found['mmseg'] or (
        found['mmengine'] + found['mmcv'])
    return bool(deciding) and all(map(is_fork, deciding))


def needs_build(facts: Facts) -> bool:
    """No ops, and not because OpenCV fails for want of a system library."""
    return 'libGL' not in facts.errors.get('mmcv._ext', 'libGL')


def cpp_standard(facts: Facts) -> str:
    """The C++ that torch's headers need; a torch to come will be new."""
    old = release(facts.versions.get('torch', '')) or (2, 14)
    return 'c++17' if old < (2, 14) else 'c++20'


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def gather() -> Facts:
    """Look at this machine and this Python."""
    # A folder left over from an uninstall is found too, without an origin.
    modules = frozenset(
        name for name in LOOKED_FOR
        if (spec := importlib.util.find_spec(name)) and spec.origin)
    installed = metadata.packages_distributions()
    owners = {name: tuple(sorted({
        re.sub(r'[-_.]+', '-', owner).lower() for owner in installed[name]}))
        for name in LOOKED_FOR if name in installed}
    compiler = os.environ.get('CXX') or shutil.which('g++') or shutil.which(
        'clang++') or ''
    return Facts(
        versions={'python': platform.python_version(), **{
            name: metadata.version(names[0])
            for name, names in owners.items()}},
        owners=owners, modules=modules,
        errors={name: error for name in ('torch', 'mmcv._ext', 'rmoe')
                if (error := import_error(name))},
        compiler=compiler, compiler_version=ask(compiler, '--version'),
        standards=frozenset(
            standard for standard in ('c++17', 'c++20')
            if ask(compiler, f'-std={standard}', '-E', '-x', 'c++', '-')),
        gpu=gpu(), executable=sys.executable)


def import_error(module: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            importlib.import_module(module)
    except Exception as error:  # a broken package can raise anything
        return ' '.join(f'{type(error).__name__}: {error}'.split())
    return ''


def ask(compiler: str, *flags: str) -> str:
    """The first line the compiler answers, or nothing if it refuses."""
    try:
        done = subprocess.run([*shlex.split(compiler), *flags], text=True,
                              input='', capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return '' if done.returncode else done.stdout.partition('\n')[0]


def gpu() -> str:
    torch = sys.modules.get('torch')
    if torch is None or not torch.cuda.is_available():
        return ''
    return f'{torch.cuda.get_device_name()} (x{torch.cuda.device_count()})'


def report(findings: list[Finding]) -> str:
    """The table, then the problems; those with one remedy stand together."""
    lines = [f'{"  " if row.ok else "! "}{row.name:<15}{row.value}'
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
