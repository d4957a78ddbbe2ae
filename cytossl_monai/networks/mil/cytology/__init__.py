"""Methods made for cytology: two scales, and slides on which few cells are malignant."""
