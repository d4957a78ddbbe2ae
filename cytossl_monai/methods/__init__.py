"""Self-supervised methods, one file a method; ``base.py`` is the contract."""
