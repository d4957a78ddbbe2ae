"""Views of images that are smaller than their tile: nothing of the fill is learnt from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from ssl_standins import make_trainer

from cytossl_monai.data import ImageFolder
from cytossl_monai.data.tiles.dataset import collate_tiles
from cytossl_monai.transforms import ViewGenerator


def test_training_draws_its_views_within_the_real_pixels(tmp_path: Path) -> None:
    """Crops of 20 px in tiles of 64: through data set, loader and trainer no view shows the fill."""
    for number in range(16):
        Image.fromarray(np.full((20, 20, 3), 40, np.uint8)).save(tmp_path / f"{number:02}.png")
    data = ImageFolder(tmp_path, size=64, fit="tile", fill="glass")
    batch = collate_tiles(data.__getitems__(list(range(4))))
    batch["image"][:, :, :22], batch["image"][:, :, 42:] = 255, 255  # fill that can be told from the rest
    batch["image"][..., :22], batch["image"][..., 42:] = 255, 255
    trainer = make_trainer(None, views=ViewGenerator(16, n_local=0, find_nuclei=False, stain_prob=0.0, blur_prob=0.0))
    views = trainer.make_views(batch, 0)["global"]
    assert max(float(view[:, :, 1:-1, 1:-1].max()) for view in views) < 0.2
    del batch["valid"]
    assert max(float(view.max()) for view in trainer.make_views(batch, 0)["global"]) == 1.0
