"""UpcycledBackbone on hosts of mmseg, mmdet, mmpretrain and timm."""
import pytest
import reference
import torch
from mmcv.cnn.bricks.transformer import FFN
from mmengine.model import BaseModule
from timm.layers import Mlp
from torch import nn

from rmoe.moe import MoEConvMlp, MoEFFN, MoEMlp, moe_layers
from rmoe.registry import MODELS
from rmoe.upcycling import fit, to_dense

VIT = dict(embed_dims=32, num_layers=4, num_heads=2, img_size=(32, 32),
           patch_size=8)
PYRAMID = dict(num_heads=[1, 2], strides=[4, 2], sr_ratios=[2, 1],
               out_indices=(0, 1), drop_path_rate=0.)
TIMM = dict(type='mmseg.TIMMBackbone', pretrained=False, features_only=True,
            embed_dim=16, img_size=32)
PLAIN = ['layers.1.ffn', 'layers.2.ffn']
# Each host, and the names of its second and third FFN.
HOSTS = {
    'ViT': (dict(VIT, type='mmseg.VisionTransformer', final_norm=True,
                 act_cfg=dict(type='ReLU'), drop_path_rate=.3), PLAIN),
    'BEiT': (dict(VIT, type='mmseg.BEiT', out_indices=(1, 3)), PLAIN),
    'SVT': (dict(PYRAMID, type='mmseg.SVT', embed_dims=[16, 32],
                 depths=[2, 2], mlp_ratios=[4, 4], patch_sizes=[4, 2],
                 windiow_sizes=[4, 4]), ['layers.0.1.ffn', 'layers.1.0.ffn']),
    'MiT': (dict(PYRAMID, type='mmseg.MixVisionTransformer', embed_dims=16,
                 num_stages=2, num_layers=[2, 2], patch_sizes=[7, 3]),
            ['layers.0.1.1.ffn', 'layers.1.1.0.ffn']),
    'PVTv2': (dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=32,
                   num_layers=[1] * 4, num_heads=[1] * 4, drop_path_rate=.3),
              ['layers.1.1.0.ffn', 'layers.2.1.0.ffn']),
    'PVTv1': (dict(type='mmdet.PyramidVisionTransformer', embed_dims=32,
                   num_layers=[1] * 4, num_heads=[1] * 4, drop_path_rate=0.,
                   pretrain_img_size=32),
              ['layers.1.1.1.ffn', 'layers.2.1.1.ffn']),
    'MSCAN': (dict(type='mmseg.MSCAN', embed_dims=[8, 16], num_stages=2,
                   depths=[2, 2], mlp_ratios=[4, 4], drop_path_rate=0.,
                   norm_cfg=dict(type='BN')), ['block1.1.mlp', 'block2.0.mlp']),
    'timm Swin': (dict(TIMM, model_name='swin_tiny_patch4_window7_224',
                       depths=(1, 2), num_heads=(1, 2), drop_path_rate=0.,
                       out_indices=(0, 1)),
                  [f'timm_model.layers_1.blocks.{i}.mlp' for i in (0, 1)]),
    'timm ViT': (dict(TIMM, model_name='vit_tiny_patch16_224', depth=3,
                      patch_size=8, num_heads=2, out_indices=(2, )),
                 [f'timm_model.model.blocks.{i}.mlp' for i in (1, 2)]),
    'timm DINOv2-g': (dict(
        TIMM, model_name='vit_giant_patch14_dinov2', depth=3, patch_size=8,
        num_heads=2, mlp_ratio=4, out_indices=(2, )),
        [f'timm_model.model.blocks.{i}.mlp' for i in (1, 2)]),
    'timm EVA-02': (dict(
        TIMM, model_name='eva02_tiny_patch14_224', depth=3, patch_size=8,
        num_heads=2, out_indices=(2, )),
        [f'timm_model.model.blocks.{i}.mlp' for i in (1, 2)]),
    'timm EVA-02-L': (dict(
        TIMM, model_name='eva02_large_patch14_224', depth=3, patch_size=8,
        num_heads=2, out_indices=(2, )),
        [f'timm_model.model.blocks.{i}.mlp' for i in (1, 2)]),
    'mmpretrain ViT': (dict(
        type='mmpretrain.VisionTransformer', img_size=32, patch_size=8,
        out_type='featmap', layer_scale_init_value=.5, arch=dict(
            embed_dims=32, num_layers=3, num_heads=2,
            feedforward_channels=64)), PLAIN),
}
MIX = ('MiT', 'PVTv2', 'MSCAN')
WITH_CORE = (*MIX, 'PVTv1', 'timm EVA-02-L')
TOY = dict(type='rmoe.UpcycledToy')
ROUTER = dict(type='TokenChoiceRouter', noise_std=0., loss_weights={})
TOP_2 = dict(ROUTER, top_k=2)
every_host = pytest.mark.parametrize('name, core', [
    (name, core) for name in HOSTS for core in (True, False)
    if core or name not in WITH_CORE])


@MODELS.register_module(force=True)
class UpcycledToy(BaseModule):
    """A backbone with a batch norm, a table that files may lack, and two kinds
    of FFNs."""

    def __init__(self, num_fcs=2, grad_checkpointing=False, init_cfg=None,
                 **mlp):
        super().__init__(init_cfg)
        self.grad_checkpointing = grad_checkpointing
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        self.register_buffer('table', torch.arange(4))
        self.ffn, self.mlp = FFN(8, 16, num_fcs), Mlp(8, 16, **mlp)


def moe_of(host, **moe):
    moe = dict(dict(layers=(1, 2), num_experts=3, router=ROUTER), **moe)
    return MODELS.build(dict(
        type='rmoe.UpcycledBackbone',
        backbone=host if isinstance(host, dict) else HOSTS[host][0],
        moe={key: value for key, value in moe.items() if value != 'unset'}))


def randomise(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.2)
    return model


def assert_equal(ours, theirs):
    x = torch.randn(2, 3, 32, 32)
    for mode in (False, True):
        outs = []
        for model in (ours, theirs):
            model.train(mode)
            torch.manual_seed(0)  # drops the same paths
            outs.append(model(x))
        for a, b in zip(*outs, strict=True):
            assert (a - b).abs().max() < 1e-5


@every_host
def test_upcycled_equals_dense_and_comes_back(name, core):
    dense = randomise(MODELS.build(HOSTS[name][0]))
    state, moe = dense.state_dict(), moe_of(name, core=core)
    assert type(moe) is type(dense)
    assert list(moe_layers(moe)) == HOSTS[name][1]
    moe.load_state_dict(state)
    assert_equal(moe, dense)
    kept = [key for key in moe.state_dict() if key in state]
    assert not core or kept == list(state)
    for key, value in to_dense(moe).items():
        torch.testing.assert_close(value, state[key], msg=key)


@every_host
def test_a_new_model_has_the_weights_of_the_host(name, core, monkeypatch):
    monkeypatch.setattr(BaseModule, '_dump_init_info', lambda *_: None)
    torch.manual_seed(1)
    host = MODELS.build(HOSTS[name][0])
    torch.manual_seed(1)
    moe = moe_of(name, core=core)
    for key, value in to_dense(moe).items():
        torch.testing.assert_close(value, host.state_dict()[key], msg=key)
    moe.init_weights()
    host.load_state_dict(to_dense(moe))
    assert_equal(moe, host)


@every_host
def test_every_parameter_learns_also_when_recomputed(name, core):
    moe = randomise(moe_of(name, core=core))
    saved, host = moe_of(name, core=core, with_cp=True), HOSTS[name]
    saved.load_state_dict(moe.state_dict())
    x, grads = torch.randn(4, 3, 32, 32), []
    for model in (randomise(MODELS.build(host[0])), moe, saved):
        torch.manual_seed(0)
        sum(out.square().mean() for out in model(x)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for key, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[2][key], msg=key)
        if key.startswith(tuple(host[1])):
            assert grad.any(), key
        else:
            assert (grad is None) == (grads[0][key] is None), key


@pytest.mark.parametrize('router, align', [
    (TOP_2, 'stopgrad'), (TOP_2, 'none'), (TOP_2, 'renormalize'),
    (dict(type='ExpertChoiceRouter', noise_std=0.), 'stopgrad')])
@pytest.mark.parametrize('name', [
    'BEiT', 'SVT', 'PVTv1', 'timm Swin', 'timm ViT', 'timm DINOv2-g',
    'timm EVA-02', 'mmpretrain ViT'])
@torch.no_grad()
def test_inside_the_host_equals_the_oracle(name, router, align):
    moe, calls = randomise(moe_of(name, router=router, align=align)), []
    for layer in moe_layers(moe).values():
        layer.register_forward_hook(lambda *call: calls.append(call),
                                    with_kwargs=True)
    moe(torch.randn(2, 3, 32, 32))
    assert len(calls) == 2
    for layer, (x, *_), kwargs, out in calls:
        rows = x.flatten(0, -2)
        expected = reference.mixture(
            layer, rows, layer.router(rows, None, len(x))).view_as(x)
        if not isinstance(layer, MoEMlp):
            if isinstance(layer, MoEFFN):
                expected = layer.gamma2(expected)
                x = layer.add_identity * x
            expected = expected + kwargs.get('identity', x)
        assert (out - expected).abs().max() < 1e-4


def mix_ffn(layer, x, hw, top_k):
    """The k-th map is made by each token's k-th best expert."""
    logits_TE = layer.router(x.flatten(0, 1), None, len(x)).logits_TE
    gates_TK, experts_TK = logits_TE.softmax(1).topk(top_k)

    def linear(rows, name, experts_T):
        weights = layer.core.weight(name) + layer.experts.residual_weight(name)
        biases = layer.core.bias(name) + getattr(layer.experts,
                                                 f'residual_{name}_bias')
        return torch.stack([weights[expert] @ row + biases[expert]
                            for row, expert in zip(rows, experts_T)])

    out = x.flatten(0, 1)
    for gates, experts_T in zip(gates_TK.split(1, 1), experts_TK.unbind(1)):
        image = linear(x.flatten(0, 1), 'fc1', experts_T).view(
            len(x), *hw, -1).permute(0, 3, 1, 2)
        conv = (layer.dwconv if isinstance(layer, MoEConvMlp)
                else layer.layers[1])
        padded = nn.functional.pad(image, (1, 1, 1, 1))
        image = conv.bias[:, None, None] + sum(
            padded[:, :, i:i + hw[0], j:j + hw[1]] *
            conv.weight[:, :, i, j, None] for i in range(3) for j in range(3))
        hidden = nn.functional.gelu(image).permute(0, 2, 3, 1).flatten(0, 2)
        y = linear(hidden, 'fc2', experts_T)
        fixed = 1 / top_k if layer.align == 'stopgrad' else gates
        out = out + ((fixed - gates) * y).detach() + gates * y
    return out.view_as(x)


def mix_layer(name, **options):
    moe = randomise(moe_of(name, **options))
    return moe_layers(moe)[HOSTS[name][1][1]].eval()


@pytest.mark.parametrize('align', ['stopgrad', 'none'])
@pytest.mark.parametrize('name', MIX)
@pytest.mark.parametrize('top_k', [1, 2])
def test_mix_ffn_equals_loops_over_tokens(name, top_k, align):
    layer = mix_layer(name, router=dict(ROUTER, top_k=top_k), align=align)
    x = torch.randn(2, 15, layer.experts.widths[0], requires_grad=True)
    expected = mix_ffn(layer, x, (3, 5), top_k)
    if isinstance(layer, MoEConvMlp):  # takes maps and adds nothing
        ours = layer(x.mT.unflatten(2, (3, 5))).flatten(2).mT + x
    else:
        ours = layer(x, (3, 5))
    assert (ours - expected).abs().max() < 1e-4
    wanted = [x, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(ours.square().mean(), wanted),
                    torch.autograd.grad(expected.square().mean(), wanted)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('top_k', [1, 2])
@torch.no_grad()
def test_mix_ffn_does_not_depend_on_the_order_of_experts(top_k):
    layer = mix_layer('MiT', router=dict(ROUTER, top_k=top_k))
    x = torch.randn(2, 15, 32)
    before = layer(x, (3, 5))
    for key, parameter in layer.named_parameters():
        if key.startswith(('experts.', 'router.')):
            parameter.copy_(parameter[[2, 0, 1]])
    assert (layer(x, (3, 5)) - before).abs().max() < 1e-5


@pytest.mark.parametrize('layers, chosen', [
    ((3, 1), (1, 3)), (dict(every=2), (1, 3)), (dict(every=3), (2, )),
    (dict(last=1), (3, )), (dict(last=2), (1, 3))])
def test_placements(layers, chosen):
    assert list(moe_layers(moe_of('ViT', layers=layers))) == [
        f'layers.{i}.ffn' for i in chosen]


def test_a_failing_router_names_its_layer():
    moe = moe_of('timm ViT')
    moe.timm_model.model.blocks[1].norm2.weight.data[3] = float('nan')
    with pytest.raises(ValueError, match=r'timm_.*\.1\.mlp of TIMMBackbone: '):
        moe(torch.randn(2, 3, 32, 32))


def test_loads_from_init_cfg(tmp_path):
    state = randomise(MODELS.build(TOY)).state_dict()
    # One weight is missing and one is superfluous.
    state['norm.weight'] = state.pop('table')
    torch.save({f'a.{key}': state[key] for key in state}, tmp_path / 'a.pth')
    moe = MODELS.build(dict(
        type='rmoe.UpcycledBackbone', backbone=TOY, moe=dict(layers=(1, )),
        init_cfg=dict(type='Pretrained', checkpoint=f'{tmp_path}/a.pth',
                      prefix='a.')))
    moe.init_weights()
    for key, value in state.items():
        if key != 'norm.weight':
            assert torch.equal(moe.state_dict()[key], value), key
    report = fit(moe, state)[1]
    assert list(report.left_out) == ['norm.weight']
    assert report.counts()['upcycled'] == 4 and report.status['table'] == 'new'


@pytest.mark.parametrize('key, value, message', [
    ('conv.0.bias', None, r'\(8,\) of the model is not in the checkpoint'),
    ('ffn.layers.1.bias', None, r'\(8,\) of the model is not in the'),
    ('ffn.layers.1.bias', torch.zeros(4),
     r'has shape \(4,\) in the checkpoint and \(8,\)'),
    ('mlp.fc3.bias', torch.zeros(4), r'\(4,\) of the checkpoint has no place'),
    # statistics are weights, although a buffer holds them
    ('conv.1.running_var', None, r'\(8,\) of the model is not in')])
def test_a_checkpoint_that_does_not_fit_is_an_error(key, value, message):
    state = MODELS.build(TOY).state_dict()
    state = {k: v for k, v in {**state, key: value}.items() if v is not None}
    with pytest.raises(ValueError, match=f'{key} {message}'):
        moe_of(TOY, layers=(0, )).load_state_dict(state, strict=False)


@pytest.mark.parametrize('host, options, message', [
    (dict(type='mmseg.ResNet', depth=18), {}, 'ResNet has no FFN.*BasicBlock'),
    *(('ViT', options, message) for options, message in (
        (dict(layers=(1, 4)), 'FFN 4; VisionTransformer has FFNs 0 to 3'),
        (dict(layers=(-1, )), 'names FFN -1'),
        (dict(layers=()), r'layers=\(\) selects none of the 4 FFNs'),
        (dict(layers=dict(every=5)), 'every.: 5.*up to 4 blocks'),
        (dict(layers='unset'), 'moe needs layers'),
        (dict(expert_mismatch='drop'), "expert_mismatch='drop'"))),
    (dict(TOY, grad_checkpointing=True), dict(layers=(0, )),
     'UpcycledToy has grad_checkpointing=True: the host would route'),
    (dict(TOY, num_fcs=3), dict(layers=(0, )), 'num_fcs=3 is not two linear'),
    *((dict(TOY, **mlp), dict(layers=(1, )),
       'FFN 1; UpcycledToy has FFNs 0 to 0')
      for mlp in (dict(use_conv=True), dict(bias=False),
                  dict(out_features=4))),
    (dict(TOY, norm_layer=nn.LayerNorm), dict(layers=(1, ), core=False),
     'experts of a Mlp keep its core, whose norm they share'),
    *((name, dict(core=False), 'core=False: the experts of this FFN keep')
      for name in (*MIX, 'PVTv1')),
    *((name, dict(router=router), f'{router["type"]} does not give every '
       f'token its experts in {mode}') for name in MIX for router, mode in (
        (dict(type='ExpertChoiceRouter'), 'evaluation'),
        (dict(type='SoftRouter'), 'evaluation'),
        (dict(ROUTER, capacity_factor=1.), 'training'),
        (dict(ROUTER, eval_capacity_factor=1.), 'evaluation'))),
])
def test_errors_name_the_value(host, options, message):
    with pytest.raises(ValueError, match=message):
        moe_of(host, **options)


def test_the_mlp_drops_as_before():
    layer = MoEMlp(Mlp(8, 16, drop=(0., 1.)), num_experts=2, router=ROUTER)
    x = torch.randn(2, 5, 8)
    for core_only in (False, True):
        layer.core_only = core_only
        assert not layer.train()(x).any()
        assert layer.eval()(x).any()


def test_experts_are_recomputed_if_asked():
    for with_cp, runs in ((False, 1), (True, 2)):
        for model in (moe_of('ViT', layers=(1, ), with_cp=with_cp),
                      MODELS.build(dict(
                          type='rmoe.ViTMoE', arch='tiny', img_size=32,
                          with_cp=with_cp, moe=dict(
                              layers=(1, ), num_experts=2, router=ROUTER)))):
            calls = []
            layer, = moe_layers(model).values()
            layer.experts.register_forward_hook(
                lambda *_, to=calls: to.append(1))
            model.train()
            outs = model(torch.randn(1, 3, 32, 32))
            sum(out.sum() for out in outs).backward()
            assert len(calls) == runs


@pytest.mark.parametrize('name', ['timm ViT', 'timm Swin', 'timm DINOv2-g'])
def test_files_of_timm_load_into_timm_hosts(name):
    """A file has timm's own names, which TIMMBackbone puts under a prefix."""
    import timm
    options = {key: value for key, value in HOSTS[name][0].items() if key not
               in ('type', 'features_only', 'out_indices', 'pretrained')}
    theirs = randomise(timm.create_model(**options, num_classes=3))
    moe = moe_of(name)
    moe.load_state_dict(theirs.state_dict())
    values = list(to_dense(moe).values())
    for key, value in theirs.state_dict().items():
        if not key.startswith(('head', 'norm', 'fc_norm', 'layers.2')):
            assert any(value.shape == ours.shape and torch.equal(value, ours)
                       for ours in values), key
