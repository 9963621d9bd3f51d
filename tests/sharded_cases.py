"""What ranks do with whole tensors and parts of them."""
import copy
from pathlib import Path

import pytest
import torch
from sharded_toy import PLAIN, sharded_runner
from toy import ToySegmentor

from rmoe.parallel import FullySharded
from rmoe.parallel.folder import write_folder
from rmoe.parallel.layout import Layout, layout_of, whole
from rmoe.parallel.state import gather


def lay_out(rank, work_dir, states):
    """Load files of whole tensors into a model on two ranks."""
    results = {}
    for expert_parallel in (1, 2):
        torch.manual_seed(0)
        model = FullySharded(
            ToySegmentor(PLAIN), expert_parallel=expert_parallel,
            reshard_after_forward=False).module
        twin = copy.deepcopy(model)
        for name, state in states.items():
            # A forward pass leaves the whole parameters in their places.
            with torch.no_grad():
                model(torch.zeros(1, 3, 32, 32))
            assert layout_of(model.backbone.norm1.weight) is None
            model.load_state_dict(state)
            twin.load_state_dict(state)
            for part in (model, twin):
                content = dict(state_dict=part.state_dict(), list=[
                    part.state_dict()['head.bias']])
                gather(content, keep=rank == 0)
                results[name, expert_parallel, part is twin] = content
        results['layouts', expert_parallel] = all(
            layout_of(mine) == layout_of(copied)
            for mine, copied in zip(model.parameters(), twin.parameters()))
        results['class', expert_parallel] = type(twin).__name__
        results['hooks', expert_parallel] = sorted({
            getattr(hook, 'hook', hook).__module__
            for module in twin.modules() for name in vars(module)
            if name.endswith('_hooks') for hook in getattr(
                module, name).values()
            if hasattr(getattr(hook, 'hook', hook), '__module__')})
        try:
            model.load_state_dict(dict(states['moe'], **{
                'head.weight': torch.zeros(5, 16, 1, 1)}))
        except RuntimeError as error:
            results['error', expert_parallel] = str(error)
    return results


def cut_and_join(rank, work_dir):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import (
        Replicate,
        Shard,
        distribute_tensor,
    )
    mesh = init_device_mesh('cpu', (1, 2))
    for shape in ((1, 3), (5, 4), (4, 1), (0, 2)):
        for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(1)),
                           (Shard(1), Replicate()), (Replicate(), ) * 2):
            tensor = torch.randn(shape)
            torch.distributed.broadcast(tensor, 0)
            layout = Layout(mesh, placements)
            found, expected = layout.cut(tensor), distribute_tensor(
                tensor, mesh, placements)
            assert torch.equal(found.to_local(), expected.to_local())
            assert found.shape == expected.shape
            assert found.stride() == expected.stride()
            assert torch.equal(whole(found), tensor)
            empty = layout.empty(tensor.shape, tensor.dtype)
            assert empty.to_local().shape == found.to_local().shape
            before = found.to_local().clone()
            tensor.add_(1)
            assert torch.equal(found.to_local(), before)
    return True


def errors_of(rank, work_dir, broken, written):
    """What each rank says of folders that do not load."""
    results = {}
    for name in ('missing', 'short'):
        results[name] = error_of(f'{work_dir}/{name}', f'{broken}/{name}')
    parts = f'{written}/parts/iter_2'
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            def fail(*_, **__):
                raise OSError('disk full')
            patch.setattr('rmoe.parallel.folder.read_checkpoint', fail)
        results['one-rank'] = error_of(f'{work_dir}/one', parts)
    results['other-experts'] = error_of(f'{work_dir}/experts', parts,
                                        resume=False, num_experts=2)
    with pytest.MonkeyPatch.context() as patch:
        build = ToySegmentor.__init__

        def five_classes(self, backbone):
            build(self, backbone)
            self.head = torch.nn.Conv2d(16, 5, 1)

        patch.setattr(ToySegmentor, '__init__', five_classes)
        results['other-head'] = error_of(f'{work_dir}/head', parts)
    return results


def error_of(folder, checkpoint, resume=True, **options):
    runner = sharded_runner(folder, layout={}, world=2, resume=resume,
                            load_from=checkpoint, **options)
    try:
        runner.train()
    except (OSError, ValueError) as error:
        return str(error)


def write_below_a_file(rank, work_dir):
    """What each rank says of a folder that rank 0 cannot make."""
    try:
        write_folder(Path(work_dir) / 'file/iter_1',
                     dict(state_dict=dict(weight=torch.zeros(2))))
    except OSError as error:
        return str(error)
