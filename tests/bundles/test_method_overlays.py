"""The overlays less, svdd, reference, discriminant, vpu and lora, from input to file by a bundle's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cytossl_monai.data import read_slide_table, write_features
from cytossl_monai.data.bags.dataset import BagDataset
from cytossl_monai.data.bags.items import bag_items
from cytossl_monai.engines.bundle import run_training
from cytossl_monai.engines.mil.trainer import standardise
from cytossl_monai.inference import SlideClassifier
from cytossl_monai.networks.files import load_classifier, load_encoder
from cytossl_monai.networks.lora import has_lora
from cytossl_monai.networks.mil.cytology.discriminant import CellDiscriminant
from cytossl_monai.networks.mil.cytology.less import LESS
from cytossl_monai.networks.mil.cytology.reference import ReferenceBank
from cytossl_monai.networks.mil.cytology.svdd import DeepSVDD
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.utils.program import sentence


def bags(folder: Path, scales: int | None, kinds: tuple[str, ...] = ("negative", "positive")) -> dict[str, Any]:
    """Twelve bags of ten tiles; positives hold two that lie elsewhere. The settings that name them."""
    rng = np.random.default_rng(0)
    lines = ["slide_id,path,label,patient_id"]
    for number in range(12):
        kind = kinds[number % len(kinds)]
        tiles = rng.standard_normal((10, 8)).astype(np.float32)
        tiles[:2] += 5.0 * (kind == "positive")
        attrs = {"encoder": "abc", "encoder_name": "toy", **({} if scales is None else {"scales": scales})}
        write_features(folder / "features" / f"s{number}.h5", tiles, np.zeros((10, 2), int), attrs)
        lines.append(f"s{number},s{number}.svs,{kind},p{number}")
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    names = {"slides": "slides.csv", "features_dir": "features", "output_dir": "out", "model_path": "out/model.pt"}
    return {**{key: str(folder / name) for key, name in names.items()}, "classes": ["negative", "positive"]}


def mil(repo_root: Path, overlay: str, data: dict[str, Any], **settings: Any) -> None:
    configs = repo_root / "bundles" / "cytossl_mil" / "configs"
    files = [configs / "train.json", repo_root / "configs" / "mil" / f"{overlay}.yaml"]
    given = {"device": "cpu", "epochs": 2, "min_epochs": 1, **settings}
    run_training(files, given, data)
    run_training(
        [*files[:1], files[1], configs / "evaluate.json"], {**given, "evaluate_on": "all", "n_resamples": 5}, data
    )


@pytest.mark.parametrize(
    ("overlay", "network", "scales"),
    [
        ("less", LESS, 2),
        ("svdd", DeepSVDD, None),
        ("reference", ReferenceBank, None),
        ("discriminant", CellDiscriminant, None),
    ],
    ids=["less", "svdd", "reference", "discriminant"],
)
def test_mil_overlays(overlay: str, network: type, scales: int | None, repo_root: Path, tmp_path: Path) -> None:
    mil(repo_root, overlay, bags(tmp_path, scales), epochs=15 if overlay == "svdd" else 2)
    classifier = load_classifier(tmp_path / "out" / "model.pt")
    assert isinstance(classifier.network, network)
    told = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert told["n_slides"] == 12
    assert set(told["metrics"]) >= {"auc", "recall", "precision", "specificity"}
    if overlay != "less":
        assert told["metrics"]["auc"]["value"] > 0.9  # positives lie far off


def test_a_method_in_closed_form_learns_from_the_validation_slides_and_calibrates_itself(
    repo_root: Path, tmp_path: Path
) -> None:
    data = bags(tmp_path, None)
    table = tmp_path / "slides.csv"
    lines = table.read_text().splitlines()
    splits = [f"{line},{'val' if number in (4, 7, 9) else 'train'}" for number, line in enumerate(lines[1:])]
    table.write_text("\n".join([lines[0] + ",split", *splits]) + "\n")
    mil(repo_root, "discriminant", data, epochs=1)
    classifier = load_classifier(tmp_path / "out" / "model.pt")
    assert float(classifier.temperature) == 1.0
    train = [line for line in splits if line.endswith("train")]
    positive = sum(",positive," in line for line in train) / len(train)
    torch.testing.assert_close(classifier.prevalence, torch.tensor([1 - positive, positive]))
    shift = float(classifier.bias[1] - classifier.bias[0])
    assert shift == pytest.approx(np.log(positive / (1 - positive)), abs=1e-6)  # from classes of equal shares
    assert classifier.meta["validation"] is None  # nothing was held out for it
    assert SlideClassifier(tmp_path / "out" / "model.pt").calibrated

    items = bag_items(read_slide_table(table), tmp_path / "features", classes=["negative", "positive"])
    parts = [BagDataset([item for item in items if item["split"] == name]) for name in ("train", "val")]
    wanted = standardise(CellDiscriminant(8), parts[0], parts[1])
    torch.testing.assert_close(classifier.network.directions, wanted.directions)
    fewer, twice = standardise(CellDiscriminant(8), parts[0]), standardise(CellDiscriminant(8), parts[0], parts[0])
    assert not torch.allclose(fewer.directions, wanted.directions)
    torch.testing.assert_close(twice.slope, fewer.slope)  # few_shot validates on its training slides: not learned twice


def refusal(overlay: str, data: dict[str, Any], repo_root: Path) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it; the sentence is looked at
        mil(repo_root, overlay, data)
    return str(sentence(caught.value))


def test_less_refuses_features_of_one_scale(repo_root: Path, tmp_path: Path) -> None:
    assert "embed the slides with two_scales on" in refusal("less", bags(tmp_path, 1), repo_root)


def test_one_class_learning_needs_negative_slides(repo_root: Path, tmp_path: Path) -> None:
    told = refusal("svdd", bags(tmp_path, None, ("positive",)), repo_root)
    assert "negative" in told


def pretrain(repo_root: Path, overlays: list[str], data: dict[str, Any], **settings: Any) -> None:
    files = [repo_root / "bundles/cytossl_pretrain/configs/train.json"]
    files += [repo_root / "configs" / f"{overlay}.yaml" for overlay in overlays]
    small = {"steps": 1, "epoch_length": 1, "batch_size": 4, "num_workers": 0, "input_size": 32}
    run_training(files, {**small, "tensorboard": False, **settings}, data)


@pytest.mark.filterwarnings("ignore")
def test_vpu_learns_from_the_labels_of_slides(repo_root: Path, cohort: Any, tmp_path: Path) -> None:
    benign = next(record.label for record in read_slide_table(cohort.slides))
    data = {"index_dir": str(cohort.index), "slides": str(cohort.slides), "benign": benign}
    data["output_dir"] = str(tmp_path / "out")
    settings = {"backbone#num_layers": 1, "backbone#num_keys": 3, "steps": 2, "epoch_length": 2, "batch_size": 8}
    pretrain(repo_root, ["ssl/vpu"], data, **settings)
    encoder, meta = load_encoder(tmp_path / "out" / "models" / "model.pt")
    assert meta["method"] == "VPU"
    assert encoder(torch.zeros(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        pretrain(repo_root, ["ssl/vpu"], {**data, "benign": "nobody", "output_dir": str(tmp_path / "none")}, **settings)
    assert "no benign slides" in str(sentence(caught.value))


@pytest.mark.filterwarnings("ignore")
def test_lora_on_a_published_vit(repo_root: Path, cohort: Any, tmp_path: Path) -> None:
    shape = {"img_size": 32, "patch_size": 8, "hidden_size": 64, "mlp_dim": 64, "num_layers": 2, "num_heads": 1}
    vit = SRTransformer(3, **shape, class_token=True, norm_eps=1e-6)  # type: ignore[arg-type]
    torch.save({"teacher": vit.state_dict()}, tmp_path / "vit.pth")
    data = {
        "index_dir": str(cohort.index),
        "vit_weights": str(tmp_path / "vit.pth"),
        "output_dir": str(tmp_path / "out"),
    }
    settings = {"views#n_local": 0, "prototypes": 16, "head_hidden_dim": 16, "lora_rank": 2, "base_lr": 1.0}
    pretrain(repo_root, ["backbone/published_vit", "backbone/lora"], data, steps=3, epoch_length=3, **settings)
    encoder, _ = load_encoder(tmp_path / "out" / "models" / "model.pt")
    assert not has_lora(encoder)  # what is written is a plain network
    own, published = encoder.network.state_dict(), vit.state_dict()
    change = own["blocks.0.attn.qkv.weight"] - published["blocks.0.attn.qkv.weight"]
    assert 0 < int(torch.linalg.matrix_rank(change, atol=1e-6)) <= 2
    assert torch.equal(own["blocks.0.mlp.linear1.weight"], published["blocks.0.mlp.linear1.weight"])


@pytest.mark.filterwarnings("ignore")
def test_pretraining_by_known_nuclei_looks_for_none(
    repo_root: Path, cohort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's recipe with the index's own nuclei: through every part of ``train.json``."""
    monkeypatch.setattr("cytossl_monai.transforms.nuclei.mask.nuclei_mask", lambda *_: pytest.fail("nuclei are known"))
    data = {"index_dir": str(cohort.index), "output_dir": str(tmp_path / "out"), "nuclei_source": "index"}
    settings = {"views#n_local": 0, "prototypes": 16, "head_hidden_dim": 16, "backbone#num_layers": 1}
    pretrain(repo_root, [], data, **settings, **{"backbone#num_keys": 3})
    assert (tmp_path / "out" / "models" / "model.pt").is_file()
    assert len(list((cohort.index / "outlines").glob("*.parquet"))) == len(list(cohort.index.glob("*.parquet")))
