"""Sparse attention in Triton kernels of our own: used where they are asked for and were tried (`trial`)."""
