"""What every self-supervised method here is: a module that turns views into a loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cytossl_monai.methods.parts.batchnorm import synchronise_batchnorm
from cytossl_monai.methods.parts.momentum import follow, make_teacher, set_teacher_mode

__all__ = ["SSLMethod", "Views", "require_tokens", "token_width", "trained_encoder"]

Views = Mapping[str, Sequence[Tensor]]
"""``global`` and ``local``: lists of (B, 3, H, W) float32 in [0, 1]; ``nuclei``: list of (B, 1, H, W) bool."""


class SSLMethod(nn.Module):
    """Base of the methods.

    A method is trained so: ``out = method(views)``, ``out["loss"].backward()``, ``method.prepare_gradients()``, an
    optimiser step over the parameters that require gradients, ``method.update(progress)``. Everything that changes
    during training is a parameter or a buffer, so ``state_dict`` is all that an exact resume needs.

    Args:
        encoder: maps (B, 3, H, W) images in [0, 1] to (B, D) and says ``embed_dim``. It normalises the images itself.
            It is trained in place as ``student``.

    Raises:
        ValueError: when the encoder does not say its ``embed_dim``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        if not hasattr(encoder, "embed_dim"):
            raise ValueError(
                f"{type(self).__name__} needs an encoder with `embed_dim`, got {type(encoder).__name__}: "
                "wrap the network in cytossl_monai.networks.nets.encoder.Encoder"
            )
        self.student: Any = synchronise_batchnorm(encoder)
        # Views go through the encoder in one batch where that changes nothing; batch normalisation would see both.
        self._joins_views = not any(isinstance(module, _BatchNorm) for module in encoder.modules())
        self._teachers: list[tuple[str, str]] = []

    @property
    def encoder(self) -> nn.Module:
        """What is kept after pretraining, and what online evaluation looks at; see also :func:`trained_encoder`."""
        return self.student

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            views: see :data:`Views`; ``local`` and ``nuclei`` may be missing where the method has no use for them.

        Returns:
            ``loss`` (scalar with gradients), its parts (scalars without), ``features`` (B, D): the detached embeddings
            of the first view, for the collapse monitor; some methods add ``teacher_entropy``.
        """
        raise NotImplementedError

    def prepare_gradients(self) -> None:
        """Change or take away gradients; called after the backward pass, before they are clipped."""

    def update(self, progress: float) -> None:
        """Move teachers and schedules on; called once after every optimiser step.

        Args:
            progress: share of the training that is done, in [0, 1].
        """

    # -- for the methods ---------------------------------------------------------------------------------------------

    def add_teacher(self, name: str, student: str) -> None:
        """Make a momentum teacher of ``self.<student>`` and call it ``self.<name>``."""
        setattr(self, name, make_teacher(getattr(self, student)))
        self._teachers.append((name, student))

    def move_teachers(self, momentum: float) -> None:
        """Let every teacher follow its student by one step."""
        for teacher, student in self._teachers:
            follow(getattr(self, teacher), getattr(self, student), momentum)

    def train(self, mode: bool = True) -> SSLMethod:
        """Set the mode of the students; teachers have a rule of their own (:func:`set_teacher_mode`)."""
        super().train(mode)
        self.hold_teacher_mode()
        return self

    def hold_teacher_mode(self) -> None:
        """Put the teachers back into their mode: evaluation may have called ``encoder.train()`` on one of them."""
        if torch.compiler.is_compiling():
            return
        for teacher, _ in self._teachers:
            set_teacher_mode(getattr(self, teacher), self.training)

    def global_views(self, views: Views, at_least: int) -> list[Tensor]:
        """The global views, checked.

        Raises:
            ValueError: when there are fewer than ``at_least``, or one is not (B, 3, H, W).
        """
        found = list(views.get("global", ()))
        if len(found) < at_least:
            raise ValueError(
                f"{type(self).__name__} needs {at_least} global views, got {len(found)}: "
                f"set the number of global views to {at_least}"
            )
        for view in found:
            if view.ndim != 4 or view.shape[1] != 3:
                raise ValueError(f"a view must be (B, 3, H, W), got {tuple(view.shape)}")
        return found

    def encode_each(self, encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        """Embed every view as if alone; in one batch where the encoder has no batch normalisation.

        Args:
            encoder: ``self.student`` or a teacher of it.
            views: list of (B, 3, H, W), of one size.

        Returns:
            list of (B, D).
        """
        if self._joins_views and len(views) > 1 and len({view.shape[1:] for view in views}) == 1:
            return list(encoder(torch.cat(list(views))).split([len(view) for view in views]))
        return [encoder(view) for view in views]

    @staticmethod
    def encode_jointly(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
        """Embed all views, those of one size in one batch, as multi-crop does.

        Args:
            encoder: ``self.student`` or a teacher of it.
            views: list of (B, 3, H, W); views of one size stand side by side.

        Returns:
            (len(views) * B, D), in the order of the views.
        """
        return torch.cat([encoder(torch.cat(run)) for run in SSLMethod.runs(views)])

    @staticmethod
    def runs(views: Sequence[Tensor]) -> list[list[Tensor]]:
        """Views in groups of one size, in their order."""
        return [list(run) for _, run in itertools.groupby(views, key=lambda view: view.shape[-2:])]


def trained_encoder(method: nn.Module) -> nn.Module | None:
    """The encoder that gradients reach: the student, which is not what DINO and iBOT keep (their ``encoder``).

    Learning rates by layer, accumulation and activation checkpointing are of this one. None without any.
    """
    encoder = getattr(method, "student", None) or getattr(method, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) else None


def require_tokens(encoder: nn.Module, method: str) -> None:
    """Refuse an encoder that has no patch tokens.

    Raises:
        ValueError: names the backbones that serve.
    """
    try:
        has_tokens = hasattr(encoder, "forward_tokens") and bool(getattr(encoder, "patch_size", None))
    except ValueError:  # what Encoder.patch_size says of a network without patches
        has_tokens = False
    if not has_tokens:
        network = type(getattr(encoder, "network", encoder)).__name__
        raise ValueError(
            f"{method} masks patches, which {network} does not give: use an SR-Transformer or its dense ViT "
            "(backbone vit_small, sr_vit_tiny, sr_vit_small or sr_vit_base). MoCo v3, SimCLR, BYOL and DINO take any"
        )


def token_width(encoder: nn.Module) -> int:
    """Width of one token; an embedding of class token and mean side by side is twice as wide."""
    halves = 2 if getattr(encoder, "pool", "cls") == "cls+mean" else 1
    return int(getattr(encoder, "embed_dim")) // halves  # noqa: B009 - mypy sees a Tensor or a Module
