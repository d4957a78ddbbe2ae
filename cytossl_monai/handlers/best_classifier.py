"""Early stopping that keeps the best classifier, calibrates it and writes it."""

from __future__ import annotations

import copy
import csv
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from cytossl_monai.data.bags.choice import TilesPerSlided
from cytossl_monai.data.bags.seen import seen_digests
from cytossl_monai.engines.mil.trainer import BagMetric
from cytossl_monai.metrics.calibration import class_shares, fit_calibration
from cytossl_monai.networks.files import save_classifier
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.targets import prior_shift
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import atomic_path

__all__ = ["BestClassifier"]

logger = logging.getLogger(__name__)


class BestClassifier:
    """Watches validation, stops when it no longer improves, and writes the classifier of the best epoch.

    Better means a higher AUC; among equal AUCs, which are common on few slides, a lower loss. It judges whenever the
    evaluator has run, which MONAI's ``ValidationHandler`` decides; epochs between two validations count as none better.

    Args:
        evaluator: the validation engine, with the metrics ``auc`` and ``loss`` (``BagMetric``).
        classifier: whose network is trained.
        path: the classifier file.
        patience: epochs without improvement before training ends; None never ends it early.
        min_epochs: epochs before training may end.
        calibrate: fit temperature and bias on the validation slides. A method in closed form learns from these and has
            fitted its logits on slides that it held out itself: only the classes' shares are set then.
        prior: ``seen`` and ``cohort`` of ``training_prior``: the bias is drawn to what takes the balanced draw of
            training back, and the probabilities stand for the cohort's shares. None: the validation slides alone.
        prevalence: (C,) shares of the classes where the classifier will be used; None: those of the cohort.
        splits: items under ``train`` and ``val``: digests of these slides go into the file, by which `check_unseen`
            knows them again. None: none.
        tile_choice: of the tiles that the bags were made of; goes into the file, for the slides that are predicted.
        log_path: CSV with one line a validated epoch; None: none.

    Raises:
        InputError: at the end of a training in which nothing was validated; for a loss that is not finite.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        classifier: MILClassifier,
        path: str | os.PathLike[str],
        patience: int | None = 15,
        min_epochs: int = 10,
        calibrate: bool = True,
        log_path: str | os.PathLike[str] | None = None,
        prior: Mapping[str, torch.Tensor] | None = None,
        prevalence: Sequence[float] | None = None,
        splits: Mapping[str, Sequence[dict[str, Any]]] | None = None,
        tile_choice: TilesPerSlided | None = None,
    ) -> None:
        self.evaluator, self.classifier, self.path = evaluator, classifier, Path(path)
        self.patience, self.min_epochs, self.calibrate = patience, min_epochs, calibrate
        self.prior, self.prevalence = prior, prevalence
        self.splits, self.tile_choice = splits, tile_choice
        if prevalence is not None:  # now, and not after the training
            classifier.check_prevalence(prevalence)
        self.log_path = None if log_path is None else Path(log_path)
        self.best: dict[str, Any] = {"auc": -math.inf, "loss": math.inf, "epoch": 0}
        self.history: list[dict[str, float]] = []
        self._state: dict[str, torch.Tensor] | None = None
        self._collected = BagMetric("loss", classifier.target)
        self._logits: tuple[torch.Tensor, torch.Tensor] | None = None
        self._train_loss: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        self._collected.attach(self.evaluator, "_collected")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep_loss)
        self.evaluator.add_event_handler(Events.COMPLETED, lambda _: self._judge(engine))
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.TERMINATE, self._finish)

    def _keep_loss(self, engine: Engine) -> None:
        loss = float(engine.state.output["loss"].detach())
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} in epoch {engine.state.epoch}: lower the learning rate or look at the features"
            )
        self._train_loss.append(loss)

    def _judge(self, engine: Engine) -> None:
        metrics, epoch = self.evaluator.state.metrics, int(engine.state.epoch)
        auc, loss = float(metrics["auc"]), float(metrics["loss"])
        line = {"epoch": epoch, "train_loss": sum(self._train_loss) / max(1, len(self._train_loss))}
        line |= {f"val_{name}": float(v) for name, v in metrics.items() if not name.startswith("_")}
        self.history.append(line)
        self._train_loss = []
        logger.info("epoch %d: loss %.3f, validation loss %.3f, AUC %.3f", epoch, line["train_loss"], loss, auc)
        # An AUC that is undefined (a class is absent) leaves the decision to the loss.
        rank = auc if math.isfinite(auc) else 0.0
        if (rank, -loss) > (self.best["auc"] + 1e-9, -self.best["loss"]) or (
            abs(rank - self.best["auc"]) <= 1e-9 and loss < self.best["loss"]
        ):
            self.best = {"auc": rank, "loss": loss, "epoch": epoch}
            self._state = copy.deepcopy(self.classifier.network.state_dict())
            self._logits = (torch.cat(self._collected._logits), torch.cat(self._collected._labels))
        elif self.patience is not None and epoch >= self.min_epochs and epoch - self.best["epoch"] >= self.patience:
            logger.info("no improvement for %d epochs: training ends at epoch %d", self.patience, epoch)
            engine.terminate()

    def _finish(self, engine: Engine) -> None:
        if not self.history:
            raise InputError(
                f"nothing was validated in {engine.state.epoch} epochs, so that no classifier could be chosen: set "
                "val_interval to at most epochs"
            )
        if self._state is None or self._logits is None:
            return
        self.classifier.network.load_state_dict(self._state)
        closed_form = self.classifier.network.closed_form
        if self.calibrate:
            self._calibrate(*self._logits)
        self.classifier.trained = True
        self.classifier.meta |= {"validation": None if closed_form else dict(self.best), "n_epochs": len(self.history)}
        if self.splits is not None:
            learned, chosen = list(self.splits["train"]), list(self.splits["val"])
            self.classifier.meta["seen"] = seen_digests([*learned, *chosen] if closed_form else learned, chosen)
        if self.tile_choice is not None:
            choice = self.tile_choice.choice
            self.classifier.meta["tile_choice"] = [choice.tiles_per_slide, choice.seed]
        save_classifier(self.path, self.classifier)
        if self.log_path is not None:
            with atomic_path(self.log_path) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(self.history[0]))
                writer.writeheader()
                writer.writerows(self.history)
        logger.info("best epoch %(epoch)d: validation AUC %(auc).3f, loss %(loss).3f", self.best)
        self._state = None  # COMPLETED also fires after TERMINATE: write once

    def _calibrate(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Temperature and bias of the best epoch, and the prevalence that the probabilities stand for.

        A network in closed form fitted its logits itself, for classes of equal shares: a bias makes them the cohort's.
        """
        classifier, target = self.classifier, self.classifier.target
        shares = class_shares(labels.numpy(), target, len(classifier.classes))
        shift, cohort = None, shares
        if self.prior is not None:
            cohort = self.prior["cohort"]
            shift = prior_shift(self.prior["seen"], cohort, target)
        if classifier.network.closed_form:
            temperature, bias = 1.0, prior_shift(torch.full_like(cohort, 1 / len(cohort)), cohort, target)
        else:
            temperature, bias = fit_calibration(logits, labels, target, shift)
        classifier.temperature.fill_(temperature)
        classifier.bias.copy_(bias)
        classifier.prevalence.copy_(cohort)
        if self.prevalence is not None:
            classifier.set_prevalence(self.prevalence)
