"""A linear discriminant of cells that is learned from the labels of slides, by self-training."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput, full_mask, masked_softmax, masked_top_mean
from cytossl_monai.networks.mil.cytology.statistics import draw_tiles, mean_of_slides, whitening

__all__ = ["CellDiscriminant"]

_FOLDS = 5
_MOST_CELLS = 200_000  # of all training slides together: of 304 features 240 MB
_SLOPE_SPREAD = 0.5
_LEAST_SLOPE = 0.05  # a score that told nothing on held-out slides still ranks, at probabilities close to one another


class CellDiscriminant(MILModel):
    """Finds the direction in which the cells of positive slides differ, and judges a slide by its leading cells.

    For tens of slides with few lesion cells each: attention has thousands of weights to learn from a label a slide, a
    discriminant has one direction, in closed form, in a second. For every class but the first:

    1. Each cell takes the label of its slide; the direction is the difference of the two groups' means, each slide
       counting alike, in features whitened by their covariance (Fisher's discriminant).
    2. Of each slide of the class, only the ``positive_share`` of its cells that lead are kept, and the direction is
       found anew, ``rounds`` times (after mi-SVM, Andrews et al., "Support Vector Machines for Multiple-Instance
       Learning", NeurIPS 2002). The cells of other slides are known not to be of the class and all stay.

    Slides of one label differ in stain and thickness, and of tens of slides the positive ones are always a little
    redder or bluer. The scatter of the means of slides of one label is therefore added to the covariance,
    ``slide_scatter`` times, which makes directions in which slides differ as a whole count little (after within-class
    covariance normalisation in speaker recognition, Hatch et al., Interspeech 2006).

    A cell's score is its place along the direction in deviations of the other slides' cells; a slide's is the mean of
    the ``top_share`` that lead. Slope and offset, which make logits of scores, are fitted on slides that the direction
    was not learned from (five parts of the training slides). Nothing is trained by gradient: one epoch is enough.

    Attention is the softmax of the cells' largest logits; cell scores are logits on the scale of the slide's.

    Args:
        in_features: width D of the features.
        n_outputs: K classes, the negative one first.
        positive_share: share of a positive slide's cells that are taken for positive, in (0, 1]. Rather
            more than there are than fewer; 1 keeps all (no self-training).
        rounds: of self-training; 0 for none.
        top_share: share of the cells, those that lead, whose scores make a slide's, in (0, 1].
        slide_scatter: weight of the scatter between slides of one label; 0 leaves it out.
        shrinkage: added to the standardised features' variances before they are whitened; more where few cells stand
            against many features.

    Raises:
        ValueError: for fewer than two outputs, and for numbers out of range.
    """

    closed_form = True

    def __init__(
        self,
        in_features: int,
        n_outputs: int = 2,
        positive_share: float = 0.1,
        rounds: int = 5,
        top_share: float = 0.05,
        slide_scatter: float = 20.0,
        shrinkage: float = 0.05,
    ) -> None:
        super().__init__(in_features, n_outputs)
        if n_outputs < 2:
            raise ValueError("a discriminant of cells tells two classes or more apart: target multiclass")
        if not (0 < positive_share <= 1 and 0 < top_share <= 1):
            raise ValueError(f"positive_share and top_share must lie in (0, 1], got {positive_share} and {top_share}")
        if rounds < 0 or slide_scatter < 0 or shrinkage <= 0:
            raise ValueError(
                "rounds and slide_scatter must be 0 or more and shrinkage above 0, got "
                f"{rounds}, {slide_scatter} and {shrinkage}"
            )
        self.positive_share, self.rounds, self.top_share = float(positive_share), int(rounds), float(top_share)
        self.slide_scatter, self.shrinkage = float(slide_scatter), float(shrinkage)
        self.directions: Tensor
        self.centres: Tensor
        self.register_buffer("directions", torch.zeros(in_features, n_outputs - 1))
        self.register_buffer("centres", torch.zeros(n_outputs - 1))
        self.slope = nn.Parameter(torch.ones(n_outputs - 1))
        self.offset = nn.Parameter(torch.zeros(n_outputs - 1))

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        slope, offset = self.slope.detach(), self.offset.detach()
        places = features @ self.directions - self.centres  # (B, N, K - 1)
        slide = slope * masked_top_mean(places, mask, self.top_share) + offset
        cells = slope * places + offset
        attention = masked_softmax(cells.max(dim=2).values, mask)
        scores = _logits(cells).masked_fill(~mask.unsqueeze(-1), 0.0)
        extra: dict[str, Tensor] = {}
        return MILOutput(_logits(slide), attention, scores, None, extra)

    @torch.jit.unused
    def auxiliary_losses(self, output: MILOutput, indicator: Tensor) -> dict[str, Tensor]:
        """A loss of 0 with a gradient of 0: slope and offset were fitted on held-out slides; training would undo it."""
        return {"discriminant": 0.0 * (self.slope.sum() + self.offset.sum())}

    @torch.jit.unused
    @torch.no_grad()
    def learn_bags(self, bags: Iterable[tuple[Tensor, int]]) -> None:
        """Find the directions, and fit slope and offset on slides that they were not learned from.

        The five parts are runs of slides in the order of the table, class by class, so that slides of a patient that
        stand together stay together.

        Args:
            bags: features (N, D) and label of every training slide. At most 200,000 of their cells are learned
                from, drawn alike from every slide, and in memory at once.

        Raises:
            ValueError: when a class has no training slide, and for labels of several classes.
        """
        cells, labels = self._draw(bags)
        counts = np.bincount(labels, minlength=self.n_outputs)
        if len(counts) > self.n_outputs or counts.min() == 0:
            raise ValueError(
                f"a discriminant of cells takes a training slide of each of {self.n_outputs} classes at least "
                f"(target multiclass), got {counts.tolist()}"
            )
        everyone = np.arange(len(cells))
        places = torch.zeros(len(cells), self.n_outputs - 1)
        folds = min(_FOLDS, int(counts.min()))
        part = np.zeros(len(cells), dtype=int)
        for kind, count in enumerate(counts):
            part[labels == kind] = np.arange(count) * folds // count
        for fold in range(folds):
            seen = (part != fold) | (folds == 1)  # one slide of a class: it is all that can be looked at
            self._learn([cells[i] for i in everyone[seen]], labels[seen])
            for i in everyone[part == fold]:
                places[i] = self._judge(cells[i])
        for k in range(self.n_outputs - 1):
            self.slope[k], self.offset[k] = _fit_line(places[:, k].double().numpy(), labels == k + 1)
        self._learn(cells, labels)

    @torch.jit.unused
    def _draw(self, bags: Iterable[tuple[Tensor, int]]) -> tuple[list[Tensor], np.ndarray]:
        """Standardised cells of every slide, at most ``_MOST_CELLS`` in all, and the slides' labels."""
        generator = torch.Generator().manual_seed(0)
        cells: list[Tensor] = []
        labels: list[int] = []
        for features, label in bags:
            if np.ndim(label):
                raise ValueError("a discriminant of cells takes slides of one class each, not a multilabel target")
            cells.append(self.standardised(draw_tiles(features, _MOST_CELLS, generator)))
            labels.append(int(label))
            share = max(1, _MOST_CELLS // len(cells))
            if sum(map(len, cells)) > _MOST_CELLS:
                cells = [draw_tiles(tiles, share, generator) for tiles in cells]
        return cells, np.array(labels, dtype=int)

    @torch.jit.unused
    def _judge(self, tiles: Tensor) -> Tensor:
        """(K - 1,) place of one slide's standardised cells (N, D)."""
        places = (tiles @ self.directions - self.centres)[None]
        return masked_top_mean(places, full_mask(places), self.top_share)[0]

    @torch.jit.unused
    def _learn(self, cells: Sequence[Tensor], labels: np.ndarray) -> None:
        """Directions and centres from the standardised cells of some slides."""
        to_white = whitening(self._covariance(cells, labels), self.shrinkage).float()
        white = [tiles @ to_white for tiles in cells]
        for k in range(self.n_outputs - 1):
            own = [tiles for tiles, label in zip(white, labels, strict=True) if label == k + 1]
            others = [tiles for tiles, label in zip(white, labels, strict=True) if label != k + 1]
            rest = mean_of_slides(others)
            direction = mean_of_slides(own) - rest
            for _ in range(self.rounds):
                kept = [tiles[(tiles @ direction).topk(self._leading(tiles)).indices] for tiles in own]
                direction = mean_of_slides(kept) - rest
            places = torch.cat([tiles @ direction for tiles in others])
            spread = places.std(correction=0).clamp_min(1e-6)
            self.directions[:, k] = to_white @ direction / spread
            self.centres[k] = places.mean() / spread

    @torch.jit.unused
    def _leading(self, tiles: Tensor) -> int:
        return max(1, int(np.ceil(self.positive_share * len(tiles))))

    @torch.jit.unused
    def _covariance(self, cells: Sequence[Tensor], labels: np.ndarray) -> Tensor:
        """(D, D) covariance of the cells, every slide counting alike, with the scatter between slides of one label."""
        means = torch.stack([tiles.mean(dim=0) for tiles in cells]).double()
        second = sum(tiles.T @ tiles / len(tiles) for tiles in cells)
        centre = means.mean(dim=0)
        covariance = torch.as_tensor(second).double() / len(cells) - torch.outer(centre, centre)
        within = means.clone()
        for kind in np.unique(labels):
            same = torch.from_numpy(labels == kind).to(means.device)
            within[same] -= means[same].mean(dim=0)
        return covariance + self.slide_scatter * (within.T @ within) / len(cells)


def _logits(places: Tensor) -> Tensor:
    """(..., K) of the (..., K - 1) logits of the classes but the first against the rest; two classes: (-s, s) / 2."""
    if places.shape[-1] == 1:
        return torch.cat([-0.5 * places, 0.5 * places], dim=-1)
    return torch.cat([torch.zeros_like(places[..., :1]), places], dim=-1)


def _fit_line(places: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Slope and offset of a logistic regression, both classes alike in weight (Platt's targets against certainty).

    A deviation is taken for about a unit of the logit until the slides say else, so that folds of few slides give
    probabilities that can be compared: a normal prior of the slope, 1 with a deviation of 0.5, once a training.
    """
    n, n_positive = len(places), int(positive.sum())
    target = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n - n_positive + 2))
    weight = np.where(positive, 0.5 / n_positive, 0.5 / (n - n_positive))
    prior = 1 / (n * _SLOPE_SPREAD**2)
    middle = places.mean()

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        logit = line[0] * (places - middle) + line[1]
        cost = weight @ (np.logaddexp(0, logit) - target * logit) + 0.5 * prior * (line[0] - 1) ** 2
        slant = weight * (expit(logit) - target)
        return float(cost), np.array([slant @ (places - middle) + prior * (line[0] - 1), slant.sum()])

    slope, offset = minimize(
        loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(_LEAST_SLOPE, None), (None, None)]
    ).x
    return float(slope), float(offset - slope * middle)
