"""--amp selects bfloat16 if the device has it and the config does not ask for
another type."""
import re

import pytest
import torch
from mmengine.config import Config

from rmoe.engine import precision
from rmoe.registry import type_name

BFLOAT16 = dict(type='rmoe.BFloat16OptimWrapper')
DYNAMIC = dict(type='AmpOptimWrapper', loss_scale='dynamic')


def on_a_gpu(monkeypatch, capability, device='cuda'):
    """Fake a GPU. For old ones, which only emulate bfloat16, torch also says
    that they support it."""
    monkeypatch.setattr(precision, 'get_device', lambda: device)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability',
                        lambda *_: capability)


@pytest.mark.parametrize('wrapper, amp, expected, note', [
    (dict(type='OptimWrapper'), False, dict(type='OptimWrapper'), ''),
    (dict(type='OptimWrapper'), True, BFLOAT16,
     'in bfloat16.* the place of OptimWrapper'),
    (dict(type='OptimWrapper', clip_grad=1), True,
     dict(BFLOAT16, clip_grad=1), 'in bfloat16'),
    (dict(type='OptimWrapper', dtype='bfloat16'), True, BFLOAT16,
     'in bfloat16'),
    (dict(type='OptimWrapper', dtype='float16'), True,
     dict(DYNAMIC, dtype='float16'), 'in float16 by .*, as the config says'),
    # The wrapper of the config is not changed without --amp.
    (dict(type='AmpOptimWrapper'), False, dict(type='AmpOptimWrapper'),
     'in float16 by AmpOptimWrapper, as .*; with --amp it is in bfloat16'),
    (dict(DYNAMIC, loss_scale=512.), True, BFLOAT16,
     'in bfloat16.* the place of AmpOptimWrapper'),
    (dict(DYNAMIC, dtype='float16'), True, dict(DYNAMIC, dtype='float16'),
     'in float16 by AmpOptimWrapper, as the config says$'),
    (dict(DYNAMIC, dtype=torch.float16), True,
     dict(DYNAMIC, dtype=torch.float16), 'in float16 by'),
    (dict(DYNAMIC, dtype='bfloat16'), True, dict(DYNAMIC, dtype='bfloat16'),
     'in bfloat16 by AmpOptimWrapper'),
    (BFLOAT16, True, BFLOAT16, ''),
], ids=str)
def test_amp_on_a_gpu_is_bfloat16_unless_the_config_says_otherwise(
        monkeypatch, wrapper, amp, expected, note):
    on_a_gpu(monkeypatch, (8, 0))
    cfg = Config(dict(optim_wrapper=dict(wrapper)))
    said = precision.set_precision(cfg, amp)
    assert bool(said) == bool(note) and re.search(note, said), said
    assert cfg.optim_wrapper.to_dict() == expected


@pytest.mark.parametrize('capability, device', [
    ((7, 5), 'cuda'), ((7, 0), 'cuda'), ((9, 0), 'npu')])
def test_amp_without_bfloat16_is_mmengines(monkeypatch, capability, device):
    on_a_gpu(monkeypatch, capability, device)
    for wrapper, expected in ((dict(type='OptimWrapper'), DYNAMIC),
                              (dict(type='AmpOptimWrapper'),
                               dict(type='AmpOptimWrapper'))):
        cfg = Config(dict(optim_wrapper=wrapper))
        said = precision.set_precision(cfg, amp=True)
        assert 'is in float16 by AmpOptimWrapper, ' in said
        assert (f'no bfloat16 on this {device}' in said) == (
            expected is DYNAMIC)
        assert cfg.optim_wrapper.to_dict() == expected


def test_new_style_configs_name_classes():
    from mmengine.optim import OptimWrapper
    cfg = Config(dict(optim_wrapper=dict(type=OptimWrapper)))
    assert precision.set_precision(cfg, amp=False) == ''
    assert [type_name(config) for config in (
        dict(type=OptimWrapper), dict(type='rmoe.X'), {})] == [
            'OptimWrapper', 'X', '']
