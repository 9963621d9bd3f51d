"""Correct configs pass check_config.py, and every broken one gets a message of
its own."""
import re
from pathlib import Path

import check_config
import numpy as np
import pytest
from coco import detector_config, make_coco
from commands import command
from mmengine.config import Config
from PIL import Image

TOOLS = Path(__file__).parents[2] / 'tools'


def good(capsys, config, *options):
    command(check_config, config, '--iters', 1, *options)
    out = capsys.readouterr().out
    assert out.endswith('\nNothing is wrong.\n')
    return out


def problems(capsys, config, *options):
    """Return the problems that are listed at the end for a broken config."""
    with pytest.raises(SystemExit) as error:
        command(check_config, config, '--iters', 1, '--cfg-options', *options)
    assert error.value.code == 1
    *_, tail = re.split(r'\n\d+ problems?\n', capsys.readouterr().out)
    return tail


def scenes(work):
    return [f'{split}_dataloader.dataset.data_root={work / "scenes"}'
            for split in ('train', 'val', 'test')] + [
                'train_dataloader.batch_size=2']


def test_a_good_config(work, configs, capsys, upcycled, tmp_path,
                       monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    out = good(capsys, configs['moe'], '--cfg-options', *scenes(work),
               f'load_from={upcycled}')
    assert 'train: 8 images, BaseSegDataset' in out
    assert 'val: 3 images' in out and 'test: the same as val' in out
    assert 'labels 0 to 6 in 8 label maps; model.decode_head has 7' in out
    assert '9,392,381 parameters, 3,080,445 active' in out  # README.md
    assert ('backbone.stages.2.blocks.1.ffn: E=8 K=1 TokenChoiceRouter'
            in out)
    assert '3 MoE layers' in out
    assert 'auxiliary losses: importance, load' in out
    assert 'moe.pth: fits\n' in out
    # 600 iterations, the first stage ends at 0.2
    assert 'stage core: 120 iterations, 0 to 119' in out
    assert 'stage joint: 480 iterations, 120 to 599' in out
    trains = re.findall(r'^    (core|residual|router|head) .* (yes|no)$', out,
                        re.M)
    assert [word for _, word in trains] == [
        'yes', 'no', 'no', 'yes', *['yes'] * 4]
    # Gradients and two moments of AdamW, four bytes each
    joint = out[out.index('stage joint'):]
    assert 'weights 37.6 MB, optimizer 75.1 MB, gradients 37.6 MB' in joint
    core = out[out.index('stage core'):out.index('stage joint')]
    assert 'optimizer 24.6 MB, gradients 12.3 MB' in core
    # No files are left behind.
    assert list(tmp_path.iterdir()) == []


def test_a_good_dense_config(work, configs, capsys):
    out = good(capsys, configs['dense'], '--all', '--cfg-options',
               *scenes(work))
    assert '0 MoE layers' in out
    assert 'stage training: 600 iterations, 0 to 599' in out
    assert 'random weights' in out


BROKEN = {
    'data root': (['train_dataloader.dataset.data_root=/nowhere'],
                  r'/nowhere does not exist.*data_root=PATH'),
    'image suffix': (['train_dataloader.dataset.img_suffix=.jpg'],
                     r"no image that ends in '\.jpg'.*set img_suffix"),
    'labels': (['model.decode_head.num_classes=3'],
               r'has the label 3; in all.*reduce_zero_label'),
    'classes': (['model.decode_head.num_classes=9'],
                r'train_dataloader has 7 classes and model\.decode_head\.'
                r'num_classes=9: set model\.decode_head\.num_classes=7'),
    'channels of the head': (
        ['model.decode_head.in_channels=[32,64,128,200]'],
        r'^! model\.decode_head\.in_channels=\[32, 64, 128, 200\], and the '
        r'backbone gives \[32, 64, 128, 256\]: set model\.decode_head\.'
        r'in_channels=\[32, 64, 128, 256\]$'),
    'maps of the head': (
        ['model.decode_head.in_index=[0,1,2,4]'],
        r'in_index=\[0, 1, 2, 4\] points at map 4; the backbone gives 4'),
    'a head that does not build': (
        ['model.decode_head.in_channels=[32,64]'],
        r'AssertionError(.|\n)*set model\.decode_head\.in_channels=\[32, 64, '
        r'128, 256\]'),
    'channels of images': (
        ['model.backbone.in_channels=4'],
        r'images have 3 channels and the backbone takes 4: set '
        r'model\.backbone\.in_channels=3'),
    'no loss hook': (['custom_hooks=[]'],
                     r'routers produce the losses importance, load, but no '
                     r'hook collects them: add dict\(type=.rmoe\.MoELossHook'),
    'no bias hook': (
        ['model.backbone.moe.router.type=BiasBalancedRouter'],
        r'without dict\(type=.rmoe\.BalanceBiasHook'),
    'stages': (['custom_hooks.0.stages.1.end=0.1'],
               r"stage 'joint' ends at iteration 60, which is not after 120"),
    'MoE blocks': (['model.backbone.moe.layers=((),(),(9,),())'],
                   r'moe\.layers\[2\] names block 9'),
    'hooks without experts': (['model.backbone.moe=None'],
                              r'found no MoE layer in the model'),
    'type': (['model.backbone.type=rmoe.SwinMeo'], 'SwinMeo is not in the'),
    'optimizer': (['optim_wrapper.optimizer.type=AdamX'],
                  'AdamX is not in the'),
    'checkpoint': (['load_from=nowhere.pth'],
                   r'load_from nowhere\.pth: checkpoint nowhere\.pth does '
                   'not exist'),
    'no data': (['train_dataloader=None'], 'has no train_dataloader'),
    'batch': (['train_dataloader.batch_size=9',
               'train_dataloader.drop_last=True',
               'train_dataloader.sampler.type=DefaultSampler'],
              r'gives no batch: 8 images with batch_size=9'),
}


@pytest.mark.parametrize('options, message', BROKEN.values(), ids=BROKEN)
def test_a_broken_config(work, configs, capsys, options, message):
    tail = problems(capsys, configs['moe'], *scenes(work), *options)
    assert re.search(message, tail, re.M), tail


def test_several_problems_are_named_at_once(work, configs, capsys):
    tail = problems(
        capsys, configs['moe'], *scenes(work), 'custom_hooks=[]',
        'model.decode_head.num_classes=9', 'load_from=nowhere.pth',
        'val_dataloader.dataset.data_root=/nowhere')
    assert len(re.findall('^! ', tail, re.M)) >= 3
    for part in ('num_classes=9', 'nowhere.pth', '/nowhere does not exist'):
        assert part in tail


def test_a_checkpoint_of_another_model(work, configs, capsys,
                                       dense_checkpoint):
    tail = problems(
        capsys, configs['moe'], *scenes(work), f'load_from={dense_checkpoint}',
        'model.backbone.embed_dims=16',
        'model.decode_head.in_channels=[16,32,64,128]')
    assert re.search(r'(?s)iter_4\.pth: .*has shape \(32, 3, 4, 4\) in the '
                     r'checkpoint and \(16, 3, 4, 4\) in the model', tail)
    tail = problems(
        capsys, configs['moe'], *scenes(work),
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.prefix=neck',
        f'model.backbone.init_cfg.checkpoint={dense_checkpoint}')
    assert re.search(r"model\.backbone\.init_cfg .*starts with 'neck\.'", tail)


def test_a_backbone_in_a_checkpoint_of_a_whole_model(work, configs, capsys,
                                                     dense_checkpoint):
    out = good(
        capsys, configs['moe'], '--cfg-options', *scenes(work),
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={dense_checkpoint}')
    assert f'model.backbone.init_cfg {dense_checkpoint}: fits' in out


def test_a_checkpoint_with_another_head(work, configs, capsys,
                                        dense_checkpoint):
    """Fine-tuning begins in this way, so it is reported but is no problem."""
    cfg = Config.fromfile(configs['moe'])
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.pop('metainfo')
    cfg.dump(work / 'no-classes.py')
    out = good(capsys, work / 'no-classes.py', '--cfg-options', *scenes(work),
               f'load_from={dense_checkpoint}',
               'model.decode_head.num_classes=9')
    # 38 parameters and two statistics of each of 12 batch norms
    assert ('fits, except for 2 of 62 tensors outside the backbone: '
            'decode_head.conv_seg.weight (9, 48, 1, 1) (in the checkpoint: '
            '(7, 48, 1, 1))' in out)


def test_a_checkpoint_to_download_is_left_alone(work, configs, capsys):
    out = good(capsys, configs['dense'], '--cfg-options', *scenes(work),
               'model.backbone.init_cfg.type=Pretrained',
               'model.backbone.init_cfg.checkpoint=https://nowhere.org/x.pth',
               'load_from=https://nowhere.org/y.pth')
    for name in 'xy':
        assert (f'{name}.pth: not checked, because it would be downloaded'
                in out)


@pytest.fixture
def detector(tmp_path):
    make_coco(tmp_path)
    detector_config(tmp_path).dump(tmp_path / 'detector.py')
    return tmp_path / 'detector.py'


def test_a_good_detector(detector, capsys):
    out = good(capsys, detector)
    assert 'train: 4 images, CocoDataset' in out
    # three epochs of two batches
    assert 'stage training: 6 iterations, 0 to 5' in out


@pytest.mark.parametrize('options, message', [
    (['model.neck.in_channels=[16,64]'],
     r'neck\.in_channels=\[16, 64\], and the backbone gives \[16, 32\]'),
    (['model.bbox_head.in_channels=256'],
     r'bbox_head\.in_channels=256, and the neck gives 8: set'),
    (['model.bbox_head.num_classes=80'],
     r'bbox_head\.num_classes=80 and train_dataloader\.dataset has 2'),
    (['train_dataloader.dataset.metainfo.classes=("square","disk")'],
     'stand in the order'),
])
def test_a_broken_detector(detector, capsys, options, message):
    assert re.search(message, problems(capsys, detector, *options))


def test_an_annotation_file_cut_short(detector, capsys):
    path = detector.with_name('train.json')
    path.write_text(path.read_text()[:-300])
    assert 'looks cut short' in problems(capsys, detector, 'resume=False')


@pytest.fixture
def classifier(tmp_path):
    for name in ('cat', 'dog', 'eel'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(
                tmp_path / f'images/{name}/{i}.png')
    Config(dict(
        default_scope='mmengine',
        model=dict(
            type='rmoe.ImageClassifier', num_classes=3, in_channels=16,
            data_preprocessor=dict(type='ImgDataPreprocessor'),
            backbone=dict(
                type='rmoe.SwinMoE', embed_dims=8, depths=(1, 1),
                num_heads=(1, 1), strides=(4, 2), out_indices=(1, ))),
        train_dataloader=dict(
            batch_size=2, num_workers=0,
            collate_fn=dict(type='default_collate'),
            dataset=dict(type='rmoe.ImageFolder', data_root=str(tmp_path),
                         data_prefix=dict(img_path='images')),
            sampler=dict(type='DefaultSampler', shuffle=True)),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-4)))).dump(
            tmp_path / 'classifier.py')
    return tmp_path / 'classifier.py'


def test_classifiers(classifier, capsys):
    assert 'train: 6 images, ImageFolder' in good(capsys, classifier)
    tail = problems(capsys, classifier, 'model.num_classes=1000')
    assert ('train_dataloader has 3 classes and model.num_classes=1000: set '
            'model.num_classes=3') in tail
    tail = problems(capsys, classifier, 'model.in_channels=32')
    assert 'model.in_channels=32, and the backbone gives 16' in tail
