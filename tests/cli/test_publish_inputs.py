"""`pipeline publish` of what people have: packed, in other encodings, with other separators, and with faults."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Here
from tests.cli.test_publish import answer_of
from tests.support import PROGRAM, UpProcess, environment

zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def publish(here: Here, server: UpProcess, view: str, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    done = here("publish", view, "--to", server.url, "--json", *arguments)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_packed_file_of_a_spreadsheet(here: Here, server: UpProcess, tmp_path: Path) -> None:
    """Semicolons, cp1252, CR line ends, UTF-16 and packing: the view equals the rows."""
    text = "Land;Betrag\rÖsterreich;5\rFrance;7\rÖsterreich;1\r"
    for name, data, options in (
        ("plain.csv", text.encode("cp1252"), ["--encoding", "cp1252"]),
        ("no-name", gzip.compress(text.encode("utf-16")), []),
        ("rows.csv.zst", zstd.compress(text.encode()), []),
    ):
        file = tmp_path / name
        file.write_bytes(data)
        view = "sheet_" + name.replace(".", "_").replace("-", "_")
        arguments = ("--value", "Betrag", "--labels", "land=Land", "--delimiter", ";", *options, str(file))
        report, said = publish(here, server, view, *arguments)
        assert (report["lines"], report["last_line"], said) == (3, 4, "")
        assert answer_of(server, view, report["token"]) == {"Österreich": 6, "France": 7}


def test_an_unclosed_quote_is_not_one_bad_line(here: Here, server: UpProcess, tmp_path: Path) -> None:
    """The lines that an unclosed quote takes are counted, and the report says on which line it was opened."""
    file = tmp_path / "rows.csv"
    file.write_text("a,v\n" + "x,1\n" * 99 + 'x,"1\n' + "x,1\n" * 19_899)
    report, said = publish(here, server, "quoted", "--value", "v", str(file), code=1)
    assert report["bad_lines"] == 19_900
    assert "lines 101 to 20000: not CSV" in said
    assert "the quote that was opened on line 101" in said
    assert "nothing was published: 19,900 bad lines" in said
    report, said = publish(here, server, "quoted", "--value", "v", "--skip-bad", str(file))
    assert (report["lines"], report["bad_lines"]) == (99, 19_900)
    file.write_text('a,v,b\nx,1,"2\n' + "x,1,y\n" * 200 + 'x,1,2"\n')
    report, said = publish(here, server, "quoted", "--value", "v", str(file))
    assert report["lines"] == 1
    assert "lines 2 to 203 are one row: is there a quote that is closed too late?" in said


def test_nothing_good_is_a_failure(here: Here, server: UpProcess, tmp_path: Path) -> None:
    """With --skip-bad a file without a good row is exit code 1, one without any row is not."""
    file = tmp_path / "rows.csv"
    file.write_text("a,v\nx,y\nx,z\n")
    report, said = publish(here, server, "nothing", "--value", "v", "--skip-bad", str(file), code=1)
    assert (report["complete"], report["bad_lines"], report["lines"]) == (False, 2, 0)
    assert "nothing was published: no line is good, 2 bad lines" in said
    file.write_text("a,v\n")
    assert publish(here, server, "nothing", "--value", "v", "--skip-bad", str(file))[0]["complete"]


def test_units_of_times(here: Here, server: UpProcess, tmp_path: Path) -> None:
    """Times are in the unit that is told; microseconds and seconds that are taken for milliseconds are noticed."""
    file = tmp_path / "rows.csv"
    file.write_text("v,t\n1,1700000000000000\n2,1700000000000001\n")
    arguments = ("--kind", "last", "--value", "v", "--ts", "t", str(file))
    report, said = publish(here, server, "unit_us", *arguments, code=1)
    assert "line 2: column t: 1700000000000000 is too far ahead of now" in said
    assert "in us it is 2023-11-14: --ts-unit us" in said
    report, said = publish(here, server, "unit_us", "--ts-unit", "us", *arguments)
    assert (answer_of(server, "unit_us", report["token"]), said) == ({"": 2}, "")
    file.write_text("v,t\n1,1700000000\n2,1700000001\n")
    assert publish(here, server, "unit_s", *arguments)[1].count("--ts-unit s?") == 1
    assert not publish(here, server, "unit_s", "--ts-unit", "s", *arguments)[1]


def test_a_damaged_file_is_not_published(here: Here, server: UpProcess, tmp_path: Path) -> None:
    """Nothing of a packed file that ends too early is sent; with --skip-bad what is surely there, with exit code 1."""
    rows = "".join(f"x,{number}\n" for number in range(100_000))
    file = tmp_path / "rows.csv.gz"
    file.write_bytes(gzip.compress(("a,v\n" + rows).encode())[:-1_000])
    report, said = publish(here, server, "damaged", "--value", "v", str(file), code=1)
    assert report["batches"] == 0
    assert "nothing was published: the gzip data ends too early" in said
    report, said = publish(here, server, "damaged", "--value", "v", "--skip-bad", str(file), code=1)
    line = report["acknowledged_line"]
    assert f"the gzip data ends too early; every line up to {line} is published" in said
    assert answer_of(server, "damaged", report["token"]) == {"": sum(range(line - 1))}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--delimiter", "ab"), "--delimiter 'ab': one character"),
        (("--delimiter", ";", "--format", "ndjson"), "--delimiter: is for CSV"),
        (("--encoding", "klingon"), "--encoding klingon: no encoding"),
        (("--ts-unit", "h", "--ts", "t", "--window-s", "1"), "--ts-unit h: one of s, ms, us, ns"),
        (("--ts-unit", "s"), "--ts-unit: is of the column"),
    ],
)
def test_wrong_options_are_told(here: Here, arguments: tuple[str, ...], said: str) -> None:
    """A wrong option is exit code 2 before anything is read."""
    done = here("publish", "v", "--to", "http://127.0.0.1:9", *arguments, "-")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert said in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("get", "\udcff"),
        ("watch", "\udcff"),
        ("get", "v", "--where", "a=\udcff", "--from", "http://127.0.0.1:9"),
        ("get", "v", "--after", "\udcff", "--from", "http://127.0.0.1:9"),
        ("publish", "v\udcff", "/dev/null"),
        ("publish", "v", "--value", "\udcff", "--to", "http://127.0.0.1:9", "--timeout-ms", "1", "/dev/null"),
        ("status", "--from", "http://\udcff:1"),
        ("ingest", "statsd", "--labels", "a=\udcff"),
        ("up", "--set", "\udcff=1"),
        ("up", "--data", "/dev/null/\udcff"),
        ("\udcff",),
        ("--\udcff",),
    ],
)
def test_arguments_that_are_no_text(here: Here, arguments: tuple[str, ...]) -> None:
    """Arguments that are not UTF-8 are told to be wrong, in every command, without a traceback."""
    done = here(*arguments)
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.strip()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """The shell's bytes that are not UTF-8 are shown as such."""
    command = [*PROGRAM, "get", b"\xff"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pipeline: an argument that is not UTF-8: '\\udcff'\n"


def test_a_file_may_have_any_name(server: UpProcess, tmp_path: Path) -> None:
    """A file whose name is not UTF-8 can be published: only what becomes text must be text."""
    file = os.fsencode(tmp_path) + b"/\xff.csv"
    with open(file, "wb") as opened:
        opened.write(b"v\n7\n")
    command = [*PROGRAM, "publish", "named", "--to", server.url, "--value", "v", "--json", file]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=True)
    assert answer_of(server, "named", json.loads(done.stdout)["token"]) == {"": 7}


DATA = find_spec("vega_datasets")
SETS = [
    ("us-employment.csv", [], "nonfarm"),
    ("la-riots.csv", ["neighborhood"], "age"),
    ("airports.csv", ["state"], "latitude"),
]


@pytest.mark.skipif(DATA is None, reason="pip install -c constraints.txt vega_datasets")
@pytest.mark.parametrize(("name", "labels", "value"), SETS, ids=str)
def test_data_of_the_world(here: Here, server: UpProcess, name: str, labels: list[str], value: str) -> None:
    """Data sets that others have made give what a count with Python's csv gives; rows without a number are bad lines."""
    assert DATA is not None
    assert DATA.origin is not None
    file = Path(DATA.origin).parent / "_data" / name
    view = "world_" + name.partition(".")[0].replace("-", "_")
    totals: dict[str, Fraction] = defaultdict(Fraction)
    good = bad = 0
    with file.open(encoding="utf-8-sig", newline="") as opened:
        for row in csv.DictReader(opened):
            try:
                number = Fraction(row[value])
            except ValueError:
                bad += 1
            else:
                good += 1
                totals["/".join(row[label] for label in labels)] += number
    report, _ = publish(here, server, view, "--value", value, "--labels", ",".join(labels), "--skip-bad", str(file))
    assert (report["lines"], report["bad_lines"]) == (good, bad)
    assert good > 50
    found = answer_of(server, view, report["token"])
    assert found == {labels: pytest.approx(float(total), rel=1e-15) for labels, total in totals.items()}
