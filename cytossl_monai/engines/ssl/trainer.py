"""The trainer of self-supervised methods, on MONAI's engine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader

from cytossl_monai.data.tiles.dataset import batch_to
from cytossl_monai.engines.ssl.accumulation import encode_in_pieces
from cytossl_monai.engines.ssl.batches import check_batch, cut_views, join_views
from cytossl_monai.engines.ssl.checkpoint import check_same_step, find_checkpoints, load_checkpoint
from cytossl_monai.engines.ssl.divergence import describe_divergence, finite_weights
from cytossl_monai.engines.ssl.optim import clip_gradients, set_hyperparameters
from cytossl_monai.engines.ssl.protocol import Stateful
from cytossl_monai.engines.ssl.wrap import unwrap
from cytossl_monai.methods.base import trained_encoder
from cytossl_monai.utils.distributed import is_main, rank, world_size
from cytossl_monai.utils.errors import CheckpointError, TrainingDiverged
from cytossl_monai.utils.locks import folder_lock
from cytossl_monai.utils.seeding import derive_seed, seed_all

__all__ = ["SSLTrainer"]

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Callable[[int, int, int], float]
_VIEWS, _STEP = 1, 2  # streams of seeds


class SSLTrainer(Trainer):
    """Trains an ``SSLMethod``: one iteration is one optimiser step.

    A step: the batch (uint8) goes to the device; views are made there; the method's loss, under autocast; backward;
    gradients unscaled, then clipped; the optimiser; ``method.update``. The learning rate and the weight decay are set
    before it from their schedules.

    *Exactness.* Whatever is random in a step is a function of (seed, step, process): the order of the data, the views,
    and the global random states, which every step seeds anew. A run that was killed and resumed is on a CPU in float32
    bit for bit the run that was not. Views are drawn for ``view_group`` samples at a time, so that a run in one process
    draws the same ones as a run of several whose batches are of that size.

    *Accumulation.* ``accumulation="exact"``: the encoder runs in pieces and is run again backward, heads and loss see
    the whole batch: the large batch's gradient, for any method (see ``accumulation.py``). ``"sum"``: the mean of
    the small batches' gradients, a forward pass cheaper; equal to the large batch's only where the loss is a mean over
    samples that do not see each other (MAE); a contrastive loss then has fewer negatives.

    Args:
        device: where to train.
        max_epochs: length of the run in epochs.
        train_data_loader: gives dictionaries with ``image`` uint8 (B, 3, H, W) and ``mpp`` (B,), or lists
            ``[image, mpp]``; B is the same in every batch and process. A loader with an ``SSLBatchSampler`` starts at
            the step that the run is resumed from; any other is iterated from its beginning.
        network: the method, or the method wrapped by ``engines.ssl.wrap``, on its device.
        optimizer: over the method's parameters; see ``build_optimizer``.
        views: maps (images, mpp, generator=) to the views that the method takes; see ``ViewGenerator``. Where batches
            say ``valid``, the box of each image's real pixels, it is passed on under that name.
        epoch_length: steps of an epoch; default: the loader's length.
        max_steps: length of the run in steps, which then takes precedence over ``max_epochs``.
        lr_schedule: (step, total_steps, epoch_length) -> learning rate; None leaves the optimiser's.
        wd_schedule: likewise for the weight decay.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (which scales its loss).
        clip_norm: largest norm of the gradient; None does not clip.
        clip_by: the norm of ``"all"`` gradients, or each ``"parameter"``'s; see ``clip_gradients``.
        accumulation_steps: pieces that the batch is cut into to save memory.
        accumulation: see above.
        seed: see above.
        view_group: samples that views are drawn for at a time; must divide the batch. Default: the whole batch.
        checkpoint_dir: folder to resume from.
        resume: True: from the newest whole checkpoint there, if there is one.
        compile: ``torch.compile`` the network.
        compile_kwargs: its arguments.
        channels_last: memory format of weights and views (faster convolutions on CUDA).
        check_every: steps between checks that the loss is finite; default: 1 on a CPU, 10 on CUDA, where every check
            waits for the device. Nothing is saved unchecked.
        non_blocking: copies to the device do not wait (with pinned memory).
        inferer: calls the network; default: ``SimpleInferer``.
        postprocessing: see ``monai.engines.Workflow``.
        key_train_metric: see ``monai.engines.Workflow``.
        additional_metrics: see ``monai.engines.Workflow``.
        metric_cmp_fn: whether the first of two values of the key metric is better; default: the smaller one is.
        train_handlers: handlers with ``attach``.

    Raises:
        ValueError: when an argument is out of range.
        CheckpointError: from ``run``, when the checkpoint to resume from does not fit.
        TrainingDiverged: from ``run``, when the loss or a weight is NaN or infinite.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[Any] | DataLoader,
        network: nn.Module,
        optimizer: Optimizer,
        views: Callable[..., Mapping[str, Sequence[Tensor]]],
        epoch_length: int | None = None,
        max_steps: int | None = None,
        lr_schedule: Schedule | None = None,
        wd_schedule: Schedule | None = None,
        precision: Precision = "fp32",
        clip_norm: float | None = None,
        clip_by: Literal["all", "parameter"] = "all",
        accumulation_steps: int = 1,
        accumulation: Literal["exact", "sum"] = "exact",
        seed: int = 0,
        view_group: int | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = True,
        compile: bool = False,
        compile_kwargs: Mapping[str, Any] | None = None,
        channels_last: bool = False,
        check_every: int | None = None,
        non_blocking: bool = True,
        inferer: Inferer | None = None,
        postprocessing: Any = None,
        key_train_metric: dict[str, Any] | None = None,
        additional_metrics: dict[str, Any] | None = None,
        metric_cmp_fn: Callable[[Any, Any], bool] = lambda current, best: current < best,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        if precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision must be fp32, bf16 or fp16, got {precision!r}")
        if accumulation not in ("exact", "sum"):
            raise ValueError(f"accumulation must be 'exact' or 'sum', got {accumulation!r}")
        if clip_by not in ("all", "parameter"):
            raise ValueError(f"clip_by must be 'all' or 'parameter', got {clip_by!r}")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        if getattr(views, "drop_empty", False) and world_size() > 1:
            raise ValueError(
                "drop_empty leaves batches of different sizes in the processes, which losses over all of them cannot "
                "join: set it to false, or index with min_nuclei 1"
            )
        length = epoch_length or len(train_data_loader)  # type: ignore[arg-type]
        self.total_steps = int(max_steps) if max_steps is not None else int(max_epochs) * int(length)
        super().__init__(
            device=device,
            max_epochs=max_epochs if max_steps is None else math.ceil(max_steps / length),
            data_loader=train_data_loader,
            epoch_length=length,
            non_blocking=non_blocking,
            postprocessing=postprocessing,
            key_metric=key_train_metric,
            additional_metrics=additional_metrics,
            metric_cmp_fn=metric_cmp_fn,
            handlers=None,
            amp=False,  # MONAI's switch means CUDA, float16 and a GradScaler at once
            decollate=False,
        )
        method: Any = unwrap(network)
        check_batch(method, getattr(train_data_loader, "batch_sampler", None))
        self.method = method
        if channels_last:
            method.to(memory_format=torch.channels_last)
        if accumulation_steps > 1 and accumulation == "exact":
            encode_in_pieces(trained_encoder(method) or method.encoder, accumulation_steps)
        self.network: Any = torch.compile(network, **(compile_kwargs or {})) if compile else network
        self.optimizer, self.views = optimizer, views
        self.lr_schedule, self.wd_schedule = lr_schedule, wd_schedule
        self.precision, self.clip_norm, self.channels_last = precision, clip_norm, channels_last
        self.pieces = accumulation_steps if accumulation == "sum" else 1
        self.clip_by: Literal["all", "parameter"] = clip_by
        self.seed, self.view_group = seed, view_group
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self.resume = resume
        device_type = self.state.device.type
        self.check_every = check_every or (10 if device_type == "cuda" else 1)
        self.inferer = SimpleInferer() if inferer is None else inferer
        self.scaler: Any = torch.amp.GradScaler(device_type) if precision == "fp16" else None
        self.stateful: dict[str, Stateful] = {}
        self.sinks: list[Callable[[int, int, dict[str, float]], None]] = []
        self.last_checkpoint: Path | None = None
        self.on_end = contextlib.ExitStack()  # what handlers undo at the end of the run, however it ends
        self._bad = torch.zeros((), dtype=torch.bool, device=self.state.device)
        self.add_event_handler(Events.STARTED, self._start)
        if train_handlers is not None:
            self._register_handlers(train_handlers)
        self.add_event_handler(Events.STARTED, self._stop_when_done)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._stop_when_done)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> None:  # type: ignore[override]
        """Train to the end, from the last checkpoint if there is one. Meanwhile its folder is locked.

        Raises:
            LockedError: when another run trains in the same folder.
        """
        folder = self.checkpoint_dir if is_main() else None
        with folder_lock(folder, "pretraining") if folder is not None else contextlib.nullcontext(), self.on_end:
            Workflow.run(self)

    def _start(self) -> None:
        """Resume, then let the data begin at the step that comes next."""
        if self.resume and self.checkpoint_dir is not None:
            self._resume_from(find_checkpoints(self.checkpoint_dir))
        check_same_step(self, self.checkpoint_dir)
        sampler: Any = getattr(self.data_loader, "batch_sampler", None)
        if hasattr(sampler, "set_start_step"):
            sampler.set_start_step(self.state.iteration)

    def _resume_from(self, candidates: Sequence[Path]) -> None:
        """Take the newest checkpoint; a damaged one is passed over and named, one that does not fit stops the run."""
        damaged = []
        for path in candidates:
            try:
                step = load_checkpoint(self, path)
            except CheckpointError as error:
                if "damaged" not in str(error).replace(str(path), ""):  # a folder may be called so
                    raise
                damaged.append(path)
                self.logger.error("%s", error)
                continue
            self.last_checkpoint = path
            self.logger.info("Resumed from %s: step %d of %d.", path, step, self.total_steps)
            return
        if damaged:
            raise CheckpointError(
                f"all {len(damaged)} checkpoints in {self.checkpoint_dir} are damaged; delete them to start anew"
            )

    def _stop_when_done(self) -> None:
        """End a run that is counted in steps; whole epochs end by themselves, with their events."""
        if self.state.iteration >= self.total_steps and self.state.iteration % self.state.epoch_length:
            self.terminate()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _iteration(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        """One optimiser step; see the class."""
        if batchdata is None:
            raise ValueError("Must provide batch data for current iteration.")
        step = self.state.iteration - 1
        seed_all(derive_seed(self.seed, _STEP, step, rank()))
        views = self.make_views(batchdata, step)
        self._set_schedules(step)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        output = self._forward_backward(views)
        self._check_finite(output["loss"], step)
        stepped = self._optimise(output)
        if stepped:
            self.method.update((step + 1) / self.total_steps)
        self.state.output = output
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return dict(self.state.output)

    def make_views(self, batchdata: Any, step: int) -> dict[str, Any]:
        """The views of a batch, made on the device and determined by (seed, step, group of samples).

        Args:
            batchdata: what the loader gives.
            step: 0 for the first.

        Returns:
            what ``views`` gives, for the whole batch.

        Raises:
            ValueError: when ``view_group`` does not divide the batch.
        """
        if not isinstance(batchdata, Mapping):
            batchdata = dict(zip(("image", "mpp"), batchdata))
        batch = batch_to(batchdata, self.state.device, self.non_blocking)
        images, mpp = batch["image"], batch["mpp"]
        nuclei = batch.get("nuclei")  # as a `TileCache` gives them; None: the views find them
        size = self.view_group or len(images)
        if len(images) % size:
            raise ValueError(f"view_group {size} does not divide the batch of {len(images)}")
        groups = len(images) // size
        drawn = []
        for group in range(groups):
            # A generator of the CPU: where views are drawn does not depend on the device that makes them.
            generator = torch.Generator().manual_seed(derive_seed(self.seed, _VIEWS, step, rank() * groups + group))
            part = slice(group * size, (group + 1) * size)
            known = {} if nuclei is None else {"masks": nuclei[part]}
            if "valid" in batchdata:  # where to cut is decided on the CPU: taken from there, nothing waits for a device
                known["valid"] = batchdata["valid"][part]
            made: dict[str, Any] = dict(self.views(images[part], mpp[part], generator=generator, **known))
            if "label" in batch:  # of the tiles' slides, for methods that learn from them (VPU)
                label = batch["label"][part]
                made["label"] = label[made["kept"]] if "kept" in made else label
            drawn.append(made)
        views = dict(drawn[0]) if groups == 1 else join_views(drawn)
        if self.channels_last:
            for key in ("global", "local"):
                views[key] = [v.contiguous(memory_format=torch.channels_last) for v in views.get(key, [])]
        return views

    def _forward_backward(self, views: Mapping[str, Any]) -> dict[str, Any]:
        """Loss and gradients of a batch, in one piece or as the mean over several."""
        outputs = []
        parts = [views] if self.pieces == 1 else cut_views(views, self.pieces)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self._no_sync() if not last else contextlib.nullcontext():
                with self._autocast():
                    output = self.inferer(part, self.network)
                self.fire_event(IterationEvents.FORWARD_COMPLETED)
                self.fire_event(IterationEvents.LOSS_COMPLETED)
                loss = output["loss"] / len(parts)
                (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
                self.fire_event(IterationEvents.BACKWARD_COMPLETED)
            outputs.append({k: v.detach() for k, v in output.items() if isinstance(v, Tensor)})
        if len(outputs) == 1:
            return dict(outputs[0])
        return {
            k: torch.cat([o[k] for o in outputs]) if v.ndim else torch.stack([o[k] for o in outputs]).mean()
            for k, v in outputs[0].items()
        }

    def _optimise(self, output: dict[str, Any]) -> bool:
        """Unscale, clip, step; whether a step was taken (a float16 overflow skips one)."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if hasattr(self.method, "prepare_gradients"):
            self.method.prepare_gradients()
        if self.clip_norm is not None:
            output["grad_norm"] = clip_gradients(self.optimizer, self.clip_norm, self.clip_by)
        stepped = True
        if self.scaler is None:
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            stepped = self.scaler.get_scale() >= before
        group = max(self.optimizer.param_groups, key=lambda g: g.get("lr_scale", 1.0))
        output["lr"] = float(group["lr"])
        output["weight_decay"] = max(float(g["weight_decay"]) for g in self.optimizer.param_groups)
        return stepped

    def _set_schedules(self, step: int) -> None:
        length = self.state.epoch_length
        lr = self.lr_schedule(step, self.total_steps, length) if self.lr_schedule is not None else None
        decay = self.wd_schedule(step, self.total_steps, length) if self.wd_schedule is not None else None
        set_hyperparameters(self.optimizer, lr, decay)

    def _autocast(self) -> Any:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.state.device.type, dtype=dtype)

    def _no_sync(self) -> Any:
        inner = getattr(self.network, "_orig_mod", self.network)
        return inner.no_sync() if isinstance(inner, DistributedDataParallel) else contextlib.nullcontext()

    # -- what goes wrong, and what is told ---------------------------------------------------------------------------

    def _check_finite(self, loss: Tensor, step: int) -> None:
        """Note whether the loss is finite; look every ``check_every`` steps."""
        self._bad |= ~torch.isfinite(loss)
        if (step + 1) % self.check_every == 0 or step + 1 == self.total_steps:
            self._stop_where(self._bad)

    def ensure_finite(self) -> None:
        """Stop the run if a loss since the last look or a weight is not finite; called before anything is saved.

        A gradient can be NaN where its loss is not, and of several processes each sees its own loss alone.

        Raises:
            TrainingDiverged: says where, what is likely, and what to go on from.
        """
        self._stop_where(self._bad | ~finite_weights(self.method))

    def _stop_where(self, bad: Tensor) -> None:
        if bool(bad):
            raise TrainingDiverged(describe_divergence(self, self.check_every, self.clip_norm, self.precision))

    def report(self, **figures: float) -> None:
        """Publish figures: into ``state.metrics``, which MONAI's handlers log once an epoch, and to the sinks."""
        numbers = {name: float(value) for name, value in figures.items()}
        self.state.metrics.update(numbers)
        if is_main():
            for sink in self.sinks:
                sink(self.state.iteration, self.state.epoch, numbers)

    def data_fingerprint(self) -> dict[str, int]:
        """What the order of the samples depends on, if the loader's sampler says it."""
        sampler: Any = getattr(self.data_loader, "batch_sampler", None)
        return dict(sampler.fingerprint()) if hasattr(sampler, "fingerprint") else {}
