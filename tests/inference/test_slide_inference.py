"""From bare slides to prediction and evidence: what is written is right, whole, and made again only when it must be."""

import json
import multiprocessing
import os
import shutil
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from inference_toy import make_classifier, make_encoder, run_inference
from PIL import Image

from cytossl_monai.data.bags.features import read_features, write_features
from cytossl_monai.data.bags.seen import seen_digests
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.inference import embed as embedder, evidence
from cytossl_monai.inference.evidence import EVIDENCE
from cytossl_monai.networks.files import load_classifier, load_encoder, save_classifier, save_encoder
from cytossl_monai.utils.errors import CheckpointError, TableError
from cytossl_monai.utils.files import atomic_path
from cytossl_monai.utils.report import EXIT_PARTIAL


def prediction_of(folder, slide):
    return json.loads((folder / slide / "prediction.json").read_text(encoding="utf-8"))


def states(folder):
    """Name to (inode, time of writing) of every file but locks and logs: a file that is written again has another."""
    return {
        p: (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.parent.name != ".locks" and p.name != "run.log"
    }


def test_prediction_equals_the_plain_computation(cohort, inferred):
    """Tile by tile, without threads, batches, stores or bundle."""
    encoder, _ = load_encoder(cohort.encoder)
    classifier = load_classifier(cohort.classifier)
    for number in (0, 1):
        slide_id = f"slide_{number:04d}"
        index = TileIndex.read(inferred / "cache" / "index" / f"{slide_id}.parquet")
        with open_slide(cohort.path(number), backend="openslide") as slide, torch.no_grad():
            tiles = [torch.from_numpy(slide.read_region(x, y, 96, 0.5))[None] for x, y in index.coords]
            features = torch.cat([encoder(tile) for tile in tiles])
            output = classifier.network(features[None])
            wanted = torch.softmax(output.logits / classifier.temperature, 1)[0]
        stored = read_features(inferred / "cache" / "features" / f"{slide_id}.h5")
        np.testing.assert_allclose(stored.features, features, atol=2e-2)  # another decoder: a grey level or two
        prediction = prediction_of(inferred, slide_id)
        assert prediction["probabilities"]["positive"] == pytest.approx(float(wanted[1]), abs=2e-2)
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["suspicion"] == pytest.approx(prediction["probabilities"]["positive"])
        assert 0.02 < prediction["suspicion"] < 0.98
        assert prediction["label"] == max(prediction["probabilities"], key=prediction["probabilities"].get)
        table = pd.read_parquet(inferred / slide_id / "tiles.parquet")
        np.testing.assert_array_equal(table[["x", "y"]], index.coords)
        np.testing.assert_allclose(table["attention"], output.attention[0], atol=2e-2)
        assert table["attention"].sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(table["evidence"], table["attention"] * table["score"], rtol=1e-5)
        assert table.sort_values("evidence", ascending=False)["rank"].tolist() == list(range(1, len(table) + 1))


def test_everything_is_there(inferred):
    for slide_id in ("slide_0000", "slide_0001"):
        assert {p.name for p in (inferred / slide_id).iterdir()} == {
            *EVIDENCE.values(),
            "prediction.json",
            "preview.jpg",
        }
    table = pd.read_csv(inferred / "predictions.csv")
    assert table["suspicion"].is_monotonic_decreasing
    assert set(table.columns) >= {"slide_id", "patient_id", "label", "prob_negative", "prob_positive"}
    assert "slide_0001/report.html" in (inferred / "index.html").read_text(encoding="utf-8")
    assert pd.read_csv(inferred / "report.csv")["status"].tolist() == ["done", "done"]
    assert not [p for p in inferred.rglob("*") if ".partial" in p.name]


def test_what_is_current_stays_and_what_is_not_is_made_again(cohort, inferred, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(inferred, out)
    before = states(out)
    everything = {"evidence": list(EVIDENCE)}
    status, report = run_inference(cohort, out, **everything)
    assert status == 0
    assert {item.status for item in report.values()} == {"current"}
    pages = {out / name for name in ("index.html", "predictions.csv", "report.csv")}
    assert {p for p, state in states(out).items() if before.get(p) != state} == pages

    # A file of one slide is gone: that slide's evidence is written again, from the features that are there.
    (out / "slide_0001" / "overlay.png").unlink()
    before = states(out)
    _, report = run_inference(cohort, out, **everything)
    assert {name: item.status for name, item in report.items()} == {"slide_0000": "current", "slide_0001": "done"}
    changed = {p for p, state in states(out).items() if before.get(p) != state} - pages
    assert {p.parent.name for p in changed} == {"slide_0001"}

    # Another encoder with a classifier of its own: everything follows.
    make_classifier(tmp_path / "c.pt", make_encoder(tmp_path / "e.pt", seed=3), seed=3)
    stored = read_features(out / "cache" / "features" / "slide_0000.h5").encoder
    _, report = run_inference(cohort, out, encoder=str(tmp_path / "e.pt"), classifier=str(tmp_path / "c.pt"))
    assert {item.status for item in report.values()} == {"done"}
    assert read_features(out / "cache" / "features" / "slide_0000.h5").encoder != stored


def test_a_changed_slide_is_noticed(cohort, tmp_path):
    scan = tmp_path / "scan.tif"
    shutil.copy(cohort.path(0), scan)
    settings = {"slides": None, "slide": str(scan), "index_dir": str(tmp_path / "index")}
    run_inference(cohort, tmp_path / "out", **settings)
    first = prediction_of(tmp_path / "out", "scan")
    shutil.copy(cohort.path(1), scan)
    _, report = run_inference(cohort, tmp_path / "out", **settings)
    second = prediction_of(tmp_path / "out", "scan")
    assert report["scan"].status == "done"
    assert first["made_from"]["slide"] != second["made_from"]["slide"]
    assert first["tiles"]["nuclei"] != second["tiles"]["nuclei"]


def test_bad_slides_cost_only_themselves(cohort, tmp_path):
    whole = cohort.path(0).read_bytes()
    (tmp_path / "torn.tif").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.tif").write_bytes(b"")
    (tmp_path / "strange.xyz").write_bytes(b"\x00" * 4000)
    write_pyramid(tmp_path / "glass.tif", np.full((1024, 1024, 3), 240, np.uint8), 0.25)
    write_pyramid(tmp_path / "unscaled.tif", np.full((1024, 1024, 3), 240, np.uint8), 40.0)
    names = ["torn.tif", "none.tif", "missing.tif", "strange.xyz", "glass.tif", "unscaled.tif"]
    lines = [f"{name.split('.')[0]},{name}" for name in names] + [f"good,{cohort.path(1)}"]
    (tmp_path / "slides.csv").write_text("slide_id,path\n" + "\n".join(lines) + "\n")
    out = tmp_path / "out"
    settings = {"index_dir": str(tmp_path / "index"), "evidence": ["tiles", "report"]}
    status, report = run_inference(cohort, out, slides=str(tmp_path / "slides.csv"), **settings)
    assert status == EXIT_PARTIAL
    assert report["good"].status == "done"
    assert report["glass"].status == "empty"
    failed = {name: item.message for name, item in report.items() if item.status == "failed"}
    assert set(failed) == {"torn", "none", "missing", "strange", "unscaled"}
    for name, word in {"torn": "truncated", "missing": "does not exist", "none": "empty", "unscaled": "mpp"}.items():
        assert word in failed[name]
    for name, message in failed.items():
        assert name in message  # it names the file
        assert "\n" not in message

    glass = prediction_of(out, "glass")
    assert (glass["status"], glass["label"], glass["suspicion"], glass["probabilities"]) == (
        "no_cells",
        None,
        None,
        None,
    )
    page = (out / "glass" / "report.html").read_text(encoding="utf-8").lower()
    assert "no cells found" in page
    assert "positive" not in page
    assert "negative" not in page
    index = (out / "index.html").read_text(encoding="utf-8")
    assert all(name in index for name in report)
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"good", "glass", "cache"}
    table = pd.read_csv(out / "predictions.csv").set_index("slide_id")
    assert table.loc["glass", "status"] == "no_cells"
    assert pd.isna(table.loc["glass", "suspicion"])
    assert (table.loc[list(failed), "status"] == "failed").all()


def test_all_bad_is_status_one(cohort, tmp_path):
    status, report = run_inference(cohort, tmp_path / "out", slides=None, slide=str(tmp_path / "missing.svs"))
    assert status == 1
    assert report["missing"].status == "failed"
    assert "No slide has a prediction" in (tmp_path / "out" / "index.html").read_text()


def test_a_full_disk_costs_the_slide_and_leaves_nothing_half(cohort, tmp_path, monkeypatch):
    real = evidence.draw_overlay

    def full(path, *arguments):
        if "slide_0000" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(evidence, "draw_overlay", full)
    status, report = run_inference(cohort, tmp_path, evidence=["overlay"])
    assert status == EXIT_PARTIAL
    assert "No space left on device" in report["slide_0000"].message
    assert report["slide_0001"].status == "done"
    assert not (tmp_path / "slide_0000" / "prediction.json").exists()
    monkeypatch.undo()
    status, report = run_inference(cohort, tmp_path, evidence=["overlay"])
    assert status == 0
    assert {name: item.status for name, item in report.items()} == {"slide_0000": "done", "slide_0001": "current"}


def _killed(cohort, out, place):
    """Run inference and die without warning: while the second slide's file is half written."""
    torch.set_num_threads(1)

    def half(path, *arguments, **_):
        if "slide_0001" in str(path):
            with atomic_path(path) as partial:
                partial.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *arguments)

    module, name = place
    real = getattr(module, name)
    setattr(module, name, half)
    run_inference(cohort, out, evidence=["tiles", "overlay"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", ["features", "evidence"])
def test_killed_in_the_midst_it_goes_on_where_it_was(cohort, inferred, tmp_path, step):
    place = (embedder, "write_features") if step == "features" else (evidence, "draw_overlay")
    child = multiprocessing.get_context("fork").Process(target=_killed, args=(cohort, tmp_path, place))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    half = [p for p in tmp_path.rglob("*") if ".partial" in p.name]
    assert half  # it died in the midst of writing
    assert not (tmp_path / "slide_0001" / "prediction.json").exists()
    features = states(tmp_path / "cache" / "features")
    status, report = run_inference(cohort, tmp_path, evidence=["tiles", "overlay"])
    assert status == 0
    assert report["slide_0001"].status == "done"
    for path, state in features.items():
        if path not in half:
            assert states(tmp_path / "cache" / "features")[path] == state  # what was whole is not made again
    for slide_id in ("slide_0000", "slide_0001"):
        assert prediction_of(tmp_path, slide_id)["probabilities"] == prediction_of(inferred, slide_id)["probabilities"]
        wanted = pd.read_parquet(inferred / slide_id / "tiles.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / slide_id / "tiles.parquet"), wanted)


def caught(function, *arguments, **named):
    """The error that a workflow raised, out of what MONAI or Ignite wraps it in."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - looked at by the caller
        function(*arguments, **named)
    return raised.value.__cause__ or raised.value


def test_models_that_do_not_fit_stop_the_run_before_the_first_slide(cohort, tmp_path):
    out = tmp_path / "out"
    wide = make_encoder(tmp_path / "wide.pt", width=32)
    content = torch.load(cohort.encoder, weights_only=True)
    content["state_dict"] = wide.state_dict()
    torch.save(content, tmp_path / "mixed.pt")
    (tmp_path / "torn.pt").write_bytes(cohort.encoder.read_bytes()[:500])
    cases = {
        "does not exist": {"encoder": str(tmp_path / "none.pt")},
        "trained on the encoder": {"encoder": str(tmp_path / "wide.pt")},
        "do not fit": {"encoder": str(tmp_path / "mixed.pt")},
        "cannot be read": {"encoder": str(tmp_path / "torn.pt")},
        "not a classifier file": {"classifier": str(cohort.encoder)},
        "no such file; give a classifier": {"classifier": str(tmp_path / "none.pt")},
        "is unknown to": {"negative_class": "benign"},
    }
    for word, overrides in cases.items():
        error = caught(run_inference, cohort, out, **overrides)
        assert isinstance(error, CheckpointError), (word, error)
        assert pd.Series([str(error)]).str.contains(word).all(), error
    assert not list(out.rglob("*.h5"))
    assert not list(out.rglob("prediction.json"))


def test_an_encoder_that_gives_nan_is_told(cohort, tmp_path):
    encoder, meta = load_encoder(cohort.encoder)
    with torch.no_grad():
        encoder.network.norm.weight.fill_(3e38)  # finite weights, features that are not
    save_encoder(tmp_path / "nan.pt", encoder, meta)
    make_classifier(tmp_path / "c.pt", encoder)
    settings = {"encoder": str(tmp_path / "nan.pt"), "classifier": str(tmp_path / "c.pt")}
    status, report = run_inference(cohort, tmp_path / "out", **settings)
    assert status == 1
    assert all("NaN" in item.message for item in report.values())


def test_features_of_another_encoder_are_not_taken(cohort, inferred, tmp_path):
    """A file of the same slide in the feature folder, of another encoder or without a word on it: embedded again."""
    for name in ("slide_0000", "slide_0001"):
        wrong = read_features(inferred / "cache" / "features" / f"{name}.h5")
        attrs = {**wrong.attrs, "encoder": "0123456789abcdef"}
        write_features(tmp_path / "features" / f"{name}.h5", wrong.features * 0 + 1, wrong.coords, attrs)
    run_inference(cohort, tmp_path / "out", features_dir=str(tmp_path / "features"))
    again = prediction_of(tmp_path / "out", "slide_0000")
    assert again["suspicion"] == prediction_of(inferred, "slide_0000")["suspicion"]


def test_input_is_one_slide_a_table_or_a_folder(cohort, tmp_path):
    out = tmp_path / "out"
    _, report = run_inference(cohort, out, slides=None, dataset_dir=str(cohort.slides.parent))
    assert set(report) == {"slide_0000", "slide_0001"}
    for overrides in ({"slides": None}, {"slide": str(cohort.path(0))}):
        error = caught(run_inference, cohort, out, **overrides)
        assert isinstance(error, TableError)
        assert "give one of --slide" in str(error)
    assert "holds no slide" in str(caught(run_inference, cohort, out, slides=None, dataset_dir=str(out)))
    assert "one of tiles, overlay" in str(caught(run_inference, cohort, out, evidence=["tiles", "video"]))
    assert "index_settings" in str(caught(run_inference, cohort, out, index_settings={"min_cells": 3}))


def test_only_what_is_asked_for_is_written(cohort, inferred, tmp_path):
    settings = {"features_dir": str(inferred / "cache" / "features"), "index_dir": str(inferred / "cache" / "index")}
    run_inference(cohort, tmp_path, evidence=["tiles", "geojson"], **settings)
    assert {p.name for p in (tmp_path / "slide_0000").iterdir()} == {
        "prediction.json",
        "tiles.parquet",
        "tiles.geojson",
    }


def test_folds_are_averaged(cohort, inferred, tmp_path):
    encoder, _ = load_encoder(cohort.encoder)
    folds = [str(make_classifier(tmp_path / f"{i}.pt", encoder, seed=i)) for i in range(3)]
    settings = {"features_dir": str(inferred / "cache" / "features")}
    run_inference(cohort, tmp_path / "all", classifier=folds, evidence=["report"], **settings)
    alone = []
    for fold in folds:
        run_inference(cohort, tmp_path / fold[-4], classifier=fold, **settings)
        alone.append(prediction_of(tmp_path / fold[-4], "slide_0001")["suspicion"])
    prediction = prediction_of(tmp_path / "all", "slide_0001")
    assert prediction["suspicion"] == pytest.approx(np.mean(alone))
    assert prediction["suspicion_spread"] == pytest.approx(np.std(alone))
    assert "3 folds of ABMIL" in (tmp_path / "all" / "slide_0001" / "report.html").read_text()


def test_a_slide_of_the_training_is_told(cohort, inferred, tmp_path):
    classifier = load_classifier(cohort.classifier)
    classifier.meta["seen"] = seen_digests([{"slide_id": "slide_0001", "patient_id": "slide_0001"}])
    save_classifier(tmp_path / "seen.pt", classifier)
    settings = {"features_dir": str(inferred / "cache" / "features"), "evidence": ["report"]}
    run_inference(cohort, tmp_path / "out", classifier=str(tmp_path / "seen.pt"), **settings)
    for slide, seen in (("slide_0000", False), ("slide_0001", True)):
        assert prediction_of(tmp_path / "out", slide)["seen_in_training"] is seen
        page = (tmp_path / "out" / slide / "report.html").read_text(encoding="utf-8")
        assert ("The classifier has seen this slide" in page) is seen


def test_an_unforeseen_error_costs_only_its_slide(cohort, tmp_path, monkeypatch, caplog):
    real = evidence.draw_overlay

    def faulty(path, *arguments):
        if "slide_0000" in str(path):
            raise ZeroDivisionError("who would have thought")
        return real(path, *arguments)

    monkeypatch.setattr(evidence, "draw_overlay", faulty)
    status, report = run_inference(cohort, tmp_path, evidence=["overlay"])
    assert status == EXIT_PARTIAL
    assert report["slide_0000"].message.startswith("ZeroDivisionError: who would have thought")
    assert report["slide_0001"].status == "done"
    assert "Traceback" in caplog.text


def test_the_last_line_is_the_sentence(cohort, tmp_path, capsys, monkeypatch):
    """What a person sees of a run that MONAI's configuration wraps in errors of its own."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as raised:
        run_inference(cohort, tmp_path, encoder=str(tmp_path / "none.pt"))
    sys.excepthook(raised.type, raised.value, raised.tb)
    first = capsys.readouterr().err.strip().splitlines()[0]
    assert first.startswith(f"error: encoder {tmp_path / 'none.pt'} does not exist")
    monkeypatch.setenv("CYTOSSL_TRACEBACK", "1")
    sys.excepthook(raised.type, raised.value, raised.tb)
    assert "Traceback" in capsys.readouterr().err


def test_attention_heads_are_drawn_where_they_are_asked_for(cohort, tmp_path):
    status, _ = run_inference(cohort, tmp_path, evidence=["heads"])
    assert status == 0
    pictures = sorted(tmp_path.rglob("attention_heads.png"))
    assert pictures
    assert all(Image.open(path).size[0] > 2 * 96 for path in pictures)
    assert not list(tmp_path.rglob("gallery.png"))
