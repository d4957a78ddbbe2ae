"""A file that was trained on from another says from which, and keeps its licence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_methods import small_method
from ssl_standins import make_trainer

from cytossl_monai.handlers.export import EncoderExport
from cytossl_monai.networks import Encoder, SRTransformer, continued_encoder, load_encoder, save_encoder

LICENCE = {"license": "CC-BY-NC-4.0", "commercial": False}


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_the_new_file_names_the_old_one(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SRTransformer(3, 18, 6, 12, 24, 1, 2, sparsity="none")
    first = tmp_path / "theirs.pt"
    save_encoder(
        first, Encoder(network, "mean", mean=(0.7, 0.6, 0.7)), {"license": "CC-BY-NC-4.0", "commercial": False}
    )
    method = small_method(name, continued_encoder(first))
    export = EncoderExport(tmp_path / "ours.pt")
    make_trainer(None, steps=2, method=method, handlers=(export,), dropout=0.0, lr=1e-2).run()
    after, meta = load_encoder(tmp_path / "ours.pt")
    assert {**meta, "continued_from": "theirs", **LICENCE} == meta
    before, _ = load_encoder(first)
    assert after.pool == "mean"
    torch.testing.assert_close(after.mean, before.mean)
    assert after.hash != before.hash
