"""Breaks each invariant of the design once, in a copy of the tree, and tells how many seeds the simulator takes to notice.

    python -m tests.sim.mutants                 all mutants
    python -m tests.sim.mutants 3 10            the mutants of these invariants
    python -m tests.sim.mutants --seeds 2000    as many seeds as each may take (default: 1,000)

The run is not part of the suite: it takes minutes, and it quotes the source, so it has to be kept up by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("pipeline", "tests", "topics", "pyproject.toml")


class Mutant(NamedTuple):
    """One change of the source that breaks one invariant of DESIGN 5."""

    invariant: int
    """Number of the invariant in DESIGN 5; 13: what has expired is gone for good, and nothing else; 14: an answer has
    all parts of a series that is spread over partitions."""
    what: str
    path: str
    old: str
    new: str
    only: str | None = None
    """Troubles of each history, in place of those that its seed would choose."""


MUTANTS = (
    Mutant(
        1,
        "the store is written before the transaction",
        "pipeline/worker/partition.py",
        "        offsets = self._right.commit(\n            messages,",
        "        write_entries(self.store, keys, values, StoreMeta(changelog_next_offset=self._begin + len(keys)))\n"
        "        offsets = self._right.commit(\n            messages,",
    ),
    Mutant(
        2,
        "an old owner is not fenced",
        "pipeline/adapters/memory.py",
        "self._owners[transactional_id] = owner = self._owners.get(transactional_id, 0) + 1",
        "self._owners[transactional_id] = owner = 1",
    ),
    Mutant(
        3,
        "a restore ends where the log says that it ends",
        "pipeline/worker/restore.py",
        "        while not follower.lineage.passed:\n",
        "        end = log.watermarks(CHANGELOG, partition).end_offset\n"
        "        while not follower.lineage.passed and follower.next_offset < end:\n",
        "old end",
    ),
    Mutant(
        4,
        "a commit begins wherever the changelog ends",
        "pipeline/worker/partition.py",
        "            begins={(CHANGELOG, self.number): self._begin},\n",
        "",
        "forgeries,pins",
    ),
    Mutant(
        4,
        "an idle owner does not see that the marker of its last commit is missing",
        "pipeline/worker/partition.py",
        "        return end_offset > self._begin or self._marker_missing\n",
        "        return end_offset > self._begin\n",
        "markers",
    ),
    Mutant(
        4,
        "a commit that was aborted after it was acknowledged is taken for one that is there",
        "pipeline/worker/covered.py",
        "    if undo_offset is not None and not any(offset < end_offset for offset, _ in positions):",
        "    if False:",
        "markers",
    ),
    Mutant(
        4,
        "a position counts wherever it stands",
        "pipeline/core/owners.py",
        "    return not at or place == str(offset)\n",
        "    return True\n",
        "markers,forgeries",
    ),
    Mutant(
        4,
        "a start does not write a further record when a marker is missing",
        "pipeline/worker/restore.py",
        "            return is_marker_missing\n",
        "            return False\n",
        "markers",
    ),
    Mutant(
        1,
        "an owner commits before it is back at its position",
        "pipeline/worker/partition.py",
        "        if self.task.next_offset < self.task.position.next_offset:\n            return False\n",
        "",
        "pins",
    ),
    Mutant(
        4,
        "a reader does not mind a hole in deltas",
        "pipeline/adapters/memory.py",
        "            if missing:\n",
        "            if False:\n",
        "cuts",
    ),
    Mutant(
        5,
        "folding begins one record before the position",
        "pipeline/core/task.py",
        "position.next_offset if next_offset is None else next_offset\n",
        "max(0, (position.next_offset if next_offset is None else next_offset) - 1)\n",
    ),
    Mutant(
        6,
        "a follower writes what it holds back as if it were whole",
        "pipeline/worker/follower.py",
        "self._write(len(sieve), records.next_offset, between=True)",
        "self._write(len(sieve), records.next_offset, between=False)",
    ),
    Mutant(
        6,
        "a store is brought up to date however long it was away",
        "pipeline/worker/restore.py",
        "        if away_ms > delete_retention_ms:\n",
        "        if False:\n",
    ),
    Mutant(
        7,
        "records below the position are folded again",
        "pipeline/core/task.py",
        "            if offset < self.next_offset:\n                continue\n            self._log_ms",
        "            self._log_ms",
    ),
    Mutant(
        8,
        "a commit of which nobody knows whether it went through is taken for done",
        "pipeline/worker/partition.py",
        "            except Displaced as error:\n",
        "            except Displaced:\n                raise\n            except Exception:\n                return\n"
        "            except Displaced as error:\n",
    ),
    Mutant(
        9,
        "bad bytes are skipped",
        "pipeline/core/task.py",
        '                self._refuse(key, offset, at_ms, str(error), "", value)\n',
        "",
    ),
    Mutant(
        9,
        "one bad group refuses its whole batch",
        "pipeline/core/task.py",
        "                refused.append(RefusedGroup(index, group.definition.view, str(error)))\n",
        "                raise\n",
    ),
    Mutant(
        10,
        "a position beyond the end of deltas is folded on from",
        "pipeline/worker/partition.py",
        "what_is_gone(next_offset, start, end, anew=anew)\n",
        "what_is_gone(next_offset, start, 2**63, anew=anew)\n",
        "cuts",
    ),
    Mutant(
        10,
        "nobody asks whether what was read is still there",
        "tests/sim/workers.py",
        "{self.number: leader_epoch})",
        "{self.number: -1})",
        "cuts",
    ),
    Mutant(
        10,
        "a store that is ahead of its changelog is destroyed",
        "pipeline/worker/restore.py",
        "            self.set_aside(partition, error)\n",
        "            self._stores.destroy(partition)\n",
        "cuts",
    ),
    Mutant(
        10,
        "a store is left at an offset within its last commit",
        "pipeline/worker/follower.py",
        "self.next_offset if last else sieve.whole_end, between=False)",
        "self.next_offset if last else self._meta.changelog_next_offset, between=False)",
        "forgeries",
    ),
    Mutant(
        10,
        "a store between boundaries forgets where its last commit stands",
        "pipeline/worker/follower.py",
        "place = self._sieve.whole_end - 1 if count and not between else self._meta.position_offset\n",
        "place = -1 if between else self._sieve.whole_end - 1 if count else self._meta.position_offset\n",
        "forgeries",
    ),
    Mutant(
        12,
        "producers expire by the time of the log alone",
        "pipeline/core/task.py",
        "latest_ms, limits = min(self._folded_ms, now_ms), self._limits",
        "latest_ms, limits = self._overlay.source_at_ms, self._limits",
        "clocks",
    ),
    Mutant(
        12,
        "producers expire by the clock of the worker alone",
        "pipeline/core/task.py",
        "latest_ms, limits = min(self._folded_ms, now_ms), self._limits",
        "latest_ms, limits = now_ms, self._limits",
        "clocks",
    ),
    Mutant(
        12,
        "windows expire by the clock of a publisher alone",
        "pipeline/core/task.py",
        "min(at_ms, now_ms, received.batch.created_at_ms))",
        "received.batch.created_at_ms)",
        "windows,clocks",
    ),
    Mutant(
        13,
        "a watermark is not in the commit that relies on it",
        "pipeline/core/task.py",
        "entry = DefinitionEntry(known.definition, count, known.defined_at_ms, known.expired_before_ms)",
        "entry = DefinitionEntry(known.definition, count, known.defined_at_ms)",
        "windows",
    ),
    Mutant(
        13,
        "a watermark is only in commits that change the definition otherwise",
        "pipeline/core/task.py",
        "frozen.defined | frozen.cleared | frozen.moved | new_counts.keys()",
        "frozen.defined | frozen.cleared | new_counts.keys()",
        "windows",
    ),
    Mutant(
        13,
        "deltas of expired windows are folded",
        "pipeline/core/expiry.py",
        "    if not late:\n        return group, None\n",
        "    return group, None\n",
        "windows",
    ),
    Mutant(
        13,
        "what has expired is refused, and in no dead letter",
        "pipeline/core/task.py",
        "                self._refuse(key, offset, at_ms, late_reason(late, group, known), group.definition.view, value)\n",
        "",
        "windows",
    ),
    Mutant(
        13,
        "a group is refused as a whole if any of it has expired",
        "pipeline/core/task.py",
        "return (None, group) if whole and late is not None else (kept, late)",
        "return (None, group) if late is not None else (kept, late)",
        "windows",
    ),
    Mutant(
        13,
        "states of windows that expire while they are folded are committed",
        "pipeline/core/expiry.py",
        "                del states[suffix]\n",
        "                pass\n",
        "windows",
    ),
    Mutant(
        13,
        "a window is deleted that has not expired",
        "pipeline/core/expiry.py",
        "end = prefix + window_bytes(before_ms) if windowed",
        "end = prefix + window_bytes(before_ms + 1) if windowed",
        "windows",
    ),
    Mutant(
        13,
        "a sweep that did not come to its end is taken for done",
        "pipeline/core/expiry.py",
        "if next_key or known.expired_before_ms > whole_ms:",
        "if known.expired_before_ms > whole_ms:",
        "windows",
    ),
    Mutant(
        13,
        "the cache does not forget silent series",
        "pipeline/core/changes.py",
        "            return codec.encode_states(kind, states, self._touched_ms + definition.retention_s * 1_000)\n",
        "            self.merged.append(MergedRun(prefix, suffixes, states, 1))\n"
        "            return codec.encode_states(kind, states, self._touched_ms + definition.retention_s * 1_000)\n",
        "windows",
    ),
    Mutant(
        13,
        "silent series go on where they were",
        "pipeline/core/changes.py",
        "expired = [0 < codec.expires_at_ms(value) <= silent_ms for value in values]",
        "expired = [False for value in values]",
        "windows",
    ),
    Mutant(
        13,
        "a silent series is deleted although it is written",
        "pipeline/core/expiry.py",
        "if it[0] not in alive and not changes.touches(sweep.prefix, it[0][skip:])]",
        "if it[0] not in alive]",
        "windows",
    ),
    Mutant(
        13,
        "the count of series is not lowered in the entry",
        "pipeline/core/expiry.py",
        "            its.series_count -= len(expired)\n",
        "",
        "windows",
    ),
    Mutant(
        13,
        "the count of series is not lowered in memory",
        "pipeline/core/expiry.py",
        "            known.series_count -= self.gone.get(sweep.prefix, 0)\n",
        "",
        "windows",
    ),
    Mutant(
        14,
        "a point read ends at the first partition that has the series",
        "pipeline/query/lookups.py",
        "            found.append(value)\n            holders.append(number)\n",
        "            if not found:\n                found.append(value)\n                holders.append(number)\n",
    ),
    Mutant(
        14,
        "a scan passes over keys that another partition has, too",
        "pipeline/core/query.py",
        "            out_keys += keys[:count]\n            out_values += values[:count]\n",
        "            new = [i for i in range(count) if keys[i] not in out_keys]\n"
        "            out_keys += [keys[i] for i in new]\n            out_values += [values[i] for i in new]\n",
    ),
)
"""All mutants. Invariant 11 is about the staleness of answers, which the simulator does not check; see tests/query."""


class Outcome(NamedTuple):
    """Result of trying a mutant."""

    seed_count: int
    failure: str
    seconds: float


def try_out(mutant: Mutant, seed_count: int) -> Outcome:
    """Run histories over a copy of the tree with the mutant in it until one fails."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        path = Path(folder) / mutant.path
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.path} has not once but {text.count(mutant.old)} times: {mutant.old!r}")
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "tests.sim.world", "--seeds", str(seed_count)]
        if mutant.only is not None:
            command += ["--only", mutant.only]
        plainly = {**os.environ, "PIPELINE_NATIVE": "no"}  # the mutants are of what Python does
        done = subprocess.run(command, cwd=folder, env=plainly, capture_output=True, text=True, check=False)
    found = re.search(r"^seed (\d+) fails: (.*)", done.stderr, re.MULTILINE)
    if done.returncode and not found:
        raise SystemExit(done.stderr)
    seconds = time.monotonic() - started
    return Outcome(int(found[1]) + 1, found[2], seconds) if found else Outcome(0, "", seconds)


def main() -> int:
    """Run the command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("invariants", type=int, nargs="*", help="those to break; all if none is named")
    parser.add_argument("--seeds", type=int, default=1_000, help="how many each may take (default: %(default)s)")
    args = parser.parse_args()
    alive = 0
    for mutant in MUTANTS:
        if args.invariants and mutant.invariant not in args.invariants:
            continue
        outcome = try_out(mutant, args.seeds)
        alive += not outcome.seed_count
        seeds = f"{outcome.seed_count:4} seeds" if outcome.seed_count else "NOT FOUND"
        troubles = f" ({mutant.only})" if mutant.only else ""
        print(f"{mutant.invariant:2}  {seeds}  {outcome.seconds:5.1f} s  {mutant.what}{troubles}: {outcome.failure[:90]}")
        sys.stdout.flush()
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
