"""Ignite handlers: online evaluation, collapse monitor, throughput, progress, checkpoints."""
