"""Bags of fields centred on nuclei: which are taken, what is embedded, and what inference shows of them."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from inference_toy import CONFIGS, run_inference, spoil
from monai.bundle import ConfigWorkflow

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.slide_table import SlideRecord, read_slide_table
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.nuclei_file import NucleusTable, nuclei_path
from cytossl_monai.deploy.slide_bag import SlideToBag
from cytossl_monai.index.fields import NucleusFields, instance_fields, nucleus_fields, oddness
from cytossl_monai.inference import embed
from cytossl_monai.inference.embed import embed_slides
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.utils.errors import TableError
from cytossl_monai.utils.files import file_fingerprint

FIELDS = {"field_size": 64, "field_mpp": 0.5}


def table_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "x": rng.uniform(0, 1000, count),
            "y": rng.uniform(0, 1000, count),
            "area_um2": rng.lognormal(4, 0.3, count),
            "density": rng.normal(0.5, 0.1, count),
            "elongation": rng.uniform(1, 2, count),
        }
    )


def nuclei_of(cohort, name="slide_0001"):
    index_path = cohort.index / f"{name}.parquet"
    return TileIndex.read(index_path), NucleusTable.read(nuclei_path(index_path))


def test_the_nuclei_of_an_index_are_those_that_its_tiles_count(cohort):
    index, nuclei = nuclei_of(cohort)
    counted = [
        int(
            (
                (nuclei.table["x"] >= row.x)
                & (nuclei.table["x"] < row.x + row.size_)
                & (nuclei.table["y"] >= row.y)
                & (nuclei.table["y"] < row.y + row.size_)
            ).sum()
        )
        for row in index.table.rename(columns={"size": "size_"}).itertuples()
    ]
    assert counted == index.table["n_nuclei"].tolist()
    assert len(nuclei) == index.meta["nuclei"] > 5
    assert (nuclei.table["area_um2"] >= 10).all()
    assert (nuclei.table["density"] > 0).all()


def test_nuclei_lie_where_the_slide_has_them(cohort):
    _, nuclei = nuclei_of(cohort)
    truth = pd.read_csv(cohort.slides.parent / "truth" / "slide_0001.csv")
    truth = truth[truth["class"] != "debris"]
    x, y = truth.nucleus_x + truth.nucleus_w / 2, truth.nucleus_y + truth.nucleus_h / 2
    away = np.hypot(x.to_numpy() - nuclei.centres[:, :1], y.to_numpy() - nuclei.centres[:, 1:]).min(1)
    assert np.median(away) < 8  # level-0 pixels, 2 um


def test_the_cap_keeps_what_stands_out_and_a_random_rest():
    table = table_of(500)
    table.loc[7, "area_um2"], table.loc[11, "density"], table.loc[13, "elongation"] = 900.0, 2.0, 9.0
    fields = NucleusFields(max_fields=40, odd_share=0.25, seed=3)
    chosen = fields.choose(table, "a")
    strongest = sorted(range(500), key=lambda i: -oddness(table)[i])[:10]
    assert {7, 11, 13} <= set(strongest) <= set(chosen.tolist())
    assert len(set(chosen.tolist())) == 40
    np.testing.assert_array_equal(chosen, fields.choose(table, "a"))
    assert set(chosen) != set(fields.choose(table, "b"))
    assert set(chosen) != set(NucleusFields(max_fields=40, odd_share=0.25, seed=4).choose(table, "a"))
    np.testing.assert_array_equal(NucleusFields(max_fields=None).choose(table, "a"), np.arange(500))


def test_oddness_agrees_with_a_plain_loop():
    table = table_of(31)
    columns = [np.log(table["area_um2"]), table["density"], table["elongation"]]
    for i, value in enumerate(oddness(table)):
        scores = []
        for column in columns:
            middle = sorted(column)[15]
            spread = 1.4826 * sorted(abs(v - middle) for v in column)[15]
            scores.append((column[i] - middle) / spread)
        assert value == pytest.approx(max(scores[0], scores[1], 0.5 * abs(scores[2])))


def test_each_field_is_centred_on_its_nucleus_and_embedded_once(cohort, tmp_path):
    encoder, _ = load_encoder(cohort.encoder)
    _, nuclei = nuclei_of(cohort)
    fields = NucleusFields(size=64, mpp=0.5, max_fields=12)
    records = read_slide_table(cohort.slides)[1:2]
    report = embed_slides(records, cohort.index, tmp_path, encoder, "toy", num_threads=1, progress=False, fields=fields)
    assert report.exit_code == 0
    stored = read_features(tmp_path / "slide_0001.h5")
    assert len(stored.features) == 12 == len(np.unique(stored.coords, axis=0))
    assert stored.attrs["instances"] == "nuclei"
    centres = stored.coords + 64  # 64 px at 0.5 um/px are 128 at 0.25
    away = np.hypot(*np.moveaxis(centres[:, None] - nuclei.centres[None], -1, 0)).min(1)
    assert away.max() <= 1
    with open_slide(records[0].path) as slide, torch.inference_mode():
        one = encoder(torch.as_tensor(slide.read_regions(stored.coords[3:4], 64, 0.5)))
    np.testing.assert_allclose(stored.features[3], one[0].numpy(), atol=1e-4)
    again = embed_slides(records, cohort.index, tmp_path, encoder, "toy", num_threads=1, progress=False, fields=fields)
    assert again.items[0].status == "current"


def test_a_slide_without_nuclei_costs_only_itself(cohort, tmp_path):
    folder = tmp_path / "index"
    shutil.copytree(cohort.index, folder)
    path = nuclei_path(folder / "slide_0000.parquet")
    whole = NucleusTable.read(path)
    NucleusTable(whole.table.iloc[:0], whole.meta).write(path)
    encoder, _ = load_encoder(cohort.encoder)
    fields = NucleusFields(size=64, max_fields=4)
    records = read_slide_table(cohort.slides)
    report = embed_slides(records, folder, tmp_path / "out", encoder, num_threads=1, progress=False, fields=fields)
    first, second = report.items
    assert first.status == "failed"
    assert "holds no nucleus" in first.message
    assert "instances: tiles" in first.message
    assert second.status == "done"
    path.unlink()
    with pytest.raises(TableError, match="index the slide again"):
        nucleus_fields(TileIndex.read(folder / "slide_0000.parquet"), folder / "slide_0000.parquet", fields)


@pytest.fixture
def damaged(cohort, tmp_path):
    """A slide that lost one of its four file tiles, and its index as if no kept tile had lain on that one."""
    path = spoil(cohort.path(1), tmp_path / "slide_0001.tif", [0])
    whole = TileIndex.read(cohort.index / "slide_0001.parquet")
    meta = {**whole.meta, "slide_path": str(path), "fingerprint": file_fingerprint(path)}
    nuclei = NucleusTable.read(nuclei_path(cohort.index / "slide_0001.parquet"))

    def indexed(max_unreadable):
        settings = {**meta["settings"], "max_unreadable": max_unreadable}
        here = tmp_path / f"index_{max_unreadable}" / "slide_0001.parquet"
        here.parent.mkdir(exist_ok=True)
        TileIndex(whole.table, {**meta, "settings": settings}).write(here)
        NucleusTable(nuclei.table, {**nuclei.meta, "fingerprint": meta["fingerprint"]}).write(nuclei_path(here))
        return here.parent

    return SlideRecord("slide_0001", path, None, "p"), indexed


def test_fields_that_reach_into_damage_are_left_out_and_counted(cohort, damaged, tmp_path):
    record, indexed = damaged
    encoder, _ = load_encoder(cohort.encoder)
    fields = NucleusFields(size=64, mpp=0.5, max_fields=None)

    def embedded(index_dir):
        (line,) = embed_slides(
            [record], index_dir, tmp_path / "out", encoder, num_threads=1, progress=False, fields=fields
        ).items
        return line

    refused = embedded(indexed(0.05))
    assert refused.status == "failed"
    assert re.search(r"\d+ of \d+ fields around nuclei cannot be decoded, more than max_unreadable", refused.message)
    index_path = indexed(0.9) / "slide_0001.parquet"
    asked = nucleus_fields(TileIndex.read(index_path), index_path, fields)
    done = embedded(index_path.parent)
    stored = read_features(tmp_path / "out" / "slide_0001.h5")
    with open_slide(record.path) as slide:
        sound = slide.sound(asked.coords, 64, 0.5)
    lost = int((~sound).sum())
    assert 0 < lost < len(asked)
    np.testing.assert_array_equal(stored.coords, asked.coords[sound])
    assert (done.status, done.message) == ("done", f"{sound.sum()} nuclei; {lost} damaged fields left out")
    again = embedded(index_path.parent)
    assert (again.status, again.message) == ("current", done.message)


def test_inference_shows_cells_of_a_damaged_slide(cohort, damaged, tmp_path):
    record, indexed = damaged
    settings = {"slides": None, "slide": str(record.path), "index_dir": str(indexed(0.9)), "instances": "nuclei"}
    settings |= {"max_fields": None, "evidence": ["tiles"], **FIELDS, "tile_size": 96}
    status, report = run_inference(cohort, tmp_path / "out", **settings)
    assert status == 0
    message = report["slide_0001"].message
    assert re.search(r" [1-9]\d* cells; [1-9]\d* damaged fields left out$", message)
    _, report = run_inference(cohort, tmp_path / "out", **settings)
    assert (report["slide_0001"].status, report["slide_0001"].message) == ("current", message)
    table = tmp_path / "out" / "slide_0001" / "tiles.parquet"
    before = pd.read_parquet(table)
    table.unlink()  # written again, from the features that are there
    _, report = run_inference(cohort, tmp_path / "out", **settings)
    assert (report["slide_0001"].status, report["slide_0001"].message) == ("done", message)
    pd.testing.assert_frame_equal(pd.read_parquet(table), before)
    bag = SlideToBag(
        cohort.encoder, settings["index_dir"], 96, num_threads=1, instances="nuclei",
        fields={"size": 64, "mpp": 0.5, "max_fields": None},
    )(record)  # fmt: skip
    assert len(bag["features"]) == len(bag["index"]) == len(before)


def test_a_slide_that_is_current_is_not_copied_ahead(cohort, tmp_path, monkeypatch):
    encoder, _ = load_encoder(cohort.encoder)
    records, needs = read_slide_table(cohort.slides), []

    def turns(records, folder, doing, cache, needed):
        needs.append([needed(record) for record in records])
        return iter(records)

    monkeypatch.setattr(embed, "in_turn", turns)
    fields = NucleusFields(size=64, max_fields=4)
    for _ in range(2):
        embed_slides(records, cohort.index, tmp_path, encoder, num_threads=1, progress=False, fields=fields)
    assert needs == [[True, True], [False, False]]


def test_nuclei_of_another_slide_are_refused(cohort):
    index, _ = nuclei_of(cohort, "slide_0000")
    _, nuclei = nuclei_of(cohort, "slide_0001")
    with pytest.raises(TableError, match="another slide file"):
        NucleusFields().of(index, nuclei)


@pytest.mark.parametrize(
    ("instances", "fields", "message"),
    [
        ("cells", {}, "must be 'tiles' or 'nuclei'"),
        ("nuclei", {"size": 4}, "16 pixels or more"),
        ("nuclei", {"max_fields": 0}, "1 or more"),
        ("nuclei", {"odd_share": 2}, r"\[0, 1\]"),
        ("nuclei", {"mpp": -1}, "0.05 to 20"),
        ("nuclei", {"sise": 64}, "sise"),
    ],
)
def test_settings_that_cannot_be_are_named(instances, fields, message):
    with pytest.raises(TableError, match=message):
        instance_fields(instances, fields)


def test_the_embedding_bundle_takes_instances(cohort, tmp_path):
    workflow = ConfigWorkflow(
        str(CONFIGS / "embed.json"),
        workflow_type="inference",
        logging_file=False,
        slides=str(cohort.slides),
        index_dir=str(cohort.index),
        encoder=str(cohort.encoder),
        output_dir=str(tmp_path),
        instances="nuclei",
        field_size=64,
        max_fields=5,
        device="cpu",
        amp=False,
        num_threads=1,
        progress=False,
    )
    workflow.initialize()
    with pytest.raises(SystemExit) as ended:
        workflow.run()
    assert ended.value.code == 0
    assert [len(read_features(p).features) for p in sorted(tmp_path.glob("*.h5"))] == [5, 5]


def test_inference_shows_cells(cohort, tmp_path):
    status, report = run_inference(
        cohort, tmp_path, evidence=["tiles", "geojson", "heatmap"], instances="nuclei", max_fields=8, **FIELDS,
        tile_size=96,
    )  # fmt: skip
    assert status == 0
    assert "8 cells" in report["slide_0001"].message
    objects = json.loads((tmp_path / "slide_0001" / "tiles.geojson").read_text(encoding="utf-8"))["features"]
    cells = [o for o in objects if "Nucleus density" in o["properties"]["measurements"]]
    assert sum(o["properties"]["objectType"] == "detection" for o in cells) == 8
    table = pd.read_parquet(tmp_path / "slide_0001" / "tiles.parquet")
    assert len(table) == 8
    assert {"area_um2", "density", "attention"} <= set(table)
