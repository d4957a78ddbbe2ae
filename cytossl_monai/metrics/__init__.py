"""Metrics: kNN, linear probe, nuclei detection, bootstrap intervals, calibration."""
