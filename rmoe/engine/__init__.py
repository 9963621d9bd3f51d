"""Hooks and optimizer settings for training. Importing this package registers
them, so that a config can name them."""
# ruff: noqa: E402
from rmoe.needs import need

need('mmengine', 'mmcv')

from rmoe.engine.amp import BFloat16OptimWrapper
from rmoe.engine.balance_bias_hook import BalanceBiasHook
from rmoe.engine.checkpoint_hook import CheckpointHook
from rmoe.engine.cost_hook import CostHook
from rmoe.engine.expert_mean_hooks import (
    ExpertAveragingHook,
    SharedMomentsHook,
    ZeroMeanHook,
)
from rmoe.engine.moe_loss_hook import MoELossHook
from rmoe.engine.optim_constructor import LayerDecayOptimWrapperConstructor
from rmoe.engine.report_hook import ReportHook
from rmoe.engine.residual_moe_hook import ResidualMoEHook
from rmoe.engine.routing_stats_hook import RoutingStatsHook

__all__ = [
    'BFloat16OptimWrapper', 'BalanceBiasHook', 'CheckpointHook', 'CostHook',
    'ExpertAveragingHook', 'LayerDecayOptimWrapperConstructor',
    'MoELossHook', 'ReportHook', 'ResidualMoEHook', 'RoutingStatsHook',
    'SharedMomentsHook', 'ZeroMeanHook'
]
