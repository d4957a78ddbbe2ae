"""Cyto-SSL on MONAI: self-supervised pretraining, slide classification and inference for cytology slides.

The package mirrors MONAI's own layout (``data``, ``transforms``, ``networks``, ``losses``, ``engines``, ``handlers``,
``metrics``, ``index``, ``inference``, ``visualize``), so whoever knows MONAI knows where to look.
"""

from __future__ import annotations

from cytossl_monai.registry import register_short_names

__version__ = "0.1.0"

register_short_names()
