"""Imports run one way: checks -> engine -> backbones -> upcycling -> moe."""
import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rmoe

ROOT = Path(rmoe.__file__).parent
# What each part may import of rmoe.
ALLOWED = {
    'version': set(), '__init__': {'version', 'mmcv_ops', 'needs', 'anywhere'},
    'needs': set(), 'anywhere': {'anywhere', 'upcycling', 'moe'},
    'registry': set(), 'compat': set(), 'mmcv_ops': {'mmcv_ops'},
    'moe': {'moe', 'registry', 'compat'},
    'upcycling': {'upcycling', 'moe', 'compat'},
    'safe_loading': {'upcycling'},
    'parallel': {'parallel', 'upcycling', 'moe', 'registry', 'compat'},
    'backbones': {'backbones', 'upcycling', 'moe', 'registry', 'compat',
                  'safe_loading', 'needs'},
    'engine': {'engine', 'anywhere', 'parallel', 'needs', 'backbones',
               'upcycling', 'moe', 'registry', 'compat', 'safe_loading',
               'report', 'version'},
    'checks': {'checks', 'engine', 'parallel', 'backbones', 'upcycling',
               'moe', 'registry', 'needs'},
    'report': {'report', 'visualization', 'backbones', 'upcycling', 'moe',
               'registry', 'version'},
    'classification': {'classification', 'checks', 'engine', 'registry'},
    'datasets': {'datasets'},
    'visualization': {'visualization', 'moe'},
}


def test_what_is_allowed_runs_one_way():
    TopologicalSorter({part: others - {part}
                       for part, others in ALLOWED.items()}).prepare()


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def files():
    return sorted(ROOT.rglob('*.py'))


@pytest.mark.parametrize('path', files(),
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix('.py')
    for name in imported_modules(path):
        parts = name.split('.')
        if parts[0] == 'rmoe':
            assert parts[1] in ALLOWED[part], f'{path}: {name}'
        assert parts[0] not in ('mmseg', 'mmdet'), f'{path}: {name}'


def test_importing_rmoe_is_cheap():
    code = ('import sys, rmoe; rmoe.__version__;'
            'assert not {"torch", "mmengine", "numpy"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_config_types_need_no_custom_imports(scope):
    code = (
        'import rmoe;'  # mmcv may have no operators of its own
        'from mmengine.registry import HOOKS, MODELS, DefaultScope;'
        f'DefaultScope.get_instance("t", scope_name="{scope}");'
        'MODELS.build(dict(type="rmoe.SwinMoE", embed_dims=8, depths=(1, 1),'
        'num_heads=(1, 1), strides=(4, 2), out_indices=(0, 1),'
        'moe=dict(layers=((), (0, )))));'
        'HOOKS.build(dict(type="rmoe.MoELossHook"))')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT.parent)


def test_no_file_has_two_ideas():
    for path in files():
        assert len(path.read_text().splitlines()) <= 450, path
