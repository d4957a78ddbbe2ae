"""Self-supervised losses, one file a loss."""
