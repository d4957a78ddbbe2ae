"""Kernels that nuclei, perturbation and views share: tensors in, tensors out."""
