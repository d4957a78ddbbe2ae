"""Where the nuclei of a batch of tiles lie: one row a nucleus, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.device import grouped_sums, to_device
from cytossl_monai.transforms.nuclei.labels import label_planes

__all__ = ["NucleiCentres"]


@dataclass
class NucleiCentres:
    """The nuclei of a batch, sorted by sample.

    Attributes:
        xy: (P, 2) float64 on the CPU: centres in pixels of the tile, the left and upper border at 0.
        sample: (P,) int64 on the CPU, rising: which tile of the batch a nucleus lies in.
        batch: number of tiles.
        labels: (B, H, W) integers on the masks' device, 0 outside and 1 + row of ``xy`` inside a nucleus; None where
            only points are known.
    """

    xy: Tensor
    sample: Tensor
    batch: int
    labels: Tensor | None = None

    @classmethod
    def of_masks(cls, masks: Tensor) -> NucleiCentres:
        """The 4-connected parts of binary masks; nuclei that touch count as one.

        Args:
            masks: (B, 1, H, W) bool, on any device.
        """
        labels, count = label_planes(masks[:, 0])
        return cls._of_labels(labels, count)

    @classmethod
    def of_instances(cls, instances: Tensor) -> NucleiCentres:
        """The nuclei of instance maps: touching ones stay apart.

        Args:
            instances: (B, 1, H, W) whole numbers, 0 outside; each other value of a tile is one nucleus of it.
        """
        plane = instances[:, 0].long()
        keys = torch.where(
            plane > 0, plane + plane.amax() * torch.arange(len(plane), device=plane.device).view(-1, 1, 1), 0
        )
        values, inverse = torch.unique(keys, return_inverse=True)
        outside = int(values.numel() > 0 and int(values[0]) == 0)
        return cls._of_labels(inverse + 1 - outside, int(values.numel()) - outside)

    @classmethod
    def of_points(cls, points: Sequence[Tensor]) -> NucleiCentres:
        """Points of a detector.

        Args:
            points: for each tile (n, 2): x and y in its pixels.

        Raises:
            ValueError: for other shapes.
        """
        for number, one in enumerate(points):
            if one.ndim != 2 or one.shape[1] != 2:
                raise ValueError(
                    f"points of tile {number} have the shape {tuple(one.shape)}; allowed is (n, 2): x and y"
                )
        counts = torch.tensor([len(one) for one in points], dtype=torch.int64)
        xy = torch.cat([one.detach().cpu().double() for one in points]) if len(points) else torch.zeros(0, 2).double()
        return cls(xy, torch.repeat_interleave(torch.arange(len(points)), counts), len(points))

    @classmethod
    def _of_labels(cls, labels: Tensor, count: int) -> NucleiCentres:
        """Means of the pixels of every label 1 to ``count``, which are numbered tile by tile."""
        batch, height, width = labels.shape
        flat = labels.flatten()
        inside = flat.nonzero().squeeze(1)
        owner = flat[inside].long() - 1
        line = torch.div(inside, width, rounding_mode="floor")
        tile = torch.div(line, height, rounding_mode="floor")
        column, row = torch.sub(inside, line, alpha=width), torch.sub(line, tile, alpha=height)
        values = torch.stack([column, row, tile, torch.ones_like(tile)]).double()
        # One copy to the host, where all that follows is decided.
        *sums, pixels = grouped_sums(owner, values, count).cpu()
        x, y, sample = (total / pixels.clamp_min(1) for total in sums)
        xy, sample = torch.stack([x, y], 1) + 0.5, sample.long()
        order = torch.argsort(sample, stable=True)
        if bool((order[1:] < order[:-1]).any()):
            place = torch.empty_like(order)
            place[order] = torch.arange(count)
            table = to_device(torch.cat([torch.zeros(1, dtype=torch.int64), place + 1]), labels.device)
            labels = table[labels.long()]
        return cls(xy[order], sample[order], batch, labels)

    def counts(self) -> Tensor:
        """(B,) int64: nuclei of each tile."""
        return torch.bincount(self.sample, minlength=self.batch)

    def first(self) -> Tensor:
        """(B,) int64: row of each tile's first nucleus."""
        counts = self.counts()
        return counts.cumsum(0) - counts

    def of(self, rows: Tensor) -> NucleiCentres:
        """The nuclei of some tiles, renumbered.

        Args:
            rows: (n,) int64 on the CPU, the tiles to take, in this order.
        """
        if len(rows) == self.batch and torch.equal(rows, torch.arange(self.batch)):
            return self
        counts, first = self.counts()[rows], self.first()[rows]
        sample = torch.repeat_interleave(torch.arange(len(rows)), counts)
        starts = counts.cumsum(0) - counts
        taken = torch.arange(len(sample)) - starts[sample] + first[sample]
        labels = None
        if self.labels is not None:
            part = self.labels.index_select(0, to_device(rows, self.labels.device))
            shift = to_device((starts - first).to(part.dtype), part.device).view(-1, 1, 1)
            labels = torch.where(part > 0, part + shift, 0)
        return NucleiCentres(self.xy[taken], sample, len(rows), labels)

    def where(self, chosen: Tensor) -> NucleiCentres:
        """Some of the nuclei, without their labels.

        Args:
            chosen: (P,) bool on the CPU.
        """
        return NucleiCentres(self.xy[chosen], self.sample[chosen], self.batch)

    def inside(self, valid: Tensor) -> NucleiCentres:
        """Those whose centre lies in the real pixels of their tile, with their labels.

        Args:
            valid: (B, 4) on the CPU: left, top, right and bottom of the real pixels.
        """
        box, xy = valid[self.sample], self.xy
        chosen = ((xy >= box[:, :2]) & (xy < box[:, 2:])).all(1)
        if bool(chosen.all()):
            return self
        some = self.where(chosen)
        if self.labels is not None:
            number = torch.where(chosen, chosen.cumsum(0), 0)
            table = to_device(torch.cat([torch.zeros(1, dtype=torch.int64), number]), self.labels.device)
            some.labels = table[self.labels.long()]
        return some

    def pick(self, chance: Tensor) -> tuple[Tensor, Tensor]:
        """One nucleus a tile, each as likely.

        Args:
            chance: (..., B) float64 in [0, 1): one draw, or several.

        Returns:
            (..., B, 2) float64, its centre, and (..., B) bool, whether the tile has any: else the centre means nothing.
        """
        counts = self.counts()
        row = self.first() + (chance * counts).long()
        has = (counts > 0).expand(chance.shape)
        centre = torch.zeros(*chance.shape, 2, dtype=torch.float64)
        centre[has] = self.xy[row[has]]
        return centre, has
