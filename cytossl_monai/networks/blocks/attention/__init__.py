"""Kernels of sparse attention with iRPE: the plain reference, and the fast ones that are held to it."""
