"""Prove and measure rmoe on a machine with one GPU, in eight minutes.

    python tools/analysis_tools/gpu_report.py --out report --wheels wheels
    python tools/analysis_tools/gpu_report.py --out report --device cpu --small

Runs the tests of tests/test_gpu and the tables of benchmark.py, one after the
other, each with a limit, and goes on where one fails. The machine needs
Python, PyTorch and what PyTorch needs; no package registry: whatever wheels a
folder has are installed into one of their own, in front of what is there. The
folder --out gets

- report.json: how each part went, every test that failed, every table;
- report.txt: the same to read;
- report.log: all that was said.

The exit status is 0 if every part went well.

docs/performance.md says which wheels. ``--device cpu --small`` tries the
script itself where there is no GPU; its numbers mean nothing.
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
# Tables, their options, and their largest share of the time. Tests get what
# is left: a third or more.
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
# pytest-xdist runs so many tests at once, where it is there.
WORKERS = 4
# The same at sizes that mean nothing.
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
# One router of the table, without compiling.
SMALL_TESTS = ('-k', 'cosine or overflows or 512')


def main() -> int:
    args = parse_args()
    begin = time.monotonic()
    out = Path(args.out).resolve()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f'--out {args.out} has something in it: choose '
                         'another folder')
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
                        help='install these first; without it everything is '
                        'there already')
    parser.add_argument('--minutes', type=float, default=MINUTES,
                        help='for everything; parts get their shares')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--small', action='store_true',
                        help='tiny sizes and few tests')
    parser.add_argument('--only', nargs='+', metavar='PART',
                        choices=('tests', *TABLES),
                        help=f'of tests, {", ".join(TABLES)}')
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f'--minutes {args.minutes} must be positive')
    if args.wheels and not list(Path(args.wheels).glob('*.whl')):
        parser.error(f'--wheels {args.wheels} holds no wheel (*.whl)')
    return args


def parts(args: argparse.Namespace, scratch: Path) -> list[Part]:
    """What is run, in order."""
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
    """All wheels of a folder, and nothing else from anywhere."""
    return (sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index',
            '--find-links', str(wheels.resolve()), '--no-deps',
            '--no-compile', '--disable-pip-version-check', '--target',
            str(scratch / 'site'),
            *(str(path.resolve()) for path in sorted(wheels.glob('*.whl'))))


def tests(args: argparse.Namespace, scratch: Path) -> tuple[str, ...]:
    """pytest, without the plugins that pyproject.toml counts on."""
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
    # Workers share the cores, and a GPU's host has little to compute itself.
    # Threads of a CPU that others use too wait for one another.
    found.setdefault('OMP_NUM_THREADS',
                     str(WORKERS) if args.device == 'cuda' else '1')
    if args.device == 'cpu':
        found['CUDA_VISIBLE_DEVICES'] = ''
    return found


# Run by a part: versions, the card, and that there is one at all.
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
    """Collects what parts leave, and writes it after each.

    Args:
        out: folder of the report.
        scratch: where parts put their files.
        args: of the command line.
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
        """Say what went wrong; the exit status."""
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
    """Counts, and who failed; empty if pytest was killed before it wrote."""
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
