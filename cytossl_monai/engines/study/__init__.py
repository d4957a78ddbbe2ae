"""Studies over many runs: ablation, representation, and their tables."""
