"""Optical density and colour deconvolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import color

from cytossl_monai.transforms.kernels.stains import (
    OD_MAX,
    STAINS,
    combine_stains,
    od_to_rgb,
    rgb_to_od,
    separate_stains,
    stain_matrix,
)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (2, 3, 9, 7), dtype=np.uint8)


def test_density_of_known_levels():
    levels = np.array([255, 128, 1, 0], dtype=np.uint8).reshape(1, 1, 4)
    np.testing.assert_allclose(rgb_to_od(levels).ravel(), [0.0, np.log10(255 / 128), OD_MAX, OD_MAX], atol=1e-6)


@pytest.mark.parametrize("white", [1.0, 0.9, np.array([0.95, 0.9, 0.92]).reshape(3, 1, 1)])
def test_round_trip_arrays_and_tensors_agree(pixels, white):
    as_array = rgb_to_od(pixels, white)
    as_tensor = rgb_to_od(torch.from_numpy(pixels), white)
    assert as_array.dtype == np.float32
    np.testing.assert_allclose(as_array, as_tensor.numpy(), atol=1e-6)
    np.testing.assert_allclose(od_to_rgb(as_array, white), pixels / 255.0, atol=1e-5)
    np.testing.assert_allclose(od_to_rgb(as_tensor, white).numpy(), pixels / 255.0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_types_are_kept(dtype):
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64).to(dtype)
    assert rgb_to_od(image).dtype == dtype
    assert od_to_rgb(rgb_to_od(image)).dtype == dtype


def test_separation_agrees_with_scikit_image(pixels):
    # scikit-image works in natural logarithms scaled by its own floor of 1e-6; the ratio of both is one constant.
    ours = separate_stains(rgb_to_od(pixels[0].astype(np.float64) / 255.0), color.rgb_from_hed)
    theirs = color.separate_stains(pixels[0].transpose(1, 2, 0), np.linalg.inv(stain_matrix(color.rgb_from_hed)))
    positive = theirs.transpose(2, 0, 1) > 0  # it clips negative concentrations
    ratio = ours[positive] / theirs.transpose(2, 0, 1)[positive]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


@pytest.mark.parametrize("name", STAINS)
def test_combine_undoes_separate(name, pixels):
    od = rgb_to_od(pixels)
    np.testing.assert_allclose(combine_stains(separate_stains(od, name), name), od, atol=1e-4)
    tensor = torch.from_numpy(od)
    np.testing.assert_allclose(separate_stains(tensor, name).numpy(), separate_stains(od, name), atol=1e-4)


@pytest.mark.parametrize("name", STAINS)
def test_a_pure_stain_is_found_in_its_own_channel(name):
    for row, vector in enumerate(STAINS[name]):
        found = separate_stains(0.7 * vector.reshape(3, 1, 1), name).ravel()
        np.testing.assert_allclose(found, 0.7 * np.eye(3)[row], atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("pap", "papanicolaou"),
        (np.ones((4, 3)), "shape"),
        (np.zeros((2, 3)), "zero row"),
        (np.array([[1.0, 1, 1], [1, 1, 1.0], [0, 0, 1]]), "linearly"),
    ],
)
def test_bad_matrices_are_refused(bad, told):
    with pytest.raises(ValueError, match=told):
        stain_matrix(bad)


def test_wrong_channels_are_refused():
    with pytest.raises(ValueError, match="three channels"):
        separate_stains(np.zeros((1, 8, 8), dtype=np.float32))


def test_gradients_flow():
    image = torch.rand(1, 3, 4, 4, requires_grad=True)
    od_to_rgb(rgb_to_od(image) * 1.1).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
