"""A small V-MoE written in Flax, its files in every form, our features."""
import functools
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rmoe.backbones import ViTMoE
from rmoe.moe import moe_layers
from rmoe.upcycling import fit
from rmoe.upcycling.formats.flax import is_flax, read_flax
from rmoe.upcycling.keymaps import VIT

flax = pytest.importorskip('flax')
import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import msgpack  # noqa: E402
from flax import serialization  # noqa: E402

SIDE, PATCH, WIDTH, HIDDEN, HEADS, DEPTH, EXPERTS = 24, 8, 16, 32, 2, 3, 4
MOE = dict(layers=(1, 2), num_experts=EXPERTS, align='none', router=dict(
    type='TokenChoiceRouter', top_k=2, noise_std=0.))
NORMAL = nn.initializers.normal(.3)


class Mlp(nn.Module):

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(HIDDEN)(x))
        return nn.Dense(WIDTH)(hidden)


class Router(nn.Module):

    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(EXPERTS, use_bias=False, name='dense')(x))


class Moe(nn.Module):

    @nn.compact
    def __call__(self, x):
        tokens = x.reshape(-1, WIDTH)
        gates = Router(name='Router')(tokens)
        best, chosen = jax.lax.top_k(gates, 2)
        self.sow('intermediates', 'chosen', chosen)
        gates = jnp.where(gates >= best[:, 1:], gates, 0)
        experts = nn.vmap(Mlp, {'params': 0}, {'params': True}, in_axes=None,
                          axis_size=EXPERTS)
        return jnp.einsum('te,etd->td', gates, experts(name='Mlp')(
            tokens)).reshape(x.shape)


class Block(nn.Module):
    moe: bool

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(
            HEADS, name='SelfAttention')(y, y)
        y = nn.LayerNorm()(x)
        return x + (Moe(name='Moe') if self.moe else Mlp(name='Mlp'))(y)


class Positions(nn.Module):

    @nn.compact
    def __call__(self, x):
        return x + self.param('pos_embedding', NORMAL, (1, *x.shape[1:]))


class Encoder(nn.Module):
    moe: tuple

    @nn.compact
    def __call__(self, x):
        x = Positions(name='posembed_input')(x)
        for i in range(DEPTH):
            x = Block(i in self.moe, name=f'encoderblock_{i}')(x)
        return nn.LayerNorm(name='encoder_norm')(x)


class VMoE(nn.Module):
    moe: tuple
    cls: bool

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), 'VALID',
                    name='embedding')(image)
        x = x.reshape(len(x), -1, WIDTH)
        if self.cls:
            cls = self.param('cls', NORMAL, (1, 1, WIDTH))
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1)
        x = Encoder(self.moe, name='Encoder')(x)
        nn.Dense(5, name='head')(x[:, 0])
        return x


@functools.cache
def compiled(model):
    return jax.jit(functools.partial(model.apply, mutable='intermediates'))


class Reference:
    """Random parameters, and what the model makes of them."""

    def __init__(self, moe=(1, 2), cls=True):
        rng = np.random.default_rng(0)
        self.model = VMoE(moe, cls)
        self.image = rng.normal(size=(2, SIDE, SIDE, 3)).astype('f4')
        shapes = jax.eval_shape(self.model.init, jax.random.key(0),
                                self.image)['params']
        self.params = jax.tree.map_with_path(lambda path, leaf: rng.normal(
            path[-1].key == 'scale', .3, leaf.shape).astype('f4'), shapes)

    def run(self):
        """(B, tokens, D) and what was recorded."""
        return compiled(self.model)({'params': self.params}, self.image)


def flat(tree):
    return {'/'.join(key): value for key, value in
            flax.traverse_util.flatten_dict(tree).items()}


def packed(*values):
    return msgpack.packb(values)


def slices(ends):
    return packed(*(packed(start, stop, None) for start, stop in ends))


def cut(array):
    """Slices of about equal size, three or two along an axis."""
    ends = [np.linspace(0, size, min(size, 3 - axis % 2) + 1).astype(
        int).tolist() for axis, size in enumerate(array.shape)]
    return list(itertools.product(*(zip(e, e[1:]) for e in ends)))


def write_shards(prefix, tree, count=3, version='20220622', lost=None):
    """V-MoE's form, without the slice ``lost`` = (array number, number)."""
    shards = [{'__msgpack_array_chunk_a87ca2__': True} for _ in range(count)]
    leaves, structure = jax.tree.flatten(tree)
    infos = []
    for number, array in enumerate(leaves):
        name = array.dtype.name
        where = [(number + i) % count for i in range(len(cut(array)))]
        for i, ends in enumerate(cut(array)):
            piece = array[tuple(slice(*end) for end in ends)].flatten()
            halves = [msgpack.ExtType(1, packed(half.shape, name,
                                               half.tobytes()))
                      for half in np.array_split(piece, 2)]
            if (number, i) != lost:
                shards[where[i]].setdefault(str(number), []).append(
                    [halves, msgpack.ExtType(6, slices(ends))])
        infos.append(msgpack.ExtType(8, packed(
            packed(array.shape, name, False, {}),
            [slices(ends) for ends in cut(array)], where)))
    index = jax.tree.unflatten(structure, infos)
    # Not sorted in the file.
    index = dict(shard_count=count, index=dict(reversed(index.items())))
    if version:
        index['version'] = version
    Path(f'{prefix}.index').write_bytes(msgpack.packb(index))
    for i, shard in enumerate(shards):
        Path(f'{prefix}.data-{i:05d}-of-{count:05d}').write_bytes(
            msgpack.packb(shard))


def write(path, form, tree):
    """Returns what a user would name."""
    if 'shards' in form:
        write_shards(path, {'target': tree},
                     version=None if 'old' in form else '20220622')
        return path
    path = path.with_name(f'{path.name}.{form}')
    if form == 'npz':
        np.savez(path, **flat(tree))
    else:
        path.write_bytes(serialization.msgpack_serialize(dict(
            params=tree, step=7, opt_state={'0': {'mu': tree}})))
    return path


def weights(path):
    """Of the model alone."""
    assert is_flax(path)
    state = read_flax(path)['state_dict']
    prefix = VIT.find_prefix(state)
    return {key.removeprefix(prefix): value for key, value in state.items()
            if key.startswith(prefix)}


def vit(moe=None, **options):
    return ViTMoE(**{**dict(
        img_size=SIDE, patch_size=PATCH, embed_dims=WIDTH, num_layers=DEPTH,
        num_heads=HEADS, mlp_dims=HIDDEN, moe=moe,
        act_cfg=dict(type='GELU', approximate='tanh')), **options}).eval()


def largest_difference(model, reference):
    """Between features; the experts chosen must be the same."""
    chosen = []
    for layer in moe_layers(model).values():
        layer.router.register_forward_hook(lambda _, __, routing: (
            chosen.append(routing.dispatch_tensor().sum(2))))
    with torch.no_grad():
        out, = model(torch.from_numpy(reference.image).permute(0, 3, 1, 2))
    theirs, record = reference.run()
    for block, ours_TE in zip(reference.model.moe, chosen, strict=True):
        best_TK = record['intermediates']['Encoder'][
            f'encoderblock_{block}']['Moe']['chosen'][0]
        assert torch.equal(ours_TE, torch.from_numpy(np.array(
            jax.nn.one_hot(best_TK, EXPERTS).sum(1))))
    return np.abs(out.flatten(2).transpose(1, 2).numpy() -
                  theirs[:, reference.model.cls:]).max()


@pytest.mark.parametrize('form', ['msgpack', 'npz', 'shards', 'old shards'])
@pytest.mark.parametrize('core, cls', [(False, True), (True, True),
                                       (False, False)])
def test_vmoe(tmp_path, form, core, cls):
    reference = Reference(cls=cls)
    path = write(tmp_path / 'v.moe', form, reference.params)
    model = vit(dict(MOE, core=core), with_cls_token=cls)
    fitted, report = fit(model, weights(path))
    model.load_state_dict(fitted)
    assert largest_difference(model, reference) < 1e-4
    assert set(report.left_out) == {'head/kernel', 'head/bias'}
    assert report.status['layers.1.ffn.experts.residual_fc1_weight'] == (
        'converted' if core else 'loaded')


@pytest.mark.parametrize('renamed', [
    {},
    {'LayerNorm_1': 'LayerNorm_2', 'Mlp': 'MlpBlock_3',
     'SelfAttention': 'MultiHeadDotProductAttention_1'},
    {'Mlp': 'MlpBlock_0', 'Encoder/posembed_input/': '',
     'SelfAttention': 'MultiHeadDotProductAttention_0'}],
    ids=['vmoe', 'vision_transformer', 'big_vision'])
def test_dense_vit(tmp_path, renamed):
    reference = Reference(())
    state = flat(reference.params)
    if renamed:
        renamed['Encoder'] = 'Transformer'
    for old, new in renamed.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    if 'pos_embedding' in state:
        # big_vision adds positions before it puts the class token in front.
        state['pos_embedding'][:, :1] = 0
        state['pos_embedding'] = state['pos_embedding'][:, 1:]
    model = vit()
    np.savez(tmp_path / 'x.npz', **state)
    model.load_state_dict(weights(tmp_path / 'x.npz'))
    assert largest_difference(model, reference) < 2e-5


@pytest.mark.parametrize('nest', ['params/', 'optimizer/target/'])
def test_nested_parameters_load_through_init_cfg(tmp_path, nest):
    reference = Reference(())
    np.savez(tmp_path / 'x.npz', **{
        nest + key: value for key, value in flat(reference.params).items()})
    model = vit(init_cfg=dict(type='Pretrained',
                              checkpoint=str(tmp_path / 'x.npz')))
    model.init_weights()
    assert largest_difference(model, reference) < 2e-5


@pytest.fixture
def dense():
    return {key: torch.from_numpy(value)
            for key, value in flat(Reference(()).params).items()}


def test_dense_file_upcycles_at_another_image_size(dense):
    unused = ('MapHead/probe', 'MAPHead_0/probe', 'pre_logits/bias', 'step',
              'opt_state/0/mu/cls', 'head/bias', 'head/kernel')
    dense.update(dict.fromkeys(unused, torch.zeros(1)))
    model = vit(dict(layers=(1, ), num_experts=4), img_size=(48, 32))
    fitted, report = fit(model, dense)
    assert set(report.left_out) == set(unused)
    assert fitted['pos_embed'].shape == (1, 1 + 6 * 4, WIDTH)
    assert report.status['pos_embed'] == 'resized'
    assert report.status['layers.1.ffn.layers.1.bias'] == 'upcycled'


@pytest.mark.parametrize('act', [None, dict(type='ReLU')])
@pytest.mark.parametrize('block', [0, 1])
def test_activation_is_checked(dense, act, block):
    model = vit(dict(layers=(block, ), num_experts=4), act_cfg=act)
    with pytest.raises(ValueError, match="approximate='tanh'"):
        model.load_state_dict(dense)


def test_wrong_shape_names_the_key(dense):
    dense['embedding/kernel'] = dense['embedding/kernel'].flatten(0, 1)
    with pytest.raises(ValueError, match=r'embedding/kernel \(64, 3, 16\)'):
        vit().load_state_dict(dense)


VALUES = np.arange(24, dtype='f4').reshape(6, 4)
TREE = {f'b_{i}': {'w': VALUES + i, 'v': VALUES[0] - i} for i in range(12)}


@pytest.mark.parametrize('form', ['npz', 'msgpack', 'shards'])
def test_bfloat16(tmp_path, form):
    values = np.tile(VALUES, (5000, 1))
    tree = {'a': np.asarray(jnp.asarray(values, jnp.bfloat16))}
    state = read_flax(write(tmp_path / 'x', form, tree))['state_dict']
    for key, value in state.items():
        if key != 'step':
            assert value.dtype == torch.bfloat16
            assert torch.equal(value.float(), torch.from_numpy(values))


def test_chunked_arrays_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 40)
    path = tmp_path / 'x.msgpack'
    path.write_bytes(serialization.msgpack_serialize(dict(
        w=VALUES, step=3, scalar=np.int32(4), z=2j, none=None,
        empty=np.zeros((0, 3), 'f4'), mask=np.array([True, False]))))
    assert b'__msgpack_chunked_array__' in path.read_bytes()
    state = read_flax(path)['state_dict']
    assert torch.equal(state.pop('w'), torch.from_numpy(VALUES))
    assert state.pop('empty').shape == (0, 3)
    assert {key: value.tolist() for key, value in state.items()} == dict(
        step=3, scalar=4, z=2j, mask=[True, False])


@pytest.mark.parametrize('count', [1, 3])
def test_arrays_are_numbered_as_strings_sort(tmp_path, count):
    write_shards(tmp_path / 'x', dict(TREE, one=np.float32(5), none=None),
                 count)
    for path in (tmp_path / 'x', f'{tmp_path}/x.index'):
        state = read_flax(path)['state_dict']
        assert state.pop('one').shape == ()
        assert set(state) == set(flat(TREE))
        for key, value in flat(TREE).items():
            assert torch.equal(state[key], torch.from_numpy(value)), key


SHARD = 'data-00001-of-00003'


def write_index(path, **content):
    (path / 'x.index').write_bytes(msgpack.packb(dict(shard_count=1) | content))


def vector(*ends):
    """What an index says of four numbers."""
    return msgpack.ExtType(8, packed(packed([4], 'float32', False, {}),
                                     list(map(slices, ends)), [0]))


def mix(path, tree):
    """Replace a shard by that of another save."""
    write_shards(path / 'y', tree)
    (path / f'y.{SHARD}').replace(path / f'x.{SHARD}')


class TestBadFiles:

    @pytest.mark.parametrize('name', ['x', 'x.npz', 'x.msgpack', 'x.index'])
    def test_nothing_there(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            read_flax(tmp_path / name)
        assert is_flax(tmp_path / name) == (name != 'x')

    @pytest.mark.parametrize('form', ['npz', 'msgpack', 'shards'])
    @pytest.mark.parametrize('share', [0, .5, .99])
    def test_cut_short(self, tmp_path, form, share):
        path = write(tmp_path / 'x', form, TREE)
        for victim in sorted(tmp_path.iterdir()):
            whole = victim.read_bytes()
            victim.write_bytes(whole[:int(len(whole) * share)])
            with pytest.raises(ValueError, match=rf'{victim}.* is cut short'):
                read_flax(path)
            victim.write_bytes(whole)

    @pytest.mark.parametrize('suffix', ['.npz', '.msgpack', '.index'])
    @pytest.mark.parametrize('content', [b'<html>', b'\x01', b'\x93\1\2\3',
                                         b'\x80'])
    def test_another_kind_of_file(self, tmp_path, suffix, content):
        path = tmp_path / f'x{suffix}'
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'checkpoint {path}'):
            read_flax(path)

    @pytest.mark.parametrize('damage, message', [
        (lambda path: (path / f'x.{SHARD}').unlink(),
         rf"3 shards, of which \['x.{SHARD}'\] are not.*Download"),
        (lambda path: write_shards(path / 'x', TREE, lost=(5, 2)),
         r"slice \(\(2, 4\), \(0, 2\)\) of 'b_10/w' is in none of the shard"),
        (lambda path: write_index(path, version='2030', index={}),
         "version '2030' is unknown"),
        (lambda path: write_index(path, index={'a': 'text'}),
         "'a' is no array but a str"),
        (lambda path: write_index(path, index={'a': vector([(0, 3)])}),
         r"slices of 'a' cover 3 elements, its shape is \(4,\)"),
        (lambda path: write_index(
            path, index={'a': vector([(0, 3)], [(7, 8)])}),
         'slice .* is not of an array of shape'),
        (lambda path: (path / f'x.{SHARD}').write_bytes(msgpack.packb({'3': [[
            [], msgpack.ExtType(6, slices([(0, 2), (2, 4)]))]]})),
         'cut short, .* input of size 0'),
        (lambda path: mix(path, {'a': VALUES[0], **TREE}),
         'slice .* is not of an array of shape'),
        (lambda path: mix(path, {'b_0': {'v': VALUES[0], 'w': VALUES[:3]}}),
         'does not expect'),
        (lambda path: mix(path, {'b_0': VALUES[0, :1]}),
         'is in none of the shards'),
        (lambda path: mix(path, jax.tree.map(np.float64, TREE)),
         r'piece is torch.float64, its array torch.float32')])
    def test_bad_shards(self, tmp_path, damage, message):
        write_shards(tmp_path / 'x', TREE)
        damage(tmp_path)
        with pytest.raises(ValueError, match=message):
            read_flax(tmp_path / 'x')

    @pytest.mark.parametrize('leaf, message', [
        ('text', "'a/b'.*no array but a str"),
        (np.array(['text']), 'no tensor'),
        (msgpack.ExtType(1, packed((3, 4), 'float32', b'1')), 'has 1 bytes'),
        (np.array(['text']), "no .npz file of plain arrays: 'a' of type"),
        (np.array([1, None]), 'no .npz file of plain arrays')])
    def test_no_array(self, tmp_path, leaf, message):
        if 'npz' in message:
            np.savez(tmp_path / 'x.npz', a=leaf)
        else:
            (tmp_path / 'x.msgpack').write_bytes(
                serialization.msgpack_serialize({'a': {'b': leaf}}))
        path, = tmp_path.iterdir()
        with pytest.raises(ValueError, match=message):
            read_flax(path)

    def test_msgpack_is_optional(self, tmp_path, monkeypatch):
        path = write(tmp_path / 'x', 'msgpack', TREE)
        monkeypatch.setitem(sys.modules, 'msgpack', None)
        with pytest.raises(ImportError, match='pip install msgpack'):
            read_flax(path)
