import pytest
import torch

from cytossl_monai.engines.ssl.precision import fast_precision


@pytest.mark.parametrize(
    ("answer", "wanted"), [({"amx_bf16": True}, "bf16"), ({"amx_bf16": False}, "fp32"), ({}, "fp32")]
)
def test_cpu_is_asked(monkeypatch, answer, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: answer, raising=False)
    assert fast_precision("cpu") == fast_precision(torch.device("cpu")) == wanted


def test_old_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_precision("cpu") == "fp32"
