"""Models built without weights, for conversions that bring their own."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def weightless() -> Iterator[None]:
    """Modules built inside have parameters without storage or values.

    Neither memory nor time goes into random weights that a checkpoint then
    replaces. Buffers are real.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str,
                         param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to('meta'),
                                 requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = (  # type: ignore[method-assign]
        register_on_meta)
    try:
        yield
    finally:
        nn.Module.register_parameter = (  # type: ignore[method-assign]
            register)


def give_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make a complete state dict, as ``fit`` gives it, the weights of a
    weightless model.

    Tensors are shared, not copied. What is without values there too starts as
    its module starts it.
    """
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        parameters = dict(module.named_parameters(recurse=False))
        if any(weights[prefix + key].is_meta for key in parameters):
            _initialise(module)
        for key, parameter in parameters.items():
            value = weights[prefix + key]
            if not value.is_meta:
                setattr(module, key, nn.Parameter(
                    value, requires_grad=parameter.requires_grad))
        for key, buffer in module.named_buffers(recurse=False):
            if prefix + key in weights:
                buffer.copy_(weights[prefix + key])


def _initialise(module: nn.Module) -> None:
    module.to_empty(device='cpu', recurse=False)
    start = getattr(module, 'init_weights', None) or getattr(
        module, 'reset_parameters', None)
    assert start is not None, f'{type(module).__name__} cannot start by itself'
    start()
