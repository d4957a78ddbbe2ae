"""What an exported model may bring besides its network: the configuration of the bundle, and no other."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from cytossl_monai.utils.errors import CheckpointError

__all__ = ["check_exported"]


def check_exported(model: str | os.PathLike[str], config: str | os.PathLike[str]) -> None:
    """Refuse an exported model whose configuration could run anything that the bundle's own does not.

    ``ckpt_export`` writes ``metadata.json`` and ``inference.json`` into ``model.ts``, and the operator of MONAI Deploy
    builds pre-processing, inferer and device from them: text that begins with ``$`` is evaluated there, ``_target_`` is
    called, every import statement runs. Plain values may differ from the bundle's; whatever is evaluated may not.

    The network itself stays a program: TorchScript has operators that write files. Serve only what you exported, or
    what you have from somebody you trust; this check is no sandbox for it.

    Args:
        model: the exported ``model.ts``.
        config: the ``inference.json`` that it was exported with, as a rule that of the bundle ``cytossl_mil``.

    Raises:
        CheckpointError: when the file is no such export, was renamed, or brings a configuration of its own.
    """
    model = Path(model)
    again = f"export it again with ckpt_export and {config}"
    told = _configurations(model, again)
    own = ConfigParser.load_config_file(config)
    others = {key: value for key, value in told["inference"].items() if key not in own or own[key] != value}
    if (code := _evaluated(others)) is not None:
        raise CheckpointError(f"{model} brings a configuration of its own ({code}); {again}")
    if (code := _evaluated(told["metadata"])) is not None:
        raise CheckpointError(f"{model} brings metadata that would be evaluated ({code}); {again}")


def _configurations(model: Path, again: str) -> dict[str, Any]:
    """Metadata and configuration as the SDK will read them: by zip, from the folder of the file's own name."""
    contents = {}
    try:
        with zipfile.ZipFile(model) as archive:
            for name in ("metadata", "inference"):
                content = json.loads(archive.read(f"{model.stem}/extra/{name}.json"))
                if not isinstance(content, Mapping):
                    raise ValueError(f"{name}.json is {type(content).__name__}")
                contents[name] = content
    except FileNotFoundError:
        raise CheckpointError(f"{model}: no such file; {again}") from None
    except KeyError as error:
        raise CheckpointError(
            f"{model} lacks {str(error)[:120]}: it was renamed, or exported without its configuration; {again}"
        ) from error
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{model} is no exported model that can be read ({error}); {again}") from error
    return contents


def _evaluated(value: Any) -> str | None:
    """The first thing in a value that MONAI would evaluate, look up, merge or call; None for plain values."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key == "_target_" or key.startswith("+") or "#" in key or "::" in key:
                return f"{key}: {part}"[:80]
            if (code := _evaluated(part)) is not None:
                return code
    elif isinstance(value, list):
        return next((code for part in value if (code := _evaluated(part)) is not None), None)
    elif isinstance(value, str) and value.lstrip()[:1] in ("$", "@", "%"):
        return value[:80]
    return None
