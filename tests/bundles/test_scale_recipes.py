"""The recipes in configs/scale: they train, on cached tiles and nuclei, and refuse views that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from PIL import Image

from cytossl_monai.networks.files import load_encoder
from cytossl_monai.transforms import native_scale


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Eight images of 112 px: a dark disc on bright noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:112, :112]
    (tmp_path / "cells").mkdir()
    for number in range(8):
        image = rng.integers(215, 235, (112, 112, 3))
        image[(x - 56) ** 2 + (y - 50 - number) ** 2 < 15**2] = (90, 60, 120)
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "cells" / f"{number}.png")
    return tmp_path / "cells"


def laid_over(repo_root: Path, cells: Path, *overlays: str, **changes: Any) -> ConfigParser:
    parser = ConfigParser()
    train = repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"
    parser.read_config([str(train), *(str(repo_root / "configs" / overlay) for overlay in overlays)])
    settings = {
        "dataset_dir": str(cells),
        "images_mpp": 0.25,
        "image_fit": "square",
        "output_dir": str(cells.parent / "out"),
        "batch_size": 4,
        "steps": 2,
        "epoch_length": 2,
        "num_workers": 0,
        "num_layers": 1,
        "head_hidden_dim": 16,
    }
    for key, value in {**settings, **changes}.items():
        parser[key] = value
    return parser


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [[], ["backbone/resnet10.yaml"]])
def test_it_trains_on_cached_nuclei(more: list[str], repo_root: Path, cells: Path) -> None:
    parser = laid_over(repo_root, cells, "data/images.yaml", "scale/cpu.yaml", *more)
    trainer = parser.get_parsed_content("train#trainer")
    trainer.views.segmenter = lambda *_: pytest.fail("nuclei were looked for though they are cached")
    trainer.run()
    assert trainer.state.iteration == 2
    assert torch.isfinite(trainer.state.output["loss"])
    assert list((cells.parent / "out" / "cache").glob("*/slots.bin"))
    assert (cells.parent / "out" / "models" / "model.pt").is_file()


@pytest.mark.filterwarnings("ignore")
def test_the_encoder_says_what_images_it_learned_from(repo_root: Path, cells: Path) -> None:
    """As one that learned from slides does: who applies it is told where tiles are of another size or scale."""
    parser = laid_over(
        repo_root, cells, "data/images.yaml", "scale/cpu.yaml", image_fit="tile", images_mpp=0.2, image_read_mpp=0.4,
        tile_size=56, view_size=32,
    )  # fmt: skip
    parser.get_parsed_content("train#trainer").run()
    meta = load_encoder(cells.parent / "out" / "models" / "model.pt")[1]
    assert (meta["tile_size"], meta["mpp"]) == (56, pytest.approx(0.4))


def test_views_show_a_cell_at_the_tiles_scale(repo_root: Path, cells: Path) -> None:
    views = laid_over(repo_root, cells, "data/images.yaml", "scale/cpu.yaml").get_parsed_content("views")
    low, high = (112 * part**0.5 for part in views.global_scale)
    assert (low, high) == pytest.approx((64 / 1.25, 64 / 0.8))
    with pytest.raises(RuntimeError, match="native_scale") as error:
        laid_over(repo_root, cells, "data/images.yaml", "scale/cpu.yaml", tile_size=72).get_parsed_content("views")
    assert "show 80 px, but tiles have 72 px: set tile_size to 80 or more" in str(error.value.__cause__)
    for zoom in ([0.0, 1.0], [1.2, 0.8]):
        with pytest.raises(ValueError, match="zoom is"):
            native_scale(64, 112, zoom)


def test_the_large_recipe_has_the_small_ones_keys(repo_root: Path, cells: Path) -> None:
    small, large = (
        yaml.safe_load((repo_root / "configs" / "scale" / name).read_text(encoding="utf-8"))
        for name in ("cpu.yaml", "gpu.yaml")
    )
    assert set(small) - set(large) == {"steps", "epoch_length", "precision", "checkpoint_epochs", "tensorboard"}
    assert set(large) - set(small) == {"epochs", "channels_last"}
    parser = laid_over(repo_root, cells, "data/images.yaml", "scale/gpu.yaml", num_layers=2)
    with torch.device("meta"):
        assert parser.get_parsed_content("encoder").embed_dim == 768


@pytest.mark.parametrize(("recipe", "side"), [("cpu.yaml", 32), ("gpu.yaml", 64)])
def test_local_views_of_dino_laid_over_it_are_smaller_than_its_global_ones(
    recipe: str, side: int, repo_root: Path, cells: Path
) -> None:
    views = laid_over(repo_root, cells, f"scale/{recipe}", "ssl/dino.yaml").get_parsed_content("views")
    assert set(views.sizes[views.n_global :]) == {side}
    assert views.sizes[0] == 2 * side


@pytest.mark.filterwarnings("ignore")
def test_accumulation_is_refused_with_its_way_out_and_that_way_is_one(repo_root: Path, cells: Path) -> None:
    recipe = ("data/images.yaml", "scale/cpu.yaml")
    with pytest.raises(RuntimeError) as error:
        laid_over(repo_root, cells, *recipe, accumulation_steps=2).get_parsed_content("train#trainer")
    told = str(error.value.__cause__)
    for way in ({"stem_norm": "group"}, {"train#trainer#accumulation": "sum"}):
        assert next(iter(way)) in told
        parser = laid_over(repo_root, cells, *recipe, accumulation_steps=2, resume=False, **way)
        parser.get_parsed_content("train#trainer").run()
