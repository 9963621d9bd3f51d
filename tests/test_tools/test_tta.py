"""tools/test.py --tta: the model inside the wrapper gets its weights, and
mistakes in it are still reported."""
import pytest
import test as test_tool  # tools/test.py
import torch
import train
from coco import make_coco
from commands import command, miou, options
from mmengine.config import Config, ConfigDict
from toy_detection import detection_config

# The pipeline without augmentation, in the form of TestTimeAug.
ONCE = [[dict(type='RandomFlip', prob=0.)], [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')]]


def with_transforms(config, transforms, path):
    cfg = Config.fromfile(config)
    cfg.tta_pipeline[1].transforms = transforms
    cfg.dump(path)
    return path


def test_one_view_is_the_plain_evaluation(work, configs, upcycled):
    once = with_transforms(configs['moe'], ONCE, work / 'once.py')
    command(test_tool, configs['moe'], upcycled, *options(work, 'tta-none'))
    command(test_tool, once, upcycled, '--tta', *options(work, 'tta-once'))
    assert miou(work / 'tta-once') == miou(work / 'tta-none')


def test_views_are_averaged(work, configs, upcycled, monkeypatch):
    """Two views, one of them the image itself, one flipped."""
    flips = [[dict(type='RandomFlip', prob=0.),
              dict(type='RandomFlip', prob=1.)], *ONCE[1:]]
    twice = with_transforms(configs['moe'], flips, work / 'twice.py')
    seen = watch(monkeypatch)
    command(test_tool, twice, upcycled, '--tta', *options(work, 'tta-twice'))
    assert len(seen) == 3  # images
    for views, merged in seen:
        assert len(views) == 2
        assert not torch.equal(views[0], views[1])
        mean = sum(view.softmax(0) for view in views) / 2
        assert torch.equal(merged, mean.argmax(0))


def watch(monkeypatch) -> list:
    """(logits of each view, merged prediction) of each image."""
    from mmseg.models import SegTTAModel
    seen, merge = [], SegTTAModel.merge_preds

    def keep(self, images):
        merged = merge(self, images)
        seen.extend(([view.seg_logits.data for view in views],
                     result.pred_sem_seg.data.squeeze())
                    for views, result in zip(images, merged))
        return merged

    monkeypatch.setattr(SegTTAModel, 'merge_preds', keep)
    return seen


def test_a_detector_too(tmp_path):
    make_coco(tmp_path)
    detection_config(tmp_path).dump(tmp_path / 'detector.py')
    command(train, tmp_path / 'detector.py', '--work-dir', tmp_path / 'run')
    command(test_tool, tmp_path / 'detector.py', tmp_path / 'run/epoch_1.pth',
            '--tta', '--work-dir', tmp_path / 'test')
    assert 'coco/bbox_mAP:' in next(
        (tmp_path / 'test').rglob('*.log')).read_text()


def test_a_checkpoint_that_does_not_fit_is_refused(work, configs,
                                                   dense_checkpoint):
    once = with_transforms(configs['moe'], ONCE, work / 'once.py')
    with pytest.raises(SystemExit, match=r'random weights.*conv_seg'):
        command(test_tool, once, dense_checkpoint, '--tta', *options(
            work, 'tta-nine', 'model.decode_head.num_classes=9'))
    state = torch.load(dense_checkpoint)['state_dict']
    torch.save(dict(state_dict={
        key.removeprefix('backbone.'): value for key, value in state.items()
        if key.startswith('backbone.')}), work / 'bare.pth')
    with pytest.raises(SystemExit, match=r"under the prefix 'backbone\.'"):
        command(test_tool, once, work / 'bare.pth', '--tta',
                *options(work, 'tta-bare'))


def test_a_config_without_it_says_so(work, configs, upcycled):
    cfg = Config.fromfile(configs['moe'])
    cfg.pop('tta_model')
    cfg.dump(work / 'no-tta.py')
    with pytest.raises(SystemExit, match='--tta needs tta_model'):
        command(test_tool, work / 'no-tta.py', upcycled, '--tta',
                *options(work, 'tta-x'))


def test_datasets_inside_datasets():
    dataset = ConfigDict(dataset=dict(datasets=[
        dict(pipeline=[1]), dict(dataset=dict(pipeline=[2]))]))
    test_tool.set_pipeline(dataset, [3])
    assert dataset.to_dict() == dict(dataset=dict(datasets=[
        dict(pipeline=[3]), dict(dataset=dict(pipeline=[3]))]))
