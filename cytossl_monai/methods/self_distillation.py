"""What DINO and iBOT share: a student that is to say what its own moving average says, over prototypes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cytossl_monai.losses.dino import DINOLoss, TeacherTarget
from cytossl_monai.methods.base import SSLMethod
from cytossl_monai.methods.parts.heads import DINOHead, UnitLinear
from cytossl_monai.methods.parts.schedules import cosine, linear_warmup

__all__ = ["SelfDistillation"]


class SelfDistillation(SSLMethod):
    """Student, momentum teacher, a head with prototypes on each, targets that do not collapse, and their schedules.

    The student is trained; the teacher is what is kept, as the papers found it the better one throughout. The defaults
    are DINO's.

    Args:
        encoder: see :class:`SSLMethod`.
        out_dim: number of prototypes K.
        hidden_dim: width inside the heads.
        bottleneck_dim: width before the prototypes.
        head_layers: linear layers before the prototypes.
        learn_gain: learn the gains of the weight-normalised last layer (``norm_last_layer=False``); less stable.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, after the warm-up.
        warmup_teacher_temperature: of the teacher's at the start.
        temperature_warmup: share of the training over which it rises (30 of 300 epochs).
        centering: ``momentum`` or ``sinkhorn``.
        center_momentum: of the center.
        momentum: of the teacher at the start; it rises to 1 along a cosine. DINO advises more than 0.996 for batches
            far below 1024 images.
        freeze_last_layer: share of the training during which the prototypes stand still (1 of 100 epochs).

    Raises:
        ValueError: for a value outside its range.
    """

    teacher: nn.Module
    teacher_head: nn.Module
    teacher_temperature: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_layers: int = 3,
        learn_gain: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        temperature_warmup: float = 0.1,
        centering: str = "momentum",
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_last_layer: float = 0.01,
    ) -> None:
        super().__init__(encoder)
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        if min(teacher_temperature, warmup_teacher_temperature) <= 0:
            raise ValueError(
                f"teacher temperatures must be positive, got {warmup_teacher_temperature} and {teacher_temperature}"
            )
        # Both are epochs in the papers' programs: 30 of them would here never end, and 1 freeze prototypes for good.
        if not 0.0 <= temperature_warmup <= 1.0 or not 0.0 <= freeze_last_layer < 1.0:
            raise ValueError(
                "temperature_warmup must lie in [0, 1] and freeze_last_layer in [0, 1), shares of the run, not epochs; "
                f"got {temperature_warmup} and {freeze_last_layer}"
            )
        self.head = DINOHead(
            self.head_width(encoder), out_dim, hidden_dim, bottleneck_dim, head_layers, learn_gain=learn_gain
        )
        self.add_teacher("teacher", "student")
        self.add_teacher("teacher_head", "head")
        self.target = TeacherTarget(out_dim, centering, center_momentum)
        self.loss = DINOLoss(student_temperature)
        self.base_momentum = momentum
        self.temperatures = {"teacher_temperature": teacher_temperature}
        self.warmup = (warmup_teacher_temperature, temperature_warmup)
        self.freeze_share = freeze_last_layer
        self.register_buffer("teacher_temperature", torch.ones(()))
        self.follow_schedules(0.0)

    @staticmethod
    def head_width(encoder: nn.Module) -> int:
        """Width of what the head takes: the encoder's embedding."""
        return int(getattr(encoder, "embed_dim", 0))

    @property
    def encoder(self) -> nn.Module:
        """The teacher's encoder."""
        return self.teacher

    def prepare_gradients(self) -> None:
        """Take the gradients of frozen prototypes away, as DINO does.

        An optimiser passes over a parameter without a gradient: it neither decays nor counts a step. Were the gradients
        zeros, Adam would count steps without a second moment, and its first updates after the thaw would be two to
        three times too large.
        """
        for layer in self._prototypes():
            if layer.frozen:
                for parameter in layer.parameters():
                    parameter.grad = None

    def update(self, progress: float) -> None:
        """Move the teacher, the centers and the schedules on."""
        self.move_teachers(cosine(self.base_momentum, 1.0, progress))
        for module in self.children():
            if isinstance(module, TeacherTarget):
                module.advance()
        self.follow_schedules(progress)

    def follow_schedules(self, progress: float) -> None:
        """Set temperatures and freeze or thaw the prototypes; a subclass that adds some calls it in its constructor."""
        start, share = self.warmup
        for name, end in self.temperatures.items():
            getattr(self, name).fill_(linear_warmup(start, end, progress, share))
        for layer in self._prototypes():
            layer.freeze(progress < self.freeze_share)

    def _prototypes(self) -> Iterator[UnitLinear]:
        """The students' last layers."""
        teachers = {name for name, _ in self._teachers}
        for name, module in self.named_children():
            if isinstance(module, DINOHead) and name not in teachers:
                yield module.last_layer
