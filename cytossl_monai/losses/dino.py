"""Self-distillation over prototypes: the teacher's targets (centred or balanced) and DINO's cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.losses.gather import all_reduce_sum
from cytossl_monai.losses.precision import full_precision, widen
from cytossl_monai.losses.sinkhorn import sinkhorn_knopp

__all__ = ["CENTERINGS", "DINOLoss", "TeacherTarget", "entropy"]

CENTERINGS = ("momentum", "sinkhorn")


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each row in nats: (..., K) to (...). 0 log 0 counts as 0."""
    return torch.special.entr(probabilities).sum(-1)


class TeacherTarget(nn.Module):
    """Turns the teacher's logits into targets that do not collapse.

    ``momentum``: ``softmax((logits - center) / temperature)``, where ``center`` is a running mean of the logits:
    centring keeps one prototype from taking all, a low temperature keeps the output from going flat.
    ``sinkhorn``: :func:`~cytossl_monai.losses.sinkhorn.sinkhorn_knopp` over the batch.

    The center moves in :meth:`advance`, once per optimiser step, by the mean over all batches since the last step:
    accumulated gradients then give what the large batch gives.

    Args:
        out_dim: number of prototypes K.
        centering: ``momentum`` or ``sinkhorn``.
        center_momentum: of the running mean.

    Raises:
        ValueError: for an unknown ``centering`` or a momentum outside [0, 1).
    """

    center: Tensor
    pending_sum: Tensor
    pending_count: Tensor

    def __init__(self, out_dim: int, centering: str = "momentum", center_momentum: float = 0.9) -> None:
        super().__init__()
        if centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {', '.join(CENTERINGS)}, got {centering!r}")
        if not 0.0 <= center_momentum < 1.0:
            raise ValueError(f"center_momentum must lie in [0, 1), got {center_momentum}")
        self.centering = centering
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("pending_sum", torch.zeros(1, out_dim))
        self.register_buffer("pending_count", torch.zeros(()))

    @torch.no_grad()
    @full_precision
    def forward(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Targets of a batch.

        Args:
            logits: (B, K) float of the teacher; B may differ between processes, and be 0.
            temperature: of the teacher, > 0.

        Returns:
            (B, K) float32, rows sum to 1, without gradient.
        """
        logits = widen(logits)
        if self.centering == "sinkhorn":
            return sinkhorn_knopp(logits, temperature)
        targets = F.softmax((logits - self.center) / temperature, dim=-1)
        if self.training:
            count = logits.new_full((1, 1), logits.shape[0])
            sums = all_reduce_sum(torch.cat([logits.sum(0, keepdim=True), count], dim=1))
            self.pending_sum.add_(sums[:, :-1])
            self.pending_count.add_(sums[0, -1])
        return targets

    @torch.no_grad()
    def advance(self) -> None:
        """Move the center by what has been seen since the last call; without anything seen it stays."""
        mean = self.pending_sum / self.pending_count.clamp_min(1)
        moved = self.center.lerp(mean, 1.0 - self.center_momentum)
        self.center.copy_(torch.where(self.pending_count > 0, moved, self.center))
        self.pending_sum.zero_()
        self.pending_count.zero_()


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's targets of global views and the student's outputs of all *other* views.

    ``L = mean over pairs (t, s), t != s, of mean_i( -sum_k P_t[i, k] log softmax(S_s[i] / temperature)[k] )``.

    Paper: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, equation 3.

    Args:
        student_temperature: > 0.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, student_temperature: float = 0.1) -> None:
        super().__init__()
        if student_temperature <= 0:
            raise ValueError(f"student_temperature must be positive, got {student_temperature}")
        self.student_temperature = student_temperature

    @full_precision
    def forward(self, student: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Mean over pairs of views and over the batch.

        Args:
            student: logits (B, K) of each view, the global ones first, in the order of ``targets``.
            targets: probabilities (B, K) of each global view.

        Returns:
            scalar.

        Raises:
            ValueError: when no pair of different views is left.
        """
        pairs = len(student) * len(targets) - min(len(student), len(targets))
        if pairs < 1:
            raise ValueError(f"need two views at least, got {len(student)} student and {len(targets)} teacher views")
        summed = torch.stack([target.detach() for target in targets]).sum(0)
        loss = summed.new_zeros(())
        for index, logits in enumerate(student):
            # All teacher views but the same one; one log-softmax per student view serves them all.
            target = summed - targets[index].detach() if index < len(targets) else summed
            log_probabilities = F.log_softmax(widen(logits) / self.student_temperature, dim=-1)
            loss = loss - (target * log_probabilities).sum(-1).mean()
        return loss / pairs
