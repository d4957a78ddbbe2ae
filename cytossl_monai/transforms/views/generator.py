"""Views for self-supervised learning: whole batches at once, on the device that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.transforms.kernels.blur import blur
from cytossl_monai.transforms.kernels.checks import check_images, check_masks, check_mpp, check_valid
from cytossl_monai.transforms.kernels.chunks import change_some_, chunks
from cytossl_monai.transforms.kernels.colour import jitter_stain
from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.kernels.random import hash_uniform
from cytossl_monai.transforms.kernels.rgb import RGBJitter, jitter_rgb
from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.ncp.exchange import retained_nuclei
from cytossl_monai.transforms.nuclei.centres import NucleiCentres
from cytossl_monai.transforms.views.boxes import NUMBERS, CropBoxes, cut_together, draw_boxes, view_groups
from cytossl_monai.transforms.views.draws import DrawnViews, draw_views

__all__ = ["ViewGenerator"]

_INSTANCES = (torch.int16, torch.int32, torch.int64)


def _default_segmenter(images: Tensor, mpp: Tensor) -> Tensor:
    """This package's nuclei, imported at the first call: a caller with masks of its own does not need it."""
    from cytossl_monai.transforms.nuclei.mask import nuclei_mask

    return nuclei_mask(images, mpp)


def _pair(key: str, value: Sequence[float], low: float, high: float) -> tuple[float, float]:
    pair = tuple(float(v) for v in value)
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{key} is {value!r}; allowed are two numbers, least and largest, in [{low:g}, {high:g}]")
    return pair[0], pair[1]


def _part(key: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key} is {value!r}; allowed is a number in [0, 1]")
    return float(value)


class ViewGenerator(nn.Module):
    """Make the views that a self-supervised method compares.

    As published: the tile is perturbed once (NCP), so that all views, the teacher's and the student's, show the same
    perturbed tile; then every view is cut around a nucleus that is drawn on its own, each nucleus as likely. A view is
    a resized crop, mirrored and turned (a cell has no upper side), its colours varied and blurred. Nuclei are found
    once, on the tile, and go through the same crop as the colours. The views are not normalised: an encoder does that.

    Grey and solarised views are off by default, unlike in recipes for photographs. Colour tells a keratinised
    (orange) from a basal (blue) cell, so a view must not lose it. Solarising turns bright pixels dark: glass would
    become darker than nuclei, while "darker means more stain" is what holds in every real slide.

    Args:
        global_size: side of a global view in pixels.
        local_size: side of a local view in pixels.
        n_global: global views.
        n_local: local views.
        global_scale: least and largest part of the tile's area that a global view shows.
        local_scale: the same for a local view.
        ratio: least and largest width to height of a crop.
        ncp: the perturbation; None perturbs nothing.
        ncp_views: ``"tile"`` perturbs the tile before any view is cut, as published. Else views are perturbed one by
            one after they are cut: ``"all"``, ``"global"``, ``"local"``, or indices, the global views first. With
            ``(1,)`` the first global view stays as it is: the two then agree in nuclei alone.
        nucleus_prob: part of the views that are centred on a nucleus, where the tile has one: one number, or two, of
            the global and of the local views.
        same_nucleus_prob: part of the tiles whose global views are all centred on one and the same nucleus, so that
            they show the same cell. Cells lie scattered: crops of a tile cut anywhere often share none.
        centre_on: ``"nuclei"`` draws from all of a tile's nuclei, as published; ``"retained"`` from those that the
            perturbation of the tile retains.
        segmenter: ``(images, mpp) -> (B, 1, H, W) bool``, asked where no masks are given; None is
            :func:`cytossl_monai.transforms.nuclei.mask.nuclei_mask`.
        find_nuclei: False never asks the segmenter: without masks from the caller no view is perturbed or centred.
        flip: mirror half of the views.
        turn: turn views by 0, 90, 180 or 270 degrees.
        rotate: and by any angle up to this many degrees, either way; 45 gives every angle.
        stain_prob: part of the views whose stains vary.
        stain_scale: a stain's density is multiplied by 1 - scale to 1 + scale.
        stain_shift: and shifted by -shift to shift, in absorbance.
        rgb_prob: part of the views whose brightness, contrast, saturation and hue vary, as DINO's; beside or in place
            of the stains.
        rgb_jitter: how much at most of each: four numbers, brightness, contrast, saturation, hue.
        blur_prob: part of the views that are blurred.
        blur_sigma: least and largest sigma in pixels of the view.
        grey_prob: part of the views that lose their colour.
        solarise_prob: part of the views whose pixels above 0.5 are inverted.
        drop_empty: leave tiles without nuclei out of all views, unless no tile has any.

    Raises:
        ValueError: for a number outside its range; the message names the key.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        n_global: int = 2,
        n_local: int = 6,
        global_scale: Sequence[float] = (0.4, 1.0),
        local_scale: Sequence[float] = (0.05, 0.4),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        ncp: BatchedNCP | None = None,
        ncp_views: str | Sequence[int] = "tile",
        nucleus_prob: float | Sequence[float] = 1.0,
        same_nucleus_prob: float = 0.0,
        centre_on: str = "nuclei",
        segmenter: Callable[[Tensor, Tensor], Tensor] | None = None,
        find_nuclei: bool = True,
        flip: bool = True,
        turn: bool = True,
        rotate: float = 0.0,
        stain_prob: float = 0.8,
        stain_scale: float = 0.3,
        stain_shift: float = 0.02,
        rgb_prob: float = 0.0,
        rgb_jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        blur_prob: float = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        grey_prob: float = 0.0,
        solarise_prob: float = 0.0,
        drop_empty: bool = False,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("global_size", global_size, 1),
            ("local_size", local_size, 1),
            ("n_global", n_global, 0),
            ("n_local", n_local, 0),
        ):
            if int(value) != value or value < least:
                raise ValueError(f"{key} is {value!r}; allowed is a whole number >= {least}")
        self.sizes = [int(global_size)] * n_global + [int(local_size)] * n_local
        self.n_global = int(n_global)
        self.global_scale = _pair("global_scale", global_scale, 1e-6, 1.0)
        self.local_scale = _pair("local_scale", local_scale, 1e-6, 1.0)
        self.ratio = _pair("ratio", ratio, 1e-3, 1e3)
        if ncp is not None and ncp.drop:
            raise ValueError("ncp has empty='drop'; allowed here is 'keep' or 'perturb': all views need the same tiles")
        self.ncp = ncp
        self.ncp_once = ncp_views == "tile"
        self.ncp_views = self._chosen_views(ncp_views)
        each = [nucleus_prob] * 2 if isinstance(nucleus_prob, int | float) else list(nucleus_prob)
        if len(each) != 2:
            raise ValueError(
                f"nucleus_prob is {nucleus_prob!r}; allowed is one number in [0, 1], or two: global, local"
            )
        self.nucleus_prob = tuple(_part("nucleus_prob", part) for part in each)
        self.same_nucleus_prob = _part("same_nucleus_prob", same_nucleus_prob)
        if centre_on not in ("nuclei", "retained"):
            raise ValueError(f"centre_on is {centre_on!r}; allowed is 'nuclei' or 'retained'")
        self.centre_on = centre_on
        self.segmenter = segmenter or _default_segmenter
        self.find_nuclei = find_nuclei
        self.flip, self.turn = flip, turn
        if not 0.0 <= rotate <= 180.0:
            raise ValueError(f"rotate is {rotate!r}; allowed are degrees in [0, 180]")
        self.rotate = float(rotate)
        self.rgb_prob = _part("rgb_prob", rgb_prob)
        self.rgb_jitter = RGBJitter(*rgb_jitter)
        self.stain_prob = _part("stain_prob", stain_prob)
        self.stain_scale = _part("stain_scale", stain_scale)
        self.stain_shift = _part("stain_shift", stain_shift)
        self.blur_prob = _part("blur_prob", blur_prob)
        self.blur_sigma = _pair("blur_sigma", blur_sigma, 0.0, 100.0)
        self.grey_prob = _part("grey_prob", grey_prob)
        self.solarise_prob = _part("solarise_prob", solarise_prob)
        self.drop_empty = drop_empty

    def _chosen_views(self, chosen: str | Sequence[int]) -> frozenset[int]:
        every = range(len(self.sizes))
        if chosen == "tile":
            return frozenset()
        named = {"all": every, "global": every[: self.n_global], "local": every[self.n_global :]}
        if isinstance(chosen, str):
            if chosen not in named:
                raise ValueError(f"ncp_views is {chosen!r}; allowed is tile, {', '.join(named)}, or indices of views")
            return frozenset(named[chosen])
        if not isinstance(chosen, Sequence) or any(view not in every for view in chosen):
            raise ValueError(f"ncp_views is {chosen!r}; allowed are indices of the {len(self.sizes)} views")
        return frozenset(int(view) for view in chosen)

    @torch.no_grad()
    def forward(
        self,
        tiles: Tensor,
        mpp: float | Tensor | None = None,
        masks: Tensor | None = None,
        generator: torch.Generator | None = None,
        valid: Tensor | None = None,
        nuclei: NucleiCentres | None = None,
    ) -> dict[str, Any]:
        """Make the views of a batch.

        Args:
            tiles: (B, 3, H, W), uint8 or floating point in [0, 1]; not written to.
            mpp: micrometres per pixel of the tiles, one for all or one a sample; not needed where neither nuclei are
                looked for nor NCP is on.
            masks: (B, 1, H, W), bool or 0 and 1: nuclei from elsewhere; or an instance map, int16 to int64, of which
                touching nuclei stay apart. None asks the segmenter.
            generator: where all random numbers come from; None takes torch's global CPU generator.
            valid: (B, 4) left, top, right, bottom of each tile's real pixels, which views are drawn in; None: all of
                the tile. See :func:`~cytossl_monai.transforms.views.boxes.draw_boxes`.
            nuclei: the single nuclei, where they are known (instances or points of a detector); None takes the parts
                of the masks. With nuclei and no masks the segmenter is not asked, and ``"nuclei"`` comes back empty.

        Returns:
            ``"global"``: a list of (B, 3, global_size, global_size) float32 in [0, 1]; ``"local"``: the same with
            local_size; ``"nuclei"``: a list of (B, 1, global_size, global_size) bool, the nuclei of the global views
            (empty where none were looked for); ``"kept"``: (B,) int64, the tiles that the views show, which are
            fewer than came where ``drop_empty`` is on.

        Raises:
            ValueError: for tiles, masks or ``mpp`` that do not fit; the message names which.
        """
        check_images(tiles, "tiles")
        tiles = tiles.as_subclass(Tensor)  # views are cut anew: a MetaTensor's affine is not theirs
        perturbing = self.ncp is not None and self.ncp.settings.prob > 0 and (self.ncp_once or bool(self.ncp_views))
        if masks is not None and masks.dtype in _INSTANCES and masks.numel() and int(masks.max()) > 1:
            instances, masks = masks, check_masks(masks > 0, tiles)
            nuclei = NucleiCentres.of_instances(instances.to(tiles.device)) if nuclei is None else nuclei
        elif masks is not None:
            masks = check_masks(masks, tiles)
        elif self.find_nuclei and nuclei is None:
            # This package's own reads the scale on the host; a GPU would have to be waited for.
            here = torch.device("cpu") if self.segmenter is _default_segmenter else tiles.device
            masks = self.segmenter(tiles, to_device(check_mpp(mpp, len(tiles)), here))
        masks = None if masks is None else masks.as_subclass(Tensor)
        scale = None if mpp is None else check_mpp(mpp, len(tiles))
        centred = max(*self.nucleus_prob, self.same_nucleus_prob) > 0
        by_nucleus = perturbing and self.ncp_once and self.ncp is not None and self.ncp.settings.by_nucleus
        if nuclei is None and masks is not None and (centred or by_nucleus):
            nuclei = NucleiCentres.of_masks(masks)
        real = check_valid(valid, len(tiles), *tiles.shape[-2:])
        if nuclei is not None and real is not None:
            nuclei = nuclei.inside(
                real
            )  # a mirrored nucleus is none to look at, and none to retain in place of a real one
        kept = torch.arange(len(tiles), device=tiles.device)
        if self.drop_empty and (masks is not None or nuclei is not None):
            if masks is not None:
                with_nuclei = BatchedNCP.kept(masks)
            elif nuclei is not None:
                with_nuclei = (nuclei.counts() > 0).nonzero().squeeze(1)
            if 0 < len(with_nuclei) < len(tiles):
                kept = to_device(with_nuclei, tiles.device)
                tiles, masks = tiles[kept], None if masks is None else masks[kept]
                nuclei = None if nuclei is None else nuclei.of(kept.cpu())
                valid = None if valid is None else valid[kept.to(valid.device)]
                real = None if real is None else real[kept.cpu()]
                scale = None if scale is None else scale[kept.cpu()]
        batch = len(tiles)
        once = perturbing and self.ncp_once and (masks is not None or nuclei is not None)
        drawn = draw_views(batch, len(self.sizes), once, generator)
        if drawn.tile_seeds is not None and self.ncp is not None:
            tiles = self.ncp(tiles, masks, scale, seeds=drawn.tile_seeds, check=False, nuclei=nuclei, valid=real)
            if self.centre_on == "retained" and nuclei is not None:
                nuclei = nuclei.where(retained_nuclei(nuclei, drawn.tile_seeds, self.ncp.settings.retain_prob))
        boxes = self._boxes(tiles, nuclei, drawn, valid)
        out: dict[str, Any] = {"global": [], "local": [], "nuclei": [], "kept": kept}
        masked = {*range(self.n_global), *self.ncp_views}
        groups = view_groups(self.sizes, masked, tiles.device)
        colours = drawn.colour_seeds()
        chances = hash_uniform(colours.flatten(), 10, 6).view(*colours.shape, 6)
        for group, (views, cut) in zip(groups, cut_together(tiles, masks, boxes, self.sizes, groups, masked)):
            for place, index in enumerate(group):
                if perturbing and self.ncp is not None and index in self.ncp_views and cut is not None:
                    view_scale = None
                    if scale is not None:  # a crop that is enlarged shows fewer micrometres a pixel
                        zoom = boxes[index].size.prod(1).sqrt() / self.sizes[index]
                        view_scale = (scale * zoom).to(torch.float32)
                    view, seeds = views[place], drawn.seeds[index][0]
                    self.ncp(view, cut[place], view_scale, seeds=seeds, check=False, out=view)
            some = slice(group[0], group[-1] + 1)
            self._colour_(views.flatten(0, 1), colours[some].flatten(), chances[some].flatten(0, 1))
            for place, index in enumerate(group):
                out["global" if index < self.n_global else "local"].append(views[place])
                if index < self.n_global and cut is not None:
                    out["nuclei"].append(cut[place])
        return out

    def _boxes(
        self,
        tiles: Tensor,
        nuclei: NucleiCentres | None,
        draws: DrawnViews,
        valid: Tensor | None,
    ) -> list[CropBoxes]:
        """Where each view is cut; every view draws a nucleus of its own, unless the global ones share one."""
        height, width = tiles.shape[-2:]
        views, batch = len(self.sizes), len(tiles)
        if views == 0:
            return []
        drawn = torch.stack(draws.crops)
        is_global = (torch.arange(views) < self.n_global).unsqueeze(1)

        def of_each(pair: tuple[float, ...]) -> Tensor:
            """(V, 1): the first number for global views, the second for local ones."""
            of_global, of_local = torch.tensor(pair, dtype=torch.float64)
            return torch.where(is_global, of_global, of_local)

        nucleus = None
        if nuclei is not None:
            together = (draws.shared[:, 0] < self.same_nucleus_prob) & is_global
            alone = drawn[..., NUMBERS] < of_each(self.nucleus_prob)
            centre, has = nuclei.pick(torch.where(together, draws.shared[:, 1], drawn[..., NUMBERS + 1]))
            nucleus = centre.flatten(0, 1), (has & (together | alone)).flatten()
        low, high = zip(self.global_scale, self.local_scale, strict=True)
        every = draw_boxes(
            drawn[..., :NUMBERS].flatten(0, 1),
            height,
            width,
            (of_each(low).expand(-1, batch).flatten(), of_each(high).expand(-1, batch).flatten()),
            self.ratio,
            self.flip,
            self.turn,
            self.rotate,
            nucleus,
            None if valid is None else valid.repeat(views, 1),
        )
        return every.split(batch) if batch else [every] * views

    def _colour_(self, view: Tensor, seeds: Tensor, drawn: Tensor) -> None:
        """Vary stains, blur, and (off by default) vary RGB, take colour away and solarise, in place.

        Args:
            view: (n, 3, H, W) float32 in [0, 1].
            seeds: (n,) int64 on the CPU.
            drawn: (n, 6) float64 in [0, 1), of these seeds.
        """
        low, high = self.blur_sigma
        sigma = (low + (high - low) * drawn[:, 2]).to(torch.float32)

        def stain(part: Tensor, at: Tensor) -> Tensor:
            return jitter_stain(part, torch.ones(len(at)), seeds[at], self.stain_scale, self.stain_shift)

        def rgb(part: Tensor, at: Tensor) -> Tensor:
            return jitter_rgb(part, self.rgb_jitter, seeds[at])

        def grey(part: Tensor, _: Tensor) -> Tensor:
            weights = torch.tensor([0.299, 0.587, 0.114], device=part.device).view(1, 3, 1, 1)
            return (part * weights).sum(1, keepdim=True).clamp_(0.0, 1.0).expand(-1, 3, -1, -1)

        def solarise(part: Tensor, _: Tensor) -> Tensor:
            return torch.where(part >= 0.5, 1.0 - part, part)

        steps = (
            (0, self.stain_prob, stain),
            (5, self.rgb_prob, rgb),
            (1, self.blur_prob, lambda part, at: blur(part, sigma[at])),
            (3, self.grey_prob, grey),
            (4, self.solarise_prob, solarise),
        )
        for rows in chunks(view):
            for column, prob, change in steps:
                change_some_(view, rows, drawn[:, column] < prob, change)
