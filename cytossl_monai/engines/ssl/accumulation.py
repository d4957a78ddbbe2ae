"""Large batches on small devices: the encoder in pieces, the loss on the whole batch.

Adding up the gradients of small batches is not the gradient of a large one wherever samples see each other: a
contrastive loss would lose its negatives, a centre or a batch normalisation its statistics. Here the encoder, which
holds nearly all of the memory, runs piece by piece and forgets its activations; heads and loss see the whole batch;
the backward pass runs each piece again (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016). The
gradient is the large batch's for every method, at the price of one more forward pass of the encoder.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_blocks", "encode_in_pieces"]


_PER_SAMPLE = ("mask", "keep", "foreground")
"""Arguments of an encoder that have one row a sample, and are cut with the images."""


def _in_pieces(function: Callable[..., Any], pieces: int, per_sample: tuple[str, ...]) -> Callable[..., Any]:
    """Wrap a function of (B, ...) tensors so that it runs on B / pieces samples at a time."""

    signature = inspect.signature(function)

    def run(*given: Any, **named: Any) -> Any:
        kwargs = dict(signature.bind(*given, **named).arguments)
        images = kwargs.pop(next(iter(kwargs)))
        if not torch.is_grad_enabled() or len(images) < 2:
            return function(images, **kwargs)
        count = min(pieces, len(images))
        split = {k: kwargs[k].chunk(count) for k in per_sample if isinstance(kwargs.get(k), Tensor)}
        rest = {k: v for k, v in kwargs.items() if k not in split}
        outputs = [
            checkpoint(function, piece, **{k: v[i] for k, v in split.items()}, **rest, use_reentrant=False)
            for i, piece in enumerate(images.chunk(count))
        ]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return tuple(torch.cat(parts) for parts in zip(*outputs))

    return run


def encode_in_pieces(encoder: nn.Module, pieces: int) -> None:
    """Let an encoder run its batch in pieces wherever gradients are on; changes the encoder in place.

    Args:
        encoder: gives (B, D) from ``forward`` and, if it has tokens, tensors from ``forward_tokens``.
        pieces: how many; 1 changes nothing.

    Raises:
        ValueError: when ``pieces`` is below 1, or the encoder normalises over the batch, which pieces would change.
    """
    if pieces < 1:
        raise ValueError(f"accumulation_steps must be at least 1, got {pieces}")
    if pieces == 1:
        return
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise ValueError(
            "accumulation_steps > 1 cannot equal the large batch with an encoder that has batch normalisation; let it "
            "normalise by groups (stem_norm or resnet_norm: group, in configs/backbone and configs/scale), or set "
            "train#trainer#accumulation to sum, whose statistics are those of the small batches"
        )
    encoder.forward = _in_pieces(encoder.forward, pieces, _PER_SAMPLE)  # type: ignore[method-assign]
    tokens: Any = getattr(encoder, "forward_tokens", None)
    if tokens is not None:
        encoder.forward_tokens = _in_pieces(tokens, pieces, _PER_SAMPLE)  # type: ignore[assignment]


def checkpoint_blocks(encoder: nn.Module) -> int:
    """Recompute each transformer block's (or residual stage's) activations in the backward pass; in place.

    Args:
        encoder: any module with a ``nn.ModuleList`` or ``nn.Sequential`` of blocks.

    Returns:
        the number of blocks that are recomputed.

    Raises:
        ValueError: when no list of blocks is found.
    """
    found = 0
    for module in encoder.modules():
        if hasattr(module, "checkpoint_activations") and isinstance(getattr(module, "blocks", None), nn.ModuleList):
            module.checkpoint_activations = True  # type: ignore[assignment]
            found += len(module.blocks)  # type: ignore[arg-type]
    if found:
        return found
    for name, module in encoder.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if not (leaf in ("blocks", "layers") or leaf.startswith("layer")):
            continue
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        for block in module:
            block.forward = _recomputed(block)  # type: ignore[method-assign]
            found += 1
    if not found:
        raise ValueError("activation_checkpointing found no list of blocks in the encoder; switch it off")
    return found


@contextlib.contextmanager
def _statistics_held(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch normalisation goes by the batch as before, but its running means stay: the batch weighs nothing in them."""
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    function = block.forward
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    # What is computed twice would be counted twice by running means.
    held: dict[str, Any] = {}
    if norms:
        held["context_fn"] = lambda: (contextlib.nullcontext(), _statistics_held(norms))

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        # ``torch.compile`` refuses such contexts: there, running means do count a batch twice.
        holding = {} if torch.compiler.is_compiling() else held
        return checkpoint(function, *args, use_reentrant=False, **holding, **kwargs)

    return run
