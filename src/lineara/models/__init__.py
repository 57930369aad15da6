"""Whole networks, made of the layers of `lineara.nn`."""

from lineara.models.mask_rcnn import mask_rcnn
from lineara.models.psmnet import PSMNet
from lineara.models.resnet import resnet
from lineara.models.sequence_classifier import SequenceClassifier

__all__ = ["PSMNet", "SequenceClassifier", "mask_rcnn", "resnet"]
