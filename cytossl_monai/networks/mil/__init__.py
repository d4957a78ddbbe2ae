"""Multiple-instance classifiers: features of a slide's tiles in, a diagnosis with its evidence out."""
