"""Tiles of slides and images: index files, datasets, samplers, loaders."""
