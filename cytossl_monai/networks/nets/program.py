"""Encoders that are not built here: TorchScript, an exported program, an ONNX file, or a callable of your own."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytossl_monai.networks.nets.program_code import refuse_code
from cytossl_monai.networks.weight_files import file_sha256
from cytossl_monai.utils.errors import CheckpointError

__all__ = ["CallableNetwork", "ProgramNetwork", "is_program"]

_USUAL = (224, 224)
_SUFFIXES = {".onnx": "onnx", ".pt2": "exported"}


def is_program(path: str | os.PathLike[str]) -> str | None:
    """Which kind of program a file holds: ``torchscript``, ``exported``, ``onnx``; None for anything else."""
    path = Path(path)
    if not path.is_file():
        return None
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name.split("/", 1)[-1] for name in archive.namelist()]
        if "constants.pkl" in names and any(name.startswith("code/") for name in names):
            return "torchscript"
    return None


class _Foreign(nn.Module):
    """Base of networks that others built: ``identity`` carries a hash into the encoder's own, vectors are checked.

    Args:
        digest: 32 bytes that tell this program from others.
        embed_dim: declared width, or None.
    """

    identity: Tensor
    has_class_token = False

    def __init__(self, digest: bytes, embed_dim: int | None) -> None:
        super().__init__()
        if embed_dim is not None and embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1; got {embed_dim}.")
        self.embed_dim = embed_dim
        self.register_buffer("identity", torch.tensor(list(digest), dtype=torch.uint8))

    def run(self, images: Tensor) -> Any:
        """What the program gives for a batch."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, D) or (B, N, D).

        Raises:
            ValueError: where the program gives something else, or another width than it was declared with.
        """
        out = self.run(images)
        out = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != len(images):
            what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self} gives {what} for {len(images)} images: a tensor (B, D) or (B, N, D) is needed.")
        width = out.shape[-1] if out.dim() == 3 else out.shape[1]
        if self.embed_dim is not None and width != self.embed_dim:
            raise ValueError(f"{self} gives {width} values a tile, but is declared with embed_dim {self.embed_dim}.")
        return out

    def extra_repr(self) -> str:
        """The declared width."""
        return f"embed_dim={self.embed_dim}"


class ProgramNetwork(_Foreign):
    """A TorchScript file, an exported program (``torch.export.save``) or an ONNX file (needs ``onnxruntime``).

    Its SHA-256 is part of the encoder's hash, so that features of a changed file are told apart. A program made for a
    fixed batch is run in batches of that size.

    Args:
        path: the file.
        embed_dim: declared width; None takes what it gives.

    Raises:
        CheckpointError: where the file is missing, is no program, cannot be read, or the library for it is missing; and
            where an exported program could run code of its own, see `refuse_code`.
    """

    def __init__(self, path: str | os.PathLike[str], embed_dim: int | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file. Give a TorchScript, exported-program (.pt2) or ONNX file.")
        kind = is_program(path)
        if kind is None:
            raise CheckpointError(f"{path}: is neither TorchScript, an exported program (.pt2) nor ONNX.")
        super().__init__(bytes.fromhex(file_sha256(path)), embed_dim)
        self.path, self.kind = path, kind
        self.batch: int | None = None
        self.image_size = _USUAL  # what it takes, where the program is made for one size
        self.program: Any = None
        try:
            if kind == "torchscript":
                self.program = torch.jit.load(path, map_location="cpu").eval()
            elif kind == "exported":
                refuse_code(path)
                exported = torch.export.load(path)
                self._made_for(_input_shape(exported))
                self.program = exported.module()
            else:
                self.program = _OnnxSession(path)
                self._made_for(self.program.shape)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read as {kind} ({error}). Copy or export it again.") from error

    def _made_for(self, shape: Sequence[Any]) -> None:
        batch, *sides = (value if isinstance(value, int) else None for value in (shape[0], *shape[-2:]))
        self.batch = batch
        height, width = (side or usual for side, usual in zip(sides, _USUAL))
        self.image_size = height, width

    def train(self, mode: bool = True) -> ProgramNetwork:
        """Programs stay as they were exported; exported programs refuse to be switched."""
        self.training = mode
        return self

    def run(self, images: Tensor) -> Any:
        """See the base."""
        if self.batch is None or len(images) == self.batch:
            return self.program(images)
        parts = []
        for part in images.split(self.batch):
            padded = torch.cat([part, part[-1:].expand(self.batch - len(part), -1, -1, -1)])
            out = self.program(padded)
            out = out[0] if isinstance(out, (tuple, list)) else out
            parts.append(out[: len(part)])
        return torch.cat(parts)

    def __str__(self) -> str:
        return str(self.path)


class CallableNetwork(_Foreign):
    """What a function of yours builds: a network, a method of one, or a function from images to vectors.

    The parameters of a network are part of the encoder's hash, and so are the function's name and its source file.

    Args:
        target: ``package.module:function``; called once, with ``arguments``.
        embed_dim: declared width; None takes that of the network, which then must have one.
        arguments: for the function.

    Raises:
        CheckpointError: where it cannot be imported or called, gives nothing that can be called, or has no width.
    """

    def __init__(self, target: str, embed_dim: int | None = None, arguments: Mapping[str, Any] | None = None) -> None:
        function = _import(target)
        try:
            network = function(**dict(arguments or {}))
        except Exception as error:
            raise CheckpointError(f"{target}: raises {type(error).__name__}: {error}") from error
        if not callable(network):
            raise CheckpointError(f"{target}: gives {type(network).__name__}, no network or function of images.")
        width = embed_dim if embed_dim is not None else getattr(network, "embed_dim", None)
        if width is None:
            raise CheckpointError(f"{target}: declare its width as embed_dim in a card, or on the network it gives.")
        super().__init__(_source_digest(target, function), int(width))
        self.target, self.network = target, network
        owner = getattr(network, "__self__", None)
        # Of a method the network is registered: else it would stay in training mode, and its weights out of the hash.
        self.owner = owner if isinstance(owner, nn.Module) else None
        self.has_class_token = bool(getattr(network, "has_class_token", False))
        self.num_prefix = int(getattr(network, "num_prefix", self.has_class_token))

    def run(self, images: Tensor) -> Any:
        """See the base."""
        return self.network(images)

    def __str__(self) -> str:
        return self.target


class _OnnxSession:
    """An ONNX file on the device of the images it is given."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise CheckpointError(f"{path}: ONNX files need onnxruntime; pip install 'cytossl-monai[onnx]'.") from error
        available = onnxruntime.get_available_providers()
        wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            raise CheckpointError(f"{path}: has {len(inputs)} inputs; an encoder takes one, the images.")
        self.input = inputs[0].name
        self.dtype = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}.get(inputs[0].type, np.float32)
        self.shape = inputs[0].shape

    def __call__(self, images: Tensor) -> Tensor:
        values = images.detach().float().cpu().numpy()
        if self.dtype is np.uint8:  # a program that takes bytes: images are in [0, 1] here
            values = np.rint(values * 255)
        out = self.session.run(None, {self.input: values.astype(self.dtype)})[0]
        return torch.from_numpy(np.asarray(out)).float().to(images.device)


def _input_shape(exported: Any) -> Sequence[Any]:
    """Shape of an exported program's images: numbers where it is fixed, symbols where it is not."""
    user_inputs = set(exported.graph_signature.user_inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in user_inputs:
            return tuple(node.meta["val"].shape)
    raise CheckpointError("takes no images: it has no input.")


def _import(target: str) -> Callable[..., Any]:
    module_name, _, name = target.partition(":")
    try:
        function: Any = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{target}: cannot be imported ({error}). Give package.module:function of something that is installed or "
            "lies on PYTHONPATH."
        ) from error
    if not callable(function):
        raise CheckpointError(f"{target}: is {type(function).__name__}, which cannot be called.")
    return function  # type: ignore[no-any-return]


def _source_digest(target: str, function: Callable[..., Any]) -> bytes:
    digest = hashlib.sha256(target.encode())
    try:
        source = inspect.getsourcefile(function)
    except TypeError:
        source = None  # built into Python or compiled: its name is all that can be told
    if source is not None and Path(source).is_file():
        digest.update(Path(source).read_bytes())
    return digest.digest()
