"""Run an experiment: every pipeline of a plan, with every seed.

    python tools/experiments/run.py configs/experiments/rmoe-swin.py
    python tools/experiments/run.py PLAN --seeds 0 --only dense joint --jobs 2

A plan is a family of pipelines (see tools/pipeline.py), with some of these
settings:

    options   the overrides for each step
    once      steps that all seeds share; they have seed 0
    upcycle   steps for which tools/upcycle.py converts the checkpoint before,
              with these flags; otherwise it is upcycled as it loads
    analyse   the tools of tools/analysis_tools that are run on the last
              checkpoint of a pipeline

It can be stopped at any time. A training then continues from its last
checkpoint, and finished steps are not repeated.

When a pipeline has finished with a seed, a line is written to
records/PLAN.jsonl, with its settings, commit, scores, learning curve, loads of
the experts, and cost. tools/experiments/report.py makes tables and pictures of
these lines.
"""
import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

from _config import run
from _record import write_record
from _steps import finish, given
from _training import start_tool
from mmengine.config import Config, DictAction
from pipeline import DENSE, read_family

CAPACITIES = '.1 .25 .5 .75 1 1.25 2'
# The flags with which a tool writes TOOL.json, and its picture, into a folder.
ANALYSES: dict[str, Callable[[Path], list[str]]] = {
    'capacity_sweep': lambda folder: [
        '--work-dir', str(folder), '--capacities', *CAPACITIES.split()],
    'rescore': lambda folder: ['--work-dir', str(folder)],
    'specialisation': lambda folder: [
        '--json', str(folder / 'specialisation.json'),
        '--out', str(folder / 'specialisation.png')],
}
RECORDS = Path(__file__).resolve().parent / 'records'


def main() -> None:
    args = parse_args()
    plan = read_family(args.plan)
    names = args.only or list(plan.pipelines)
    for name in names:
        if name not in plan.pipelines:
            raise ValueError(f'--only {name}: {args.plan} has the pipelines '
                             f'{", ".join(plan.pipelines)}')
    if args.jobs < 1:
        raise ValueError(f'--jobs={args.jobs} must be at least 1')
    # The jobs share the cores. By default each would start as many threads as
    # there are cores.
    os.environ.setdefault('OMP_NUM_THREADS', str(
        max(1, (os.cpu_count() or 1) // args.jobs)))
    trainer = Trainer(args, plan)
    failed = []
    pool = ThreadPoolExecutor(args.jobs)
    try:
        jobs = [(name, seed, pool.submit(trainer.follow, name, seed))
                for seed in args.seeds for name in names]
        for name, seed, job in jobs:
            try:
                job.result()
            # The other jobs continue if one fails.
            except (ValueError, OSError) as error:
                failed.append(f'{name}, seed {seed}: {error}')
                print(failed[-1], flush=True)
    finally:
        # After Ctrl-C, jobs that have not begun must not start.
        pool.shutdown(cancel_futures=True)
    if failed:
        raise ValueError(f'{len(failed)} of {len(jobs)} failed; ' +
                         '; '.join(failed))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('plan', type=Path,
                        help='config of configs/experiments')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--only', nargs='+', metavar='PIPELINE',
                        help='run only these pipelines; default: all')
    parser.add_argument('--jobs', type=int, default=1,
                        help='number of trainings at the same time')
    parser.add_argument('--dense', type=Path, metavar='CHECKPOINT',
                        help='a dense checkpoint instead of the step '
                        f'{DENSE}')
    parser.add_argument('--work-dir', type=Path,
                        default=Path('work_dirs/experiments'))
    parser.add_argument('--records', type=Path, default=RECORDS,
                        help='folder of the records, with a file for each '
                        'plan')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of every step')
    return parser.parse_args()


class Trainer:
    """Runs pipelines of a plan; several threads may use it at the same
    time."""

    def __init__(self, args: argparse.Namespace, plan: Config) -> None:
        self.args, self.plan = args, plan
        self.folder = args.work_dir / args.plan.stem
        self.busy: dict[Path, Lock] = {}
        self.lock = Lock()

    def follow(self, name: str, seed: int) -> None:
        """Train the steps of a pipeline that are not trained yet, and write its
        record."""
        steps: dict[str, dict[str, Any]] = {}
        chain: list[str] = []
        start: str | None = None
        for step in self.plan.pipelines[name]:
            chain.append(step)
            if step == DENSE and self.args.dense:
                steps[step] = given(self.args.dense)
            else:
                once = step in self.plan.get('once', ())
                steps[step] = self._step(
                    step, start, '+'.join(chain),
                    0 if once else seed, once)
            start = steps[step]['checkpoint']
        last = list(steps.values())[-1]
        analyses = {tool: analyse(tool, last['folder'], last['checkpoint'])
                    for tool in self.plan.get('analyse', {}).get(name, ())}
        path = write_record(self.args.records, self.args.plan.stem, name,
                            seed, steps, analyses)
        print(f'{name}, seed {seed}: a line of {path.name}', flush=True)

    def _step(self, step: str, start: str | None, chain: str, seed: int,
              once: bool) -> dict[str, Any]:
        path = self.args.plan.parent / self.plan.steps[step]
        cfg = Config.fromfile(path)
        options = dict(self.plan.get('options', {}).get(step, {}))
        # Hundreds of runs are looked at in tables; tools/report.py writes one
        # at any time.
        if 'report' in cfg.get('default_hooks', {}):
            cfg.default_hooks.report.enabled = False
        # A merge takes '_delete_' out of what is merged.
        cfg.merge_from_dict(deepcopy(options))
        cfg.merge_from_dict(self.args.cfg_options or {})
        cfg.merge_from_dict({'randomness.seed': seed})
        folder = self.folder / ('once' if once else f'seed{seed}') / chain
        with self.lock:
            busy = self.busy.setdefault(folder, Lock())
        # Two pipelines that run at the same time may begin with the same step,
        # and the second has to wait for its checkpoint.
        with busy:
            if step in self.plan.get('upcycle', {}):
                start = self._upcycle(cfg, start, seed, folder,
                                      self.plan.upcycle[step])
            result = finish(cfg, start, folder, gpus=1,
                            label=f'{chain}, seed {seed}: ')
        return dict(result, folder=folder, config=path.name, options=options,
                    seed=seed)

    def _upcycle(self, cfg: Config, start: str | None, seed: int,
                 folder: Path, flags: list[str]) -> str:
        """Convert the checkpoint with tools/upcycle.py and these flags, and
        return the path of the result."""
        start = start or cfg.model.backbone.init_cfg.checkpoint
        out = folder / 'upcycled.pth'
        if not out.exists():
            folder.mkdir(parents=True, exist_ok=True)
            config = folder / 'upcycled.py'
            cfg.dump(config)
            start_tool('upcycle.py', folder / 'upcycle.log', start,
                       '--config', str(config), '--out', str(out),
                       '--seed', str(seed), *flags)
        return str(out)


def analyse(tool: str, folder: Path, checkpoint: str) -> dict[str, Any]:
    """The results of a tool of ANALYSES, which is run unless it was run
    before."""
    found = folder / 'analysis' / f'{tool}.json'
    if not found.exists():
        found.parent.mkdir(exist_ok=True)
        start_tool(f'analysis_tools/{tool}.py',
                   found.parent / f'{tool}.log', str(folder / 'step.py'),
                   checkpoint, *ANALYSES[tool](found.parent))
    return json.loads(found.read_text())


if __name__ == '__main__':
    run(main)
