"""Choose the FFNs of a dense model that should become MoE: those whose experts
would lower the loss most, to first order.

    python tools/analysis_tools/select_layers.py CONFIG CHECKPOINT

CONFIG is a MoE config; of the layers that it names only the number matters.
CHECKPOINT is the trained dense model with its head. Every FFN gets experts
with zero residuals, so that the model still computes what the dense one does.
Then the gradients of the residuals are averaged over training batches: g_e is
the gradient for expert e of a layer, over the tokens that its router sends to
it. There are two scores of a layer:

  gradient    (sum_e ||g_e||^2)^1/2: how steeply the loss falls along the best
              residuals of norm one
  divergence  (sum_e ||g_e - mean_e g_e||^2)^1/2: how much of that the core
              could not do alone

RMoE (2204.09636) chooses layers by such a first-order score. Its text does not
give the formula: this is a RECONSTRUCTION, and the second score is this
project's own; see docs/placement.md.
"""
import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import torch
from _config import run
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from rmoe import safe_loading
from rmoe.backbones.base import MoEBackbone
from rmoe.backbones.from_config import backbone_config, build_backbone
from rmoe.checks.data import check_data
from rmoe.checks.step_cost import endless_batches
from rmoe.engine.head_check import unfilled
from rmoe.engine.roles import role_of
from rmoe.moe import MoELayer, moe_layers
from rmoe.registry import MODELS
from rmoe.upcycling import (
    check_prefix,
    count_experts,
    read_checkpoint,
    state_dict_of,
    weightless,
    write_atomically,
)

SCORES = ('gradient', 'divergence')
BACKBONE = 'backbone.'


@dataclass(frozen=True)
class Score:
    """The scores of one FFN.

    Attributes:
        stage: the number of its stage; None for a backbone without stages.
        block: the number of its block in the stage.
        gradient, divergence: the two scores, as the head of this file defines
            them.
    """
    stage: int | None
    block: int
    gradient: float
    divergence: float


def main() -> None:
    args = parse_args()
    safe_loading.install()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    backbone = backbone_config(cfg)
    positions = all_positions(backbone)
    number = count_layers(backbone) if args.num_layers is None else (
        args.num_layers)
    if not 1 <= number <= len(positions):
        raise ValueError(f'--num-layers {number} must lie between 1 and the '
                         f'{len(positions)} FFNs of the backbone')
    check_data(cfg, ('train', ))
    set_random_seed(args.seed)
    model = build_model(cfg, backbone, args.checkpoint)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=args.seed)
    batches = endless_batches(loader)
    scores = [Score(*position, *score) for position, score in zip(
        positions, measure(model, batches, args.batches), strict=True)]
    ranked = rank(scores, args.rank_by)
    layers = placement([(score.stage, score.block)
                        for score in ranked[:number]], positions)
    print(f'{len(ranked)} FFNs, {args.batches} training batches, seed '
          f'{args.seed}; first-order scores (a reconstruction, see '
          'docs/placement.md)')
    print(table(ranked, args.rank_by, number))
    moe = dict(layers=layers) | {
        key: value for key, value in cfg.model.backbone.moe.to_dict().items()
        if key != 'layers'}
    print(f'the best {number}:\nmoe={as_code(moe)}')
    if args.out:
        write_atomically(args.out, json.dumps(dict(
            config=args.config, checkpoint=args.checkpoint,
            batches=args.batches, seed=args.seed, rank_by=args.rank_by,
            note='first-order scores, a reconstruction of 2204.09636',
            scores=[asdict(score) for score in ranked],
            layers=layers), indent=1).encode())
        print(f'wrote {args.out}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='MoE config')
    parser.add_argument('checkpoint', help='dense model with its head')
    parser.add_argument('--batches', type=int, default=8,
                        help='number of training batches over which the '
                        'gradients are averaged')
    parser.add_argument('--num-layers', type=int,
                        help='number of FFNs to choose; default: as many as '
                        'CONFIG has MoE layers')
    parser.add_argument('--rank-by', choices=SCORES, default=SCORES[0])
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of routers, data order and augmentation')
    parser.add_argument('--out', help='.json file for scores and choice')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    args = parser.parse_args()
    if args.batches < 1:
        parser.error(f'--batches {args.batches} must be at least 1')
    return args


def all_positions(backbone: Mapping) -> list[tuple[int | None, int]]:
    """The stage and the block of every FFN, in forward order."""
    with weightless():
        model = build_backbone(dict(backbone))
        # The FFNs of a backbone that is not one of rmoe's are numbered
        # through all stages, even if it has depths.
        if isinstance(model, MoEBackbone) and hasattr(model, 'depths'):
            return [(stage, block) for stage, depth in enumerate(model.depths)
                    for block in range(depth)]
        whole = build_backbone(with_layers(backbone, dict(every=1)))
    return [(None, block) for block in range(len(moe_layers(whole)))]


def count_layers(backbone: Mapping) -> int:
    """The number of MoE layers that the config names."""
    with weightless():
        return len(moe_layers(build_backbone(dict(backbone))))


def with_layers(backbone: Mapping, layers: Any) -> dict:
    return dict(deepcopy(dict(backbone)), moe=dict(backbone['moe'],
                                                   layers=layers))


def placement(chosen: Sequence[tuple[int | None, int]],
              positions: Sequence[tuple[int | None, int]]) -> tuple:
    """The value of ``moe.layers`` that names some positions.

    Args:
        chosen: these positions, in any order.
        positions: the positions of all FFNs.
    """
    if positions[0][0] is None:
        return tuple(sorted(block for _, block in chosen))
    return tuple(
        tuple(sorted(block for at, block in chosen if at == stage))
        for stage in sorted({stage for stage, _ in positions}))


def build_model(cfg: Config, backbone: Mapping, checkpoint: str
                ) -> nn.Module:
    """Build the dense model with experts in every FFN, of which only the
    residuals require a gradient.

    Raises:
        ValueError: if the checkpoint is not that of the whole dense model.
    """
    layers = placement(positions := all_positions(backbone), positions)
    config = with_layers(backbone, layers)
    # The scores are defined for a core with full-rank residuals, even if the
    # config wants another form of experts.
    config['moe'].update(core=True, rank=None, align=None, unrouted='core')
    model = MODELS.build(dict(deepcopy(cfg.model), backbone=config))
    model = revert_sync_batchnorm(model)
    load(model, checkpoint)
    for layer in moe_layers(model.backbone).values():
        # The default align changes the gradient, so that routers can learn.
        # Here the gradient of the function itself is needed. With either of
        # these settings the layer computes the dense function while residuals
        # are zero.
        layer.align = 'difference' if layer.router.soft else 'renormalize'
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(role_of(name) == 'residual')
    still(model)
    return model.cuda() if torch.cuda.is_available() else model


def load(model: Any, checkpoint: str) -> None:
    content = read_checkpoint(checkpoint)
    state = state_dict_of(content)
    check_prefix(model.backbone, state, BACKBONE)
    inside = {key.removeprefix(BACKBONE): value
              for key, value in state.items() if key.startswith(BACKBONE)}
    if count_experts(model.backbone, inside):
        raise ValueError(f'{checkpoint} is a MoE checkpoint: layers are '
                         'chosen by the gradients of the dense model. Make it '
                         'dense with tools/upcycle.py --to-dense')
    if missing := unfilled(model, content):
        raise ValueError(
            f'{checkpoint} does not fill {missing}. With a head that was not '
            'trained the gradients mean nothing: give the checkpoint of the '
            'whole dense model')
    # The load need not be strict: the head was checked above, and the backbone
    # checks its own part.
    model.load_state_dict(state, strict=False)


def still(model: nn.Module) -> None:
    """Put a model into training mode, but without sources of noise: the
    backbone and norms are in evaluation mode, and there is no dropout and no
    stochastic depth.

    The whole model cannot be in evaluation mode, because some detectors (DINO)
    compute another loss in it.
    """
    model.train()
    model.get_submodule('backbone').eval()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, _InstanceNorm, _DropoutNd,
                               nn.MultiheadAttention)) or (
                                   type(module).__name__ == 'DropPath'):
            module.eval()


def measure(model: Any, batches: Any, count: int
            ) -> list[tuple[float, float]]:
    """Compute both scores of every MoE layer, in forward order.

    Args:
        model: the model that :func:`build_model` returns.
        batches: an iterator over training batches.
        count: the number of batches to use.

    Raises:
        ValueError: if a gradient is nan or inf.
    """
    for _ in range(count):
        data = model.data_preprocessor(next(batches), True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        (loss / count).backward()
    scores = []
    for name, layer in moe_layers(model.backbone).items():
        score = score_of(layer)
        if not all(value < float('inf') for value in score):
            raise ValueError(f'the gradients of {name} are nan or inf: check '
                             'the checkpoint and the data')
        scores.append(score)
    return scores


def score_of(layer: MoELayer) -> tuple[float, float]:
    """The two scores of a layer, from the gradients of its residuals."""
    gradient = divergence = 0.
    for parameter in layer.experts.parameters():
        grad_E: Tensor | None = parameter.grad
        if grad_E is None:
            continue  # The loss does not depend on this layer.
        # One expert at a time is converted, because float64 takes twice the
        # memory.
        mean = grad_E.double().mean(0)
        for grad in grad_E:
            gradient += float(grad.double().square().sum())
            divergence += float((grad.double() - mean).square().sum())
    return gradient**.5, divergence**.5


def rank(scores: Sequence[Score], by: str) -> list[Score]:
    """Sort scores, the best first; equal ones stay in forward order."""
    return sorted(scores, key=lambda score: -getattr(score, by))


def table(ranked: Sequence[Score], by: str, number: int) -> str:
    """A table with a line for each FFN. The share of an FFN is its score
    ``by`` squared, over the sum of all squares, which is the square of the
    score of all layers together."""
    total = sum(getattr(score, by)**2 for score in ranked) or 1.
    lines = [f'{"rank":>4} {"stage":>6} {"block":>6} {"gradient":>11} '
             f'{"divergence":>11} {"share":>7} {"sum":>7}']
    cumulative = 0.
    for place, score in enumerate(ranked, 1):
        share = getattr(score, by)**2 / total
        cumulative += share
        stage = '-' if score.stage is None else score.stage
        lines.append(
            f'{place:>4} {stage:>6} {score.block:>6} {score.gradient:>11.4g} '
            f'{score.divergence:>11.4g} {100 * share:>6.1f}% '
            f'{100 * cumulative:>6.1f}%' + ' <' * (place <= number))
    return '\n'.join(lines)


def as_code(value: Any) -> str:
    """The Python code for a value, as it would be written in a config."""
    if isinstance(value, Mapping) and all(
            isinstance(key, str) and key.isidentifier() for key in value):
        return 'dict(' + ', '.join(f'{key}={as_code(item)}'
                                   for key, item in value.items()) + ')'
    return repr(value)


if __name__ == '__main__':
    run(main)
