"""What ranks do in the tests of rmoe.parallel; see two_ranks.py."""
from collections import Counter
from types import SimpleNamespace

import torch
from mmengine.optim import OptimWrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
)
from toy import ToyImages, toy_model, toy_runner

from rmoe import compat
from rmoe.checks import data as data_check
from rmoe.checks import label_check_hook
from rmoe.checks.data import examine_split
from rmoe.checks.label_maps import LabelCount
from rmoe.moe import moe_layers
from rmoe.parallel import data_parallel
from rmoe.parallel.data_parallel import DistributedDataParallel
from rmoe.parallel.together import RaisedElsewhere, together

OPTIONS = dict(plain={}, static=dict(static_graph=True),
               unused=dict(find_unused_parameters=True))
if compat.has_torch('2.6'):  # what gloo cannot do before is refused
    OPTIONS['bf16'] = dict(gradient_compression='bf16')


class Unpicklable(Exception):
    """It takes two arguments and keeps one."""

    def __init__(self, a, b):
        super().__init__(a)


def checked(rank, work_dir):
    """What together() returns and raises, where this or that rank fails."""
    def fail(*ranks, kind=ValueError, args=()):
        if rank in ranks:
            raise kind(f'rank {rank} fails', *args)
        return rank

    def outcome(*ranks, **options):
        try:
            return together(lambda: fail(*ranks, **options))
        except Exception as error:
            cause = error.__cause__
            assert cause is None or isinstance(cause, RaisedElsewhere)
            return type(error).__name__, str(error), str(cause)

    return [outcome(), outcome(0), outcome(1), outcome(0, 1),
            outcome(1, kind=Unpicklable, args=(0, )), outcome()]


def averaged(rank, work_dir, state, accumulate):
    """Weights after two optimizer steps with each set of options."""
    images = ToyImages()
    found = {}
    for name, options in OPTIONS.items():
        model = toy_model()
        model.load_state_dict(state)
        parallel = DistributedDataParallel(model, device_ids=[0], **options)
        optim_wrapper = OptimWrapper(
            torch.optim.SGD(model.parameters(), 0.1),
            accumulative_counts=accumulate)
        optim_wrapper.initialize_count_status(
            parallel, 0, 2 * accumulate)
        for step in range(2 * accumulate):
            batch = [images[(4 * step + 2 * rank + i) % 32] for i in (0, 1)]
            parallel.train_step(
                {key: torch.stack([item[key] for item in batch])
                 for key in batch[0]}, optim_wrapper)
        found[name] = {key: value.detach().clone()
                       for key, value in model.named_parameters()}
        found[name, 'loads'] = [layer.demand_E.tolist()
                                for layer in moe_layers(model).values()]
    return found


def hooked_across_stages(rank, work_dir, stages):
    """In which iterations gradients are compressed."""
    compressed = []

    def compress(state, bucket):
        compressed.append(runner.iter)
        return bf16_compress_hook(state, bucket)

    data_parallel.bf16_compress_hook = compress
    runner = toy_runner(
        f'{work_dir}/{rank}', max_iters=4, hooks=(
            dict(type='rmoe.ResidualMoEHook', stages=stages),
            dict(type='rmoe.MoELossHook')),
        launcher='pytorch', model_wrapper_cfg=dict(
            type='rmoe.DistributedDataParallel', gradient_compression='bf16',
            static_graph=True))
    first = runner.model
    runner.train()
    return dict(
        again=runner.model is not first,
        options=(runner.model.static_graph, runner.model.broadcast_buffers),
        compressed=sorted(set(compressed)))


def data_of_ranks(rank, work_dir, good, empty, lost):
    """What each rank finds in the data of its config."""
    looked = []

    def examine(*args):
        looked.append(rank)
        return examine_split(*args)

    data_check.examine_split = examine
    found = data_check.check_data(good[rank], ('train', ))
    errors = []
    for cfgs in (empty, lost):
        try:
            data_check.check_data(cfgs[rank], ('train', ))
        except (FileNotFoundError, ValueError) as error:
            errors.append(str(error))
    return bool(looked), found, *errors


def labels_of_ranks(rank, work_dir, files, max_files):
    """Which label maps each rank reads, and what it says of a wrong one."""
    read = []

    def count(dataset, index):
        read.append(index)
        if index == files:
            raise ValueError(f'{index} is wrong')
        return LabelCount(1, Counter({rank: 3, 255: 1}), Counter({rank: 3}),
                          {rank: f'{index}.png'})

    label_check_hook.count_labels = count
    says = []
    model = torch.nn.Module()
    model.decode_head = SimpleNamespace(num_classes=2, ignore_index=255)
    for dataset in (list(range(files)), list(range(files + 2))):
        runner = SimpleNamespace(
            model=model,
            train_dataloader=SimpleNamespace(dataset=dataset),
            logger=SimpleNamespace(info=says.append,
                                   warning=says.append))
        try:
            label_check_hook.LabelCheckHook(max_files).before_train(runner)
        except ValueError as error:
            says.append(str(error))
    return read, says
