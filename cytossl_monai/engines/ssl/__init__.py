"""Self-supervised pretraining: the trainer and the parts that it stands on."""
