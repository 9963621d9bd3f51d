"""The layer's own table of routers and scorers, so that it needs no OpenMMLab.

:mod:`rmoe.moe.registered` puts the same classes into mmengine's registries.
"""
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any


class Table:
    """Classes by name, with the two methods of mmengine's ``Registry`` that
    the layer uses."""

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}

    def register_module(self) -> Callable[[type], type]:
        """A decorator that puts a class in under its own name."""
        def register(kind: type) -> type:
            self.classes[kind.__name__] = kind
            return kind

        return register

    def build(self, config: Mapping,
              default_args: Mapping | None = None) -> Any:
        """What a config describes.

        Args:
            config: ``type``, a name of this table (with or without
                ``rmoe.``) or a class; the rest are its arguments. Other names
                are looked up in mmengine's registries, where it is installed.
            default_args: for arguments that ``config`` leaves out.

        Raises:
            ValueError: without a type, or for an unknown one.
        """
        if 'type' not in config:
            raise ValueError(f'{dict(config)} needs a type, one of '
                             f'{sorted(self.classes)}')
        args = {**(default_args or {}), **config}
        kind = args.pop('type')
        if isinstance(kind, str):
            found = self.classes.get(kind.removeprefix('rmoe.'))
            if found is None:
                return self._build_elsewhere(kind, config, default_args)
            kind = found
        args.pop('_scope_', None)
        return kind(**args)

    def _build_elsewhere(self, name: str, config: Mapping,
                         default_args: Mapping | None) -> Any:
        if find_spec('mmengine') is None:
            raise ValueError(f'type={name!r} is not one of '
                             f'{sorted(self.classes)}; a class can be given '
                             'instead of a name')
        from rmoe.registry import MODELS as OPENMMLAB
        if OPENMMLAB.get(name) is None:
            raise ValueError(f'type={name!r} is neither one of '
                             f'{sorted(self.classes)} nor registered in '
                             'mmengine; see custom_imports')
        return OPENMMLAB.build(dict(config), default_args=(
            None if default_args is None else dict(default_args)))


MODELS = Table()
