"""A wheel carries what the README names."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
