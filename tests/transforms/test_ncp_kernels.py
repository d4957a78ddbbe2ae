"""The kernels against scipy, scikit-image and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage, stats
from skimage.color import rgb_from_hed

from cytossl_monai.transforms.kernels.blur import blur
from cytossl_monai.transforms.kernels.colour import jitter_stain
from cytossl_monai.transforms.kernels.device import made_once
from cytossl_monai.transforms.kernels.random import draw_seeds, hash_noise, hash_uniform, mix64
from cytossl_monai.transforms.ncp import operations as ncp


def test_what_is_made_once_is_forgotten_in_turn_and_never_large() -> None:
    made: list[tuple[object, ...]] = []

    @made_once
    def make(*args: int) -> torch.Tensor:
        made.append(args)
        return torch.zeros(args[0], dtype=torch.uint8)

    with torch.inference_mode():
        assert make(5) is make(5)
        assert not make(5).is_inference()
    for number in range(9):
        make(6, number)
    make(5)  # eight others came after it
    assert made == [(5,), *((6, number) for number in range(9)), (5,)]
    large = 4 * 2**20 + 1
    assert make(large) is not make(large)


def test_mix64_is_splitmix64() -> None:
    def reference(x: int) -> int:
        wrap = (1 << 64) - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
        return x ^ (x >> 31)

    values = [0, 1, 2, 977, 2**62 - 1, -1, -(2**63), 123456789012345678]
    hashed = mix64(torch.tensor(values)).tolist()
    assert [h % (1 << 64) for h in hashed] == [reference(v % (1 << 64)) for v in values]


def test_uniform_numbers_are_uniform_and_streams_independent() -> None:
    seeds = draw_seeds(2000, torch.Generator().manual_seed(0))
    one, two = hash_uniform(seeds, 1, 3), hash_uniform(seeds, 2, 3)
    assert one.min() >= 0
    assert one.max() < 1
    assert stats.kstest(one.flatten().numpy(), "uniform").pvalue > 1e-3
    columns = torch.cat([one, two], 1).numpy()
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.1


def test_noise_is_white_standard_and_near_normal() -> None:
    field = hash_noise(torch.arange(4), 7, 5, 64, 64).double()
    assert abs(float(field.mean())) < 0.01
    assert abs(float(field.std()) - 1.0) < 0.01
    assert field.abs().max() <= 3.0
    flat = field.flatten(2).reshape(20, -1).numpy()
    assert np.abs(np.corrcoef(flat) - np.eye(20)).max() < 0.08  # samples and channels are independent
    for shift in ((0, 1), (1, 0), (1, 1)):
        moved = torch.roll(field, shift, (2, 3))
        assert abs(float((field * moved).mean())) < 0.02


@pytest.mark.parametrize(("margin", "feather"), [(0.0, 3.0), (2.0, 0.0), (1.5, 4.2), (0.0, 0.0)])
def test_nuclear_weight_follows_the_exact_distance(margin: float, feather: float) -> None:
    rng = np.random.default_rng(3)
    masks = rng.random((3, 41, 37)) > np.array([0.99, 0.9, 0.997])[:, None, None]
    margins = torch.tensor([margin, margin, 2 * margin])
    weight = ncp.nuclear_weight(torch.from_numpy(masks)[:, None], margins, torch.full((3,), feather))
    for i in range(3):
        distance = ndimage.distance_transform_edt(~masks[i])
        if feather:
            ramp = np.clip((float(margins[i]) + feather - distance) / feather, 0, 1)
            expected = ramp * ramp * (3 - 2 * ramp)
        else:
            expected = (distance <= float(margins[i])).astype(float)
        np.testing.assert_allclose(weight[i, 0].numpy(), expected, atol=2e-5)


def test_nuclear_weight_refuses_a_margin_beyond_reach() -> None:
    with pytest.raises(ValueError, match="mpp"):
        ncp.nuclear_weight(torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.tensor([200.0]), torch.tensor([1.0]))


@pytest.mark.parametrize("sigma", [1.5, 2.4, 4.0, 7.0, 12.0])
def test_blur_is_near_a_true_gaussian(sigma: float) -> None:
    image = torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(0).random((3, 90, 101)), (0, 1, 1)))
    image = image.float().sub(image.min()).div(image.max() - image.min())
    expected = ndimage.gaussian_filter(image.numpy(), (0, sigma, sigma), mode="nearest")
    out = blur(image[None].contiguous(), torch.tensor([sigma]))[0].numpy()
    error = np.abs(out - expected)[:, 8:-8, 8:-8]
    assert error.mean() < 0.12 * np.abs(image.numpy() - expected)[:, 8:-8, 8:-8].mean()
    np.testing.assert_allclose(out.mean(), expected.mean(), atol=5e-3)


def test_blur_of_sigma_zero_changes_nothing() -> None:
    image = torch.rand(2, 3, 17, 19)
    assert torch.equal(blur(image, torch.zeros(2)), image)


def test_stain_jitter_mixes_in_optical_density() -> None:
    image = torch.rand(2, 3, 5, 6) * 0.9 + 0.05
    seeds = torch.tensor([5, 6])
    amount = torch.tensor([1.0, 0.4])
    out = jitter_stain(image, amount, seeds, scale=0.3, shift=0.02)
    drawn = (hash_uniform(seeds, 200, 6) * 2 - 1).numpy() * amount.double().numpy()[:, None]
    for i in range(2):
        density = -np.log10(image[i].double().numpy()).transpose(1, 2, 0)
        stains = density @ np.linalg.inv(rgb_from_hed)
        stains = stains * (1 + 0.3 * drawn[i, :3]) + 0.02 * drawn[i, 3:]
        expected = np.clip(10 ** -(stains @ rgb_from_hed), 0, 1).transpose(2, 0, 1)
        np.testing.assert_allclose(out[i].numpy(), expected, atol=2e-5)


def test_stain_jitter_of_nothing_is_the_identity() -> None:
    image = torch.rand(2, 1, 5, 6) * 0.9 + 0.05
    torch.testing.assert_close(jitter_stain(image, torch.zeros(2), torch.arange(2)), image)


def test_shuffle_moves_whole_patches_and_loses_none() -> None:
    image = torch.arange(2 * 35 * 26, dtype=torch.float32).view(2, 1, 35, 26) / 2000
    out = ncp.shuffle_patches(image, torch.tensor([8.0, 5.0]), torch.ones(2), torch.arange(2))
    for i, side in enumerate((8, 5)):
        assert torch.equal(out[i].flatten().sort().values, image[i].flatten())
        rows, columns = 35 // side, 26 // side
        rest_rows, rest_columns = rows * side, columns * side
        assert torch.equal(out[i, :, rest_rows:], image[i, :, rest_rows:])
        assert torch.equal(out[i, :, :, rest_columns:], image[i, :, :, rest_columns:])

        def patches(x: torch.Tensor, side: int = side, rows: int = rows, columns: int = columns) -> set[bytes]:
            blocks = x[: rows * side, : columns * side].unfold(0, side, side).unfold(1, side, side)
            return {block.contiguous().numpy().tobytes() for block in blocks.reshape(-1, side, side)}

        assert patches(out[i, 0]) == patches(image[i, 0])
        assert not torch.equal(out[i], image[i])


def test_shuffle_of_no_patches_is_the_identity() -> None:
    image = torch.rand(2, 3, 20, 20)
    assert torch.equal(ncp.shuffle_patches(image, torch.full((2,), 4.0), torch.zeros(2), torch.arange(2)), image)


def test_cut_out_covers_what_the_rectangles_say() -> None:
    image, colour = torch.zeros(3, 1, 40, 40), torch.ones(3, 1, 1, 1)
    none, some = (ncp.cut_out(image, torch.full((3,), a), torch.arange(3), colour, count=1) for a in (0.0, 0.5))
    assert none.sum() <= 3  # a side of nothing covers at most the pixel whose centre it hits
    for sample in some:
        ys, xs = torch.nonzero(sample[0], as_tuple=True)
        box = sample[0, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert bool(box.all())  # one rectangle, filled
        assert max(box.shape) <= 21


def test_plate_hides_nuclei_and_keeps_the_rest() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ground = (0.6 + 0.3 * torch.sin(x / 30) * torch.cos(y / 25)).expand(1, 3, -1, -1).contiguous()
    mask = ((x - 30) ** 2 + (y - 33) ** 2 < 81).view(1, 1, 64, 64)
    image = torch.where(mask, 0.1, ground)
    weight = ncp.nuclear_weight(mask, torch.tensor([1.0]), torch.tensor([3.0]))
    plate = ncp.background_plate(image, weight)
    assert torch.equal(plate[weight.expand_as(plate) == 0], image[weight.expand_as(plate) == 0])
    assert (plate - ground).abs()[mask.expand_as(plate)].max() < 0.08


def test_plate_of_a_tile_that_is_one_nucleus_is_its_mean() -> None:
    image = torch.rand(1, 3, 9, 7)
    plate = ncp.background_plate(image, torch.ones(1, 1, 9, 7))
    torch.testing.assert_close(plate, image.mean((2, 3), keepdim=True).expand_as(plate))


def test_fade_and_swap_are_linear() -> None:
    image, other = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    amount = torch.tensor([0.0, 0.25, 1.0])
    mixed = image + amount.view(-1, 1, 1, 1) * (other - image)
    torch.testing.assert_close(ncp.swap_background(image, other, amount), mixed)
    colour = ncp.glass_colour(image * 0.1)
    assert float(colour.min()) == pytest.approx(0.75)
    torch.testing.assert_close(ncp.fade(image, amount, colour)[2], colour[2].expand(3, 8, 8))


def test_noise_kernel_has_the_asked_spread() -> None:
    image = torch.full((2, 3, 64, 64), 0.5)
    out = ncp.add_noise(image, torch.tensor([0.02, 0.1]), torch.arange(2))
    for i, std in enumerate((0.02, 0.1)):
        assert math.isclose(float(out[i].std()), std, rel_tol=0.03)


def test_kernels_take_metatensors() -> None:
    image = torch.rand(3, 3, 21, 18)
    mask = torch.rand(3, 1, 21, 18) < 0.1
    one, seeds = torch.ones(3), torch.arange(3)

    def all_of(x: torch.Tensor) -> list[torch.Tensor]:
        weight = ncp.nuclear_weight(mask, one, 2 * one)
        colour = ncp.glass_colour(x)
        return [
            ncp.background_plate(x, weight),
            blur(x, torch.tensor([0.4, 1.5, 5.0])),
            ncp.add_noise(x, 0.1 * one, seeds),
            jitter_stain(x, one, seeds),
            ncp.shuffle_patches(x, torch.tensor([4.0, 6.0, 4.0]), one, seeds),
            ncp.cut_out(x, 0.5 * one, seeds, colour),
            ncp.fade(x, 0.5 * one, colour),
            ncp.swap_background(x, x.flip(0), 0.5 * one),
        ]

    for plain, tracked in zip(all_of(image), all_of(MetaTensor(image))):
        assert torch.equal(plain, torch.as_tensor(tracked))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_sample_becomes_does_not_depend_on_the_batch(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        batch, height, width = (int(torch.randint(low, 40, (), generator=generator)) for low in (2, 1, 1))
        x = torch.rand(batch, channels, height, width, generator=generator)
        sigma, one, seeds = torch.rand(batch, generator=generator) * 6, torch.ones(batch), torch.arange(batch)
        weight = ncp.nuclear_weight(torch.rand(batch, 1, height, width, generator=generator) < 0.1, one, 3 * one)
        kernels = (
            lambda i: ncp.background_plate(x[i], weight[i]),  # noqa: B023
            lambda i: blur(x[i], sigma[i]),  # noqa: B023
            lambda i: ncp.add_noise(x[i], 0.1 * one[i], seeds[i]),  # noqa: B023
            lambda i: jitter_stain(x[i], one[i], seeds[i]),  # noqa: B023
            lambda i: ncp.shuffle_patches(x[i], 8 * one[i], one[i], seeds[i]),  # noqa: B023
            lambda i: ncp.fade(x[i], 0.3 * one[i], ncp.glass_colour(x[i])),  # noqa: B023
        )
        for kernel in kernels:
            together = kernel(slice(None))
            for row in (0, batch - 1):
                assert torch.equal(kernel(slice(row, row + 1))[0], together[row])
