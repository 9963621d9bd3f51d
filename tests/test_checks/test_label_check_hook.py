"""Typical mistakes in label maps are named before training, with the fix. The
label maps are written to files."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import TRANSFORMS
from parallel_ranks import labels_of_ranks
from PIL import Image
from two_ranks import run_two_ranks

from rmoe.checks.label_check_hook import LabelCheckHook
from rmoe.checks.label_maps import count_labels

NAMES = ('background', 'road', 'tree', 'car')
CLEAN = [[0, 1], [2, 3]]


class Swap255:
    """A transform of the user, which may change labels."""

    def __call__(self, results):
        return results


@pytest.fixture
def mask_dataset(tmp_path):
    """A data set of mmseg's with the given masks; ``classes`` is their
    number."""
    TRANSFORMS.register_module(name='Swap255', module=Swap255, force=True)

    def make(*masks, classes=4, suffix='.png', steps=(), **options):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for folder in ('img', 'ann'):
            (root / folder).mkdir(parents=True)
        for i, mask in enumerate(masks):
            image = (mask if isinstance(mask, Image.Image) else
                     Image.fromarray(np.asarray(mask, np.uint8)))
            image.save(root / f'ann/{i}{suffix}')
            Image.new('RGB', image.size).save(root / f'img/{i}.jpg')
        return BaseSegDataset(
            data_root=str(root), metainfo=dict(classes=NAMES[:classes]),
            seg_map_suffix=suffix,
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            pipeline=[dict(type='LoadImageFromFile'),
                      dict(type='LoadAnnotations'), *steps], **options)

    with DefaultScope.overwrite_default_scope('mmseg'):
        yield make


def say(dataset, num_classes=4, ignore_index=255, max_files=1000,
        head_class=torch.nn.Identity, cascade=False):
    """The lines that the hook logs, as (level, text)."""
    head, said = head_class(), []
    head.num_classes, head.ignore_index = num_classes, ignore_index
    model = torch.nn.Module()
    model.decode_head = torch.nn.ModuleList(
        [torch.nn.Identity(), head]) if cascade else head
    runner = SimpleNamespace(
        model=model, train_dataloader=SimpleNamespace(dataset=dataset),
        logger=SimpleNamespace(
            info=lambda text: said.append(('info', text)),
            warning=lambda text: said.append(('warning', text))))
    LabelCheckHook(max_files).before_train(runner)
    return said


def error(*args, **options):
    with pytest.raises(ValueError) as caught:
        say(*args, **options)
    return str(caught.value)


def warnings(*args, **options):
    *found, (level, _) = say(*args, **options)
    assert level == 'info'
    return [text for _, text in found]


@pytest.mark.parametrize('cascade', [False, True])
def test_good_masks(mask_dataset, cascade):
    assert say(mask_dataset(CLEAN, [[0, 1], [2, 255]]), cascade=cascade) == [
        ('info', 'labels of 2 of 2 training images lie in 0 to 3, 12.5 % of '
         'their pixels are ignored')]


def test_models_without_decode_head_are_left_alone():
    LabelCheckHook().before_train(SimpleNamespace(model=torch.nn.Identity()))


def test_heads_without_classes_of_their_own_are_left_alone():
    """Such as one that has a head for each data set."""
    model, said = torch.nn.Module(), []
    model.decode_head = torch.nn.Identity()
    model.decode_head.num_classes = 4
    LabelCheckHook().before_train(SimpleNamespace(
        model=model, logger=SimpleNamespace(info=said.append)))
    assert said == [
        'label maps are not checked: the Identity has no ignore_index']


@pytest.mark.parametrize('masks', [
    [[[0, 255], [0, 0]]], [[[0, 0]], [[255, 255]]]])
def test_0_and_255(mask_dataset, masks):
    said = error(mask_dataset(*masks, classes=2), 2)
    assert 'ann/0.png, have only class 0 (background)' in said
    assert 'hold 0 and 255 alone' in said and '255 is ignored' in said
    assert 'Store two classes as 0 and 1' in said
    # Without an ignored label, and when zero is taken away, too.
    said = error(mask_dataset(*masks, classes=2), 2, ignore_index=100)
    assert 'has the label 255' in said and 'as 0 and 1' in said
    assert '255 is ignored' not in said
    said = error(mask_dataset(*masks, classes=2, reduce_zero_label=True), 2)
    assert 'nothing but ignored pixels' in said and 'as 0 and 1' in said


def test_0_and_255_is_an_error_in_a_sample(mask_dataset):
    dataset = mask_dataset(*[[[0, 255]]] * 4, classes=2)
    assert 'were read of 4' in error(dataset, 2, max_files=2)


def test_one_class_is_an_error_if_all_maps_were_read(mask_dataset):
    dataset = mask_dataset([[0]], [[1]], [[0]], [[0]], classes=2)
    found = warnings(dataset, 2, max_files=2)
    assert len(found) == 1 and 'were read of 4' in found[0]
    assert 'only class 0' in found[0]
    dataset = mask_dataset([[0]], [[0]], classes=2)
    assert ('only class 0 (background): nothing can be learnt'
            in error(dataset, 2))


def test_heads_of_masks_learn_from_one_class(mask_dataset):
    class Mask2FormerHead(torch.nn.Identity):
        pass

    dataset = mask_dataset([[0, 255]], classes=1)
    assert warnings(dataset, 1, head_class=Mask2FormerHead) == []
    said = error(dataset, 1)
    assert 'only class 0' in said
    said = error(mask_dataset([[0, 1]], classes=1), 1)
    assert 'has the label 1' in said and 'Set num_classes=2' in said


def test_classes_that_never_occur(mask_dataset):
    text, = warnings(mask_dataset([[0, 1]], [[1, 0]]))
    assert text.startswith(
        "2 of 4 classes never occur in the 2 label maps: '2 (tree)', "
        "'3 (car)'; they are not learnt")
    assert 'reduce' not in text
    # A class with the ignored label is not reported as missing.
    assert warnings(mask_dataset(CLEAN), ignore_index=0) == []


def test_ignored_pixels(mask_dataset):
    text, = warnings(mask_dataset(CLEAN, [[255] * 4] * 4))
    assert '80.0 % of the pixels of the 2 label maps are ignored' in text
    assert '1 maps have no other pixel' in text
    assert 'nothing but ignored pixels' in error(
        mask_dataset([[255, 255]]))


@pytest.mark.parametrize('picture, shape', [
    (Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)),
     '(2, 2, 3)'),
    (Image.new('RGBA', (3, 2)), '(2, 3, 4)')])
def test_colours(mask_dataset, picture, shape):
    said = error(mask_dataset(CLEAN, picture))
    assert '1 of 2 label maps are pictures in colour' in said
    assert f'1.png with the shape {shape}' in said and 'one channel' in said


def test_a_palette_is_no_colour(mask_dataset):
    picture = Image.fromarray(np.asarray(CLEAN, np.uint8), 'P')
    picture.putpalette([128, 0, 0, 0, 128, 0, 0, 0, 128, 64, 64, 64])
    assert warnings(mask_dataset(picture)) == []


def test_grey_levels_of_classes(mask_dataset):
    said = error(mask_dataset([[0, 38], [75, 113]]))
    assert "values 0, 38, 75, 113 look like grey levels" in said
    assert 'their numbers, 0 to 3' in said


def test_photographs_and_smooth_edges(mask_dataset):
    said = error(mask_dataset(np.arange(100).reshape(10, 10)))
    assert '100 different values' in said and 'nearest' in said


def test_jpeg(mask_dataset):
    noise = np.array([[0, 4], [1, 0]], np.uint8).repeat(8, 0).repeat(8, 1)
    said = error(mask_dataset(noise, suffix='.jpg'))
    assert '0.jpg has the label' in said and 'Write PNGs' in said


def test_labels_that_count_from_one(mask_dataset):
    said = error(mask_dataset([[1, 2], [3, 4]]))
    assert 'has the label 4' in said and 'run from 1 to 4' in said
    assert 'reduce_zero_label=True' in said
    text, = warnings(mask_dataset([[1, 2], [3, 255]]))
    assert "never occur in the 1 label maps: '0 (background)'" in text
    assert 'run from 1 to 3' in text
    assert warnings(mask_dataset([[1, 2], [3, 4]],
                                 reduce_zero_label=True)) == []


def test_one_class_too_many(mask_dataset):
    said = error(mask_dataset([[0, 1, 2], [3, 4, 4]]))
    assert 'Set decode_head.num_classes=5' in said
    assert 'reduce_zero_label=True' in said


def test_background_that_reduce_zero_label_takes_away(mask_dataset):
    text, = warnings(mask_dataset(CLEAN, reduce_zero_label=True))
    assert "never occur in the 1 label maps: '3 (car)'" in text
    assert 'largest stored label is 3' in text
    assert ('stored 0 is class 0 (background), set reduce_zero_label=False'
            in text)
    said = error(mask_dataset([[0, 1]], classes=2, reduce_zero_label=True),
                 2)
    assert 'set reduce_zero_label=False' in said
    text, = warnings(mask_dataset([[0] * 9 + [1, 2, 3, 4]],
                                  reduce_zero_label=True))
    assert '69.2 % of the pixels' in text and 'makes 0 ignored' in text


def test_a_transform_of_the_user_may_mend_labels(mask_dataset):
    dataset = mask_dataset([[0, 7]], steps=[dict(type='Swap255')])
    text, = warnings(dataset)
    assert 'has the label 7' in text and "unless 'Swap255'" in text
    assert say(dataset)[-1][1].endswith('classes are not counted')


def test_data_sets_are_judged_together(mask_dataset):
    parts = SimpleNamespace(datasets=[
        mask_dataset([[0, 0]]), SimpleNamespace(dataset=mask_dataset(
            [[1, 2], [3, 255]]))])
    assert say(parts) == [
        ('info', 'labels of 2 of 2 training images lie in 0 to 3, 16.7 % of '
         'their pixels are ignored')]


def test_stored_labels_and_a_choice_of_classes(mask_dataset):
    dataset = mask_dataset([[0, 1], [2, 255]], reduce_zero_label=True)
    count = count_labels(dataset, 0)
    assert count.pixels == {0: 1, 1: 1, 255: 2}
    assert count.stored == {0: 1, 1: 1, 2: 1, 255: 1}
    assert count.reduced and not count.uniform
    # LoadAnnotations itself is not changed.
    assert count_labels(dataset, 0) == count


def test_pipelines_that_load_no_labels(mask_dataset):
    dataset = mask_dataset(CLEAN)
    del dataset.pipeline.transforms[1]
    assert count_labels(dataset, 0).maps == 0
    assert say(dataset)[0][1].startswith('labels of 0 of 1')


def test_ranks_share_label_maps(tmp_path):
    ranks = run_two_ranks(labels_of_ranks, str(tmp_path), 5, 3)
    (even, first), (odd, second) = ranks
    # 0, 2, 4 of five files, then 0, 3, 6 of seven; the second has index 5.
    assert (even, odd) == ([0, 4, 0, 6], [2, 3])
    # Each rank read one class, and both together two.
    after = 'training images lie in 0 to 1, 25.0 % of their pixels are ignored'
    assert first == second == [f'labels of 3 of 5 {after}',
                               f'labels of 3 of 7 {after}']
    ranks = run_two_ranks(labels_of_ranks, str(tmp_path), 5, 100)
    # Rank 1 reads the wrong label; both ranks raise the error.
    assert [says for _, says in ranks] == [
        [f'labels of 5 of 5 {after}', '5 is wrong']] * 2
