"""Real weights must predict what they are said to predict, dense and MoE."""
import copy

import pytest
import timm
import torch
from pretrained import IMAGES, WEIGHTS, labelled_images
from routers import ROUTERS

from rmoe.backbones import ViTMoE
from rmoe.moe import moe_layers
from rmoe.upcycling import read_checkpoint, state_dict_of

pytestmark = pytest.mark.skipif(
    not (WEIGHTS.exists() and IMAGES.exists()),
    reason=f'no {WEIGHTS} and {IMAGES}: set RMOE_DATA to the data root')


def classifier(moe=None):
    state = state_dict_of(read_checkpoint(WEIGHTS))
    head = state['head.weight'], state['head.bias']
    model = ViTMoE('tiny', moe=moe, output_cls_token=True).eval()
    model.load_state_dict(state)

    @torch.no_grad()
    def classify(images):
        return torch.cat([
            torch.nn.functional.linear(model(batch)[0][1], *head)
            for batch in images.split(25)])

    return model, classify


# One of each kind.
KINDS = ('token choice', 'sinkhorn token choice', 'expert choice',
         'sinkhorn expert choice', 'sparse expert choice', 'soft',
         'bias balanced')


def predictions_per_router(images, names):
    """The dense model's logits, and each upcycled model's."""
    yield 'dense', classifier()[1](images)
    for name in names:
        model, classify = classifier(dict(
            layers=(7, 9, 11), num_experts=4,
            router=copy.deepcopy(ROUTERS[name])))
        assert all(layer.preserves_function
                   for layer in moe_layers(model).values()), name
        yield name, classify(images)


def test_upcycled_predicts_what_dense_predicts():
    images, labels = labelled_images(8)
    logits = dict(predictions_per_router(images, ROUTERS))
    dense = logits.pop('dense')
    theirs = timm.create_model('vit_tiny_patch16_224', num_classes=200).eval()
    theirs.load_state_dict(state_dict_of(read_checkpoint(WEIGHTS)))
    with torch.no_grad():
        assert (theirs(images) - dense).abs().max() < 1e-4
    # said to be right on 70.85 % of all 200 classes
    assert (dense.argmax(1) == labels).float().mean() > 0.5
    for name, theirs in logits.items():
        assert torch.equal(theirs.argmax(1), dense.argmax(1)), name
        assert (theirs - dense).abs().max() < 1e-3, name


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_top_1_of_the_whole_validation_half():
    images, labels = labelled_images(2500)
    for name, logits in predictions_per_router(images, KINDS):
        correct = int((logits.argmax(1) == labels).sum())
        print(f'{name}: top-1 {correct / 25:.2f} %', flush=True)
        if name == 'dense':
            dense = logits
        assert torch.equal(logits.argmax(1), dense.argmax(1)), name
        assert 0.68 < correct / 2500 < 0.78
