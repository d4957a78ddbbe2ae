"""``python -m cytossl_monai.cli.bundle run ...``: as ``python -m monai.bundle``, without its account of the arguments.

MONAI prints a line for each setting that was given, and where it read how to log. The run's own log says both. And it
ends in a traceback where a configuration file is damaged: here that is a sentence with the file and the line.
"""

from __future__ import annotations

import ast
import logging
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cytossl_monai.utils.program import plain_errors


def main() -> None:
    """Look at the configuration files, and hand the command line to MONAI."""
    plain_errors()
    import monai.bundle.scripts  # noqa: F401 - it sets the level of its loggers when it is imported

    from cytossl_monai.engines.bundle import plain_voice

    for name in ("monai.bundle.scripts", "monai.bundle.workflows"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _read_files(sys.argv[1:])
    with plain_voice():
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def _read_files(words: Sequence[str]) -> None:
    """Read every configuration file that the command line names, alone or through ``--args_file``.

    Raises:
        InputError: for the first that cannot be read.
    """
    from cytossl_monai.engines.bundle import read_config_file

    files: Any = _value("config_file", words)
    if (args_file := _value("args_file", words)) is not None:
        arguments: Mapping[str, Any] = read_config_file(args_file)
        files = arguments.get("config_file") if files is None else files
    if isinstance(files, str) and files[:1] in ("[", "("):
        try:
            files = ast.literal_eval(files)
        except (ValueError, SyntaxError):
            return  # MONAI's matter
    elif isinstance(files, str):
        files = [files] if Path(files).is_file() else files.split(",")
    for file in files or ():
        read_config_file(str(file).strip())


def _value(name: str, words: Sequence[str]) -> str | None:
    """What stands behind ``--name``, or ``--name=``."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag.lstrip("-").replace("-", "_") == name:
            return value if equals else next(iter(words[place + 1 : place + 2]), None)
    return None


if __name__ == "__main__":
    main()
