"""One step of the trainer: views, precision, clipping, accumulation, schedules, divergence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ssl_standins import Dots, make_trainer
from tiny_encoders import TinyEncoder
from torch import Tensor, nn

from cytossl_monai.data.tiles.dataset import collate_tiles
from cytossl_monai.engines.ssl.accumulation import checkpoint_blocks, encode_in_pieces
from cytossl_monai.engines.ssl.checkpoint import find_checkpoints
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.methods.simclr import SimCLR
from cytossl_monai.metrics.logged import scalars
from cytossl_monai.networks import resnet10
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.transforms.views.generator import ViewGenerator
from cytossl_monai.utils.errors import TrainingDiverged


class Recorder:
    """Keeps the output of every step."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, float]] = []

    def attach(self, engine: SSLTrainer) -> None:
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.outputs.append(scalars(e.state.output)))

    @property
    def losses(self) -> list[float]:
        return [output["loss"] for output in self.outputs]


def train(**options: object) -> tuple[SSLTrainer, Recorder]:
    recorder = Recorder()
    trainer = make_trainer(None, handlers=(recorder,), **options)  # type: ignore[arg-type]
    trainer.run()
    return trainer, recorder


def make_and_run(**options: object) -> SSLTrainer:
    return train(**options)[0]


def test_loss_falls_and_schedules_are_followed() -> None:
    trainer, recorder = train(steps=60, lr=3e-3, dropout=0.0)
    first, last = recorder.losses[:10], recorder.losses[-10:]
    assert sum(last) < 0.93 * sum(first)
    rates = [output["lr"] for output in recorder.outputs]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert recorder.outputs[-1]["weight_decay"] == pytest.approx(0.4)
    free = [group for group in trainer.optimizer.param_groups if group["wd_scale"] == 0]
    assert free
    assert all(group["weight_decay"] == 0 for group in free)


def test_a_step_is_the_plain_recipe() -> None:
    """Against the same steps written out by hand: AdamW, clipping, teacher update."""
    reference = make_trainer(None, steps=3, dropout=0.0, clip_norm=0.5)
    method = reference.method
    batches = iter(reference.data_loader)
    losses = []
    for step in range(3):
        views = reference.make_views(next(batches), step)
        for group in reference.optimizer.param_groups:
            group["lr"] = reference.lr_schedule(step, 3, 5)
            group["weight_decay"] = reference.wd_schedule(step, 3, 5) * group["wd_scale"]
        method.train()
        reference.optimizer.zero_grad()
        loss = method(views)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in method.parameters() if p.requires_grad], 0.5)
        reference.optimizer.step()
        method.update((step + 1) / 3)
        losses.append(float(loss))
    _, recorded = train(steps=3, dropout=0.0, clip_norm=0.5)
    assert recorded.losses == pytest.approx(losses, rel=1e-6)  # the norm of the gradient is summed in another order


def test_views_differ_between_steps_and_samples_but_not_between_calls() -> None:
    trainer = make_trainer(None)
    batch = collate_tiles(Dots().__getitems__([(4, 0), (4, 1)]))
    first, again, later = (trainer.make_views(batch, step)["global"][0] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first[0], first[1])


def test_view_groups_do_not_depend_on_how_many_processes_share_a_batch() -> None:
    trainer = make_trainer(None, view_group=4)
    batch = collate_tiles(Dots().__getitems__([(n, n) for n in range(8)]))
    whole = trainer.make_views(batch, 0)
    alone = make_trainer(None)
    half = alone.make_views({k: v[:4] for k, v in batch.items()}, 0)
    for index in range(2):
        assert torch.equal(whole["global"][index][:4], half["global"][index])
    with pytest.raises(ValueError, match="does not divide"):
        trainer.make_views({k: v[:6] for k, v in batch.items()}, 0)


def test_list_batches() -> None:
    trainer = make_trainer(None)
    batch = collate_tiles(Dots().__getitems__([(n, n) for n in range(4)]))
    as_list = trainer.make_views([batch["image"], batch["mpp"]], 2)
    assert torch.equal(as_list["global"][1], trainer.make_views(batch, 2)["global"][1])


@pytest.mark.parametrize("pieces", [2, 4])
def test_exact_accumulation_equals_the_large_batch(pieces: int) -> None:
    """A contrastive loss with batch-normalised heads, the hard case; in float64, where rounding hides nothing."""

    def method() -> MoCoV3:
        torch.manual_seed(4)
        return MoCoV3(TinyEncoder(0.0), dim=8, hidden_dim=32).double()

    whole, cut = train(method=method(), steps=6), train(method=method(), steps=6, accumulation_steps=pieces)
    assert cut[1].losses == pytest.approx(whole[1].losses, rel=1e-9)
    # Weights are no measure: where a bias has no effect, Adam blows rounding errors of its gradient up to full steps.
    gradients = [
        torch.cat([p.grad.flatten() for p in run.method.parameters() if p.grad is not None])
        for run in (
            make_and_run(method=method(), steps=1),
            make_and_run(method=method(), steps=1, accumulation_steps=pieces),
        )
    ]
    assert gradients[0].dtype == torch.float64
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[0].norm()


def test_summed_accumulation_has_fewer_negatives_and_is_not_the_large_batch() -> None:
    whole, cut = (
        train(dropout=0.0, steps=2, method=SimCLR(TinyEncoder(0.0), dim=8, hidden_dim=16), **options)
        for options in ({}, {"accumulation_steps": 2, "accumulation": "sum"})
    )
    assert cut[1].losses[0] < whole[1].losses[0] - 0.1


def test_summed_accumulation_equals_the_large_batch_where_samples_do_not_see_each_other() -> None:
    class Reconstruct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = TinyEncoder(0.0)
            self.head = nn.Linear(16, 3)

        def forward(self, views: dict[str, list[Tensor]]) -> dict[str, Tensor]:
            image = views["global"][0]
            return {"loss": ((self.head(self.encoder(image)) - image.mean((2, 3))) ** 2).mean()}

        def update(self, progress: float) -> None: ...

    whole = train(method=Reconstruct(), steps=5)[1].losses
    cut = train(method=Reconstruct(), steps=5, accumulation_steps=4, accumulation="sum")[1].losses
    assert cut == pytest.approx(whole, rel=1e-5)


def test_accumulation_refuses_what_it_cannot_keep() -> None:
    class WithBatchNorm(TinyEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.BatchNorm1d(16)

    with pytest.raises(ValueError, match="batch normalisation"):
        encode_in_pieces(WithBatchNorm(), 2)
    with pytest.raises(ValueError, match="does not divide"):
        train(accumulation_steps=3, accumulation="sum")


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    def method() -> MoCoV3:
        torch.manual_seed(1)
        return MoCoV3(TinyEncoder(0.1), dim=8, hidden_dim=32)

    plain, spared = method(), method()
    assert checkpoint_blocks(spared.encoder) == 2
    assert train(method=spared, steps=4)[1].losses == train(method=plain, steps=4)[1].losses
    with pytest.raises(ValueError, match="no list of blocks"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_activation_checkpointing_counts_a_batch_once() -> None:
    """Running means of batch normalisation saw every batch twice: once more in the backward pass."""

    def trained(recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        method = SimCLR(Encoder(resnet10(width=8)), dim=8, hidden_dim=16)
        if recompute:
            assert checkpoint_blocks(method.student) == 4
        make_trainer(None, steps=2, method=method).run()
        return method.state_dict()

    once, again = trained(False), trained(True)
    assert int(again["student.network.layer1.0.bn1.num_batches_tracked"]) == 2
    for name, value in once.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_activation_checkpointing_of_batch_normalisation_can_be_compiled() -> None:
    """``torch.compile`` refused the context that holds the running means, and so the whole step."""
    encoder = Encoder(resnet10(width=8)).train()
    checkpoint_blocks(encoder)
    torch.compile(encoder, backend="aot_eager")(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision: str) -> None:
    """Held to float32 in the first step; after many, two roundings are two runs, and what counts is that it learns."""

    def run(precision: str, steps: int) -> tuple[SSLTrainer, Recorder, Tensor]:
        recorder = Recorder()
        trainer = make_trainer(None, steps=steps, lr=3e-3, dropout=0.0, precision=precision, handlers=(recorder,))
        if trainer.scaler is not None:  # from the default of 2**16 the first steps overflow, as they may
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        trainer.run()
        gradient = torch.cat([p.grad.flatten() for p in trainer.method.parameters() if p.grad is not None])
        return trainer, recorder, gradient

    exact, rounded = run("fp32", 1), run(precision, 1)
    assert rounded[1].losses == pytest.approx(exact[1].losses, rel=0.05)
    assert rounded[1].losses != exact[1].losses
    assert torch.nn.functional.cosine_similarity(rounded[2], exact[2], dim=0) > 0.95
    trainer, recorder, _ = run(precision, 60)
    assert sum(recorder.losses[-10:]) < 0.93 * sum(recorder.losses[:10])
    assert all(parameter.dtype == torch.float32 for parameter in trainer.method.parameters())
    assert (trainer.scaler is None) == (precision == "bf16")


def test_float16_is_unscaled_before_it_is_clipped() -> None:
    exact = train(steps=1, clip_norm=1e-3, dropout=0.0)[1].outputs[0]["grad_norm"]
    recorder = Recorder()
    trainer = make_trainer(None, steps=1, clip_norm=1e-3, dropout=0.0, precision="fp16", handlers=(recorder,))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer.run()
    assert recorder.outputs[0]["grad_norm"] == pytest.approx(exact, rel=0.3)  # scaled, it would be 256 times as large


def test_a_float16_overflow_skips_the_step_and_the_teacher() -> None:
    trainer = make_trainer(None, steps=1, dropout=0.0, precision="fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.clone() for p in trainer.method.parameters()]
    trainer.run()
    assert trainer.scaler.get_scale() < 2.0**40
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.method.parameters()))


def test_channels_last_changes_the_layout_not_the_result() -> None:
    trainer, recorder = train(channels_last=True, steps=3)
    weight = trainer.method.encoder.patch_embedding.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert recorder.losses == pytest.approx(train(steps=3)[1].losses, rel=1e-4)


class Diverging(MoCoV3):
    """Its loss becomes NaN in the seventh step."""

    calls = 0

    def forward(self, views: dict) -> dict:  # type: ignore[override]
        output = super().forward(views)
        self.calls += 1
        return {**output, "loss": output["loss"] * (float("nan") if self.calls == 7 else 1.0)}


def test_a_loss_that_is_nan_stops_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method=Diverging(TinyEncoder(), dim=8, hidden_dim=32))
    with pytest.raises(TrainingDiverged) as told:
        trainer.run()
    message = str(told.value)
    assert "at step 7 of 12" in message
    assert str(tmp_path / "checkpoints" / "step_00000004.pt") in message
    assert "learning rate" in message
    assert "clip_norm" in message
    assert all(torch.isfinite(p).all() for p in trainer.method.parameters())


def test_nothing_is_saved_unchecked(tmp_path: Path) -> None:
    """On CUDA the loss is looked at every tenth step only; a checkpoint in between must still be of a good state."""
    method = Diverging(TinyEncoder(), dim=8, hidden_dim=32)
    with pytest.raises(TrainingDiverged, match="between steps"):
        make_trainer(tmp_path, method=method, check_every=10).run()
    assert [p.name for p in find_checkpoints(tmp_path / "checkpoints")] == ["step_00000004.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision"),
        ({"accumulation": "mean"}, "accumulation"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"steps": 0}, "max_steps"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(None, **options)


def test_batches_of_different_sizes_are_refused_where_several_processes_share_one(monkeypatch) -> None:
    views = ViewGenerator(global_size=18, n_local=0, drop_empty=True)
    make_trainer(None, views=views)
    monkeypatch.setattr("cytossl_monai.engines.ssl.trainer.world_size", lambda: 2)
    with pytest.raises(ValueError, match="drop_empty leaves batches of different sizes"):
        make_trainer(None, views=views)
