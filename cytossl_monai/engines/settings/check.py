"""The check that a configuration makes of itself before anything is read or written.

MONAI takes any id: one that nothing uses is set and forgotten, and a value of the wrong kind fails in the middle of a
run. Each configuration of the bundles therefore begins with ``check_settings``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.config_item import ConfigComponent, ConfigExpression
from monai.bundle.reference_resolver import ReferenceResolver

from cytossl_monai.engines.bundle import (
    as_data,
    config_files,
    config_folder,
    data_of,
    naming_damaged_files,
    reading_parser,
)
from cytossl_monai.engines.settings.kinds import Kind, PathText
from cytossl_monai.engines.settings.references import (
    ABSENT,
    heads,
    part,
    reached,
    references,
    strings,
    without_meta,
)
from cytossl_monai.engines.settings.tables import TABLES
from cytossl_monai.registry import MODULE, short_names
from cytossl_monai.utils.console import log_run
from cytossl_monai.utils.errors import InputError, SettingError
from cytossl_monai.utils.files import require_writable
from cytossl_monai.utils.program import keep_logs_in, plain_errors

__all__ = ["check_settings", "check_training"]

logger = logging.getLogger(__name__)

_RESERVED = {"imports", "initialize", "run", "finalize", "_meta_"}
_PARTS = frozenset(
    (
        *("backbone", "classifier", "dataloader", "dataset", "embedder", "encoder", "evaluator", "indexer", "inferer"),
        *("loss", "method", "network", "network_def", "optimizer", "sampler", "trainer", "views"),
    )
)
"""Components that no run can do without; of others null has a meaning (``ncp``)."""
_IMPORTANT = re.compile(r"[#@%$]|::")  # what MONAI would read in a text


def check_settings(bundle: str, config: str) -> None:
    """First step of a configuration: end the run with one sentence where a setting is unknown or out of range.

    For ``initialize``: ``{"_target_": "cytossl_monai.engines.check_settings", "bundle": "cytossl_mil", "config":
    "train"}``. Values are set right where what was meant is plain: text that is a number (YAML reads ``1e-3`` as text),
    whole floats as counts, ``false`` as false, a text in place of a list, and paths as they were typed (``2024``,
    ``run #1``). From here on, uncaught errors end the program with one line, see ``plain_errors``.

    Args:
        bundle: name of the bundle.
        config: name of its configuration.

    Raises:
        SettingError: names the setting, what is wrong, and the nearest name or what it may be.
        OutputError: when an output folder cannot be written to.
    """
    plain_errors()
    parser = reading_parser()
    if parser is None:
        return
    folder = config_folder()
    own = folder / f"{config}.json" if folder is not None else None
    _check(parser, f"{bundle}/{config}", own, sys.argv, _own_names(config_files()))


def check_training(
    files: Sequence[str | os.PathLike[str]], overrides: Mapping[str, Any], table: str, given: Sequence[str] = ()
) -> None:
    """The same check of a training that this program is about to start, before it starts.

    Args:
        files: ``train.json`` and what is laid over it.
        overrides: values to set in it, by id.
        table: key of ``TABLES``.
        given: ids that the program sets itself: they may not be overridden.

    Raises:
        SettingError: see ``check_settings``.
    """
    taken = sorted(set(given) & set(overrides))
    if taken:
        raise SettingError(f"setting {taken[0]} of overrides is set by the program itself; leave it out")
    parser = ConfigParser()
    try:
        with naming_damaged_files(files):
            parser.read_config([str(path) for path in files])
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SettingError(f"configuration {', '.join(map(str, files))} cannot be read: {error}") from error
    for key, value in overrides.items():
        try:
            parser[key] = value
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise SettingError(f"unknown setting {key}: {_nearest(key, parser.config)}") from error  # type: ignore[arg-type]
    _check(parser, table, Path(files[0]), (), _own_names(files), outputs=False)


def _check(
    parser: ConfigParser,
    table: str,
    own: Path | None,
    argv: Sequence[str],
    overlaid: Collection[str],
    outputs: bool = True,
) -> None:
    kinds = TABLES[table]
    config: Any = parser.config
    if own is not None and own.is_file():
        defined = ConfigParser.load_config_file(own)
    else:  # a copy under another name: what is no plain value may be its own wiring
        defined = {key: value for key, value in config.items() if not _is_plain(value) or isinstance(value, Mapping)}
    _check_names(config, set(kinds) | set(defined) | set(overlaid), defined)
    _check_parts(config, defined)
    _check_arguments(parser)
    values, changed = _read_plain(parser, kinds, argv)
    for key, right in changed.items():
        parser[key] = as_data(right) if _has_marks(right) else right
    if changed:
        parser.parse(reset=True)
    idle = _idle(parser, kinds, argv)
    values |= _read_expressions(parser, kinds)
    if outputs:
        _check_outputs(table, values)
    for name in idle:
        logger.warning("setting %s has no effect: nothing that runs reads it", name)
    if "epochs" in _flags(argv) and values.get("steps") is not None:
        logger.warning("setting epochs has no effect: steps is %s; give --steps null to count epochs", values["steps"])


def _read_plain(
    parser: ConfigParser, kinds: Mapping[str, Kind], argv: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values that stand there as they are: all of them, and those of which something else was meant."""
    values, changed = {}, {}
    for key, kind in kinds.items():
        raw = part(parser.config, key)
        if raw is ABSENT:
            continue
        held = data_of(raw)
        value = held if held is not None else _as_typed(key, raw, argv) if isinstance(kind, PathText) else raw
        if held is None and not _is_plain(value):
            continue
        values[key] = _read(key, kind, value)
        if held is None and (type(values[key]), values[key]) != (type(raw), raw):
            changed[key] = values[key]
    return values, changed


def _read_expressions(parser: ConfigParser, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Values that are worked out from others, where that makes no component."""
    raw = {key: part(parser.config, key) for key in kinds}
    return {
        key: _read(key, kind, _evaluated(parser, key))
        for key, kind in kinds.items()
        if isinstance(raw[key], str) and not _is_plain(raw[key]) and _is_cheap(parser, key)
    }


def _read(key: str, kind: Kind, value: Any) -> Any:
    try:
        return kind.read(value)
    except ValueError as error:
        raise SettingError(f"setting {key.replace('::', '#')} must be {error}; it is {_short(value)}") from None


def _check_outputs(table: str, values: Mapping[str, Any]) -> None:
    kinds = TABLES[table]
    for key, value in values.items():
        kind = kinds[key]
        if isinstance(kind, PathText) and kind.output and isinstance(value, str):
            require_writable(value)
    if isinstance(values.get("output_dir"), str):
        keep_logs_in(values["output_dir"])
        log = log_run(values["output_dir"])
        if log is not None:
            print(f"{table} -> {values['output_dir']} (details: {log.name})", flush=True)


def _is_cheap(parser: ConfigParser, key: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a value can be worked out without making any component but ``bundle_root``."""
    raw = part(parser.config, key)
    if key in seen or raw is ABSENT:
        return False
    if ConfigComponent.is_instantiable(raw):
        return data_of(raw) is not None or key == "bundle_root"
    return all(
        _is_cheap(parser, reference, seen | {key})
        for text in strings(raw)
        for reference in ReferenceResolver.match_refs_pattern(text)
    )


def _evaluated(parser: ConfigParser, key: str) -> Any:
    try:
        return parser.get_parsed_content(key)
    except Exception as error:
        if isinstance(error, InputError):
            raise
        cause = error.__cause__ or error
        raise SettingError(f"setting {key} cannot be worked out: {type(cause).__name__}: {cause}") from error


def _is_plain(value: Any) -> bool:
    """Whether a value holds nothing that MONAI would still have to evaluate."""
    if isinstance(value, Mapping):
        return not ConfigComponent.is_instantiable(value)
    if isinstance(value, (list, tuple)):
        return all(_is_plain(each) for each in value)
    return not (isinstance(value, str) and (value[:1] in ("$", "%") or re.fullmatch(r"@\w[\w:]*", value)))


def _has_marks(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_marks(each) for each in value)
    return isinstance(value, str) and _IMPORTANT.search(value) is not None


def _as_typed(key: str, value: Any, argv: Sequence[str]) -> Any:
    """A path as it stands on the command line: Python Fire reads ``2024`` as a number and drops all after a ``#``."""
    name = key.replace("::", "#")
    for place, word in enumerate(argv):
        flag, _, text = word.partition("=")
        if flag.replace("-", "_") != f"__{name}" or not flag.startswith("--"):
            continue
        text = text if "=" in word else argv[place + 1] if place + 1 < len(argv) else ""
        if text[:1] in ("[", "{", "(", "$", "@", "%", "'", '"') or text in ("None", "null"):
            return value  # a list, an expression, a reference: MONAI's
        return text
    if isinstance(value, str) and "::" in value and not ConfigExpression.is_expression(value):
        return value.replace("::", "#")  # MONAI reads "#" as "::" in every text; a path has the first, if any
    return value


# -- names -----------------------------------------------------------------------------------------------------------


def _own_names(files: Sequence[str | os.PathLike[str]]) -> set[str]:
    """Ids that an overlay defines and refers to itself: a later overlay may replace what they were for."""
    names: set[str] = set()
    for file in files:
        if Path(file).is_file():
            config = ConfigParser.load_config_file(file)
            names |= heads(references(config)) & {str(key) for key in config}
    return names


def _check_names(config: Mapping[str, Any], known: set[str], defined: Mapping[str, Any]) -> None:
    """An id counts that the bundle's own configuration defines, or that something refers to."""
    used = references(config)
    tops = heads(used)
    known_here = known | _RESERVED | tops | {"bundle_root", "data_root"}
    for key, value in config.items():
        name = str(key)
        if name.startswith("_") or name in known_here or f"_{name}" in _RESERVED:
            continue
        raise SettingError(f"unknown setting {name}{_where(value)}: {_nearest(name, [*known, *tops])}")
    for section, own in defined.items():
        value = config.get(section)
        if not isinstance(own, Mapping) or not isinstance(value, Mapping) or "_target_" in own or "_target_" in value:
            continue
        if not any(isinstance(part, Mapping) for part in own.values()):
            continue  # a dictionary that is a value
        for key in value:
            if key not in own and f"{section}::{key}" not in used and not str(key).startswith("_"):
                raise SettingError(f"unknown setting {section}#{key}: {_nearest(str(key), list(own))}")


def _flags(argv: Sequence[str]) -> set[str]:
    """Names of what the command line gives."""
    return {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}


def _idle(parser: ConfigParser, kinds: Mapping[str, Kind], argv: Sequence[str]) -> list[str]:
    """Settings that the command line names and nothing that runs reads: an overlay has replaced what would.

    Raises:
        SettingError: for one that is not to be passed over, see ``Kind.reader``.
    """
    config: Any = parser.config
    flags = _flags(argv)
    if "run" not in config or "run_id" in flags:
        return []
    used = heads(reached(config))
    unread = [key for key in kinds if key in config and key not in used]
    for key in unread:
        if kinds[key].reader and config[key] is not None:
            raise SettingError(f"setting {key} has no effect: it is for {kinds[key].reader}; leave it out")
    return [key for key in unread if key in flags]


def _where(value: Any) -> str:
    return "" if isinstance(value, (Mapping, list)) else f" ({_short(value)})"


def _nearest(name: str, known: Any) -> str:
    names = sorted({str(key) for key in known if not str(key).startswith("_")})
    near = difflib.get_close_matches(name.split("#")[0], names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0].replace('::', '#')}?"
    return "nothing uses it; see the bundle's docs/README.md for what there is"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_parts(config: Mapping[str, Any], defined: Mapping[str, Any]) -> None:
    """What a run is made of is a component still, where the bundle's own configuration has one."""
    places = [(key,) for key in defined] + [
        (section, key)
        for section, own in defined.items()
        if isinstance(own, Mapping) and not ConfigComponent.is_instantiable(own)
        for key in own
    ]
    for place in places:
        own, value = part(defined, "::".join(place)), part(config, "::".join(place))
        needed = place[-1] in _PARTS and ConfigComponent.is_instantiable(own) and "_disabled_" not in own
        # Of plain types: Python may hand over a component that is made already.
        written = value is None or isinstance(value, (str, int, float, list, tuple, Mapping))
        if needed and written and _is_plain(value):
            raise SettingError(
                f"setting {'#'.join(place)} must be a component with a _target_; it is {_short(value)}. Leave it out "
                f"for {own['_target_']}, or give one with its arguments"
            )


def _check_arguments(parser: ConfigParser) -> None:
    """Every component exists and takes the arguments that it is given."""
    for place, config in _components(without_meta(parser.config)):  # type: ignore[arg-type]
        target = config["_target_"]
        if not isinstance(target, str) or target.startswith("$") or config.get("_disabled_") is True:
            continue
        component = _component(parser, target)
        if component is None:
            if "_disabled_" not in config:
                raise SettingError(f"setting {place}: there is no {target} to import; check _target_")
            continue
        try:
            parameters = inspect.signature(component).parameters
        except (TypeError, ValueError):
            continue  # native code does not say
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        for name in config:
            if name not in parameters and name not in ConfigComponent.non_arg_keys and not name.startswith("_comment"):
                raise SettingError(f"unknown setting {place}#{name} of {target}: {_nearest(name, list(parameters))}")


def _components(config: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(config, Mapping):
        if ConfigComponent.is_instantiable(config):
            yield place, config
        for key, value in config.items():
            yield from _components(value, f"{place}#{key}" if place else str(key))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from _components(value, f"{place}#{number}")


def _component(parser: ConfigParser, target: str) -> Any:
    name = ConfigComponent({"_target_": target}, locator=parser.locator).resolve_module_name()
    if name.startswith(f"{MODULE}."):  # a short name stands for the real thing
        name = name.removeprefix(f"{MODULE}.")
        return getattr(importlib.import_module(short_names()[name]), name)
    try:
        return locate(name)
    except ErrorDuringImport:
        return None
