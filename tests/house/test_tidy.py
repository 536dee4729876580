"""Limits on size, docstrings with a subject, and nothing in the tree that belongs to one machine only."""

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

# The patterns are spelled so that they do not match themselves.
UNFINISHED = re.compile(rb"\b(TO[D]O|FIX[M]E)\b")
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work|root|home/[a-z][\w.-]*|Users/[A-Za-z][\w.-]*)/")
REGISTRY_HOST = re.compile(
    rb"https?://(?:[\w-]+\.)*(?:py[p]i|pythonhosted|npm[j]s|registry|crates|repo\d*|repository|deb|go[l]ang)[.:/]"
)
PACKAGE_FILE = re.compile(rb"https?://[^\s\"'<>]+\.(?:whl|tar\.gz|tgz|jar|crate|deb)\b")


def tracked_files() -> Iterator[Path]:
    """Yield every file that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file():
            yield path


def modules(folder: str = "pipeline") -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def lines_matching(pattern: re.Pattern[bytes]) -> list[str]:
    return [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {match.group().decode(errors='replace')}"
        for path in tracked_files()
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if (match := pattern.search(line))
    ]


def test_modules_are_short() -> None:
    """A module is at most 500 lines."""
    long = {name: count for name, text in modules() if (count := len(text.splitlines())) > MODULE_LINES_MAX}
    assert not long


def test_functions_are_short() -> None:
    """A function is at most 70 lines, from `def` to its end."""
    long = {
        f"{name}:{node.lineno} {node.name}": count
        for name, text in modules()
        for node in ast.walk(ast.parse(text, name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (count := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert not long


def test_nothing_is_left_for_later() -> None:
    """No note to oneself is committed."""
    assert not lines_matching(UNFINISHED)


def test_no_machine_paths() -> None:
    """Nothing committed names a folder of one machine."""
    assert not lines_matching(MACHINE_PATH)


def test_no_registry_addresses() -> None:
    """No address of a package registry is committed: it is the reader's setting."""
    assert not lines_matching(REGISTRY_HOST)
    assert not lines_matching(PACKAGE_FILE)


OPENINGS = re.compile(
    r"(Of|It|Its|They|Them|Those|That|Such|As|So|Than|What|Whatever|Whoever|Nobody|Whether|Who|How|Where|The same)\b"
)
"""First words after which a reader has to guess the subject (DESIGN section 2)."""


def test_a_class_name_has_one_meaning() -> None:
    """No two classes of the program share a name."""
    places = defaultdict(list)
    for name, text in modules():
        for node in ast.walk(ast.parse(text, name)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert not {name: found for name, found in places.items() if len(found) > 1}


@pytest.mark.parametrize("folder", ["pipeline", "tests"])
def test_docstrings_name_their_subject(folder: str) -> None:
    """A docstring, also one of a variable or attribute, begins with an imperative or a noun."""
    found = [
        f"{name}:{node.lineno}: {node.value.value.splitlines()[0]}"
        for name, source in modules(folder)
        for node in ast.walk(ast.parse(source, name))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and OPENINGS.match(node.value.value)
    ]
    assert not found
