"""Slide classifiers: training, folds, few labels, prediction, evaluation."""
