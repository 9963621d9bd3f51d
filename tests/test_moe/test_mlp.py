"""MLPs of any library as MoE layers, gates and norms included."""
import copy

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from rmoe.moe import MoEMlp
from rmoe.moe.mlp_form import form_of
from rmoe.registry import MODELS
from rmoe.upcycling import fit, to_dense

ROUTER = dict(type='TokenChoiceRouter', noise_std=0., loss_weights={})
D, H = 8, 20


class OneDropout(nn.Module):
    """The MLP of transformers' ViTDet, with one dropout for both places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, H), nn.Linear(H, D)
        self.drop, self.act = nn.Dropout(1.), nn.GELU()

    def forward(self, x):
        return self.drop(self.second(self.drop(self.act(self.first(x)))))


class GateProjection(nn.Module):
    """The MLP of DINOv3 H+, which transformers has from 4.56 on."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, H), nn.Linear(D, H)
        self.down_proj, self.act_fn = nn.Linear(H, D), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Functional(nn.Module):
    """The MLP of transformers' DINOv2-g: both halves of the gate in one linear
    layer, and SiLU called as a function."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x):
        gate, x = self.inside(x).chunk(2, -1)
        return self.out(nn.functional.silu(gate) * x)


MLPS = {
    'Mlp': lambda: Mlp(D, H),
    'Mlp with a norm': lambda: Mlp(D, H, norm_layer=nn.LayerNorm),
    'nested': lambda: nn.Sequential(
        nn.Sequential(nn.Linear(D, H), nn.Dropout(.2), nn.Tanh()),
        nn.Linear(H, D, bias=False)),
    'one dropout': OneDropout,
    'GluMlp': lambda: GluMlp(D, 2 * H, act_layer=nn.Tanh),
    'GluMlp, gate last': lambda: GluMlp(D, 2 * H, gate_last=True,
                                        act_layer=nn.Tanh),
    'SwiGLU': lambda: SwiGLU(D, H),
    'SwiGLU with a norm': lambda: SwiGLU(D, H, norm_layer=nn.LayerNorm,
                                         drop=.3),
    'gate projection': GateProjection,
    'functional': Functional,
}
every_mlp = pytest.mark.parametrize('name', MLPS)
OPTIONS = [dict(core=True), dict(rank=2), dict(core=False)]


def randomised(name):
    mlp = MLPS[name]()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=.4)
    return mlp


def layer_of(mlp, **options):
    options = {'router': ROUTER, **options}
    return MoEMlp(copy.deepcopy(mlp), num_experts=3, **options)


@every_mlp
@pytest.mark.parametrize('options', OPTIONS, ids=str)
@torch.no_grad()
def test_each_expert_is_the_mlp_with_its_weights(name, options):
    mlp = randomised(name).eval()
    if 'norm' in name and options == dict(core=False):
        with pytest.raises(ValueError, match='whose norm they share'):
            layer_of(mlp, **options)
        return
    layer = layer_of(mlp, **options).eval()
    x = torch.randn(4, 5, D)
    assert (layer(x) - mlp(x)).abs().max() < 1e-5
    assert (set(mlp.state_dict()) < set(layer.state_dict())) == (
        layer.core is not None)
    for parameter in layer.experts.parameters():
        parameter.add_(torch.randn_like(parameter) / 5)
    rows = x.flatten(0, 1)
    chosen = layer.router(rows, None, 4).logits_TE.argmax(1)
    assert len(chosen.unique()) > 1
    form, twin = form_of(mlp), copy.deepcopy(mlp)
    for row, out, expert in zip(rows, layer(x).flatten(0, 1), chosen):
        for linear, names in (('fc1', form.fc1), ('fc2', (form.fc2, ))):
            weight = layer.experts.weight(linear, layer.core)[expert]
            bias = layer.experts.bias(linear, layer.core)
            for i, part in enumerate(names):
                own = twin.get_submodule(part)
                own.weight.copy_(weight.chunk(len(names))[i])
                if own.bias is not None:
                    own.bias.copy_(bias[expert].chunk(len(names))[i])
        assert (twin(row) - out).abs().max() < 1e-5


@every_mlp
def test_every_weight_learns_as_in_the_mlp(name):
    mlp = randomised(name).eval()
    layer = layer_of(mlp, router=dict(ROUTER, top_k=3)).eval()
    x = torch.randn(4, 5, D)
    grads = []
    for model in (mlp, layer):
        named = {key: value for key, value in model.named_parameters()
                 if not key.startswith('router.')}
        grads.append(dict(zip(named, torch.autograd.grad(
            model(x).square().mean(), list(named.values())))))
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-5, rtol=1e-4,
                                   msg=key)


@every_mlp
def test_it_drops_as_before(name):
    mlp = randomised(name).train()
    layer = layer_of(mlp).train()
    layer.core_only = True
    x = torch.randn(4, 5, D)
    outs = []
    for model in (mlp, layer):
        torch.manual_seed(3)
        outs.append(model(x))
    assert torch.equal(*outs)
    layer.core_only = False
    # If experts left a dropout out, the bias of the second layer would remain.
    assert layer(x).any() == mlp(x).any()


@MODELS.register_module(force=True)
class GatedToy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mlp = nn.Conv2d(3, D, 4, 4), SwiGLU(D, H)

    def forward(self, x):
        return self.mlp(self.stem(x).flatten(2).mT),


@pytest.mark.parametrize('core', [True, False])
@torch.no_grad()
def test_a_gate_in_two_layers_comes_and_goes(core):
    """Weights load from a dense file, between core=True and core=False, and
    back."""
    def moe_of(core):
        return MODELS.build(dict(
            type='rmoe.UpcycledBackbone', backbone=dict(type='GatedToy'),
            moe=dict(layers=(0, ), num_experts=3, router=ROUTER, core=core)))

    dense = GatedToy().eval()
    state, x = dense.state_dict(), torch.randn(2, 3, 8, 8)
    moe = moe_of(core).eval()
    moe.load_state_dict(state)
    assert (moe(x)[0] - dense(x)[0]).abs().max() < 1e-6
    for parameter in moe.mlp.experts.parameters():
        parameter.add_(torch.randn_like(parameter) / 5)
    other = moe_of(not core).eval()
    fitted, _ = fit(other, moe.state_dict())
    other.load_state_dict(fitted)
    assert (other(x)[0] - moe(x)[0]).abs().max() < 1e-5
    means = [to_dense(model, 'mean', {'mlp': torch.ones(3)})
             for model in (moe, other)]
    for key, value in state.items():
        torch.testing.assert_close(means[0][key], means[1][key])
        assert means[0][key].shape == value.shape
        if key.startswith('mlp.'):
            assert not torch.equal(means[0][key], value)
    for key, rows in zip(('fc1_g', 'fc1_x'), moe.mlp.experts.weight(
            'fc1', moe.mlp.core).mean(0).chunk(2)):
        torch.testing.assert_close(means[0][f'mlp.{key}.weight'], rows)


class Twice(Mlp):
    def forward(self, x):
        return 2 * super().forward(x)


class Dropped(Mlp):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), .5, self.training)


class OwnRouter(Mlp):
    def __init__(self):
        super().__init__(D, H)
        self.router = nn.Identity()


@pytest.mark.parametrize('mlp', [
    Twice(D, H), Dropped(D, H), Mlp(D, H, bias=False), Mlp(D, H, D + 1),
    Mlp(D, H, use_conv=True), nn.Sequential(nn.Linear(D, H), nn.Linear(H, D)),
    nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(4), nn.ReLU(),
                  nn.Linear(H, D)), nn.MultiheadAttention(D, 2)],
    ids=lambda mlp: type(mlp).__name__)
def test_another_form_is_refused(mlp):
    for parameter in mlp.parameters():
        nn.init.zeros_(parameter)  # with zeros, any form gives their output
    before = torch.random.get_rng_state(), mlp.state_dict()
    with pytest.raises(ValueError, match='cannot become a MoE layer'):
        MoEMlp(mlp)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert mlp.training and not any(
        part._forward_hooks for part in mlp.modules())
    assert not any(p.any() for p in mlp.parameters())


def test_a_name_that_the_layer_needs_is_refused():
    with pytest.raises(ValueError, match=r"submodule named \['router'\]"):
        MoEMlp(OwnRouter())


@pytest.mark.parametrize('name', ['Mlp', 'SwiGLU'])
def test_models_without_memory_have_forms_too(name):
    with torch.device('meta'):
        mlp = MLPS[name]()
    assert form_of(mlp) == form_of(MLPS[name]())


@pytest.mark.parametrize('name', ['SwiGLU', 'SwiGLU with a norm', 'GluMlp'])
def test_bfloat16_under_autocast(name):
    mlp = randomised(name).eval()
    layer, x = layer_of(mlp).eval(), torch.randn(4, 5, D)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out.float(), mlp(x), atol=.3, rtol=.1)


class CentredTokens(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x - x.mean(1, keepdim=True))


class CentredBatch(Mlp):
    def forward(self, x):
        if x.dim() == 4:
            raise TypeError('it takes sequences')
        x = super().forward(x)
        return x - x.mean(0) if x.dim() == 3 and len(x) > 1 else x


class Turned(Mlp):
    def forward(self, x):
        return super().forward(x.transpose(1, 2) if x.dim() == 4 else x)


class Clipped(Mlp):
    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


class Scaled(Mlp):
    def forward(self, x, scale=1.):
        return super().forward(x) * scale


def with_act(act):
    mlp = Mlp(D, H)
    mlp.act = act
    return mlp


@pytest.mark.parametrize('mlp', [
    with_act(nn.Softmax(dim=1)), with_act(CentredTokens()),
    with_act(nn.BatchNorm1d(4, affine=False)), CentredBatch(D, H),
    Turned(D, H), Clipped(D, H), Scaled(D, H)], ids=lambda mlp: (
        f'{type(mlp).__name__} {type(mlp.act).__name__}'))
def test_what_mixes_tokens_or_looks_at_more_is_refused(mlp):
    """Each of these modules gives the output of a MLP on some tokens, but not
    on all."""
    assert form_of(mlp) is None


def test_an_activation_in_place_beside_a_gate():
    mlp = SwiGLU(D, H)
    mlp.act = nn.SiLU(inplace=True)
    layer, x = layer_of(mlp), torch.randn(2, 3, D)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), mlp(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_norm_in_other_types(dtype):
    mlp = randomised('SwiGLU with a norm').eval()
    layer, x = layer_of(mlp).eval(), torch.randn(2, 3, D)
    wanted = mlp.to(dtype)(x.to(dtype))
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted, atol=.05, rtol=.05)


def test_a_norm_that_was_replaced_is_that_of_the_experts():
    layer = layer_of(randomised('SwiGLU with a norm')).eval()
    layer.norm, x = nn.LayerNorm(H), torch.randn(2, 3, D)
    nn.init.normal_(layer.norm.weight)
    out = layer(x)
    layer.core_only = True
    torch.testing.assert_close(out, layer(x))


@pytest.mark.parametrize('name', [
    'core', 'align', 'core_keys', 'losses', 'mixture', 'num_experts'])
def test_any_name_of_the_layer_is_refused(name):
    mlp = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))
    mlp.add_module(name, nn.Identity())
    with pytest.raises(ValueError, match=rf"submodule named \['{name}'\]"):
        MoEMlp(mlp, form=form_of(mlp[:3]))


def test_a_parametrized_linear_layer_is_linear():
    mlp = Mlp(D, H)
    nn.utils.parametrizations.weight_norm(mlp.fc1)
    layer, x = layer_of(mlp), torch.randn(2, 3, D)
    torch.testing.assert_close(layer(x), mlp(x))


def test_no_hook_runs_on_made_up_tokens():
    mlp, seen = Mlp(D, H), []
    for part in (mlp, mlp.act):
        part.register_forward_hook(lambda *args: seen.append(args))
    assert form_of(mlp) is not None
    assert not seen and mlp._forward_hooks and mlp.act._forward_hooks
