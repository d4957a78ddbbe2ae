"""What does not fit is refused in one sentence that names the key, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cytossl_monai.transforms.ncp.array import NucleiCenteredPerturb, RandNucleiCenteredPerturb
from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.ncp.dictionary import NucleiCenteredPerturbd, RandNucleiCenteredPerturbd
from cytossl_monai.transforms.ncp.settings import NCPSettings, OpSetting
from cytossl_monai.transforms.views.array import RandStainJitter
from cytossl_monai.transforms.views.dictionary import RandStainJitterd
from cytossl_monai.transforms.views.generator import ViewGenerator

IMAGES = torch.rand(2, 3, 16, 16)
MASKS = torch.ones(2, 1, 16, 16)
NAN = IMAGES.clone()
NAN[1] = float("nan")


@pytest.mark.parametrize(
    ("images", "masks", "mpp", "words"),
    [
        (torch.rand(2, 4, 16, 16), MASKS, 0.5, ["images", "(2, 4, 16, 16)", "3 or 1"]),
        (torch.rand(2, 16, 16), MASKS, 0.5, ["images", "(2, 16, 16)"]),
        (torch.rand(2, 3, 0, 16), MASKS, 0.5, ["images", "pixel"]),
        (IMAGES.int(), MASKS, 0.5, ["images", "int32", "uint8"]),
        (IMAGES * 255, MASKS, 0.5, ["images", "[0, 1]", "255"]),
        (IMAGES - 0.5, MASKS, 0.5, ["images", "[0, 1]"]),
        (NAN, MASKS, 0.5, ["images", "NaN", "tile 1"]),
        (IMAGES.numpy(), MASKS, 0.5, ["images", "ndarray", "tensor"]),
        (IMAGES, MASKS[..., :8], 0.5, ["masks", "(2, 1, 16, 8)", "(2, 1, 16, 16)"]),
        (IMAGES, MASKS[:1], 0.5, ["masks", "(1, 1, 16, 16)"]),
        (IMAGES, MASKS.expand(2, 3, 16, 16), 0.5, ["masks", "(2, 3, 16, 16)"]),
        (IMAGES, MASKS * 255, 0.5, ["masks", "255", "0 and 1"]),
        (IMAGES, MASKS * 0.5, 0.5, ["masks", "0.5", "0 and 1"]),
        (IMAGES, MASKS.int() * 3, 0.5, ["masks", "3", "0 and 1"]),
        (IMAGES, None, 0.5, ["masks", "NoneType"]),
        (IMAGES, MASKS, None, ["mpp", "missing", "micrometres"]),
        (IMAGES, MASKS, 0.0, ["mpp", "0.0", "> 0"]),
        (IMAGES, MASKS, float("nan"), ["mpp", "nan"]),
        (IMAGES, MASKS, "fine", ["mpp", "fine"]),
        (IMAGES, MASKS, torch.ones(3), ["mpp", "3 values", "2 samples"]),
    ],
)
def test_batched_inputs(images: Any, masks: Any, mpp: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked at below
        BatchedNCP()(images, masks, mpp)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BatchedNCP("extreme"), ["ops", "'extreme'", "light"]),
        (lambda: BatchedNCP({"melt": {"prob": 1, "strength": 1}}), ["'melt'", "blur", "cutout"]),
        (lambda: BatchedNCP({"blur": {"prob": 1.5, "strength": 1}}), ["ops['blur']['prob']", "1.5", "[0, 1]"]),
        (lambda: BatchedNCP({"blur": {"prob": 0.5, "strength": -1}}), ["ops['blur']['strength']", "-1"]),
        (lambda: BatchedNCP({"blur": {"prob": 0.5}}), ["ops['blur']", "prob and strength"]),
        (lambda: BatchedNCP({"blur": OpSetting(2.0, 1.0)}), ["ops['blur']['prob']", "2.0"]),
        (lambda: BatchedNCP(["blur"]), ["ops", "list"]),
        (lambda: BatchedNCP(prob=-0.1), ["prob", "-0.1", "[0, 1]"]),
        (lambda: BatchedNCP(prob=True), ["prob", "True"]),
        (lambda: BatchedNCP(margin_um=-1), ["margin_um", "-1", "micrometres"]),
        (lambda: BatchedNCP(patch_um=0), ["patch_um", "0", "> 0"]),
        (lambda: BatchedNCP(feather_um=float("nan")), ["feather_um", "nan"]),
        (lambda: BatchedNCP(empty="skip"), ["empty", "'skip'", "drop"]),
        (lambda: NCPSettings(empty="drop"), ["empty", "'drop'", "keep"]),
        (lambda: NucleiCenteredPerturb("strong"), ["ops", "'strong'", "mapping"]),
        (lambda: NucleiCenteredPerturb({"blur": 2.0}), ["ops['blur']['strength']", "2.0"]),
        (lambda: RandNucleiCenteredPerturb(prob=1.2), ["prob", "1.2"]),
        (lambda: RandNucleiCenteredPerturb(mpp=-1.0), ["mpp", "-1"]),
        (lambda: RandStainJitter(prob=2.0), ["prob", "2.0"]),
        (lambda: RandStainJitter(scale=2.0), ["scale", "2.0"]),
        (lambda: ViewGenerator(global_size=0), ["global_size", "0"]),
        (lambda: ViewGenerator(n_local=-1), ["n_local", "-1"]),
        (lambda: ViewGenerator(global_scale=(0.5, 1.2)), ["global_scale", "1.2"]),
        (lambda: ViewGenerator(local_scale=(0.5, 0.2)), ["local_scale", "0.2"]),
        (lambda: ViewGenerator(ncp_views=(9,)), ["ncp_views", "9", "8 views"]),
        (lambda: ViewGenerator(ncp_views="none"), ["ncp_views", "'none'", "global"]),
        (lambda: ViewGenerator(solarise_prob=3), ["solarise_prob", "3"]),
        (lambda: ViewGenerator(blur_sigma=(2.0,)), ["blur_sigma", "2.0"]),
        (lambda: ViewGenerator(stain_scale=-0.5), ["stain_scale", "-0.5"]),
    ],
)
def test_settings(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    for word in words:
        assert word in str(caught.value)


def test_dictionaries_name_their_own_keys() -> None:
    image, mask = IMAGES[0], MASKS[0]
    for transform in (
        NucleiCenteredPerturbd("pic", {"blur": 1.0}, "cells"),
        RandNucleiCenteredPerturbd("pic", mask_key="cells"),
    ):
        with pytest.raises(ValueError, match="cells is missing"):
            transform({"pic": image, "mpp": 0.5})
        with pytest.raises(ValueError, match=r"cells has the shape \(1, 16, 4\)"):
            transform({"pic": image, "cells": mask[..., :4], "mpp": 0.5})
        with pytest.raises(ValueError, match="pic holds NaN"):
            transform({"pic": NAN[1], "cells": mask, "mpp": 0.5})
        with pytest.raises(ValueError, match="mpp is missing"):
            transform({"pic": image, "cells": mask})
        with pytest.raises(KeyError):
            transform({"cells": mask, "mpp": 0.5})
    with pytest.raises(ValueError, match=r"other is .* of the shape \(3, 8, 16\)"):
        NucleiCenteredPerturbd("pic", {"swap": 1.0}, "cells", donor_key="other")(
            {"pic": image, "cells": mask, "other": image[:, :8], "mpp": 0.5}
        )
    with pytest.raises(ValueError, match="pic ranges from"):
        RandStainJitterd("pic")({"pic": image * 255})


def test_allow_missing_keys_passes_over() -> None:
    data = {"nuclei": MASKS[0], "mpp": 0.5}
    assert RandNucleiCenteredPerturbd("pic", allow_missing_keys=True)(data) == data


def test_seeds_of_another_shape() -> None:
    with pytest.raises(ValueError, match="seeds"):
        BatchedNCP()(IMAGES, MASKS, 0.5, seeds=torch.arange(3))


def test_views_name_tiles() -> None:
    with pytest.raises(ValueError, match="tiles has the shape"):
        ViewGenerator()(torch.rand(2, 5, 16, 16), 0.5)
    with pytest.raises(ValueError, match="mpp is missing"):
        ViewGenerator()(IMAGES)
    with pytest.raises(ValueError, match="mpp is missing"):
        ViewGenerator(8, 8, ncp=BatchedNCP())(IMAGES, None, MASKS)
    assert ViewGenerator(8, 8, find_nuclei=False)(IMAGES)["nuclei"] == []


def test_a_margin_of_many_pixels_asks_for_the_right_mpp() -> None:
    with pytest.raises(ValueError, match="mpp"):
        BatchedNCP({"noise": {"prob": 1.0, "strength": 1.0}})(IMAGES, MASKS, 0.001)
