"""Every method x {NCP off, on} x {ViT, SR} on real cells: the loss falls, nothing collapses, the state reloads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from small_methods import MULTI_CROP, SMALL, small_method

from cytossl_monai.methods.base import SSLMethod
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.views.generator import ViewGenerator

STEPS, BATCH, TILE, MPP = 12, 16, 64, 0.5
METHODS = ["moco_v3", "simclr", "byol", "dino", "ibot", "dinov2", "mae_nuclei"]
pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def cells(data_root: Path) -> torch.Tensor:
    """(16, 3, 64, 64) uint8: cells of eight classes, at about 0.5 um/px."""
    folders = sorted(folder for folder in (data_root / "cells").iterdir() if folder.is_dir())
    images = []
    for folder in folders[:8]:
        large = [p for p in sorted(folder.glob("*.jpg")) if min(Image.open(p).size) >= 2 * TILE][:2]
        for path in large:
            image = Image.open(path).convert("RGB")
            left, top = (image.width - 2 * TILE) // 2, (image.height - 2 * TILE) // 2
            tile = image.crop((left, top, left + 2 * TILE, top + 2 * TILE)).resize((TILE, TILE), Image.Resampling.BOX)
            images.append(torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).view(TILE, TILE, 3))
    return torch.stack(images[:BATCH]).permute(0, 3, 1, 2).contiguous()


def encoder(backbone: str) -> Encoder:
    sr = {"rpe": {"method": "product", "mode": "contextual", "on": "k"}, "sparsity": "routed", "num_salient": 4}
    return Encoder(
        SRTransformer(
            3, (48, 48), 8, hidden_size=32, mlp_dim=64, num_layers=2, num_heads=2, qkv_bias=True, class_token=True,
            **(sr if backbone == "sr" else {}),
        )
    )  # fmt: skip


def views_of(name: str, cells: torch.Tensor, ncp: bool) -> list[dict]:
    """Four draws of views, used in turn."""
    generate = ViewGenerator(
        global_size=48,
        local_size=24,
        n_global=1 if name.startswith("mae") else 2,
        n_local=2 if name in MULTI_CROP else 0,
        ncp=BatchedNCP(ops="default") if ncp else None,
        ncp_views="all" if name.startswith("mae") else (1,),
    )
    generator = torch.Generator().manual_seed(0)
    return [generate(cells, MPP, generator=generator) for _ in range(4)]


def spread(method: SSLMethod, views: dict) -> float:
    """0 when all images have one embedding, 1 when they fill the sphere."""
    with torch.no_grad():
        embedded = torch.nn.functional.normalize(method.encoder(views["global"][0]), dim=1)
    return embedded.std(0).mean().item() * embedded.shape[1] ** 0.5


@pytest.fixture(scope="module")
def drawn(cells: torch.Tensor) -> dict[tuple[str, bool], list[dict]]:
    """Views by (kind, NCP), drawn once for all methods of a kind."""
    return {
        (kind, ncp): views_of(kind, cells, ncp) for kind in ("simclr", "dino", "mae_nuclei") for ncp in (False, True)
    }


def kind_of(name: str) -> str:
    return "mae_nuclei" if name.startswith("mae") else "dino" if name in MULTI_CROP else "simclr"


@pytest.mark.parametrize("backbone", ["vit", "sr"])
@pytest.mark.parametrize("ncp", [False, True], ids=["plain", "ncp"])
@pytest.mark.parametrize("name", METHODS)
def test_trains_on_real_cells(name: str, ncp: bool, backbone: str, drawn: dict) -> None:
    torch.manual_seed(0)
    views = drawn[kind_of(name), ncp]
    method = small_method(name, encoder(backbone))
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, 2e-3)
    if hasattr(method, "target"):
        # A running center begins at 0, where an untrained teacher gives all cells one target and the loss is low for
        # nothing. Let it settle before anything is learned (the teacher equals the student: only the center moves).
        with torch.no_grad():
            for step in range(24):
                method(views[step % 4])
                method.update(0.0)
    losses = []
    for step in range(STEPS):
        out = method(views[step % 4])
        optimiser.zero_grad()
        out["loss"].backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimiser.step()
        method.update((step + 1) / (10 * STEPS))
        losses.append(out["loss"].item())
    # The same four draws come round: compare the last round with the first.
    assert sum(losses[-4:]) < sum(losses[:4])
    assert spread(method, views[0]) > 0.1

    fresh = small_method(name, encoder(backbone))
    fresh.load_state_dict(method.state_dict())
    method.train(), fresh.train()
    torch.manual_seed(1)
    expected = method(views[0])["loss"]
    torch.manual_seed(1)
    assert torch.equal(fresh(views[0])["loss"], expected)


def test_the_matrix_names_every_method() -> None:
    assert {SMALL[name][0] for name in METHODS} == {kind for kind, _ in SMALL.values()}
