"""Which patches of a tile are blank glass, from the tile's own pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["foreground_patches"]

# A tile that is darker than this all over shows no glass; its brightest colour is then not taken for glass.
_DARKEST_GLASS = 0.7


def foreground_patches(
    images: Tensor,
    patch_size: tuple[int, int],
    threshold: float = 0.06,
    glass: Sequence[float] | Tensor | None = None,
    on_blank: str = "error",
) -> Tensor:
    """Patches that hold more than glass: those whose optical density against the glass exceeds ``threshold``.

    A patch counts as foreground when the mean over its pixels of the largest channel's optical density
    ``-log10(pixel / glass)`` is above ``threshold``.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        patch_size: rows and columns of a patch.
        threshold: optical density, above 0; 0.06 is 13 % less light than glass.
        glass: colour of the slide's glass, three values in (0, 1] (for example `Slide.glass` / 255); None: the 95th
            percentile of each channel of each image, but at least 0.7.
        on_blank: ``error``, or ``darkest``: an image without foreground keeps its darkest patch.

    Returns:
        (B, N) bool in raster order. No gradient.

    Raises:
        ValueError: for pixels outside [0, 1], and for an all blank image under ``on_blank="error"``.
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be above 0; got {threshold}.")
    if on_blank not in ("error", "darkest"):
        raise ValueError(f"on_blank must be 'error' or 'darkest'; got {on_blank!r}.")
    with torch.no_grad():
        images = images.float()
        low, high = images.aminmax()
        if low < 0 or high > 1:
            raise ValueError(
                f"Blank glass is found in images in [0, 1]; these reach from {float(low):.2f} to {float(high):.2f}. "
                "Give images that are not normalised, or give the foreground yourself."
            )
        if glass is None:
            light = torch.quantile(images[..., ::4, ::4].flatten(2), 0.95, dim=-1).clamp_min(_DARKEST_GLASS)
        else:
            light = torch.as_tensor(glass, dtype=images.dtype, device=images.device).expand(images.shape[0], -1)
        density = -torch.log10(images.clamp_min(1 / 255) / light[..., None, None])
        mean = F.avg_pool2d(density.amax(dim=1, keepdim=True), patch_size).flatten(1)
        foreground = mean > threshold
        blank = ~foreground.any(dim=1)
        if blank.any():
            if on_blank == "error":
                raise ValueError(
                    f"All patches of image(s) {blank.nonzero().flatten().tolist()} are blank at threshold {threshold}. "
                    "Leave such tiles out, lower the threshold, or set on_blank to 'darkest'."
                )
            foreground = foreground | (blank.unsqueeze(1) & F.one_hot(mean.argmax(dim=1), mean.shape[1]).bool())
    return foreground
