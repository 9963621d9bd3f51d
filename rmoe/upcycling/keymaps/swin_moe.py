"""Names in Microsoft's Swin-MoE that Swin does not have: those of Tutel's MoE
layers and of the continuous position bias.

Read rank files with :mod:`rmoe.upcycling.formats.tutel` first, because experts
have to be stacked over all ranks here.
"""
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmoe.upcycling.keymaps.source import Rule

# A key that Swin does not have, and one that Swin V2 has and Swin-MoE has not.
POSITION_BIAS = 'layers.0.blocks.0.attn.cpb_mlp.0.weight'
SWIN_V2 = 'layers.0.blocks.0.attn.logit_scale'

_LAYER = r'layers\.(\d+)\.blocks\.(\d+)\.mlp\._moe_layer\.'
_TO = r'stages.\1.blocks.\2.ffn.'


def _one_row(bias: Tensor) -> Tensor:
    """Reshape a bias (E, 1, width), as older files have it, or (E, width) to
    (E, width)."""
    return bias.reshape(len(bias), -1)


MOE_RULES: tuple[Rule, ...] = (
    (_LAYER + r'gates\.0\.wg\.weight', _TO + 'router.scorer.weight', None),
    (_LAYER + r'gates\.0\.sim_matrix', _TO + 'router.scorer.embeddings',
     torch.t),
    (_LAYER + r'gates\.0\.cosine_projector\.(weight|bias)',
     _TO + r'router.scorer.projector.\3', None),
    (_LAYER + r'gates\.0\.temperature', _TO + 'router.scorer.temperature',
     None),
    (_LAYER + r'experts\.batched_fc1_w',
     _TO + 'experts.residual_fc1_weight', None),
    (_LAYER + r'experts\.batched_fc1_bias',
     _TO + 'experts.residual_fc1_bias', _one_row),
    # Tutel's weight is (E, H, D), because it computes x @ weight.
    (_LAYER + r'experts\.batched_fc2_w', _TO + 'experts.residual_fc2_weight',
     lambda weight: weight.mT),
    (_LAYER + r'experts\.batched_fc2_bias',
     _TO + 'experts.residual_fc2_bias', _one_row),
)
LEFT_OUT = (
    (r'.*relative_coords_table', 'buffer that is computed'),
    (r'.*\._num_global_experts', 'the number of experts'),
)


def check_settings(model: Any, state: Mapping[str, Tensor]) -> None:
    """Check that the model has the same settings as the model of the file.

    The same weights give another position bias if coordinates are normalised
    for windows of another size, and no shape would show that.

    Raises:
        ValueError: if a setting differs. Names the setting to write.
    """
    ours = tuple(model.pretrained_window_sizes)
    theirs = tuple(_pretrained_window(stage, state, size)
                   for stage, size in enumerate(ours))
    if theirs != ours or None in ours:
        wanted = theirs if None not in theirs else (
            'the size it was trained with at each stage, e.g. '
            '(12, 12, 12, 6)')
        raise ValueError(
            'the checkpoint has a continuous position bias (cpb_mlp), '
            'normalised for windows of one size; the model has '
            f'pretrained_window_size={ours}. Set it to {wanted}')
    if any(key.endswith('.mlp.fc1.bias') for key in state):
        _check_fc2_bias(model, state)


def _check_fc2_bias(model: Any, state: Mapping[str, Tensor]) -> None:
    ours = any(name.endswith(('.ffn.layers.1.bias', '.residual_fc2_bias'))
               for name, _ in model.named_parameters())
    theirs = any(key.endswith('.mlp.fc2.bias') for key in state)
    if theirs != ours:
        raise ValueError(
            f'the FFNs of the checkpoint have {"a" if theirs else "no"} bias '
            'on their second layer, those of the model have '
            f'{"one" if ours else "none"}. Set fc2_bias={theirs}')


def _pretrained_window(stage: int, state: Mapping[str, Tensor],
                       default: int | None) -> int | None:
    """The size of the window for which the coordinates of a stage are
    normalised; the default if the file does not tell."""
    key = f'layers.{stage}.blocks.0.attn.relative_coords_table'
    table = state.get(key)
    # The table of a window of one token has no distances.
    if table is None or table.numel() == 2:
        return default
    # The largest value is log2(1 + 8 distance / (pretrained - 1)) / log2(8),
    # which is solved for the pre-trained size.
    distance = (table.shape[1] - 1) // 2
    scaled = 8**float(table.max()) - 1
    if not 0 < scaled < float('inf'):
        raise ValueError(f'{key} {tuple(table.shape)} is no table of '
                         'distances, as its largest value is '
                         f'{float(table.max())}: give another checkpoint')
    return round(8 * distance / scaled) + 1
