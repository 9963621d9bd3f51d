"""Adapters: what the experts add, in a file of its own."""
import copy
import re

import pytest
import torch
from any_models import INPUT, MODELS, Own
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import rmoe
from rmoe.moe import moe_layers
from rmoe.upcycling import fold


@pytest.fixture
def trained():
    """A dense model, and the same with experts and a head that differ."""
    dense = Own().eval()
    model = copy.deepcopy(dense)
    rmoe.upcycle(model, (0, ), num_experts=3, rank=2,
                 router=dict(type='TokenChoiceRouter', top_k=2))
    rmoe.set_stage(model, 'residual', head=('head', ))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return dense, model.eval()


@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth'])
def test_it_loads_on_top_of_the_dense_model(trained, tmp_path, name):
    dense, model = trained
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    count = rmoe.save_adapter(model, tmp_path / name, also=('head', ))
    new = copy.deepcopy(dense)
    new.head.reset_parameters()
    report = rmoe.load_adapter(new, tmp_path / name)
    assert list(report.layers) == ['ffn']
    assert moe_layers(new)['ffn'].router.top_k == 2
    assert torch.equal(new(INPUT), model(INPUT))
    assert not torch.equal(new(INPUT), dense(INPUT))
    experts = sum(p.numel() for n, p in model.named_parameters()
                  if p.requires_grad)
    assert count == experts
    rmoe.to_dense(new)
    for key, value in new.state_dict().items():
        assert key.startswith('head') or torch.equal(value, before[key])


def test_halves_of_hugging_face(tmp_path):
    dense = MODELS['HF ViT']().eval()
    model = copy.deepcopy(dense)
    rmoe.upcycle(model, (1, 2), num_experts=2, rank=2)
    rmoe.set_stage(model, 'residual')
    for layer in moe_layers(model).values():
        nn.init.normal_(layer.experts.residual_fc1_up)
    rmoe.save_adapter(model, tmp_path / 'a.safetensors')
    rmoe.load_adapter(dense, tmp_path / 'a.safetensors')
    x = INPUT[..., :32, :32]
    assert torch.equal(dense(x)[0], model(x)[0])


def test_what_trained_is_not_left_out(trained, tmp_path):
    _, model = trained
    with pytest.raises(ValueError, match=r'2 parameters train and would not '
                       r'be in the adapter; the first is head\.weight'):
        rmoe.save_adapter(model, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="also names 'neck'"):
        rmoe.save_adapter(model, tmp_path / 'a.pth', also='neck')
    with pytest.raises(ValueError, match=r'not what rmoe\.upcycle changed'):
        rmoe.save_adapter(Own(), tmp_path / 'a.pth')


def other_weights(dense):
    with torch.no_grad():
        dense.ffn[0].weight.add_(.1)


def other_head(dense):
    dense.head = nn.Linear(8, 5)


def other_width(dense):
    dense.ffn = Own(hidden=24).ffn


@pytest.mark.parametrize('change, match', [
    (other_weights, 'other weights than the model has: a value of ffn'),
    (other_head, r'head\.bias: .* has \(2,\), the model has \(5,\)'),
    (other_width, 'trained on other weights|ffn.experts'),
])
def test_another_model_is_refused_and_stays_dense(trained, tmp_path, change,
                                                  match):
    dense, model = trained
    rmoe.save_adapter(model, tmp_path / 'a.pth', also=('head', ))
    change(dense)
    keys = list(dense.state_dict())
    with pytest.raises(ValueError, match=match):
        rmoe.load_adapter(dense, tmp_path / 'a.pth')
    assert list(dense.state_dict()) == keys and not dense._forward_pre_hooks


def test_the_error_shows_a_value_that_differs(trained, tmp_path):
    dense, model = trained
    rmoe.save_adapter(model, tmp_path / 'a.pth', also=('head', ))
    with torch.no_grad():  # the last value alone
        weight = dense.ffn[0].weight.flatten()[-1:]
        weight.add_(1.)
    now = f'{float(weight):.6g}'
    with pytest.raises(ValueError, match=(
            rf'ffn\.0\.weight is {re.escape(now)} in the model and was '
            rf'(?!{re.escape(now)} )')):
        rmoe.load_adapter(dense, tmp_path / 'a.pth')


def test_a_part_of_a_file_is_refused(trained, tmp_path):
    dense, model = trained
    path = tmp_path / 'a.safetensors'
    rmoe.save_adapter(model, path, also=('head', ))
    with safe_open(path, 'pt') as file:
        meta = file.metadata()
    state = load_file(path)
    del state['ffn.experts.residual_fc2_up']
    save_file(state, path, meta)
    with pytest.raises(ValueError, match=r'ffn\.experts\.residual_fc2_up: .*'
                                         'has nothing, the model has'):
        rmoe.load_adapter(dense, path)
    save_file(state, path)
    with pytest.raises(ValueError, match='is no adapter'):
        rmoe.load_adapter(dense, path)


def test_a_bfloat16_core_is_the_same_core(trained, tmp_path):
    dense, model = trained
    rmoe.save_adapter(model, tmp_path / 'a.pth', also=('head', ))
    rmoe.load_adapter(dense.bfloat16(), tmp_path / 'a.pth')


def test_any_other_weight_is_noticed(trained, tmp_path):
    dense, model = trained
    rmoe.save_adapter(model, tmp_path / 'a.pth', also=('head', ))
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.ffn[3].weight.mul_(1.5)
    with pytest.raises(ValueError, match=r'value of ffn\.3\.weight is'):
        rmoe.load_adapter(other, tmp_path / 'a.pth')


def test_statistics_that_move_are_not_left_out(tmp_path):
    model = Own()
    rmoe.upcycle(model, (0, ), num_experts=2, rank=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('.experts.' in name or '.router.' in name)
    with pytest.raises(ValueError, match='statistics of norm change in train'):
        rmoe.save_adapter(model, tmp_path / 'a.pth')
    rmoe.save_adapter(model, tmp_path / 'a.pth', also=('norm', ))
    rmoe.set_stage(model, 'residual')
    rmoe.save_adapter(model, tmp_path / 'a.pth')


def test_folded_experts_are_no_adapter(trained, tmp_path):
    _, model = trained
    model = copy.deepcopy(model).eval()
    fold(model)
    with pytest.raises(ValueError, match='is folded for inference and has no'):
        rmoe.save_adapter(model, tmp_path / 'a.pth', also=('head', ))


def test_a_router_of_somebody_else_is_in_the_file_if_named(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict(dict(
            gate=nn.ModuleDict(dict(router=nn.Linear(8, 2))),
            ffn=nn.Sequential(nn.Linear(8, 16), nn.GELU(),
                              nn.Linear(16, 8))))

    model = make()
    rmoe.upcycle(model, (0, ), num_experts=2, rank=2)
    rmoe.set_stage(model, 'residual', head=('gate', ))
    nn.init.normal_(model.gate.router.weight)
    with pytest.raises(ValueError, match=r'first is .*gate\.router\.weight'):
        rmoe.save_adapter(model, tmp_path / 'a.pth')
    rmoe.save_adapter(model, tmp_path / 'a.pth', also=('gate', ))
    other = make()
    rmoe.load_adapter(other, tmp_path / 'a.pth')
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_tied_weights_are_saved_once(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict(dict(
            emb=nn.Linear(8, 8, bias=False), ffn=nn.Sequential(
                nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
            head=nn.Linear(8, 8, bias=False)))
        model.head.weight = model.emb.weight
        return model

    model, other = make(), make()
    rmoe.upcycle(model, (0, ), num_experts=2, rank=2)
    rmoe.set_stage(model, 'residual', head=('head', 'emb'))
    nn.init.normal_(model.head.weight)
    rmoe.save_adapter(model, tmp_path / 'a.safetensors', ('head', 'emb'))
    rmoe.load_adapter(other, tmp_path / 'a.safetensors')
    assert torch.equal(other.emb.weight, model.emb.weight)
    assert other.head.weight is other.emb.weight
