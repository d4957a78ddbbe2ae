"""The overlays in configs/data read a folder, a datalist, and slides mixed with a folder, through the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.index.build import index_slide


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames of 160 x 120 px; the blue channel says which."""
    root = tmp_path_factory.mktemp("images")
    (root / "a").mkdir(), (root / "b").mkdir()
    for number in range(12):
        frame = np.full((120, 160, 3), 200, np.uint8)
        frame[..., 2] = 10 * number
        Image.fromarray(frame).save(root / ("a" if number < 8 else "b") / f"{number:02}.png")
    items = [{"image": f"a/{n:02}.png", "group": f"patient {n % 3}"} for n in range(6)]
    (root / "list.json").write_text(json.dumps({"training": items, "validation": items[:1]}))
    return root


def overlaid(repo_root: Path, name: str, **settings: object) -> ConfigParser:
    parser = ConfigParser()
    bundle = repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"
    parser.read_config([str(bundle), str(repo_root / "configs" / "data" / f"{name}.yaml")])
    for key, value in {"num_workers": 0, "batch_size": 8, **settings}.items():
        assert key in parser.config, key
        parser[key] = value
    return parser


def batch_of(parser: ConfigParser) -> dict:
    return next(iter(parser.get_parsed_content("train#dataloader")))


def test_folder_of_images_in_tiles(images: Path, repo_root: Path) -> None:
    parser = overlaid(repo_root, "images", dataset_dir=str(images), image_size=30, images_mpp=0.25)
    data = parser.get_parsed_content("train#dataset")
    assert len(data) == 12 * 3 * 2  # 60 px of the file a tile
    batch = batch_of(parser)
    assert batch["image"].shape == (8, 3, 30, 30)
    assert batch["image"].dtype == torch.uint8
    assert batch["mpp"].tolist() == pytest.approx([0.5] * 8)


def test_datalist(images: Path, repo_root: Path) -> None:
    parser = overlaid(repo_root, "datalist", dataset_dir=str(images / "list.json"), image_size=32)
    data = parser.get_parsed_content("train#dataset")
    assert [record.path.name for record in data.records] == [f"{n:02}.png" for n in range(6)]
    assert data.groups.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch_of(parser)["mpp"].tolist() == pytest.approx([0.25 * 160 / 32] * 8)
    parser = overlaid(repo_root, "datalist", dataset_dir=str(images / "list.json"), datalist_key="validation")
    assert len(parser.get_parsed_content("train#dataset")) == 1


def test_slides_mixed_with_images_by_weight(images: Path, repo_root: Path, tmp_path: Path) -> None:
    table = make_slides(tmp_path / "slides", 1, 1792, seed=5, blur=0, progress=False)
    index_slide(read_slide_table(table)[0]).write(tmp_path / "index" / "a.parquet")
    parser = overlaid(
        repo_root,
        "mixed",
        index_dir=str(tmp_path / "index"),
        images_dir=str(images),
        shares=[3.0, 1.0],
        tile_size=64,
        batch_size=16,
    )
    batch = batch_of(parser)
    from_slides = [name.startswith("slide_") for name in batch["slide_id"]]
    assert sum(from_slides) == 12  # three of four, in every batch
    assert batch["image"].shape == (16, 3, 64, 64)
    assert batch["mpp"].tolist() == pytest.approx([0.5] * 16)


def test_frames_that_follow_each_other_are_decoded_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cytossl_monai.data.tiles import images as image_folder

    read: list[str] = []
    load = image_folder._load_rgb
    monkeypatch.setattr(image_folder, "_load_rgb", lambda path: (read.append(path.name), load(path))[1])
    data = image_folder.ImageFolder(images / "b", size=30, mpp=0.5, fit="tile")
    whole = [data[number]["image"] for number in range(len(data))]
    assert read == ["08.png", "09.png", "10.png", "11.png"]
    assert len(whole) > 2 * len(read)
    back = [data[number]["image"] for number in reversed(range(len(data)))]
    assert all(torch.equal(a, b) for a, b in zip(whole, reversed(back)))
