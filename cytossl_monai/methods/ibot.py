"""iBOT: self-distillation of the class token and of masked patches; with its options, DINOv2's objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytossl_monai.losses.dino import TeacherTarget, entropy
from cytossl_monai.losses.ibot import IBOTPatchLoss
from cytossl_monai.losses.koleo import KoLeoLoss
from cytossl_monai.methods.base import Views, require_tokens, token_width
from cytossl_monai.methods.parts.heads import DINOHead
from cytossl_monai.methods.parts.masking import SampleCounter, block_masks
from cytossl_monai.methods.self_distillation import SelfDistillation

__all__ = ["IBOT"]


class IBOT(SelfDistillation):
    """iBOT: DINO on the class token, and the same game on patches that the student does not see.

    Blocks of patches of the student's global views are replaced by a learned token; it is to name the prototypes that
    the teacher, who sees everything, gives to these patches. The teacher is kept.

    ``koleo_weight=0.1, centering="sinkhorn", shared_head=False`` is DINOv2's objective.

    Only the masked patches go through the heads, as in DINOv2, which saves much of their cost. iBOT centres over all
    patches; masks are drawn without looking at the image, so the mean over masked patches estimates the same.

    Papers: Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022; Oquab et al., "DINOv2:
    Learning Robust Visual Features without Supervision", TMLR 2024.

    Arguments that are not listed are those of :class:`SelfDistillation`, and hold for class token and patches alike.

    Args:
        encoder: a ViT or SR-Transformer in an ``Encoder`` (``forward_tokens`` with ``mask``).
        out_dim: number of prototypes of the class token.
        patch_out_dim: number of prototypes of patches; must equal ``out_dim`` for a shared head.
        shared_head: one head for class token and patches (iBOT), or one each (DINOv2).
        teacher_temperature: of the teacher's softmax for the class token, after the warm-up.
        teacher_patch_temperature: of the teacher's for patches, after the warm-up.
        mask_probability: share of global views that are masked.
        mask_ratio: smallest and largest share of patches hidden in a masked view.
        patch_weight: weight of the patch loss.
        koleo_weight: weight of the KoLeo regulariser on the class tokens of the student's global views; 0 is off.
        seed: of the masks.

    Raises:
        ValueError: for a value outside its range, or an encoder without tokens, such as ResNet-50.
    """

    teacher_patch_head: nn.Module
    teacher_patch_temperature: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        out_dim: int = 8192,
        patch_out_dim: int = 8192,
        shared_head: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_layers: int = 3,
        learn_gain: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_patch_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        temperature_warmup: float = 0.1,
        centering: str = "momentum",
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_last_layer: float = 0.01,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        patch_weight: float = 1.0,
        koleo_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        require_tokens(encoder, "iBOT")
        low, high = mask_ratio
        if not 0.0 <= mask_probability <= 1.0 or not 0.0 <= low <= high < 1.0:
            raise ValueError(
                "mask_probability must lie in [0, 1] and mask_ratio be two rising numbers in [0, 1), "
                f"got {mask_probability} and {mask_ratio}"
            )
        if teacher_patch_temperature <= 0:
            raise ValueError(f"teacher temperatures must be positive, got {teacher_patch_temperature}")
        if shared_head and patch_out_dim != out_dim:
            raise ValueError(f"a shared head needs patch_out_dim equal to out_dim, got {patch_out_dim} and {out_dim}")
        super().__init__(
            encoder,
            out_dim,
            hidden_dim,
            bottleneck_dim,
            head_layers,
            learn_gain,
            student_temperature,
            teacher_temperature,
            warmup_teacher_temperature,
            temperature_warmup,
            centering,
            center_momentum,
            momentum,
            freeze_last_layer,
        )
        self.shared_head = shared_head
        width = self.head_width(encoder)
        if not shared_head:
            self.patch_head = DINOHead(width, patch_out_dim, hidden_dim, bottleneck_dim, head_layers, learn_gain)
            self.add_teacher("teacher_patch_head", "patch_head")
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.patch_target = TeacherTarget(patch_out_dim, centering, center_momentum)
        self.patch_loss = IBOTPatchLoss(student_temperature)
        self.koleo = KoLeoLoss()
        self.samples = SampleCounter()
        self.mask_probability, self.mask_ratio = mask_probability, (float(low), float(high))
        self.patch_weight, self.koleo_weight, self.seed = patch_weight, koleo_weight, seed
        self.temperatures["teacher_patch_temperature"] = teacher_patch_temperature
        self.register_buffer("teacher_patch_temperature", torch.ones(()))
        self.follow_schedules(0.0)

    @staticmethod
    def head_width(encoder: nn.Module) -> int:
        """Width of a token: class token and patches may share a head."""
        return token_width(encoder)

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Loss over all views; see :class:`SSLMethod`.

        Parts: ``class_loss``, ``patch_loss``, ``koleo`` (where on), ``masked`` (share of patches hidden),
        ``teacher_entropy`` and ``teacher_spread`` (see :class:`~cytossl_monai.methods.dino.DINO`).
        """
        crops = self.global_views(views, 2)
        batch, count = len(crops[0]), len(crops)
        images = torch.cat(crops)
        mask = self._draw_masks(batch, count, images)
        with torch.no_grad():
            self.hold_teacher_mode()
            seen, seen_patches = self.teacher.forward_tokens(images)  # type: ignore[operator]
            if getattr(self.student.network, "drop_background", None) is not None:
                # Blank glass that was not encoded comes back as zeros: nothing to learn there.
                mask = mask & seen_patches.any(-1)
            hidden = mask.nonzero(as_tuple=True)  # once: a GPU is waited for each time that a mask is an index
            targets, patch_targets = self._targets(seen, seen_patches[hidden])
        tokens, patches = self.student.forward_tokens(images, mask=mask, mask_token=self.mask_token)
        runs = [self.student.forward_tokens(torch.cat(run))[0] for run in self.runs(views.get("local", ()))]
        logits, patch_logits = self._heads(torch.cat([tokens, *runs]), patches[hidden])
        class_loss = self.loss(logits.split(batch), targets.split(batch))
        patch_loss = self.patch_loss(patch_logits, patch_targets, mask)
        loss = class_loss + self.patch_weight * patch_loss
        out = {
            "class_loss": class_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "masked": mask.float().mean(),
            "teacher_entropy": entropy(targets).mean(),
            "teacher_spread": entropy(targets.mean(0)),
            "features": seen[:batch],
        }
        if self.koleo_weight > 0:
            # View by view: the two views of an image would be each other's nearest neighbours.
            koleo = torch.stack([self.koleo(view) for view in tokens.split(batch)]).sum()
            loss = loss + self.koleo_weight * koleo
            out["koleo"] = koleo.detach() / count
        return {"loss": loss, **out}

    def _draw_masks(self, batch: int, count: int, images: Tensor) -> Tensor:
        grid = self.student.grid_size(*images.shape[-2:])
        first = self.samples.take(batch)
        return block_masks(first, batch, count, grid, self.mask_probability, self.mask_ratio, self.seed, images.device)

    def _targets(self, tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared_head:
            logits = self.teacher_head(torch.cat([tokens, patches]))
            class_logits, patch_logits = logits[: len(tokens)], logits[len(tokens) :]
        else:
            class_logits, patch_logits = self.teacher_head(tokens), self.teacher_patch_head(patches)
        return (
            self.target(class_logits, self.teacher_temperature),
            self.patch_target(patch_logits, self.teacher_patch_temperature),
        )

    def _heads(self, tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared_head:
            logits = self.head(torch.cat([tokens, patches]))
            return logits[: len(tokens)], logits[len(tokens) :]
        return self.head(tokens), self.patch_head(patches)
