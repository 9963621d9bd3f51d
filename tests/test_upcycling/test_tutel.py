"""Swin-MoE files as Tutel's ranks write them, against a plain forward pass
written from the papers."""
import argparse
import math
import re
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rmoe.backbones import SwinMoE
from rmoe.moe import moe_layers
from rmoe.upcycling import fit, read_checkpoint, state_dict_of
from rmoe.upcycling.formats.tutel import rank_files, read_rank_files
from rmoe.upcycling.keymaps import SWIN

WIDTHS, HEADS, WINDOW, PRETRAINED, RATIO = (16, 32), (1, 2), 4, (6, 3), 3
EXPERT = '.experts.batched_'
LAYER = 'layers.1.blocks.1.mlp._moe_layer.'
GATE, COUNT = f'{LAYER}gates.0.wg.weight', f'{LAYER}_num_global_experts'
FC1, FC2_BIAS = (f'{LAYER}experts.batched_{name}'
                 for name in ('fc1_w', 'fc2_bias'))


def log_distance(distance, pretrained):
    scaled = 8 * distance / (pretrained - 1)
    return math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled)


def weights(num_experts=4, cosine=False, fc2_bias=False):
    """A whole model; block 1 of both stages is MoE unless num_experts=0."""
    state = {}

    def add(key, *shape, std=.2, mean=0.):
        state[key] = mean + std * torch.randn(shape)

    def linear(name, out, in_, bias=True):
        add(f'{name}.weight', out, in_)
        if bias:
            add(f'{name}.bias', out)

    def norms(**widths):
        for name, width in widths.items():
            add(f'{at}{name}.weight', width, mean=1.)
            add(f'{at}{name}.bias', width)

    at = ''
    add('patch_embed.proj.weight', 16, 3, 4, 4)
    add('patch_embed.proj.bias', 16)
    norms(**{'patch_embed.norm': 16, 'layers.0.downsample.norm': 64,
             'norm': 32})
    linear('layers.0.downsample.reduction', 32, 64, bias=False)
    linear('head', 5, 32)
    for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at, width = f'layers.{stage}.blocks.{block}.', WIDTHS[stage]
        norms(norm1=width, norm2=width)
        linear(f'{at}attn.qkv', 3 * width, width)
        linear(f'{at}attn.proj', width, width)
        linear(f'{at}attn.cpb_mlp.0', 512, 2)
        linear(f'{at}attn.cpb_mlp.2', HEADS[stage], 512, bias=False)
        line = [log_distance(d, PRETRAINED[stage])
                for d in range(1 - WINDOW, WINDOW)]
        state[f'{at}attn.relative_coords_table'] = torch.tensor(
            [[[[y, x] for x in line] for y in line]])
        state[f'{at}attn.relative_position_index'] = torch.zeros(16, 16).long()
        if (stage, block) == (0, 1):
            state[f'{at}attn_mask'] = torch.zeros(4, 16, 16)
        if not (block and num_experts):
            linear(f'{at}mlp.fc1', RATIO * width, width)
            linear(f'{at}mlp.fc2', width, RATIO * width, bias=fc2_bias)
            continue
        at += 'mlp._moe_layer.'
        if cosine:
            linear(f'{at}gates.0.cosine_projector', 256, width)
            add(f'{at}gates.0.sim_matrix', 256, num_experts)
            state[f'{at}gates.0.temperature'] = torch.tensor([1.])
        else:
            add(f'{at}gates.0.wg.weight', num_experts, width)
        hidden = RATIO * width
        add(f'{at}experts.batched_fc1_w', num_experts, hidden, width)
        add(f'{at}experts.batched_fc2_w', num_experts, hidden, width)
        add(f'{at}experts.batched_fc1_bias', num_experts, hidden)
        add(f'{at}experts.batched_fc2_bias', num_experts, width,
            std=.2 if fc2_bias else 0.)
        state[f'{at}_num_global_experts'] = torch.tensor(num_experts)
    return state


def piece_of(key, value, rank, ranks, legacy, scattered):
    """What a rank holds of an expert weight (E, ...)."""
    if len(value) >= ranks:
        piece = value.chunk(ranks)[rank]
    else:
        sharers = ranks // len(value)
        piece = value[rank // sharers]
        if key.endswith('fc2_bias'):
            piece = F.pad(piece, (0, -len(piece) % sharers))
        piece = piece.chunk(sharers)[rank % sharers][None]
        if scattered:
            return piece.reshape(*value.shape[1:-1],
                                 value.shape[-1] // sharers).clone()
    return (piece[:, None] if legacy and piece.dim() == 2 else piece).clone()


def write(folder, state, ranks=2, layout='split', legacy=False,
          scattered=False, count='tensor'):
    """Write the files of a set; returns the name all share."""
    path = folder / 'x.pth'
    frozen = not any(key.endswith('.fc2.bias') for key in state)
    for rank in range(ranks):
        full, own = {}, {}
        for key, value in state.items():
            if EXPERT in key:
                value = piece_of(key, value, rank, ranks, legacy, scattered)
            elif key.endswith('_num_global_experts') and count != 'tensor':
                value = int(value)
                if count is None:
                    continue
            trained = not (frozen and key.endswith('fc2_bias'))
            (own if EXPERT in key and trained else full)[key] = value
        if layout == 'split':
            torch.save(dict(model=own), f'{path}.rank{rank}')
            if rank == 0:
                torch.save(dict(model=full), f'{path}.master')
        else:  # the config can only be left out
            ending = 'global' if layout == 'global' else f'rank{rank}'
            torch.save(dict(model={**full, **own}, epoch=3,
                            config=argparse.Namespace()), f'{path}.{ending}')
    return path


def model(num_experts=4, cosine=False, fc2_bias=False, k=1, core=False,
          **options):
    scorer = dict(type='CosineScorer' if cosine else 'LinearScorer')
    moe = dict(layers=((1, ), (1, )), num_experts=num_experts, core=core,
               align='none', router=dict(type='TokenChoiceRouter', top_k=k,
                                         noise_std=0., scorer=scorer))
    settings = dict(pretrained_window_size=PRETRAINED, fc2_bias=fc2_bias)
    return SwinMoE(
        embed_dims=16, depths=(2, 2), num_heads=HEADS, strides=(4, 2),
        out_indices=(0, 1), window_size=WINDOW, mlp_ratio=RATIO,
        shift_small_maps=False, drop_path_rate=0.,
        moe=moe if num_experts else None, **{**settings, **options}).eval()


def reference(state, image, k):
    """Maps (B, C, h, w) of both stages, and {(token, expert)} per layer."""

    def linear(x, name):
        return F.linear(x, state[f'{name}.weight'], state.get(f'{name}.bias'))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'],
                            state[f'{name}.bias'])

    def attend(x, at, stage, shift):
        """Every token looks at all, and is masked from other windows."""
        side, heads = x.shape[1], HEADS[stage]
        rolled = [(row % side, column % side)
                  for row in range(-shift, side - shift)
                  for column in range(-shift, side - shift)]
        regions = [[(place // WINDOW, place >= side - shift)
                    for place in token] for token in rolled]
        offsets = torch.tensor([[[log_distance(a - b, PRETRAINED[stage])
                                  for a, b in zip(one, other)]
                                 for other in rolled] for one in rolled])
        bias = linear(linear(offsets, f'{at}.cpb_mlp.0').relu(),
                      f'{at}.cpb_mlp.2')
        apart = torch.tensor([[one != other for other in regions]
                              for one in regions])
        bias = bias.masked_fill(apart[..., None], -math.inf)
        q, key, v = linear(x.flatten(1, 2), f'{at}.qkv').unflatten(
            -1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ key.mT * q.shape[-1]**-.5 + bias.permute(2, 0, 1)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return linear(mixed, f'{at}.proj').view_as(x)

    def experts(x, at):
        gate, at = f'{at}._moe_layer.gates.0', f'{at}._moe_layer{EXPERT}'
        out, pairs = [], set()
        for number, token in enumerate(x.reshape(-1, x.shape[-1])):
            if f'{gate}.wg.weight' in state:
                logits = state[f'{gate}.wg.weight'] @ token
            else:
                token_p = linear(token, f'{gate}.cosine_projector')
                scale = min(float(state[f'{gate}.temperature']), math.log(100))
                logits = math.exp(scale) * F.cosine_similarity(
                    token_p[:, None], state[f'{gate}.sim_matrix'], dim=0)
            gates = logits.softmax(0)
            y = torch.zeros_like(token)
            for e in gates.argsort(descending=True)[:k].tolist():
                pairs.add((number, e))
                hidden = state[f'{at}fc1_w'][e] @ token
                hidden = F.gelu(hidden + state[f'{at}fc1_bias'][e])
                y += gates[e] * (hidden @ state[f'{at}fc2_w'][e]
                                 + state[f'{at}fc2_bias'][e])
            out.append(y)
        chosen.append(pairs)
        return torch.stack(out).view_as(x)

    chosen, maps = [], []
    x = F.conv2d(image, state['patch_embed.proj.weight'],
                 state['patch_embed.proj.bias'], stride=4)
    x = norm(x.permute(0, 2, 3, 1), 'patch_embed.norm')
    for stage in (0, 1):
        for block in (0, 1):
            at = f'layers.{stage}.blocks.{block}'
            shift = WINDOW // 2 if block and x.shape[1] > WINDOW else 0
            x = x + attend(norm(x, f'{at}.norm1'), f'{at}.attn', stage, shift)
            y = norm(x, f'{at}.norm2')
            if f'{at}.mlp.fc1.weight' in state:
                x = x + linear(F.gelu(linear(y, f'{at}.mlp.fc1')),
                               f'{at}.mlp.fc2')
            else:
                x = x + experts(y, f'{at}.mlp')
        maps.append(x.permute(0, 3, 1, 2))
        if stage == 0:
            x = torch.cat([x[:, column::2, row::2] for row in (0, 1)
                           for column in (0, 1)], -1)
            x = linear(norm(x, 'layers.0.downsample.norm'),
                       'layers.0.downsample.reduction')
    return maps, chosen


def load(ours, path):
    ours.load_state_dict(state_dict_of(read_checkpoint(path)))
    return ours


@pytest.mark.parametrize('kind, files', [
    (dict(), dict()),
    (dict(core=True, k=2), dict(ranks=4)),
    (dict(cosine=True, k=2, core=True), dict(layout='full')),
    (dict(), dict(ranks=8, legacy=True, count=None)),  # as the published
    (dict(cosine=True, fc2_bias=True), dict(ranks=8, layout='full')),
    (dict(fc2_bias=True, num_experts=2), dict(ranks=6)),  # 16 and 32 by 3
    (dict(k=2), dict(ranks=8, scattered=True, count='int')),
    (dict(fc2_bias=True), dict(ranks=8, layout='full', scattered=True)),
    (dict(fc2_bias=True, k=2), dict(ranks=1, layout='global', legacy=True)),
    (dict(), dict(ranks=1)),
    (dict(num_experts=0), dict(ranks=1, layout='global')),
    (dict(num_experts=0, fc2_bias=True), dict()),
    (dict(num_experts=0), dict(layout='full'))], ids=str)
def test_features_and_chosen_experts(tmp_path, kind, files):
    state = weights(**{key: value for key, value in kind.items()
                       if key not in ('k', 'core')})
    ours = load(model(**kind), write(tmp_path, state, **files))
    ours.norm0 = ours.norm1 = nn.Identity()  # not in a classifier
    chosen = []

    def note(router, inputs, routing):
        expert_ids_N = torch.arange(len(routing.counts_E)).repeat_interleave(
            routing.counts_E)
        chosen.append(set(zip(routing.token_ids_N.tolist(),
                              expert_ids_N.tolist())))

    for layer in moe_layers(ours).values():
        layer.router.register_forward_hook(note)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = ours(image)
        expected, experts = reference(state, image, kind.get('k', 1))
    assert chosen == experts
    for ours_map, theirs in zip(maps, expected, strict=True):
        assert (ours_map - theirs).abs().max() < 1e-4


def test_rank_files(tmp_path):
    path = tmp_path / 'x.pth'
    (tmp_path / 'y.pth.rank0').touch()
    assert rank_files(path) == rank_files(tmp_path / 'none' / 'x.pth') == []
    endings = ['master', *(f'rank{i}' for i in range(11))]
    for ending in reversed(endings):
        (tmp_path / f'x.pth.{ending}').touch()
    files = [tmp_path / f'x.pth.{ending}' for ending in endings]
    for name in ('x.pth', 'x.pth.rank0', 'x.pth.rank7', 'x.pth.master'):
        assert rank_files(tmp_path / name) == files
    whole = tmp_path / 'x.pth.global'
    whole.touch()
    assert rank_files(whole) == [whole]
    assert rank_files(files[0]) == files
    with pytest.raises(ValueError, match=r'global and x\.pth\.master'):
        rank_files(path)
    path.touch()
    assert rank_files(path) == []


def without(*ranks):
    return lambda path: [path.with_suffix(f'.pth.rank{rank}').unlink()
                         for rank in ranks]


def changed(ending, key, function):
    """Replace one weight in one file; by None to take it out."""

    def damage(path):
        file = path.with_suffix(f'.pth.{ending}')
        state = torch.load(file, weights_only=False)['model']
        value = function(state.pop(key, None))
        if value is not None:
            state[key] = value
        torch.save(dict(model=state), file)

    return damage


def only_rank0_as_global(path):
    without(1)(path)
    path.with_suffix('.pth.rank0').rename(path.with_suffix('.pth.global'))


def cut_short(path):
    file = path.with_suffix('.pth.rank1')
    file.write_bytes(file.read_bytes()[:-500])


@pytest.mark.parametrize('files, damage, message', [
    (dict(ranks=4), without(1),
     r'x\.pth\.rank1 is missing.*x\.pth\.rank3.*one folder'),
    (dict(ranks=4), without(3),
     r'rank2 is the last of 3 rank files.*4 experts.*missing'),
    (dict(), without(1),
     r'fc1_w \(2, 48, 16\).*one of 1 ranks.*4 experts.*rank0 is the last'),
    (dict(ranks=4), without(2, 3), r'fc1_w \(1, 48, 16\).*2 ranks'),
    (dict(ranks=8, layout='full'), without(4, 5, 6, 7),
     r'fc2_bias \(1, 8\) is not what one of 4 ranks.*other ranks'),
    (dict(layout='full'), only_rank0_as_global,
     r'1 ranks.*global is the last'),
    (dict(layout='full'), changed('rank1', GATE, lambda x: x + .5),
     r'rank0 and .*rank1 differ by 0\.5 in .*wg\.weight.*\.master'),
    (dict(), changed('rank1', FC1, lambda x: x[:, :-1]),
     r'fc1_w is \(2, 96, 32\) .*rank0 and \(2, 95, 32\).*rank1.*Take'),
    (dict(), changed('rank1', 'extra', lambda _: torch.zeros(1)),
     r'rank0 and .*rank1 hold different weights: only one has extra'),
    (dict(), lambda path: path.with_suffix('.pth.master').unlink(),
     r'rank0 has no router for layers.*\.master file'),
    (dict(), changed('master', GATE, lambda _: None),
     r'master has no router for layers\.1\.blocks\.1\.'),
    (dict(ranks=1), without(0),
     r'master has a router.*no rank file.*put \.rank0'),
    (dict(count='int'), changed('master', COUNT, lambda _: 8),
     r'_num_global_experts is 8.*router.*4 experts'),
    (dict(ranks=8), changed('master', FC2_BIAS, lambda x: x + 1),
     r'fc2_bias \(1, 16\) .*master and in no rank.*full rank files.* is 1'),
    (dict(), cut_short, r'rank1 is corrupt, cut short'),
    (dict(), lambda path: torch.save([1], f'{path}.rank1'),
     r'rank1 holds a list, not a state dict')])
def test_broken_sets(tmp_path, files, damage, message):
    path = write(tmp_path, weights(), **files)
    damage(path)
    with pytest.raises(ValueError, match=f'(?s){message}') as error:
        read_rank_files(path)
    assert str(tmp_path) in str(error.value)


def test_ranks_that_drifted_apart_load_with_a_master(tmp_path):
    state = weights()
    path = write(tmp_path, state, layout='full')
    shutil.copy(f'{path}.rank0', f'{path}.master')
    for rank in (0, 1):
        changed(f'rank{rank}', GATE, lambda x, rank=rank: x + rank + 1)(path)
    read = state_dict_of(read_rank_files(path))
    assert set(state) - set(read) == {
        key for key in state if re.search('fc2_bias|_num_global', key)}
    for key, value in read.items():
        assert torch.equal(value, state[key]), key


def test_one_file_of_all_experts_under_another_name():
    state = weights(fc2_bias=True)  # as Tutel's gather tool writes it
    before = {key: value[:, None] if re.search(r'fc\d_bias', key) else value
              for key, value in state.items()}
    fitted, _ = fit(model(fc2_bias=True), before)
    for layer in ('fc1', 'fc2'):
        assert torch.equal(
            fitted[f'stages.1.blocks.1.ffn.experts.residual_{layer}_bias'],
            state[FC2_BIAS.replace('fc2', layer)])


@pytest.mark.parametrize('options, message', [
    (dict(pretrained_window_size=None), r'\(None, None\).*to \(6, 3\)'),
    (dict(pretrained_window_size=6), r'=\(6, 6\).*Set it to \(6, 3\)'),
    (dict(fc2_bias=True), 'Set fc2_bias=False')], ids=str)
def test_settings_that_no_shape_tells(tmp_path, options, message):
    path = write(tmp_path, weights())
    with pytest.raises(ValueError, match=message):
        load(model(**options), path)


def test_file_without_tables():
    state = {key: value for key, value in weights(0, fc2_bias=True).items()
             if 'relative_coords' not in key}
    _, report = fit(model(0, fc2_bias=True), state)
    assert report.source == 'Microsoft Swin-MoE'
    with pytest.raises(ValueError, match=r'e\.g\. \(12, 12, 12, 6\)'):
        fit(model(0, pretrained_window_size=None), state)
    # Nothing but the bias tells a model of one stage from timm's.
    assert SWIN.recognise(key for key in state if 'layers.0.b' in key)
    # Swin V2 has such a bias too, but another attention.
    state['layers.0.blocks.0.attn.logit_scale'] = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match='that of Swin Transformer V2'):
        fit(model(0, fc2_bias=True), state)
