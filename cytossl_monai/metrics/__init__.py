"""Metrics: kNN, linear probe, nuclei detection, bootstrap intervals, calibration.

What ``__all__`` names is the public face: it stays where it is, the files behind it may move.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
