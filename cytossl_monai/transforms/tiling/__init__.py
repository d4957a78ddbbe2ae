"""Slides to tiles as MONAI transforms."""
