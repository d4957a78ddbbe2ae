"""Where a bundle lies, from whatever folder it is run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["bundle_root"]


def bundle_root(name: str, cwd: str | os.PathLike[str] | None = None) -> str:
    """Root folder of a bundle.

    A configuration does not know its own path. In this order: the folder above the ``--config_file`` that was given to
    ``monai.bundle run``; the folder that MONAI's workflow has put on ``sys.path`` (``monai.bundle.load`` and
    ``create_workflow`` do that); the working directory, if the bundle or a folder of that name lies there; the
    checkout that this package is installed from.

    Args:
        name: the bundle's folder, for example ``cytossl_pretrain``.
        cwd: working directory; default: the current one.

    Raises:
        FileNotFoundError: when it is in none of these; give ``--bundle_root`` then.
    """
    here = Path(cwd) if cwd is not None else Path.cwd()
    candidates = [_config_folder(here), *(here / entry for entry in sys.path if entry)]
    candidates += [here, here / name, here / "bundles" / name]
    candidates.append(Path(__file__).resolve().parents[2] / "bundles" / name)
    for folder in candidates:
        if folder is not None and (folder / "configs" / "metadata.json").is_file() and folder.resolve().name == name:
            return str(folder.resolve())
    raise FileNotFoundError(f"the bundle {name} is not beside its configuration nor in {here}; give --bundle_root")


def _config_folder(here: Path) -> Path | None:
    """The folder above the configs of ``--config_file x`` or ``--config_file=x``; of the first file of several."""
    for position, argument in enumerate(sys.argv):
        key, _, value = argument.partition("=")
        if key.lstrip("-") == "config_file":
            value = value or (sys.argv[position + 1] if position + 1 < len(sys.argv) else "")
            first = value.strip("[]\"' ").split(",")[0].strip("\"' ")
            if first:
                return (here / first).resolve().parent.parent
    return None
