"""Which parameters of a MoE model train (2204.09636)."""
from collections.abc import Callable, Collection, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rmoe.moe import moe_layers

# Roles that train in each stage of :func:`set_stage`.
STAGES = {
    'core': ('core', 'head'),
    'residual': ('residual', 'router', 'head'),
    'all': ('core', 'residual', 'router', 'head'),
}
# Where a model keeps its stage.
STAGE = '_rmoe_stage'


def expert_role(name: str) -> str | None:
    """'router', 'residual' or, for everything else, None.

    Args:
        name: of a parameter or module.
    """
    parts = name.split('.')
    if 'router' in parts:
        return 'router'
    if 'experts' in parts and parts[-1].startswith('residual_'):
        return 'residual'
    return None


def roles_in(model: nn.Module) -> Callable[[str], str | None]:
    """:func:`expert_role` of the names of a model: what is called a router
    outside of its MoE layers is none."""
    layers = tuple(f'{name}.' for name in moe_layers(model))
    return lambda name: expert_role(name) if name.startswith(layers) else None


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Is a parameter, by its name, in one of these modules, or one itself?"""
    return any(name == module or name.startswith(f'{module}.')
               for module in modules)


def set_stage(model: nn.Module, stage: str, head: Sequence[str] = ()) -> None:
    """Say what trains from now on; call it before DDP wraps the model.

    - 'core': everything but the experts. MoE layers run their core alone, at
      dense cost, and route nothing. For a new head on a pre-trained model.
    - 'residual': residuals, routers and ``head``; all else is frozen, norm
      statistics included. What is trained is then an adapter.
    - 'all': everything.

    It decides for every parameter of the model: freeze others after it. An
    optimizer that has them all skips the frozen ones, which have no gradient.

    Args:
        model: with MoE layers.
        stage: 'core', 'residual' or 'all'.
        head: names of modules that train in every stage, such as ``('head',
            )`` in timm, ``('classifier', )`` or ``('decode_head', )`` in
            Hugging Face's models.

    Raises:
        ValueError: for an unknown stage or module, or without MoE layers.
    """
    if stage not in STAGES:
        raise ValueError(f'stage={stage!r} is not one of {tuple(STAGES)}')
    head = checked_modules(model, head, 'head')
    role_inside = roles_in(model)

    def role_of(name: str) -> str:
        return role_inside(name) or (
            'head' if is_inside(name, head) else 'core')

    train_roles(model, STAGES[stage], role_of)
    setattr(model, STAGE, stage)
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, _InstanceNorm)):
            _hold(module, role_of(name) not in STAGES[stage])


def train_roles(model: nn.Module, roles: Collection[str],
                role_of: Callable[[str], str],
                leave: Collection[str] = ()) -> None:
    """Let parameters of these roles train and freeze the others. Without
    residuals and routers, MoE layers run their core alone.

    Args:
        model: with MoE layers, not wrapped.
        roles: of 'core', 'residual', 'router' and 'head'.
        role_of: the role of a parameter by its name.
        leave: names of parameters that stay as they are.

    Raises:
        ValueError: without MoE layers, if experts would bypass a wrapped
            core, or if one that is to run alone is not there.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError('found no MoE layer in the model '
                         f'({type(model).__name__}): give it experts by '
                         'rmoe.upcycle(model, layers=...), or an OpenMMLab '
                         'backbone by moe=dict(layers=...)')
    core_only = not {'residual', 'router'} & set(roles)
    for name, layer in layers.items():
        if core_only and layer.core is None:
            raise ValueError(
                f'no expert is to train, but {name} has core=False; add '
                'residual and router to the roles of the stage')
        layer.check_core(name)
    for layer in layers.values():
        layer.core_only = core_only
    for name, parameter in model.named_parameters():
        if name in leave:
            continue
        parameter.requires_grad_(role_of(name) in roles)
        if not parameter.requires_grad:
            parameter.grad = None


def checked_modules(model: nn.Module, names: Sequence[str], option: str
                    ) -> tuple[str, ...]:
    """Raises:
        ValueError: if one is no module or parameter of the model.
    """
    names = (names, ) if isinstance(names, str) else tuple(names)
    known = {name for name, _ in model.named_modules() if name}
    known |= {name for name, _ in model.named_parameters()}
    for name in names:
        if name not in known:
            raise ValueError(
                f'{option} names {name!r}, which {type(model).__name__} does '
                'not have; its parts are '
                f'{", ".join(name for name, _ in model.named_children())}')
    return names


def moving_statistics(model: nn.Module) -> list[str]:
    """Names of the norms whose statistics change in training."""
    return [name for name, module in model.named_modules()
            if isinstance(module, (_BatchNorm, _InstanceNorm))
            and module.track_running_stats
            and _stand_still not in module._forward_pre_hooks.values()]


def release(model: nn.Module) -> None:
    """Undo :func:`set_stage`, if it was called: everything trains."""
    held = [module for module in model.modules()
            if _stand_still in module._forward_pre_hooks.values()]
    for module in held:
        _hold(module, False)
    if hasattr(model, STAGE):
        delattr(model, STAGE)
        model.requires_grad_(True)


def _hold(norm: nn.Module, held: bool) -> None:
    """Keep a norm's statistics as they are, whatever ``train()`` says."""
    hooks = norm._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _stand_still]:
        del hooks[key]
    if held:
        norm.register_forward_pre_hook(_stand_still)


def _stand_still(norm: nn.Module, args: object) -> None:
    norm.eval()
