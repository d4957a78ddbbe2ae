"""The ends of every setting's range: indexing takes them or says at once what is wrong; no slide fails by them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from cytossl_monai.data import make_slides, read_slide_table
from cytossl_monai.engines.settings.kinds import Number
from cytossl_monai.engines.settings.tables import TABLES
from cytossl_monai.index import IndexSettings, index_slides
from cytossl_monai.utils.errors import SettingError

KINDS = TABLES["cytossl_pretrain/index"]
EDGES = [
    (field.name, edge)
    for field in fields(IndexSettings)
    if isinstance(KINDS.get(field.name), Number)
    for edge in (KINDS[field.name].low, KINDS[field.name].high)  # type: ignore[attr-defined]
]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slides(tmp_path_factory.mktemp("slides"), 1, 512, density=900.0, progress=False, num_workers=0)


@pytest.mark.parametrize(("name", "edge"), EDGES)
def test_an_end_of_a_range_fails_no_slide(name: str, edge: float, slides: Path, tmp_path: Path) -> None:
    refusal = ""
    try:
        settings = IndexSettings.of({"tile_size": 96, "mpp": 0.5, name: edge})
    except SettingError as error:
        refusal = str(error)
    if refusal:  # by its name, before any slide
        assert name in refusal
        return
    report = index_slides(read_slide_table(slides), tmp_path, settings, num_workers=0, overview=False, progress=False)
    assert [item.message for item in report.items if item.status == "failed"] == []
