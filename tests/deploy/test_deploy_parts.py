"""The parts of the MONAI Deploy application, without its SDK; scripts/deploy/check.sh runs them within it."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export

from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.deploy.dicom_report import is_dicom, report_text
from cytossl_monai.deploy.exported import check_exported
from cytossl_monai.deploy.operators import PredictionWriterOperator, SlideToBagOperator
from cytossl_monai.deploy.prediction_writer import PredictionWriter
from cytossl_monai.deploy.slide_bag import SlideToBag, find_slides
from cytossl_monai.engines.mil.trainer import BagInferer
from cytossl_monai.networks.files import load_encoder, save_classifier, save_encoder
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny
from cytossl_monai.utils.errors import CheckpointError, TableError
from cytossl_monai.utils.report import RunReport


class Ports:
    """Stands where the SDK has its input and output contexts."""

    def __init__(self, **values):
        self.values = values

    def receive(self, name):
        return self.values[name]

    def emit(self, value, name):
        self.values[name] = value


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("deploy")
    make_slides(root / "slides", 1, 1024, seed=5, blur=0, progress=False)
    write_pyramid(root / "slides" / "empty.tif", np.full((1024, 1024, 3), 242, np.uint8), 0.25)
    (root / "slides" / "torn.tif").write_bytes((root / "slides" / "slide_0000.tif").read_bytes()[:9000])
    encoder = Encoder(sr_vit_tiny(num_layers=1)).eval()
    save_encoder(root / "encoder.pt", encoder)
    known = {"hash": encoder_hash(encoder), "name": "toy", "dim": encoder.embed_dim}
    classifier = MILClassifier(ABMIL(encoder.embed_dim, 2), ["negative", "positive"], encoder=known, temperature=0.5)
    save_classifier(root / "classifier.pt", classifier)
    configs = request.config.rootpath / "bundles" / "cytossl_mil" / "configs"
    ckpt_export(
        net_id="network_def",
        filepath=str(root / "model.ts"),
        ckpt_file=str(root / "classifier.pt"),
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        classifier=str(root / "classifier.pt"),
    )
    return root


@pytest.fixture(scope="module")
def read(folder):
    return SlideToBag(folder / "encoder.pt", folder / "index", num_threads=1)


def writer(folder, read, out, **more):
    given = {"model": folder / "model.ts", "classifier": folder / "classifier.pt", "files": ["tiles"], **more}
    return PredictionWriter(output_dir=out, encoder=read.encoder, encoder_hash=read.encoder_hash, **given)


def test_tiles_are_read_as_the_encoder_was_trained_on_them(folder, read, tmp_path):
    """By the bundle's rule: what the encoder's file says, else 224 px at 0.5 um/px."""
    assert (read.index.settings.tile_size, read.index.settings.mpp) == (224, 0.5)
    encoder, _ = load_encoder(folder / "encoder.pt")
    save_encoder(tmp_path / "encoder.pt", encoder, {"tile_size": 512, "mpp": 0.25})
    told = SlideToBag(tmp_path / "encoder.pt", tmp_path).index.settings
    assert (told.tile_size, told.mpp) == (512, 0.25)
    asked = SlideToBag(tmp_path / "encoder.pt", tmp_path, tile_size=256).index.settings
    assert (asked.tile_size, asked.mpp) == (256, 0.25)


def test_operators_from_slides_to_files(folder, read, tmp_path):
    """Three slides as the application sees them: one good, one empty, one torn; the torn one costs only itself."""
    slides = find_slides(folder / "slides")
    assert [s.slide_id for s in slides] == ["empty", "slide_0000", "torn"]
    source = SlideToBagOperator(None, slides=slides, read=read)
    report = RunReport("deploy", tmp_path / "report.csv")
    sink = PredictionWriterOperator(None, write=writer(folder, read, tmp_path), report=report)
    exported = torch.jit.load(folder / "model.ts").eval()
    for _ in slides:
        ports = Ports()
        source.compute(None, ports, None)
        bag = ports.values["image"]
        assert bag.dtype == torch.float32
        assert bag.shape[1] == read.encoder.embed_dim
        probabilities = BagInferer()(bag[None], exported)[0].detach().numpy()
        ports.emit({"result": ["negative"], "probabilities": probabilities}, "pred")
        sink.compute(ports, None, None)
    assert [(i.item, i.status) for i in report.items] == [
        ("empty", "empty"),
        ("slide_0000", "done"),
        ("torn", "failed"),
    ]
    assert report.exit_code == 3
    told = json.loads((tmp_path / "slide_0000" / "prediction.json").read_text())
    assert told["deploy"]["probabilities"] == pytest.approx(told["probabilities"], abs=1e-4)
    empty = json.loads((tmp_path / "empty" / "prediction.json").read_text())
    assert (empty["label"], empty["deploy"]["probabilities"]) == (None, None)
    assert not (tmp_path / "torn").exists()


def test_a_report_that_does_not_explain_the_prediction_is_not_written(folder, read, tmp_path):
    item = read(folder / "slides" / "slide_0000.tif")
    with pytest.raises(CheckpointError, match=r"model\.ts gives .* export the model again"):
        writer(folder, read, tmp_path)(item, np.array([0.9, 0.1]))
    assert not (tmp_path / "slide_0000").exists()


def test_encoder_and_classifier_must_belong_together(folder, read, tmp_path):
    other = {"hash": "0" * 16, "name": "other", "dim": 192}
    save_classifier(tmp_path / "c.pt", MILClassifier(ABMIL(192, 2), ["negative", "positive"], encoder=other))
    with pytest.raises(CheckpointError, match="trained on the encoder other"):
        writer(folder, read, tmp_path, classifier=tmp_path / "c.pt")


def test_find_slides(folder, tmp_path):
    with pytest.raises(TableError, match="holds no slide"):
        find_slides(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.dcm").write_bytes(b"\0" * 128 + b"DICM")
    [one] = find_slides(tmp_path, mpp=0.5)  # a DICOM series is one slide
    assert (one.path.name, one.mpp) == ("0.dcm", 0.5)
    assert is_dicom(one.path)
    assert not is_dicom(folder / "encoder.pt")


def test_report_text_never_diagnoses_an_empty_slide():
    facts = {"slide_id": "s", "notice": "Research use only.", "tiles": {"count": 7}}
    found = report_text({**facts, "label": "positive", "probabilities": {"negative": 0.25, "positive": 0.75}})
    assert found.splitlines()[1:3] == ["Prediction: positive", "Probability of negative: 0.2500"]
    empty = report_text({**facts, "label": None, "reason": "only glass"})
    assert "No prediction was made." in empty
    assert "positive" not in empty
    assert empty.endswith("Research use only.")


def with_configuration(model, target, name="inference", drop=(), **more):
    """A copy of an exported model whose configuration was changed, as a stranger could."""
    with zipfile.ZipFile(model) as source, zipfile.ZipFile(target, "w") as copy:
        for member in source.namelist():
            content = source.read(member)
            if member == f"model/extra/{name}.json":
                kept = {key: value for key, value in json.loads(content).items() if key not in drop}
                content = json.dumps({**kept, **more}).encode()
            copy.writestr(member.replace("model/", f"{target.stem}/", 1), content)
    return target


def what_the_sdk_builds(model):
    """The items that MONAI Deploy's operator takes from a model's configuration, as its parser makes them."""
    with zipfile.ZipFile(model) as archive:
        parser = ConfigParser(json.loads(archive.read(f"{model.stem}/extra/inference.json")))
    return [parser.get_parsed_content(name) for name in ("device", "inferer", "preprocessing") if name in parser]


@pytest.fixture
def own(repo_root):
    return repo_root / "bundles" / "cytossl_mil" / "configs" / "inference.json"


def test_an_exported_model_may_bring_plain_values_alone(folder, own, tmp_path):
    check_exported(folder / "model.ts", own)
    plain = {
        "in_features": 7,
        "class_names": ["a", "b"],
        "_comment_paths": "of another version",
        "note": ["x", {"y": 1}],
    }
    check_exported(with_configuration(folder / "model.ts", tmp_path / "model.ts", drop=["slides"], **plain), own)


@pytest.mark.parametrize(
    "foreign",
    [
        {"preprocessing": {"_target_": "Compose", "transforms": [{"_target_": "pathlib.Path", "name": 1}]}},
        {"inferer": "${code}"},
        {"device": "${code}"},
        {"imports": ["$import torch", "$import antigravity"]},
        {"unused": {"deep": ["$import antigravity"]}},
        {"inferer::_target_": "os.getcwd"},
        {"+inferer": {"_target_": "os.getcwd"}},
        {"device": "%/tmp/other.json::device"},
        {"postprocessing": "@handlers"},
    ],
)
def test_an_exported_model_with_code_of_its_own_is_refused(folder, own, tmp_path, foreign):
    code = f"__import__('pathlib').Path({str(tmp_path / 'marker')!r}).touch()"
    foreign = json.loads(json.dumps(foreign).replace("{code}", code.replace('"', "'")))
    model = with_configuration(folder / "model.ts", tmp_path / "model.ts", **foreign)
    with pytest.raises(CheckpointError, match=r"model\.ts brings a configuration of its own .*; export it again"):
        check_exported(model, own)
    assert not (tmp_path / "marker").exists()
    if str(foreign).startswith("{'device': '$"):  # else the check would guard a door that is shut anyway
        what_the_sdk_builds(model)
        assert (tmp_path / "marker").exists()


def test_what_is_no_export_is_a_sentence(folder, own, tmp_path):
    (tmp_path / "noise.ts").write_bytes(b"noise")
    (tmp_path / "renamed.ts").write_bytes((folder / "model.ts").read_bytes())
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "bare.ts")
    meta = with_configuration(folder / "model.ts", tmp_path / "meta.ts", "metadata", authors="$1")
    told = {
        "noise": "no exported model",
        "renamed": "it was renamed",
        "bare": "without its conf",
        "gone": "no such file",
    }
    for name, words in (told | {meta.stem: "metadata that would be evaluated"}).items():
        with pytest.raises(CheckpointError, match=words) as caught:
            check_exported(tmp_path / f"{name}.ts", own)
        assert f"{name}.ts" in str(caught.value)
        assert "\n" not in str(caught.value)
