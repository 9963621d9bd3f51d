"""The main use of the project by its commands: train, evaluate, upcycle,
fine-tune, resume, and make a dense file that mmseg itself loads."""
import json
import re

import pytest
import test as test_tool  # tools/test.py
import torch
import train
import upcycle
from commands import DENSE, command, miou, options
from mmengine.config import Config
from mmengine.registry import DefaultScope
from safetensors.torch import load_file

from rmoe.upcycling import read_checkpoint, state_dict_of


def test_upcycling_alone_moves_nothing(work, configs, dense_checkpoint,
                                       upcycled):
    report = json.loads((work / 'moe.report.json').read_text())
    assert report['largest_feature_difference'] < 1e-5
    assert report['counts']['upcycled'] == 12  # three FFNs, four tensors each
    assert set(report['keys'].values()) == {'loaded', 'upcycled', 'new',
                                            'copied'}
    command(test_tool, configs['dense'], dense_checkpoint,
            *options(work, 'test-dense'))
    command(test_tool, configs['moe'], upcycled, *options(work, 'test-moe'))
    assert miou(work / 'test-moe') == pytest.approx(
        miou(work / 'test-dense'), abs=0.01)


def test_a_dense_file_upcycles_on_load(work, configs, dense_checkpoint,
                                       upcycled):
    command(test_tool, configs['moe'], dense_checkpoint,
            *options(work, 'test-load'))
    log = next((work / 'test-load').rglob('*.log')).read_text()
    assert re.search(r'upcycled +12 ', log)


def test_finetune_in_stages_resume_and_back_to_dense(work, configs, upcycled):
    more = [f'load_from={upcycled}', 'custom_hooks.2.interval=1']
    command(train, configs['moe'], *options(work, 'moe', *more))
    log = next((work / 'moe').rglob('*.log')).read_text()
    for text in ("stage 'core' trains", "stage 'joint' trains",
                 'loss_moe_importance', 'load % ['):
        assert text in log
    torch.load(work / 'moe/iter_4.pth', weights_only=True)
    (work / 'moe/iter_4.pth').unlink()
    command(train, configs['moe'], '--resume', work / 'moe/iter_2.pth',
            *options(work, 'moe'))
    trained = work / 'moe/iter_4.pth'
    assert trained.exists()

    command(upcycle, trained, '--config', configs['moe'], '--out',
            work / 'core.safetensors', '--to-dense', '--size', 64)
    core = load_file(work / 'core.safetensors')
    from mmseg.models.backbones import SwinTransformer
    backbone = Config.fromfile(DENSE).model.backbone
    backbone.pop('type')
    mmseg_swin = SwinTransformer(**backbone)
    mmseg_swin.load_state_dict(
        {key.removeprefix('backbone.'): value for key, value in core.items()
         if key.startswith('backbone.')}, strict=True)
    ours = state_dict_of(read_checkpoint(trained))
    assert torch.equal(
        core['backbone.stages.2.blocks.1.ffn.layers.1.weight'],
        ours['backbone.stages.2.blocks.1.ffn.layers.1.weight'])
    assert any(key.startswith('decode_head.') for key in core)


def test_mmseg_trained_checkpoint_predicts_the_same(work, configs):
    """mmseg's own SwinTransformer -> SwinMoE -> --to-dense -> mmseg."""
    from mmseg.registry import MODELS
    cfg = Config.fromfile(configs['dense'])
    theirs = Config(cfg.model.to_dict())
    theirs.backbone.type = 'mmseg.SwinTransformer'
    ours = Config.fromfile(configs['moe'])
    image = torch.randn(1, 3, 64, 96)
    with DefaultScope.overwrite_default_scope('mmseg'):
        host = MODELS.build(theirs).eval()
        torch.save(dict(state_dict=host.state_dict()), work / 'mmseg.pth')
        command(upcycle, work / 'mmseg.pth', '--config', configs['moe'],
                '--out', work / 'm.pth', '--size', 64)
        command(upcycle, work / 'm.pth', '--config', configs['moe'],
                '--out', work / 'd.pth', '--to-dense', '--size', 64)
        moe = MODELS.build(ours.model).eval()
        moe.load_state_dict(state_dict_of(read_checkpoint(work / 'm.pth')))
        again = MODELS.build(theirs).eval()
        again.load_state_dict(state_dict_of(read_checkpoint(work / 'd.pth')))
        with torch.no_grad():
            expected = host(image)
            torch.testing.assert_close(moe(image), expected, atol=1e-4,
                                       rtol=0)
            assert torch.equal(moe(image).argmax(1), expected.argmax(1))
            assert torch.equal(again(image), expected)


@pytest.mark.parametrize('flags, expected', [
    (['--rank', '4'], (8, 4, 128)),
    (['--layers', '((), (), (0,), ())'], (8, 512, 128)),
])
def test_upcycle_options(work, configs, dense_checkpoint, flags, expected):
    command(upcycle, dense_checkpoint, '--config', configs['moe'], '--out',
            work / 'o.safetensors', '--noise', '0.01', '--size', 64, *flags)
    state = load_file(work / 'o.safetensors')
    block = 0 if flags[0] == '--layers' else 1
    part = 'down' if flags[0] == '--rank' else 'weight'
    key = f'backbone.stages.2.blocks.{block}.ffn.experts.residual_fc1_{part}'
    assert state[key].shape == expected
    report = json.loads((work / 'o.report.json').read_text())
    assert 1e-6 < report['largest_feature_difference'] < 1


@pytest.mark.parametrize('name, content, message', [
    ('missing.pth', None, 'missing.pth does not exist'),
    ('empty.pth', b'', 'empty.pth is empty'),
    ('text.pth', b'hello', 'text.pth is corrupt'),
])
def test_bad_checkpoints_end_in_one_line(work, configs, name, content,
                                         message):
    if content is not None:
        (work / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        command(upcycle, work / name, '--config', configs['moe'], '--out',
                work / 'never.pth')
    assert not (work / 'never.pth').exists()


def test_missing_data_and_wrong_labels_end_in_one_line(work, configs):
    with pytest.raises(SystemExit, match=r'nowhere does not exist.*data_root'):
        command(train, configs['dense'], *options(
            work, 'x', f'train_dataloader.dataset.data_root={work}/nowhere'))
    with pytest.raises(SystemExit, match=r'num_classes=3.*reduce_zero_label'):
        command(train, configs['dense'], *options(
            work, 'y', 'model.decode_head.num_classes=3'))


def test_dense_config_cannot_be_upcycled_into(work, configs,
                                              dense_checkpoint):
    with pytest.raises(SystemExit, match='is a dense model'):
        command(upcycle, dense_checkpoint, '--config', configs['dense'],
                '--out', work / 'never.pth')
