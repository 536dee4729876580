"""`pipeline bench`: runs the benchmarks of a checkout (tests/bench), each in a process of its own, and prints a table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from pipeline.cli import console
from pipeline.errors import Invalid, Unavailable

_ROOT = Path(__file__).resolve().parents[2]


class _Figure(msgspec.Struct):
    value: float
    unit: str
    what: str


class _BenchResult(msgspec.Struct):
    name: str
    measured: _Figure
    baseline: _Figure
    target: str
    met: bool
    ratio: float


class _Listing(msgspec.Struct):
    machine: dict[str, str]
    names: list[str]
    kafka_names: list[str]


def run_bench(names: Sequence[str], *, kafka: bool, quick: bool, plots: str | None, as_json: bool) -> int:
    """Run the named benchmarks, or all (with `kafka`, on Kafka); print what they measured. FAILED if a target was not met.

    `quick` runs them at a small size, to see that they work: the figures mean nothing then, and decide nothing. `plots` is
    the folder to draw into, None: nothing is drawn.
    Raises `Invalid` for an unknown name, or if there is no checkout; `Unavailable` if a benchmark fails.
    """
    if not (_ROOT / "tests" / "bench" / "__main__.py").is_file():
        raise Invalid("the benchmarks are not part of the installed package: run this from a checkout (pip install -e .)")
    listing = msgspec.json.decode(_output([]), type=_Listing)
    known = [*listing.names, *listing.kafka_names]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise Invalid(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    options = [*(["--quick"] if quick else []), *([f"--plots={Path(plots).absolute()}"] if plots else [])]
    rows: list[_BenchResult] = []
    for name in names or (listing.kafka_names if kafka else listing.names):
        with console.err.status(f"{name} ..."):
            rows += msgspec.json.decode(_output([name, *options]), type=list[_BenchResult])
    if as_json:
        console.print_json({"machine": listing.machine, "quick": quick, "rows": rows})
    else:
        console.out.print(_table(rows, listing.machine, quick=quick))
    return console.OK if quick or all(row.met for row in rows) else console.FAILED


def _output(arguments: list[str]) -> bytes:
    done = subprocess.run([sys.executable, "-m", "tests.bench", *arguments], cwd=_ROOT, capture_output=True, check=False)
    if done.returncode:
        raise Unavailable(f"benchmark {' '.join(arguments)} failed:\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def _table(rows: Sequence[_BenchResult], machine: dict[str, str], *, quick: bool) -> Table:
    shape = f"{machine['cpu']}, {machine['cores']} cores, {machine['python']}, {machine['system']}"
    table = Table(caption=f"{shape}{'; a quick run: the figures mean nothing' if quick else ''}", caption_justify="left")
    for column in ("benchmark", "measured", "baseline, same run", "ratio", "target", "met"):
        table.add_column(column, justify="right" if column == "ratio" else "left", overflow="fold")
    for row in rows:
        met = Text("yes", "green") if row.met else Text("no", "red")
        table.add_row(row.name, _cell(row.measured), _cell(row.baseline), f"{row.ratio:.3g}", row.target, met)
    return table


def _cell(figure: _Figure) -> Text:
    number = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"
    return Text.assemble(f"{number} {figure.unit}", (f"\n{figure.what}" if figure.what else "", "dim"))
