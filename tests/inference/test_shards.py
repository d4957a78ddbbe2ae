"""Shards of index, embedding and inference do together what one run does; merging says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from inference_toy import CONFIGS, run_inference
from monai.bundle import ConfigWorkflow

from cytossl_monai.data import SlideCache, read_features, read_slide_table
from cytossl_monai.data.slides import cache as cache_module, open as open_module
from cytossl_monai.index import IndexSettings, index_slides
from cytossl_monai.inference import embed, embed_slides, merge_shards
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.utils import InputError, LockedError, Shard, item_lock
from cytossl_monai.utils.locks import FileLock
from cytossl_monai.utils.program import plain_cause


def owner(slide_id: str, count: int) -> int:
    return Shard.of(slide_id, count)


def test_shards_of_all_steps_equal_one_run(cohort, inferred, tmp_path):
    records, count = read_slide_table(cohort.slides), 3
    encoder, _ = load_encoder(cohort.encoder)
    index, features, out = tmp_path / "index", tmp_path / "features", tmp_path / "out"
    for number in range(1, count + 1):
        shard = Shard(number, count)
        mine = {record.slide_id for record in records if record.slide_id in shard}
        report = index_slides(
            records, index, IndexSettings(tile_size=96), 0, overview=False, progress=False, shard=shard
        )
        assert {item.item for item in report.items} == mine
        embed_slides(records, index, features, encoder, progress=False, shard=shard)
        if mine:  # a shard without slides is fine too
            status, lines = run_inference(cohort, out, index_dir=str(index), shard=f"{number}/{count}")
            assert (status, set(lines)) == (0, mine)
        else:
            (out / f"report.{number}-of-{count}.csv").parent.mkdir(exist_ok=True)
            (out / f"report.{number}-of-{count}.csv").write_text("item,status,message,seconds\n")
    assert not (out / "predictions.csv").exists()
    for folder in (index, features, out):
        merged = merge_shards(cohort.slides, folder)
        assert [item.item for item in merged.items] == [record.slide_id for record in records]
        assert {item.status for item in merged.items} == {"done"}
        assert len(pd.read_csv(folder / "report.csv")) == len(records)
    pd.testing.assert_frame_equal(pd.read_csv(out / "predictions.csv"), pd.read_csv(inferred / "predictions.csv"))
    assert (out / "index.html").is_file()
    alone = tmp_path / "alone"
    embed_slides(records, cohort.index, alone, encoder, progress=False)
    for record in records:
        first, second = (read_features(folder / f"{record.slide_id}.h5") for folder in (features, alone))
        assert np.array_equal(first.features, second.features)


def merge_bundle(slides: Path, folder: Path, **overrides):
    settings = {"slides": str(slides), "output_dir": str(folder), **overrides}
    workflow = ConfigWorkflow(str(CONFIGS / "merge.json"), workflow_type="infer", logging_file=False, **settings)
    workflow.initialize()
    workflow.run()


def test_merging_before_all_are_done_says_which_and_what(cohort, tmp_path):
    with pytest.raises(InputError, match="holds no report of a shard"):
        merge_shards(cohort.slides, tmp_path)
    first = owner("slide_0000", 8)
    (tmp_path / f"report.{first}-of-8.csv").write_text("item,status,message,seconds\nslide_0000,done,2 tiles,1.5\n")
    with pytest.raises(InputError, match=r"7 of 8 shards have no report .*: 1 slides are not done \(slide_0001\)"):
        merge_shards(cohort.slides, tmp_path)
    with pytest.raises(SystemExit) as stop:
        merge_bundle(cohort.slides, tmp_path, partial=True)
    assert stop.value.code == 3
    lines = pd.read_csv(tmp_path / "report.csv").set_index("item")
    assert lines.status.to_dict() == {"slide_0000": "done", "slide_0001": "failed"}
    assert f"run shard {owner('slide_0001', 8)}/8" in lines.message["slide_0001"]
    (tmp_path / "report.1-of-4.csv").write_text("item,status,message,seconds\n")
    with pytest.raises(InputError, match="reports of 4 and of 8 shards"):
        merge_shards(cohort.slides, tmp_path)


def test_a_shard_beside_shards_of_another_number_stops(cohort, tmp_path):
    (tmp_path / "report.1-of-4.csv").touch()
    with pytest.raises(RuntimeError) as error:  # MONAI's, around the sentence that the user is shown
        run_inference(cohort, tmp_path, shard="3/8")
    assert "is of 4 shards and this run is shard 3/8" in str(plain_cause(error.value))


def test_a_slide_that_another_run_is_at_comes_last(cohort, tmp_path, monkeypatch):
    """Its lock is held when the run begins and given back when the other slide is done."""
    records = read_slide_table(cohort.slides)
    encoder, _ = load_encoder(cohort.encoder)
    lock = FileLock(tmp_path / ".locks" / records[0].slide_id, "embedding")
    assert lock.acquire()
    with pytest.raises(LockedError), item_lock(tmp_path, records[0].slide_id, "embedding", wait=False):
        pass
    order = []

    real = embed.write_features

    def write(path, *arguments):
        order.append(Path(path).stem)
        lock.release()
        return real(path, *arguments)

    monkeypatch.setattr(embed, "write_features", write)
    report = embed_slides(records, cohort.index, tmp_path, encoder, progress=False)
    assert order == ["slide_0001", "slide_0000"]
    assert {item.status for item in report.items} == {"done"}


def test_through_a_slide_cache_everything_is_the_same(cohort, inferred, tmp_path, monkeypatch):
    near = tmp_path / "near"
    monkeypatch.setattr(cache_module, "_device", lambda path: path == near)
    opened = []
    backend = open_module._open_backend
    monkeypatch.setattr(open_module, "_open_backend", lambda path, name: opened.append(path) or backend(path, name))
    records = read_slide_table(cohort.slides)
    index_slides(
        records,
        tmp_path / "index",
        IndexSettings(tile_size=96),
        0,
        overview=False,
        progress=False,
        cache=SlideCache(near, 0.1),
    )
    status, _ = run_inference(
        cohort, tmp_path / "out", index_dir=str(tmp_path / "index"), slide_cache=str(near), slide_cache_gb=0.1
    )
    assert status == 0
    assert opened
    assert all(near in path.parents for path in opened)
    assert not list(near.iterdir())
    for record in records:
        folders = (tmp_path / "out", inferred)
        predictions = [json.loads((folder / record.slide_id / "prediction.json").read_text()) for folder in folders]
        assert predictions[0]["probabilities"] == predictions[1]["probabilities"]
        assert predictions[0]["slide"] == predictions[1]["slide"]
