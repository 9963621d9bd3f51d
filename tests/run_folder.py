"""Work dirs with what a training leaves in them, written by hand."""
import json
from pathlib import Path

LAYER = 'backbone.stages.2.blocks.1.ffn'
LOG = '''\
2030/01/01 00:00:00 - mmengine - INFO -\x20
------------------------------------------------------------
System environment:
    sys.platform: linux
    Python: 3.11.7 (main) [GCC 12]
    PyTorch: 2.9.0
    PyTorch compiling details: PyTorch built with:
  - GCC 13.3

    MMEngine: 0.10.7

Runtime environment:
    seed: 0
------------------------------------------------------------

2030/01/01 00:00:01 - mmengine - INFO - checkpoint of a mmseg Swin:
  new          15  stages.2.blocks.1.ffn.router.scorer.weight, ...
  upcycled      2  stages.2.blocks.1.ffn.layers.0.0.weight, ...
2030/01/01 00:00:01 - mmengine - INFO - Load checkpoint from start.pth
2030/01/01 00:00:02 - mmengine - INFO - rmoe 0.1.0
2030/01/01 00:00:02 - mmengine - INFO - stage 'core' trains core, head until \
iteration 20
    role       tensors    parameters  trains
2030/01/01 00:00:09 - mmengine - INFO - stage 'joint' trains core, residual, \
router, head until iteration 60
'''


def train_line(step: int, loss: float, **more: float) -> dict:
    return dict(loss=loss, time=.5, iter=step, step=step, **more)


def load_line(step: int, *loads: float, layer: str = LAYER,
              **more: float) -> dict:
    values = {f'load_{expert}': load for expert, load in enumerate(loads)}
    values.update(dict(entropy=.75, dropped=.125, unrouted=0.) | more)
    return {f'moe/{layer}/{what}': value for what, value in values.items()
            } | dict(step=step)


DENSE = [train_line(20, .9), train_line(40, .6), train_line(60, .5),
         dict(mIoU=40., aAcc=80., time=.1, data_time=.01, step=60)]
MOE = [train_line(20, 1., loss_moe_load=.125),
       dict(mIoU=50., aAcc=80., time=.1, data_time=.01, step=20),
       load_line(40, .5, .3, .2, 0.),
       train_line(40, .75, loss_moe_load=.25),
       load_line(60, .25, .25, .25, .25),
       train_line(60, .5, loss_moe_load=.125),
       dict(mIoU=49., aAcc=81., time=.1, data_time=.01, step=60)]


def cost(moe_layers: int = 0, seconds: float = 100.) -> dict:
    def stage(iterations, parameters, core_only):
        return dict(
            iterations=iterations, samples=2 * iterations,
            measured_flops=4, measured_samples=2,
            trainable_parameters=parameters, moe_layers=moe_layers,
            core_only_layers=core_only, flops=iterations * 2_000_000)

    stages = dict(a=stage(20, 1000, moe_layers), b=stage(40, 5000, 0))
    return dict(
        seconds=seconds, device_seconds=2 * seconds,
        wall_seconds=seconds + 20, iterations=60, samples=120,
        flops=120_000_000, peak_memory=3_000_000_000, device='cpu, 1 threads',
        world_size=2, from_iteration=0,
        stages=stages if moe_layers else dict(b=stages['b']))


def write_run(folder: Path, lines: list[dict] = MOE, log: str = LOG,
              costs: dict | None = None, config: str = 'model = dict()\n',
              start: str = '20300101_000000') -> Path:
    """A work dir, or another start in one."""
    data = folder / start / 'vis_data'
    data.mkdir(parents=True)
    (data / 'scalars.json').write_text(''.join(
        json.dumps(line) + '\n' for line in lines))
    (data / 'config.py').write_text(config)
    (data.parent / f'{start}.log').write_text(log)
    if costs:
        (folder / 'cost.json').write_text(json.dumps(costs))
    return folder


def dense_and_moe(root: Path) -> list[Path]:
    return [write_run(root / 'moe', costs=cost(1, 150.)),
            write_run(root / 'dense', DENSE, '', cost())]
