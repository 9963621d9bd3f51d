"""Upcycling: conversion of dense checkpoints to MoE models, and back.

Backbones use it when they load a checkpoint, tools/upcycle.py to write one.
"""
from rmoe.upcycling.choosing import Choice, choose_weights
from rmoe.upcycling.clusters import cluster_routers
from rmoe.upcycling.fit import count_experts, fit
from rmoe.upcycling.folding import fold, to_plain
from rmoe.upcycling.formats import (
    read_checkpoint,
    state_dict_of,
    write_atomically,
    write_checkpoint,
    write_content,
)
from rmoe.upcycling.loading import (
    check_loading,
    check_prefix,
    pretrained_weights,
)
from rmoe.upcycling.measuring import (
    largest_difference,
    layers_that_change_the_function,
    measure_loads,
)
from rmoe.upcycling.noise import add_noise
from rmoe.upcycling.report import Report
from rmoe.upcycling.to_dense import to_dense
from rmoe.upcycling.weightless import give_weights, weightless

__all__ = [
    'Choice', 'Report', 'add_noise', 'check_loading', 'check_prefix',
    'choose_weights', 'cluster_routers', 'count_experts', 'fit', 'fold',
    'give_weights', 'largest_difference', 'layers_that_change_the_function',
    'measure_loads', 'pretrained_weights', 'read_checkpoint', 'state_dict_of',
    'to_dense', 'to_plain', 'weightless', 'write_atomically',
    'write_checkpoint', 'write_content'
]
