"""Every leaf config loads, trains, and says in its name what it is."""
import re
from math import ceil
from pathlib import Path

import mmdet.models  # noqa: F401
import mmseg.models  # noqa: F401
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, VISUALIZERS
from torch import nn
from zoo import (
    LEAVES,
    ROOT,
    SIDE,
    batch,
    dense_backbone,
    kind_of,
    load,
    parts,
    scope,
    shrink,
    widths_of,
)

from rmoe.engine.moe_loss_hook import install
from rmoe.moe import moe_layers

FOLDERS = sorted({path.parent for path in LEAVES} - {ROOT / 'configs/demo'})
MOE_NAME = re.compile(r'-moe-e(\d+)k(\d+)(?:r(\d+))?')
PARALLEL_NAME = re.compile(r'-sharded(?:-ep(\d+))?(?=_)')
# width of the first stage, depths
ARCHS = {
    'swin': dict(micro=(32, (2, 2, 4, 2)), xtiny=(48, (2, 2, 6, 2)),
                 xt=(48, (2, 2, 6, 2)), tiny=(96, (2, 2, 6, 2)),
                 t=(96, (2, 2, 6, 2)), small=(96, (2, 2, 18, 2)),
                 s=(96, (2, 2, 18, 2)), base=(128, (2, 2, 18, 2)),
                 b=(128, (2, 2, 18, 2)), large=(192, (2, 2, 18, 2)),
                 l=(192, (2, 2, 18, 2))),
    'cvt': {'13': (64, (1, 2, 10)), '21': (64, (1, 4, 16)),
            'xtiny': (32, (1, 2, 6))},
    'vit': dict(tiny=(192, 12), ti=(192, 12), small=(384, 12), s=(384, 12),
                base=(768, 12), b=(768, 12), **{'15b': (1408, 48)}),
}
BACKBONES = dict(swin='rmoe.SwinMoE', cvt='rmoe.CvTMoE', vit='rmoe.ViTMoE')
DETECTORS = {'mask-rcnn': 'MaskRCNN', 'cascade-mask-rcnn': 'CascadeRCNN',
             'retinanet': 'RetinaNet', 'dino-4scale': 'DINO'}
NECKS = dict(fpn='FPN', sfp='rmoe.SimpleFeaturePyramid')
CLASSES = {'ade20k': 150, 'coco': 80, 'camvid': 11, 'bccd': 3, 'scenes': 7,
           'in1k': 1000, 'tiny-imagenet-100': 100}


def each(name, paths):
    return pytest.mark.parametrize(
        name, [pytest.param(path, id=path.stem) for path in paths])


each_leaf = each('path', LEAVES)
each_moe_leaf = each('path', [path for path in LEAVES
                              if MOE_NAME.search(path.stem)])
each_dense_leaf = each('path', [path for path in LEAVES
                                if not MOE_NAME.search(path.stem)])
each_folder = each('folder', FOLDERS)


def types(node):
    return {part['type'] for part in parts(node) if 'type' in part}


def bases(path):
    """The files that a config inherits from."""
    names = Config._get_base_files(str(path))
    return [(path.parent / name).resolve() for name in names]


def repeats(path):
    """Another leaf is the same at eight channels, with fewer experts."""
    name = path.stem.replace('640x640', '512x512')
    name = PARALLEL_NAME.sub('', re.sub(r'-moe-e\d+', '-moe-e8', name))
    return name != path.stem and path.with_stem(name) in LEAVES


@pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem,
                 marks=[pytest.mark.slow] if repeats(path) else [])
    for path in LEAVES])
def test_trains_a_step(path):
    cfg = shrink(load(path))
    with scope(cfg):
        model = MODELS.build(cfg.model).train()
        model.init_weights()
        if cfg.model.backbone.get('moe'):
            install(model)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        maps = []
        if 'neck' in cfg.model:
            model.neck.register_forward_hook(
                lambda module, args, outs: maps.extend(outs))
        data = model.data_preprocessor(batch(cfg), True)
        loss, logged = model.parse_losses(model(**data, mode='loss'))
        wrapper.backward(loss)
        assert loss.isfinite()
        assert bool(moe_layers(model)) == any(
            key.startswith('loss_moe_') for key in logged)
        # DDP asks for a gradient of every parameter.
        assert not [name for name, parameter in model.named_parameters()
                    if parameter.requires_grad and parameter.grad is None]
        before = [parameter.detach().clone()
                  for parameter in model.backbone.parameters()]
        wrapper.step()
        assert not all(map(torch.equal, before, model.backbone.parameters()))
        if kind_of(cfg) == 'det':
            assert_anchors_fit(cfg, maps)
        # What draws predictions asks for the visualizer of the run.
        VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None))
        for hook in [*cfg.default_hooks.values(),
                     *cfg.get('custom_hooks', [])]:
            HOOKS.build(hook)
        build_schedulers(cfg, wrapper)


def assert_anchors_fit(cfg, maps):
    strides = [part.strides for part in parts(cfg.model)
               if part.get('type') == 'AnchorGenerator'] or [[8, 16, 32, 64]]
    sides = [one.shape[-1] for one in maps]
    assert sides == [ceil(SIDE / stride) for stride in strides[0]]
    for part in parts(cfg.model):
        if part.get('type') == 'SingleRoIExtractor':
            assert part.featmap_strides == strides[0][:4]


def build_schedulers(cfg, wrapper):
    loop = cfg.train_cfg
    total = loop.get('max_epochs') or loop.max_iters
    last = cfg.param_scheduler[-1]
    assert last.get('end', total) == total
    assert last.by_epoch == ('max_epochs' in loop)
    for scheduler in cfg.param_scheduler:
        options = dict(scheduler)
        kind = PARAM_SCHEDULERS.get(options.pop('type'))
        if options.pop('convert_to_iter_based', False):
            kind.build_iter_from_epoch(wrapper, epoch_length=9, **options)
        else:
            kind(wrapper, **options)


@each_dense_leaf
def test_heads_take_what_the_backbone_gives(path):
    cfg = load(path)
    widths = widths_of(dense_backbone(cfg))
    kind = kind_of(cfg)
    if kind == 'cls':
        assert cfg.model.in_channels == widths[-1]
        return
    cfg.model.backbone.update(init_cfg=None, with_cp=False)
    with scope(cfg), torch.device('meta'):
        model = MODELS.build(cfg.model).eval()
        image = torch.empty(1, 3, SIDE, SIDE)
        maps = model.extract_feat(image)
        if kind == 'seg':
            assert model.decode_head(maps).shape[1] == (
                cfg.model.decode_head.num_classes)
            if model.with_auxiliary_head:
                model.auxiliary_head(maps)
        elif 'rpn_head' in cfg.model:
            model.rpn_head(maps)
        elif cfg.model.type != 'DINO':
            model.bbox_head(maps)


@each_leaf
def test_name_tells_the_backbone(path):
    cfg, name = load(path), path.stem
    family, arch = re.search(
        r'(?:^|_)(swin|cvt|vit)-([a-z0-9]+)(?=[-_])', name).groups()
    backbone = dense_backbone(cfg)
    first = next(module for module in backbone.modules()
                 if isinstance(module, nn.Conv2d))
    assert cfg.model.backbone.type == BACKBONES[family]
    assert ARCHS[family][arch] == (
        first.out_channels,
        backbone.num_layers if family == 'vit' else backbone.depths)
    if found := re.search(r'-(?:window|w)(\d+)', name):
        assert cfg.model.backbone.window_size == int(found[1])
    if found := re.search(r'-(?:patch|p)(\d+)', name):
        assert first.kernel_size == (int(found[1]), int(found[1]))


@each_leaf
def test_name_tells_the_experts(path):
    cfg, name = load(path), path.stem
    moe = cfg.model.backbone.get('moe')
    hooks = {hook.type for hook in cfg.get('custom_hooks', [])}
    found = MOE_NAME.search(name)
    if not moe:
        assert '-moe' not in name
        assert not hooks & {'rmoe.ResidualMoEHook', 'rmoe.MoELossHook'}
        return
    assert (moe.num_experts, moe.get('router', {}).get('top_k', 1)) == (
        int(found[1]), int(found[2]))
    assert moe.get('rank') == (int(found[3]) if found[3] else None)
    assert {'rmoe.MoELossHook', 'rmoe.RoutingStatsHook'} <= hooks
    scratch, trained = '-scratch' in name, '-rmoe-i' in name
    assert moe.get('core', True) == (not scratch)
    # Experts that learned before, or from the start, need no stages.
    assert ('rmoe.ResidualMoEHook' in hooks) == (not scratch and not trained)


@each_leaf
def test_name_tells_the_wrapper(path):
    wrapper, found = load(path).get('model_wrapper_cfg'), PARALLEL_NAME.search(
        path.stem)
    assert bool(wrapper) == bool(found)
    if found:
        assert wrapper.type == 'rmoe.FullySharded'
        assert wrapper.get('expert_parallel', 1) == int(found[1] or 1)


@each_leaf
def test_name_tells_the_training(path):
    cfg, name = load(path), path.stem
    found = re.search(r'_(\d+)xb(\d+)-([^_]+)(?:_|$)', name)
    if found is None:
        assert path.parent.name == 'demo'
        return
    gpus, images = int(found[1]), int(found[2])
    assert cfg.train_dataloader.batch_size == images
    if 'auto_scale_lr' in cfg:
        assert cfg.auto_scale_lr.base_batch_size == gpus * images
    length, unit = re.search(r'(?:^|-)(\d+)(k|x|e|)(?=-|$)',
                             found[3]).groups()
    length = int(length) * dict(k=1000, x=12).get(unit, 1)
    assert length == cfg.train_cfg[
        'max_epochs' if unit in ('x', 'e') else 'max_iters']
    if kind_of(cfg) == 'det' and unit == 'x':
        assert ('RandomCrop' in types(cfg.train_dataloader)) == (
            'ms-crop' in name)


@each_leaf
def test_name_tells_the_data(path):
    cfg, name = load(path), path.stem
    data = name.rsplit('_', 1)[1]
    classes = next(CLASSES[key] for key in CLASSES if data.startswith(key))
    assert {part['num_classes'] for part in parts(cfg.model)
            if 'num_classes' in part} == {classes}
    root = cfg.train_dataloader.dataset.data_root.rstrip('/')
    assert root.startswith(dict(ade20k='data/ade', coco='data/coco').get(
        data.split('-')[0], ''))
    if found := re.search(r'-(\d+)x(\d+)$', name):
        size = (int(found[1]), int(found[2]))
        sizes = [part[key] for part in parts(cfg.train_dataloader)
                 for key in ('scale', 'size', 'crop_size') if key in part]
        if kind_of(cfg) == 'seg':
            assert cfg.model.data_preprocessor.size == size
            crops = [part.crop_size for part in parts(cfg.train_dataloader)
                     if part.get('type') == 'RandomCrop']
            assert set(crops) <= {size}
        else:
            assert size in sizes or size[0] in sizes


@each_leaf
def test_name_tells_the_pretraining(path):
    cfg, name = load(path), path.stem
    init = cfg.model.backbone.get('init_cfg')
    if '-rmoe-i' in name or '-scratch' in name:
        assert init is None
        # Downstream, they go on from the upstream run of their kind.
        if kind_of(cfg) != 'cls':
            assert ('intermediate' if '-rmoe-i' in name else 'scratch') in (
                cfg.load_from)
        return
    if found := re.search('-(in1k|in22k)-pre', name):
        assert ('22k' in init.checkpoint) == (found[1] == 'in22k')
    elif '-in21k-pre' in name:  # timm's name of the recipe
        assert 'augreg' in init.checkpoint
    elif name.endswith('_coco'):
        arch = re.search('_(swin|cvt|vit)-([a-z0-9]+)', name)
        assert ('22k' in init.checkpoint) == (arch[2] in ('b', 'l'))
    elif kind_of(cfg) == 'seg':
        assert init is None
        return
    if init and '://' in init.checkpoint:
        arch = re.search('(?:swin|vit)-([a-z]+)', name)[1]
        full = dict(t='tiny', s='small', b='base', l='large').get(arch, arch)
        assert f'_{full}_patch' in init.checkpoint
    elif init and init.checkpoint.startswith('hf:'):
        assert init.checkpoint == 'hf:microsoft/' + re.search(
            r'cvt-\d+', name)[0]
        assert cfg.model.backbone.act_cfg == dict(type='GELU')


@each_leaf
def test_name_tells_the_heads(path):
    cfg, name = load(path), path.stem
    if kind_of(cfg) == 'seg':
        heads = dict(upernet='UPerHead', fcn='FCNHead')
        assert cfg.model.decode_head.type == heads[
            re.search('_(upernet|fcn)_', name)[1]]
    elif kind_of(cfg) == 'det':
        assert cfg.model.type == DETECTORS[name.split('_')[0]]
        neck = re.search('_(fpn|sfp)_', name)
        assert cfg.model.neck.type == (
            NECKS[neck[1]] if neck else 'ChannelMapper')
        assert ('CocoDataset' in types(cfg.train_dataloader)
                and cfg.val_evaluator.type == 'CocoMetric')


@each_moe_leaf
def test_moe_leaf_is_its_dense_twin_with_experts(path):
    cfg = load(path)
    twin = bases(path)[0]
    dense = load(twin)
    cfg.pop('model_wrapper_cfg', None)
    if MOE_NAME.search(twin.name):  # the same on one GPU
        assert twin.name == PARALLEL_NAME.sub('', path.name)
        assert cfg.to_dict() == dense.to_dict()
        return
    del cfg.model.backbone['moe']
    if '-scratch' in path.stem or '-rmoe-i' in path.stem:
        for one in (cfg, dense):
            one.model.backbone.pop('init_cfg', None)
            one.pop('load_from')
    elif '-intermediate' in path.stem:
        assert cfg.model == dense.model
        return
    if '-scratch' not in path.stem:
        assert twin.name == MOE_NAME.sub('', path.name).replace('-rmoe-i', '')
    cfg.pop('custom_hooks')
    dense.pop('custom_hooks', None)
    assert cfg.to_dict() == dense.to_dict()


@each_leaf
def test_leaf_is_short_and_shallow(path):
    assert len(path.read_text().splitlines()) <= 40

    def depth(file):
        return 1 + max(map(depth, bases(file)), default=-1)

    assert depth(path) <= 3


@each_folder
def test_metafile_and_readme_name_every_leaf(folder):
    leaves = {path.name for path in folder.glob('*.py')}
    readme = (folder / 'README.md').read_text()
    links = re.findall(r'\]\((?!https?:)([^)#]+)', readme)
    assert leaves <= set(links)
    for link in links:
        assert (folder / link).exists(), link
    metafile = yaml.safe_load((folder / 'metafile.yml').read_text())
    collections = [one['Name'] for one in metafile['Collections']]
    for one in metafile['Collections']:
        assert (ROOT / one['README']).exists()
    for model in metafile['Models']:
        assert model['In Collection'] in collections
        assert model['Name'] == Path(model['Config']).stem
        assert (ROOT / model['Config']).parent == folder
    assert sorted(f"{model['Name']}.py" for model in metafile['Models']) == (
        sorted(leaf for leaf in leaves if MOE_NAME.search(leaf)))


def test_model_index_names_every_metafile():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert sorted(ROOT / name for name in index['Import']) == [
        folder / 'metafile.yml' for folder in FOLDERS]
