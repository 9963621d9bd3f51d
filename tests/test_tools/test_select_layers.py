"""The first-order scores of FFNs agree with other ways to compute them."""
import json
from types import SimpleNamespace

import pytest
import select_layers
import torch
from commands import command
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from select_layers import Score, build_model, measure, placement, still
from toy import BACKBONE, ToySegmentor, toy_config, toy_model

from rmoe.moe import moe_layers
from rmoe.registry import MODELS

VIT = dict(
    type='rmoe.ViTMoE', embed_dims=16, num_layers=3, num_heads=2, mlp_dims=32,
    img_size=32, patch_size=8, layer_scale_init_value=1.,
    moe=dict(layers=(1, ), num_experts=4))
SEGFORMER = dict(
    type='rmoe.UpcycledBackbone',
    backbone=dict(
        type='mmseg.MixVisionTransformer', embed_dims=16, num_stages=1,
        num_layers=[2], num_heads=[1], patch_sizes=[7], strides=[8],
        sr_ratios=[1], out_indices=(0, )),
    moe=dict(layers=dict(last=1), num_experts=4))
SWIN = dict(BACKBONE, drop_path_rate=.3, drop_rate=.2)


def dense_model(backbone):
    dense = (backbone['backbone'] if 'backbone' in backbone
             else dict(backbone, moe=None))
    return ToySegmentor(dense)


def save(path, model):
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


def write(tmp_path, backbone, **moe):
    """A toy config, and its dense model with random weights."""
    backbone = dict(backbone, moe=dict(backbone['moe'], **moe))
    cfg = toy_config(tmp_path / 'work', backbone=backbone)
    cfg.dump(tmp_path / 'config.py')
    save(tmp_path / 'dense.pth', dense_model(backbone))
    return cfg


def choose(capsys, tmp_path, *flags):
    command(select_layers, tmp_path / 'config.py', tmp_path / 'dense.pth',
            '--batches', 2, '--out', tmp_path / 'out.json', *flags)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith('moe='))
    return (eval(f'dict({line})')['moe'],
            json.loads((tmp_path / 'out.json').read_text()), out)


@pytest.mark.parametrize('backbone, ffns', [
    (SWIN, [[0, 0], [1, 0], [1, 1]]), (VIT, [[None, i] for i in range(3)]),
    (SEGFORMER, [[None, 0], [None, 1]])], ids=['swin', 'vit', 'segformer'])
def test_what_is_printed_is_what_the_backbone_takes(tmp_path, capsys, backbone,
                                                    ffns):
    write(tmp_path, backbone)
    moe, result, out = choose(capsys, tmp_path, '--num-layers', 2)
    scores = result['scores']
    assert sorted([s['stage'], s['block']] for s in scores) == ffns
    assert [s['gradient'] for s in scores] == sorted(
        (s['gradient'] for s in scores), reverse=True)
    best = sorted((s['stage'], s['block']) for s in scores[:2])
    named = moe['layers']
    if ffns[0][0] is None:
        assert named == tuple(block for _, block in best)
    else:
        assert [(stage, block) for stage, blocks in enumerate(named)
                for block in blocks] == best
    assert moe['num_experts'] == 4
    assert moe.get('router') == backbone['moe'].get('router')
    model = MODELS.build(dict(backbone, moe=moe))
    assert len(moe_layers(model)) == 2
    assert sum(line.endswith(' <') for line in out.splitlines()) == 2
    # By default as many layers are chosen as the config has.
    _, result, _ = choose(capsys, tmp_path)
    flat = [block for blocks in result['layers'] for block in (
        blocks if isinstance(blocks, list) else [blocks])]
    assert len(flat) == (2 if backbone is SWIN else 1)


def test_shares_are_of_squares():
    ranked = [Score(None, 1, 4., 0.), Score(None, 0, 3., 0.)]
    lines = select_layers.table(ranked, 'gradient', 1).splitlines()
    assert lines[1].split()[-3:] == ['64.0%', '64.0%', '<']
    assert lines[2].split()[-2:] == ['36.0%', '100.0%']


def test_ranks():
    scores = [Score(0, 0, 1., 3.), Score(0, 1, 2., 2.), Score(1, 0, 2., 1.)]
    assert select_layers.rank(scores, 'gradient') == [
        scores[1], scores[2], scores[0]]
    assert select_layers.rank(scores, 'divergence') == scores
    positions = [(score.stage, score.block) for score in scores]
    assert placement([(1, 0), (0, 1)], positions) == ((1, ), (0, ))
    assert placement([(0, 1), (0, 0)], positions) == ((0, 1), ())


def test_a_layer_that_cannot_matter_comes_last(tmp_path, capsys):
    """LayerScale multiplies the output of block 1's FFN by zero."""
    cfg = write(tmp_path, VIT)
    model = dense_model(cfg.model.backbone)
    model.backbone.layers[1].ffn.gamma2.weight.data.zero_()
    save(tmp_path / 'dense.pth', model)
    for by in ('gradient', 'divergence'):
        _, result, _ = choose(capsys, tmp_path, '--rank-by', by)
        assert [score[by] > 0 for score in result['scores']] == [
            True, True, False]
        assert result['scores'][2]['block'] == 1


def test_a_layer_behind_the_last_output_comes_last(tmp_path, capsys):
    write(tmp_path, dict(VIT, out_indices=(1, )))
    moe, result, _ = choose(capsys, tmp_path, '--num-layers', 2)
    assert result['scores'][2] == dict(stage=None, block=2, gradient=0.,
                                       divergence=0.)
    assert moe['layers'] == (0, 1)


def model_and_batches(tmp_path, backbone, count=2, **moe):
    cfg = write(tmp_path, backbone, **moe)
    model = build_model(cfg, cfg.model.backbone, str(tmp_path / 'dense.pth'))
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    batches = iter(loader)
    return model, [next(batches) for _ in range(count)]


@torch.no_grad()
def loss_of(model, batches):
    total = 0.
    for batch in batches:
        loss, _ = model.parse_losses(model(
            **model.data_preprocessor(batch, True), mode='loss'))
        total += float(loss) / len(batches)
    return total


@pytest.mark.parametrize('backbone, moe', [
    (SWIN, dict()),
    (SWIN, dict(router=dict(type='TokenChoiceRouter', top_k=2))),
    (SWIN, dict(router=dict(type='ExpertChoiceRouter'))),
    (SWIN, dict(router=dict(type='SoftRouter'))),
    (VIT, dict(rank=2)), (VIT, dict(core=False, align='none')),
    (SEGFORMER, dict())],
    ids=['k=1', 'k=2', 'expert choice', 'soft', 'low rank', 'no core',
         'segformer'])
def test_scores_are_slopes_of_the_loss(tmp_path, backbone, moe):
    """The scores by finite differences along two directions: the normalised
    gradient, and the same without its mean over experts."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        model, batches = model_and_batches(tmp_path, backbone, **moe)
    scores = measure(model, iter(batches), len(batches))
    layers = list(moe_layers(model.backbone).values())
    assert len(scores) == len(layers)
    eps = 3e-2
    for layer, score in zip(layers, scores):
        parameters = list(layer.experts.parameters())
        for which, value in enumerate(score):
            grads = [p.grad if which == 0 else p.grad - p.grad.mean(0)
                     for p in parameters]
            slopes = []
            with torch.no_grad():
                for sign in (1, -1):
                    for p, grad in zip(parameters, grads):
                        p.copy_(sign * eps / value * grad)
                    slopes.append(sign * loss_of(model, batches) / (2 * eps))
                for p in parameters:
                    p.zero_()
            assert sum(slopes) == pytest.approx(value, rel=.02)


def test_scores_by_hand(tmp_path):
    """The scores from the inputs and output gradients of the dense model's
    FFNs, and from the experts to which the routers send the tokens."""
    model, batches = model_and_batches(tmp_path, SWIN, count=1)
    scores = measure(model, iter(batches), 1)
    dense = dense_model(SWIN)
    dense.load_state_dict(torch.load(tmp_path / 'dense.pth')['state_dict'])
    still(dense)
    kept = {}
    for name in moe_layers(model.backbone):
        for fc in ('0.0', '1'):
            linear = dense.backbone.get_submodule(f'{name}.layers.{fc}')

            def note(module, args, out, key=(name, fc)):
                out.retain_grad()
                kept[key] = (args[0].detach().flatten(0, -2), out)

            linear.register_forward_hook(note)
    data = dense.data_preprocessor(batches[0], True)
    loss, _ = dense.parse_losses(dense(**data, mode='loss'))
    loss.backward()
    for (name, layer), score in zip(moe_layers(model.backbone).items(),
                                    scores):
        x_TD = kept[name, '0.0'][0]
        expert_T = layer.router.scorer(x_TD).argmax(1)
        grads = []
        for expert in range(4):
            mine = expert_T == expert
            for fc in ('0.0', '1'):
                inputs, out = kept[name, fc]
                delta = out.grad.flatten(0, -2)[mine]
                grads += [(delta.T @ inputs[mine]).flatten(), delta.sum(0)]
        grads_E = torch.stack([torch.cat(grads[4 * e:4 * e + 4])
                               for e in range(4)])
        assert score[0] == pytest.approx(float(grads_E.norm()), rel=1e-4)
        assert score[1] == pytest.approx(
            float((grads_E - grads_E.mean(0)).norm()), rel=1e-4)


def test_the_model_is_the_dense_one(tmp_path):
    model, batches = model_and_batches(tmp_path, SWIN)
    dense = dense_model(SWIN)
    dense.load_state_dict(torch.load(tmp_path / 'dense.pth')['state_dict'])
    still(dense)
    assert loss_of(model, batches) == pytest.approx(loss_of(dense, batches),
                                                    rel=1e-6)
    # There is no dropout, and running statistics do not change.
    assert loss_of(model, batches) == loss_of(model, batches)
    assert dense.backbone.bn.num_batches_tracked == 0
    trainable = {name.split('.')[-1] for name, p in model.named_parameters()
                 if p.requires_grad}
    assert trainable == {f'residual_{fc}_{part}' for fc in ('fc1', 'fc2')
                         for part in ('weight', 'bias')}
    assert model.training and not model.backbone.training


def test_scores_are_means_over_batches(tmp_path):
    """The norm of the mean gradient, by the triangle inequality at most the
    mean of the norms; equal batches give the same score as one."""
    model, (one, other) = model_and_batches(tmp_path, SWIN)

    def gradient(batches):
        model.zero_grad()
        return torch.tensor(measure(model, iter(batches), len(batches)))[:, 0]

    assert torch.allclose(gradient([one]), gradient([one, one, one]))
    mean = gradient([one, other])
    bound = (gradient([one]) + gradient([other])) / 2
    assert (mean < bound).all() and (mean > 0).all()


def test_the_same_seed_gives_the_same(tmp_path, capsys):
    write(tmp_path, SWIN)
    _, first, _ = choose(capsys, tmp_path)
    _, again, _ = choose(capsys, tmp_path)
    _, other, _ = choose(capsys, tmp_path, '--seed', 1)
    assert first == again
    assert first['scores'] != other['scores']


def fails(tmp_path, message, *flags):
    with pytest.raises(SystemExit, match=message):
        command(select_layers, tmp_path / 'config.py', tmp_path / 'dense.pth',
                *flags)


def test_bad_input(tmp_path, capsys):
    write(tmp_path, SWIN)
    fails(tmp_path, '--num-layers 4 must lie between 1 and the 3 FFNs',
          '--num-layers', 4)
    fails(tmp_path, '--num-layers 0 must', '--num-layers', 0)
    fails(tmp_path, '2', '--batches', 0)
    assert 'must be at least 1' in capsys.readouterr().err
    dense = dense_model(SWIN)
    state = dense.state_dict()
    for change, message in (
            (dict(state), None),
            ({key: value for key, value in state.items()
              if key != 'head.weight'},
             r'head\.weight \(3, 16, 1, 1\) \(in the checkpoint: missing'),
            (dict(state, **{'head.bias': torch.zeros(5)}),
             r'dense\.pth does not fill .*head\.bias \(3,\) \(in the '
             r'checkpoint: \(5,\)'),
            (toy_model().state_dict(), 'is a MoE checkpoint'),
            (dict(state, **{'backbone.norm1.weight': torch.zeros(3)}),
             r'norm1\.weight has shape'),
            ({key: value * float('nan') if value.is_floating_point()
              else value for key, value in state.items()},
             'nan or inf')):
        torch.save(dict(state_dict=change), tmp_path / 'dense.pth')
        if message:
            fails(tmp_path, message, '--batches', 1)
    (tmp_path / 'dense.pth').unlink()
    fails(tmp_path, r'dense\.pth does not exist')


def test_a_dense_config(tmp_path):
    cfg = write(tmp_path, SWIN)
    cfg.model.backbone.moe = None
    cfg.dump(tmp_path / 'config.py')
    fails(tmp_path, 'is a dense model')


def test_a_whole_segmentor(work, configs, dense_checkpoint, capsys):
    """Batch norms, dropout and two heads of mmseg; eight FFNs of ten do not
    have experts in the config."""
    data = [f'{split}_dataloader.dataset.data_root={work / "scenes"}'
            for split in ('train', 'val', 'test')]
    command(select_layers, configs['moe'], dense_checkpoint, '--batches', 1,
            '--cfg-options', *data, 'train_dataloader.batch_size=2')
    out = capsys.readouterr().out
    assert '10 FFNs, 1 training batches' in out
    moe = eval(f'dict({out.splitlines()[-1]})')['moe']
    assert sum(map(len, moe['layers'])) == 3 and len(moe['layers']) == 4


def test_as_code():
    moe = dict(layers=((), (1, )), router=dict(type='A', top_k=2), rank=None)
    code = select_layers.as_code(moe)
    assert code == ("dict(layers=((), (1,)), router=dict(type='A', top_k=2), "
                    'rank=None)')
    assert eval(code) == moe


def test_positions_need_no_weights():
    """The positions of Swin-T, and those of a backbone of another library that
    also has depths."""
    swin = dict(type='rmoe.SwinMoE', arch='tiny', moe=dict(layers=(
        (), (), (1, 3, 5), (1, ))))
    positions = select_layers.all_positions(swin)
    assert len(positions) == 12 and positions[-1] == (3, 1)
    assert select_layers.count_layers(swin) == 4
    cfg = SimpleNamespace(**Config(dict(backbone=SEGFORMER)))
    assert select_layers.all_positions(cfg.backbone) == [(None, 0), (None, 1)]
