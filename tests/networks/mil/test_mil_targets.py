"""Targets, classifier files, ensembles and exports."""

import pytest
import torch
from torch.nn import functional as F

from cytossl_monai.networks.build import build_network
from cytossl_monai.networks.files import bundle_network, load_classifier, require_trained, save_classifier
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.base import MILModel
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.ensemble import MILEnsemble, average_probabilities
from cytossl_monai.networks.mil.pooling import MeanMIL
from cytossl_monai.networks.mil.targets import class_probabilities, decide, indicator, n_outputs, target_loss
from cytossl_monai.utils.errors import CheckpointError, FeatureError


def test_ordinal_probabilities_are_probabilities():
    p = class_probabilities(3 * torch.randn(50, 4), "ordinal")
    assert p.shape == (50, 5)
    assert (p >= -1e-6).all()
    torch.testing.assert_close(p.sum(1), torch.ones(50))


def test_ordinal_loss_is_the_negative_log_likelihood():
    logits, labels = torch.randn(40, 3).double(), torch.randint(0, 4, (40,))
    wanted = F.nll_loss(class_probabilities(logits, "ordinal").log(), labels)
    torch.testing.assert_close(target_loss(logits, labels, "ordinal"), wanted)


def test_multiclass_and_multilabel_losses():
    logits = torch.randn(6, 3)
    labels, findings = torch.randint(0, 3, (6,)), torch.randint(0, 2, (6, 3))
    torch.testing.assert_close(target_loss(logits, labels, "multiclass"), F.cross_entropy(logits, labels))
    wanted = F.binary_cross_entropy_with_logits(logits, findings.float())
    torch.testing.assert_close(target_loss(logits, findings, "multilabel"), wanted)


def test_indicator_and_decide():
    assert indicator(torch.tensor([0, 2]), "ordinal", 2).tolist() == [[0, 0], [1, 1]]
    assert indicator(torch.tensor([0, 2]), "multiclass", 3).tolist() == [[1, 0, 0], [0, 0, 1]]
    p = torch.tensor([[0.4, 0.25, 0.35], [0.6, 0.2, 0.2]])
    assert decide(p, "multiclass").tolist() == [0, 0]
    assert decide(p, "ordinal").tolist() == [1, 0]  # the median grade
    assert decide(p, "multilabel").tolist() == [[0, 0, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="at least 2"):
        n_outputs("multiclass", 1)


@pytest.mark.parametrize("target", ["multiclass", "ordinal", "multilabel"])
def test_average_probabilities_inverts(target):
    p = class_probabilities(torch.randn(9, 3), target)
    torch.testing.assert_close(class_probabilities(average_probabilities(p, target), target), p, atol=1e-5, rtol=1e-4)


def test_ensemble_is_the_mean_of_calibrated_members():
    members = [ABMIL(6, 2).eval(), MeanMIL(6, 2).eval()]
    members[0].set_standardisation(torch.ones(6), 2 * torch.ones(6))
    ensemble = MILClassifier(MILEnsemble(members, temperatures=[0.5, 3.0]), ["a", "b"]).eval()
    x = torch.randn(4, 7, 6)
    wanted = (torch.softmax(members[0](x).logits / 0.5, 1) + torch.softmax(members[1](x).logits / 3.0, 1)) / 2
    torch.testing.assert_close(ensemble(x), wanted)


def classifier(**kwargs):
    return MILClassifier(
        ABMIL(6, 2), ["benign", "malignant"], encoder={"hash": "h1", "name": "vit", "dim": 6}, **kwargs
    )


@pytest.mark.parametrize("ensemble", [False, True])
def test_classifier_file_round_trip(tmp_path, ensemble):
    made = classifier(temperature=1.7, meta={"note": [1, 2]})
    if ensemble:
        made = MILClassifier(MILEnsemble([ABMIL(6, 2), MeanMIL(6, 2)], temperatures=[1.0, 2.0]), ["x", "y"])
    made.network.set_standardisation(torch.randn(6), torch.rand(6))
    path = save_classifier(tmp_path / "model.pt", made.eval())
    got = load_classifier(path)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(got(x), made(x))
    assert (got.classes, got.encoder, got.meta, got.trained) == (made.classes, made.encoder, made.meta, True)


def test_features_of_another_encoder_are_refused():
    made = classifier()
    made.check_features(6, "h1", "a.h5")
    made.check_features(6, None, "from_elsewhere.h5")
    with pytest.raises(FeatureError, match=r"b\.h5 has 7 features"):
        made.check_features(7, "h1", "b.h5")
    with pytest.raises(FeatureError, match="encoder h2"):
        made.check_features(6, "h2", "b.h5")


def test_bad_classifier_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file"):
        load_classifier(tmp_path / "none.pt")
    (tmp_path / "torn.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(tmp_path / "torn.pt")
    torch.save({"format": "cytossl-encoder"}, tmp_path / "encoder.pt")
    with pytest.raises(CheckpointError, match="cytossl-encoder"):
        load_classifier(tmp_path / "encoder.pt")
    save_classifier(tmp_path / "m.pt", classifier())
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    content["network"]["embed_dim"] = 17
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_classifier(tmp_path / "other.pt")
    content["network"] = {"_target_": "os.system", "command": "true"}
    torch.save(content, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"os\.system"):
        load_classifier(tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="no MILModel"):
        build_network({"_target_": "cytossl_monai.networks.SRTransformer"}, MILModel)
    with pytest.raises(ValueError, match="does not exist"):
        build_network({"_target_": "cytossl_monai.networks.mil.targets.MILLoss"}, MILModel)


def test_untrained_network_may_be_exported_not_believed(tmp_path):
    network = bundle_network(tmp_path / "none.pt", in_features=6)
    with pytest.raises(CheckpointError, match="does not exist"):
        require_trained(network, tmp_path / "none.pt")
    save_classifier(tmp_path / "m.pt", network)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    network.load_state_dict(content)  # what MONAI's ckpt_export hands over
    require_trained(network, tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore")
def test_default_network_scripts_for_any_bag_size():
    network = classifier().eval()
    scripted = torch.jit.script(network)
    for n in (1, 17):
        x = torch.randn(1, n, 6)
        torch.testing.assert_close(scripted(x), network(x))


@pytest.mark.slow
def test_a_bag_of_100_000_tiles_fits_in_8_gb(repo_root):
    """Peak resident memory of one process for all; att_trans needs a GPU for its time, not for its memory."""
    import subprocess
    import sys

    program = """
import resource, sys, torch, yaml
from cytossl_monai.networks.build import build_network
for path in sys.argv[1:]:
    config = {**yaml.safe_load(open(path))["network"], "in_features": 384, "n_outputs": 2}
    model = build_network(config).eval()
    with torch.inference_mode():
        output = model(torch.randn(1, 100_000, 384))
    assert torch.isfinite(output.logits).all(), path
    print(path, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    overlays = ["mean", "max", "abmil", "abmil_gated", "dsmil", "clam_sb", "clam_mb", "dtfd", "transmil"]
    paths = [str(repo_root / "configs" / "mil" / f"{name}.yaml") for name in overlays]
    told = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    print(told.stdout)
    assert float(told.stdout.split()[-1]) < 8.0
