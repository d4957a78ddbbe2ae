"""Reading ahead, embedding many slides, and classifying their features."""

import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from inference_toy import CONFIGS, make_classifier, make_encoder
from monai.bundle import ConfigWorkflow
from sklearn.metrics import roc_auc_score

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.inference.ahead import read_ahead
from cytossl_monai.inference.classify import SlideClassifier
from cytossl_monai.inference.embed import EmbedTimes, embed_tiles
from cytossl_monai.inference.prepare import warn_of_tile_size
from cytossl_monai.networks.files import load_encoder, save_classifier
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.pooling import MeanMIL
from cytossl_monai.utils.errors import CheckpointError, FeatureError


def test_read_ahead_keeps_order_and_stays_within_bounds():
    begun = []

    def read(i):
        begun.append(i)
        return i * i

    taken = []
    for value in read_ahead(read, 50, ahead=3):
        taken.append(value)
        time.sleep(0.001)
        assert len(begun) <= len(taken) + 3 + 1  # three wait, one is being read
    assert taken == [i * i for i in range(50)]


def test_read_ahead_raises_what_reading_raised_and_ends_its_thread():
    def read(i):
        if i == 2:
            raise FeatureError("tile 2 is broken")
        return i

    got = []
    with pytest.raises(FeatureError, match="tile 2"):
        got.extend(read_ahead(read, 5))
    items = read_ahead(lambda i: i, 1000)
    assert next(items) == 0
    items.close()
    assert not [t for t in threading.enumerate() if t.name == "tile-reader"]


def test_embedding_does_not_depend_on_batches_or_threads(cohort):
    encoder, _ = load_encoder(cohort.encoder)
    index = TileIndex.read(cohort.index / "slide_0001.parquet")
    times = EmbedTimes()
    with open_slide(cohort.path(1)) as slide:
        whole = embed_tiles(slide, index, encoder, batch_size=1000, times=times)
        single = embed_tiles(slide, index, encoder, batch_size=1, num_threads=2)
    assert whole.shape == (len(index), encoder.embed_dim)
    np.testing.assert_allclose(whole, single, atol=1e-5)
    assert times.tiles == len(index)
    assert times.waiting > 0
    assert times.encoder > 0
    assert times.encoder + times.waiting == pytest.approx(times.total)


def test_tiles_of_another_size_than_the_encoder_learned_are_told(cohort, caplog):
    encoder, _ = load_encoder(cohort.encoder)
    assert not warn_of_tile_size(encoder, 96)
    assert warn_of_tile_size(encoder, 224)
    assert "--tile_size 96" in caplog.text
    assert not warn_of_tile_size(torch.nn.Identity(), 224)


def run_embed(cohort, output_dir, **overrides):
    settings = {"slides": str(cohort.slides), "index_dir": str(cohort.index), "encoder": str(cohort.encoder)}
    settings |= {"output_dir": str(output_dir), "device": torch.device("cpu"), "progress": False, **overrides}
    workflow = ConfigWorkflow(str(CONFIGS / "embed.json"), workflow_type="infer", logging_file=False, **settings)
    workflow.initialize()
    with pytest.raises(SystemExit) as stop:
        workflow.run()
    return stop.value.code, pd.read_csv(output_dir / "report.csv").set_index("item")


def test_embed_bundle(cohort, tmp_path):
    status, report = run_embed(cohort, tmp_path)
    assert status == 0
    first = read_features(tmp_path / "slide_0000.h5")
    assert {"encoder", "patch_size", "patch_size_level0", "level0_mpp", "encoder_name"} <= set(first.attrs)
    assert first.attrs["patch_size_level0"] == 192
    status, report = run_embed(cohort, tmp_path)
    assert report["status"].tolist() == ["current", "current"]
    (tmp_path / "slide_0001.h5").write_bytes(b"torn")
    _, report = run_embed(cohort, tmp_path)
    assert report["status"].tolist() == ["current", "done"]
    _, report = run_embed(cohort, tmp_path, dtype="float16")
    assert report["status"].tolist() == ["done", "done"]
    np.testing.assert_allclose(read_features(tmp_path / "slide_0000.h5").features, first.features, atol=2e-3)


def test_embed_names_slides_without_index(cohort, tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text(f"slide_id,path\nslide_0000,{cohort.path(0)}\nnew,{cohort.path(1)}\n")
    status, report = run_embed(cohort, tmp_path / "out", slides=str(table))
    assert status == 3
    assert report.loc["new", "status"] == "failed"
    assert "index the slide first" in report.loc["new", "message"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("tiles of 100 px, patch 8")])
def test_a_slide_that_fails_in_the_encoder_does_not_end_the_run(cohort, tmp_path, monkeypatch, error):
    from cytossl_monai.inference import embed

    def failing(path, record, *args, **kwargs):
        if record.slide_id == "slide_0000":
            raise error
        return original(path, record, *args, **kwargs)

    original = embed.embed_to_file
    monkeypatch.setattr(embed, "embed_to_file", failing)
    status, report = run_embed(cohort, tmp_path)
    assert status == 3
    assert report["status"].tolist() == ["failed", "done"]
    assert str(error) in report.loc["slide_0000", "message"]


@pytest.fixture
def bag():
    return np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)


def test_evidence_is_attention_times_score(cohort, bag):
    prediction = SlideClassifier(cohort.classifier).predict(bag, None, "bag")
    assert prediction.attention.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(prediction.evidence, prediction.attention * prediction.score, rtol=1e-6)
    assert 0 <= prediction.evidence.sum() <= 1
    assert prediction.shown.min() >= 0
    assert prediction.shown.max() <= 1
    alone = [SlideClassifier(cohort.classifier).predict(tile[None], None, "tile").suspicion for tile in bag[:4]]
    np.testing.assert_allclose(prediction.score[:4], alone, atol=1e-5)


def test_a_slide_without_suspicious_tiles_stays_pale(cohort, bag):
    prediction = SlideClassifier(cohort.classifier).predict(bag, None, "bag")
    calm = type(prediction)("negative", {}, 0.01, prediction.attention, np.full(30, 0.01, np.float32), True)
    assert calm.shown.max() <= 0.11
    equal = type(prediction)("positive", {}, 0.9, np.full(30, 1 / 30, np.float32), prediction.score, False)
    np.testing.assert_allclose(equal.shown, np.sqrt(prediction.score))


def test_methods_without_attention_rank_by_score(cohort, bag, tmp_path):
    encoder, _ = load_encoder(cohort.encoder)
    known = {"hash": None, "name": "toy", "dim": encoder.embed_dim}
    save_classifier(tmp_path / "mean.pt", MILClassifier(MeanMIL(16, 2), ["negative", "positive"], encoder=known).eval())
    prediction = SlideClassifier(tmp_path / "mean.pt").predict(bag, None, "bag")
    order = np.argsort(-prediction.evidence)
    assert (np.diff(prediction.score[order]) <= 1e-7).all()


@pytest.mark.parametrize(
    ("classes", "target", "named", "wanted"),
    [
        (["HSIL", "NILM"], "multiclass", None, lambda p: 1 - p["NILM"]),
        (["HSIL", "NILM"], "multiclass", "HSIL", lambda p: 1 - p["HSIL"]),
        (["a", "b", "c"], "multiclass", None, lambda p: 1 - p["a"]),
        (["a", "b"], "multilabel", None, lambda p: max(p.values())),
    ],
)
def test_suspicion_by_target(tmp_path, bag, classes, target, named, wanted):
    classifier = MILClassifier(ABMIL(16, len(classes)), classes, target).eval()
    save_classifier(tmp_path / "c.pt", classifier)
    prediction = SlideClassifier(tmp_path / "c.pt", negative_class=named).predict(bag, None, "bag")
    assert prediction.suspicion == pytest.approx(wanted(prediction.probabilities))
    if target == "multilabel":
        assert prediction.label == ("+".join(k for k, p in prediction.probabilities.items() if p >= 0.5) or "none")


def test_the_order_of_all_but_certain_tiles_stays(tmp_path, bag):
    """One less P(negative) would be 0 for all of them."""
    network = MeanMIL(bag.shape[1], 2, embed_dim=0)
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.weight[1, 0] = 1.0
        network.classifier.bias.copy_(torch.tensor([0.0, -60.0]))
    save_classifier(tmp_path / "classifier.pt", MILClassifier(network, ["negative", "positive"]))
    prediction = SlideClassifier(tmp_path / "classifier.pt").predict(bag, None, "slide")
    np.testing.assert_array_equal(np.argsort(prediction.score), np.argsort(bag[:, 0]))
    assert (prediction.score > 0).all()


@pytest.mark.parametrize(("named", "place"), [(0, 0), ("0", 0), (1, 1), ("1", 1), (None, 0)])
def test_the_negative_class_is_compared_as_text(cohort, tmp_path, named, place):
    """A command line makes a number of 0; the classes of a table are text."""
    path = make_classifier(tmp_path / "c.pt", load_encoder(cohort.encoder)[0], classes=("0", "1"))
    assert SlideClassifier(path, negative_class=named).negative == place
    with pytest.raises(CheckpointError, match=r"the class '2' is unknown to .*c\.pt: it has \['0', '1'\]"):
        SlideClassifier(path, negative_class=2)


def test_features_that_do_not_suit_are_refused(cohort, bag, tmp_path):
    classifier = SlideClassifier(cohort.classifier)
    broken = bag.copy()
    broken[3, 2] = np.nan
    for features, encoder, word in (
        (broken, None, "NaN"),
        (bag[:0], None, "empty bag"),
        (bag[:, :15], None, "15 features"),
        (bag, "0123456789abcdef", "made by the encoder"),
    ):
        with pytest.raises(FeatureError, match=word):
            classifier.predict(features, encoder, "slide.h5")
    other = make_classifier(tmp_path / "o.pt", make_encoder(tmp_path / "e.pt", seed=9))
    with pytest.raises(CheckpointError, match="another encoder"):
        SlideClassifier([cohort.classifier, other])
    encoder, _ = load_encoder(cohort.encoder)
    three = make_classifier(tmp_path / "t.pt", encoder, classes=("a", "b", "c"))
    with pytest.raises(CheckpointError, match="has the classes"):
        SlideClassifier([cohort.classifier, three])
    with pytest.raises(CheckpointError, match="no classifier given"):
        SlideClassifier([])


def test_evidence_finds_planted_tiles_better_than_attention_alone(tmp_path):
    """Bags whose positive ones hold five tiles that lean one way; decoys in all bags lean another way."""
    torch.manual_seed(0)
    bags, labels = torch.randn(60, 60, 16), torch.arange(60) % 2
    lesion, decoy = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    bags[:, 50:55] += 4 * decoy
    bags[labels == 1, :5] += 3.0 * lesion
    network = ABMIL(16, 2, embed_dim=32, attention_dim=16)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    for _ in range(150):
        some = torch.randperm(40)[:20]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(bags[some]).logits, labels[some]).backward()
        optimizer.step()
    save_classifier(tmp_path / "c.pt", MILClassifier(network, ["negative", "positive"]).eval())
    classifier = SlideClassifier(tmp_path / "c.pt")
    truth = np.arange(60) < 5
    aucs = {"evidence": [], "attention": [], "score": []}
    for i in range(41, 60, 2):
        prediction = classifier.predict(bags[i].numpy(), None, "bag")
        for name, values in aucs.items():
            values.append(roc_auc_score(truth, getattr(prediction, name)))
    means = {name: np.mean(values) for name, values in aucs.items()}
    assert means["evidence"] > 0.85
    assert means["evidence"] > means["attention"]
    assert means["evidence"] > means["score"] - 0.02  # where the score alone is right, little is lost
