"""Measures backbones and training steps over those of their dense twins."""
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from torch import nn

from _bench.counting import counts
from _bench.layers import spread_load
from _bench.passes import FORWARD, TRAIN, Run, step
from _bench.timing import DEVICE, Row, interleave
from _bench.training import CONFIG, STAGES, Training
from rmoe.backbones import preset
from rmoe.backbones.swin_moe import ARCHITECTURES
from rmoe.engine.roles import ROLES, role_of
from rmoe.moe import collect_losses
from rmoe.registry import MODELS

TWIN, MOE, RESIDUAL = 'dense twin', 'MoE', 'MoE, residual stage'
PRESET_NAMES = ('swin-tiny', 'cvt-13', 'vit-small-p16')


def benchmark_backbone(repeats: int, name: str, size: int, batch: int
                       ) -> list[Row]:
    """Time of the backbone of a preset over that of its dense twin. For Swin
    V1 the backbone of mmseg is measured too. In the residual stage the core is
    frozen."""
    init_default_scope('mmseg')
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    rows: list[Row] = []
    models = contenders(name)
    for mode in (FORWARD, TRAIN):
        steps = {kind: step(model.to(DEVICE), x, mode)
                 for kind, model in models.items()}
        if mode == TRAIN:
            train = steps[MOE]
            steps[MOE] = in_stage(models[MOE], train, ROLES)
            steps[RESIDUAL] = in_stage(models[MOE], train,
                                       ('residual', 'router'))
        seconds = interleave(steps, repeats)
        rows += [{'backbone': name, 'kind': kind, 'measured': mode,
                  'image': size, 'batch': batch,
                  'ms': round(1e3 * value, 1),
                  'ratio': round(value / seconds[TWIN], 3),
                  'over MoE': round(value / seconds[MOE], 3),
                  **counts(steps[kind])}
                 for kind, value in seconds.items()]
    return rows


def contenders(name: str) -> dict[str, nn.Module]:
    moe = preset(name)
    twin = MODELS.build(dict(moe, moe=None))
    models = {TWIN: twin, MOE: MODELS.build(moe)}
    spread_load(models[MOE].modules())
    if name.removeprefix('swin-') in ARCHITECTURES:
        models["mmseg's"] = MODELS.build(dict(
            type='mmseg.SwinTransformer', depths=twin.depths,
            embed_dims=twin.num_features[0],
            num_heads=ARCHITECTURES[moe['arch']][2]))
    return models


def in_stage(model: nn.Module, run: Run, roles: Sequence[str]) -> Run:
    """A version of ``run`` in which only these roles of the backbone train, and
    in which its auxiliary losses are collected, as MoELossHook does."""

    def run_stage() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(role_of(f'backbone.{name}') in roles)
        collect_losses(model, start=True)
        run()

    return run_stage


def benchmark_train_step(repeats: int, config: str | Path = CONFIG,
                         size: int = 512, batch: int = 2) -> list[Row]:
    """Time of the training steps of a segmentor in each stage, over that of its
    dense twin.

    There is one MoE model, which is put into another stage for each step. The
    time of this is measured too, but is small.
    """
    dense = Training(config, size, batch, dense=True)
    moe = Training(config, size, batch)
    steps: dict[str, Run] = {'dense': dense.step}
    steps.update({f'MoE, {stage} stage': partial(moe.step, stage)
                  for stage in STAGES})
    seconds = interleave(steps, repeats)
    return [{'training step': name, 'image': size, 'batch': batch,
             'ms': round(1e3 * value, 1),
             'over dense': round(value / seconds['dense'], 3),
             'over joint': round(value / seconds['MoE, joint stage'], 3),
             **counts(steps[name])}
            for name, value in seconds.items()]
