"""What of a model is gathered at once."""
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmoe.moe import moe_layers

LISTS = (nn.ModuleList, nn.Sequential)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, in forward order.

    A block is the nearest element of a list of modules around a MoE layer,
    and whatever has the class of one: in a Swin all its blocks, also of
    stages without experts.

    Args:
        model: with MoE layers inside.
    """
    modules = dict(model.named_modules())
    kinds = {type(_block_around(name, modules))
             for name in moe_layers(model)}
    return [module for module in modules.values() if type(module) in kinds]


def _block_around(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """From a MoE layer outwards; the layer itself if it is in no list.

    A list of which the layer is an element is one of a block's parts.
    """
    parts = name.split('.')
    for length in range(len(parts) - 2, 0, -1):
        parent = modules['.'.join(parts[:length])]
        if isinstance(parent, LISTS):
            return modules['.'.join(parts[:length + 1])]
    return modules[name]


def keeps_statistics(block: nn.Module) -> bool:
    """Has it a norm whose running statistics are in float32, which wants
    weights of the same type?"""
    return any(isinstance(module, _BatchNorm) for module in block.modules())


def divisible_dimension(shape: Sequence[int], parts: int, first: int
                        ) -> int | None:
    """The first dimension of a shape, from ``first`` on, that can be cut into
    equal parts; None if there is none."""
    return next((dim for dim in range(first, len(shape))
                 if shape[dim] % parts == 0), None)
