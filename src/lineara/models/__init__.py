"""Whole networks, made of the layers of `lineara.nn`."""

from lineara.models.sequence_classifier import SequenceClassifier

__all__ = ["SequenceClassifier"]
