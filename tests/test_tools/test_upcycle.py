"""Other conversions of tools/upcycle.py, and their costs."""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test as test_tool  # tools/test.py
import torch
import upcycle
from commands import command, miou, options
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint

from rmoe.registry import MODELS
from rmoe.upcycling import read_checkpoint, state_dict_of

ROOT = Path(__file__).parents[2]
KEY = 'backbone.stages.2.blocks.1.ffn.'


@pytest.fixture(scope='module')
def noisy(work, configs, dense_checkpoint):
    """A MoE checkpoint whose experts differ."""
    out = work / 'noisy.pth'
    command(upcycle, dense_checkpoint, '--config', configs['moe'], '--out',
            out, '--noise', .3, '--size', 64)
    return out


@pytest.fixture(scope='module')
def pictures(work):
    return work / 'scenes/images/validation'


def convert(work, configs, checkpoint, name, *args):
    command(upcycle, checkpoint, '--config', configs['moe'], '--out',
            work / name, '--size', 64, *args)
    report = json.loads((work / name).with_suffix('.report.json').read_text())
    return state_dict_of(read_checkpoint(work / name)), report


@pytest.mark.parametrize('how', ['mean', 'best'])
def test_to_dense_by_load(work, configs, noisy, pictures, how):
    dense, report = convert(work, configs, noisy, f'{how}.pth', '--to-dense',
                            how, '--images', pictures)
    assert not any('.experts.' in key for key in dense)
    moe = state_dict_of(read_checkpoint(noisy))
    core, residual = (moe[KEY + part] for part in (
        'layers.1.weight', 'experts.residual_fc2_weight'))
    # a mixture of core + residual, and not the core itself
    share = torch.linalg.lstsq(
        residual.flatten(1).t().double(),
        (dense[KEY + 'layers.1.weight'] - core).flatten()[:, None].double()
    ).solution
    torch.testing.assert_close(
        (residual.double() * share.view(-1, 1, 1)).sum(0),
        (dense[KEY + 'layers.1.weight'] - core).double(), atol=1e-5, rtol=0.)
    assert report['to_dense'] == how
    assert 0 < report['relative_feature_difference'] < 1


def test_other_image_channels(work, configs, dense_checkpoint, pictures):
    six = ['--cfg-options', 'model.backbone.in_channels=6']
    state, report = convert(work, configs, dense_checkpoint, 'six.pth', *six)
    key = 'backbone.patch_embed.projection.weight'
    assert state[key].shape[1] == 6 and report['preserves_function']
    assert report['largest_feature_difference'] < 1e-5
    for flags in (['--to-dense'], ['--change-experts', 'slice']):
        more = ['model.backbone.moe.num_experts=2'] * (len(flags) == 2)
        state, _ = convert(work, configs, work / 'six.pth', 'again.pth',
                           *flags, *six, *more)
        assert state[key].shape[1] == 6
    with pytest.raises(SystemExit, match='the model takes 6: leave out'):
        convert(work, configs, work / 'six.pth', 'never.pth', '--to-dense',
                'mean', '--images', pictures, *six)


@pytest.mark.parametrize('how, count', [
    ('prune', 4), ('merge', 4), ('slice', 2), ('tile', 12)])
def test_change_experts(work, configs, noisy, pictures, how, count, capsys):
    state, report = convert(
        work, configs, noisy, f'{how}.pth', '--change-experts', how,
        '--images', pictures, '--cfg-options',
        f'model.backbone.moe.num_experts={count}')
    assert len(state[KEY + 'experts.residual_fc1_weight']) == count
    assert len(state[KEY + 'router.scorer.weight']) == count
    assert any(key.startswith('decode_head.') for key in state)
    assert report['change_experts'] == how
    difference = report['relative_feature_difference']
    # copies of experts change nothing, because of two equal ones the first is
    # chosen
    assert difference < 1e-5 if how == 'tile' else difference > 0
    assert '% of their norm)' in capsys.readouterr().out


def test_routers_of_clusters(work, configs, dense_checkpoint, pictures,
                             capsys):
    states = [convert(work, configs, dense_checkpoint, f'{name}.pth', *flags)
              for name, flags in (('random', []), ('clusters', [
                  '--cluster-routers', '--images', pictures]))]
    shares = re.findall(r'blocks\.1\.ffn: clusters with (.*) % of the tokens',
                        capsys.readouterr().out)
    assert shares and all(
        97 <= sum(map(int, share.split(', '))) <= 103 for share in shares)
    (one, _), (other, report) = states
    assert report['preserves_function']
    for key, value in one.items():
        assert torch.equal(value, other[key]) == ('router.scorer' not in key)


@pytest.mark.parametrize('args, message', [
    (['--cluster-routers'], 'give --images FOLDER'),
    (['--cluster-routers', '--fold', '--images', 'x'], 'exclude each other'),
    (['--to-dense', 'best'], 'give --images FOLDER'),
    (['--change-experts', 'prune'], 'give --images FOLDER'),
    (['--change-experts', 'tile', '--to-dense'], 'exclude each other'),
    (['--fold', '--to-dense'], '--to-dense and --fold exclude each other')])
def test_contradictory_flags(work, configs, noisy, args, message, capsys):
    with pytest.raises(SystemExit):
        convert(work, configs, noisy, 'never.pth', *args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('how, message', [
    ('tile', 'needs a MoE checkpoint'), (None, 'is a MoE checkpoint already')])
def test_dense_and_moe_files_are_told_apart(
        work, configs, noisy, dense_checkpoint, how, message):
    with pytest.raises(SystemExit, match=message):
        if how:
            convert(work, configs, dense_checkpoint, 'never.pth',
                    '--change-experts', how)
        else:
            convert(work, configs, noisy, 'never.pth')
    assert not (work / 'never.pth').exists()


RANK = ['--rank', 4]


@pytest.fixture(scope='module')
def low_rank(work, configs, dense_checkpoint):
    """The same as ``noisy``, with low-rank residuals."""
    out = work / 'low_rank.pth'
    command(upcycle, dense_checkpoint, '--config', configs['moe'], '--out',
            out, '--noise', .3, '--size', 64, *RANK)
    return out


@pytest.fixture(scope='module')
def folded(work, configs, noisy):
    out = work / 'folded.pth'
    command(upcycle, noisy, '--config', configs['moe'], '--out', out,
            '--fold', '--size', 64)
    return out


def segmentor(config, checkpoint, **moe):
    """Load a file into a whole model, which must have a place for every
    key."""
    cfg = Config.fromfile(config)
    init_default_scope('mmseg')
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.moe.update(moe)
    model = MODELS.build(cfg.model).eval()
    load_checkpoint(model, str(checkpoint), 'cpu', strict=True)
    return model


@pytest.mark.parametrize('source, rank', [('noisy', None), ('low_rank', 4)])
def test_folded_file_is_the_same_model(work, configs, source, rank, request,
                                       capsys):
    checkpoint = request.getfixturevalue(source)
    state, report = convert(work, configs, checkpoint, f'{source}_fold.pth',
                            '--fold', *(RANK if rank else ()))
    assert KEY + 'layers.0.0.weight' not in state
    assert report['fold'] and not report['to_dense']
    assert report['largest_feature_difference'] < 1e-5
    name = KEY.removeprefix('backbone.')
    assert report['keys'][name + 'experts.residual_fc2_weight'] == 'converted'
    assert report['left_out'][name + 'layers.1.bias'] == (
        'part of every expert now')
    printed = capsys.readouterr().out
    assert 'model.backbone.moe.core=False' in printed
    assert ('model.backbone.moe.rank=None' in printed) == bool(rank)
    assert 'warning: padded tokens' in printed
    before = segmentor(configs['moe'], checkpoint, rank=rank)
    after = segmentor(configs['moe'], work / f'{source}_fold.pth', core=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = before(x), after(x)
    assert expected.std() > 1e-2
    assert (expected - found).abs().max() < 1e-5


def test_folded_file_scores_alike(work, configs, noisy, folded):
    core = 'model.backbone.moe.core=False'
    for name, checkpoint, *more in (('unfolded', noisy),
                                    ('folded', folded, core)):
        command(test_tool, configs['moe'], checkpoint,
                *options(work, f'test-{name}', *more))
    assert 0 < miou(work / 'test-folded') == miou(work / 'test-unfolded')


def test_flags_of_a_folded_file_are_complete(work, configs, low_rank, folded,
                                             capsys):
    unrouted = 'model.backbone.moe.unrouted=core'
    convert(work, configs, low_rank, 'flags.pth', '--fold', *RANK,
            '--cfg-options', unrouted)
    flags = re.search(r'--cfg-options (.+)', capsys.readouterr().out)[1]
    cfg = Config.fromfile(configs['moe'])
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    for given in (f'{unrouted} model.backbone.moe.rank=4', flags):
        cfg.merge_from_dict(parser.parse_args(
            ['--cfg-options', *given.split()]).cfg_options)
    cfg.dump(work / 'flags.py')
    segmentor(work / 'flags.py', work / 'flags.pth')


def test_padding_is_no_matter_where_it_gets_nothing(work, configs, noisy,
                                                    capsys):
    convert(work, configs, noisy, 'zero.pth', '--fold', '--cfg-options',
            'model.backbone.moe.unrouted=zero')
    assert 'padded' not in capsys.readouterr().out


ROUTER = 'model.backbone.moe.router.type='


@pytest.mark.parametrize('checkpoint, args, message', [
    ('dense_checkpoint', [], r'--fold needs a MoE checkpoint; .* is dense'),
    ('folded', [], r'folded\.pth has no stages\S+: it is folded already'),
    ('noisy', ['--cfg-options', 'model.backbone.moe.core=False'],
     r'has moe\.core=False, so there is no core to fold'),
    ('noisy', ['--cfg-options', 'model.backbone.moe.num_experts=4'],
     'has 8 experts in the checkpoint and 4'),
    ('noisy', ['--layers', '((), (), (0, 1, 3), (1,))'],
     r'belongs to a dense FFN in .*noisy\.pth, but to a MoE'),
    ('noisy', ['--cfg-options', ROUTER + 'SoftRouter'],
     'router has the weights'),
    ('noisy', ['--cfg-options', ROUTER + 'ExpertChoiceRouter'],
     'needs its core in evaluation: ExpertChoiceRouter leaves out tokens')])
def test_what_cannot_be_folded(configs, checkpoint, args, message, request,
                               tmp_path):
    with pytest.raises(SystemExit, match=message):
        command(upcycle, request.getfixturevalue(checkpoint), '--config',
                configs['moe'], '--out', tmp_path / 'never.pth', '--size', 64,
                '--fold', *args)
    assert not list(tmp_path.iterdir())


def test_bad_pictures(work, configs, noisy, tmp_path):
    args = ('never.pth', '--to-dense', 'mean', '--images', tmp_path)
    with pytest.raises(SystemExit, match='holds no image'):
        convert(work, configs, noisy, *args)
    (tmp_path / 'a.jpg').write_bytes(b'no picture')
    with pytest.raises(SystemExit, match=r'a\.jpg is no image'):
        convert(work, configs, noisy, *args)


VIT = """
model = dict(backbone=dict(
    type='rmoe.UpcycledBackbone',
    backbone=dict(type='mmseg.VisionTransformer', img_size=32, patch_size=8,
                  embed_dims=24, num_layers=2, num_heads=2, mlp_ratio=2),
    moe=dict(layers=dict(every=2), num_experts=4)))
default_scope = 'mmseg'
"""


def test_another_backbone_through_the_command(tmp_path):
    from mmseg.models.backbones import VisionTransformer
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dims=24,
                               num_layers=2, num_heads=2, mlp_ratio=2)
    torch.save({f'backbone.{key}': value for key, value in
                theirs.state_dict().items()}, tmp_path / 'vit.pth')
    (tmp_path / 'config.py').write_text(VIT)
    for source, name, *args in (('vit.pth', 'moe.pth'),
                                ('moe.pth', 'dense.pth', '--to-dense')):
        command(upcycle, tmp_path / source, '--config',
                tmp_path / 'config.py', '--out', tmp_path / name, '--size',
                32, *args)
    report = json.loads((tmp_path / 'moe.report.json').read_text())
    assert report['source'] == 'VisionTransformer'
    assert report['largest_feature_difference'] < 1e-5
    back = state_dict_of(read_checkpoint(tmp_path / 'dense.pth'))
    for key, value in theirs.state_dict().items():
        assert torch.equal(back[f'backbone.{key}'], value), key


MEASURE = """
import resource, sys
sys.path.insert(0, 'tools')
import upcycle
from mmseg.models import backbones
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
sys.argv = ['upcycle.py', *sys.argv[1:]]
upcycle.main()
print('grown by', peak() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss in kilobytes')
def test_conversion_holds_nothing_twice(tmp_path):
    from rmoe.backbones import SwinMoE
    torch.save(SwinMoE('tiny').state_dict(), tmp_path / 'dense.pth')
    (tmp_path / 'config.py').write_text(
        "model = dict(backbone=dict(type='rmoe.SwinMoE', arch='tiny', moe="
        'dict(layers=((), (), (1, 3, 5), (1,)), num_experts=8)))\n')
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, tmp_path / 'dense.pth', '--config',
         tmp_path / 'config.py', '--out', tmp_path / 'moe.pth', '--size',
         '64'], cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(done.stdout.split('grown by')[1])
    size = (tmp_path / 'moe.pth').stat().st_size
    assert size > 300e6  # large, so that noise cannot decide below
    assert grown < 2.2 * size
    cost = json.loads((tmp_path / 'moe.report.json').read_text())['cost']
    assert cost['file_bytes'] == size
    assert cost['write_seconds'] < cost['seconds'] < 60


def test_the_student_of_a_file_with_a_teacher(work, configs, dense_checkpoint,
                                              capsys):
    dense = state_dict_of(read_checkpoint(dense_checkpoint))
    inside = {key: value for key, value in dense.items()
              if key.startswith('backbone.')}
    student = {f'module.{key}': value + 1 if value.is_floating_point()
               else value for key, value in inside.items()}
    heads = {'head.mlp.0.weight': torch.zeros(2, 2),
             'decode_head.of_the_teacher': torch.zeros(1)}
    torch.save(dict(student=student, teacher={**inside, **heads}),
               work / 'dino.pth')
    for args, taken, add in (((), 'teacher', 0),
                             (('--weights', 'student'), 'student', 1)):
        state, _ = convert(work, configs, work / 'dino.pth', f'{taken}.pth',
                           *args)
        key = 'backbone.patch_embed.projection.weight'
        assert torch.equal(state[key], dense[key] + add)
        # Heads of the pre-training are not copied.
        assert all(key.startswith('backbone.') for key in state)
        assert f"of '{taken}' under the prefix" in capsys.readouterr().out
