"""Images that are missing or broken are named before training."""
import numpy as np
import pytest
from coco import coco_config, coco_dataset, make_coco, write
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from rmoe.checks.data import check_data
from rmoe.checks.images import evenly_spaced, image_size, missing_files


def shorten(path, keep=.6):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * keep)])


def test_evenly_spaced_covers_both_ends():
    assert list(evenly_spaced(10, 4)) == [0, 3, 6, 9]
    assert list(evenly_spaced(3, 100)) == [0, 1, 2]
    assert list(evenly_spaced(3, None)) == [0, 1, 2]
    assert list(evenly_spaced(0, 5)) == []
    assert all(len(evenly_spaced(n, 7)) <= 7 for n in range(200))


def test_missing_files(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/1.jpg').touch()
    paths = [str(tmp_path / name) for name in ('a/1.jpg', 'a/2.jpg', 'b/1.j')]
    assert missing_files(paths) == paths[1:]


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'bmp'])
def test_a_file_cut_short_does_not_decode(tmp_path, suffix):
    path = tmp_path / f'x.{suffix}'
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(path)
    assert image_size(str(path)) == (60, 40)
    shorten(path)
    with pytest.raises(ValueError, match=rf'x\.{suffix} does not decode'):
        image_size(str(path))


@pytest.mark.parametrize('content, message', [
    (b'', r'is empty \(0 bytes\)'), (b'<html>not found</html>', 'not decode'),
    (b'\x89PNG\r\n\x1a\n' + bytes(50), 'not decode')])
def test_what_is_no_image(tmp_path, content, message):
    path = tmp_path / 'x.jpg'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf'x\.jpg.*{message}'):
        image_size(str(path))


def test_what_only_opencv_reads(tmp_path, monkeypatch):
    """One of them is a large image, which Pillow refuses as a decompression
    bomb."""
    path = tmp_path / 'x.png'
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4)
    assert image_size(str(path)) == (6, 4)


def test_size_is_that_after_turning(tmp_path):
    """The size of an image as mmcv loads it."""
    import mmcv
    path = str(tmp_path / 'x.jpg')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path, exif=exif)
    assert mmcv.imread(path).shape[:2] == (60, 40)
    assert image_size(path) == (40, 60)
    assert image_size(path, upright=False) == (60, 40)


def test_images_of_a_coco_file(tmp_path):
    content = make_coco(tmp_path)
    cfg = coco_config(tmp_path)
    (tmp_path / 'images/2.jpg').write_text('no image')
    (tmp_path / 'images/0.jpg').unlink()
    with pytest.raises(ValueError, match=r'1 of 4 images that .*train\.json '
                       r'lists do not exist, the first is .*images/0\.jpg\n'
                       r'.*images/2\.jpg does not decode'):
        check_data(cfg, ('train', ))
    make_coco(tmp_path)
    content['images'][3]['width'] = 65
    write(tmp_path, content)
    with pytest.raises(ValueError, match=r'3\.jpg is 64 x 48 pixels as mmcv '
                       r'loads it, but .*train\.json says 65 x 48'):
        check_data(cfg, ('train', ))


def test_only_some_images_are_decoded(tmp_path):
    make_coco(tmp_path)
    (tmp_path / 'images/1.jpg').write_text('no image')
    cfg = coco_config(tmp_path)
    assert check_data(cfg, ('train', ), max_images=2) == []
    with pytest.raises(ValueError, match=r'1\.jpg'):
        check_data(cfg, ('train', ), max_images=None)


def test_a_loader_of_ones_own_may_read_anything(tmp_path):
    make_coco(tmp_path)
    (tmp_path / 'images/1.jpg').write_text('my own format')
    cfg = coco_config(tmp_path, pipeline=[dict(type='LoadRaw')])
    assert check_data(cfg, ('train', )) == []


def test_what_mmcv_does_by_itself(tmp_path):
    """A training without the check ends when it reads the image, which may be
    after hours."""
    make_coco(tmp_path)
    (tmp_path / 'images/1.jpg').write_text('no image')
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(coco_dataset(tmp_path))
        dataset[0]
        with pytest.raises(AssertionError, match='failed to load image'):
            dataset[1]


@pytest.fixture
def scenes(tmp_path):
    for i in range(4):
        for folder, shape in (('img', (40, 60, 3)), ('ann', (40, 60))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(np.zeros(shape, np.uint8)).save(
                tmp_path / folder / f'{i}.png')
    return tmp_path


def scenes_config(root, **more):
    return Config(dict(default_scope='mmseg', train_dataloader=dict(
        dataset=dict(
            type='BaseSegDataset', data_root=str(root), img_suffix='.png',
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            pipeline=[dict(type='LoadImageFromFile'),
                      dict(type='LoadAnnotations')]) | more)))


def test_label_maps(scenes):
    cfg = scenes_config(scenes)
    assert check_data(cfg, ('train', )) == []
    shorten(scenes / 'img/0.png')
    Image.fromarray(np.zeros((40, 59), np.uint8)).save(scenes / 'ann/2.png')
    (scenes / 'ann/3.png').write_text('no image')
    with pytest.raises(ValueError) as error:
        check_data(cfg, ('train', ))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert 'img/0.png does not decode' in lines[0]
    assert 'img/2.png is 60 x 40 pixels and its label map' in lines[1]
    assert 'ann/2.png 59 x 40' in lines[1]
    assert 'ann/3.png does not decode' in lines[2]
    (scenes / 'ann/1.png').unlink()
    with pytest.raises(ValueError, match=r'1 of 4 label maps of '
                       r'train_dataloader\.dataset do not exist.*ann/1\.png; '
                       r"is seg_map_suffix='\.png' right"):
        check_data(cfg, ('train', ))


def test_label_maps_that_are_not_used(scenes):
    cfg = scenes_config(scenes, pipeline=[dict(type='LoadImageFromFile')])
    for path in (scenes / 'ann').iterdir():
        path.unlink()
    assert check_data(cfg, ('train', )) == []


def test_a_wrong_suffix(scenes):
    with pytest.raises(ValueError, match=r"finds no image that ends in '\.jpg'"
                       r' in .*img: set img_suffix'):
        check_data(scenes_config(scenes, img_suffix='.jpg'), ('train', ))


def test_a_list_of_images_that_are_not_there(scenes):
    (scenes / 'list.txt').write_text('0\n7\n')
    with pytest.raises(ValueError, match=r'1 of 2 images of .*7\.png'):
        check_data(scenes_config(scenes, ann_file='list.txt'), ('train', ))
