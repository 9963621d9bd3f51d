from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe.datasets.scenes import CLASSES, PALETTE, draw_scene, write_scenes


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes()
            for file in root.rglob('*') if file.is_file()}


def test_layout_and_sizes(tmp_path: Path) -> None:
    write_scenes(tmp_path / 'scenes', num_train=2, num_val=1, size=48)
    names = ['training/00000', 'training/00001', 'validation/00000']
    assert sorted(contents(tmp_path / 'scenes')) == [
        *(f'annotations/{name}.png' for name in names),
        *(f'images/{name}.png' for name in names), 'scenes.json']
    for name in names:
        image = Image.open(tmp_path / 'scenes/images' / f'{name}.png')
        label = Image.open(tmp_path / 'scenes/annotations' / f'{name}.png')
        assert (image.mode, image.size) == ('RGB', (48, 48))
        assert (label.mode, label.size) == ('L', (48, 48))


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in 'ab':
        write_scenes(tmp_path / name, num_train=2, num_val=2, size=48, seed=3)
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_scenes_differ_by_index_split_and_seed(tmp_path: Path) -> None:
    write_scenes(tmp_path / 'a', num_train=2, num_val=2, size=48, seed=0)
    write_scenes(tmp_path / 'b', num_train=2, num_val=2, size=48, seed=1)
    images = [data for root in (tmp_path / 'a', tmp_path / 'b')
              for name, data in contents(root).items() if 'images' in name]
    assert len(set(images)) == len(images) == 8


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    write_scenes(tmp_path / 'few', num_train=1, num_val=1, size=48)
    write_scenes(tmp_path / 'many', num_train=3, num_val=2, size=48)
    few, many = contents(tmp_path / 'few'), contents(tmp_path / 'many')
    del few['scenes.json']
    assert few.items() <= many.items()


def test_all_classes_occur_and_no_others() -> None:
    labels = np.stack([draw_scene(128, np.random.default_rng((0, 0, i)))[1]
                       for i in range(32)])
    assert labels.dtype == np.uint8
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert len(share) == len(CLASSES) == len(PALETTE) == 7
    assert CLASSES[0] == 'background'
    assert 0.5 < share[0] < 0.9
    assert share[1:].min() > 0.01


def test_colour_says_nothing_about_the_class() -> None:
    """Mean colours of the classes are all the same, within the sampling."""
    means: list[list[np.ndarray]] = [[] for _ in CLASSES]
    for index in range(200):
        image, label = draw_scene(48, np.random.default_rng((0, 0, index)))
        for class_id in np.unique(label):
            means[class_id].append(image[label == class_id].mean(0))
    per_class = np.array([np.mean(values, 0) for values in means])
    assert np.ptp(per_class, axis=0).max() < 20


def test_rerun_touches_nothing(tmp_path: Path) -> None:
    write_scenes(tmp_path, num_train=1, num_val=1, size=48)
    image = tmp_path / 'images/training/00000.png'
    image.write_bytes(b'still mine')
    write_scenes(tmp_path, num_train=1, num_val=1, size=48)
    assert image.read_bytes() == b'still mine'


@pytest.mark.parametrize('changed', [
    {'num_train': 1}, {'num_val': 2}, {'size': 64}, {'seed': 1}])
def test_changed_parameters_rewrite(tmp_path: Path,
                                    changed: dict[str, int]) -> None:
    before = {'num_train': 2, 'num_val': 1, 'size': 48, 'seed': 0}
    write_scenes(tmp_path / 'reused', **before)
    write_scenes(tmp_path / 'reused', **(before | changed))
    write_scenes(tmp_path / 'fresh', **(before | changed))
    assert contents(tmp_path / 'reused') == contents(tmp_path / 'fresh')


def test_interrupted_write_is_redone(tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    root = tmp_path / 'scenes'
    with monkeypatch.context() as patch:
        patch.setattr('rmoe.datasets.scenes.draw_scene', interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_scenes(root, num_train=1, num_val=1, size=48)
    write_scenes(root, num_train=1, num_val=1, size=48)
    assert (root / 'annotations/validation/00000.png').exists()


def test_a_dataset_of_another_origin_is_left_alone(tmp_path: Path) -> None:
    image = tmp_path / 'images/training/00000.png'
    image.parent.mkdir(parents=True)
    image.write_bytes(b'a photograph')
    with pytest.raises(FileExistsError, match='images was not written'):
        write_scenes(tmp_path, num_train=1, num_val=1, size=48)
    assert image.read_bytes() == b'a photograph'


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'num_train': 0}, 'num_train must be at least 1, got 0'),
    ({'num_val': -2}, 'num_val must be at least 1, got -2'),
    ({'size': 31}, 'size must be at least 32, got 31'),
    ({'seed': -1}, 'seed must be at least 0, got -1')])
def test_bad_arguments(tmp_path: Path, wrong: dict[str, int],
                       message: str) -> None:
    good = {'num_train': 1, 'num_val': 1, 'size': 48, 'seed': 0}
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path, **(good | wrong))
