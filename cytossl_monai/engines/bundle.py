"""Where a bundle lies, from whatever folder it is run; running its training from Python."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser, ConfigWorkflow

from cytossl_monai.utils.errors import InputError, reason

__all__ = [
    "as_data",
    "bundle_root",
    "config_folder",
    "data_of",
    "naming_damaged_files",
    "plain_voice",
    "read_config_file",
    "reading_parser",
    "run_training",
    "training_files",
]


logger = logging.getLogger(__name__)


class _Data:
    """Holds a value that MONAI's configuration hands on without a look at it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value

    def __repr__(self) -> str:
        return repr(self.value)


def as_data(value: Any) -> dict[str, Any]:
    """A configuration item that is ``value`` and nothing else.

    MONAI evaluates a string that begins with ``$``, looks ``@`` and ``%`` up, and takes ``#`` for a separator, also
    within lists and dictionaries. What comes from a table, a file name or a file must not be read so: a component whose
    target is no name but an object is called as it is.

    Args:
        value: anything.

    Returns:
        an item whose parsed content is ``value`` itself.
    """
    return {"_target_": _Data(value)}


def data_of(item: Any) -> Any:
    """What ``as_data`` was given; None for any other item."""
    target = item.get("_target_") if isinstance(item, Mapping) else None
    return target.value if isinstance(target, _Data) else None


def reading_parser() -> ConfigParser | None:
    """The parser of the configuration that is being read; None where this is called from elsewhere.

    MONAI hands a component its arguments and nothing else. The parser that calls it stands in the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(reader := frame.f_locals.get("self"), ConfigParser):
            return reader
        frame = frame.f_back
    return None


def config_folder() -> Path | None:
    """Folder of the configuration that is being read: of the first of its files; None where MONAI does not say."""
    return next(_config_folders(Path.cwd()), None)


def config_files() -> list[Path]:
    """Files of the configuration that ``monai.bundle run`` is reading; none where it was not started that way."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "monai.bundle.scripts" and "config_file" in frame.f_locals:
            files = frame.f_locals["config_file"]
            files = files if isinstance(files, (list, tuple)) else [files]
            return [Path(file) for file in files if isinstance(file, (str, os.PathLike))]
        frame = frame.f_back
    return []


def bundle_root(name: str, cwd: str | os.PathLike[str] | None = None) -> str:
    """Root folder of a bundle.

    In this order: the bundle of the configuration that is being read, by ``monai.bundle run``, ``load``,
    ``create_workflow`` or an export, whatever that folder is called; the working directory, if the bundle or a folder
    of that name lies there; the checkout that this package is installed from. Where a configuration is being read that
    lies in no bundle, a warning says whose files stand in.

    Args:
        name: the bundle's folder, for example ``cytossl_pretrain``.
        cwd: working directory; default: the current one.

    Raises:
        FileNotFoundError: when it is in none of these; give ``--bundle_root`` then.
    """
    here = Path(cwd) if cwd is not None else Path.cwd()
    reading = list(_config_folders(here))
    for configs in reading:  # a copy may have any name
        if _is_bundle(configs.parent):
            return str(configs.parent)
    checkout = Path(__file__).resolve().parents[2] / "bundles"
    for folder in (here, here / name, here / "bundles" / name, checkout / name):
        if _is_bundle(folder) and folder.resolve().name == name:
            if reading:
                logger.warning(
                    "the configuration in %s lies in no bundle (beside no metadata.json): models and the output folder "
                    "are those of %s; give --bundle_root for others",
                    reading[0],
                    folder.resolve(),
                )
            return str(folder.resolve())
    raise FileNotFoundError(f"the bundle {name} is not beside its configuration nor in {here}; give --bundle_root")


def _is_bundle(folder: Path) -> bool:
    return (folder / "configs" / "metadata.json").is_file()


def _config_folders(here: Path) -> Iterator[Path]:
    """Folders of the configurations that are being read, the innermost first.

    MONAI gives a configuration no way to learn its own path. Who reads it knows: the workflow further up the call
    stack, or the function of ``monai.bundle`` (``ckpt_export``, ``verify_net_in_out`` ...) by its local variable.
    """
    frame = inspect.currentframe()
    while frame is not None:
        reader = frame.f_locals.get("self")
        if isinstance(reader, ConfigWorkflow):
            yield (here / reader.config_root_path).resolve()
        elif frame.f_globals.get("__name__") == "monai.bundle.scripts":
            files = frame.f_locals.get("config_file_")
            first = files[0] if isinstance(files, (list, tuple)) and files else files
            if isinstance(first, (str, os.PathLike)):
                yield (here / first).resolve().parent
        frame = frame.f_back


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one configuration file, as MONAI does. Nothing in it is evaluated.

    Args:
        path: a .json, .yaml or .yml file.

    Raises:
        InputError: when it does not exist, cannot be read, or holds no settings; names the line where it is malformed.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise InputError(f"configuration {path} does not exist; give the path of a .json or .yaml file")
    try:
        content = ConfigParser.load_config_file(path)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"configuration {path}, {where}: no JSON ({error.msg}); mend it there") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "some line"
        what = " ".join(str(error.problem or error.context).split())
        raise InputError(f"configuration {path}, {where}: no YAML ({what}); mend it there") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"configuration {path} cannot be read ({reason(error)}); write it again") from error
    if not isinstance(content, Mapping):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise InputError(f"configuration {path} holds {kind}; it must hold settings, 'name: value' each")
    for key in content:
        if not isinstance(key, str):
            raise InputError(f"configuration {path}: {key!r} is no name of a setting; put it in quotation marks")
    return dict(content)


@contextmanager
def naming_damaged_files(files: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Where MONAI fails over configuration files, say which of them is damaged, and in which line.

    Raises:
        InputError: see ``read_config_file``; where every file can be read, MONAI's own error stays.
    """
    try:
        yield
    except Exception:
        for file in files:
            read_config_file(file)
        raise


def training_files(
    config: str | os.PathLike[str], overlays: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = ()
) -> tuple[str, ...]:
    """``train.json`` and what is laid over it, as one list of paths.

    Args:
        config: the bundle's ``train.json``.
        overlays: configuration files, in order; a path alone is one.

    Raises:
        InputError: for a file that does not exist or cannot be read.
    """
    files = [config, *([overlays] if isinstance(overlays, (str, os.PathLike)) else overlays)]
    for file in files:
        read_config_file(file)
    return tuple(str(file) for file in files)


def run_training(
    config_files: Sequence[str | os.PathLike[str]],
    overrides: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
) -> None:
    """Run a training configuration in this process, as ``python -m monai.bundle run`` would.

    Args:
        config_files: ``train.json`` and what is laid over it, in order.
        overrides: values to set, by id: configuration, of which expressions are evaluated.
        data: values to set over these, by id, as they are: see ``as_data``.
    """
    with plain_voice(), naming_damaged_files(config_files):
        workflow = ConfigWorkflow(
            config_file=[str(path) for path in config_files],
            meta_file=str(Path(config_files[0]).parent / "metadata.json"),
            workflow_type="train",
            logging_file=False,
            **{**overrides, **{key: as_data(value) for key, value in (data or {}).items()}},
        )
    workflow.initialize()
    workflow.run()
    workflow.finalize()


@contextmanager
def plain_voice() -> Iterator[None]:
    """Leave out what MONAI warns of where logging is left to the caller and overlays lie elsewhere: both are meant."""
    voice = logging.getLogger("monai.bundle.workflows")

    def other(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in ("skipping logging", "Not all config files"))

    voice.addFilter(other)
    try:
        yield
    finally:
        voice.removeFilter(other)
