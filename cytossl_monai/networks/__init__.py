"""Networks: the SR-Transformer, baseline encoders and multiple-instance classifiers."""
