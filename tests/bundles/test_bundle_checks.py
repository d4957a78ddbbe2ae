"""What the model zoo checks of a bundle, in its order, on the bundles as they are downloaded."""

from __future__ import annotations

import json
import shutil

import monai.bundle.scripts as bundle_scripts
import numpy as np
import pytest
import torch
from conftest import BUNDLES
from monai.bundle import create_workflow, load, onnx_export, verify_metadata, verify_net_in_out

import cytossl_monai
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.nets.encoder import Encoder

SCHEMA = "meta_schema_20240725.json"


def files_of(bundle):
    return {
        "net_id": "network_def",
        "meta_file": str(bundle / "configs" / "metadata.json"),
        "config_file": str(bundle / "configs" / "inference.json"),
        "device": "cpu",
    }


def example(name, batch=1):
    return torch.randn(batch, 64, 192) if name == "cytossl_mil" else torch.rand(batch, 3, 224, 224)


@pytest.fixture(params=BUNDLES)
def name(request):
    return request.param


def test_files_and_versions(installed, name):
    bundle = installed / name
    for file in ("LICENSE", "docs/README.md", "docs/data_license.txt", "large_files.yml", "configs/logging.conf"):
        assert (bundle / file).is_file(), file
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    assert metadata["required_packages_version"]["cytossl-monai"] == cytossl_monai.__version__
    for installed_as, key in (("torch", "pytorch_version"), ("monai", "monai_version"), ("numpy", "numpy_version")):
        assert __import__(installed_as).__version__.split("+")[0] == metadata[key]


def test_metadata_by_the_newest_schema(installed, name, data_root, tmp_path, monkeypatch):
    def instead_of_the_network(url, filepath, **kwargs):
        assert url.endswith(SCHEMA)
        shutil.copyfile(data_root / "schema" / SCHEMA, filepath)

    monkeypatch.setattr(bundle_scripts, "download_url", instead_of_the_network)
    meta = installed / name / "configs" / "metadata.json"
    verify_metadata(meta_file=str(meta), filepath=str(tmp_path / "schema.json"))
    broken = json.loads(meta.read_text())
    del broken["network_data_format"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "broken.json"), filepath=str(tmp_path / "schema.json"))


@pytest.mark.parametrize("weights", ["trained", "absent"])
def test_network_gives_what_the_metadata_say(installed, name, weights):
    settings = files_of(installed / name)
    if weights == "absent":
        settings["classifier" if name == "cytossl_mil" else "encoder"] = "/none.pt"
    verify_net_in_out(**settings)


def test_files_are_such_as_the_zoo_takes(installed, name):
    """Its first steps: files listed elsewhere are fetched, what is needed is there, no single file is over 25 MB."""
    bundle = installed / name
    bundle_scripts.download_large_files(bundle_path=str(bundle))
    for file in ("configs/metadata.json", "configs/inference.json", "models/model.pt", "models/model.ts"):
        assert (bundle / file).is_file(), file
    large = [file for file in bundle.rglob("*") if file.is_file() and file.stat().st_size > 25e6]
    assert not large
    assert not list(bundle.rglob("*.py"))  # code would have to keep to the zoo's style checks


def test_the_checkpoint_exports_as_the_zoo_exports_it(installed, name, tmp_path):
    """Its last step, with its arguments: the root given, the export beside the model, both loaded."""
    bundle = installed / name
    settings = files_of(bundle) | {"bundle_root": str(bundle)}
    verify_net_in_out(**settings)
    made = tmp_path / "verify_model.ts"
    bundle_scripts.ckpt_export(**settings, ckpt_file=str(bundle / "models" / "model.pt"), filepath=str(made))
    x = example(name)
    torch.testing.assert_close(torch.jit.load(made).eval()(x), torch.jit.load(bundle / "models" / "model.ts").eval()(x))


def test_torchscript_loads_and_gives_the_same(installed, name):
    network = load(name, bundle_dir=str(installed), workflow_type="inference", device="cpu").eval()
    scripted, metadata, extra = load(
        name, bundle_dir=str(installed), load_ts_module=True, config_files=("inference.json",), device="cpu"
    )
    assert metadata["version"] == cytossl_monai.__version__
    assert json.loads(extra["inference.json"])["network_def"]
    for batch in (1, 3):
        x = example(name, batch)
        torch.testing.assert_close(scripted.eval()(x), network(x), atol=1e-5, rtol=1e-4)


def test_onnx_gives_the_same(installed, name, tmp_path):
    import onnxruntime

    network = load(name, bundle_dir=str(installed), workflow_type="inference", device="cpu").eval()
    settings = files_of(installed / name)
    onnx_export(**settings, ckpt_file=str(installed / name / "models" / "model.pt"), filepath=str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = example(name)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, network(x).detach().numpy(), atol=1e-4)


def test_load_gives_the_trained_network(installed, cohort, name):
    network = load(name, bundle_dir=str(installed), workflow_type="inference", device="cpu")
    assert network.trained
    if name == "cytossl_mil":
        assert isinstance(network, MILClassifier)
        assert float(network.temperature) == pytest.approx(1.3)
        return
    encoder, _ = load_encoder(cohort.encoder)
    for key, value in encoder.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


def test_load_for_training(installed, cohort, tmp_path):
    """To go on from released weights; they lie under ``state_dict`` in the file. cytossl_inference trains nothing."""
    more = {"bundle_dir": str(installed), "workflow_type": "train", "device": "cpu", "key_in_ckpt": "state_dict"}
    arguments = tmp_path / "pretrain.json"
    tiny = {"_target_": "cytossl_monai.networks.sr_vit_tiny", "num_layers": 1}
    arguments.write_text(json.dumps({"backbone": tiny, "output_dir": str(tmp_path)}))
    network = load("cytossl_pretrain", args_file=str(arguments), **more).eval()
    assert isinstance(network, Encoder)
    x = example("cytossl_pretrain")
    torch.testing.assert_close(network(x), load_encoder(cohort.encoder)[0](x))

    arguments = tmp_path / "mil.json"
    arguments.write_text(json.dumps({"slides": str(cohort.slides), "features_dir": str(cohort.features), "n_folds": 2}))
    network = load("cytossl_mil", args_file=str(arguments), **more)
    assert float(network.temperature) == pytest.approx(1.3)


def workflows(cohort, out):
    """(bundle, workflow_type, overrides) of everything that a user can run."""
    data = {"slides": str(cohort.slides), "device": "$torch.device('cpu')", "output_dir": str(out)}
    split = {"n_folds": 2, "features_dir": str(cohort.features), "seed": 0}
    given = {"index_dir": str(cohort.index), "progress": False}
    return {
        "pretrain": ("cytossl_pretrain", "train", {k: v for k, v in data.items() if k != "slides"} | given),
        "embed": ("cytossl_pretrain", "inference", data | given),
        "mil": ("cytossl_mil", "train", data | split),
        "classify": ("cytossl_mil", "inference", data | {"features_dir": str(cohort.features)}),
        "infer": ("cytossl_inference", "inference", data | given),
    }


@pytest.mark.parametrize("run", ["pretrain", "embed", "mil", "classify", "infer"])
def test_properties(installed, cohort, tmp_path, run):
    name, kind, overrides = workflows(cohort, tmp_path / "out")[run]
    overrides.pop("progress", None) if run == "pretrain" else None
    workflow = create_workflow(
        config_file=str(installed / name / "configs" / f"{kind}.json"),
        workflow_type=kind,
        logging_file=False,
        **overrides,
    )
    assert workflow.check_properties() == []
    assert workflow.bundle_root == str(installed / name)
    workflow.finalize()


@pytest.mark.parametrize("run", ["embed", "classify", "infer"])
def test_runs_from_a_foreign_folder_and_leaves_the_bundle_alone(installed, cohort, tmp_path, run):
    name, kind, overrides = workflows(cohort, tmp_path / "out")[run]
    if run == "infer":
        overrides |= {"evidence": ["tiles"]}
    before = sorted((str(p), p.stat().st_mtime_ns) for p in (installed / name).rglob("*"))
    workflow = create_workflow(
        config_file=str(installed / name / "configs" / f"{kind}.json"),
        workflow_type=kind,
        logging_file=False,
        **overrides,
    )
    workflow.run()
    workflow.finalize()
    assert sorted((str(p), p.stat().st_mtime_ns) for p in (installed / name).rglob("*")) == before
    made = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"embed": "slide_0000.h5", "classify": "predictions.csv", "infer": "prediction.json"}[run] in made
    assert not list(tmp_path.joinpath("here").iterdir())
