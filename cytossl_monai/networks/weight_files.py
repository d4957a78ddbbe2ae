"""Weight files of others: state dicts in PyTorch's or safetensors' form, single, in a folder or from a hub."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cytossl_monai.utils.errors import CheckpointError

__all__ = ["HUB", "WEIGHT_SUFFIXES", "file_sha256", "fill_network", "find_weights", "read_weights"]

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Files that may hold weights, the safest form first."""
HUB = "hf-hub:"
"""What the name of a model on the Hugging Face hub begins with; only such a name is ever fetched."""
_INDEX = (".safetensors.index.json", ".bin.index.json")


def read_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Read a state dict or a checkpoint that holds one. Nothing in it is executed.

    Args:
        source: a mapping, which is taken as it is; a file (`WEIGHT_SUFFIXES`); or a folder, see `find_weights`.

    Returns:
        how to call the weights in a message, and what they hold.

    Raises:
        CheckpointError: where there is no such file, it is damaged, it holds code, or no state dict.
    """
    if isinstance(source, Mapping):
        return "the state dict", source
    path = find_weights(source)
    if path.name.endswith(_INDEX):
        return str(path.parent), _read_shards(path)
    return str(path), _read_file(path)


def find_weights(source: str | os.PathLike[str], file: str | None = None) -> Path:
    """The weights' file: of a path to one, of a folder with one, or of a name on a hub.

    Args:
        source: a file, a folder with one file of weights (or the parts and the index of one), or ``hf-hub:owner/name``,
            which is fetched by the library ``huggingface_hub`` where that is installed.
        file: the file's name in a folder or on a hub; None: the only one, safetensors where there are several forms.

    Raises:
        CheckpointError: where it is not there, or a folder holds several that might be meant.
    """
    if str(source).startswith(HUB):
        return _from_hub(str(source).removeprefix(HUB), file)
    path = Path(source)
    if path.is_dir():
        if file is not None and (path / file).is_file():
            return path / file
        indexes = [entry for suffix in _INDEX for entry in sorted(path.glob(f"*{suffix}"))]
        if indexes:
            return indexes[0]
        for suffix in WEIGHT_SUFFIXES:
            files = sorted(path.glob(f"*{suffix}"))
            if len(files) == 1:
                return files[0]
            if files:
                names = ", ".join(entry.name for entry in files)
                raise CheckpointError(f"{path}: holds several files of weights ({names}). Give the one that is meant.")
        raise CheckpointError(f"{path}: this folder holds no weights ({', '.join(WEIGHT_SUFFIXES)}).")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give a local file or folder with the weights.")
    return path


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill_network(
    network: nn.Module, where: str, state: Mapping[str, Any], behind: tuple[str, ...], kind: str
) -> list[str]:
    """Fill a network with a state dict of its own names; what lies behind its last layer may be left over.

    Args:
        network: takes the weights in place.
        where: how to call the weights in a message.
        state: the state dict.
        behind: how the names begin that may be left over, where the network has none of them.
        kind: of network, for the message.

    Returns:
        the entries that were not used.

    Raises:
        CheckpointError: where it does not fit, with the names and shapes that differ.
    """
    own = network.state_dict()
    left_over = [name for name in state if name not in own and name.startswith(behind)]
    state = {name: value for name, value in state.items() if name not in left_over}
    # Counters of batches are no weights: files converted from elsewhere lack them.
    lacking = {name for name in set(own) - set(state) if not name.endswith("num_batches_tracked")}
    wrong = sorted(lacking | (set(state) - set(own)))
    for name in own:
        if name in state and own[name].shape != state[name].shape:
            wrong.append(f"{name} ({tuple(state[name].shape)} in the file, {tuple(own[name].shape)} here)")
    if wrong:
        raise CheckpointError(f"{where}: not {kind}; differs in {', '.join(wrong[:5])}.")
    network.load_state_dict(state, strict=False)
    return sorted(left_over)


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors ({error}). Copy it again.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than weights: objects whose code would run when they are loaded. It was not loaded. "
            "Save the state dict alone, best as .safetensors, where you trust the file."
        ) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path}: is a TorchScript program, no weights. Give it as the encoder itself, not as weights."
            ) from error
        raise CheckpointError(f"{path}: cannot be read as weights ({error}). Copy it again.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, no state dict.")
    return content


def _read_shards(index: Path) -> Mapping[str, Any]:
    try:
        names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{index}: is no index of weights in parts ({error}). Copy the folder again.") from error
    state: dict[str, Any] = {}
    for name in names:
        part = index.parent / Path(name).name
        if not part.is_file():
            raise CheckpointError(f"{index}: the part {part.name} is missing. Copy the folder again.")
        state.update(_read_file(part))
    return state


def _from_hub(name: str, file: str | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise CheckpointError(
            f"{HUB}{name}: the library huggingface_hub is not installed. Install it, or fetch the file by other means "
            "and give its path."
        ) from error
    try:
        return Path(hf_hub_download(name, file or "model.safetensors"))
    except Exception as error:
        raise CheckpointError(
            f"{HUB}{name}: {file or 'model.safetensors'} cannot be fetched ({error}). A gated model needs an account "
            "that was granted access; or give the path of a file that you have."
        ) from error
