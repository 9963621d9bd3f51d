"""Importing this makes the layer's classes known to mmengine's registries."""
import rmoe.moe
from rmoe.moe.registry import MODELS as TABLE
from rmoe.registry import MODELS

assert rmoe.moe.__all__  # its classes are in the table
for _name, _kind in TABLE.classes.items():
    MODELS.register_module(name=_name, module=_kind)
