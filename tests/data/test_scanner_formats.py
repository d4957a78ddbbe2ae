"""Formats of cytology scanners: what no reader opens says how to go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cytossl_monai.data import open_slide
from cytossl_monai.utils import SlideError


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        (".kfb", "KFBIO's own converter"),
        (".sdpc", "Sqray's own viewer"),
        (".tmap", "UNIC's own viewer"),
        (".isyntax", "isyntax2raw and raw2ometiff"),
        (".czi", "bioformats2raw and raw2ometiff"),
        (".vsi", "bioformats2raw and raw2ometiff"),
        (".xyz", "convert it to pyramidal TIFF"),
    ],
)
def test_a_format_that_nothing_opens_says_how_to_go_on(tmp_path: Path, suffix: str, words: str) -> None:
    path = tmp_path / f"slide{suffix}"
    path.write_bytes(b"\x00\x01scanner" * 100)
    with pytest.raises(SlideError, match=words) as error:
        open_slide(path, mpp=0.25)
    assert "\n" not in str(error.value)
