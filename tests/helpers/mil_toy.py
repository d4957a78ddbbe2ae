"""Toy cohorts: bags in which positives hold a few tiles of another kind."""

import numpy as np

from cytossl_monai.data.bags.features import write_features


def make_cohort(root, n=30, dim=12, shift=4.0, seed=0, classes=("negative", "positive")):
    """Write features and slides.csv; returns the table's path. Class c has c times as many odd tiles."""
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(dim)
    direction *= shift / np.linalg.norm(direction)
    lines = ["slide_id,path,label,patient_id"]
    for i in range(n):
        c, size = i % len(classes), int(rng.integers(20, 60))
        x = rng.standard_normal((size, dim)) + 0.2 * rng.standard_normal(dim)
        x[: c * max(2, size // 8)] += direction
        attrs = {"encoder": "abc", "encoder_name": "toy"}
        write_features(root / "features" / f"s{i}.h5", x.astype("f4"), rng.integers(0, 999, (size, 2)), attrs)
        lines.append(f"s{i},s{i}.svs,{classes[c]},p{i // 2 if i < 4 else i}")
    (root / "slides.csv").write_text("\n".join(lines) + "\n")
    return root / "slides.csv"
