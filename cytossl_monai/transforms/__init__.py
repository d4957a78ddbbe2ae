"""MONAI transforms for cytology: slides to tiles, nuclei, Nuclei-Centered Perturbation, views."""
