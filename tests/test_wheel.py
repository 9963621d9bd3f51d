"""A wheel carries what the README names."""
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_an_installed_wheel_needs_nothing_beside_it(tmp_path):
    """In an environment of its own, away from this checkout, with what it
    depends on."""
    source = tmp_path / 'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        '.*', 'data', 'work_dirs', 'tests', 'docs', '__pycache__'))
    run = partial(subprocess.run, check=True, capture_output=True, text=True,
                  cwd=tmp_path, env={
                      key: value for key, value in os.environ.items()
                      if not key.startswith('PYTHON')})
    run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps',
         '--no-build-isolation', '--wheel-dir', 'wheels', str(source)])
    wheel, = (tmp_path / 'wheels').glob('rmoe-*.whl')
    shutil.rmtree(source)
    run([sys.executable, '-m', 'venv', '--without-pip', 'clean'])
    python = str(tmp_path / 'clean/bin/python')
    site = Path(run([python, '-c', 'import sysconfig; '
                     'print(sysconfig.get_path("purelib"))']).stdout.strip())
    run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps',
         '--target', str(site), str(wheel)])
    # Its libraries are those of the tests, found after its own.
    others = [path for path in sys.path if path.endswith('-packages')]
    (site / 'libraries.pth').write_text('\n'.join(others))
    said = run([python, '-c', """
import rmoe, torch
from importlib.metadata import version
from mmengine.config import Config
from mmengine.registry import MODELS
from pathlib import Path
here = Path(rmoe.__file__).parent
assert version('rmoe') == rmoe.__version__, version('rmoe')
cfg = Config.fromfile(next(here.glob('configs/vit_moe/vit-tiny*moe*.py')))
cfg.model.backbone.init_cfg = None
model = MODELS.build(cfg.model.backbone)
print(here, model(torch.zeros(1, 3, 256, 256))[0].shape)
"""]).stdout
    assert said.split(' ', 1) == [
        str(site / 'rmoe'), 'torch.Size([1, 192, 16, 16])\n']


def test_configs_are_inside_the_package(tmp_path):
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build', '--build-base',
         str(tmp_path / 'base'), '--build-lib', str(tmp_path / 'lib')],
        cwd=ROOT, check=True, capture_output=True)
    built = tmp_path / 'lib/rmoe'
    shipped = {path.relative_to(ROOT / 'configs')
               for path in (ROOT / 'configs').rglob('*.py')}
    assert shipped == {path.relative_to(built / 'configs')
                       for path in (built / 'configs').rglob('*.py')}
    assert (built / 'engine/residual_moe_hook.py').exists()
    # what a report is made of
    assert {path.name for path in (ROOT / 'rmoe/report/assets').iterdir()} == {
        path.name for path in (built / 'report/assets').iterdir()} != set()
