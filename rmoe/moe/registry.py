"""The layer's own registry of routers and scorers.

It lets the layer work without OpenMMLab. Where mmengine is installed,
:mod:`rmoe.moe.registered` puts the same classes into mmengine's registries.
"""
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any


class Table:
    """A registry: classes by name, with the two methods of mmengine's
    ``Registry`` that the layer uses."""

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}

    def register_module(self) -> Callable[[type], type]:
        """Return a decorator that registers a class under its own name."""
        def register(kind: type) -> type:
            self.classes[kind.__name__] = kind
            return kind

        return register

    def build(self, config: Mapping,
              default_args: Mapping | None = None) -> Any:
        """Build the object that a config describes.

        Args:
            config: ``type`` is a name of this table (with or without
                ``rmoe.``) or a class; all other keys are its arguments. A
                name that is not in this table is looked up in mmengine's
                registries, if mmengine is installed.
            default_args: values of arguments that ``config`` leaves out.

        Raises:
            ValueError: if ``type`` is missing or unknown.
        """
        if 'type' not in config:
            raise ValueError(f'the config {dict(config)} needs a type: a '
                             f'class, or one of {sorted(self.classes)}')
        args = {**(default_args or {}), **config}
        kind = args.pop('type')
        if isinstance(kind, str):
            found = self.classes.get(kind.removeprefix('rmoe.'))
            if found is None:
                return self._build_elsewhere(kind, config, default_args)
            kind = found
        # mmengine's registries read the scope; this table has none.
        args.pop('_scope_', None)
        return kind(**args)

    def _build_elsewhere(self, name: str, config: Mapping,
                         default_args: Mapping | None) -> Any:
        if find_spec('mmengine') is None:
            raise ValueError(f'type={name!r} is not one of '
                             f'{sorted(self.classes)}. Use one of these '
                             'names, or give the class itself as type')
        from rmoe.registry import MODELS as OPENMMLAB
        if OPENMMLAB.get(name) is None:
            raise ValueError(f'type={name!r} is neither one of '
                             f'{sorted(self.classes)} nor registered in '
                             'mmengine. If it is a class of yours, name its '
                             'module in custom_imports of the config')
        return OPENMMLAB.build(dict(config), default_args=(
            None if default_args is None else dict(default_args)))


MODELS = Table()
