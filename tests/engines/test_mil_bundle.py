"""The bundle's configurations from end to end, on toy cohorts."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from mil_toy import make_cohort
from monai.bundle import ConfigWorkflow

from cytossl_monai.data.bags.features import write_features
from cytossl_monai.engines.bundle import as_data, run_training
from cytossl_monai.engines.mil.cross_validate import cross_validate
from cytossl_monai.engines.mil.few_shot import draw_shots, few_shot_curve
from cytossl_monai.engines.mil.predict import inference_items
from cytossl_monai.networks.files import load_classifier
from cytossl_monai.utils.errors import CheckpointError, FeatureError, InputError, RunError, SettingError, TableError
from cytossl_monai.utils.locks import LOCK_NAME, LockedError, folder_lock
from cytossl_monai.utils.program import plain_cause
from cytossl_monai.utils.report import RunReport


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("ignite").setLevel(logging.WARNING)


@pytest.fixture
def configs(repo_root):
    return repo_root / "bundles" / "cytossl_mil" / "configs"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    make_cohort(root)
    return root


def given(root, **more):
    return {"slides": str(root / "slides.csv"), "features_dir": str(root / "features"), "device": "cpu", **more}


@pytest.fixture(scope="module")
def trained(cohort, request):
    configs = request.config.rootpath / "bundles" / "cytossl_mil" / "configs"
    run_training([configs / "train.json"], given(cohort, output_dir=str(cohort / "out"), epochs=25, lr=2e-3))
    return cohort


def test_train_evaluate_infer(trained, configs):
    out = trained / "out"
    log = pd.read_csv(out / "log.csv")
    classifier = load_classifier(out / "model.pt")
    assert classifier.meta["validation"]["auc"] == pytest.approx(log["val_auc"].max())
    assert classifier.encoder.items() >= {"hash": "abc", "name": "toy", "dim": 12}.items()
    assert not torch.equal(classifier.network.feature_std, torch.ones(12))
    overrides = given(trained, output_dir=str(out), n_resamples=50, evaluate_on="all")
    run_training([configs / "train.json", configs / "evaluate.json"], overrides)
    told = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert told["n_slides"] == 30
    assert set(told["metrics"]) >= {"accuracy", "balanced_accuracy", "auc", "f1", "sensitivity_at_95_specificity"}
    auc = told["metrics"]["auc"]
    assert 0.9 <= auc["value"] <= 1.0
    assert auc["low"] <= auc["value"] <= auc["high"]
    for name in ("roc.png", "confusion_matrix.png"):
        assert (out / "evaluation" / name).read_bytes()[:4] == b"\x89PNG"
    table = pd.read_csv(out / "evaluation" / "predictions.csv")
    assert len(table) == 30
    tiles = pd.read_parquet(out / "evaluation" / "attention" / "s1.parquet")
    assert tiles["attention"].sum() == pytest.approx(1.0, abs=1e-4)

    inference = ConfigWorkflow(
        str(configs / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        **{"features_dir": str(trained / "features"), "classifier": str(out / "model.pt"), "device": "cpu"},
        output_dir=str(trained / "inference"),
    )
    inference.initialize()
    assert inference.check_properties() == []
    inference.run()
    again = pd.read_csv(trained / "inference" / "predictions.csv").set_index("slide_id")
    wanted = table.set_index("slide_id").loc[again.index]
    np.testing.assert_allclose(again["prob_positive"], wanted["prob_positive"], atol=1e-5)


def test_validation_at_intervals(trained, configs, tmp_path):
    """Epochs without a validation are none to judge; a training without any has no best classifier."""
    run_training([configs / "train.json"], given(trained, output_dir=str(tmp_path), epochs=5, val_interval=2))
    assert pd.read_csv(tmp_path / "log.csv")["epoch"].tolist() == [2, 4]
    assert load_classifier(tmp_path / "model.pt").meta["validation"]["epoch"] in (2, 4)
    with pytest.raises(RuntimeError) as caught:
        run_training(
            [configs / "train.json"], given(trained, output_dir=str(tmp_path / "no"), epochs=2, val_interval=3)
        )
    assert str(plain_cause(caught.value)).startswith("nothing was validated in 2 epochs")


@pytest.mark.parametrize(
    ("error", "told", "logged"),
    [
        (ZeroDivisionError("of the network"), "ZeroDivisionError: of the network; nobody expected this", True),
        (OSError(28, "No space left on device", "x.pt"), "No space left on device: x.pt)", False),
    ],
)
def test_a_fault_of_all_folds_is_named_once(trained, configs, tmp_path, monkeypatch, caplog, error, told, logged):
    def fail(*_: object) -> None:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("Failed to evaluate ConfigExpression") from inner  # as MONAI does

    monkeypatch.setattr("cytossl_monai.engines.mil.folds.run_training", fail)
    common = (configs / "train.json", trained / "slides.csv", trained / "features", tmp_path)
    with pytest.raises(RunError) as caught:
        cross_validate(*common, n_folds=3, num_workers=0)
    assert str(caught.value).startswith(f"3 of 3 folds failed (fold 0, fold 1, fold 2: {told}")
    assert ("Traceback" in caplog.text) == logged


def test_train_properties(trained, configs, tmp_path):
    overrides = given(trained, output_dir=str(tmp_path))
    train = ConfigWorkflow(str(configs / "train.json"), workflow_type="train", logging_file=False, **overrides)
    train.initialize()
    assert train.check_properties() == []
    assert train.max_epochs == 60
    assert len(train.train_dataset) == 24
    assert train.evaluator is not None


def test_inference_leaves_out_what_it_cannot_use(trained, tmp_path):
    classifier = load_classifier(trained / "out" / "model.pt")
    good = (trained / "features" / "s0.h5").read_bytes()
    (tmp_path / "good.h5").write_bytes(good)
    (tmp_path / "torn.h5").write_bytes(good[:200])
    place = np.zeros((2, 2), int)
    write_features(tmp_path / "wide.h5", np.ones((2, 13), "f4"), place, {"encoder": "abc"})
    write_features(tmp_path / "other.h5", np.ones((2, 12), "f4"), place, {"encoder": "xyz"})
    report = RunReport("classify", tmp_path / "report.csv")
    assert [i["slide_id"] for i in inference_items(tmp_path, classifier, report=report)] == ["good"]
    assert {i.item for i in report.left_out} == {"torn", "wide", "other"}
    assert report.exit_code == 3
    (tmp_path / "good.h5").unlink()
    with pytest.raises(FeatureError, match="no usable feature file"):
        inference_items(tmp_path, classifier)


def test_inference_without_weights_stops(trained, configs, tmp_path):
    # The stand-in has the width of these features, so that only the missing weights can stop it.
    workflow = ConfigWorkflow(
        str(configs / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        features_dir=str(trained / "features"),
        classifier=str(tmp_path / "none.pt"),
        output_dir=str(tmp_path),
        in_features=12,
        device="cpu",
    )
    workflow.initialize()
    with pytest.raises((CheckpointError, RuntimeError)) as caught:
        workflow.run()
    assert "does not exist" in str(caught.value.__cause__ or caught.value)
    assert not (tmp_path / "predictions.csv").exists()


@pytest.mark.parametrize("target", ["ordinal", "multilabel"])
def test_other_targets_train(configs, tmp_path, target):
    names = ("low", "mid", "high")
    make_cohort(tmp_path, classes=names)
    settings = given(tmp_path, output_dir=str(tmp_path / "o"), epochs=3, target=target, n_folds=3)
    run_training([configs / "train.json"], {**settings, "classes": list(names)})
    classifier = load_classifier(tmp_path / "o" / "model.pt")
    assert classifier.target == target
    assert classifier.classes == list(names)
    assert classifier(torch.randn(1, 4, 12)).shape == (1, 3)


def test_cross_validation_is_honest_and_resumable(trained, configs, tmp_path, monkeypatch):
    def run(**overrides):
        return cross_validate(
            configs / "train.json",
            trained / "slides.csv",
            trained / "features",
            tmp_path,
            n_folds=3,
            overrides={"epochs": 12, "min_epochs": 5, "lr": 2e-3, "device": "cpu", **overrides},
            num_workers=0,
            n_resamples=50,
        )

    first = run()
    assert first.intervals["auc"].value > 0.8
    for fold in range(3):
        held = json.loads((tmp_path / f"fold_{fold}" / "fold.json").read_text())["slides"]
        assert sorted(held) == sorted(s for s, f in zip(first.slides, first.folds) if f == fold)
    ensemble = load_classifier(first.ensemble)
    members = [load_classifier(tmp_path / f"fold_{f}" / "model.pt") for f in range(3)]
    x = torch.randn(2, 8, 12)
    torch.testing.assert_close(ensemble(x), torch.stack([m(x) for m in members]).mean(0), atol=1e-5, rtol=1e-4)

    runs = []
    original = run_training
    monkeypatch.setattr("cytossl_monai.engines.mil.folds.run_training", lambda *a: runs.append(1) or original(*a))
    second = run()
    assert not runs
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    (tmp_path / "fold_1" / "fold.json").unlink()
    run()
    assert len(runs) == 1
    other = (tmp_path / "fold_2" / "model.pt").read_bytes()  # a run of other settings was killed before its fold.json
    (tmp_path / "fold_1" / "model.pt").write_bytes(other)
    third = run()
    assert len(runs) == 2
    np.testing.assert_array_equal(first.probabilities, third.probabilities)
    assert (tmp_path / "fold_1" / "model.pt").read_bytes() != other
    run(epochs=6)
    assert len(runs) == 5


def test_cross_validation_bad_input(trained, configs, tmp_path):
    common = (configs / "train.json", trained / "slides.csv", trained / "features", tmp_path)
    with pytest.raises(TableError, match="the table has 28"):
        cross_validate(*common, n_folds=29)
    with pytest.raises(TableError, match="at least 3 folds"):
        cross_validate(*common, n_folds=2)
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist"):  # one path is one overlay
        cross_validate(*common, overlays=str(tmp_path / "nowhere.yaml"))


def test_a_fault_of_the_input_that_fails_every_fold_is_told_once(trained, configs, tmp_path):
    settings = {"device": "cpu", "epochs": 2, "optimizer#lr": "$[][0]"}
    common = (configs / "train.json", trained / "slides.csv", trained / "features", tmp_path)
    with pytest.raises(RunError, match=r"3 of 3 folds failed \(fold 0, fold 1, fold 2: IndexError: list index"):
        cross_validate(*common, n_folds=3, overrides=settings, num_workers=0)
    (tmp_path / "hostile.yaml").write_text("validate#dataset#encoder: {hash: zzz, name: other, dim: 12}\n")
    with pytest.raises(FeatureError, match="not by zzz"):
        cross_validate(*common, n_folds=3, overlays=str(tmp_path / "hostile.yaml"), num_workers=0)


def test_features_of_whole_slides_are_bags_of_one(configs, tmp_path):
    """(D,) of a slide encoder, without coordinates: cross-validated like any other."""
    import h5py

    rng, lines = np.random.default_rng(0), ["slide_id,path,label,patient_id"]
    (tmp_path / "features").mkdir()
    for number in range(24):
        with h5py.File(tmp_path / "features" / f"s{number}.h5", "w") as file:
            file["features"] = (rng.standard_normal(12) + 3 * (number % 2)).astype("f4")
        lines.append(f"s{number},s{number}.svs,{number % 2},p{number}")
    (tmp_path / "slides.csv").write_text("\n".join(lines) + "\n")
    common = (configs / "train.json", tmp_path / "slides.csv", tmp_path / "features", tmp_path / "out")
    overrides = {"epochs": 4, "min_epochs": 1, "lr": 5e-3, "device": "cpu"}
    result = cross_validate(*common, n_folds=3, overrides=overrides, num_workers=0, n_resamples=20)
    assert result.intervals["auc"].value > 0.9


def test_two_at_a_time_in_one_folder_is_refused(trained, configs, tmp_path):
    common = (configs / "train.json", trained / "slides.csv", trained / "features", tmp_path)
    with folder_lock(tmp_path, "few-shot curve"):
        with pytest.raises(LockedError, match="in use by another run: few-shot curve"):
            cross_validate(*common, n_folds=3)
        with pytest.raises(LockedError, match="in use by another run"):
            few_shot_curve(*common, shots=(1,), repeats=1)
        settings = given(trained, output_dir=str(tmp_path), epochs=1)
        with pytest.raises(RuntimeError) as caught:
            run_training([configs / "train.json"], settings)
        assert isinstance(plain_cause(caught.value), LockedError)
        assert "in use by another run: few-shot curve" in str(plain_cause(caught.value))
    assert not (tmp_path / "model.pt").exists()


def test_training_gives_its_folder_back_however_it_ends(trained, configs, tmp_path):
    settings = given(trained, output_dir=str(tmp_path), epochs=1)
    with pytest.raises(RuntimeError):
        run_training([configs / "train.json"], {**settings, "loss": "$lambda *a: [][0]"})
    assert not (tmp_path / LOCK_NAME).exists()
    run_training([configs / "train.json"], settings)
    assert (tmp_path / "model.pt").is_file()
    assert not (tmp_path / LOCK_NAME).exists()


def test_ordinal_slides_get_the_median_grade(tmp_path):
    """Of 0.4, 0.25 and 0.35 the first is the most probable, the second the one in the middle."""
    from cytossl_monai.inference.classify import SlideClassifier
    from cytossl_monai.networks.files import save_classifier
    from cytossl_monai.networks.mil.classifier import MILClassifier
    from cytossl_monai.networks.mil.ensemble import average_probabilities
    from cytossl_monai.networks.mil.pooling import MeanMIL

    network = MeanMIL(4, 2, embed_dim=0)
    torch.nn.init.zeros_(network.classifier.weight)
    wanted = torch.tensor([[0.4, 0.25, 0.35]])
    network.classifier.bias.data = average_probabilities(wanted, "ordinal")[0]
    save_classifier(tmp_path / "m.pt", MILClassifier(network, ["low", "mid", "high"], "ordinal"))
    told = SlideClassifier(tmp_path / "m.pt").predict(np.ones((3, 4), "f4"), None, "slide")
    np.testing.assert_allclose(list(told.probabilities.values()), wanted[0], atol=1e-5)
    assert told.label == "mid"


def test_study_gain_is_the_difference_of_aucs(tmp_path, repo_root):
    import importlib.util
    from types import SimpleNamespace

    from sklearn.metrics import roc_auc_score

    spec = importlib.util.spec_from_file_location("mil_study", repo_root / "scripts" / "study" / "mil.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    rng = np.random.default_rng(0)
    labels, names = np.arange(40) % 2, [f"s{i}" for i in range(40)]
    lines = [f"{name},{name}.svs,{label},p{i // 4}" for i, (name, label) in enumerate(zip(names, labels))]
    (tmp_path / "slides.csv").write_text("slide_id,path,label,patient_id\n" + "\n".join(lines) + "\n")
    scores = {key: labels + noise * rng.standard_normal(40) for key, noise in (("good", 0.3), ("poor", 3.0))}
    one, other = (
        SimpleNamespace(slides=names, labels=labels, probabilities=np.stack([-s, s], 1)) for s in scores.values()
    )
    order = rng.permutation(40)
    other = SimpleNamespace(
        slides=[names[i] for i in order], labels=labels[order], probabilities=other.probabilities[order]
    )
    gain = study.auc_gain(one, other, tmp_path / "slides.csv", 200)
    assert gain.value == pytest.approx(roc_auc_score(labels, scores["good"]) - roc_auc_score(labels, scores["poor"]))
    assert gain.low < gain.value < gain.high
    itself = study.auc_gain(one, one, tmp_path / "slides.csv", 50)
    assert (itself.low, itself.value, itself.high) == (0.0, 0.0, 0.0)


def test_few_shot_draws_are_nested_and_apart():
    labels, patients = np.arange(30) % 2, [f"p{i // 2}" for i in range(30)]
    two, test2 = draw_shots(labels, patients, 2, 5)
    four, test4 = draw_shots(labels, patients, 4, 5)
    assert set(two) <= set(four)
    assert np.array_equal(test2, test4)
    assert not {patients[i] for i in four} & {patients[i] for i in test4}
    assert np.bincount(labels[four]).tolist() == [4, 4]
    with pytest.raises(TableError, match="ask for fewer"):
        draw_shots(labels, patients, 14, 5)


def test_repeats_of_a_few_shot_curve_train_with_seeds_of_their_own(trained, configs, tmp_path, monkeypatch):
    """Repeat r with seed + r, as it is told: in the training itself, not in the draw of the slides alone."""
    import shutil

    seeds = []

    def train(files, overrides, data):
        parser = ConfigWorkflow(list(files), workflow_type="train", logging_file=False, **overrides).parser
        for key, value in data.items():
            parser[key] = as_data(value)
        seeds.append((parser.get_parsed_content("seed"), [i["slide_id"] for i in data["splits"]["train"]]))
        shutil.copy(trained / "out" / "model.pt", data["model_path"])

    monkeypatch.setattr("cytossl_monai.engines.mil.few_shot.run_training", train)
    common = (configs / "train.json", trained / "slides.csv", trained / "features")
    few_shot_curve(*common, tmp_path / "a", shots=(2,), repeats=3, seed=5, num_workers=0)
    first, seeds[:] = list(seeds), []
    few_shot_curve(*common, tmp_path / "b", shots=(2,), repeats=1, seed=6, num_workers=0)
    assert [seed for seed, _ in first] == [5, 6, 7]
    assert seeds == first[1:2]


def test_few_shot_curve(trained, configs, tmp_path):
    arguments = (configs / "train.json", trained / "slides.csv", trained / "features", tmp_path)
    settings = {"shots": [1, 4], "repeats": 2, "num_workers": 0, "overrides": {"epochs": 4, "device": "cpu"}}
    table = few_shot_curve(*arguments, **settings)
    assert table[table["metric"] == "auc"]["shots"].tolist() == [1, 4]
    assert len(pd.read_csv(tmp_path / "few_shot_runs.csv")) == 4
    assert (tmp_path / "few_shot.png").is_file()
    pd.testing.assert_frame_equal(few_shot_curve(*arguments, **settings), table)


@pytest.mark.parametrize("name", ["holdout", "test_fold", "n_folds", "items", "splits"])
@pytest.mark.parametrize("protocol", [cross_validate, few_shot_curve])
def test_what_a_protocol_chooses_itself_is_no_override(protocol, name, trained, configs, tmp_path):
    files = configs / "train.json", trained / "slides.csv", trained / "features", tmp_path
    with pytest.raises(SettingError, match=name):
        protocol(*files, overrides={name: None})
