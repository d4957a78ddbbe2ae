"""Any method's overlay with any backbone's and any NCP's, laid over the pretraining bundle: it resolves and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from small_methods import MULTI_CROP, NEEDS_TOKENS, SMALL

from cytossl_monai.methods.base import SSLMethod

METHODS = ["moco_v3", "simclr", "byol", "dino", "ibot", "mae"]
BACKBONES = ["sr_vit_tiny", "sr_vit_small", "sr_vit_base", "vit_small", "resnet50", "sr_vit_tiny_stem", "resnet10"]
NCP = ["ncp_published", "ncp_off", "ncp_light", "ncp_default", "ncp_strong"]
STEPPED = [
    "sr_vit_tiny",
    "vit_small",
    "resnet50",
    "sr_vit_tiny_stem",
    "resnet10",
]  # the larger ones are these with more width
SMALLER = {"prototypes": 32, "patch_prototypes": 32, "head_hidden_dim": 16, "decoder_dim": 32, "decoder_heads": 4}
SIZE = 64


def laid_over(repo_root: Path, method: str, backbone: str, ncp: str) -> ConfigParser:
    """Overlays as the README lays them; fewer layers, narrower heads and smaller views than they say."""
    configs = repo_root / "configs"
    parser = ConfigParser()
    parser.read_config(
        [
            str(repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"),
            str(configs / "ssl" / f"{method}.yaml"),
            str(configs / "backbone" / f"{backbone}.yaml"),
            str(configs / "ssl" / f"{ncp}.yaml"),
        ]
    )
    for key, value in {**SMALLER, "decoder_depth": 1}.items():
        if key in parser.config:
            parser[key] = value
    size = SIZE // 2 if backbone.startswith("resnet") else SIZE
    parser["views#global_size"], parser["views#local_size"] = size, size // 2
    if parser["views#n_local"]:
        parser["views#n_local"] = 1
    if not backbone.startswith("resnet"):
        parser["backbone#num_layers"] = 1
    if "num_salient" in parser.config:
        parser["num_salient"] = 4
        if backbone.startswith("sr_"):
            parser["num_keys"] = 4
    return parser


def built(parser: ConfigParser) -> SSLMethod:
    method: Any = parser.get_parsed_content("method")
    assert isinstance(method, SSLMethod)
    return method


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_resolves_and_steps(name: str, backbone: str, repo_root: Path) -> None:
    # Each pair meets another NCP; together every method and every backbone meets all four.
    ncp = NCP[(METHODS.index(name) + BACKBONES.index(backbone)) % len(NCP)]
    parser = laid_over(repo_root, name, backbone, ncp)
    if backbone.startswith("resnet") and name in NEEDS_TOKENS:
        with pytest.raises((ValueError, RuntimeError)) as told:
            built(parser)
        reasons = [str(told.value), str(told.value.__cause__)]
        assert any("use an SR-Transformer" in reason and "ResNet" in reason for reason in reasons)
        return
    method = built(parser)
    assert isinstance(method, SMALL[name][0])
    generate = parser.get_parsed_content("views")
    assert generate.ncp.settings.perturbs(torch.arange(64)).any() == (ncp != "ncp_off")
    if backbone not in STEPPED:
        return
    tiles = torch.randint(0, 256, (3, 3, 80, 80), dtype=torch.uint8)
    tiles[:, :, 20:34, 20:34] //= 4  # something dark
    views = generate(tiles, torch.full((3,), 0.5), generator=torch.Generator().manual_seed(0))
    assert len(views["local"]) == (1 if name in MULTI_CROP else 0)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
    before = [p.detach().clone() for p in method.student.parameters() if p.requires_grad]
    method.train()(views)["loss"].backward()
    optimiser.step()
    method.update(0.1)
    after = [p for p in method.student.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.isfinite(p).all() for p in after)


@pytest.mark.parametrize("ncp", NCP)
@pytest.mark.parametrize("name", METHODS)
def test_views_with_every_ncp(name: str, ncp: str, repo_root: Path) -> None:
    generate = laid_over(repo_root, name, "sr_vit_tiny", ncp).get_parsed_content("views")
    assert generate.n_global == (1 if name == "mae" else 2)
    assert generate.ncp is not None
