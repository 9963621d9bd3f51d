"""The snippets of docs/anywhere.md run as written, one after the other."""
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NO_OPENMMLAB = '''
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmseg', 'mmdet'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Refuse())
'''


def make_camvid(folder):
    """The shape of the real one, for machines without it."""
    generator = np.random.default_rng(0)
    for i in range(4):
        for part, kind, shape in (('img_dir', 'jpg', (72, 96, 3)),
                                  ('ann_dir', 'png', (72, 96))):
            path = folder / 'data/camvid' / part / 'train' / f'{i}.{kind}'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 11, shape, np.uint8)).save(
                path)


def test_snippets_run_without_openmmlab(tmp_path):
    for name in ('timm', 'transformers', 'torchvision'):
        pytest.importorskip(name)
    snippets = re.findall(r'```python\n(.*?)```',
                          (ROOT / 'docs/anywhere.md').read_text(), re.S)
    assert len(snippets) == 4
    if (ROOT / 'data/camvid').is_dir():
        (tmp_path / 'data').symlink_to(ROOT / 'data')
    else:
        make_camvid(tmp_path)
    checks = ('assert losses[-1] < losses[0]', 'assert os.path.getsize('
              '"adapter.safetensors") < os.path.getsize("dense.safetensors")'
              ' / 10')
    program = NO_OPENMMLAB + '\n'.join([
        snippets[0], snippets[1], checks[1], snippets[2], checks[0],
        snippets[3],
        'assert not {"mmengine", "mmcv", "mmseg", "mmdet"} & set('
        'sys.modules)'])
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, text=True,
        capture_output=True, env={'PYTHONPATH': str(ROOT),
                                  'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
