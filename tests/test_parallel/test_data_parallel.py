"""The wrapper's options, on two ranks; and who chooses it."""
import pytest
import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from parallel_ranks import OPTIONS, averaged, hooked_across_stages
from torch import nn
from toy import STAGES, ToyImages, copied_state, toy_model
from two_ranks import run_two_ranks

from rmoe import compat
from rmoe.parallel.data_parallel import (
    DistributedDataParallel,
    choose_wrapper,
    without_synchronised_norms,
)


def step_alone(model, accumulate):
    """Two steps of one process that has the batches of both ranks."""
    images = ToyImages()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2 * accumulate):
        for rank in (0, 1):  # each normalises its own batch
            batch = [images[(4 * step + 2 * rank + i) % 32] for i in (0, 1)]
            losses = model(*(torch.stack([item[key] for item in batch])
                             for key in ('inputs', 'labels')), mode='loss')
            (losses['loss_ce'] / 2 / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize('accumulate', [1, 2])
def test_every_option_averages(tmp_path, accumulate):
    model = toy_model()
    state = copied_state(model)
    step_alone(model, accumulate)
    ranks = run_two_ranks(averaged, str(tmp_path), state, accumulate)
    for name in OPTIONS:
        tolerance = 1e-3 if name == 'bf16' else 1e-6
        for key, value in model.named_parameters():
            torch.testing.assert_close(ranks[0][name][key], value,
                                       rtol=0, atol=tolerance)
            assert torch.equal(ranks[0][name][key], ranks[1][name][key])
    # Gradients were rounded, and loads counted by each rank for itself.
    assert 'bf16' not in OPTIONS or any(
        not torch.equal(ranks[0]['plain'][key], value)
        for key, value in ranks[0]['bf16'].items())
    assert ranks[0]['plain', 'loads'] != ranks[1]['plain', 'loads']


@pytest.mark.torch('2.8')
def test_options_outlast_a_switch_of_stages(tmp_path):
    stages = [dict(STAGES[0], end=2), dict(STAGES[2])]
    for found in run_two_ranks(hooked_across_stages, str(tmp_path), stages):
        assert found['again']
        assert found['options'] == (True, False)
        assert found['compressed'] == [0, 1, 2, 3]


@pytest.mark.parametrize('options, message', [
    (dict(broadcast_buffers=True), 'broadcast_buffers=True copies the count'),
    (dict(gradient_compression='fp16'), "gradient_compression='fp16' must"),
])
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistributedDataParallel(toy_model(), **options)


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(compat.has_torch('2.2'), reason='its gloo can')
def test_an_old_gloo_cannot_average_bfloat16(alone):
    with pytest.raises(ValueError, match=r'backend gloo of torch 2\..* cannot '
                                         'average bfloat16 on cpu'):
        DistributedDataParallel(toy_model(), gradient_compression='bf16')


def test_norms_on_a_cpu_are_a_ranks_own(alone):
    model = toy_model()
    model.backbone.bn = nn.SyncBatchNorm.convert_sync_batchnorm(
        model.backbone.bn)
    before = copied_state(model)
    with pytest.raises(ValueError, match='SyncBatchNorm expected input'):
        model(torch.zeros(2, 3, 32, 32))
    wrapped = DistributedDataParallel(model)
    wrapped(torch.zeros(2, 3, 32, 32))
    assert is_model_wrapper(wrapped)
    assert set(before) == set(wrapped.module.state_dict())
    plain = toy_model()
    layers = list(plain.modules())
    assert list(without_synchronised_norms(plain).modules()) == layers


class OwnWrapper(MMDistributedDataParallel):
    pass


@pytest.mark.parametrize('has_gpu', [False, True])
@pytest.mark.parametrize('given, expected', [
    ({}, dict(type='rmoe.DistributedDataParallel',
              find_unused_parameters=False)),
    (dict(find_unused_parameters=True),
     dict(type='rmoe.DistributedDataParallel', find_unused_parameters=True)),
    (dict(model_wrapper_cfg=dict(static_graph=True)),
     dict(type='rmoe.DistributedDataParallel', find_unused_parameters=False,
          static_graph=True)),
    (dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel',
                                 bucket_cap_mb=50)),
     dict(type='MMDistributedDataParallel', bucket_cap_mb=50)),
    (dict(model_wrapper_cfg=dict(type=OwnWrapper)), dict(type=OwnWrapper)),
    (dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel',
                                 device_ids=[3])),
     dict(type='MMDistributedDataParallel', device_ids=[3])),
])
def test_the_wrapper_of_a_config(monkeypatch, given, expected, has_gpu):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')  # mmengine's log asks
    cfg = Config(given)
    choose_wrapper(cfg)
    found = cfg.model_wrapper_cfg.to_dict()
    assert found.pop('broadcast_buffers') is False
    # mmengine fills it in, unless it is there.
    if not has_gpu and 'device_ids' not in expected:
        assert found.pop('device_ids', 0) is None
    assert found == expected


def test_counters_are_not_broadcast():
    with pytest.raises(ValueError, match='MMDistributedDataParallel: broadc'):
        choose_wrapper(Config(dict(model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', broadcast_buffers=True))))


def test_other_wrappers_stay_as_they_are():
    kept = dict(type='MMFullyShardedDataParallel', cpu_offload=True)
    cfg = Config(dict(model_wrapper_cfg=kept))
    choose_wrapper(cfg)
    assert cfg.model_wrapper_cfg.to_dict() == kept
