"""Sets learning rates and weight decays per layer depth and per role of a
parameter (core, residual, router or head)."""
from collections.abc import Mapping

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from rmoe.engine.roles import ROLES, role_of
from rmoe.registry import OPTIM_WRAPPER_CONSTRUCTORS

OPTIONS = ('layer_decay_rate', 'roles', 'custom_keys', 'norm_decay_mult',
           'bias_decay_mult')
NORMS = (_BatchNorm, _NormBase, nn.GroupNorm, nn.LayerNorm)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Groups parameters by their depth in the backbone and by their role.

    ``paramwise_cfg`` takes these options:

    - ``layer_decay_rate``: the learning rate is multiplied by
      rate ** (last depth - depth), with the depth from the backbone's
      ``get_layer_depth``. None switches it off.
    - ``roles``: ``{role: dict(lr_mult=, decay_mult=)}`` for 'core',
      'residual', 'router' and 'head'.
    - ``custom_keys``: as in mmengine; of the keys that the name of a
      parameter contains, the longest applies.
    - ``norm_decay_mult``, ``bias_decay_mult``: as in mmengine, except that
      the stacked biases of experts count as biases. They get no decay unless
      ``bias_decay_mult`` is set.

    If several options apply to a parameter, their multipliers are multiplied.

    Raises:
        ValueError: for an unknown option or role, or an option for the weight
            decay without a base weight decay.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        for option in self.paramwise_cfg:
            if option not in OPTIONS:
                raise ValueError(f'paramwise_cfg has {option!r}; the options '
                                 f'are {OPTIONS}')
        for role in self.paramwise_cfg.get('roles', {}):
            if role not in ROLES:
                raise ValueError(f'paramwise_cfg.roles has {role!r}; roles '
                                 f'are {ROLES}')

    def __call__(self, model: nn.Module):
        model = getattr(model, 'module', model)
        groups: dict[tuple[float, float], dict] = {}
        norms = _norm_parameters(model)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            lr_mult, decay_mult = self._multipliers(model, name,
                                                    parameter in norms)
            group = groups.setdefault((lr_mult, decay_mult),
                                      dict(params=[], param_names=[]))
            group['params'].append(parameter)
            group['param_names'].append(name)
        return self._build(groups)

    def _multipliers(self, model: nn.Module, name: str, is_norm: bool
                     ) -> tuple[float, float]:
        cfg = self.paramwise_cfg
        lr_mult = decay_mult = 1.
        keys = [key for key in cfg.get('custom_keys', {}) if key in name]
        rules: list[Mapping] = [cfg.get('roles', {}).get(role_of(name), {})]
        if keys:
            key = min(keys, key=lambda key: (-len(key), key))
            rules.append(cfg['custom_keys'][key])
        elif is_norm:
            rules.append(dict(decay_mult=cfg.get('norm_decay_mult', 1.)))
        elif _is_expert_bias(name):
            rules.append(dict(decay_mult=cfg.get('bias_decay_mult', 0.)))
        elif name.endswith('.bias'):
            rules.append(dict(decay_mult=cfg.get('bias_decay_mult', 1.)))
        for rule in rules:
            lr_mult *= rule.get('lr_mult', 1.)
            decay_mult *= rule.get('decay_mult', 1.)
        return lr_mult * self._depth_scale(model, name), decay_mult

    def _depth_scale(self, model: nn.Module, name: str) -> float:
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if rate is None:
            return 1.
        backbone = getattr(model, 'backbone', None)
        get_layer_depth = getattr(backbone, 'get_layer_depth', None)
        if get_layer_depth is None:
            raise ValueError(
                f'layer_decay_rate needs a backbone with get_layer_depth; '
                f'{type(backbone).__name__} has none. Leave it out, or use a '
                'backbone of rmoe')
        depth, num_layers = get_layer_depth(name, 'backbone.')
        return rate**(num_layers - 1 - depth)

    def _build(self, groups: dict[tuple[float, float], dict]):
        params = []
        for (lr_mult, decay_mult), group in sorted(groups.items()):
            # The names are needed for the log only. Left in the group, they
            # would be saved in every checkpoint.
            names = group.pop('param_names')
            group['lr'] = self.base_lr * lr_mult
            if self.base_wd is not None:
                group['weight_decay'] = self.base_wd * decay_mult
            params.append(group)
            print_log(
                f'optimizer group: lr {group["lr"]:.3g}, weight decay '
                f'{group.get("weight_decay", 0):.3g}, {len(names)} tensors, '
                f'e.g. {names[0]}', 'current')
        optimizer = OPTIMIZERS.build(dict(self.optimizer_cfg, params=params))
        return OPTIM_WRAPPERS.build(
            dict(dict(type='OptimWrapper'), **self.optim_wrapper_cfg),
            default_args=dict(optimizer=optimizer))


def _norm_parameters(model: nn.Module) -> set[torch.nn.Parameter]:
    return {parameter for module in model.modules()
            if isinstance(module, NORMS)
            for parameter in module.parameters(recurse=False)}


def _is_expert_bias(name: str) -> bool:
    # The biases of all experts are one (E, width) tensor with a name such as
    # residual_fc1_bias. mmengine recognises only the name "bias", and would
    # apply weight decay to them.
    return role_of(name) == 'residual' and name.endswith('_bias')
