"""Slides in: readers at any resolution, slide tables, tile indexes, feature files, datasets."""
