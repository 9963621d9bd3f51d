"""Models that are built without weights, for conversions that replace all of
them."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def weightless() -> Iterator[None]:
    """Give modules that are built inside this context parameters on the meta
    device, which have no storage and no values.

    So no memory or time is spent on random weights that a checkpoint replaces
    afterwards. Buffers have values as usual.
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
    """Give a weightless model its weights from a complete state dict, such as
    the result of ``fit``.

    Tensors are shared, not copied. Parameters that are on the meta device in
    the state dict too are initialised by their module.
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
    assert start is not None, f'{type(module).__name__} has no init_weights'
    start()
