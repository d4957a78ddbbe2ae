"""Nuclei-Centered Perturbation: array and dictionary transforms over batched kernels."""
