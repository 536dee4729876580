"""`python -m tests.broker.chaos`: see `--help`."""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.broker.chaos.drive import Drive
from tests.broker.chaos.scenarios import ALL, Scenario

SHORT_MINUTES = 5.0
"""Length below which a drive begins with the scenarios that matter most."""
FIRST_MINUTES = 3.0
"""Length that suffices for each of those scenarios once, on a slow machine too."""
FINISH_S = 15.0
"""Time that the last checks take."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = "\n".join(f"  {it.name:20} {(it.run.__doc__ or '').strip()}" for it in ALL)
    parser = argparse.ArgumentParser(
        "python -m tests.broker.chaos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Break workers, brokers and disks under a known load on real Kafka, and check that every answer is exact.\n"
            "A reader checks each second that no answer goes back and that staleness_ms is never a lie. Behind each\n"
            "scenario every series is compared. Exit code 0: all was right; 1: the seed and the ends of all logs are shown."
        ),
        epilog=f"scenarios:\n{names}",
    )
    parser.add_argument("--seed", type=int, default=1, help="order and details of the scenarios (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="about how long it takes (default: %(default)s)")
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1, help="one, or three that replicate (default: 1)")
    parser.add_argument(
        "--only", nargs="+", metavar="SCENARIO", choices=[it.name for it in ALL], help="these, in turn, and no others"
    )
    parser.add_argument("--deltas", type=int, default=1_000_000, help="how many to record at least (default: %(default)s)")
    parser.add_argument("--commit-interval-ms", type=int, default=100, help="of the workers (default: %(default)s)")
    parser.add_argument(
        "--judge-pauses", action="store_true", help="folding that stands still for 3 times its target is wrong, too"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave data and logs there; default: a scratch folder")
    return parser.parse_args(arguments)


def plan(asked: argparse.Namespace) -> list[Scenario]:
    """Return the scenarios to run, each once, in random order; a short drive starts with those marked `first`."""
    rng = random.Random(asked.seed)
    fitting = [it for it in ALL if it.brokers in (0, asked.brokers)]
    if asked.only:
        by_name = {it.name: it for it in fitting}
        return [by_name[name] for name in asked.only if name in by_name]
    if asked.minutes >= SHORT_MINUTES:
        return rng.sample(fitting, len(fitting))
    rest = [it for it in fitting if not it.first]
    return [*(it for it in fitting if it.first), *rng.sample(rest, len(rest))]


def run(drive: Drive, asked: argparse.Namespace, deadline_s: float, done: list[str]) -> None:
    """Run the scenarios, again and again until the time is over; those that pass are added to `done`."""
    todo = plan(asked)
    rng = random.Random(asked.seed + 1)
    longest_s: dict[str, float] = {}
    while todo:
        scenario = todo.pop(0)
        began_s = time.monotonic()
        must = asked.only or not done or (scenario.first and scenario.name not in done and asked.minutes >= FIRST_MINUTES)
        if not must and began_s + longest_s.get(scenario.name, 5.0) > deadline_s:
            continue
        drive.say(f"== {scenario.name}")
        scenario.run(drive)
        drive.check()
        done.append(scenario.name)
        longest_s[scenario.name] = max(longest_s.get(scenario.name, 0.0), time.monotonic() - began_s)
        if drive.problems.found:
            break
        if not todo and time.monotonic() < deadline_s and not asked.only:
            again = plan(asked)
            todo = rng.sample(again, len(again))


def report(drive: Drive, done: Sequence[str]) -> None:
    """Print the measurements."""
    print(f"\n{'took':>7} {'pause':>7} {'target':>7}")
    for it in drive.pauses:
        target = "" if it.target_s is None else f"{it.target_s:.0f}"
        over = "  OVER" if it.target_s is not None and it.affected_s > it.target_s else ""
        print(f"{it.took_s:7.1f} {it.affected_s:7.2f} {target:>7}  {it.what}{over}")
    reads = drive.reader
    print(f"\n{len(done)} scenarios: {' '.join(done)}")
    print(
        f"{drive.load.delta_count} deltas, {drive.checks} times every series compared, {reads.count} reads,"
        f" {reads.failed_count} failed, staleness {reads.staleness_most_ms} ms at most"
    )
    codes = ", ".join(f"{code} {count} times" for code, count in sorted(drive.fleet.codes.items()))
    print(f"{len(drive.refused)} dead letters; workers ended with {codes or 'nothing'}; unasked: {drive.fleet.exits}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    asked = parse(arguments)
    logging.basicConfig(level=logging.CRITICAL)  # what the publisher says of a broker that is away adds nothing
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    deadline_s = time.monotonic() + asked.minutes * 60 - FINISH_S
    rate = asked.deltas / max(30.0, asked.minutes * 60 - 3 * FINISH_S)
    settings = {"commit_interval_ms": asked.commit_interval_ms}
    drive = Drive(
        folder, seed=asked.seed, brokers=asked.brokers, rate=rate, judge_pauses=asked.judge_pauses, workers=settings
    )
    done: list[str] = []
    try:
        with drive:
            try:
                drive.begin()
                run(drive, asked, deadline_s, done)
                if not drive.problems.found:
                    drive.finish(asked.deltas)
            except Exception as error:
                drive.problems.add(str(error) if isinstance(error, AssertionError) else traceback.format_exc())
            report(drive, done)
            if drive.problems.found:
                print(f"\n{drive.tails()}\n\n" + "\n".join(f"WRONG: {it}" for it in drive.problems.found))
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    wrong = bool(drive.problems.found)
    print(f"\n{'NOT EXACT' if wrong else 'EXACT'}, seed {asked.seed}, {asked.brokers} brokers", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
