"""Upstream training (pre-training): any backbone as an image classifier."""
from rmoe.classification.accuracy import Accuracy
from rmoe.classification.class_check_hook import ClassCheckHook
from rmoe.classification.classifier import ImageClassifier
from rmoe.classification.image_folder import ImageFolder
from rmoe.classification.packed_images import PackedImages

__all__ = [
    'Accuracy', 'ClassCheckHook', 'ImageClassifier', 'ImageFolder',
    'PackedImages'
]
