"""From a slide to a prediction with its evidence."""
