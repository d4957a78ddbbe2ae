"""Views: boxes at nuclei, cut and perturbed for a whole batch; crops and stain jitter as transforms of their own."""
