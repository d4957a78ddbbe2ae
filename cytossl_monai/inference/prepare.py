"""An encoder made ready to run: its place, memory layout and batch; and held against the tiles that it will get."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.data.bags.features import read_feature_attrs
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.utils.errors import FeatureError

__all__ = ["best_batch", "fitting_batch", "prepare_encoder", "warn_of_other_features", "warn_of_tile_size"]

logger = logging.getLogger(__name__)
ON_CPU = 32
"""Batch on a CPU, whose speed hardly depends on it."""
_TRIALS = (8, 16, 32, 64, 128, 256, 512, 1024)
_GAIN = 1.05  # a larger batch must be faster by this factor a tile to be worth its memory


def prepare_encoder(
    encoder: Encoder, device: str | torch.device, channels_last: bool = False, compile: bool = False
) -> Encoder:
    """Put an encoder in place for inference; its features stay the same up to rounding.

    Args:
        encoder: changed in place.
        device: where to run it.
        channels_last: keep images as (B, H, W, C) in memory: faster for convolutions on tensor cores.
        compile: ``torch.compile`` it at its first batch, which then takes a minute or more.

    Returns:
        the encoder in evaluation mode.
    """
    encoder = encoder.to(device).eval()
    if channels_last:
        for parameter in encoder.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        encoder.register_forward_pre_hook(_as_channels_last)
    if compile:
        encoder.compile()
    return encoder


def _as_channels_last(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *others = arguments
    return (images.contiguous(memory_format=torch.channels_last), *others)


def fitting_batch(encoder: Encoder, tile_size: int, device: str | torch.device, amp: bool = False) -> int:
    """How many tiles to encode at once: found by trial on a GPU, `ON_CPU` on a CPU.

    Args:
        encoder: in place, see `prepare_encoder`.
        tile_size: side of the tiles in pixels.
        device: where it is.
        amp: bfloat16 autocast.

    Raises:
        RuntimeError: (out of memory) where not even the smallest batch fits.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return ON_CPU

    @torch.inference_mode()
    def seconds(batch: int) -> float:
        tiles = torch.zeros(batch, encoder.mean.shape[1], tile_size, tile_size, dtype=torch.uint8, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            encoder(tiles)  # the first one warms up
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            out: Tensor = encoder(tiles)
        del out
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    batch = best_batch(seconds)
    torch.cuda.empty_cache()
    logger.info("%d tiles of %d px are encoded at once.", batch, tile_size)
    return batch


def best_batch(seconds: Callable[[int], float]) -> int:
    """The smallest batch that is nearly as fast a tile as any larger one that fits.

    Args:
        seconds: time of one batch; raises `torch.OutOfMemoryError` where it does not fit.

    Raises:
        torch.OutOfMemoryError: where not even the smallest batch fits.
    """
    best, speed = 0, 0.0
    for batch in _TRIALS:
        try:
            rate = batch / max(seconds(batch), 1e-9)
        except torch.OutOfMemoryError:
            if best == 0:
                raise
            break
        if best and rate < _GAIN * speed:
            break
        best, speed = batch, rate
    return best


def warn_of_tile_size(encoder: nn.Module, tile_size: int, mpp: float | None = None) -> bool:
    """Log a warning where tiles are of another size or resolution than the encoder was trained on.

    A transformer takes them, by interpolating its positions, but its features are then not those that it learned.

    Args:
        encoder: with what is known of it in ``meta``, else the size of its network.
        tile_size: side of the tiles in pixels.
        mpp: micrometres per pixel of the tiles, where they are to be compared.

    Returns:
        whether it warned.
    """
    meta = getattr(encoder, "meta", None) or {}
    config = getattr(getattr(encoder, "network", None), "config", None) or {}
    trained = meta.get("tile_size") or config.get("img_size")
    sides = {int(side) for side in (trained if isinstance(trained, (list, tuple)) else [trained]) if side}
    warned = False
    if sides and sides != {tile_size}:
        logger.warning(
            "the encoder was trained on images of %s px, the tiles have %d px: index with --tile_size %s for the "
            "features that it learned",
            " x ".join(str(side) for side in sorted(sides)),
            tile_size,
            max(sides),
        )
        warned = True
    own_mpp = meta.get("mpp")
    if mpp is not None and isinstance(own_mpp, int | float) and abs(own_mpp - mpp) > 0.05 * own_mpp:
        logger.warning(
            "the encoder was trained at %g um/px, the tiles are at %g: index with --mpp %g for the features that it "
            "learned",
            own_mpp,
            mpp,
            own_mpp,
        )
        warned = True
    return warned


def warn_of_other_features(folder: Path, encoder_id: str, encoder_name: str) -> bool:
    """Log a warning where a folder holds features of another encoder: training refuses to mix them.

    Returns:
        whether it warned.
    """
    others: dict[tuple[str, str], int] = {}
    for path in sorted(folder.glob("*.h5")):
        try:
            attrs = read_feature_attrs(path)
        except FeatureError:
            continue  # damaged: it is made again, or reading it says so
        if attrs.get("encoder") not in (None, encoder_id):
            key = str(attrs.get("encoder_name") or "unknown"), str(attrs["encoder"])
            others[key] = others.get(key, 0) + 1
    for (name, digest), count in others.items():
        logger.warning(
            "%s holds %d feature files of the encoder %s (%s), not of %s (%s): those of the slides given are made "
            "again, others stay. Give another --output_dir to keep both.",
            folder,
            count,
            name,
            digest,
            encoder_name or "this encoder",
            encoder_id,
        )
    return bool(others)
