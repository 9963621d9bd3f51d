"""SwinMoE in place of SwinTransformer in every config that the libraries
ship: the type alone is changed."""
import inspect
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import mmdet
import mmseg
import pytest
import torch
from mmcv.cnn.bricks.drop import DropPath
from mmdet.models.backbones import SwinTransformer as MMDetSwin
from mmengine.config import Config, ConfigDict
from mmseg.models.backbones import SwinTransformer as MMSegSwin
from zoo import parts

from rmoe.backbones import SwinMoE
from rmoe.moe import moe_layers
from rmoe.registry import MODELS

# Configs with a Swin that each library ships, as counted when this was
# written: a walk that finds fewer looks in the wrong place.
SHIPPED = {mmdet: 97, mmseg: 24}
HOSTS = {mmdet: MMDetSwin, mmseg: MMSegSwin}
libraries = pytest.mark.parametrize('library', HOSTS,
                                    ids=lambda library: library.__name__)


def swin_configs(folder: Path) -> Iterator[Path]:
    """Configs that name a Swin, or inherit from one that does."""
    files = {path: path.read_text() for path in folder.rglob('*.py')}
    found = {path for path, text in files.items()
             if re.search('swin', text, re.IGNORECASE)}
    yield from found
    while found:
        names = {path.name for path in found}
        found = {path for path, text in files.items() if path not in found
                 and '_base_' in text and any(name in text for name in names)
                 and not re.search('swin', text, re.IGNORECASE)}
        yield from found
        for path in found:
            del files[path]


@cache
def shipped(library) -> tuple[int, list[dict]]:
    """The number of configs that have a Swin, and its different settings."""
    count, settings = 0, {}
    for path in swin_configs(Path(library.__file__).parent / '.mim/configs'):
        model = Config.fromfile(path).get('model')
        swins = [part for part in parts(model)
                 if part.get('type') == 'SwinTransformer']
        count += bool(swins)
        for swin in swins:
            settings[repr(swin)] = swin
    return count, [dict(swin) for swin in settings.values()]


@libraries
def test_the_walk_finds_them(library):
    assert shipped(library)[0] >= SHIPPED[library]


def described(model):
    """The properties of a model that can be read without running it."""
    model.train()
    shifts = [getattr(module, 'shift_size', getattr(module, 'shift', None))
              for module in model.modules() if hasattr(module, 'w_msa')]
    return dict(
        weights={key: (value.shape, value.requires_grad)
                 for key, value in model.named_parameters()},
        frozen=[name for name, module in model.named_modules()
                if not module.training],
        drop_paths=[round(module.drop_prob, 6) for module in model.modules()
                    if isinstance(module, DropPath)],
        windows=[module.window_size for module in model.modules()
                 if hasattr(module, 'w_msa')],
        shifts=shifts, recomputed=[
            name for name, module in model.named_modules()
            if getattr(module, 'with_cp', False)],
        features=model.num_features, init_cfg=model.init_cfg)


@libraries
def test_every_shipped_config_builds_and_means_the_same(library, monkeypatch):
    # The host reads its drop paths off a tensor, which needs values.
    monkeypatch.setattr(torch, 'linspace',
                        partial(torch.linspace, device='cpu'))
    for swin in shipped(library)[1]:
        with torch.device('meta'):
            theirs = MODELS.build(dict(
                swin, type=f'{library.__name__}.SwinTransformer'))
            ours = MODELS.build(dict(swin, type='rmoe.SwinMoE'))
        assert described(ours) == described(theirs), swin


@libraries
def test_every_shipped_config_builds_with_experts(library):
    for swin in shipped(library)[1]:
        depths = swin['depths']
        layers = ((), ) * (len(depths) - 1) + ((depths[-1] - 1, ), )
        with torch.device('meta'):
            ours = MODELS.build(dict(
                swin, type='rmoe.SwinMoE',
                moe=dict(layers=layers, num_experts=2)))
        assert len(moe_layers(ours)) == 1, swin


@libraries
def test_it_takes_every_setting_of_the_host_with_its_default(library):
    ours, theirs = (inspect.signature(kind).parameters
                    for kind in (SwinMoE, HOSTS[library]))
    # Here None stands for the same layer as the host's default.
    same = dict(act_cfg=None, norm_cfg=None)
    for name, parameter in theirs.items():
        assert ours[name].default == same.get(name, parameter.default), name


SMALL = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2),
             out_indices=(0, 1), window_size=4)


@pytest.mark.parametrize('size, grid', [
    (32, (8, 8)), ((32, ), (8, 8)), ((32, 48), (8, 12)), ([32, 48], (8, 12))])
def test_pretrain_img_size_is_one_side_or_two(size, grid):
    model = SwinMoE(pretrain_img_size=size, use_abs_pos_embed=True, **SMALL)
    assert model.absolute_pos_embed.shape == (1, grid[0] * grid[1], 8)
    assert model(torch.zeros(1, 3, 4 * grid[0], 4 * grid[1]))[0].shape[
        2:] == grid


@pytest.mark.parametrize('convert', [False, True])
@pytest.mark.parametrize('old', [False, True])
def test_pretrained_and_convert_weights(tmp_path, convert, old):
    """A file is recognised by its keys, whatever ``pretrained`` and
    ``convert_weights`` are."""
    torch.manual_seed(1)
    file, x = tmp_path / 'swin.pth', torch.randn(1, 3, 32, 32)
    theirs = MMDetSwin(**SMALL)
    theirs.eval()
    state = theirs.state_dict()
    torch.save(dict(model=original(state) if convert else state), file)
    start = dict(pretrained=str(file)) if old else dict(
        init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    ours = SwinMoE(convert_weights=convert, **start, **SMALL).eval()
    ours.init_weights()
    for key, value in ours.state_dict().items():
        if convert and key.startswith('norm'):
            continue  # the original has a norm of the last stage alone
        assert torch.equal(value, state[key]), key
    if not convert:
        for a, b in zip(ours(x), theirs(x), strict=True):
            assert (a - b).abs().max() < 1e-6


def original(state):
    """Names and channel order of Microsoft's release."""
    order = torch.tensor([0, 2, 1, 3])
    renamed = {}
    for key, value in state.items():
        if re.match(r'norm\d', key):
            continue
        for old, new in (('stages', 'layers'), ('projection', 'proj'),
                         ('attn.w_msa', 'attn'), ('ffn.layers.0.0', 'mlp.fc1'),
                         ('ffn.layers.1', 'mlp.fc2')):
            key = key.replace(old, new)
        if 'downsample' in key:
            quarters = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
            value = quarters[..., order, :].flatten(-2)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize('options, message', [
    (dict(pretrain_img_size=(224, 224, 3)),
     r'pretrain_img_size=\(224, 224, 3\) must be one side'),
    (dict(pretrain_img_size=()), r'pretrain_img_size=\(\) must be one side'),
    (dict(pretrained='a.pth', init_cfg=dict(type='Pretrained')),
     "pretrained='a.pth' and init_cfg=.*remove one"),
    (dict(pretrained=True), 'pretrained=True is no path or URL')])
def test_errors_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        SwinMoE(**SMALL, **options)


def test_a_segmentor_passes_its_pretrained_on(tmp_path):
    """mmseg's segmentors put their own ``pretrained`` into the backbone's
    config."""
    file = tmp_path / 'swin.pth'
    torch.manual_seed(2)
    state = MMSegSwin(**SMALL).state_dict()
    torch.save(state, file)
    segmentor = MODELS.build(ConfigDict(
        type='mmseg.EncoderDecoder', pretrained=str(file),
        backbone=dict(type='rmoe.SwinMoE', **SMALL),
        decode_head=dict(type='mmseg.FCNHead', in_channels=16, channels=8,
                         in_index=1, num_classes=2, num_convs=1,
                         loss_decode=dict(type='mmseg.CrossEntropyLoss'))))
    segmentor.backbone.init_weights()
    key = 'stages.0.blocks.0.ffn.layers.1.weight'
    assert torch.equal(segmentor.backbone.state_dict()[key], state[key])
