"""Copies of sharded models, for averages of weights (mmengine's EMAHook)."""
import copy
from typing import Any

from torch import nn

# The attributes that FSDP sets on a module, beside its hooks and parameters.
MARKS = ('_is_fsdp_managed_module', '_fsdp_use_orig_params')
HOOKS = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks',
         '_backward_hooks', '_state_dict_pre_hooks', '_state_dict_hooks',
         '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks')


def allow_copies(model: nn.Module) -> None:
    """Make copy.deepcopy work for a model that fully_shard has sharded.

    The copy has parameters of the same layout and the model's own hooks, but
    no hooks or state of FSDP. So its parameters and buffers can be read,
    written and saved, but it must not run a forward pass.

    Args:
        model: a sharded model. The classes that fully_shard made for its
            sharded modules get a ``__deepcopy__``.
    """
    from torch.distributed.fsdp import FSDPModule
    for module in model.modules():
        if isinstance(module, FSDPModule):
            type(module).__deepcopy__ = _copy  # type: ignore


def _copy(module: Any, memo: dict[int, Any]) -> nn.Module:
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    plain = _class_before_sharding(type(module))
    twin = plain.__new__(plain)
    memo[id(module)] = twin
    for parameter in module.parameters():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(
                parameter.detach().clone(), parameter.requires_grad)
    left_out = {REGISTRY_KEY, STATE_KEY, *MARKS}
    state = {key: _own(value) if key in HOOKS else value
             for key, value in vars(module).items() if key not in left_out}
    twin.__setstate__(copy.deepcopy(state, memo))
    # Submodules that are no FSDPModules were copied with FSDP's hooks.
    for inside in twin.modules():
        for name in HOOKS:
            setattr(inside, name, _own(getattr(inside, name)))
    return twin


def _class_before_sharding(sharded: type) -> type[nn.Module]:
    from torch.distributed.fsdp import FSDPModule
    return next(base for base in sharded.__mro__[1:]
                if issubclass(base, nn.Module) and
                not issubclass(base, FSDPModule))


def _own(hooks: Any) -> Any:
    """A copy of a dict of hooks without the hooks of FSDP."""
    kept = type(hooks)()
    for key, hook in hooks.items():
        function = getattr(hook, 'hook', hook)  # torch wraps load hooks
        if not getattr(function, '__module__', '').startswith(
                'torch.distributed.'):
            kept[key] = hook
    return kept
