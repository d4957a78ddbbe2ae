"""``cytossl``: thin over the bundles. ``--show`` prints the bundle form of a command, ``--help`` its settings."""

from __future__ import annotations

import shlex
import subprocess
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cytossl_monai import __version__
from cytossl_monai.cli.settings import check_names, help_text, read_settings
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.program import plain_errors

__all__ = ["COMMANDS", "bundle_command", "main"]


@dataclass(frozen=True)
class Command:
    """A command that runs a configuration of a bundle.

    Args:
        bundle: name of the bundle.
        config: name of the configuration.
        does: what it does, in a line.
        required: settings that must be given.
    """

    bundle: str
    config: str
    does: str
    required: tuple[str, ...] = ()


COMMANDS = {
    "index": Command("cytossl_pretrain", "index", "find the tiles with nuclei of each slide", ("slides",)),
    "pretrain": Command("cytossl_pretrain", "train", "train the encoder, without labels", ("index_dir",)),
    "embed": Command("cytossl_inference", "embed", "features of every tile", ("slides", "index_dir")),
    "train-mil": Command(
        "cytossl_mil", "cross_validate", "train and test the slide classifier in patient-wise folds", ("slides",)
    ),
    "predict": Command("cytossl_inference", "inference", "predictions with their evidence, from bare slides"),
    "merge": Command("cytossl_inference", "merge", "join the reports of shards", ("slides",)),
}

_OTHERS = {
    "doctor": "is this machine in order? and is this slide? (cytossl doctor [SLIDE ...])",
    "convert": "write a pyramidal TIFF from any slide that opens (cytossl convert SLIDE OUT.tif)",
    "report": "open the list of slides in a browser (cytossl report open [DIR])",
}


def _overview() -> str:
    lines = [
        f"cytossl {__version__}: self-supervised learning for cytology slides",
        "",
        "usage: cytossl COMMAND ...",
        "",
    ]
    lines += [f"  {name:<10} {command.does}" for name, command in COMMANDS.items()]
    lines += [f"  {name:<10} {does}" for name, does in _OTHERS.items()]
    lines += [
        "",
        "cytossl COMMAND --help   the settings of a command, with their defaults",
        "cytossl COMMAND --show   print the bundle form of a command instead of running it",
        "Exit status: 0 all done, 3 some slides were left out (the report says which), 1 failed, 2 a wrong command.",
    ]
    return "\n".join(lines)


def _config(command: Command) -> Path:
    from cytossl_monai.engines.bundle import bundle_root

    try:
        return Path(bundle_root(command.bundle)) / "configs" / f"{command.config}.json"
    except FileNotFoundError as error:
        raise InputError(f"bundle {command.bundle} is not found: {error}; run in the checkout's folder") from error


def _parse(arguments: Sequence[str], name: str) -> tuple[dict[str, str], list[str], set[str]]:
    """``--key value`` and ``--key=value``, overlays, and the flags ``--show`` and ``--help``."""
    settings: dict[str, str] = {}
    overlays: list[str] = []
    flags: set[str] = set()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("--show", "--help", "-h"):
            flags.add("help" if word == "-h" else word.removeprefix("--"))
            continue
        if not word.startswith("--"):
            raise InputError(f"cytossl {name}: {word!r} is not a setting; write --name value (cytossl {name} --help)")
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise InputError(f"cytossl {name}: --{key} has no value; write --{key} value")
            value = rest.pop(0)
        if key == "overlay":
            overlays.append(value)
        else:
            settings[key.replace("-", "_")] = value
    return settings, overlays, flags


def bundle_command(name: str, settings: dict[str, str], overlays: Sequence[str] = ()) -> list[str]:
    """The bundle form of a command, as ``python -m monai.bundle run`` takes it.

    Args:
        name: key of ``COMMANDS``.
        settings: values as they are typed.
        overlays: configurations laid over the bundle's; over those of the trainings that it starts, where it is a
            cross-validation.

    Raises:
        InputError: for a setting that is unknown or missing, or an overlay that does not exist.
    """
    command = COMMANDS[name]
    config = _config(command)
    known = read_settings(config)[1]
    paths = [str(Path(overlay).absolute()) for overlay in overlays]
    if overlays and any(setting.name == "overlays" for setting in known):
        # A cross-validation starts trainings: what is laid over it is meant for these.
        if "overlays" in settings:
            raise InputError(f"cytossl {name}: --overlay and --overlays mean the same here; give one of them")
        settings, overlays, paths = {**settings, "overlays": str(paths)}, (), []
    for overlay in overlays:
        known = known + read_settings(Path(overlay))[1]
    check_names(list(settings), known, name)
    for key in command.required:
        if key not in settings:
            raise InputError(f"cytossl {name} needs --{key}; cytossl {name} --help says what it is")
    files = str([str(config), *paths]) if paths else str(config)
    line = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files]
    for key, value in settings.items():
        line += [f"--{key}", value]
    return line


def _run_bundle(name: str, arguments: Sequence[str]) -> int:
    settings, overlays, flags = _parse(arguments, name)
    if "help" in flags:
        about, known = read_settings(_config(COMMANDS[name]))
        print(f"cytossl {name}: {COMMANDS[name].does}\n\n  {about}\n{help_text(known)}")
        print("\n    --overlay FILE           a configuration laid over this one (configs/*/*.yaml); may be repeated")
        print("    --show                   print the bundle form instead of running it")
        return 0
    line = bundle_command(name, settings, overlays)
    if "show" in flags:
        print(shlex.join(["python", *line[1:]]))
        return 0
    line[line.index("monai.bundle")] = "cytossl_monai.cli.bundle"  # the same, with fewer words
    return subprocess.call(line)


def _report(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] != "open" or len(arguments) > 2:
        raise InputError("write cytossl report open [DIR]: the folder that cytossl predict wrote to (inference)")
    folder = Path(arguments[1] if len(arguments) > 1 else "inference")
    page = folder / "index.html" if folder.is_dir() else folder
    if not page.is_file():
        raise InputError(f"{page} does not exist; give the folder that cytossl predict wrote to")
    print(page.absolute())
    if not webbrowser.open(page.absolute().as_uri()):
        print("no browser is found here; open the file above on a machine that has one")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    try:
        if name in ("--help", "-h", "help"):
            print(_overview())
            return 0
        if name == "--version":
            print(__version__)
            return 0
        if name in COMMANDS:
            return _run_bundle(name, rest)
        if name == "report":
            return _report(rest)
        if name == "doctor":
            from cytossl_monai.cli.doctor import doctor

            return doctor(rest)
        if name == "convert":
            from cytossl_monai.cli.convert import convert

            return convert(rest)
        raise InputError(f"cytossl has no command {name!r}; it has {', '.join([*COMMANDS, *_OTHERS])}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def entry() -> None:
    """The console script: `main`, and its status as the process's."""
    plain_errors()
    sys.exit(main())


if __name__ == "__main__":
    entry()
