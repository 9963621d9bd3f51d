"""Training in stages: which parameters of a MoE model train, by their role
(2204.09636)."""
from collections.abc import Callable, Collection, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rmoe.moe import moe_layers

# The roles whose parameters train in each stage of set_stage.
STAGES = {
    'core': ('core', 'head'),
    'residual': ('residual', 'router', 'head'),
    'all': ('core', 'residual', 'router', 'head'),
}
# The attribute of a model that holds the name of its stage.
STAGE = '_rmoe_stage'


def expert_role(name: str) -> str | None:
    """Role that a name tells: 'router', 'residual' or, for all else, None.

    Args:
        name: name of a parameter or module.
    """
    parts = name.split('.')
    if 'router' in parts:
        return 'router'
    if 'experts' in parts and parts[-1].startswith('residual_'):
        return 'residual'
    return None


def roles_in(model: nn.Module) -> Callable[[str], str | None]:
    """A function like :func:`expert_role` for the names of one model. Modules
    outside of its MoE layers that happen to be called 'router' have no role."""
    layers = tuple(f'{name}.' for name in moe_layers(model))
    return lambda name: expert_role(name) if name.startswith(layers) else None


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a name is one of these names, or lies inside of such a module."""
    return any(name == module or name.startswith(f'{module}.')
               for module in modules)


def set_stage(model: nn.Module, stage: str, head: Sequence[str] = ()) -> None:
    """Choose which parameters train from now on. Call it before DDP wraps the
    model.

    - 'core': everything trains but the experts. MoE layers run their core
      alone, at dense cost, and route nothing. This is for a new head on a
      pre-trained model.
    - 'residual': residuals, routers and ``head`` train. All else is frozen,
      norm statistics included, so that the trained part is an adapter.
    - 'all': everything trains.

    It sets ``requires_grad`` of every parameter of the model, so freeze others
    after this call. An optimizer may have all parameters: it skips the frozen
    ones, because they have no gradient.

    Args:
        model: a model with MoE layers.
        stage: 'core', 'residual' or 'all'.
        head: names of modules that train in every stage, such as ``('head',
            )`` in timm, ``('classifier', )`` or ``('decode_head', )`` in
            Hugging Face's models.

    Raises:
        ValueError: for an unknown stage or module, or if the model has no MoE
            layer.
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
    """Let parameters of these roles train and freeze the others. If neither
    residuals nor routers are to train, MoE layers run their core alone.

    Args:
        model: a model with MoE layers, without a wrapper.
        roles: some of 'core', 'residual', 'router' and 'head'.
        role_of: maps the name of a parameter to its role.
        leave: names of parameters that stay as they are.

    Raises:
        ValueError: if the model has no MoE layer, if experts would bypass a
            wrapped core, or if a layer should run its core alone and has none.
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
                'the roles of the stage include no expert, but '
                f'{name} has core=False and cannot run without experts: add '
                'residual and router to the roles')
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
    """The names as a tuple, if the model has them all.

    Raises:
        ValueError: if a name is no module or parameter of the model.
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
    """Undo :func:`set_stage`, if it was called: all parameters train again."""
    held = [module for module in model.modules()
            if _stand_still in module._forward_pre_hooks.values()]
    for module in held:
        _hold(module, False)
    if hasattr(model, STAGE):
        delattr(model, STAGE)
        model.requires_grad_(True)


def _hold(norm: nn.Module, held: bool) -> None:
    """Freeze the running statistics of a norm, whatever ``train()`` says, or
    release them if ``held`` is False."""
    hooks = norm._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _stand_still]:
        del hooks[key]
    if held:
        norm.register_forward_pre_hook(_stand_still)


def _stand_still(norm: nn.Module, args: object) -> None:
    norm.eval()
