"""Classes of pixels."""
import torch

from rmoe.report.labels import fill_boxes, label_map


def test_the_smaller_box_lies_over_the_larger_one():
    found = fill_boxes(
        [dict(bbox=[1, 1, 2, 3], bbox_label=0),
         dict(bbox=[0, 0, 3, 4], bbox_label=1),
         dict(bbox=[0, 0, 1, 1], bbox_label=0, ignore_flag=1),
         dict(bbox=[4, -1, 9, 1], bbox_label=0)], (4, 6), 2)
    assert found.tolist() == [[1, 1, 1, 2, 0, 0], [1, 0, 1, 2, 2, 2],
                              [1, 0, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2]]


def test_a_classifier_has_one_class_per_image():
    assert label_map(None, 0, dict(data_samples=3), 5).tolist() == [[3]]


def test_no_labels_at_all():
    assert label_map(object(), 0, dict(inputs=torch.zeros(1)), 5) is None
