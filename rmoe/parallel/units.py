"""The parts of a model whose parameters are gathered together."""
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rmoe.moe import MoELayer, moe_layers

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
LISTS = (nn.ModuleList, nn.Sequential)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, in forward order.

    A block is the innermost module that contains a MoE layer and is an element
    of a list of modules. All modules of the same class are blocks too: in a
    Swin, also those of stages without experts.

    Args:
        model: a model with MoE layers inside.
    """
    modules = dict(model.named_modules())
    kinds = {type(_block_around(name, modules))
             for name in moe_layers(model)}
    return [module for module in modules.values() if type(module) in kinds]


def _block_around(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The block around a MoE layer, or the layer itself if it is in no list.

    A list of which the layer itself is an element is a part of a block and
    does not count.
    """
    parts = name.split('.')
    for length in range(len(parts) - 2, 0, -1):
        parent = modules['.'.join(parts[:length])]
        if isinstance(parent, LISTS):
            return modules['.'.join(parts[:length + 1])]
    return modules[name]


def kept_whole(model: nn.Module, in_low_precision: Sequence[nn.Module]
               ) -> list[nn.Parameter]:
    """Parameters that every process keeps whole and no unit may hold, in order.

    Args:
        model: a model, whose parameters without a dimension are among them.
        in_low_precision: blocks whose norms and routers are among them.
    """
    kept = [one for one in model.parameters() if not one.dim()]
    for block in in_low_precision:
        for module in block.modules():
            if isinstance(module, NORMS):
                kept += module.parameters(recurse=False)
            elif isinstance(module, MoELayer):
                kept += module.router.parameters()
    return list(dict.fromkeys(kept))


def divisible_dimension(shape: Sequence[int], parts: int, first: int
                        ) -> int | None:
    """The first dimension of a shape, from ``first`` on, that can be cut into
    equal parts; None if there is none."""
    return next((dim for dim in range(first, len(shape))
                 if shape[dim] % parts == 0), None)
