"""Settings of a publisher from `pipeline.toml` and from the environment (`PIPELINE_*`), which wins.

A publisher lives in other people's apps. A file that `PIPELINE_CONFIG` names was meant for it: anything wrong in it raises
`Invalid`. A `pipeline.toml` that merely lies in the working directory may be another program's: it is taken as a whole or,
with a warning, not at all, so that no app fails because of it. From such a file options of librdkafka are never taken: some
of them load code and run commands, and the user who may write to the folder need not be the one who runs the app. Nor are
settings of connections to servers: they name files that are sent.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

from pipeline.errors import Invalid
from pipeline.settings import (
    ENV_PREFIX,
    FILE,
    FILE_VARIABLE,
    GROUPS,
    OTHER_VARIABLES,
    ClientSettings,
    check_value,
    default_of,
    held,
)

_log = logging.getLogger(__name__)
_GROUPS: tuple[Any, ...] = GROUPS
_ALL = {item.name for group in _GROUPS for item in fields(group)}
_TOKEN = ("token", "token_file")
_NEVER_FOUND = ("kafka", *(item.name for item in fields(ClientSettings)))
"""Settings that are taken from no file that merely lies in the working directory."""
_SERVICE_LINK = re.compile(
    rf"{ENV_PREFIX}([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""Variables that Kubernetes sets in every pod if a service is called `pipeline`, or `pipeline-...`."""
_warned: set[str] = set()
"""Warnings that this process has logged: an app may make many publishers."""

Wanted = Mapping[str, Field[Any]]


def find_settings(given: Collection[str], groups: Sequence[Any]) -> dict[str, Any]:
    """Return the settings of these groups that are in the file and the environment, without those in `given`.

    Raises `Invalid` for a wrong value in the environment, and for anything wrong in a file that `PIPELINE_CONFIG` names.
    Unknown names are logged as warnings.
    """
    without = {*given, *_of_one_kind(given)}
    wanted = {item.name: item for group in groups for item in fields(group) if item.name not in without}
    if not wanted:
        return {}
    in_file, in_environment = _in_file(wanted), _in_environment(wanted)
    for name in _of_one_kind(in_environment):
        in_file.pop(name, None)
    return {**in_file, **in_environment}


def _of_one_kind(names: Collection[str]) -> tuple[str, ...]:
    """Return the settings of which one at most may be given, if one of them is."""
    return _TOKEN if any(name in names for name in _TOKEN) else ()


def closest(name: str, known: Collection[str]) -> str:
    """Return a question that names the known setting that is most alike; empty if there is none."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _in_file(wanted: Wanted) -> dict[str, Any]:
    named = os.environ.get(FILE_VARIABLE, "")
    if named:
        if not os.path.isfile(named):
            raise Invalid(f"{FILE_VARIABLE} names a file that is not there: {named}")
        table = _read(named)
        for name in sorted(table.keys() - _ALL):
            _warn(f"unknown setting {name!r:.100} in {named}{closest(name, _ALL)}")
        return _checked(table, wanted, named)
    if not os.path.isfile(FILE):
        return {}
    try:
        table = _read(FILE)
        if unknown := sorted(table.keys() - _ALL):
            raise Invalid(f"unknown setting {unknown[0]!r:.100}{closest(unknown[0], _ALL)}")
        found = _checked(table, wanted, FILE)
    except Invalid as error:
        _warn(f"{os.path.abspath(FILE)} is left out, as if it were another program's: {error}. {_NAME_IT}")
        return {}
    for name in _NEVER_FOUND:
        if found.pop(name, None):
            _warn(f"{name} in {os.path.abspath(FILE)} is left out. {_NAME_IT}")
    return found


_NAME_IT = f"If it is yours, name it in {FILE_VARIABLE}"


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return held(tomllib.load(file))
    except (OSError, ValueError) as error:
        raise Invalid(f"{path}: {error}") from None


def _checked(table: Mapping[str, Any], wanted: Wanted, where: str) -> dict[str, Any]:
    found = {name: value for name, value in table.items() if name in wanted}
    for name, value in found.items():
        _check(wanted[name], value, where)
    return found


def _check(item: Field[Any], value: object, where: str) -> None:
    try:
        check_value(item, value)
    except Invalid as error:
        raise Invalid(f"{where}: {error}") from None


def _in_environment(wanted: Wanted) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, text in sorted(os.environ.items()):
        upper = variable.upper()
        if not upper.startswith(ENV_PREFIX) or not text or upper in OTHER_VARIABLES:
            continue
        name = upper.removeprefix(ENV_PREFIX).lower()
        if name in wanted:
            found |= held({name: _parsed(wanted[name], text)})
            _check(wanted[name], found[name], variable)
        elif name not in _ALL and not _SERVICE_LINK.fullmatch(upper):
            _warn(f"unknown setting {name!r:.100} in the environment ({variable:.100}){closest(name, _ALL)}")
    return found


def _parsed(item: Field[Any], text: str) -> Any:
    """Return the value that a text stands for, or the text itself if it stands for none, so that the check refuses it."""
    default = default_of(item)
    try:
        if isinstance(default, int):
            return int(text)
        return json.loads(text) if isinstance(default, Mapping) else text
    except ValueError:
        return text


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        _log.warning("%s", text)
