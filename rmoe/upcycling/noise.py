"""Random residuals, by which experts differ from the start."""
import torch
from torch import Tensor, nn

from rmoe.moe import moe_layers
from rmoe.moe.layer import MoELayer


def add_noise(model: nn.Module, std: float, seed: int) -> None:
    """Give the experts random residuals with zero mean over experts.

    Args:
        model: its MoE layers are changed in place.
        std: standard deviation of the noise, relative to that of the core's
            weights.
        seed: seed of the noise.

    Raises:
        ValueError: for a layer without a core, a folded one, or a negative
            ``std``.
    """
    if std < 0:
        raise ValueError(f'noise={std} must not be negative')
    generator = torch.Generator().manual_seed(seed)
    for key, layer in moe_layers(model).items():
        core = layer.core
        if core is None:
            raise ValueError(f'{key} has core=False: noise is added to '
                             'residuals, so leave it out')
        if layer.experts.folded is not None:
            raise ValueError(f'{key} is folded for inference and has no '
                             'residuals: add noise before fold()')
        for name in ('fc1', 'fc2'):
            weight = core.weight(name).detach()
            with torch.no_grad():
                _fill_residual(layer, name, std * weight.std(), generator)


def _fill_residual(layer: MoELayer, name: str, scale: Tensor,
                   generator: torch.Generator) -> None:
    experts = layer.experts

    def centred(parameter: Tensor) -> Tensor:
        noise = torch.randn(parameter.shape, generator=generator)
        return noise - noise.mean(0)

    if experts.rank is None:
        weight = getattr(experts, f'residual_{name}_weight')
        weight.data = scale * centred(weight)
    else:
        # All experts get the same right factor, so that the products of both
        # factors sum to zero over the experts.
        down = getattr(experts, f'residual_{name}_down')
        down.data = down[:1].expand_as(down).clone()
        up = getattr(experts, f'residual_{name}_up')
        up.data = scale / down[0].norm(dim=0).mean() * centred(up)
