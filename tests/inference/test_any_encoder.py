"""Encoders of others in the bundles: cards, programs, the tiles they ask for, and the batch that fits."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from inference_toy import CONFIGS, run_inference
from monai.bundle import ConfigParser, ConfigWorkflow

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.inference.prepare import best_batch, fitting_batch, prepare_encoder, warn_of_tile_size
from cytossl_monai.networks.nets.encoder import encoder_hash
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.open import check_made_by, open_encoder
from cytossl_monai.utils.errors import CheckpointError

NETWORK = {"patch_size": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 1, "mlp_type": "swiglu", "mlp_dim": 8}


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """A card of a small model for tiles of 96 px, and its weights."""
    folder = tmp_path_factory.mktemp("card")
    content = {"name": "small", "network": NETWORK, "tile_size": 96, "mpp": 0.5, "license": "CC-BY-NC-4.0"}
    (folder / "small.yaml").write_text(yaml.safe_dump({**content, "commercial": False, "embed_dim": 16}))
    torch.manual_seed(0)
    network = SRTransformer(3, 96, qkv_bias=True, class_token=True, norm_eps=1e-6, **NETWORK)
    torch.save(network.state_dict(), folder / "small.pth")
    return folder / "small.yaml", folder / "small.pth"


def run_embed(cohort, output_dir, **overrides):
    settings = {"slides": str(cohort.slides), "index_dir": str(cohort.index), "output_dir": str(output_dir)}
    settings |= {"device": torch.device("cpu"), "progress": False, "num_threads": 1, **overrides}
    workflow = ConfigWorkflow(str(CONFIGS / "embed.json"), workflow_type="infer", logging_file=False, **settings)
    workflow.initialize()
    with pytest.raises(SystemExit) as stop:
        workflow.run()
    return stop.value.code, pd.read_csv(output_dir / "report.csv").set_index("item")


def test_a_card_embeds_as_its_encoder_does(cohort, card, tmp_path):
    status, report = run_embed(cohort, tmp_path, encoder=str(card[0]), weights=str(card[1]))
    assert (status, set(report["status"])) == (0, {"done"})
    features = read_features(tmp_path / "slide_0000.h5")
    encoder, _ = open_encoder(*card)
    assert features.attrs["encoder"] == encoder_hash(encoder)
    assert (features.attrs["encoder_name"], features.attrs["encoder_license"]) == ("small", "CC-BY-NC-4.0")
    _, report = run_embed(cohort, tmp_path, encoder=str(card[0]), weights=str(card[1]))
    assert set(report["status"]) == {"current"}
    # Switches for speed change rounding, not features.
    _, report = run_embed(
        cohort, tmp_path / "fast", encoder=str(card[0]), weights=str(card[1]), channels_last=True, batch_size=5
    )
    fast = read_features(tmp_path / "fast" / "slide_0000.h5")
    np.testing.assert_allclose(fast.features, features.features, atol=1e-5)
    assert fast.encoder == features.encoder


def test_features_of_two_encoders_in_a_folder_are_told(cohort, card, tmp_path, caplog):
    run_embed(cohort, tmp_path, encoder=str(cohort.encoder))
    with caplog.at_level(logging.WARNING):
        run_embed(cohort, tmp_path, encoder=str(card[0]), weights=str(card[1]))
    assert "holds 2 feature files of the encoder toy16" in caplog.text
    assert "not of small" in caplog.text


def test_a_changed_program_is_noticed(cohort, tmp_path):
    for factor, status in ((1.0, "done"), (1.0, "current"), (2.0, "done")):
        model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
        model.append(torch.nn.Linear(12, 4))
        torch.nn.init.constant_(model[2].weight, factor)
        torch.nn.init.zeros_(model[2].bias)
        path = tmp_path / "program.ts"
        if status != "current":
            torch.jit.script(model.eval()).save(path)
        _, report = run_embed(cohort, tmp_path / "out", encoder=str(path))
        assert set(report["status"]) == {status}


def test_inference_takes_the_cards_tiles(card, tmp_path):
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser["encoder"], parser["weights"], parser["device"] = str(card[0]), str(card[1]), torch.device("cpu")
    assert parser.get_parsed_content("tile_size") == 96
    assert parser.get_parsed_content("mpp") == 0.5
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser["encoder"], parser["device"] = str(tmp_path / "absent.pt"), torch.device("cpu")
    assert (parser.get_parsed_content("tile_size"), parser.get_parsed_content("mpp")) == (224, 0.5)


@pytest.mark.parametrize(
    ("with_weights", "words"), [(True, "was trained on the encoder"), (False, "needs the weights")]
)
def test_inference_refuses_what_does_not_belong_together(cohort, card, tmp_path, with_weights, words):
    weights = str(card[1]) if with_weights else None
    with pytest.raises(RuntimeError) as raised:
        run_inference(cohort, tmp_path, encoder=str(card[0]), weights=weights)
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, CheckpointError):
        error = error.__cause__
    assert words in str(error)


def test_features_are_held_to_the_encoder_named(card):
    encoder, _ = open_encoder(*card)
    check_made_by({"hash": encoder_hash(encoder), "name": "small", "dim": 16}, *card)
    check_made_by({"hash": None, "name": None, "dim": 16}, *card)  # of another tool, which does not say
    with pytest.raises(CheckpointError, match=r"made by other \(00, 16 a tile\), not by small"):
        check_made_by({"hash": "00", "name": "other", "dim": 16}, *card)
    with pytest.raises(CheckpointError, match="no hash, 1024 a tile"):
        check_made_by({"hash": None, "name": None, "dim": 1024}, *card)


def test_tiles_of_another_resolution_are_told(card, caplog):
    encoder, _ = open_encoder(*card)
    assert not warn_of_tile_size(encoder, 96, 0.5)
    assert warn_of_tile_size(encoder, 96, 0.25)
    assert "trained at 0.5 um/px" in caplog.text


@pytest.mark.parametrize(("room", "gain_until", "wanted"), [(100, 1024, 64), (2000, 64, 64), (2000, 4096, 1024)])
def test_the_batch_that_fits(room, gain_until, wanted):
    """As large as memory allows, no larger than pays."""
    tried = []

    def seconds(batch):
        tried.append(batch)
        if batch > room:
            raise torch.OutOfMemoryError
        return max(1.0, batch / gain_until)

    assert best_batch(seconds) == wanted
    assert len(tried) == len(set(tried))
    with pytest.raises(torch.OutOfMemoryError):
        best_batch(lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError()))


def test_switches_keep_the_features(card):
    tiles = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    encoder, _ = open_encoder(*card)
    with torch.no_grad():
        wanted = encoder(tiles)
        fast = prepare_encoder(encoder, "cpu", channels_last=True)
        torch.testing.assert_close(fast(tiles), wanted, atol=1e-5, rtol=1e-5)
    assert fast.network.patch_embedding.patch_embeddings.weight.is_contiguous(memory_format=torch.channels_last)
    assert fitting_batch(fast, 96, "cpu") == 32
