"""Test and measure rmoe on a machine with one GPU, in eight minutes.

    python tools/analysis_tools/gpu_report.py --out report --wheels wheels
    python tools/analysis_tools/gpu_report.py --out report --device cpu --small

Runs the tests of tests/test_gpu and the tables of benchmark.py, one after the
other, each with a time limit. If one fails, the others run all the same. The
machine needs Python and PyTorch with its dependencies, but no package
registry: the wheels in the folder --wheels are installed into a temporary
folder, from which they are imported before packages that are installed
already. The folder --out gets

- report.json: the result of each part, every test that failed, every table;
- report.txt: the same as text;
- report.log: the output of all commands.

The exit status is 0 if every part succeeded.

docs/performance.md says which wheels are needed. ``--device cpu --small`` tries
this script on a machine without a GPU; its numbers mean nothing.
"""
import argparse
import json
import os
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _bench.tables import format_table
from _parts import Outcome, Part, run_part

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = 'tools/analysis_tools/benchmark.py'
MINUTES = 8.
# The tables, with their options and the largest share of the time that each
# gets. The tests get the rest, which is at least a third.
TABLES = {
    'layer': (('layer', '--repeats', '7'), .17),
    'capacity': (('inference', '--repeats', '7', '--precision', 'bf16',
                  'fp32'), .06),
    'train-step': (('train-step', '--repeats', '7', '--batch', '2', '8'),
                   .16),
    'backbone': (('backbone', '--repeats', '7', '--precision', 'bf16',
                  'fp32'), .10),
    'routers': (('routers', '--repeats', '5', '--precision', 'bf16'), .06),
    'memory': (('memory', '--precision', 'bf16', 'fp32'), .05)}
# The number of tests that pytest-xdist runs at once, if it is installed.
WORKERS = 4
# For --small: the same tables with tiny sizes, whose numbers mean nothing.
DEMO = ('--config',
        'configs/demo/swin-micro-moe-e8k1_upernet_scenes-128x128.py')
SMALL_TABLES = {
    'layer': ('layer', '--repeats', '1', '--layers', '64,16,4', '--growth',
              '1', '2', '--precision', 'fp32', 'bf16'),
    'capacity': ('inference', '--repeats', '1', '--layers', '64,16,4'),
    'train-step': ('train-step', '--repeats', '1', '--size', '32', '--batch',
                   '2', '3', *DEMO),
    'backbone': ('backbone', '--repeats', '1', '--size', '64', '--batch', '1',
                 '--preset', 'vit-tiny-p16'),
    'routers': ('routers', '--repeats', '1', '--layer', '64,16,4',
                '--images', '2'),
    'memory': ('memory', '--size', '32', *DEMO)}
# For --small: the tests of one router, without those that compile.
SMALL_TESTS = ('-k', 'cosine or overflows or 512')


def main() -> int:
    args = parse_args()
    begin = time.monotonic()
    out = Path(args.out).resolve()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f'--out {args.out} is not empty: choose another '
                         'folder')
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = Report(out, Path(scratch), args)
        for part in parts(args, Path(scratch)):
            left = 60 * args.minutes - (time.monotonic() - begin)
            report.add(run_part(part, out / 'report.log',
                                environment(args, Path(scratch)), ROOT, left))
    return report.finish()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='an empty folder')
    parser.add_argument('--wheels', metavar='DIR',
                        help='folder of wheels to install first; not needed '
                        'if all packages are installed')
    parser.add_argument('--minutes', type=float, default=MINUTES,
                        help='time for all parts together')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--small', action='store_true',
                        help='tiny sizes and few tests')
    parser.add_argument('--only', nargs='+', metavar='PART',
                        choices=('tests', *TABLES),
                        help='run only these parts: tests, '
                        f'{", ".join(TABLES)}')
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f'--minutes {args.minutes} must be positive')
    if args.wheels and not list(Path(args.wheels).glob('*.whl')):
        parser.error(f'--wheels {args.wheels} has no wheel (*.whl) in it')
    return args


def parts(args: argparse.Namespace, scratch: Path) -> list[Part]:
    """The parts to run, in order."""
    whole = 60 * args.minutes
    found = []
    if args.wheels:
        found.append(Part('install', install(Path(args.wheels), scratch),
                          .15 * whole))
    found.append(Part('machine', (
        sys.executable, '-c', MACHINE, str(scratch / 'machine.json'),
        args.device), .1 * whole))
    wanted = args.only or ('tests', *TABLES)
    for name, (options, share) in TABLES.items():
        if name in wanted:
            options = SMALL_TABLES[name] if args.small else options
            found.append(Part(name, (
                sys.executable, BENCHMARK, *options, '--json',
                str(scratch / f'{name}.json')), share * whole))
    if 'tests' in wanted:
        found.append(Part('tests', tests(args, scratch), whole))
    return found


def install(wheels: Path, scratch: Path) -> tuple[str, ...]:
    """The command that installs all wheels of a folder, without dependencies
    from elsewhere."""
    return (sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index',
            '--find-links', str(wheels.resolve()), '--no-deps',
            '--no-compile', '--disable-pip-version-check', '--target',
            str(scratch / 'site'),
            *(str(path.resolve()) for path in sorted(wheels.glob('*.whl'))))


def tests(args: argparse.Namespace, scratch: Path) -> tuple[str, ...]:
    """The command that runs the tests. It ignores pytest's options in
    pyproject.toml, because they need plugins that may not be installed."""
    marks = 'gpu and not slow' if args.small else 'gpu'
    at_once = ('-n', str(WORKERS), '--dist=worksteal') if (
        args.device == 'cuda' and find_spec('xdist')) else ()
    return (sys.executable, '-m', 'pytest', '-m', marks, '-o', 'addopts=',
            '--import-mode=importlib', '-p', 'no:cacheprovider', '-q', '-ra',
            '--tb=short', f'--junitxml={scratch / "tests.xml"}',
            *at_once, *(SMALL_TESTS if args.small else ()), 'tests/test_gpu')


def environment(args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    paths = [str(scratch / 'site'), str(ROOT), os.environ.get('PYTHONPATH')]
    found = dict(os.environ, PYTHONUNBUFFERED='1',
                 PYTHONPATH=os.pathsep.join(filter(None, paths)),
                 RMOE_GPU_SUITE_DEVICE=args.device)
    # With a GPU, the test processes share the cores of the host, which has
    # little to compute itself. Without one, a single thread is used, because
    # several would wait for each other when other programs use the CPU too.
    found.setdefault('OMP_NUM_THREADS',
                     str(WORKERS) if args.device == 'cuda' else '1')
    if args.device == 'cpu':
        found['CUDA_VISIBLE_DEVICES'] = ''
    return found


# The program of the part "machine". It writes the versions and the GPU, and
# fails if there is no GPU.
MACHINE = '''
import json, platform, sys
import rmoe, torch
import mmcv, mmengine
found = dict(python=platform.python_version(), torch=torch.__version__,
             cuda=torch.version.cuda, mmcv=mmcv.__version__,
             mmengine=mmengine.__version__, rmoe=rmoe.__version__)
if sys.argv[2] == 'cuda':
    if not torch.cuda.is_available():
        sys.exit('error: torch sees no CUDA device; --device cpu --small '
                 'tries the script without one')
    card = torch.cuda.get_device_properties(0)
    found.update(card=card.name, memory_gib=round(card.total_memory / 2**30),
                 capability=f'{card.major}.{card.minor}')
json.dump(found, open(sys.argv[1], 'w'))
print(found)
'''


class Report:
    """Collects the results of the parts, and writes the files after each part.

    Args:
        out: the folder of the report.
        scratch: the folder in which parts write their files.
        args: the arguments of the command line.
    """

    def __init__(self, out: Path, scratch: Path, args: argparse.Namespace
                 ) -> None:
        self.out, self.scratch = out, scratch
        self.outcomes: list[Outcome] = []
        self.found: dict[str, Any] = dict(
            device=args.device, small=args.small, parts=[], machine={},
            tests={}, tables={})
        self.text = ['Sizes are small: these numbers mean nothing.'
                     ] if args.small else []

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f'{outcome.name}: {outcome.status} ({outcome.seconds} s)',
              flush=True)
        self.found['parts'].append(vars(outcome))
        self.text.append(f'# {outcome.name}: {outcome.status}, '
                         f'{outcome.seconds} s')
        if outcome.name == 'tests':
            self.found['tests'] = read_tests(self.scratch / 'tests.xml')
            self.text.append(json.dumps(self.found['tests'], indent=1))
        elif (path := self.scratch / f'{outcome.name}.json').exists():
            self._add_file(outcome.name, json.loads(path.read_text()))
        self.write()

    def _add_file(self, name: str, found: dict[str, Any]) -> None:
        if name == 'machine':
            self.found['machine'] = found
            self.text.append(str(found))
            return
        self.found['tables'][name] = found
        self.text += [found['machine'],
                      *(format_table(rows) + '\n'
                        for rows in found['tables'])]

    def write(self) -> None:
        (self.out / 'report.json').write_text(json.dumps(self.found,
                                                         indent=1))
        (self.out / 'report.txt').write_text('\n'.join(self.text) + '\n')

    def finish(self) -> int:
        """Print and write which parts failed, and return the exit status."""
        wrong = [each for each in self.outcomes if not each.ok]
        lines = [f'{each.name}: {each.status}' for each in wrong]
        lines += [f'  {test}' for test in self.found['tests'].get(
            'failing', [])]
        summary = ('Not everything went well:\n' + '\n'.join(lines) if wrong
                   else 'Every part went well.')
        print(f'{summary}\n{self.out}/report.json, report.txt, report.log',
              flush=True)
        self.text.append(summary)
        self.write()
        return 1 if wrong else 0


def read_tests(path: Path) -> dict[str, Any]:
    """The numbers of tests, and the names of those that failed. Empty if
    pytest was killed before it wrote its file."""
    if not path.exists():
        return {}
    cases = list(ElementTree.parse(path).getroot().iter('testcase'))
    kinds = {kind: [case for case in cases if case.find(kind) is not None]
             for kind in ('failure', 'error', 'skipped')}
    bad = kinds['failure'] + kinds['error']
    return dict(
        passed=len(cases) - len(bad) - len(kinds['skipped']),
        failed=len(bad), skipped=len(kinds['skipped']),
        failing=[f'{case.get("classname")}::{case.get("name")}'
                 for case in bad])


if __name__ == '__main__':
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f'error: {error}')
