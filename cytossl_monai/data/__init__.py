"""Slides in: readers at any resolution, slide tables, tile indexes, feature files, datasets.

What ``__all__`` names is the public face: it stays where it is, the files behind it may move.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
