"""The exact path on arrays that refuse to mix with NumPy's, as CuPy's do, and on a GPU where there is one."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nuclei_drawings import Disc, dice, draw
from scipy import ndimage
from skimage.filters import gaussian
from skimage.segmentation import expand_labels

from cytossl_monai.transforms.nuclei import instances as nuclei
from cytossl_monai.transforms.nuclei.backend import CPU, ArrayBackend, array_backend


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that lies elsewhere: it works with its own kind and with numbers, and refuses host arrays."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("implicit conversion of a device array to NumPy")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return on_device(getattr(ufunc, method))(*inputs, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return on_device(lambda a, k: a[k])(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.values[host(key)] = host(value)

    def __len__(self) -> int:
        return len(self.values)

    def __float__(self) -> float:
        return float(self.values)

    def __int__(self) -> int:
        return int(self.values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.values, name)
        return on_device(found) if callable(found) else found


def host(value: Any) -> Any:
    """The values of device arrays, however deep; host arrays of one or more dimensions are refused."""
    if isinstance(value, DeviceArray):
        return value.values
    if isinstance(value, (tuple, list)):
        return type(value)(host(v) for v in value)
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("a NumPy array met a device array")
    return value


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, from device arrays to device arrays."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = function(*host(args), **{k: host(v) for k, v in kwargs.items()})
        if isinstance(out, tuple):
            return tuple(DeviceArray(o) if isinstance(o, np.ndarray) else o for o in out)
        return DeviceArray(np.asarray(out)) if isinstance(out, (np.ndarray, np.generic)) else out

    return wrapped


def module_of(library: Any) -> Any:
    """The library's functions on device arrays; ``asarray`` is the way in."""
    fake = types.SimpleNamespace()
    for name in dir(library):
        member = getattr(library, name)
        setattr(fake, name, on_device(member) if callable(member) and not isinstance(member, type) else member)
    fake.asarray = lambda a, dtype=None: a if isinstance(a, DeviceArray) else DeviceArray(np.array(a, dtype=dtype))
    return fake


@pytest.fixture
def device() -> ArrayBackend:
    """A backend that does on the host what CuPy does on a GPU, with CuPy's strictness about whose arrays are whose."""
    return ArrayBackend(
        "cucim",
        module_of(np),
        module_of(ndimage),
        on_device(gaussian),
        on_device(expand_labels),
        lambda array: array.values if isinstance(array, DeviceArray) else np.asarray(array),
    )


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.9])
def test_a_strict_device_gives_the_same_labels(
    device: ArrayBackend, monkeypatch: pytest.MonkeyPatch, mpp: float
) -> None:
    image, truth = draw([Disc(16, 18, 8), Disc(46, 16, 7, 0.7), Disc(26, 44, 8), Disc(33.5, 44, 8)], mpp=mpp)
    expected = nuclei.segment_instances(image, mpp, backend="cpu")
    monkeypatch.setattr(nuclei, "array_backend", lambda name, where: device)
    found = nuclei.segment_instances(image, mpp, backend="cucim")
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert type(found.labels) is np.ndarray
    assert dice(found.labels, truth) > 0.85
    assert nuclei.segment_instances(np.full((3, 30, 30), 240, np.uint8), mpp).labels.max() == 0


def test_the_strict_device_is_strict(device: ArrayBackend) -> None:
    ours = device.xp.asarray(np.arange(3.0))
    with pytest.raises(TypeError):
        ours + np.arange(3.0)
    with pytest.raises(TypeError):
        np.asarray(ours)
    with pytest.raises(TypeError):
        ours[np.array([0, 1])]


def test_which_backend_is_taken() -> None:
    assert array_backend("cpu") is CPU
    assert array_backend("auto", torch.device("cpu")) is CPU
    with pytest.raises(ValueError, match=r"'gpu'.*'auto', 'cpu' or 'cucim'"):
        array_backend("gpu")


def test_asking_for_cucim_where_it_cannot_work_says_so() -> None:
    try:
        import cupy

        usable = cupy.cuda.runtime.getDeviceCount() > 0
    except (ImportError, RuntimeError):
        usable = False
    if usable:
        pytest.skip("it can work here")
    with pytest.raises(ValueError, match=r"cucim.*CuPy"):
        nuclei.segment_instances(np.full((3, 8, 8), 200, np.uint8), 0.5, backend="cucim")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cucim_gives_the_same_pixels_within_one_percent() -> None:
    pytest.importorskip("cupy")
    image, truth = draw([Disc(16, 18, 8), Disc(46, 16, 7, 0.7), Disc(32, 46, 12)], mpp=0.25)
    expected = nuclei.segment_instances(image, 0.25, backend="cpu").labels
    for tile in (image, torch.from_numpy(image).cuda()):
        found = nuclei.segment_instances(tile, 0.25, backend="cucim").labels
        assert ((found > 0) != (expected > 0)).mean() < 0.01
        assert found.max() == expected.max()
        assert dice(found, truth) > 0.9
