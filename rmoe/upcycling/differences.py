"""A message that says, on at most a screen, how a checkpoint and a model
differ."""
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

SHOWN = 3
BLOCK = re.compile(r'(?:stages\.(\d+)\.blocks|layers)\.(\d+)\..+')


def settings_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Settings of a backbone that can be read from the names and shapes of its
    weights, written as in a config.

    Args:
        weights: the weights of a checkpoint or of a model, with the names that
            our backbones use.
    """
    settings = {}
    first = weights.get('patch_embed.projection.weight')
    if first is not None and first.dim() == 4:
        settings['embed_dims'] = str(first.shape[0])
        settings['in_channels'] = str(first.shape[1])
        settings['patch_size'] = str(first.shape[2])
    depths: dict[str, int] = {}
    for key in weights:
        if match := BLOCK.fullmatch(key):
            stage, block = match[1] or '', int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    if '' in depths:
        settings['num_layers'] = str(depths[''])
        if (fc1 := weights.get('layers.0.ffn.layers.0.0.bias')) is not None:
            settings['mlp_dims'] = str(len(fc1))
        scaled = 'layers.0.attn.gamma1.weight' in weights
        settings['layer_scale_init_value'] = '1e-5' if scaled else '0.'
    elif depths:
        settings['depths'] = _tuple(depths[stage] for stage in sorted(depths))
        heads = [weights.get(f'stages.{stage}.blocks.0.attn.w_msa.'
                             'relative_position_bias_table')
                 for stage in sorted(depths)]
        shapes = [table.shape[1] for table in heads if table is not None]
        if len(shapes) == len(heads):
            settings['num_heads'] = _tuple(shapes)
    return settings


def _tuple(numbers: Iterable[int]) -> str:
    return str(tuple(numbers)).replace(' ', '')


def message(source: str, architecture: str, renamed: Mapping[str, Tensor],
            target: Mapping[str, Tensor], differences: list[str]) -> str:
    """Error text that describes the file, the model, and how they differ, and
    says which options make the model like the file.

    Args:
        source: the source whose names the file uses, see
            :class:`rmoe.upcycling.keymaps.Source`.
        architecture: name of the model's architecture.
        renamed: the file's weights, by our names.
        target: the model's weights.
        differences: a sentence for each difference.
    """
    ours, theirs = settings_of(target), settings_of(renamed)
    lines = ['the checkpoint does not fit the model',
             f'  file:  {source}, {len(renamed)} weights{_text(theirs)}',
             f'  model: {architecture}, {len(target)} weights{_text(ours)}']
    count = len(differences)
    lines.append(f'  {count} difference{"s" * (count > 1)}' + (
        f', the first {SHOWN}:' if count > SHOWN else ':'))
    lines += [f'    {line}' for line in differences[:SHOWN]]
    changes = [f'model.backbone.{key}="{value}"'
               for key, value in theirs.items()
               if key in ours and ours[key] != value]
    if changes:
        lines.append('  to make the model like the file: --cfg-options '
                     + ' '.join(changes))
        if 'num_layers' in ours:
            lines.append('  (and model.backbone.arch=None where the config '
                         'names an arch; num_heads is not in a file)')
    else:
        lines.append('  to see what is in the file: python -c "from '
                     'rmoe.upcycling import *; print(*state_dict_of('
                     "read_checkpoint('FILE')), sep='\\n')\"")
    return '\n'.join(lines)


def _text(settings: dict[str, str]) -> str:
    return ''.join(f', {key}={value}' for key, value in settings.items())
