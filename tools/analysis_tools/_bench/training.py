"""Trains the segmentor of a config on random images, in each stage of training,
for the measurements of time and memory."""
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from torch import nn

from _bench.layers import spread_load
from _bench.precision import now
from _bench.timing import DEVICE
from rmoe.backbones.from_config import dense_twin
from rmoe.engine.moe_loss_hook import install
from rmoe.engine.residual_moe_hook import ResidualMoEHook
from rmoe.engine.roles import ROLES
from rmoe.moe import moe_layers
from rmoe.registry import MODELS

# Swin-T-MoE + UPerNet, with 8 experts in 4 of the 12 FFNs.
CONFIG = (Path(__file__).parents[3] / 'configs/swin_moe' /
          'swin-tiny-patch4-window7-moe-e8k1-in1k-pre_upernet_8xb2-160k_'
          'ade20k-512x512.py')
# The stages and the roles that train in each. A config may have only some of
# them.
STAGES = {'core': ('core', 'head'),
          'residual': ('residual', 'router', 'head'), 'joint': ROLES}


@dataclass
class StageRunner:
    """The attributes of a runner that ResidualMoEHook uses. Iteration i is in
    stage i."""
    model: nn.Module
    iter: int = 0
    max_iters: int = len(STAGES)
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger(
        'rmoe.benchmark'))
    _resume: bool = False


class Training:
    """A segmentor, its optimizer, and a batch of random images.

    Args:
        config: the config of a MoE segmentor.
        size: the side of the square images.
        batch: number of images.
        dense: whether to use the dense twin of the model instead.

    Raises:
        ValueError: if the config is not that of a MoE segmentor.
    """

    def __init__(self, config: str | Path, size: int, batch: int,
                 dense: bool = False) -> None:
        cfg = Config.fromfile(config)
        if not cfg.model.backbone.get('moe') or 'decode_head' not in cfg.model:
            raise ValueError(f'--config {config} is not the config of a MoE '
                             'segmentor')
        if not MMLogger.check_instance_created('benchmark'):
            # Otherwise every group of parameters would be logged.
            MMLogger.get_instance('benchmark', log_level='ERROR')
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.init_cfg = None
        if dense:
            cfg.model.backbone = dense_twin(cfg.model.backbone)
        cfg.model.data_preprocessor.size = (size, size)
        if now().dtype == torch.bfloat16:
            cfg.optim_wrapper.type = 'rmoe.BFloat16OptimWrapper'
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model))
        self.model.to(DEVICE).train()
        self.optim_wrapper = build_optim_wrapper(self.model,
                                                 cfg.optim_wrapper)
        self.data = noise(size, batch, cfg.model.decode_head.num_classes)
        if moe_layers(self.model):
            spread_load(self.model.modules())
            install(self.model)
            self.hook = ResidualMoEHook(
                [dict(name=name, roles=roles, end=i)
                 for i, (name, roles) in enumerate(STAGES.items(), 1)])
            self.runner = StageRunner(self.model)
            self.hook.before_train(self.runner)

    def step(self, stage: str | None = None) -> None:
        """One iteration: forward, backward and the optimizer's update.

        Args:
            stage: one of STAGES; None for a dense model.
        """
        if stage is not None:
            self.runner.iter = list(STAGES).index(stage)
            self.hook.before_train_iter(self.runner, self.runner.iter)
        self.model.train_step(self.data, self.optim_wrapper)


def noise(size: int, batch: int, classes: int) -> dict:
    """A batch of random images and labels, as a dataloader of mmseg returns
    it."""
    from mmseg.structures import SegDataSample
    return dict(
        inputs=[torch.randint(256, (3, size, size), dtype=torch.uint8)
                for _ in range(batch)],
        data_samples=[
            SegDataSample(
                metainfo=dict(img_shape=(size, size)),
                gt_sem_seg=PixelData(
                    data=torch.randint(classes, (1, size, size))))
            for _ in range(batch)])
