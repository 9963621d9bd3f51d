"""Builds the model of a config without memory for its weights, and describes
its parameters and its training."""
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from rmoe.backbones.from_config import backbone_config
from rmoe.checks.checkpoints import take_pretrained
from rmoe.engine.residual_moe_hook import ResidualMoEHook
from rmoe.engine.roles import ROLES, role_of
from rmoe.moe import moe_layers
from rmoe.parallel.units import blocks_of, kept_whole
from rmoe.registry import HOOKS, MODELS, type_name
from rmoe.upcycling import weightless

# The names of the units that are no experts or blocks. Those are named after
# their modules.
REST, WHOLE = '', 'kept whole'
# The state of an optimizer is measured on parameters of these sizes.
PROBES = ((8, 16), (32, 48))
# The keys under which steps of a pipeline have the size of images.
SIZE_KEYS = ('crop_size', 'scale', 'scales', 'size')


@dataclass(frozen=True)
class Parameter:
    """A parameter, with the facts that a plan needs.

    Attributes:
        name: its name in the whole model.
        shape: the shape of the whole tensor.
        unit: the module whose parameters are gathered together with it: the
            experts of a MoE layer, a block, or REST. WHOLE if it is never
            divided.
        block: the name of the block that contains its unit.
        experts: whether dimension 0 is the experts.
        trains: whether it trains in the stage that is planned for.
        trained: whether it trains in that stage or an earlier one, so that the
            optimizer has moments for it.
    """
    name: str
    shape: tuple[int, ...]
    unit: str
    block: str
    experts: bool
    trains: bool
    trained: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)


def build(cfg: Config) -> nn.Module:
    """Build the model in training mode, with parameters that take no memory.

    Raises:
        ValueError: for a model without experts.
    """
    # This raises for a model without experts, and imports the host library.
    backbone_config(cfg)
    settings = deepcopy(cfg.model)
    take_pretrained(settings)
    with weightless():
        model = MODELS.build(settings)
    if not moe_layers(model):
        raise ValueError(f'{cfg.filename} builds no MoE layer: give '
                         'model.backbone a moe=dict(layers=...)')
    return revert_sync_batchnorm(model).train()


def fill(model: nn.Module) -> None:
    """Give a weightless model values, with almost no memory.

    A weight is a strided view of a few random numbers, in which each row
    starts one number later. So rows and experts differ, but the storage has
    only as many numbers as the sum of the sides.
    """
    filled: dict[int, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:
                filled[id(parameter)] = nn.Parameter(
                    _values(name, parameter.shape, generator),
                    requires_grad=parameter.requires_grad)
            setattr(module, name, filled[id(parameter)])


def _values(name: str, shape: torch.Size, generator: torch.Generator
            ) -> Tensor:
    if len(shape) < 2:
        return torch.full(shape, 0. if name.endswith('bias') else 1.)
    numbers = torch.randn(sum(shape), generator=generator) * .02
    return numbers.as_strided(shape, (1, ) * len(shape))


def set_stage(model: nn.Module, stages: Sequence[Sequence[str]],
              bfloat16: bool) -> list[Parameter]:
    """Set ``requires_grad`` as in the most expensive stage.

    The cost of a stage is the memory of its gradients and of the moments of
    all parameters that have trained until then, because the optimizer keeps
    them.

    Args:
        model: the model as its config builds it.
        stages: the roles that train in each stage, in order.
        bfloat16: whether blocks compute in bfloat16.

    Returns:
        All parameters.
    """
    free = {name for name, parameter in model.named_parameters()
            if parameter.requires_grad}
    sizes = {name: parameter.numel()
             for name, parameter in model.named_parameters()}
    best: tuple[int, set[str], set[str]] = (-1, set(), set())
    trained: set[str] = set()
    for roles in stages:
        trains = {name for name in free if role_of(name) in roles}
        trained = trained | trains
        cost = sum(sizes[name] for name in trains) + 2 * sum(
            sizes[name] for name in trained)
        if cost > best[0]:
            best = (cost, trains, trained)
    _, trains, trained = best
    units = units_of(model, bfloat16)
    parameters = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trains)
        role = role_of(name)
        parameters.append(Parameter(
            name, tuple(parameter.shape), *units[name], role == 'residual',
            name in trains, name in trained))
    return parameters


def units_of(model: nn.Module, bfloat16: bool) -> dict[str, tuple[str, str]]:
    """The unit of each parameter, and the block that contains it."""
    names = {module: name for name, module in model.named_modules()}
    blocks = blocks_of(model)
    whole = set(map(id, kept_whole(model, blocks if bfloat16 else [])))
    places = {f'{names[block]}.': (names[block], names[block])
              for block in blocks}
    for block in blocks:
        for layer in moe_layers(block).values():
            experts = names[layer.experts]
            places[f'{experts}.'] = (experts, names[block])
    found = {}
    for name, parameter in model.named_parameters():
        # The innermost module has the longest name.
        inside = max((place for place in places if name.startswith(place)),
                     key=len, default=None)
        found[name] = (WHOLE, WHOLE) if id(parameter) in whole else (
            places[inside] if inside else (REST, REST))
    return found


def stages_of(cfg: Config) -> list[tuple[str, ...]]:
    """The roles that train in each stage of a config."""
    for settings in cfg.get('custom_hooks') or ():
        if type_name(settings) == 'ResidualMoEHook':
            hook = HOOKS.build(settings)
            assert isinstance(hook, ResidualMoEHook)
            return [roles for _, roles, _ in hook.stages]
    return [ROLES]


def moment_bytes(cfg: Config, name: str | None) -> float:
    """The number of bytes that the optimizer keeps for each element of a
    float32 parameter. It is measured after a step on small parameters.

    Args:
        cfg: the config with ``optim_wrapper.optimizer``.
        name: the type of another optimizer to use instead.

    Raises:
        ValueError: for an unknown optimizer, or one whose state does not
            grow with its parameters.
    """
    settings = dict(type=name) if name else (
        cfg.get('optim_wrapper') or {}).get('optimizer')
    if not settings:
        raise ValueError(f'{cfg.filename} has no optim_wrapper.optimizer: '
                         'name one, as in --optimizer AdamW')
    if not isinstance(settings['type'], type) and (
            OPTIMIZERS.get(settings['type']) is None):
        raise ValueError(f'optimizer {settings["type"]!r} is not registered: '
                         'use one of torch.optim, or custom_imports')
    found = {shape: _state_bytes(settings, shape) for shape in PROBES}
    ratios = {count / (shape[0] * shape[1]) for shape, count in found.items()}
    if len(ratios) > 1:
        raise ValueError(
            f'the state of {settings["type"]} does not grow with its '
            f'parameters ({found} bytes), so that its memory cannot be '
            'planned here. Plan with --optimizer AdamW for an upper bound')
    return ratios.pop()


def _state_bytes(settings: Mapping, shape: tuple[int, int]) -> int:
    module = nn.Linear(shape[1], shape[0], bias=False)
    optimizer: Any = build_optim_wrapper(
        module, dict(type='OptimWrapper', optimizer=settings)).optimizer
    module.weight.grad = torch.ones(shape)
    optimizer.step()
    # Tensors with one number are counts of steps, and do not count.
    return sum(value.nbytes for state in optimizer.state.values()
               for value in state.values()
               if isinstance(value, Tensor) and value.numel() > 1)


def image_size(cfg: Config, given: Sequence[int] | None) -> tuple[int, int]:
    """The height and width of the images that the backbone gets in training.

    Raises:
        ValueError: if the config does not say it.
    """
    if given:
        return given[0], given[-1]
    size = (cfg.model.get('data_preprocessor') or {}).get('size')
    if not size:
        # The largest size to which the pipeline resizes or crops is used.
        # Pipelines have the width first.
        sizes = [_pair(one) for one in _sizes(
            (cfg.get('train_dataloader') or {}).get('dataset'))]
        if not sizes:
            raise ValueError(f'{cfg.filename} does not say how large images '
                             'are: give --image-size HEIGHT WIDTH')
        size = max(sizes, key=lambda one: one[0] * one[1])[::-1]
    divisor = (cfg.model.get('data_preprocessor') or {}).get(
        'pad_size_divisor') or 1
    height, width = (side + -side % divisor for side in _pair(size))
    return height, width


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _sizes(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in SIZE_KEYS and value:
                many = isinstance(value, (list, tuple)) and not isinstance(
                    value[0], int)
                yield from value if many else [value]
            else:
                yield from _sizes(value)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _sizes(item)
