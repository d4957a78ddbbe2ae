"""cuCIM: the fastest reader of tiled TIFF and SVS, on a CPU as well; decodes on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError, paste_inside
from cytossl_monai.data.slides.tiff_tiles import read_tiff_tiles

__all__ = ["CuCIMBackend"]

_BATCH = 32


class CuCIMBackend(Backend):
    """Opens through MONAI's CuCIMWSIReader; reads through cuCIM's batched call, which MONAI does not use.

    cuCIM ends the process on some files; those are refused by their tags, and `Slide` checks each tile's frame first.
    """

    name: ClassVar[str] = "cucim"
    suffixes: ClassVar[frozenset[str] | None] = frozenset({".tif", ".tiff", ".svs"})

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        tiles = read_tiff_tiles(path)
        refusal = tiles if isinstance(tiles, str) else tiles.cucim_refusal
        if isinstance(tiles, str) or refusal:
            raise BackendError(str(refusal))
        self.resolution = tiles.resolution
        try:
            import cucim  # noqa: F401 - MONAI's message for an absent cuCIM does not say how to get it
            from monai.data.wsi_reader import CuCIMWSIReader
        except ImportError as error:
            raise BackendError("cuCIM is not installed (pip install --no-deps cucim-cu12)") from error
        try:
            self._image = CuCIMWSIReader().read(str(path))
        except TypeError as error:  # another reader may take the bytes of such a name as they are
            raise BackendError("takes no path that is not UTF-8") from error
        except (ValueError, RuntimeError) as error:
            raise BackendError(str(error)) from error
        dimensions = [tuple(size) for size in self._image.resolutions["level_dimensions"]]
        if not dimensions or self._image.dtype.bits != 8 or self._image.shape[-1] not in (3, 4):
            shape = self._image.shape
            self.close()
            raise BackendError(f"not an 8-bit RGB slide (shape {shape})")
        self.level_dimensions = [(int(w), int(h)) for w, h in dimensions]
        if any(tiles.level_of(size) is None for size in self.level_dimensions):
            self.close()
            raise BackendError(f"it sees levels of {self.level_dimensions}, the file's tables have others")
        self._downsamples = [float(d) for d in self._image.resolutions["level_downsamples"]]

    def _level0(self, level: int, locations: np.ndarray) -> list[tuple[int, int]]:
        # cuCIM takes level-0 coordinates and cuts them off to the level, towards zero: a little more than the pixel's
        # edge, away from zero, comes back to it.
        slack = 0.01 if level else 0.0
        scaled = locations * self._downsamples[level]
        scaled = np.where(locations < 0, np.floor(scaled - slack), np.ceil(scaled + slack)).astype(np.int64)
        return [(int(x), int(y)) for x, y in scaled]

    def _batches(
        self, level: int, locations: np.ndarray, size: tuple[int, int], num_workers: int, device: str
    ) -> list[Any]:
        where = self._level0(level, locations)
        try:
            if len(where) == 1:
                return [self._image.read_region(where[0], size, level=level, device=device)]
            batch = min(_BATCH, len(where))
            return self._image.read_region(
                where, size, level=level, num_workers=max(1, num_workers), batch_size=batch, device=device
            )
        except (ValueError, RuntimeError) as error:
            raise BackendError(str(error)) from error

    def read(
        self, level: int, locations: np.ndarray, size: tuple[int, int], fill: np.ndarray, num_workers: int = 0
    ) -> np.ndarray:
        """See `Backend.read`. cuCIM fills outside with black."""
        width, height = size
        level_w, level_h = self.level_dimensions[level]
        if width > level_w or height > level_h:
            # cuCIM refuses a region larger than its level: read what there is and paste it.
            out = np.empty((len(locations), height, width, 3), np.uint8)
            out[:] = fill
            whole = self.read(level, np.zeros((1, 2), np.int64), (level_w, level_h), fill, num_workers)[0]
            for region, (x, y) in zip(out, locations):
                paste_inside(region, whole, (0, 0), (int(x), int(y)))
            return out
        out = np.empty((len(locations), height, width, 3), np.uint8)
        done = 0
        try:
            for batch in self._batches(level, locations, size, num_workers, "cpu"):
                pixels = np.asarray(batch).reshape(-1, height, width, self._image.shape[-1])
                out[done : done + len(pixels)] = pixels[..., :3]
                done += len(pixels)
        except (ValueError, RuntimeError) as error:
            raise BackendError(str(error)) from error
        if done != len(locations):
            raise BackendError(f"cuCIM returned {done} of {len(locations)} regions")
        return out

    def read_blocks(
        self, level: int, locations: np.ndarray, size: tuple[int, int], fill: np.ndarray, num_workers: int = 0
    ) -> Iterator[np.ndarray]:
        """See `Backend.read_blocks`: with one thread, single calls, which spare the copy out of cuCIM's batch."""
        level_w, level_h = self.level_dimensions[level]
        if num_workers > 1 or size[0] > level_w or size[1] > level_h:
            yield self.read(level, locations, size, fill, num_workers)
            return
        for x, y in self._level0(level, locations):
            yield self._window(x, y, size, level)

    def _window(self, x: int, y: int, size: tuple[int, int], level: int) -> np.ndarray:
        try:
            return np.asarray(self._image.read_region((x, y), size, level=level))[None, ..., :3]
        except (ValueError, RuntimeError) as error:
            raise BackendError(str(error)) from error

    def read_cuda(self, level: int, locations: np.ndarray, size: tuple[int, int], num_workers: int = 0) -> Any:
        """See `Backend.read_cuda`: pixels go from cuCIM to torch through DLPack and never over the host."""
        try:
            import cupy
            import torch
        except ImportError:
            return None
        width, height = size
        if width > self.level_dimensions[level][0] or height > self.level_dimensions[level][1]:
            return None
        out, done = None, 0
        for batch in self._batches(level, locations, size, num_workers, "cuda"):
            pixels = torch.from_dlpack(cupy.asarray(batch)).reshape(-1, height, width, self._image.shape[-1])
            if out is None:
                out = torch.empty(len(locations), height, width, 3, dtype=torch.uint8, device=pixels.device)
            out[done : done + len(pixels)] = pixels[..., :3]
            done += len(pixels)
            # cuCIM frees the memory of a batch once the next one is taken: the copy must be done by then.
            torch.cuda.current_stream(pixels.device).synchronize()
        if done != len(locations):
            raise BackendError(f"cuCIM returned {done} of {len(locations)} regions")
        return out

    def close(self) -> None:
        """Close the CuImage (MONAI never does)."""
        self._image.close()
