"""The heatmap as NIfTI with the slide's spacing, for MONAI and 3D Slicer."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np

from cytossl_monai.utils.files import atomic_path
from cytossl_monai.visualize.heatmap import TileMap

__all__ = ["write_nifti"]


def write_nifti(path: str | os.PathLike[str], heat: TileMap) -> Path:
    """Write the map: one voxel a cell, millimetres, axes (x, y, 1); -1 where there is no tile.

    The slide's x runs to the left and y to the back of NIfTI's axes, as ITK lays out pictures: Slicer then shows it
    upright beside the slide itself.

    Args:
        path: ``.nii.gz`` to write.
        heat: the map.

    Returns:
        the path written.
    """
    path = Path(path)
    step = heat.cell * heat.mpp / 1000
    affine = np.diag([-step, -step, 1.0, 1.0])
    affine[:2, 3] = -step / 2
    volume = np.nan_to_num(heat.values, nan=-1.0).T[..., None].astype(np.float32)
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"cytossl tile attention, 0..1, -1 no tile"
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    with atomic_path(path) as partial:
        # The temporary name ends in .gz only: nibabel goes by ".nii.gz".
        if not partial.name.endswith(".nii.gz"):
            whole = partial.with_name(partial.name + ".nii.gz")
            try:
                nibabel.save(image, whole)
                os.replace(whole, partial)
            finally:
                whole.unlink(missing_ok=True)
        else:
            nibabel.save(image, partial)
    return path
