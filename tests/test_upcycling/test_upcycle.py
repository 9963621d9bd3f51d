"""Each source's weights through the real loading path, features compared
with a model of that source built at random."""
import copy
import pickle

import pytest
import timm
import torch
from mmdet.models.backbones import SwinTransformer as MMDetSwin
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.backbones import SwinTransformer as MMSegSwin
from torch import nn

from rmoe.backbones import SwinMoE
from rmoe.moe import moe_layers
from rmoe.upcycling import add_noise, fit, to_dense
from rmoe.upcycling.keymaps import SWIN
from rmoe.upcycling.keymaps.swin import to_unfold_order

SMALL = dict(embed_dims=16, depths=(1, 2, 2), num_heads=(1, 2, 4),
             strides=(4, 2, 2), out_indices=(0, 1, 2), window_size=2,
             drop_path_rate=0.)
LAYERS = ((), (1, ), (0, 1))


def randomise(model, std=.1):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def swin(moe=True, **options):
    moe = dict(layers=LAYERS, num_experts=4, router=dict(
        type='TokenChoiceRouter', noise_std=0.), **options) if moe else None
    return SwinMoE(**SMALL, moe=moe).eval()


def timm_swin():
    return randomise(timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, num_classes=5, embed_dim=16,
        depths=(1, 2, 2), num_heads=(1, 2, 4), window_size=2,
        drop_path_rate=0.)).eval()


def original_names(state):
    """timm's state dict as the original release names it."""
    renamed = {}
    for key, value in state.items():
        parts = key.split('.')
        if parts[2:3] == ['downsample']:
            parts[1] = str(int(parts[1]) - 1)
        renamed['.'.join(parts).replace('head.fc.', 'head.')] = value
    return renamed


@pytest.mark.parametrize('moe', [False, True])
@pytest.mark.parametrize('source', ['timm', 'original'])
def test_timm_and_original_release(source, moe):
    theirs = timm_swin()
    state = theirs.state_dict()
    if source == 'original':
        state = original_names(state)
        state['layers.1.blocks.1.attn_mask'] = torch.zeros(1)
    ours = swin(moe)
    # Norms on outputs are not in a classifier: compare before them.
    for i in SMALL['out_indices']:
        setattr(ours, f'norm{i}', nn.Identity())
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    expected = theirs.forward_intermediates(
        x, norm=False, intermediates_only=True)
    for a, b in zip(ours(x), expected, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize('host_class', [MMSegSwin, MMDetSwin])
def test_host_checkpoint_upcycles_and_goes_back(host_class):
    theirs = randomise(host_class(**SMALL))
    theirs.eval()
    moe = swin()
    moe.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 50, 70)
    for a, b in zip(moe(x), theirs(x)):
        assert (a - b).abs().max() < 1e-5
    dense = to_dense(moe)
    again = host_class(**SMALL)
    again.load_state_dict(dense, strict=True)
    for key, value in theirs.state_dict().items():
        assert torch.equal(dense[key], value), key


@pytest.mark.parametrize('options', [{}, dict(rank=2), dict(core=False)],
                         ids=str)
def test_dense_file_resets_a_trained_moe(options):
    # whatever the residuals were, a dense file means the dense function
    dense, moe = randomise(swin(False)), randomise(swin(**options))
    moe.load_state_dict(dense.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(moe(x), dense(x)):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize('options', [{}, dict(rank=2)], ids=str)
def test_noise_is_seeded_and_centred(options):
    models = []
    for seed in (1, 1, 2):
        model = swin(**copy.deepcopy(options))
        torch.manual_seed(5)
        model.load_state_dict(randomise(swin(False)).state_dict())
        for layer in moe_layers(model).values():
            nn.init.ones_(layer.router.scorer.weight)
            if layer.experts.rank:
                for name in ('fc1', 'fc2'):
                    nn.init.normal_(getattr(layer.experts,
                                            f'residual_{name}_down'))
        add_noise(model, 0.1, seed)
        models.append(model)
    same, other = models[1].state_dict(), models[2].state_dict()
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, same[key]), key
    assert any(not torch.equal(value, other[key])
               for key, value in models[0].state_dict().items())
    layer = next(iter(moe_layers(models[0]).values()))
    for name, core in (('fc1', layer.layers[0][0]), ('fc2', layer.layers[1])):
        residual = layer.experts.residual_weight(name)
        assert residual.mean(0).abs().max() < 1e-6
        ratio = residual.std() / core.weight.std()
        assert 0.03 < ratio < 0.3


@pytest.mark.parametrize('load', [
    lambda model, state: model.load_state_dict(state, strict=False),
    lambda model, state: load_state_dict(model, state)],
    ids=['torch', 'mmengine'])
class TestNoLoadIsSilent:

    def test_other_expert_count(self, load):
        four = randomise(swin())
        eight = SwinMoE(**SMALL, moe=dict(layers=LAYERS, num_experts=8))
        before = copy.deepcopy(eight.state_dict())
        with pytest.raises(ValueError, match=r'4 experts in the checkpoint '
                           r'and 8 in the model.*expert_mismatch'):
            load(eight, four.state_dict())
        for key, value in eight.state_dict().items():
            assert torch.equal(value, before[key]), key
        tiled = SwinMoE(**SMALL, moe=dict(layers=LAYERS, num_experts=8,
                                          expert_mismatch='tile')).eval()
        load(tiled, four.state_dict())
        x = torch.randn(1, 3, 64, 64)
        for a, b in zip(tiled(x), four(x)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize('prefix', ['backbone.', 'model.backbone.'])
    def test_wrong_prefix(self, load, prefix):
        state = {prefix + k: v for k, v in swin(False).state_dict().items()}
        with pytest.raises(ValueError, match=f"prefix='{prefix}'"):
            load(swin(), state)

    def test_backbone_missing_from_a_whole_model(self, load):
        model = nn.Module()
        model.backbone = swin()
        with pytest.raises(ValueError, match=r"starts with 'backbone\."):
            load(model, swin(False).state_dict())

    def test_wrong_width(self, load):
        state = SwinMoE(**{**SMALL, 'embed_dims': 32}).state_dict()
        with pytest.raises(ValueError, match=r'patch_embed.projection.weight '
                           r'has shape \(32, 3, 4, 4\).*\(16, 3, 4, 4\)'):
            load(swin(), state)

    @pytest.mark.parametrize('depths, message', [
        ((1, 1, 2), r'stages.1.blocks.1.norm1.weight \(32,\) of the model'),
        ((1, 2, 3), r'stages.2.blocks.2.norm1.weight .* no place')])
    def test_wrong_depth(self, load, depths, message):
        state = SwinMoE(**{**SMALL, 'depths': depths}).state_dict()
        with pytest.raises(ValueError, match=message):
            load(swin(), state)

    def test_another_architecture(self, load):
        state = timm.create_model('vit_tiny_patch16_224',
                                  num_classes=0).state_dict()
        with pytest.raises(ValueError, match=r'is that of a timm.*ViT, the'):
            load(swin(), state)

    def test_moe_file_into_dense_block(self, load):
        with pytest.raises(ValueError, match='--to-dense'):
            load(swin(False), swin().state_dict())

    def test_other_rank(self, load):
        with pytest.raises(ValueError, match='rank'):
            load(swin(rank=2), swin(rank=3).state_dict())

    def test_own_checkpoint(self, load):
        source = randomise(swin())
        target = swin()
        load(target, source.state_dict())
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)


def test_report_has_every_key():
    state = original_names(timm_swin().state_dict())
    model = swin()
    fitted, report = fit(model, state)
    assert set(report.status) == set(fitted) == set(model.state_dict())
    assert report.status['stages.1.blocks.1.ffn.layers.1.bias'] == 'upcycled'
    assert report.status['stages.1.blocks.1.ffn.router.scorer.weight'] == 'new'
    assert report.status['stages.1.blocks.0.ffn.layers.1.bias'] == 'loaded'
    assert report.status['norm1.weight'] == 'new'
    assert set(report.left_out) == {'norm.weight', 'norm.bias', 'head.weight',
                                    'head.bias'}
    assert 'original Swin release' in report.table()


def test_find_prefix():
    key = 'stages.0.blocks.0.attn.w_msa.qkv.weight'
    assert SWIN.find_prefix([f'a.b.{key}']) == 'a.b.'
    assert SWIN.find_prefix([key]) == ''
    assert SWIN.find_prefix(['conv.weight']) is None
    # the shortest, and of equals the first by name
    both = [f'teacher.{key}', f'student.{key}', f'a.teacher.{key}']
    assert SWIN.find_prefix(both) == 'student.'


def test_a_backbone_pickles_whole():
    model = randomise(swin())
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(x)[-1], model(x)[-1])
    with pytest.raises(ValueError, match='no place'):
        again.load_state_dict({**model.state_dict(), 'a': x})


def test_unfold_order():
    # two channels a, b at (0,0) (1,0) (0,1) (1,1) -> a00 a01 a10 a11 b00 ...
    names = torch.tensor([0, 4, 2, 6, 1, 5, 3, 7.])
    assert to_unfold_order(names).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    x = torch.arange(8.).reshape(1, 2, 2, 2)
    assert nn.functional.unfold(x, 2).flatten().tolist() == list(range(8))
