"""Where a bundle lies, from whatever folder it is run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

__all__ = ["bundle_root", "run_training"]


def bundle_root(name: str, cwd: str | os.PathLike[str] | None = None) -> str:
    """Root folder of a bundle.

    In this order: the folder above the configuration that is being read, by ``monai.bundle run``, ``load``,
    ``create_workflow`` or an export; the working directory, if the bundle or a folder of that name lies there; the
    checkout that this package is installed from.

    Args:
        name: the bundle's folder, for example ``cytossl_pretrain``.
        cwd: working directory; default: the current one.

    Raises:
        FileNotFoundError: when it is in none of these; give ``--bundle_root`` then.
    """
    here = Path(cwd) if cwd is not None else Path.cwd()
    candidates = [*_config_folders(here), here, here / name, here / "bundles" / name]
    candidates.append(Path(__file__).resolve().parents[2] / "bundles" / name)
    for folder in candidates:
        if (folder / "configs" / "metadata.json").is_file() and folder.resolve().name == name:
            return str(folder.resolve())
    raise FileNotFoundError(f"the bundle {name} is not beside its configuration nor in {here}; give --bundle_root")


def _config_folders(here: Path) -> Iterator[Path]:
    """Folders above the configurations that are being read, the innermost first.

    MONAI gives a configuration no way to learn its own path. Who reads it knows: the workflow further up the call
    stack, or the function of ``monai.bundle`` (``ckpt_export``, ``verify_net_in_out`` ...) by its local variable.
    """
    frame = inspect.currentframe()
    while frame is not None:
        reader = frame.f_locals.get("self")
        if isinstance(reader, ConfigWorkflow):
            yield (here / reader.config_root_path).resolve().parent
        elif frame.f_globals.get("__name__") == "monai.bundle.scripts":
            files = frame.f_locals.get("config_file_")
            first = files[0] if isinstance(files, (list, tuple)) and files else files
            if isinstance(first, (str, os.PathLike)):
                yield (here / first).resolve().parent.parent
        frame = frame.f_back


def run_training(config_files: Sequence[str | os.PathLike[str]], overrides: Mapping[str, Any]) -> None:
    """Run a training configuration in this process, as ``python -m monai.bundle run`` would.

    Args:
        config_files: ``train.json`` and what is laid over it, in order.
        overrides: values to set, by id.
    """
    workflow = ConfigWorkflow(
        config_file=[str(path) for path in config_files],
        meta_file=str(Path(config_files[0]).parent / "metadata.json"),
        workflow_type="train",
        logging_file=False,
        **overrides,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
