"""Exported networks give what the network gives: torch.export, ONNX, TorchScript."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cytossl_monai.networks.blocks.token_layout import TokenLayout, _compiled_grid_places
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_transformer import SRTransformer


def encoder(side: int = 32, sparsity: object = ("none", "topk", "routed")) -> Encoder:
    """One layer of each sparsity, with tables of iRPE that are not zero."""
    sparsities = [sparsity] if isinstance(sparsity, str) else list(sparsity)  # type: ignore[call-overload]
    network = SRTransformer(
        3,
        side,
        8,
        hidden_size=24,
        mlp_dim=32,
        num_layers=len(sparsities),
        num_heads=3,
        class_token=True,
        rpe={"method": "product", "on": "qk"},
        sparsity=sparsities,
        keep_ratio=0.4,
        num_salient=4,
        window=1,
        num_register_tokens=1,
    )
    for name, parameter in network.named_parameters():
        if ".irpe." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return Encoder(network, "cls+mean").eval()


def test_torch_export_and_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module, images = encoder(), torch.rand(2, 3, 32, 32)
    wanted = module(images)
    exported = torch.export.export(module, (images,))
    torch.testing.assert_close(exported.module()(images), wanted, atol=1e-4, rtol=1e-4)
    torch.onnx.export(module, (images,), tmp_path / "encoder.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(got, wanted.detach().numpy(), atol=1e-4)


def test_an_exported_program_needs_nothing_of_this_package() -> None:
    """PyTorch's older way of exporting looks like its compiler, for which places come from an operator of ours."""
    exported = torch.export.export(encoder(32, "none"), (torch.rand(2, 3, 32, 32),), strict=True)
    assert "cytossl" not in exported.graph_module.code


def test_places_for_the_compiler_are_those_of_the_grid() -> None:
    """The compiler alone asks for them so, on a GPU."""
    rows, cols = _compiled_grid_places(3, 4, torch.device("cpu"))
    expected = TokenLayout(1, (3, 4), 0).rows_and_cols(torch.device("cpu"))
    assert torch.equal(rows, expected[0])
    assert torch.equal(cols, expected[1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("side", "sparsity"), [(32, ("none", "topk", "routed")), (224, "routed")])
def test_torchscript_takes_other_batches(side: int, sparsity: object) -> None:
    """Traced with a batch of two; 224 pixels are 784 patches, which are routed in tiles."""
    module = encoder(side, sparsity)
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.rand(2, 3, side, side), check_trace=False)
        for batch in (1, 2, 3):
            images = torch.rand(batch, 3, side, side)
            torch.testing.assert_close(traced(images), module(images), atol=1e-4, rtol=1e-4)
