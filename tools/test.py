"""Evaluate a checkpoint with the evaluator of its config: mIoU or AP."""
import argparse

from _config import add_common_arguments, load_config, run, start_processes
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from rmoe import safe_loading
from rmoe.checks.data import check_data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--show-dir', help='folder for painted predictions')
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation: tta_model and '
                        'tta_pipeline of the config')
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    note = start_processes(cfg)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show_dir:
        paint(cfg, args.show_dir)
    check_data(cfg, ('test', ))
    if args.tta:
        use_tta(cfg)
    safe_loading.install()
    runner = Runner.from_cfg(cfg)
    if note:
        runner.logger.info(note)
    runner.test()


def paint(cfg: Config, folder: str) -> None:
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise ValueError('--show-dir needs a visualization hook in '
                         'default_hooks of the config')
    cfg.default_hooks.visualization.draw = True
    cfg.visualizer.save_dir = folder


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation, and give every test data set
    the pipeline for it."""
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise ValueError(
                f'--tta needs {key} in the config, as the files of '
                'configs/_base_/datasets have it')
    set_pipeline(cfg.test_dataloader.dataset, cfg.tta_pipeline)
    cfg.model = dict(cfg.tta_model, module=cfg.model)


def set_pipeline(dataset: ConfigDict, pipeline: list) -> None:
    """Set the pipeline of the data sets inside of wrappers and
    concatenations."""
    parts = dataset.get('datasets') or [dataset.get('dataset')]
    if parts == [None]:
        dataset.pipeline = pipeline
    else:
        for part in parts:
            set_pipeline(part, pipeline)


if __name__ == '__main__':
    run(main)
