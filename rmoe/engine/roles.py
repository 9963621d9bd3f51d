"""Reads from the name of a parameter which role it has in the model.

The roles are 'core', for every dense weight of the backbone, with the cores of
MoE FFNs; 'residual', for the weights that experts add to their core; 'router';
and 'head', for everything outside the backbone. Stages of training and
optimizer settings go by roles.
"""
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rmoe.anywhere.stages import expert_role

ROLES = ('core', 'residual', 'router', 'head')


def role_of(name: str) -> str:
    """The role of a parameter or module of a detector or segmentor.

    Args:
        name: its name in named_parameters() or named_modules() of the whole
            model.
    """
    return expert_role(name) or (
        'core' if 'backbone' in name.split('.') else 'head')


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All parameters of a model by role. A role without parameters has an
    empty list."""
    groups: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        groups[role_of(name)].append(parameter)
    return groups


def norms_with_statistics(model: nn.Module, roles: set[str]
                          ) -> list[nn.Module]:
    """The norm layers of the given roles that have running statistics. In
    training mode these change even if the parameters are frozen."""
    return [
        module for name, module in model.named_modules()
        if isinstance(module, (_BatchNorm, _InstanceNorm))
        and role_of(name) in roles
    ]


def trainable_table(model: nn.Module) -> str:
    """A table with the number of tensors and of parameters of each role and
    whether they train, and the sum in the last line."""
    lines = [f'{"role":<10}{"tensors":>8}{"parameters":>14}  trains']
    trainable = total = 0
    for role, parameters in parameters_by_role(model).items():
        size = sum(p.numel() for p in parameters)
        on = [p.numel() for p in parameters if p.requires_grad]
        trainable, total = trainable + sum(on), total + size
        word = ('yes' if parameters and len(on) == len(parameters) else
                f'{len(on)} of {len(parameters)}' if on else 'no')
        lines.append(f'{role:<10}{len(parameters):>8}{size:>14,}  {word}')
    lines.append(f'trainable: {trainable:,} of {total:,} '
                 f'({100 * trainable / max(total, 1):.1f} %)')
    return '\n'.join(lines)
