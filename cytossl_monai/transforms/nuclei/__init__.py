"""Nuclei found without weights, exactly or for a whole batch; nuclei that a detector found, read from its files."""
