import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytossl_monai.data.tiles.index_file import COLUMNS, TileIndex
from cytossl_monai.utils.errors import TableError

META = {
    "slide_id": "a",
    "slide_path": "/slides/a.tif",
    "level0_mpp": 0.25,
    "settings": {"tile_size": 224, "mpp": 0.5},
}


def table(n=3):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "slide_id": ["a"] * n,
            "x": rng.integers(0, 1000, n),
            "y": rng.integers(0, 1000, n),
            "size": [448] * n,
            "level": [1] * n,
            "mpp": [0.5] * n,
            "n_nuclei": rng.integers(0, 9, n),
            "nuclei_fraction": rng.random(n),
            "foreground_fraction": rng.random(n),
            "sharpness": rng.random(n),
        }
    )


@pytest.mark.parametrize("n", [0, 3])
def test_round_trip(tmp_path, n):
    index = TileIndex(table(n), META)
    path = index.write(tmp_path / "a.parquet")
    back = TileIndex.read(path)
    pd.testing.assert_frame_equal(back.table, index.table)
    assert (back.slide_id, str(back.slide_path), back.level0_mpp) == ("a", "/slides/a.tif", 0.25)
    assert (back.tile_size, back.mpp, len(back)) == (224, 0.5, n)
    assert back.coords.shape == (n, 2)
    assert TileIndex.read_meta(path)["n_tiles"] == n
    # read by any Parquet reader, without this class
    assert list(pd.read_parquet(path).columns) == list(COLUMNS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_further_columns_are_kept(tmp_path):
    path = TileIndex(table().assign(note=1.5), META).write(tmp_path / "a.parquet")
    assert TileIndex.read(path).table["note"].tolist() == [1.5] * 3


def test_malformed(tmp_path):
    with pytest.raises(TableError, match="sharpness"):
        TileIndex(table().drop(columns="sharpness"), META)
    with pytest.raises(TableError, match="wrong type"):
        TileIndex(table().assign(x="left"), META)
    for read in (TileIndex.read, TileIndex.read_meta):
        with pytest.raises(TableError, match="does not exist"):
            read(tmp_path / "none.parquet")
    path = TileIndex(table(), META).write(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TableError, match="damaged"):
        TileIndex.read(path)
    table().to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(TableError, match="no tile index"):
        TileIndex.read(tmp_path / "plain.parquet")


def test_newer_version(tmp_path):
    path = TileIndex(table(), {**META, "version": 99}).write(tmp_path / "a.parquet")
    with pytest.raises(TableError, match="version 99"):
        TileIndex.read(path)


def test_metadata_is_plain_json(tmp_path):
    path = TileIndex(table(), META).write(tmp_path / "a.parquet")
    assert b"cytossl_tile_index" in pq.read_schema(path).metadata
    with pytest.raises(ValueError, match="not JSON compliant"):
        TileIndex(table(), {**META, "level0_mpp": float("nan")}).write(tmp_path / "b.parquet")
    assert not (tmp_path / "b.parquet").exists()
    assert isinstance(pq.read_table(path), pa.Table)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ("{", "facts cannot be read"),
        ("[" * 10_000, "facts cannot be read"),
        ("3", "facts cannot be read"),
        ('{"version": "x"}', "facts cannot be read"),
        ('{"slide_id": "a", "slide_path": "/a"}', "they lack 'level0_mpp'"),
        ('{"slide_id": 3, "slide_path": "/a", "level0_mpp": 1, "settings": {"tile_size": 1, "mpp": 1}}', "no name"),
        (
            '{"slide_id": "a", "slide_path": "/a", "level0_mpp": NaN, "settings": {"tile_size": 1, "mpp": 1}}',
            "no number",
        ),
        ('{"slide_id": "a", "slide_path": "/a", "level0_mpp": 1, "settings": 3}', "facts cannot be read"),
    ],
)
def test_facts_that_cannot_be_read(tmp_path, facts, says):
    path = TileIndex(table(), META).write(tmp_path / "a.parquet")
    rows = pq.read_table(path)
    pq.write_table(rows.replace_schema_metadata({b"cytossl_tile_index": facts.encode()}), path)
    for read in (TileIndex.read, TileIndex.read_meta):
        with pytest.raises(TableError, match=says) as caught:
            read(path)
        assert "a.parquet" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "meta", "says"),
    [
        ("size", 0, {}, "not above 0"),
        ("mpp", 0.0, {}, "not above 0"),
        ("mpp", float("nan"), {}, "not above 0"),
        ("x", 10**9, {"width": 5000, "height": 5000}, "outside its slide"),
        ("y", -(10**6), {"width": 5000, "height": 5000}, "outside its slide"),
        ("x", 0, {"level0_mpp": 0}, "of a slide at 0"),
        ("x", 0, {"settings": {"tile_size": 0, "mpp": 0.5}}, "tiles of 0 pixels"),
        ("x", 0, {"settings": {"tile_size": 10**9, "mpp": 0.5}}, "tiles of 1000000000 pixels"),
    ],
)
def test_numbers_that_cannot_be(tmp_path, column, value, meta, says):
    rows = table()
    rows.loc[0, column] = value
    path = TileIndex(rows, {**META, **meta}).write(tmp_path / "a.parquet")
    with pytest.raises(TableError, match=says):
        TileIndex.read(path)
