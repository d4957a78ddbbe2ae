"""Bags: a slide's features with its target; items, splits, datasets, samplers, feature files."""
