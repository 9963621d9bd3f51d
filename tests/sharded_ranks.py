"""What ranks do with sharded models, and what one process does instead."""
import copy

import torch
from accelerator import accelerated
from torch import nn
from toy import STAGES, ToyImages, ToySegmentor, toy_config

from rmoe.backbones.padding import KnownBatch, ValidArea
from rmoe.engine.moe_loss_hook import install
from rmoe.moe import moe_layers

# No norm that looks at a whole batch, which would see another one.
BACKBONE = dict(
    type='rmoe.SwinMoE', embed_dims=8, depths=(1, 2), num_heads=(1, 2),
    strides=(4, 2), out_indices=(1, ), window_size=2, drop_path_rate=0.,
    moe=dict(layers=((), (0, 1)), num_experts=4))
LAYOUTS = {
    'sharded': {},
    'experts': dict(shard=1, expert_parallel=2),
    'both': dict(expert_parallel=2),
    'copies': dict(shard=1),
    # Of four ranks.
    'two copies': dict(shard=2),
    'two copies of both': dict(shard=2, expert_parallel=2),
    'an expert each': dict(shard=1, expert_parallel=4),
}
STEPS = 5


def build(router: dict, with_cp: bool = False, **moe) -> ToySegmentor:
    """Experts differ, and routers have opinions."""
    torch.manual_seed(0)
    backbone = copy.deepcopy(BACKBONE)
    backbone['moe'].update(moe, router=copy.deepcopy(router))
    backbone['with_cp'] = with_cp
    model = ToySegmentor(backbone)
    model.is_init = True
    for name, parameter in model.named_parameters():
        if 'residual' in name or 'router' in name:
            nn.init.normal_(parameter, std=.3)
    return model


def batch(step: int, part: int, parts: int, size: int = 4):
    """Images and labels of one of several ranks."""
    images = ToyImages()
    each = size // parts
    picked = [(step * size + part * each + i) % len(images)
              for i in range(each)]
    return (torch.stack([images[i]['inputs'] for i in picked]),
            torch.stack([images[i]['labels'] for i in picked]))


def losses_of(model: nn.Module, inner: nn.Module, inputs, labels, padded):
    if padded:
        sizes = [[32, 12 + 4 * i] for i in range(len(inputs))]
        area = ValidArea(torch.tensor(sizes), (32, 32))
        inner.backbone.known_batches = (KnownBatch(0, inputs, area), )
    return model(inputs, labels, mode='loss')


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # What rounding does to a gradient of zero is no step.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, 'full_tensor', tensor.clone)().detach().clone()


def train(model, inner, parts_of_step, clip, padded=False, steps=STEPS):
    """Losses of each step, gradients of the first, weights after the last."""
    optimizer = optimizer_of(model)
    result = dict(losses=[], norms=[])
    for step in range(steps):
        parts = parts_of_step(step)
        optimizer.zero_grad()
        total = 0.
        for inputs, labels in parts:
            losses = losses_of(model, inner, inputs, labels, padded)
            loss = sum(losses.values()) / len(parts)
            loss.backward()
            total += float(loss.detach())
        if step == 0:
            result['grads'] = {name: full(parameter.grad) for name, parameter
                               in inner.named_parameters()}
        result['norms'].append(float(clip(model.parameters(), 1.)))
        optimizer.step()
        result['losses'].append(total)
    result['weights'] = {name: full(parameter) for name, parameter in
                         inner.named_parameters()}
    return result


def train_alone(case: dict, ranks: int, joined: bool, steps: int = STEPS
                ) -> dict:
    """One process on the batches of all ranks, joined or one by one."""
    model = build(**case['model'])
    prepare(model, case)
    parts = 1 if joined else ranks
    return train(model, model,
                 lambda step: [batch(step, part, parts)
                               for part in range(parts)],
                 torch.nn.utils.clip_grad_norm_, case.get('padded', False),
                 steps)


def prepare(model: nn.Module, case: dict) -> None:
    if case.get('balanced'):
        install(model)
    if case.get('collapsed'):
        for layer in moe_layers(model).values():
            # The first expert wins every tie.
            nn.init.zeros_(layer.router.scorer.weight)


def train_sharded(rank: int, work_dir: str, cases: dict) -> dict:
    """Each case in each of its layouts."""
    from rmoe.parallel import FullySharded
    from rmoe.parallel.clipping import clip_grad_norm_
    ranks = torch.distributed.get_world_size()
    results = {}
    for name, case in cases.items():
        for layout in case['layouts']:
            model = build(**case['model'])
            prepare(model, case)
            wrapper = FullySharded(model, **LAYOUTS[layout])
            with accelerated(case.get('accelerated', False)):
                result = train(
                    wrapper, model, lambda step: [batch(step, rank, ranks)],
                    clip_grad_norm_, case.get('padded', False))
            result['local'] = sum(
                getattr(parameter, 'to_local', lambda p=parameter: p)().numel()
                for parameter in model.parameters())
            results[name, layout] = result
    return results


def evaluate(rank: int, work_dir: str, layouts: tuple[str, ...]) -> dict:
    """Maps of a rank's images, of which rank 1 has fewer; a step after it."""
    from rmoe.parallel import FullySharded
    results = {}
    for layout in layouts:
        model = build(dict(type='TokenChoiceRouter', top_k=2))
        # CPUs have no synchronised one.
        model.head = nn.Sequential(nn.SyncBatchNorm(16), model.head)
        wrapper = FullySharded(model, **LAYOUTS[layout])
        wrapper.eval()
        with torch.no_grad(), wrapper.gathered():
            maps = [model(batch(step, rank, 2)[0])
                    for step in range(3 - 2 * rank)]
        wrapper.train()
        wrapper(*batch(0, rank, 2), mode='loss')['loss_ce'].backward()
        results[layout] = dict(
            maps=maps, local=sum(
                parameter.to_local().numel()
                for parameter in model.parameters()))
    return results


def compute_in_bfloat16(rank: int, work_dir: str) -> dict:
    """A step with parameters gathered in bfloat16."""
    from rmoe.parallel import FullySharded
    model = build(dict(type='TokenChoiceRouter', noise_std=0.))
    wrapper = FullySharded(model, param_dtype='bfloat16')
    seen = {}

    def look(name):
        def hook(module, args):
            seen[name] = {key: parameter.dtype for key, parameter
                          in module.named_parameters(recurse=False)}
            seen[f'{name} input'] = next(
                arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        return hook

    for name, module in model.named_modules():
        if name.endswith(('scorer', 'experts', 'attn.w_msa.qkv', 'norm1')):
            module.register_forward_pre_hook(look(name))
    loss = wrapper(*batch(0, rank, 2), mode='loss')['loss_ce']
    loss.backward()
    return dict(seen=seen, loss=float(loss.detach()), grads={
        name: full(parameter.grad)
        for name, parameter in model.named_parameters()})


def train_by_runner(rank: int, work_dir: str, wrappers: dict) -> dict:
    """All stages, with what hooks do; the same run with each wrapper."""
    from mmengine.runner import Runner
    hooks = [dict(type='rmoe.ResidualMoEHook', stages=STAGES),
             dict(type='rmoe.MoELossHook'), dict(type='rmoe.CostHook'),
             dict(type='rmoe.RoutingStatsHook', interval=2),
             dict(type='EMAHook', momentum=.1)]
    written = {}
    for name, wrapper in wrappers.items():
        cfg = toy_config(f'{work_dir}/{name}', max_iters=8, hooks=hooks,
                         launcher='pytorch', model_wrapper_cfg=wrapper)
        # Whole weights, of which each rank takes its part.
        cfg.load_from = f'{work_dir}/start.pth'
        cfg.optim_wrapper.update(
            accumulative_counts=2, clip_grad=dict(max_norm=.1))
        cfg.optim_wrapper.optimizer.eps = 1e-3
        cfg.default_hooks.checkpoint.interval = 1
        cfg.experiment_name += f'{rank}'
        runner = Runner.from_cfg(cfg)
        runner.train()
        hub = runner.message_hub
        written[name] = dict(
            norm=hub.get_scalar('train/grad_norm').data[0].tolist(),
            balance=hub.get_scalar('train/loss_moe_importance').data[0]
            .tolist(), entropy=hub.get_scalar('train/moe_entropy').current())
    return written


def overlap(rank: int, work_dir: str) -> list:
    """In which order rows arrive, and the core computes."""
    from rmoe.parallel import FullySharded
    model = build(dict(type='TokenChoiceRouter', capacity_factor=.5,
                       capacity_multiple=1))
    wrapper = FullySharded(model, expert_parallel=2)
    seen = []
    for layer in moe_layers(model).values():
        layer.experts.register_forward_hook(
            lambda module, args, rows: seen.append(type(rows).__name__))
        dense = layer._dense
        layer._dense = lambda x, dense=dense: (seen.append('core'),
                                               dense(x))[1]
    wrapper(*batch(0, rank, 2), mode='loss')
    return seen


def average_whole_gradients(rank: int, work_dir: str) -> list:
    """Of parameters of which rank 1 reaches one, twice in a row."""
    from rmoe.parallel.replicated import ReplicatedGradients
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    ReplicatedGradients([one, other])
    for _ in range(2):
        loss = 4 * (rank + 1) * one.sum()
        if rank == 0:
            loss = loss + 6 * other.sum()
        loss.backward()
    return [one.grad.tolist(), other.grad.tolist()]


def refuse_optimizers(rank: int, work_dir: str) -> list:
    """What is said of one kernel for divided and whole parameters."""
    from mmengine.optim import OptimWrapper

    from rmoe.parallel import FullySharded
    said = []
    for param_dtype in (None, 'bfloat16'):
        wrapper = FullySharded(build(dict(type='TokenChoiceRouter')),
                               param_dtype=param_dtype)
        optimizer = OptimWrapper(torch.optim.AdamW(
            wrapper.parameters(), fused=True))
        try:
            wrapper.train_step(dict(zip(('inputs', 'labels'),
                                        batch(0, rank, 2))), optimizer)
            said.append('')
        except ValueError as error:
            said.append(str(error))
    return said
