"""Nuclei told from red cells, precipitate and crystals by how much stain they hold and of which colour."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cytossl_monai.transforms.kernels.stained import optical_density, stained_regions
from cytossl_monai.transforms.nuclei.instances import segment_instances
from cytossl_monai.transforms.nuclei.mask import nuclei_mask
from cytossl_monai.transforms.nuclei.regions import RegionRules

GLASS, NUCLEUS, RED_CELL, CRYSTAL = (0.02, 0.02, 0.02), (0.42, 0.57, 0.28), (0.16, 0.19, 0.14), (0.5, 0.53, 0.42)
CYTOPLASM = (0.15, 0.16, 0.12)
DATA = Path(os.environ.get("CYTOSSL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
MPP = 0.25


def picture(*discs, size=256):
    """(3, H, W) uint8: discs of (x, y, radius, optical density) on glass, with the noise of a camera."""
    density = np.tile(np.array(GLASS)[:, None, None], (1, size, size))
    rows, columns = np.mgrid[:size, :size]
    for x, y, radius, stain in discs:
        density[:, np.hypot(columns - x, rows - y) <= radius] = np.array(stain)[:, None]
    noise = np.random.default_rng(0).normal(0, 0.004, density.shape)
    return np.clip(255 * 10 ** -(density + noise), 0, 255).astype(np.uint8)


def found(image, x, y, rules=None):
    """Whether the exact and the batched path call a point nucleus."""
    exact = segment_instances(image, MPP, table=False, rules=rules).labels[y, x] > 0
    return bool(exact), bool(nuclei_mask(torch.from_numpy(image)[None], MPP, rules=rules)[0, 0, y, x])


def test_a_red_cell_on_glass_is_no_nucleus_and_a_nucleus_is() -> None:
    image = picture((70, 70, 17, RED_CELL), (180, 180, 28, NUCLEUS))
    assert found(image, 70, 70) == (False, False)
    assert found(image, 180, 180) == (True, True)


def test_it_needs_no_nucleus_beside_it_to_tell_a_red_cell() -> None:
    assert found(picture((128, 128, 17, RED_CELL)), 128, 128) == (False, False)


def test_without_the_rule_it_is_taken_for_one() -> None:
    assert found(picture((128, 128, 17, RED_CELL)), 128, 128, RegionRules(min_stain=0)) == (True, True)


def test_a_pale_nucleus_within_cytoplasm_stays() -> None:
    pale = tuple(np.array(CYTOPLASM) + np.array((0.14, 0.16, 0.12)))
    assert found(picture((128, 128, 70, CYTOPLASM), (128, 128, 18, pale)), 128, 128) == (True, True)


def test_grey_images_keep_what_they_had() -> None:
    image = picture((128, 128, 17, (0.2, 0.2, 0.2)))
    assert found(image, 128, 128) == (True, True)
    assert found(image[:1], 128, 128) == (True, True)


def test_a_grey_crystal_goes_among_violet_nuclei_and_stays_among_grey_ones() -> None:
    crystal = (70, 70, 17, CRYSTAL)
    assert found(picture(crystal, (180, 180, 28, NUCLEUS)), 70, 70) == (False, False)
    papanicolaou = (180, 180, 28, (0.42, 0.48, 0.37))
    assert found(picture(crystal, papanicolaou), 70, 70) == (True, True)


def test_a_batch_is_judged_tile_by_tile() -> None:
    images = [picture((70, 70, 17, CRYSTAL), (180, 180, 28, NUCLEUS)), picture((128, 128, 20, CRYSTAL))]
    together = nuclei_mask(torch.from_numpy(np.stack(images)), MPP)
    apart = [nuclei_mask(torch.from_numpy(image)[None], MPP)[0] for image in images]
    assert torch.equal(together, torch.stack(apart))


def test_no_region_and_no_rule_keep_everything() -> None:
    density = optical_density(torch.from_numpy(picture((128, 128, 17, RED_CELL)))[None])
    labels = torch.zeros(1, 256, 256, dtype=torch.int32)
    assert stained_regions(labels, 0, density, MPP, 0.3, 0.35).tolist() == [True]
    labels[0, 120:136, 120:136] = 1
    assert stained_regions(labels, 1, density, MPP, 0.0, 0.0).tolist() == [True, True]


@pytest.mark.skipif(not (DATA / "mgg_fields").is_dir(), reason="the Giemsa fields of ../shared/data are not here")
def test_nuclei_of_giemsa_fields_are_found_and_little_else(monkeypatch) -> None:
    bench = Path(__file__).parents[2] / "scripts" / "bench"
    monkeypatch.syspath_prepend(str(bench))
    nuclei = __import__("nuclei")
    try:
        fields = nuclei.collect(DATA, ["mgg_fields"], None)
        rows = pd.DataFrame([row for field in (fields[5], fields[10]) for row in nuclei.measure(field)])
    finally:
        sys.modules.pop("nuclei")
    for method in ("exact", "batched"):
        part = rows[rows["method"] == method]
        assert part["fp"].sum() <= 1, method
        assert part["fn"].sum() <= 1, method
