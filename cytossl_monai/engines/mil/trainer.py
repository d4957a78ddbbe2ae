"""Training and evaluating slide classifiers with MONAI's supervised engines."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cytossl_monai.data.bags.dataset import BagDataset, collate_bags, feature_statistics
from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.bags.sampler import BagBatchSampler
from cytossl_monai.metrics.classification import classification_metrics
from cytossl_monai.networks.mil.base import MILModel
from cytossl_monai.networks.mil.classifier import MILClassifier, MILPrediction
from cytossl_monai.networks.mil.targets import class_probabilities, target_loss
from cytossl_monai.utils.errors import SettingError
from cytossl_monai.utils.locks import folder_lock

logger = logging.getLogger(__name__)

__all__ = [
    "BagInferer",
    "BagMetric",
    "MILTrainer",
    "bag_loader",
    "class_weights",
    "parameter_groups",
    "prepare_bags",
    "standardise",
]


def prepare_bags(
    batch: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor | None, tuple[Tensor], dict[str, Any]]:
    """``prepare_batch`` of MONAI's engines for a batch of ``collate_bags``: features, label, (mask,), {}."""
    label = batch.get("label")
    return (
        batch["features"].to(device, non_blocking=non_blocking),
        None if label is None else label.to(device, non_blocking=non_blocking),
        (batch["mask"].to(device, non_blocking=non_blocking),),
        {},
    )


class MILTrainer(SupervisedTrainer):
    """MONAI's ``SupervisedTrainer`` for bags: bags with masks in, ``MILOutput`` to the loss, gradients clipped.

    Args:
        *args: as in ``SupervisedTrainer``.
        clip_norm: largest norm of the gradient; None: as it comes.
        output_dir: folder that the training writes to: locked meanwhile, so that two do not mix; None locks none.
        **kwargs: as in ``SupervisedTrainer``; ``prepare_batch`` and ``decollate`` are set for bags.
    """

    def __init__(
        self,
        *args: Any,
        clip_norm: float | None = 1.0,
        output_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.output_dir = output_dir
        kwargs.setdefault("prepare_batch", prepare_bags)
        kwargs.setdefault("decollate", False)
        super().__init__(*args, **kwargs)
        if clip_norm is not None:

            @self.on(IterationEvents.BACKWARD_COMPLETED)
            def _clip(engine: SupervisedTrainer) -> None:
                if not _steps_now(engine):
                    return  # a part of an accumulated gradient: the sum is clipped, once
                if engine.scaler is not None:
                    engine.scaler.unscale_(engine.optimizer)
                torch.nn.utils.clip_grad_norm_(engine.network.parameters(), clip_norm)

    def run(self) -> None:
        """Train to the end.

        Raises:
            LockedError: when another run trains in ``output_dir``.
        """
        with contextlib.nullcontext() if self.output_dir is None else folder_lock(self.output_dir, "MIL training"):
            super().run()


def _steps_now(engine: SupervisedTrainer) -> bool:
    """Whether MONAI's trainer steps after this backward pass: at the last of the parts, or the end of an epoch."""
    parts, length = engine.accumulation_steps, engine.state.epoch_length
    place = engine.state.iteration if length is None else (engine.state.iteration - 1) % length + 1
    return bool(place % parts == 0 or place == length)


class BagInferer(Inferer):
    """Asks a ``MILClassifier`` for probabilities with their evidence (``MILPrediction``).

    An exported classifier (``model.ts``) has no evidence to give: of any other network the output is taken as it is.
    """

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> MILPrediction | Tensor:
        """Predict bags (B, N, D) with mask (B, N) as first extra argument."""
        if isinstance(network, MILClassifier):
            return network.predict(inputs, *args, **kwargs)
        exported: Tensor = network(inputs, *args, **kwargs)
        return exported


class BagMetric(Metric):
    """A figure of ``classification_metrics``, or ``loss``, over all bags of an epoch, for an ignite engine.

    Args:
        name: "loss", "auc", "balanced_accuracy" ...
        target: kind of target.
        device: where ignite keeps it.
    """

    def __init__(self, name: str = "auc", target: str = "multiclass", device: str | torch.device = "cpu") -> None:
        self.name, self.target = name, target
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        super().__init__(output_transform=_logits_and_labels, device=device)

    def reset(self) -> None:
        """Forget the bags."""
        self._logits, self._labels = [], []

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        """Take logits (B, K) and labels."""
        self._logits.append(output[0].detach().float().cpu())
        self._labels.append(output[1].detach().cpu())

    def compute(self) -> float:
        """The figure; NaN where it is undefined."""
        if not self._logits:
            raise NotComputableError("no bag was seen")
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        if self.name == "loss":
            return float(target_loss(logits, labels, self.target))
        probabilities = class_probabilities(logits, self.target).numpy()
        return classification_metrics(labels.numpy(), probabilities, self.target)[self.name]


def _logits_and_labels(output: dict[str, Any]) -> tuple[Tensor, Tensor]:
    prediction = output[Keys.PRED]
    logits = prediction.output.logits if isinstance(prediction, MILPrediction) else prediction.logits
    return logits, output[Keys.LABEL]


def bag_loader(
    dataset: BagDataset,
    batch_size: int = 4,
    training: bool = False,
    balanced: bool = True,
    max_tiles: int = 65536,
    num_workers: int = 0,
    seed: int = 0,
) -> DataLoader:
    """Batches of bags.

    Args:
        dataset: the bags.
        batch_size: most bags in a batch; 1 is one bag at a time (then let the trainer accumulate).
        training: draw and shuffle; else every bag once, in order.
        balanced: in training, draw the classes equally often.
        max_tiles: most tiles in a batch, padding included; one larger bag goes alone.
        num_workers: reading processes; 0 keeps the loaded bags in this one.
        seed: of the draw and of the random transforms.
    """
    labels = [item["label"] for item in dataset.data] if training else None
    sampler = BagBatchSampler(
        dataset.sizes(), batch_size, labels, training and balanced, max_tiles, shuffle=training, seed=seed
    )
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_bags, num_workers=num_workers)


def standardise(network: MILModel, dataset: BagDataset, validation: BagDataset | None = None) -> MILModel:
    """Set the network's feature standardisation, and what it learns without gradient, from the training slides.

    Args:
        network: the method.
        dataset: the training slides.
        validation: the validation slides; a method in closed form learns from them as well, if they are others.

    Returns:
        the network.

    Raises:
        SettingError: when cells are marked and the method does not learn from marks.
    """
    network.set_standardisation(*feature_statistics(dataset))
    places = [(dataset, i) for i in range(len(dataset))]
    if network.closed_form and validation is not None:
        known = {item["slide_id"] for item in dataset.data}
        places += [(validation, i) for i, item in enumerate(validation.data) if item["slide_id"] not in known]
        logger.info("%d slides, the validation slides among them, are learned from in closed form", len(places))
    patients = [str(data.data[i]["patient_id"]) for data, i in places]
    bags = (data.whole(i) for data, i in places)
    marked = None
    if any(data.data[i].get("marks") for data, i in places):
        if not network.takes_marks:
            raise SettingError(
                f"{type(network).__name__} learns from labels of slides alone: lay configs/mil/discriminant.yaml over "
                "train.json for marked cells, or leave marks out"
            )
        marked = [_marked(data.data[i]) for data, i in places]
    network.learn_bags(((bag["features"], bag["label"]) for bag in bags), patients, marked)
    return network


def _marked(item: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(M, D) features of an item's marked cells, as the encoder made them, and their classes (M,) int64."""
    pairs = torch.tensor(item.get("marks") or [], dtype=torch.int64).reshape(-1, 2)
    return torch.from_numpy(read_features(item["features"]).features)[pairs[:, 0]], pairs[:, 1]


def class_weights(items: Sequence[dict[str, Any]], target: str, power: float = 1.0) -> Tensor:
    """Weights of the classes by their rarity: ``(n / (C n_c)) ** power``; for ``multilabel`` absent / present.

    Args:
        items: training items with labels.
        target: kind of target.
        power: 1 balances fully, 0 not at all.
    """
    labels = np.array([item["label"] for item in items])
    if target == "multilabel":
        present = labels.sum(axis=0).clip(min=1)
        return torch.tensor(((len(labels) - present).clip(min=1) / present) ** power, dtype=torch.float32)
    counts = np.bincount(labels, minlength=len(items[0]["classes"])).clip(min=1)
    return torch.tensor((len(labels) / (len(counts) * counts)) ** power, dtype=torch.float32)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: weight decay on matrices, none on biases, norms and tokens."""
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
