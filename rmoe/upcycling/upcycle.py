"""Dense weights into a MoE model, MoE weights into another or into a dense
one. Every key of both sides ends in a report; what is left over raises.

Axis letters: E experts, D model width, H hidden width.
"""
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.moe import MoEFFN, moe_layers
from rmoe.moe.experts import core_linear
from rmoe.upcycling import keymaps

EXPERT_MISMATCH = ('raise', 'tile', 'slice', 'merge')
EXPERT_PARTS = ('experts.', 'router.')


@dataclass
class Report:
    """What became of every key.

    Attributes:
        source: who named the file's weights.
        status: for each key of the model: 'loaded', 'upcycled' (a dense FFN
            that is now a core), 'resized', 'new' (not in the file) or
            'converted' (another expert count).
        left_out: for each key of the file that was not used, why.
    """
    source: str
    status: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {**Counter(self.status.values()), 'left out': len(
            self.left_out)}

    def table(self) -> str:
        """One line per outcome: how many keys, and the first few."""
        groups: dict[str, list[str]] = {}
        for key, status in self.status.items():
            groups.setdefault(status, []).append(key)
        for key, reason in self.left_out.items():
            groups.setdefault('left out', []).append(f'{key} ({reason})')
        lines = [f'checkpoint of a {self.source}:']
        for status, keys in groups.items():
            some = ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')
            lines.append(f'  {status:<10}{len(keys):>5}  {some}')
        return '\n'.join(lines)


def fit(model: nn.Module, state: Mapping[str, Tensor],
        expert_mismatch: str = 'raise'
        ) -> tuple[dict[str, Tensor], Report]:
    """Weights for every key of ``model`` from a checkpoint's state dict.

    Args:
        model: a backbone; its MoE layers may be dense in the file.
        state: weights of the backbone alone, named by any known source.
        expert_mismatch: what to do with experts of another count: 'raise';
            'tile' repeats them; 'slice' takes the first; 'merge' averages
            neighbours.

    Returns:
        A complete state dict for the model, and the report.

    Raises:
        ValueError: if the file is of another architecture, another expert
            count, or holds what the model has no place for. Names the first
            mismatching key and both shapes.
    """
    if expert_mismatch not in EXPERT_MISMATCH:
        raise ValueError(f'expert_mismatch={expert_mismatch!r} is not one of '
                         f'{EXPERT_MISMATCH}')
    source = keymaps.recognise(state)
    if source is None:
        known = ', '.join(source.name for source in keymaps.SOURCES)
        raise ValueError(
            'the checkpoint is of no architecture this backbone can read '
            f'({known}); its first keys are {list(state)[:4]}')
    renamed, left_out = keymaps.rename(state, source)
    report = Report(source.name, left_out=left_out)
    target = model.state_dict()
    for name, layer in moe_layers(model).items():
        _convert_layer(name, layer, renamed, target, report, expert_mismatch)
    fitted = {}
    for key, current in target.items():
        fitted[key], status = _fit_key(key, current, renamed)
        report.status.setdefault(key, status)
    _check_leftovers(renamed, target, report)
    return fitted, report


def add_noise(model: nn.Module, std: float, seed: int) -> None:
    """Random residuals with zero mean over experts, to tell them apart.

    Args:
        model: its MoE layers are changed in place.
        std: deviation relative to that of the core's weights.
        seed: of the noise.

    Raises:
        ValueError: for a layer without a core, or a negative ``std``.
    """
    if std < 0:
        raise ValueError(f'noise={std} must not be negative')
    generator = torch.Generator().manual_seed(seed)
    for key, layer in moe_layers(model).items():
        if layer.layers is None:
            raise ValueError(f'{key} has core=False: noise is for residuals')
        for name in ('fc1', 'fc2'):
            core = core_linear(layer.layers, name).weight.detach()
            with torch.no_grad():
                _fill_residual(layer, name, std * core.std(), generator)


def to_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the core: what plain mmseg and mmdet load.

    Experts without a core are averaged. Works on a backbone's state dict or
    a whole model's.

    Raises:
        ValueError: if there is no MoE layer.
    """
    layers = _layers_of(state)
    if not layers:
        raise ValueError('the checkpoint has no MoE layer to make dense')
    dense = {key: value for key, value in state.items()
             if not _is_expert_key(key, layers)}
    for layer in layers:
        if f'{layer}.layers.1.weight' in state:
            continue
        for dense_name, expert_name in (('layers.0.0', 'fc1'),
                                        ('layers.1', 'fc2')):
            for part in ('weight', 'bias'):
                experts = state[
                    f'{layer}.experts.residual_{expert_name}_{part}']
                dense[f'{layer}.{dense_name}.{part}'] = experts.mean(0)
    return dense


def _layers_of(state: Mapping[str, Tensor]) -> list[str]:
    pattern = re.compile(r'(.+)\.experts\.residual_fc1_bias')
    return [match[1] for key in state if (match := pattern.fullmatch(key))]


def _is_expert_key(key: str, layers: list[str]) -> bool:
    return any(
        key.startswith(f'{layer}.{part}') for layer in layers
        for part in EXPERT_PARTS)


def _convert_layer(name: str, layer: MoEFFN, renamed: dict[str, Tensor],
                   target: Mapping[str, Tensor], report: Report,
                   expert_mismatch: str) -> None:
    """Give ``renamed`` every expert key of one layer."""
    own_keys = [key for key in target if _is_expert_key(key, [name])]
    bias_key = f'{name}.experts.residual_fc1_bias'
    if bias_key not in renamed:
        _upcycle_layer(name, layer, renamed, target, report, own_keys)
        return
    _check_router(name, layer, renamed, target)
    num_experts = len(renamed[bias_key])
    if num_experts == layer.num_experts:
        return
    if expert_mismatch == 'raise':
        raise ValueError(
            f'{name} has {num_experts} experts in the checkpoint and '
            f'{layer.num_experts} in the model. Set moe.expert_mismatch to '
            "'tile', 'slice' or 'merge', or num_experts="
            f'{num_experts}')
    for key in own_keys:
        # What is stacked over experts has another shape, the rest of a
        # router (a temperature, a projection) has not.
        if key in renamed and renamed[key].shape != target[key].shape:
            renamed[key] = change_expert_count(
                renamed[key], layer.num_experts, expert_mismatch)
            report.status[key] = 'converted'


def _check_router(name: str, layer: MoEFFN, renamed: Mapping[str, Tensor],
                  target: Mapping[str, Tensor]) -> None:
    """Has the file's router the weights that the model's has?"""
    prefix = f'{name}.router.'
    theirs, ours = ({key.removeprefix(prefix) for key in state
                     if key.startswith(prefix)} for state in (renamed, target))
    if theirs != ours:
        raise ValueError(
            f"{name}: the checkpoint's router has the weights "
            f'{sorted(theirs)}, the {type(layer.router).__name__} of the '
            f'model needs {sorted(ours)}. Set moe.router to the router the '
            'checkpoint was trained with, or make it dense with '
            'tools/upcycle.py --to-dense and upcycle it again')


def change_expert_count(experts: Tensor, num_experts: int, how: str
                        ) -> Tensor:
    """Stacked expert tensor (E, ...) to (num_experts, ...).

    Raises:
        ValueError: if 'slice' or 'merge' is asked for more experts, or
            'merge' for a count that does not divide E.
    """
    count = len(experts)
    if how == 'tile':
        return experts[torch.arange(num_experts) % count]
    if num_experts > count:
        raise ValueError(f"expert_mismatch={how!r} cannot make {num_experts} "
                         f"experts out of {count}; 'tile' can")
    if how == 'slice':
        return experts[:num_experts].clone()
    if count % num_experts:
        raise ValueError(f'expert_mismatch=\'merge\' needs a count that '
                         f'divides {count}, not {num_experts}')
    return experts.unflatten(0, (num_experts, -1)).mean(1)


def _upcycle_layer(name: str, layer: MoEFFN, renamed: dict[str, Tensor],
                   target: Mapping[str, Tensor], report: Report,
                   own_keys: list[str]) -> None:
    """A dense FFN becomes the core, or every expert where there is none."""
    for key in own_keys:
        renamed[key] = target[key].clone()
        report.status[key] = 'new'
    if layer.layers is not None:
        for key in own_keys:
            # Zero residuals make the model equal to the dense one; the
            # right factor of a low-rank residual must stay random.
            if '.residual_' in key and not key.endswith('_down'):
                renamed[key].zero_()
        for key in target:
            if key.startswith(f'{name}.layers.') and key in renamed:
                report.status[key] = 'upcycled'
        return
    for dense_name, expert_name in (('layers.0.0', 'fc1'),
                                    ('layers.1', 'fc2')):
        for part in ('weight', 'bias'):
            dense_key = f'{name}.{dense_name}.{part}'
            key = f'{name}.experts.residual_{expert_name}_{part}'
            if dense_key in renamed:
                dense = renamed.pop(dense_key)
                renamed[key] = dense.expand(layer.num_experts, *dense.shape
                                            ).clone()
                report.status[key] = 'upcycled'


def _fit_key(key: str, current: Tensor, renamed: Mapping[str, Tensor]
             ) -> tuple[Tensor, str]:
    if key.endswith('relative_position_index'):
        return current, 'loaded'
    if key not in renamed:
        # Classification checkpoints have no norms on the stages' outputs.
        if re.fullmatch(r'norm\d+\.(weight|bias)', key):
            return current, 'new'
        raise ValueError(
            f'{key} {tuple(current.shape)} of the model is not in the '
            'checkpoint; it is of another architecture or depth')
    tensor = renamed[key]
    if tensor.shape == current.shape:
        return tensor, 'loaded'
    if key.endswith('relative_position_bias_table') and (
            tensor.shape[1] == current.shape[1]):
        return _resize_table(tensor, len(current)), 'resized'
    if key == 'absolute_pos_embed' and (
            tensor.shape[-1] == current.shape[-1]):
        table = _resize_table(tensor.flatten(0, -2), current.shape[1])
        return table[None], 'resized'
    raise ValueError(
        f'{key} has shape {tuple(tensor.shape)} in the checkpoint and '
        f'{tuple(current.shape)} in the model: another architecture, width '
        'or rank')


def _resize_table(table: Tensor, length: int) -> Tensor:
    """Bicubic resize of a square (L, channels) table."""
    old, new = round(len(table)**0.5), round(length**0.5)
    grid = table.t().reshape(1, -1, old, old).float()
    grid = F.interpolate(grid, (new, new), mode='bicubic',
                         align_corners=False)
    return grid.reshape(table.shape[1], length).t().to(table.dtype)


def _check_leftovers(renamed: Mapping[str, Tensor],
                     target: Mapping[str, Tensor], report: Report) -> None:
    for key, tensor in renamed.items():
        if key in target:
            continue
        if re.fullmatch(r'norm\d+\.(weight|bias)', key):
            report.left_out[key] = 'norm of a stage not in out_indices'
            continue
        if _is_expert_key(key, _layers_of(renamed)):
            raise ValueError(
                f'{key} {tuple(tensor.shape)} of the checkpoint belongs to a '
                'MoE layer where the model is dense: name its block in '
                'moe.layers, or convert the file with tools/upcycle.py '
                '--to-dense')
        raise ValueError(
            f'{key} {tuple(tensor.shape)} of the checkpoint has no place in '
            'the model: another architecture or depth')


def _fill_residual(layer: MoEFFN, name: str, scale: Tensor,
                   generator: torch.Generator) -> None:
    experts = layer.experts

    def centred(parameter: Tensor) -> Tensor:
        noise = torch.randn(parameter.shape, generator=generator)
        return noise - noise.mean(0)

    if experts.rank is None:
        weight = getattr(experts, f'residual_{name}_weight')
        weight.copy_(scale * centred(weight))
    else:
        # One right factor for all, so that the products sum to zero.
        down = getattr(experts, f'residual_{name}_down')
        down.copy_(down[:1].expand_as(down).clone())
        up = getattr(experts, f'residual_{name}_up')
        up.copy_(scale / down[0].norm(dim=0).mean() * centred(up))
