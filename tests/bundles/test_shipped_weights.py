"""The encoder that ships is what its card says, loads with this package's own loader, and gives features."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

from cytossl_monai.inference import bundle_encoder
from cytossl_monai.networks import load_encoder

MODELS = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_pretrain" / "models"
FILE = MODELS / "lite0_cells.pt"


@pytest.fixture(scope="module")
def card() -> dict[str, str]:
    """First table of the card: fact to value, without backticks."""
    text = (MODELS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.MULTILINE)
    return {name: value.replace("`", "") for name, value in rows}


def test_the_file_is_the_cards(card: dict[str, str]) -> None:
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() == card["SHA-256"]
    assert len(content) == int(card["bytes"].replace(",", ""))
    assert len(content) <= 12e6
    assert card["file"] == FILE.name


def test_a_strangers_clone_has_it() -> None:
    root = MODELS.parents[2]
    if not (root / ".git").exists():
        pytest.skip("no git checkout")
    ignored = subprocess.run(["git", "check-ignore", "-q", str(FILE)], cwd=root, check=False).returncode
    assert ignored == 1, "the encoder that ships is ignored by git"
    other = subprocess.run(["git", "check-ignore", "-q", str(MODELS / "model.pt")], cwd=root, check=False).returncode
    assert other == 0, "weights of a user would be committed"


def test_it_loads_and_gives_features_of_its_width(card: dict[str, str]) -> None:
    encoder, meta = load_encoder(FILE)
    assert encoder.embed_dim == int(card["features"])
    assert encoder.hash == card["encoder hash"]
    assert (meta["tile_size"], meta["mpp"], meta["license"]) == (
        int(card["field, pixels"]),
        float(card["field, um per pixel"]),
        card["licence of the weights"],
    )
    assert sum(parameter.numel() for parameter in encoder.parameters()) == int(card["parameters"].replace(",", ""))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    stored = torch.load(FILE, map_location="cpu", weights_only=True)["state_dict"]
    assert {v.dtype for k, v in stored.items() if k.endswith("weight")} == {torch.float16}
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder(images)
        alone = encoder(images[:1])
    assert features.shape == (5, encoder.embed_dim)
    assert torch.isfinite(features).all()
    assert features.std(0).mean() > 0
    torch.testing.assert_close(alone, features[:1], atol=1e-4, rtol=1e-3)
    assert bundle_encoder(FILE).trained


def test_it_tells_a_dark_round_nucleus_from_glass_and_one_nucleus_from_another() -> None:
    """Cosines of simple pictures: turned or shifted by little a cell stays alike, glass does not look like it."""
    encoder, _ = load_encoder(FILE)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")

    def cell(radius: float, left: float = 32.0) -> torch.Tensor:
        image = torch.tensor([0.80, 0.82, 0.88]).view(3, 1, 1).expand(3, 64, 64).clone()
        inside = (x - left) ** 2 + (y - 32) ** 2 < radius**2
        image[:, inside] = torch.tensor([0.35, 0.25, 0.50]).view(3, 1)
        return image

    pictures = torch.stack([cell(8), cell(8, 34), cell(20), torch.full((3, 64, 64), 0.92)])
    with torch.no_grad():
        features = torch.nn.functional.normalize(encoder(pictures), dim=1)
    near, size, glass = (features[0] @ features[1:].T).tolist()
    assert near > size
    assert near > glass
