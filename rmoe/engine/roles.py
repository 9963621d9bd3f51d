"""What a parameter is for, read from its name.

core: every dense weight of the backbone, the cores of MoE FFNs included;
residual: what experts add to their core; router; head: all outside the
backbone.
"""
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rmoe.anywhere.stages import expert_role

ROLES = ('core', 'residual', 'router', 'head')


def role_of(name: str) -> str:
    """Role of a parameter or module of a detector or segmentor.

    Args:
        name: as given by named_parameters() or named_modules() of the whole
            model.
    """
    return expert_role(name) or (
        'core' if 'backbone' in name.split('.') else 'head')


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter under its role; all roles are present."""
    groups: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        groups[role_of(name)].append(parameter)
    return groups


def norms_with_statistics(model: nn.Module, roles: set[str]
                          ) -> list[nn.Module]:
    """Norm layers of the given roles whose running statistics change in
    training although no gradient is asked for."""
    return [
        module for name, module in model.named_modules()
        if isinstance(module, (_BatchNorm, _InstanceNorm))
        and role_of(name) in roles
    ]


def trainable_table(model: nn.Module) -> str:
    """Per role: tensors, parameters, and whether they train; then the sum."""
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
