"""The classes and places that each expert gets, for a model and a data set."""
import json
import math
from collections import Counter

import mmcv
import numpy as np
import pytest
import specialisation
import torch
from commands import command, options
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.apis import init_model
from mmseg.structures import SegDataSample
from PIL import Image

from rmoe.moe.recording import record_routing
from rmoe.registry import MODELS


def measure(work, config, checkpoint, name, *more, flags=()):
    """The JSON record of a run."""
    out = work / f'specialisation/{name}'
    data = options(work, name)[3:4 + 2]
    command(specialisation, config, checkpoint, '--out', out / 'a.png',
            '--json', out / 'a.json', *flags, '--cfg-options', *data, *more)
    assert (out / 'a.png').stat().st_size > 10_000
    return json.loads((out / 'a.json').read_text())


def bits(pairs):
    """Mutual information of pairs, by its definition."""
    both, first, second = (Counter(values) for values in
                           (pairs, *zip(*pairs)))
    return sum(count / len(pairs) * math.log2(
        count * len(pairs) / (first[a] * second[b]))
        for (a, b), count in both.items())


def test_against_a_count_of_every_token(work, configs, upcycled, capsys):
    found = measure(work, configs['moe'], upcycled, 'all')
    # 64 pixels, stride 16: 4 x 4 tokens; an image at a time
    model = init_model(Config.fromfile(configs['moe']), str(upcycled), 'cpu')
    taken = []
    files = sorted((work / 'scenes/images/validation').iterdir())
    for file in files:
        image = torch.tensor(mmcv.imread(file)).permute(2, 0, 1)
        labels = np.asarray(Image.open(
            work / f'scenes/annotations/validation/{file.stem}.png'))
        data = model.data_preprocessor(dict(inputs=[image]), False)
        with record_routing(model) as records, torch.no_grad():
            model.extract_feat(data['inputs'])
        routing = records['backbone.stages.2.blocks.1.ffn'][0]
        for token, expert in enumerate(routing.strongest_expert().tolist()):
            row, column = divmod(token, 4)
            patch = labels[16 * row:16 * row + 16,
                           16 * column:16 * column + 16]
            votes = Counter(sorted(patch[patch != 255].tolist()))
            taken.append((token, votes.most_common(1)[0][0], expert))
    assert len(files) == 3 and found['images'] == 3
    layer = found['layers']['stage 2 block 1']
    assert layer['tokens'] == len(taken) == 48
    assert layer['no_class'] == layer['no_expert'] == 0
    counts = np.zeros_like(layer['counts_LE'])
    for _, label, expert in taken:
        counts[label, expert] += 1
    assert counts.tolist() == layer['counts_LE']
    pairs = [(label, expert) for _, label, expert in taken]
    assert layer['class']['bits'] == pytest.approx(bits(pairs))
    assert layer['place']['bits'] == pytest.approx(
        bits([(place, expert) for place, _, expert in taken]))
    assert layer['class | place']['bits'] == pytest.approx(np.mean([
        bits([pair for pair, (place, *_) in zip(pairs, taken)
              if place == wanted]) for wanted in range(16)]))
    assert bits(pairs) > .1
    # the table has the same
    line = next(line for line in capsys.readouterr().out.splitlines()
                if line.startswith('stage 2 block 1')).split()
    assert float(line[4]) == pytest.approx(bits(pairs), abs=5e-4)
    assert line[-2:] == ['48', '0.0%']


def test_padding_takes_no_part(work, configs, upcycled):
    plain = measure(work, configs['moe'], upcycled, 'plain',
                    flags=('--images', 2))
    padded = measure(
        work, configs['moe'], upcycled, 'padded',
        'model.data_preprocessor.test_cfg.size_divisor=128',
        flags=('--images', 2))
    assert plain['images'] == padded['images'] == 2
    for found in (plain, padded):
        assert found['layers']['stage 2 block 1']['tokens'] == 32
        assert found['layers']['stage 3 block 1']['tokens'] == 8


def test_experts_that_choose(work, configs, dense_checkpoint, upcycled):
    found = measure(work, configs['moe'], upcycled, 'expert-choice',
                    'model.backbone.moe.router.type=ExpertChoiceRouter',
                    'model.backbone.moe.router.capacity_factor=0.5')
    layer = found['layers']['stage 2 block 1']
    # 8 experts of one token each, of 16 tokens
    assert layer['no_expert'] >= 3 * 8
    total = sum(map(sum, layer['counts_LE']))
    assert total == pytest.approx(48 - layer['no_expert'])


@pytest.mark.parametrize('more, message', [
    (['model.backbone.moe=None'], 'builds no MoE layer'),
    (['model.backbone.moe.router.type=SoftRouter'],
     'soft router: .*no expert takes a token'),
    (['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(32,32)',
      'model.test_cfg.stride=(32,32)'], 'ran 4 times for one image'),
])
def test_what_cannot_be_measured(work, configs, dense_checkpoint, more,
                                 message):
    with pytest.raises(SystemExit, match=message):
        measure(work, configs['moe'], dense_checkpoint, 'bad', *more)


@pytest.mark.parametrize('missing', ['folder', 'transform'])
def test_no_segmentation_maps(work, configs, upcycled, missing):
    cfg = Config.fromfile(configs['moe'])
    dataset = cfg.test_dataloader.dataset
    if missing == 'folder':
        del dataset.data_prefix['seg_map_path']
    else:
        dataset.pipeline = [transform for transform in dataset.pipeline
                            if transform.type != 'LoadAnnotations']
    cfg.dump(work / 'unlabelled.py')
    with pytest.raises(SystemExit, match='has no segmentation maps'):
        measure(work, work / 'unlabelled.py', upcycled, 'bad')


def test_options_that_make_no_sense(work, configs, dense_checkpoint):
    with pytest.raises(SystemExit, match='--images -1 must be positive'):
        measure(work, configs['moe'], dense_checkpoint, 'bad',
                flags=('--images', -1))
    (work / 'detector.py').write_text("model = dict(type='MaskRCNN')")
    with pytest.raises(SystemExit, match=r'detector\.py is not the config of '
                                         'a segmentor'):
        command(specialisation, work / 'detector.py', dense_checkpoint)


def test_class_tokens_take_no_part():
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(dict(
            type='mmseg.EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor'),
            backbone=dict(type='rmoe.ViTMoE', embed_dims=8, num_layers=2,
                          num_heads=1, mlp_dims=16, img_size=48,
                          moe=dict(layers=(1, ), num_experts=4)),
            decode_head=dict(type='FCNHead', in_channels=8, channels=8,
                             num_classes=3, num_convs=0, concat_input=False),
            test_cfg=ConfigDict(mode='whole'))).eval()
    # each of the 9 patches and the class token differ
    item = dict(inputs=torch.randint(256, (3, 48, 48), dtype=torch.uint8),
                data_samples=SegDataSample(
                    gt_sem_seg=PixelData(data=torch.arange(48).div(
                        16, rounding_mode='floor').expand(1, 48, 48)),
                    metainfo=dict(img_shape=(48, 48), ori_shape=(48, 48))))
    (tally, ) = specialisation.tally_experts(model, [item], 3).values()
    with record_routing(model) as records, torch.no_grad():
        model.extract_feat(item['inputs'][None].float())
    ((routing, ), ) = records.values()
    experts = routing.strongest_expert()[1:].view(3, 3)
    assert tally.tokens == 9
    for column in range(3):
        assert tally.counts_LE[column].tolist() == torch.bincount(
            experts[:, column], minlength=4).tolist()
