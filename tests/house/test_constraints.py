"""A fresh clone installs the versions of the last tests: `constraints.txt` names all of them, and every install uses it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.pins import FILE, ROOT, differences, parsed, pinned, rendered

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLS = ("README.md", ".ci/run", "pipeline/Dockerfile")
"""Files that tell or do an install of this tree."""


def asked() -> Iterator[Requirement]:
    """Yield the requirements of pyproject.toml itself, in all extras."""
    for line in (*PROJECT["dependencies"], *(it for extra in PROJECT["optional-dependencies"].values() for it in extra)):
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            yield requirement


def needed() -> Iterator[tuple[str, Requirement, bool]]:
    """Yield every requirement that follows, with who has it, and whether it holds on this interpreter and system."""
    waiting = [(PROJECT["name"], it, frozenset[str]()) for it in asked()]
    seen = set()
    while waiting:
        who, requirement, extras = waiting.pop()
        marker = requirement.marker
        holds = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})
        yield who, requirement, holds
        name = canonicalize_name(requirement.name)
        if not holds or (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            further = distribution(name).requires or []
        except PackageNotFoundError:
            pytest.fail(f"{who} needs {name}, which is not installed: pip install -c constraints.txt -e '.[dev]'")
        waiting += [(name, Requirement(line), frozenset(requirement.extras)) for line in further]


def test_every_line_is_a_name_and_a_version() -> None:
    """The file is sorted, has each name once, no address, and equals what `python -m tests.house.latest --write` writes."""
    assert rendered(pinned()) == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ["a", "a>=1", "a==1 ; python_version<'4'", "a @ file:///a.zip", "A==1", "a==1\na==2", ""])
def test_what_is_no_pin_is_found(line: str) -> None:
    """A line that is no pin is named in the error."""
    with pytest.raises(ValueError, match=re.escape(repr(line.splitlines()[-1] if line else ""))):
        parsed(f"# head\n{line}\n")


def test_everything_that_is_needed_is_pinned_as_it_may_be() -> None:
    """Every requirement of the extras, and of their packages in turn, is pinned at a version that each of them accepts."""
    pins, wrong = pinned(), set[str]()
    for who, requirement, holds in needed():
        name = canonicalize_name(requirement.name)
        if holds and name not in pins:
            wrong.add(f"{who} needs {requirement}: not pinned")
        elif holds and not requirement.specifier.contains(pins[name], prereleases=True):
            wrong.add(f"{who} needs {requirement}: {pins[name]} is pinned")
    assert not wrong


def test_nothing_else_is_pinned() -> None:
    """A pin that no interpreter needs is out of date."""
    assert not pinned().keys() - {str(canonicalize_name(it.name)) for _, it, _ in needed()}


@pytest.mark.parametrize("file", INSTALLS)
def test_whoever_installs_uses_the_file(file: str) -> None:
    """Each `pip install` of this tree that a file tells or does has `-c constraints.txt`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    installs = [line for line in text.splitlines() if "pip install" in line and re.search(r"'\.(\[|')", line)]
    assert installs
    assert not [line for line in installs if "-c constraints.txt" not in line]


def test_differences_are_told() -> None:
    """Another version, a new distribution, and one that is gone are reported, and nothing else."""
    told = differences({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"})
    assert told == ["b: 1 -> 2", "c: 1 -> not installed", "d: not pinned -> 1"]
