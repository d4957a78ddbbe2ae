"""Ignite engines, through monai.engines."""
