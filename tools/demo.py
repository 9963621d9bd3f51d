"""Show all of rmoe in minutes: train a dense Swin, upcycle it, fine-tune it in
stages, compare the two, and draw which experts take which patches.

    python tools/demo.py                 # draws its own labelled scenes
    python tools/demo.py --data PATH     # a data set in mmseg's layout

The dense model is trained further for as many iterations as the MoE model is
fine-tuned, so that both have seen the same number of images in the end.
"""
import argparse
import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from _config import run
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rmoe.datasets.demo import DataSet, find_data, make_scenes
from rmoe.engine.moe_loss_hook import install as collect_auxiliary_losses
from rmoe.moe import moe_layers
from rmoe.moe.complexity import complexity
from rmoe.moe.recording import record_routing
from rmoe.report import DEFAULT_NAME, missing_packages, write_report
from rmoe.visualization.routing_maps import load_shares
from rmoe.visualization.segmentor import draw_segmentor

TERMINAL = sys.stdout
# The log handlers of runners keep a reference to this file, so it is never
# closed.
NOWHERE = open(os.devnull, 'w')
ROOT = Path(__file__).resolve().parent.parent
DENSE = ROOT / 'configs/demo/swin-micro_upernet_scenes-128x128.py'
MOE = ROOT / 'configs/demo/swin-micro-moe-e8k1_upernet_scenes-128x128.py'


def main() -> None:
    warnings.filterwarnings('ignore', category=UserWarning)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path,
                        help='folder in mmseg layout; default: drawn scenes')
    parser.add_argument('--work-dir', type=Path,
                        default=ROOT / 'work_dirs/demo')
    parser.add_argument('--iters', type=int, default=500,
                        help='iterations of dense training')
    parser.add_argument('--finetune-iters', type=int, default=350,
                        help='further iterations of the dense and of the MoE '
                        'model')
    args = parser.parse_args()
    for name in ('iters', 'finetune_iters'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name.replace("_", "-")}='
                             f'{getattr(args, name)} must be at least 1')
    # The path is made absolute, because tools/upcycle.py runs in another
    # folder.
    args.work_dir = args.work_dir.resolve()
    begin = time.time()
    data = (find_data(args.data) if args.data
            else make_scenes(args.work_dir / 'scenes'))
    say(f'data: {data.root}, {len(data.classes)} classes')

    def config(path: Path, name: str, iters: int) -> Config:
        return make_config(path, args.work_dir / name, iters, data)

    dense = train('1/4 dense training', config(DENSE, 'dense', args.iters))
    before = evaluate(config(DENSE, 'dense', 1), dense)
    say(f'    mIoU {before:.2f}')
    upcycled = upcycle(dense, args.work_dir / 'upcycled.pth')
    after = evaluate(config(MOE, 'upcycled', 1), upcycled)
    say(f'2/4 upcycled: mIoU {after:.2f}, moved by {after - before:+.2f}')
    moe_cfg = config(MOE, 'moe', args.finetune_iters)
    moe = train('3/4 MoE fine-tuning', moe_cfg, upcycled)
    dense_cfg = config(DENSE, 'dense-continued', args.finetune_iters)
    continued = train('4/4 dense, as long', dense_cfg, dense)
    rows = [('dense, continued', dense_cfg, continued),
            ('MoE', moe_cfg, moe)]
    say(table(rows, data, args.iters))
    picture = args.work_dir / 'routing.png'
    draw(moe_cfg, moe, picture)
    say(f'picture: {picture}\nlogs and checkpoints: {args.work_dir}\n'
        f'{time.time() - begin:.0f} s in all')
    say(report([moe_cfg, dense_cfg], args.work_dir / DEFAULT_NAME))


def say(text: str) -> None:
    print(text, flush=True)


def make_config(path: Path, work_dir: Path, iters: int,
                data: DataSet) -> Config:
    cfg = Config.fromfile(path)
    cfg.work_dir = str(work_dir)
    # mmengine gives all runners of a process the same visualizer if its name is
    # the same, and it would write into the folder of the first runner.
    cfg.visualizer.name = str(work_dir)
    # Instead, there is one report of all runs in the end.
    cfg.default_hooks.report.enabled = False
    cfg.train_cfg.update(max_iters=iters, val_interval=iters)
    cfg.param_scheduler[0].end = warm_up = min(30, iters // 2)
    cfg.param_scheduler[1].update(begin=warm_up, end=max(iters, warm_up + 1))
    data.apply(cfg)
    return cfg


def train(label: str, cfg: Config, load_from: Path | None = None) -> Path:
    """Train a model, and return the path of the last checkpoint."""
    cfg.load_from = load_from and str(load_from)
    runner = quiet_runner(cfg)
    runner.register_hook(Progress(label), priority='LOWEST')
    with quiet():
        runner.train()
    return Path(cfg.work_dir) / f'iter_{cfg.train_cfg.max_iters}.pth'


def evaluate(cfg: Config, checkpoint: Path) -> float:
    cfg.load_from = str(checkpoint)
    runner = quiet_runner(cfg)
    with quiet():
        return runner.test()['mIoU']


def upcycle(dense: Path, out: Path) -> Path:
    command = ['tools/upcycle.py', str(dense), '--config', str(MOE), '--out',
               str(out)]
    say('    python ' + ' '.join(
        os.path.relpath(part) if os.sep in part else part
        for part in command))
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    return out


def quiet_runner(cfg: Config) -> Runner:
    """A runner that logs to its files and not to the terminal."""
    with quiet():
        return Runner.from_cfg(cfg)


def quiet() -> contextlib.AbstractContextManager:
    return contextlib.redirect_stdout(NOWHERE)


class Progress(Hook):
    """Shows the progress of a training: in a terminal as one line that is
    updated, otherwise as a line after every tenth of the training."""

    def __init__(self, label: str) -> None:
        self.label = label

    def before_train(self, runner: Runner) -> None:
        self.begin = time.time()

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: object = None,
                         outputs: dict | None = None) -> None:
        done, total = batch_idx + 1, runner.max_iters
        tty = TERMINAL.isatty()
        if not tty and done % max(total // 10, 1) and done != total:
            return
        left = (time.time() - self.begin) / done * (total - done)
        bar = '#' * (20 * done // total)
        line = (f'{self.label:<20} [{bar:<20}] {done}/{total}  loss '
                f'{outputs["loss"].item():.3f}  {left:.0f} s left')
        end = '\n' if done == total or not tty else ''
        print(f'\r{line:<79}' if tty else line, end=end, file=TERMINAL,
              flush=True)


def table(rows: list[tuple[str, Config, Path]], data: DataSet,
          before: int) -> str:
    lines = [f'\n{"":<18}{"mIoU":>7}{"parameters":>12}{"active":>12}'
             f'{"GFLOPs":>8}{"s/step":>8}{"images":>8}']
    steps, facts = {}, {}
    for name, cfg, checkpoint in rows:
        miou = evaluate(cfg, checkpoint)
        runner = quiet_runner(cfg)
        cost = complexity(runner.model, torch.zeros(1, 3, *data.size))
        facts[name] = (miou, cost, before + cfg.train_cfg.max_iters,
                       cfg.train_dataloader.batch_size)
        steps[name] = training_step(runner)
    seconds = interleave(steps)
    for name, (miou, cost, iters, batch) in facts.items():
        lines.append(
            f'{name:<18}{miou:>7.2f}{cost.total_params:>12,}'
            f'{cost.active_params:>12,}{cost.flops / 1e9:>8.3f}'
            f'{seconds[name]:>8.3f}{iters * batch:>8}')
    return '\n'.join(lines)


def training_step(runner: Runner) -> Iterator[None]:
    """An iterator of which each next() runs one training step: forward pass,
    backward pass and the update of the weights."""
    model = runner.model.train()
    if moe_layers(model):
        collect_auxiliary_losses(model)
    optim = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    loader = runner.build_dataloader(runner.cfg.train_dataloader)
    batch = next(iter(loader))
    while True:
        model.train_step(batch, optim)
        yield


def interleave(steps: dict[str, Iterator[None]],
               turns: int = 9) -> dict[str, float]:
    """Median seconds of each of the steps, which are run in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name, step in steps.items():
            begin = time.perf_counter()
            next(step)
            if turn:  # The first turn is a warm-up.
                times[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in times.items()}


@torch.no_grad()
def draw(cfg: Config, checkpoint: Path, path: Path) -> None:
    """Draw the routing of one image, with the loads over the whole validation
    set."""
    cfg.load_from = str(checkpoint)
    runner = quiet_runner(cfg)
    with record_routing(runner.model) as records, quiet():
        runner.test()
    loads = {name: load_shares(routings)
             for name, routings in records.items()}
    dataset = runner.test_dataloader.dataset
    runner.model.dataset_meta = dataset.metainfo
    draw_segmentor(runner.model.eval(), dataset[0], path, loads,
                   title='which expert took each patch')


def report(configs: list[Config], path: Path) -> str:
    """Write the report of both runs, and return a line to print about it."""
    if missing := missing_packages():
        return f'no report: {missing}'
    with quiet():
        write_report([Path(cfg.work_dir) for cfg in configs], path)
    return f'report: {path}'


if __name__ == '__main__':
    run(main)
