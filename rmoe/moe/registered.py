"""Puts the layer's classes into mmengine's registries when it is imported.

mmengine imports it when it first looks up a model type of the scope ``rmoe``.
"""
import rmoe.moe
from rmoe.moe.registry import MODELS as TABLE
from rmoe.registry import MODELS

# Importing rmoe.moe has filled the table.
assert rmoe.moe.__all__
for _name, _kind in TABLE.classes.items():
    MODELS.register_module(name=_name, module=_kind)
