"""Files a user may bring, good and bad."""
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer

from rmoe.safe_loading import load_from_local
from rmoe.upcycling import formats
from rmoe.upcycling.formats import (
    read_checkpoint,
    state_dict_of,
    write_atomically,
    write_checkpoint,
)

STATE = {'a.weight': torch.arange(6.).view(2, 3), 'a.bias': torch.ones(2)}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f'model{suffix}'
    write_checkpoint(path, STATE, dict(note='x'))
    content = read_checkpoint(path)
    assert content['meta'] == dict(note='x')
    for key, value in state_dict_of(content).items():
        assert torch.equal(value, STATE[key])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(sys.platform != 'linux', reason='no /proc/self/maps')
@pytest.mark.parametrize('pickled', [False, True])
@pytest.mark.parametrize('mapped', [False, True])
def test_tensors_stay_in_the_file_until_they_are_used(tmp_path, mapped,
                                                      pickled):
    path = tmp_path / 'model.pth'
    more = {'log': HistoryBuffer([1.], [1])} if pickled else {}
    torch.save(dict(state_dict=STATE, **more), path)
    state = state_dict_of(read_checkpoint(path, mapped=mapped))
    assert (str(path) in Path('/proc/self/maps').read_text()) == mapped
    assert torch.equal(state['a.weight'], STATE['a.weight'])


def test_what_mmengine_loads_is_no_view_of_the_file(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save(STATE, path)
    content = load_from_local(str(path), 'cpu')
    path.write_bytes(b'')  # as a run that writes over its checkpoint
    assert torch.equal(content['a.weight'], STATE['a.weight'])


@pytest.mark.parametrize('wrap', ['state_dict', 'model', 'module', None])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_state_dict_of_common_layouts(wrap, prefix):
    state = {prefix + key: value for key, value in STATE.items()}
    content = {wrap: state, 'epoch': 3} if wrap else state
    assert set(state_dict_of(content)) == set(STATE)


@pytest.mark.parametrize('legacy', [False, True])
def test_mmengine_checkpoint_is_read_without_its_pickled_log(tmp_path, legacy):
    path = tmp_path / 'iter_1.pth'
    torch.save(
        dict(state_dict=STATE, meta=dict(iter=1, epoch=0),
             message_hub=dict(log_scalars={'loss': HistoryBuffer([1.], [1])},
                              runtime_info={}, resumed_keys={})),
        path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # what makes the reader necessary
    content = read_checkpoint(path)
    assert content['message_hub']['log_scalars'] == {}
    assert content['meta']['iter'] == 1
    assert torch.equal(state_dict_of(content)['a.weight'], STATE['a.weight'])


class Hostile:

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('function, name', [
    (os.mkdir, 'mkdir'), (eval, 'eval')])
def test_hostile_file_is_refused_and_not_run(tmp_path, function, name, legacy):
    path, trace = tmp_path / 'bad.pth', tmp_path / 'trace'
    argument = str(trace) if name == 'mkdir' else f'open({str(trace)!r}, "w")'
    torch.save(dict(state_dict=STATE, extra=Hostile(function, argument)),
               path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf'bad\.pth asks for \S*{name}'):
        read_checkpoint(path)
    assert not trace.exists()


def test_getattr_chains_get_nowhere(tmp_path):
    # getattr is in mmengine's own logs; here it is an inert placeholder.
    path, trace = tmp_path / 'bad.pth', tmp_path / 'trace'
    chain = Hostile(getattr, HistoryBuffer([1.], [1]), '__class__')
    torch.save(dict(state_dict=STATE, extra=chain), path)
    assert 'extra' not in read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('keep', [0, 1, 40, 0.5, 0.99])
def test_cut_short(tmp_path, suffix, keep):
    path = tmp_path / f'model{suffix}'
    write_checkpoint(path, STATE, {})
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data)) if keep < 1 and keep
                           else keep])
    with pytest.raises(ValueError, match=f'model{suffix}'):
        read_checkpoint(path)


def test_other_bad_files(tmp_path):
    path = tmp_path / 'x.pth'
    with pytest.raises(FileNotFoundError, match=r'x\.pth does not exist'):
        read_checkpoint(path)
    path.write_text('this is no checkpoint')
    with pytest.raises(ValueError, match=r'x\.pth is corrupt'):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match='holds a list'):
        read_checkpoint(path)
    with pytest.raises(ValueError, match='no weights'):
        state_dict_of(dict(epoch=1))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'last.pth'
    write_atomically(path, b'old')

    def full_disk(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(formats.os, 'fsync', full_disk)
    with pytest.raises(OSError, match='No space left'):
        write_atomically(path, b'new')
    assert path.read_bytes() == b'old'
    assert [file.name for file in tmp_path.iterdir()] == ['last.pth']


def test_meta_of_safetensors_is_json(tmp_path):
    path = tmp_path / 'a.safetensors'
    write_checkpoint(path, STATE, dict(stage='joint'))
    size = int.from_bytes(path.read_bytes()[:8], 'little')
    header = json.loads(path.read_bytes()[8:8 + size])
    assert json.loads(header['__metadata__']['meta']) == dict(stage='joint')
