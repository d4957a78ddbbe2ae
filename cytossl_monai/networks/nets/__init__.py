"""Encoders: the SR-Transformer and the baselines it is compared with."""
