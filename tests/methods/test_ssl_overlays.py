"""The overlays in configs/ssl build their method, by themselves and laid over the pretraining bundle."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser
from small_methods import SMALL
from tiny_encoders import TinyViT

from cytossl_monai.transforms.views.generator import ViewGenerator

NAMES = ["moco_v3", "simclr", "byol", "dino", "ibot", "mae"]
TINY = {"prototypes": 32, "patch_prototypes": 32, "head_hidden_dim": 16, "decoder_dim": 32, "decoder_heads": 4}


def overlay(repo_root: Path, name: str) -> Path:
    return repo_root / "configs" / "ssl" / f"{name}.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_overlay_on_the_bundle_builds_the_method(name: str, repo_root: Path) -> None:
    train = repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"
    parser = ConfigParser()
    parser.read_config([str(train), str(overlay(repo_root, name))])
    for key, value in TINY.items():
        if key in parser.config:
            parser[key] = value
    parser["encoder"] = TinyViT()
    method = parser.get_parsed_content("method")
    assert isinstance(method, SMALL[name][0])
    assert method.student is parser["encoder"]
    views = parser.get_parsed_content("views")
    assert isinstance(views, ViewGenerator)
    assert views.n_global == (1 if name == "mae" else 2)
    assert (views.ncp is None) == (name == "mae")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_that_is_used(name: str, repo_root: Path) -> None:
    """A key is the bundle's, an argument of the views, or referred to by the method: none is lost by a slip."""
    bundle = yaml.safe_load((repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json").read_text())
    text = overlay(repo_root, name).read_text()
    content = yaml.safe_load(text)
    arguments = inspect.signature(ViewGenerator.__init__)
    used = {str(value)[1:] for value in content["method"].values() if str(value).startswith("@")}
    for key in content:
        if key.startswith("views#"):
            assert key[6:] in arguments.parameters, key
        else:
            assert key in bundle or key in used, key
    # The commented alternatives name keys of this file.
    for alternative in re.findall(r"^# (?:small|resnet50|dinov2|nuclei): ([\w#]+):", text, re.MULTILINE):
        assert alternative in content, alternative


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_numbers(name: str, repo_root: Path) -> None:
    """YAML reads 1e-4 as a string."""
    content = yaml.safe_load(overlay(repo_root, name).read_text())
    for key, value in content.items():
        if isinstance(value, str):
            assert not re.fullmatch(r"[\d.]+e-?\d+", value), key
    assert all(isinstance(content[key], float) for key in ("base_lr", "weight_decay"))
    assert isinstance(content["final_weight_decay"], float) or content["final_weight_decay"] == "@weight_decay"


@pytest.mark.parametrize("name", NAMES)
def test_defaults_of_the_class_are_the_published_values(name: str, repo_root: Path) -> None:
    content = yaml.safe_load(overlay(repo_root, name).read_text())
    defaults = inspect.signature(SMALL[name][0].__init__).parameters
    free = {"freeze_patches", "temperature_warmup", "freeze_last_layer", "seed"}  # shares depend on the epochs
    for argument, reference in content["method"].items():
        if str(reference).startswith("@") and argument not in {"encoder", *free}:
            expected, found = defaults[argument].default, content[str(reference)[1:]]
            assert found == (list(expected) if isinstance(expected, tuple) else expected), argument


@pytest.mark.parametrize("name", ["", "moco_v3", "simclr", "byol", "mae", "vpu"])
def test_a_weight_decay_that_is_given_alone_holds_to_the_end(name: str, repo_root: Path) -> None:
    """It fell along a cosine to the recipe's own; those of DINO and iBOT are published as rising."""
    train = repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"
    parser = ConfigParser()
    parser.read_config([str(train), *([str(overlay(repo_root, name))] if name else [])])
    parser["weight_decay"] = 0.3
    schedule = parser.get_parsed_content("wd_schedule")
    assert [schedule(step, 10, 5) for step in (0, 5, 9)] == [0.3] * 3


@pytest.mark.parametrize("perturbation", ["ncp_light", "ncp_default", "ncp_strong", "ncp_published"])
def test_a_perturbation_laid_over_mae_perturbs(perturbation: str, repo_root: Path) -> None:
    """MAE looks for no nuclei of its own; without them no view is perturbed, whatever is asked for."""
    train = repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"
    parser = ConfigParser()
    parser.read_config([str(train), str(overlay(repo_root, "mae")), str(overlay(repo_root, perturbation))])
    views = parser.get_parsed_content("views")
    assert views.ncp is not None
    assert views.ncp_views
    assert views.find_nuclei
