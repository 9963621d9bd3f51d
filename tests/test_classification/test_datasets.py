"""Packed images and folders, against Pillow."""
import io
import pickle

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from pretrained import ROOT
from small_classifier import WNIDS, draw_images, encode, pack
from torch.utils.data import DataLoader

from rmoe.classification import ImageFolder, PackedImages
from rmoe.classification.transforms import build_transforms


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_packed_images_are_those_that_went_in(packed):
    dataset = PackedImages('train.npz', str(packed))
    assert len(dataset) == 48
    assert dataset.metainfo == dict(classes=WNIDS)
    for i, image in enumerate(draw_images(48)):
        sample = dataset[i]
        assert torch.equal(sample['inputs'], pixels(image))
        assert sample['inputs'].dtype == torch.uint8
        assert sample['data_samples'] == i % 3


def test_other_modes_become_rgb(tmp_path):
    gray = draw_images(1)[0].convert('L')
    palette = draw_images(1)[0].convert('P')
    pack(tmp_path / 'a.npz', [encode(gray, 'JPEG'), encode(palette)], [0, 1])
    dataset = PackedImages('a.npz', str(tmp_path))
    first = dataset[0]['inputs']
    assert first.shape == (3, 32, 32)
    assert torch.equal(first[0], first[2])
    assert torch.equal(dataset[1]['inputs'], pixels(palette.convert('RGB')))


def test_worker_processes_read_the_same(packed):
    dataset = PackedImages('train.npz', str(packed))
    batches = [list(DataLoader(dataset, batch_size=8, num_workers=workers))
               for workers in (0, 2)]
    for one, other in zip(*batches):
        assert torch.equal(one['inputs'], other['inputs'])
        assert torch.equal(one['data_samples'], other['data_samples'])
    again = pickle.loads(pickle.dumps(dataset))  # as 'spawn' hands it over
    assert torch.equal(again[5]['inputs'], dataset[5]['inputs'])


def make_folder(root, classes=('n01', 'n02'), count=2):
    images = iter(draw_images(len(classes) * count))
    for name in classes:
        (root / 'train' / name).mkdir(parents=True)
        for i in range(count):
            next(images).save(root / 'train' / name / f'{i}.JPEG')
    return root


def test_folder_reads_as_pillow_does(tmp_path):
    make_folder(tmp_path)
    dataset = DATASETS.build(dict(
        type='rmoe.ImageFolder', data_root=str(tmp_path),
        data_prefix=dict(img_path='train')))
    assert len(dataset) == 4
    assert dataset.metainfo == dict(classes=('n01', 'n02'))
    for i in range(4):
        path = tmp_path / f'train/n0{i // 2 + 1}/{i % 2}.JPEG'
        assert torch.equal(dataset[i]['inputs'], pixels(Image.open(path)))
        assert dataset[i]['data_samples'] == i // 2


def test_transforms_are_torchvisions():
    image = draw_images(1)[0]
    transform = build_transforms([
        dict(type='Resize', size=40, interpolation=3),
        dict(type='CenterCrop', size=24)])
    expected = image.resize((40, 40), Image.BICUBIC).crop((8, 8, 32, 32))
    assert torch.equal(transform(image), pixels(expected))
    assert torch.equal(build_transforms([])(image), pixels(image))
    flipped = build_transforms([
        dict(type='PILToTensor'), dict(type='RandomHorizontalFlip', p=1.)])
    assert torch.equal(flipped(image), pixels(image).flip(2))


@pytest.mark.parametrize('transform, message', [
    (dict(type='RandomResizeCrop', size=24), "'RandomResizeCrop'"),
    (dict(size=24), 'name None'),
    (dict(type='functional'), "'functional'"),
    (dict(type='Resize', sizes=24), 'sizes'),
    (dict(type='CenterCrop', size=(1, 2, 3)), r'\(1, 2, 3\)'),
])
def test_bad_transforms(transform, message):
    with pytest.raises(ValueError, match=message):
        build_transforms([transform])


def damage(content: dict, how: str) -> dict:
    """Arrays of a packed file with one mistake."""
    content = dict(content)
    if how.startswith('no '):
        del content[how[3:]]
    elif how == 'empty':
        content.update(labels=content['labels'][:0],
                       offsets=content['offsets'][:1])
    elif how == 'short offsets':
        content['offsets'] = content['offsets'][:-1]
    elif how == 'falling offsets':
        content['offsets'] = content['offsets'][::-1]
    elif how == 'short bytes':
        content['bytes'] = content['bytes'][:-10]
    elif how == 'label':
        content['labels'] = content['labels'] + 1
    return content


@pytest.mark.parametrize('how, message', [
    ('no bytes', r'has no bytes; it needs'),
    ('no wnids', r'has no wnids; it needs'),
    ('empty', 'holds no image'),
    ('short offsets', '12 labels and 12 offsets'),
    ('falling offsets', 'must not decrease'),
    ('short bytes', 'must lie within its'),
    ('label', 'image 2 of .* has the label 3; there are 3 wnids'),
])
def test_bad_packed_files(packed, tmp_path, how, message):
    path = tmp_path / 'bad.npz'
    np.savez(path, **damage(np.load(packed / 'val.npz'), how))
    with pytest.raises(ValueError, match=message) as error:
        PackedImages('bad.npz', str(tmp_path))
    assert 'bad.npz' in str(error.value)


@pytest.mark.parametrize('part', [0., .5, .999])
def test_packed_file_cut_short(packed, tmp_path, part):
    content = (packed / 'val.npz').read_bytes()
    (tmp_path / 'cut.npz').write_bytes(content[:int(part * len(content))])
    with pytest.raises(ValueError, match=r'cut\.npz is damaged'):
        PackedImages('cut.npz', str(tmp_path))


def test_other_files_are_no_packed_images(tmp_path):
    np.save(tmp_path / 'array.npy', np.zeros(3))
    (tmp_path / 'text.npz').write_text('hello')
    np.savez(tmp_path / 'objects.npz', bytes=np.array([{}]), offsets=[0],
             labels=[0], wnids=['a'])
    for name in ('array.npy', 'text.npz', 'objects.npz'):
        with pytest.raises(ValueError, match=name):
            PackedImages(name, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r'nothing\.npz'):
        PackedImages('nothing.npz', str(tmp_path))


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_image_that_does_not_decode(tmp_path, kind):
    good = encode(draw_images(1)[0], kind)
    pack(tmp_path / 'a.npz', [good, good[:len(good) // 2], b'text'],
         [0, 1, 2])
    dataset = PackedImages('a.npz', str(tmp_path))
    assert dataset[0]['data_samples'] == 0
    for index in (1, 2):
        with pytest.raises(ValueError, match=rf'image {index} of .*a\.npz '
                           'cannot be decoded'):
            dataset[index]


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere is no folder'):
        ImageFolder(str(tmp_path), dict(img_path='nowhere'))
    (tmp_path / 'flat').mkdir()
    draw_images(1)[0].save(tmp_path / 'flat/0.JPEG')
    with pytest.raises(ValueError, match='flat must hold one folder of'):
        ImageFolder(str(tmp_path), dict(img_path='flat'))
    make_folder(tmp_path)
    (tmp_path / 'train/n03').mkdir()
    with pytest.raises(ValueError, match=r'train must hold .*n03'):
        ImageFolder(str(tmp_path), dict(img_path='train'))


def test_folder_image_that_does_not_decode(tmp_path):
    make_folder(tmp_path)
    bad = tmp_path / 'train/n02/0.JPEG'
    bad.write_bytes(bad.read_bytes()[:100])
    dataset = ImageFolder(str(tmp_path), dict(img_path='train'))
    with pytest.raises(ValueError, match=r'n02/0\.JPEG cannot be decoded'):
        dataset[2]


def test_tiny_imagenet():
    folder = ROOT / 'tiny_imagenet_100'
    if not folder.exists():
        pytest.skip('no tiny_imagenet_100 in the data root')
    dataset = PackedImages('val.npz', str(folder))
    assert len(dataset) == 2500 and len(dataset.metainfo['classes']) == 100
    content = np.load(folder / 'val.npz')
    start, end = content['offsets'][1234:1236]
    image = Image.open(io.BytesIO(content['bytes'][start:end].tobytes()))
    assert torch.equal(dataset[1234]['inputs'],
                       pixels(image.convert('RGB')))
    assert dataset[1234]['data_samples'] == content['labels'][1234]
