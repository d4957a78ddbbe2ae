"""Nearest reference cells: how far a slide's tiles lie from those of negative slides (after PatchCore)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILOutput, full_mask, masked_softmax
from cytossl_monai.networks.mil.cytology.one_class import OneClassMIL
from cytossl_monai.networks.mil.cytology.statistics import draw_tiles, mean_of_slides, whitening

__all__ = ["ReferenceBank"]


class ReferenceBank(OneClassMIL):
    """Keeps tiles of negative slides, and asks of a slide how far its oddest tiles lie from the nearest of them.

    Where one cell of thirty is malignant and tens of slides have labels, attention has too little to learn from; what
    a cell of a negative slide looks like is known from thousands. After PatchCore (Roth et al., "Towards Total Recall
    in Industrial Anomaly Detection", CVPR 2022): the distance of a tile is the mean Euclidean distance to its
    ``n_neighbours`` nearest references. Unlike there, features are whitened by the covariance of the references, so
    that each direction counts by what is unusual in it, the bank is drawn at random, and a slide is judged by its
    ``top_share`` farthest tiles.

    A slide of the bank is judged without its own tiles (it is known by them), so that training slides look as new ones
    do. The standardised score z becomes s = exp(log_slope) z + offset, the logits are (-s, s) / 2; slope and offset are
    all that is trained, and only where positive slides are among the training slides. Attention is the softmax of
    the tiles' standardised distances, tile scores are their logits.

    The more cells of a kind recur between slides, the better a bank looks: judge it on slides of other preparations.

    Args:
        in_features: width D of the features.
        n_outputs: 2: negative, positive.
        n_neighbours: how many references a distance is the mean of.
        top_share: share of the tiles whose distances make a slide's score, in (0, 1].
        bank_size: most references, drawn alike from every negative slide; 20,000 of 304 features are 24 MB in the file.
        shrinkage: added to the standardised features' variances before they are whitened.

    Raises:
        ValueError: for other than two outputs, and for numbers out of range.
    """

    def __init__(
        self,
        in_features: int,
        n_outputs: int = 2,
        n_neighbours: int = 1,
        top_share: float = 0.02,
        bank_size: int = 20000,
        shrinkage: float = 0.1,
    ) -> None:
        super().__init__(in_features, n_outputs, top_share)
        if n_neighbours < 1 or bank_size < n_neighbours or shrinkage <= 0:
            raise ValueError(
                "n_neighbours must be at least 1, bank_size at least n_neighbours and shrinkage above 0, got "
                f"{n_neighbours}, {bank_size} and {shrinkage}"
            )
        self.n_neighbours, self.bank_size, self.shrinkage = int(n_neighbours), int(bank_size), float(shrinkage)
        self.log_slope = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(()))
        self.bank: Tensor
        self.bank_slides: Tensor
        self.centre: Tensor
        self.whitening: Tensor
        self.graded: Tensor
        self.register_buffer("bank", torch.zeros(bank_size, in_features))
        self.register_buffer("bank_slides", torch.arange(bank_size))
        self.register_buffer("centre", torch.zeros(in_features))
        self.register_buffer("whitening", torch.eye(in_features))
        self.register_buffer("graded", torch.zeros((), dtype=torch.bool))

    @torch.jit.unused
    @torch.no_grad()
    def learn_bags(
        self,
        bags: Iterable[tuple[Tensor, int]],
        patients: Sequence[str] | None = None,
        marked: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Fill the bank, whiten, and standardise the scores by the negative training slides.

        Args:
            bags: features (N, D) and label of every training slide; label 0 is negative. The features of all negative
                slides are in memory at once.
            patients: not looked at: no slide is held out.
            marked: not looked at.

        Raises:
            ValueError: when fewer than two slides are negative: none could be judged by another's cells; when a slide
                leaves fewer than ``n_neighbours`` references of others; when there are more negative slides than
                ``bank_size``; for labels of several classes.
        """
        negative, graded = [], False
        for features, label in bags:
            if np.ndim(label):
                raise ValueError("a bank of references takes slides of one class each, not a multilabel target")
            if label == 0:
                negative.append(self.standardised(features))
            else:
                graded = True
        if len(negative) < 2:
            raise ValueError(f"a bank of references takes two negative training slides at least, got {len(negative)}")
        if self.bank_size < len(negative):
            raise ValueError(f"bank_size is {self.bank_size}, less than a reference for each of {len(negative)} slides")
        self.centre.copy_(mean_of_slides(negative))
        spread = torch.stack([((tiles - self.centre).T @ (tiles - self.centre)) / len(tiles) for tiles in negative])
        self.whitening.copy_(whitening(spread.mean(dim=0), self.shrinkage))
        share = self.bank_size // len(negative)
        generator = torch.Generator().manual_seed(0)
        kept = [draw_tiles(tiles, share, generator) for tiles in negative]
        self.bank = (torch.cat(kept) - self.centre) @ self.whitening
        slides = torch.cat([torch.full((len(tiles),), number) for number, tiles in enumerate(kept)])
        self.bank_slides = slides.to(self.bank.device)
        self.bank_size = len(self.bank)
        if self.bank_size - int(self.bank_slides.bincount().max()) < self.n_neighbours:
            raise ValueError(f"n_neighbours is {self.n_neighbours}, more than the references of other slides")
        scores = torch.cat([self._own_score(tiles) for tiles in negative])
        self.score_mean.copy_(scores.mean())
        self.score_std.copy_(scores.std().clamp_min(1e-3 * float(scores.mean())))
        self.graded.fill_(graded)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        distance = self._distances(features, mask)
        slide = (self.slide_scores(distance, mask) - self.score_mean) / self.score_std
        tiles = (distance - self.score_mean) / self.score_std
        slide_logit, tile_logits = slide, tiles
        if bool(self.graded):
            slope = self.log_slope.exp()
            slide_logit, tile_logits = slope * slide + self.offset, slope * tiles + self.offset
        scores = torch.stack([-0.5 * tile_logits, 0.5 * tile_logits], dim=-1).masked_fill(~mask.unsqueeze(-1), 0.0)
        logits = torch.stack([-0.5 * slide_logit, 0.5 * slide_logit], dim=1)
        extra: dict[str, Tensor] = {}
        return MILOutput(logits, masked_softmax(tiles, mask), scores, None, extra)

    @torch.jit.unused
    def auxiliary_losses(self, output: MILOutput, indicator: Tensor) -> dict[str, Tensor]:
        """Nothing to learn from negative slides alone: a loss of 0, with a gradient of 0."""
        return {} if bool(self.graded) else {"reference": 0.0 * (self.log_slope + self.offset)}

    @torch.jit.unused
    def _own_score(self, tiles: Tensor) -> Tensor:
        mask = full_mask(tiles[None])
        return self.slide_scores(self._distances(tiles[None], mask), mask)

    def _distances(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B, N) distances of the standardised tiles (B, N, D) of some slides; 0 on padding."""
        white = (features[mask] - self.centre) @ self.whitening  # all slides' tiles at once: they are often single ones
        slides = mask.nonzero()[:, 0]
        nearest, places = self._compare(white, self.bank, self.n_neighbours)
        distances = nearest.mean(dim=1)
        itself = nearest[:, 0].square() <= 1e-5 * (white.square().sum(dim=1) + 1.0)  # 0, but for rounding
        for slide in torch.unique(slides[itself]):
            tiles = slides == slide
            own = self.bank_slides[places[tiles & itself, 0]].mode().values
            others = self.bank[self.bank_slides != own]
            distances[tiles] = self._compare(white[tiles], others, self.n_neighbours)[0].mean(dim=1)
        return torch.zeros(mask.shape, dtype=features.dtype, device=features.device).masked_scatter(mask, distances)

    def _compare(self, white: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N, count) distances to the nearest rows of the bank and their numbers, 1,024 tiles at once."""
        distances: list[Tensor] = []
        places: list[Tensor] = []
        for part in white.split(1024):
            nearest = torch.cdist(part, bank).topk(count, dim=1, largest=False)
            distances.append(nearest.values)
            places.append(nearest.indices)
        return torch.cat(distances), torch.cat(places)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object) -> None:
        rows = state_dict.get(prefix + "bank")
        if rows is not None and rows.shape[1:] == self.bank.shape[1:]:  # a bank is as large as its training slides
            self.bank, self.bank_size = self.bank.new_zeros(rows.shape), len(rows)
            self.bank_slides = self.bank_slides.new_zeros(len(rows))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
