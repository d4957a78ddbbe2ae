"""Where a view is cut: random resized crops, flips and quarter turns of a whole batch as one resampling."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.transforms.kernels.chunks import chunks
from cytossl_monai.transforms.kernels.device import made_once, to_device
from cytossl_monai.transforms.kernels.resampling import halve

__all__ = ["CropBoxes", "cut_together", "draw_boxes", "native_scale", "view_groups"]

_ALIAS_FACTOR = 1.5  # a tile that is shrunk by more than this is halved first; bilinear sampling alone is fine below
NUMBERS = 8
"""Random numbers that a crop takes."""


@dataclass
class CropBoxes:
    """Where each sample of a batch is cut; all on the CPU.

    Args:
        centre: (B, 2) float64, x and y in pixels of the tile, the left and upper border at 0.
        size: (B, 2) float64, width and height in pixels of the tile, before it is turned.
        sides: (B, 2, 2) float64: the view's side to the right and its side downwards, as columns, in the tile's pixels.
    """

    centre: Tensor
    size: Tensor
    sides: Tensor

    def of(self, rows: Tensor | slice) -> CropBoxes:
        """The boxes of some samples."""
        if isinstance(rows, slice) and rows == slice(0, len(self.centre)):
            return self
        return CropBoxes(self.centre[rows], self.size[rows], self.sides[rows])

    def split(self, size: int) -> list[CropBoxes]:
        """Each ``size`` boxes by themselves."""
        parts = zip(self.centre.split(size), self.size.split(size), self.sides.split(size), strict=True)
        return [CropBoxes(*part) for part in parts]

    @staticmethod
    def joined(boxes: Sequence[CropBoxes]) -> CropBoxes:
        """Boxes one after the other."""
        return CropBoxes(*(torch.cat([getattr(b, name) for b in boxes]) for name in ("centre", "size", "sides")))


def native_scale(view_size: int, tile_size: int, zoom: Sequence[float] = (1.0, 1.0)) -> tuple[float, float]:
    """Part of a tile's area that views show at the tile's own scale, or ``zoom`` times enlarged.

    The size of a nucleus tells a cell's kind; a crop of any share of the tile, resized, would not keep it.

    Args:
        view_size: side of a view in pixels.
        tile_size: side of the tiles in pixels.
        zoom: least and largest number of view pixels for one of the tile.

    Returns:
        least and largest part, as ``global_scale`` of ``ViewGenerator`` takes them.

    Raises:
        ValueError: where a view at the least zoom is larger than the tile.
    """
    low, high = (float(value) for value in zoom)
    if not 0 < low <= high:
        raise ValueError(f"zoom is {list(zoom)}; allowed are two numbers above 0, least and largest")
    needed = math.ceil(view_size / low)
    if needed > tile_size:
        raise ValueError(
            f"views of {view_size} px at zoom {low:g} show {needed} px, but tiles have {tile_size} px: set tile_size "
            f"to {needed} or more, or view_size smaller"
        )
    return (view_size / high / tile_size) ** 2, (view_size / low / tile_size) ** 2


def draw_boxes(
    drawn: Tensor,
    height: int,
    width: int,
    scale: tuple[float | Tensor, float | Tensor],
    ratio: tuple[float, float],
    flip: bool = True,
    turn: bool = True,
    rotate: float = 0.0,
    nucleus: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> CropBoxes:
    """Draw a crop a sample.

    Args:
        drawn: (B, 8) float64 in [0, 1), the random numbers to use.
        height: of the tiles, pixels.
        width: of the tiles, pixels.
        scale: least and largest part of the tile's area, one for all or (B,) float64 on the CPU.
        ratio: least and largest width to height.
        flip: mirror half of the samples.
        turn: turn by 0, 90, 180 or 270 degrees, each as likely.
        rotate: and by any angle up to this many degrees, either way. A box that would reach over the tile's border is
            made smaller: a view never shows what is not there.
        nucleus: (B, 2) float64 the nuclei to centre on, x and y, and (B,) bool which samples are centred on theirs, as
            far as the tile's border allows; the others are cut anywhere.
        valid: (B, 4) left, top, right and bottom of each tile's real pixels; None: all are. The rest is fill, of which
            a view is to show nothing: two views that hold the same fill are told apart from others by it alone.
            ``scale`` is then the part of the real pixels' area.

    Returns:
        Boxes that lie within the tile, and within its real pixels.
    """
    left, top, right, bottom = _real_edges(valid, len(drawn), height, width)
    real_w, real_h = right - left, bottom - top
    area = real_h * real_w * (scale[0] + (scale[1] - scale[0]) * drawn[:, 0])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * drawn[:, 1])
    one = torch.ones_like(real_w)
    box_w = torch.minimum(torch.maximum((area * aspect).sqrt(), one), real_w)
    box_h = torch.minimum(torch.maximum(area / box_w, one), real_h)
    reach_x, reach_y = box_w / 2, box_h / 2
    spin = torch.eye(2, dtype=torch.float64).expand(len(drawn), 2, 2)
    if rotate > 0.0:
        angle = math.radians(rotate) * (2.0 * drawn[:, 6] - 1.0)
        cos, sin = angle.cos(), angle.sin()
        spin = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
        reach_x = (cos.abs() * box_w + sin.abs() * box_h) / 2
        reach_y = (sin.abs() * box_w + cos.abs() * box_h) / 2
        fits = torch.minimum(real_w / (2 * reach_x), real_h / (2 * reach_y)).clamp(max=1.0)
        box_w, box_h, reach_x, reach_y = box_w * fits, box_h * fits, reach_x * fits, reach_y * fits
    centre_x = left + reach_x + (real_w - 2 * reach_x) * drawn[:, 2]
    centre_y = top + reach_y + (real_h - 2 * reach_y) * drawn[:, 3]
    if nucleus is not None:
        (at_x, at_y), use = nucleus[0].unbind(1), nucleus[1]
        centre_x = torch.where(use, torch.minimum(torch.maximum(at_x, left + reach_x), right - reach_x), centre_x)
        centre_y = torch.where(use, torch.minimum(torch.maximum(at_y, top + reach_y), bottom - reach_y), centre_y)
    quarter = (drawn[:, 4] * 4).to(torch.int64) if turn else torch.zeros(len(drawn), dtype=torch.int64)
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)[quarter]
    sin = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)[quarter]
    mirror = torch.where(drawn[:, 5] < 0.5, -1.0, 1.0) if flip else torch.ones(len(drawn), dtype=torch.float64)
    axes = torch.stack([torch.stack([mirror * cos, -sin], 1), torch.stack([mirror * sin, cos], 1)], 1)
    size = torch.stack([box_w, box_h], 1)
    return CropBoxes(torch.stack([centre_x, centre_y], 1), size, spin @ (size.unsqueeze(-1) * axes))


def _real_edges(valid: Tensor | None, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) float64 left, top, right and bottom of the real pixels, at least one pixel wide and within the tile.

    Raises:
        ValueError: when ``valid`` is not (B, 4).
    """
    if valid is None:
        valid = torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64).expand(batch, 4)
    if valid.shape != (batch, 4):
        raise ValueError(f"valid must be ({batch}, 4): left, top, right, bottom; got {tuple(valid.shape)}")
    edges = valid.to("cpu", torch.float64)
    left, top = edges[:, 0].clamp(0.0, width - 1.0), edges[:, 1].clamp(0.0, height - 1.0)
    right = torch.maximum(edges[:, 2].clamp(max=width), left + 1.0)
    return left, top, right, torch.maximum(edges[:, 3].clamp(max=height), top + 1.0)


@made_once
def _line(side: int, device: torch.device) -> Tensor:
    """(side, 1) float64: the middles of a view's pixels along its side, in [-1, 1]."""
    # By the host: a GPU divides by multiplying with the inverse, which is rounded.
    line = (torch.arange(side, dtype=torch.float64) * 2.0 + 1.0) / side - 1.0
    return to_device(line.unsqueeze(1), device)


def _grid(boxes: CropBoxes, side: int, height: int, width: int, device: torch.device) -> Tensor:
    """(n, side, side, 2) sampling positions in [-1, 1], as ``grid_sample`` takes them (``align_corners=False``)."""
    tile = torch.tensor([width, height], dtype=torch.float64)
    middle = 2.0 * boxes.centre / tile - 1.0
    steps = boxes.sides / tile.unsqueeze(-1)
    numbers = to_device(torch.cat([steps.transpose(1, 2), middle.unsqueeze(1)], 1), device)
    along = numbers[:, :2].unsqueeze(2) * _line(side, device)
    along[:, 0].add_(numbers[:, 2:])
    # Pairs are added as complex numbers: one pass that writes in order.
    x, y = torch.view_as_complex(along.to(torch.float32)).unbind(1)
    return torch.view_as_real(x.unsqueeze(1) + y.unsqueeze(2))


def _cut(pyramid: list[Tensor], boxes: CropBoxes, side: int, channels: int) -> Tensor:
    """Views of each sample: (V, n, channels, side, side), not contiguous.

    Args:
        pyramid: (n, C, H, W) and its halves, quarters, ..., which are added where they are needed first.
        boxes: where to cut, V of them for each sample: all samples, then all samples again, ...
        side: of the view in pixels.
        channels: the first so many are cut.
    """
    depths = torch.log2(boxes.size.amax(1) / (side * _ALIAS_FACTOR)).ceil_().clamp_(min=0).to(torch.int64)
    counts = torch.bincount(depths)
    while len(pyramid) < len(counts):
        pyramid.append(halve(pyramid[-1]))
    samples = len(pyramid[0])

    def sample(depth: int, picture: Tensor, boxes: CropBoxes) -> Tensor:
        """Views from pictures, each of which may be cut several times: (n, channels, V * side, side)."""
        height, width = (length << depth for length in picture.shape[-2:])
        grid = _grid(boxes, side, height, width, picture.device).view(len(picture), -1, side, 2)
        return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)

    # All views of a sample lie below one another in one call, so that no picture is copied for each of its views. Those
    # few that another depth suits better are cut again.
    most = int(counts.argmax())
    by_sample = torch.arange(len(depths)).view(-1, samples).T.flatten()
    cut = sample(most, pyramid[most][:, :channels], boxes.of(by_sample))
    cut = cut.unflatten(2, (-1, side)).permute(2, 0, 1, 3, 4)
    for depth in counts.nonzero().flatten().tolist():
        if depth != most:
            rows = (depths == depth).nonzero().squeeze(1)
            view, source = to_device(torch.stack([rows // samples, rows % samples]), cut.device)
            picture = pyramid[depth][:, :channels].index_select(0, source)
            cut[view, source] = sample(depth, picture, boxes.of(rows))
    return cut


def view_groups(sizes: Sequence[int], masked: Collection[int], device: torch.device) -> list[list[int]]:
    """Which views are cut and coloured together.

    A CPU is fast as long as its caches hold what it works on: one view at a time. A GPU waits for the host to name the
    next of some hundred small steps, so views of one side go through them together.

    Args:
        sizes: side of each view in pixels.
        masked: indices of the views whose masks are wanted.
        device: of the tiles.

    Returns:
        Indices of views, in order.
    """
    groups: list[list[int]] = []
    for index, side in enumerate(sizes):
        like = groups and sizes[groups[-1][0]] == side and (groups[-1][0] in masked) == (index in masked)
        if like and device.type != "cpu":
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def cut_together(
    tiles: Tensor,
    masks: Tensor | None,
    boxes: list[CropBoxes],
    sizes: Sequence[int],
    groups: list[list[int]],
    masked: Collection[int],
) -> list[tuple[Tensor, Tensor | None]]:
    """Cut groups of views, image and mask in one resampling.

    Colours are interpolated bilinearly; a tile that is shrunk by more than 1.5 is halved first, as often as it takes,
    so that nothing aliases. A pixel of the mask is nuclear where more than half of what is interpolated is.

    Args:
        tiles: (B, C, H, W), uint8 or floating point in [0, 1].
        masks: (B, 1, H, W) bool; None cuts no masks.
        boxes: where to cut, one for each view.
        sizes: side of each view in pixels.
        groups: of `view_groups`.
        masked: indices of the views whose masks are wanted.

    Returns:
        For each group of V views: (V, B, C, side, side) float32 in [0, 1], and (V, B, 1, side, side) bool or None.
    """
    batch, channels, height, width = tiles.shape
    device = tiles.device
    out: list[tuple[Tensor, Tensor | None]] = []
    for group in groups:
        shape, side = (len(group), batch), sizes[group[0]]
        mask = None
        if masks is not None and group[0] in masked:
            mask = torch.empty(*shape, 1, side, side, dtype=torch.bool, device=device)
        out.append((torch.empty(*shape, channels, side, side, device=device), mask))
    planes = channels + any(mask is not None for _, mask in out)
    for rows in chunks(tiles):
        source = torch.empty(rows.stop - rows.start, planes, height, width, device=device)
        if tiles.dtype == torch.uint8:
            torch.div(tiles[rows], 255.0, out=source[:, :channels])
        else:
            source[:, :channels] = tiles[rows]
        if masks is not None and planes > channels:
            source[:, channels:] = masks[rows]
        pyramid = [source]
        for group, (view, mask) in zip(groups, out, strict=True):
            places = CropBoxes.joined([boxes[index].of(rows) for index in group])
            cut = _cut(pyramid, places, sizes[group[0]], channels if mask is None else planes)
            torch.clamp(cut[:, :, :channels], 0.0, 1.0, out=view[:, rows])
            if mask is not None:
                torch.gt(cut[:, :, channels:], 0.5, out=mask[:, rows])
    return out
