"""Whole slides: opened by the library that can really decode them, read at any resolution in batches."""
