"""What folder READMEs write instead of configs gives what those would give.

Expected settings are those of configs that once were files, by hand.
"""
import copy
import re
import shutil
import subprocess
from argparse import ArgumentParser

import pytest
from mmengine.config import Config, DictAction
from zoo import LEAVES, ROOT, load, scope

from rmoe.moe import moe_layers
from rmoe.registry import MODELS
from rmoe.upcycling import weightless

ADE20K = '_upernet_8xb2-160k_ade20k-512x512.py'
TWO = dict(type='TokenChoiceRouter', top_k=2)
# What each name says of moe, beside its layers.
NAMED = {
    'e16k1': dict(num_experts=16),
    'e8k2': dict(num_experts=8, router=TWO),
    'e16k2': dict(num_experts=16, router=TWO),
    'e8k1r16': dict(num_experts=8, rank=16),
}
SHORT = ((), (), (1, 3, 5), (1, ))
LONG = ((), (), (1, 3, 5, 7, 9, 11, 13, 15, 17), (1, ))
CVT_13, VIT = ((), (1, ), (1, 3, 5, 7, 9)), (7, 9, 11)
# moe.layers of the e8k1 configs that had others beside them.
LAYERS = {
    'swin_moe/swin-tiny-patch4-window7-moe-e8k1-in1k-pre' + ADE20K: SHORT,
    'swin_moe/swin-small-patch4-window7-moe-e8k1-in1k-pre' + ADE20K: LONG,
    'swin_moe/swin-base-patch4-window7-moe-e8k1-in22k-pre' + ADE20K: LONG,
    'swin_moe/swin-large-patch4-window7-moe-e8k1-in22k-pre' + ADE20K: LONG,
    'swin_moe/mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco.py': SHORT,
    'swin_moe/mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-ms-crop-3x_coco.py':
        SHORT,
    'swin_moe/mask-rcnn_swin-s-moe-e8k1-p4-w7_fpn_8xb2-1x_coco.py': LONG,
    'swin_moe/mask-rcnn_swin-s-moe-e8k1-p4-w7_fpn_8xb2-ms-crop-3x_coco.py':
        LONG,
    'swin_moe/cascade-mask-rcnn_swin-b-moe-e8k1-p4-w7_fpn_8xb2-ms-crop-3x_'
    'coco.py': LONG,
    'swin_moe/cascade-mask-rcnn_swin-l-moe-e8k1-p4-w7_fpn_8xb2-ms-crop-3x_'
    'coco.py': LONG,
    'cvt_moe/cvt-13-moe-e8k1-in1k-pre' + ADE20K: CVT_13,
    'cvt_moe/cvt-21-moe-e8k1-in1k-pre' + ADE20K:
        ((), (1, 3), (1, 3, 5, 7, 9, 11, 13, 15)),
    'cvt_moe/mask-rcnn_cvt-13-moe-e8k1_fpn_8xb2-1x_coco.py': CVT_13,
    'cvt_moe/mask-rcnn_cvt-13-moe-e8k1_fpn_8xb2-ms-crop-3x_coco.py': CVT_13,
    'vit_moe/vit-small-patch16-moe-e8k1-in1k-pre' + ADE20K: VIT,
    'vit_moe/vit-base-patch16-moe-e8k1-in1k-pre' + ADE20K: VIT,
}
FOLDERS = ('swin_moe', 'cvt_moe', 'vit_moe')


def documented(folder):
    """The options that a README has for each name, as a tool reads them."""
    section = (ROOT / 'configs' / folder / 'README.md').read_text().split(
        '### Other experts and sizes')[1]
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return {name: parser.parse_args(
        ['--cfg-options', *options.split()]).cfg_options
        for name, options in re.findall(
            r'^\| (e\d+k\d+[r\d]*).*\| `(model\.\S.*)` \|$', section, re.M)}


def overridden(path, options):
    cfg = load(path)
    cfg.merge_from_dict(copy.deepcopy(options))
    return cfg


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('experts', NAMED)
def test_a_line_gives_what_the_config_gave(name, experts):
    path = ROOT / 'configs' / name
    cfg = overridden(path, documented(path.parent.name)[experts])
    e8k1 = load(path)
    assert e8k1.model.backbone.pop('moe').to_dict() == dict(
        layers=LAYERS[name], num_experts=8)
    assert cfg.model.backbone.pop('moe').to_dict() == dict(
        layers=LAYERS[name], **NAMED[experts])
    assert cfg.to_dict() == e8k1.to_dict()


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_line_gives_what_the_example_beside_it_is(folder):
    lines = documented(folder)
    assert lines.keys() == NAMED.keys()
    examples = {
        path: path.with_name(re.sub('-moe-e[0-9kr]+', '-moe-e8k1', path.name))
        for path in (ROOT / 'configs' / folder).glob('*-moe-e*')
        if re.search('-moe-(?!e8k1-)e[0-9kr]+-(?!scratch).*160k_', path.name)}
    assert len(examples) == dict(swin_moe=2, cvt_moe=0, vit_moe=1)[folder]
    for path, e8k1 in examples.items():
        experts = re.search('-moe-(e[0-9kr]+)', path.name)[1]
        assert overridden(e8k1, lines[experts]).to_dict() == (
            load(path).to_dict())


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_line_builds_its_experts(folder):
    path = ROOT / 'configs' / next(
        name for name in LAYERS if name.startswith(folder))
    for experts, options in documented(folder).items():
        cfg = overridden(path, options)
        cfg.model.backbone.init_cfg = None
        with scope(cfg), weightless():
            layers = moe_layers(MODELS.build(cfg.model.backbone)).values()
        count, k, rank = re.match(r'e(\d+)k(\d+)r?(\d*)', experts).groups()
        assert layers
        for layer in layers:
            assert (layer.num_experts, layer.router.top_k) == (
                int(count), int(k))
            assert layer.experts.rank == (int(rank) if rank else None)


def write_640(folder, tmp_path, arch=None):
    """Run what the README says, where no such config is; maybe for another
    backbone. Returns the configs it reads and those it writes."""
    script = next(block for block in re.findall(
        r'```bash\n(.*?)```', (ROOT / 'configs' / folder / 'README.md'
                               ).read_text(), re.S) if '640' in block)
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs',
                    ignore=lambda where, names: [
                        name for name in names if name.endswith(
                            '-640x640.py')])
    known = re.search(r'for config in (\w+-\w+)-', script)[1]
    script = script.replace(known, arch or known)
    subprocess.run(['bash', '-euc', script], check=True, cwd=tmp_path)
    wrote = sorted((tmp_path / 'configs').rglob('*-640x640.py'))
    return [path.with_name(path.name.replace('640x640', '512x512'))
            for path in wrote], wrote


@pytest.mark.parametrize('folder', FOLDERS)
def test_configs_of_640(folder, tmp_path):
    data = Config.fromfile(ROOT / 'configs/_base_/datasets/ade20k_640x640.py')
    read, wrote = write_640(folder, tmp_path)
    assert len(wrote) == 2  # the dense one and e8k1
    for before, after in zip(read, wrote):
        cfg, expected = Config.fromfile(after), Config.fromfile(before)
        expected.model.data_preprocessor.size = (640, 640)
        if folder == 'vit_moe':
            expected.model.backbone.img_size = 640
        for key in data:
            expected[key] = data[key]
        assert cfg.to_dict() == expected.to_dict()
        assert ('moe' in cfg.model.backbone) == ('-moe-' in after.name)


def test_configs_of_640_are_as_those_of_swin_t(tmp_path):
    wrote = write_640('swin_moe', tmp_path, 'swin-tiny')[1]
    examples = [path for path in LEAVES if '640x640' in path.name]
    assert len(examples) == 2
    for example in examples:
        found = next(path for path in wrote if path.name == example.name)
        assert Config.fromfile(found).to_dict() == load(example).to_dict()
