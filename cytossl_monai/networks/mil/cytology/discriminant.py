"""A linear discriminant of cells that is learned from the labels of slides, by self-training."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput, full_mask, masked_softmax, masked_top_mean
from cytossl_monai.networks.mil.cytology.statistics import draw_tiles, mean_of_slides, whitening

__all__ = ["CellDiscriminant"]

logger = logging.getLogger(__name__)

_FOLDS = 5
_MOST_CELLS = 200_000  # of all training slides together: of 304 features 240 MB
_SLOPE_SPREAD = 0.5
_LEAST_SLOPE = 0.05
_Shown = tuple[Tensor, Tensor] | None
"""Marked cells of a slide (M, D) and their classes (M,)."""


class CellDiscriminant(MILModel):
    """Finds the direction in which the cells of positive slides differ, and judges a slide by its leading cells.

    For tens of slides with few lesion cells each: attention has thousands of weights to learn from a label a slide, a
    discriminant has one direction, in closed form, in a second. For every class but the first, against the first:

    1. Each cell takes the label of its slide; the direction is the difference of the two groups' means, each slide
       counting alike, in features whitened by their covariance (Fisher's discriminant).
    2. Of each slide of the class, only the ``positive_share`` of its cells that lead are kept, and the direction is
       found anew, ``rounds`` times (after mi-SVM, Andrews et al., "Support Vector Machines for Multiple-Instance
       Learning", NeurIPS 2002). The cells of slides of the first class are known not to be lesions and all stay.

    Where somebody marked cells of a class, their mean (each slide with marks counting alike) takes the place of the
    first direction, and half of every further one: few marks say where to look, the leading cells of all slides what
    else is found there.

    Slides of one label differ in stain and thickness, and of tens of slides the positive ones are always a little
    redder or bluer. The scatter of the means of slides of one label is therefore added to the covariance,
    ``slide_scatter`` times, which makes directions in which slides differ as a whole count little (after within-class
    covariance normalisation in speaker recognition, Hatch et al., Interspeech 2006).

    A cell's score is its place along the direction, in deviations of the cells of slides of the first class that the
    direction was not learned from; a slide's is the mean of the ``top_share`` that lead. Slopes and offsets, which make
    logits of scores, are fitted on slides that the directions were not learned from (five parts of the training slides,
    by patient). Of several lesion classes each logit sees the scores along all directions: grades lie on one another's.
    Nothing is trained by gradient: one epoch is enough.

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
    takes_marks = True

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
        self.slope = nn.Parameter(torch.eye(n_outputs - 1))
        self.offset = nn.Parameter(torch.zeros(n_outputs - 1))

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        slope, offset = self.slope.detach(), self.offset.detach()
        places = features @ self.directions - self.centres  # (B, N, K - 1)
        slide = masked_top_mean(places, mask, self.top_share) @ slope + offset
        cells = places @ slope + offset
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
    def learn_bags(
        self,
        bags: Iterable[tuple[Tensor, int]],
        patients: Sequence[str] | None = None,
        marked: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Find the directions, and fit slopes and offsets on slides of patients that they were not learned from.

        The five parts are runs of patients in the order of the table, class by class.

        Args:
            bags: features (N, D) and label of every training slide. At most 200,000 of their cells are learned
                from, drawn alike from every slide, and in memory at once.
            patients: whose slide each is; None: each is of a patient of its own.
            marked: of each, features (M, D) of its marked cells and their classes (M,); None: none are marked.

        Raises:
            ValueError: when a class has no training slide, and for labels of several classes.
        """
        cells, labels = self._draw(bags)
        shown: list[_Shown] = [None] * len(cells)
        if marked is not None:
            shown = [(self.standardised(tiles), kinds) for tiles, kinds in marked]
        counts = np.bincount(labels, minlength=self.n_outputs)
        if len(counts) > self.n_outputs or counts.min() == 0:
            raise ValueError(
                f"a discriminant of cells takes a training slide of each of {self.n_outputs} classes at least "
                f"(target multiclass), got {counts.tolist()}"
            )
        part = _parts(labels, [str(i) for i in range(len(cells))] if patients is None else patients)
        places, spread = self._held_out(cells, labels, part, shown)
        slope, offset = _fit_logits(places / spread, labels)
        self._learn(cells, labels, shown)
        self.slope.copy_(torch.from_numpy(slope / spread[:, None]))
        self.offset.copy_(torch.from_numpy(offset))

    @torch.jit.unused
    def _held_out(
        self, cells: Sequence[Tensor], labels: np.ndarray, part: np.ndarray, shown: Sequence[_Shown]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slides' places (n, K - 1) by directions of other parts, and how far the first class scatters (K - 1,).

        In deviations of the cells that were learned from: about 1 for many cells, far more where there are few for so
        many features.
        """
        everyone = np.arange(len(cells))
        places = torch.zeros(len(cells), self.n_outputs - 1, dtype=torch.float64)
        squares: list[Tensor] = []
        single = False
        for fold in np.unique(part):
            seen, judged = part != fold, everyone[part == fold]
            if len(np.unique(labels[seen])) < self.n_outputs:  # all patients of a class are here: nothing to hold out
                seen[:] = single = True
            own = everyone[seen]
            self._learn([cells[i] for i in own], labels[seen], [shown[i] for i in own])
            for i in judged:
                at = (cells[i] @ self.directions - self.centres).double()
                places[i] = masked_top_mean(at[None], full_mask(at[None]), self.top_share)[0]
                if labels[i] == 0:
                    squares.append(at.square().mean(dim=0))
        spread = torch.stack(squares).mean(dim=0).sqrt().clamp_min(1.0)
        if single:
            logger.warning("a class has one patient: the probabilities rest on slides that were learned from")
            spread = torch.maximum(spread, places.std(dim=0, correction=0))  # what was learned from scatters little
        return places.numpy(), spread.numpy()

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
    def _learn(self, cells: Sequence[Tensor], labels: np.ndarray, shown: Sequence[_Shown]) -> None:
        """Directions and centres from the standardised cells of some slides, and those that are marked in them."""
        to_white = whitening(self._covariance(cells, labels), self.shrinkage).float()
        white = [tiles @ to_white for tiles in cells]
        others = [tiles for tiles, label in zip(white, labels, strict=True) if label == 0]
        rest = mean_of_slides(others)
        for k in range(self.n_outputs - 1):
            own = [tiles for tiles, label in zip(white, labels, strict=True) if label == k + 1]
            told = [marks[0][marks[1] == k + 1] @ to_white for marks in shown if marks is not None]
            told = [tiles for tiles in told if len(tiles)]
            direction = start = mean_of_slides(told or own) - rest
            for _ in range(self.rounds):
                kept = [tiles[(tiles @ direction).topk(self._leading(tiles)).indices] for tiles in own]
                direction = mean_of_slides(kept) - rest
                if told:
                    direction = (direction + start) / 2
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


def _parts(labels: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """(n,) part of every slide: all slides of a patient in one, patients of a class in runs of the table's order."""
    kind_of = {patient: int(label) for patient, label in zip(patients[::-1], labels[::-1], strict=True)}  # of its first
    counts = np.bincount(list(kind_of.values()))
    folds = min(_FOLDS, int(counts[counts > 0].min()))
    part_of: dict[str, int] = {}
    dealt = np.zeros(len(counts), dtype=int)
    for patient in dict.fromkeys(patients):
        kind = kind_of[patient]
        part_of[patient] = int(dealt[kind] * folds // counts[kind])
        dealt[kind] += 1
    return np.array([part_of[patient] for patient in patients])


def _fit_logits(places: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes (K - 1, K - 1) and offsets (K - 1,) of a logistic regression of places (n, K - 1), all classes alike.

    The targets are Platt's, against certainty. A deviation along a class's own direction is taken for about a unit of
    its logit until the slides say else, so that folds of few slides give probabilities that can be compared: a normal
    prior of the slopes, the unit matrix with a deviation of 0.5, once a training.
    """
    n, size = places.shape
    counts = np.bincount(labels, minlength=size + 1)
    target = np.where(np.eye(size + 1, dtype=bool)[labels], counts[labels][:, None] + 1, 1 / size)
    target /= counts[labels][:, None] + 2
    weight = 1 / ((size + 1) * counts[labels])
    prior = 1 / (n * _SLOPE_SPREAD**2)
    middle = places.mean(axis=0)
    own = np.eye(size)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        slope, offset = flat[:-size].reshape(size, size), flat[-size:]
        logits = np.column_stack([np.zeros(n), (places - middle) @ slope + offset])
        cost = -weight @ (target * log_softmax(logits, axis=1)).sum(axis=1)
        slant = (weight[:, None] * (softmax(logits, axis=1) - target))[:, 1:]
        slopes = (places - middle).T @ slant + prior * (slope - own)
        cost += 0.5 * prior * ((slope - own) ** 2).sum()
        return float(cost), np.concatenate([slopes.ravel(), slant.sum(axis=0)])

    # A score that told nothing on held-out slides still ranks, at probabilities close to one another.
    bounds = [(_LEAST_SLOPE if row == column else None, None) for row in range(size) for column in range(size)]
    start = np.concatenate([own.ravel(), np.zeros(size)])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[*bounds, *[(None, None)] * size]).x
    slope, offset = found[:-size].reshape(size, size), found[-size:]
    return slope, offset - middle @ slope
