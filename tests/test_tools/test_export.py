"""tools/deployment/export.py, on a segmentor whose experts differ."""
import re

import export
import pytest
import torch
from commands import MOE, command
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from rmoe import compat
from rmoe.moe import layer, mixing

pytestmark = pytest.mark.torch(compat.NEEDS[
    'export by torch.export or to ONNX'])
SIZE = ('--shape', 64, 64)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint of the demo's MoE model whose routers prefer some experts
    clearly."""
    torch.manual_seed(1)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(MOE).model)
    for name, parameter in model.named_parameters():
        if 'residual' in name or 'router' in name:
            torch.nn.init.normal_(parameter, std=.2)
    path = tmp_path_factory.mktemp('export') / 'trained.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_export(trained, tmp_path, capsys, suffix):
    if suffix == 'onnx':
        for library in ('onnxruntime', 'onnxscript'):
            pytest.importorskip(library)
    out = tmp_path / 'deep' / f'model.{suffix}'
    command(export, MOE, trained, '--out', out, *SIZE)
    printed = capsys.readouterr().out
    assert out.exists() and f'wrote {out}' in printed
    used = [line for line in printed.splitlines() if 'were in use' in line]
    assert len(used) == 3
    for line in used[:2]:  # the last layer has four tokens an image
        assert int(re.search(r': (\d) of 8 experts', line)[1]) >= 6
    assert 'largest difference on 9 inputs' in printed


def _passes_through(x_TD, routing, experts, core, align, unrouted, middle):
    """The layer, which computes something else while it is traced."""
    if compat.is_compiling() or compat.is_exporting():
        return x_TD
    return mixing.mix_sparse(x_TD, routing, experts, core, align, unrouted,
                             middle)


def test_a_file_that_computes_something_else_is_an_error(
        trained, tmp_path, monkeypatch):
    monkeypatch.setattr(layer, 'mix_sparse', _passes_through)
    with pytest.raises(SystemExit, match=r'exported model is off by'):
        command(export, MOE, trained, '--out', tmp_path / 'model.pt2', *SIZE)


def test_detectors_export_their_backbone(tmp_path, capsys, trained):
    cfg = Config.fromfile(MOE)
    model = dict(type='mmdet.RetinaNet', backbone=cfg.model.backbone,
                 neck=dict(type='mmdet.FPN', in_channels=[8], out_channels=8,
                           num_outs=1),
                 bbox_head=dict(type='mmdet.RetinaHead', num_classes=2,
                                in_channels=8))
    config = tmp_path / 'detector.py'
    Config(dict(model=model, default_scope='mmdet')).dump(config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = MODELS.build(model)
    torch.save(built.state_dict(), tmp_path / 'detector.pth')
    command(export, config, tmp_path / 'detector.pth', '--out',
            tmp_path / 'model.pt2', *SIZE)
    assert 'RetinaNet is no segmentor: its backbone' in capsys.readouterr().out


@pytest.mark.parametrize('options, message', [
    (('--out', 'model.pth'), r'must end with \.onnx or \.pt2'),
    (('--out', 'model.pt2', '--shape', 0, 64), 'must be at least 1'),
    (('--out', 'model.pt2', *SIZE, '--cfg-options',
      'model.backbone.moe.router.type=SparseExpertChoiceRouter'),
     'SparseExpertChoiceRouter cannot be compiled or exported'),
])
def test_what_cannot_be_exported(trained, tmp_path, monkeypatch, options,
                                 message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        command(export, MOE, trained, *options)
