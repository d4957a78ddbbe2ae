"""Which libraries segment: NumPy, SciPy and scikit-image on a CPU, or CuPy and ``cucim.skimage`` on a GPU.

The code of ``nuclei.regions`` is written once, over ``ArrayBackend.xp`` and ``ArrayBackend.ndimage``: CuPy mirrors
NumPy and SciPy function by function, cuCIM mirrors scikit-image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import gaussian
from skimage.segmentation import expand_labels

__all__ = ["CPU", "ArrayBackend", "BackendName", "array_backend"]

BackendName = Literal["auto", "cpu", "cucim"]


@dataclass(frozen=True)
class ArrayBackend:
    """The modules and functions that one kind of array is worked on with.

    Args:
        name: ``"cpu"`` or ``"cucim"``.
        xp: NumPy or CuPy.
        ndimage: ``scipy.ndimage`` or ``cupyx.scipy.ndimage``.
        gaussian: of ``skimage.filters`` or ``cucim.skimage.filters``.
        expand_labels: of ``skimage.segmentation`` or ``cucim.skimage.segmentation``.
        to_numpy: brings an array to the host.
    """

    name: str
    xp: Any
    ndimage: Any
    gaussian: Callable[..., Any]
    expand_labels: Callable[..., Any]
    to_numpy: Callable[[Any], NDArray[Any]]

    def from_torch(self, tensor: torch.Tensor) -> Any:
        """A tensor as an array of this backend; one that lies on the backend's device already is not copied."""
        tensor = tensor.detach()
        if self.name == "cpu" or tensor.device.type == "cpu":
            return self.xp.asarray(tensor.cpu().numpy())
        return self.xp.asarray(tensor.contiguous())  # through the CUDA array interface


CPU = ArrayBackend("cpu", np, ndimage, gaussian, expand_labels, np.asarray)


@cache
def _cucim() -> ArrayBackend:
    """The backend on the current GPU.

    Raises:
        ImportError: CuPy or cuCIM is not installed.
        RuntimeError: no GPU can be used.
    """
    import cupy
    from cucim.skimage.filters import gaussian as gpu_gaussian
    from cucim.skimage.segmentation import expand_labels as gpu_expand_labels
    from cupyx.scipy import ndimage as gpu_ndimage

    try:
        cupy.zeros(1)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(str(error)) from error
    return ArrayBackend("cucim", cupy, gpu_ndimage, gpu_gaussian, gpu_expand_labels, cupy.asnumpy)


def array_backend(name: BackendName = "auto", device: torch.device | None = None) -> ArrayBackend:
    """The backend of a name.

    Args:
        name: ``"cpu"``; ``"cucim"``; or ``"auto"``: cuCIM for a tile that lies on a GPU, where CuPy and cuCIM are
            installed, the CPU otherwise.
        device: where the tile lies.

    Raises:
        ValueError: unknown name, or cuCIM was asked for by name and cannot be used.
    """
    if name not in ("auto", "cpu", "cucim"):
        raise ValueError(f"backend is {name!r}; it must be 'auto', 'cpu' or 'cucim'.")
    if name == "cpu" or (name == "auto" and (device is None or device.type != "cuda")):
        return CPU
    try:
        return _cucim()
    except (ImportError, RuntimeError) as error:
        if name == "auto":
            return CPU
        raise ValueError(
            f"backend is 'cucim' and cannot be used here ({error}); install CuPy and cuCIM on a machine with a GPU, "
            "or take 'cpu'."
        ) from error
