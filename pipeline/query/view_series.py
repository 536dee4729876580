"""Time series of one view with windows, as Prometheus reads them: a sample of each window that has data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

from pipeline.core import codec
from pipeline.core.exposition import BOUNDS_LEAST, ClassicBuckets, bound_text, sample_value
from pipeline.core.kinds import KINDS, State
from pipeline.core.kinds.histogram import BUCKETS_MAX, SCHEMA_MAX, count_of
from pipeline.core.query import Labels, MergedDefinition, Query, narrow, pinned_labels
from pipeline.core.record import WINDOW_NONE, Definition, definition_key, series_prefix
from pipeline.core.remote_read import NAME_LABEL, SeriesEncoder, SeriesQuery, with_ends
from pipeline.errors import Invalid
from pipeline.query.cuts import Cut
from pipeline.query.damage import decode_all, decode_stored
from pipeline.query.lookups import keys_of
from pipeline.query.matchers import Test
from pipeline.query.ranges import expired_before
from pipeline.query.scans import scan_windows

BUCKET_LABEL = "le"
KEYS_MAX = 100_000
"""Upper limit of the keys that a read of one series gets; one that needs more scans all series of its windows."""
_CHECK_EVERY = 256
"""Series that are encoded, or windows whose buckets are counted, between two checks of the deadline."""
_ADVICE = "ask for a shorter range, or narrow the matchers"

Windows = Mapping[int, State]
"""States of one series, by start of the window, in order."""


class Room:
    """Windows, samples and bytes that an answer may have."""

    def __init__(self, samples_max: int, bytes_max: int) -> None:
        self.samples_max = samples_max
        """Most windows that one view's read merges, too."""
        self._samples = samples_max
        self._bytes_max = bytes_max
        self._bytes = bytes_max

    def bounds(self, window_count: int) -> int:
        """Return the most bounds that histograms of so many windows may have. Raises `Invalid` if that is too few."""
        found = min(BUCKETS_MAX, self._samples // max(window_count, 1) - 1)
        if found < BOUNDS_LEAST:
            raise self.too_many()
        return found

    def take(self, samples: int) -> None:
        """Count samples. Raises `Invalid` for more than an answer may have."""
        self._samples -= samples
        if self._samples < 0:
            raise self.too_many()

    def fits(self, series: bytes) -> bytes:
        """Return an encoded series once it is counted. Raises `Invalid` for more bytes than an answer may have."""
        self._bytes -= len(series)
        if self._bytes < 0:
            raise Invalid(f"an answer of over {self._bytes_max} bytes (setting remote_read_bytes_max): {_ADVICE}")
        return series

    def too_many(self) -> Invalid:
        """Return the error for an answer of too many samples."""
        return Invalid(f"over {self.samples_max} windows or samples of all series (setting answer_points_max): {_ADVICE}")


def histogram_names(view: str) -> tuple[str, str, str]:
    """Return the names of the samples of a histogram in windows."""
    return f"{view}_bucket", f"{view}_gcount", f"{view}_gsum"


def sample_names(definition: Definition) -> tuple[str, ...]:
    """Return the names of the samples of a view with windows."""
    return histogram_names(definition.view) if definition.kind == "histogram" else (definition.view,)


def view_series(
    query: SeriesQuery,
    merged: MergedDefinition,
    names: Sequence[str],
    tests: Sequence[tuple[str, Test]],
    cut: Cut,
    room: Room,
) -> Iterator[bytes]:
    """Yield the encoded series of a view that have one of these names and satisfy the tests of labels."""
    definition = merged.definition
    of_labels = [(definition.labels.index(label), test) for label, test in tests if label in definition.labels]
    of_others = [(label, test) for label, test in tests if label not in definition.labels]
    bound_tests: list[Test] = []
    if names[0] == histogram_names(definition.view)[0]:
        bound_tests = [test for label, test in of_others if label == BUCKET_LABEL]
    # A label that series do not have is empty, as in Prometheus.
    if any(not test([""])[0] for label, test in of_others if test not in bound_tests):
        return
    if any(not test([""])[0] for test in bound_tests):
        names = names[:1]
    merging = _Merging(query, merged, cut, room)
    pinned = pinned_labels(definition, query.matchers)
    if pinned is None or not merging.look_up(pinned, of_labels):
        scan_windows(Query(definition.view), merged, merging, cut.snapshots, of_labels, partial(cut.check, definition.view))
    yield from _Encoding(query, definition, cut, room).series(names, merging.found(), bound_tests)


class _Merging:
    """Merges entries of partitions and definitions to windows of series."""

    def __init__(self, query: SeriesQuery, merged: MergedDefinition, cut: Cut, room: Room) -> None:
        self._merged = merged
        self._cut = cut
        self._kind = KINDS[merged.definition.kind]
        self._window_ms = merged.definition.window_s * 1_000
        self._asked = query.windows(self._window_ms)
        self._room = room
        self._series: dict[Labels, dict[int, State]] = {}
        self._count = 0
        entries: list[codec.DefinitionEntry] = []
        for number, snapshot in cut.snapshots.items():
            values = snapshot.get([*map(definition_key, merged.parts)])
            entries += [decode_stored(number, codec.decode_definition, value) for value in values if value]
        self._expired = expired_before(entries)

    def look_up(self, labels: Labels, tests: Sequence[tuple[int, Test]]) -> bool:
        """Add the windows of one series by their keys; return whether that was done, because they are few enough."""
        parts = [(part, own) for part in self._merged.parts if (own := narrow(self._merged, part, labels)) is not None]
        if sum(len(self.windows(part)) for part, _ in parts) * len(self._cut.snapshots) > KEYS_MAX:
            return False
        if not all(test([labels[index]])[0] for index, test in tests):
            return True
        for part, own in parts:
            keys, skip = keys_of([(part, own)], self), len(series_prefix(part))
            for number, snapshot in self._cut.snapshots.items():
                there = [(key, value) for key, value in zip(keys, snapshot.get(keys), strict=True) if value]
                values = [value for _, value in there]
                states = decode_all([number] * len(values), partial(codec.decode_states, self._kind), values)
                self.add(self.buckets([key for key, _ in there], skip), [labels] * len(values), states)
        return True

    def windows(self, part: Definition) -> range:
        """Return the starts of the windows of a definition that are asked for and have not expired."""
        first_ms = max(self._asked.start, self._expired.get(part, 0))
        return range(-(-first_ms // self._window_ms) * self._window_ms, self._asked.stop, self._window_ms)

    def buckets(self, keys: Sequence[bytes], skip: int) -> list[int]:
        """Return the start of each key's window, which stands behind `skip` bytes."""
        end = skip + len(WINDOW_NONE)
        return [int.from_bytes(key[skip:end], "big") for key in keys]

    def add(self, buckets: Iterable[int], groups: Sequence[Labels], states: Sequence[State]) -> None:
        """Merge entries. Raises `Invalid` if there are more windows than an answer may have samples."""
        series, merge = self._series, self._kind.merge
        for start_ms, labels, state in zip(buckets, groups, states, strict=True):
            windows = series.get(labels)
            if windows is None:
                windows = series[labels] = {}
            old = windows.get(start_ms)
            if old is None:
                self._count += 1
            windows[start_ms] = state if old is None else merge(old, state)
        if self._count > self._room.samples_max:
            raise self._room.too_many()

    def found(self) -> Mapping[Labels, Windows]:
        """Return the windows of each series, in order."""
        return {labels: dict(sorted(self._series[labels].items())) for labels in sorted(self._series)}


class _Encoding:
    """Encodes the series of one view."""

    def __init__(self, query: SeriesQuery, definition: Definition, cut: Cut, room: Room) -> None:
        self._definition = definition
        self._labels_only = query.labels_only
        self._window_ms = definition.window_s * 1_000
        # A window that is not final may get data yet, and is not said to have none.
        self._stop_ms = min(query.windows(self._window_ms).stop, cut.final_before_ms // self._window_ms * self._window_ms)
        self._check = partial(cut.check, definition.view)
        self._room = room
        self._encoder = SeriesEncoder(self._window_ms)
        self._count = 0

    def series(self, names: Sequence[str], found: Mapping[Labels, Windows], bound_tests: Sequence[Test]) -> Iterator[bytes]:
        """Yield the series with these names; of buckets those whose bounds satisfy the tests."""
        for name in names:
            if name == histogram_names(self._definition.view)[0]:
                yield from self._buckets(name, found, bound_tests)
                continue
            value = self._value_of(name)
            for labels, windows in found.items():
                yield from self._one(name, labels, [(at, value(state)) for at, state in windows.items()])

    def _value_of(self, name: str) -> Callable[[State], Any]:
        """Return a function from a window's state to the value of its sample of a name."""
        kind = KINDS[self._definition.kind]
        if kind.name != "histogram":
            return lambda state: kind.number(kind.answer(state))
        if name == histogram_names(self._definition.view)[1]:
            return count_of
        return lambda state: KINDS["sum"].answer(state[0])

    def _buckets(self, name: str, found: Mapping[Labels, Windows], tests: Sequence[Test]) -> Iterator[bytes]:
        """Yield the series of classic buckets, with bounds that are the same for all series and all windows."""
        states = [state for windows in found.values() for state in windows.values()]
        classic = ClassicBuckets(states, bounds_max=self._room.bounds(len(states)), schema_max=SCHEMA_MAX)
        texts = [bound_text(bound) for bound in (*classic.bounds, inf)]
        chosen = [i for i, text in enumerate(texts) if all(test([text])[0] for test in tests)]
        for labels, windows in found.items():
            counts: list[tuple[int, list[int]]] = []
            for at, state in windows.items():
                if len(counts) % _CHECK_EVERY == 0:
                    self._check()
                counts.append((at, classic.counts(state)))
            for i in chosen:
                yield from self._one(name, labels, [(at, it[i]) for at, it in counts], texts[i])

    def _one(self, name: str, labels: Labels, answers: Sequence[tuple[int, Any]], bound: str = "") -> Iterator[bytes]:
        """Yield one series; none if no answer is a number."""
        if self._count % _CHECK_EVERY == 0:
            self._check()
        self._count += 1
        values = [(at, value) for at, it in answers if (value := sample_value(it)) is not None]
        if not values:
            return
        named = {NAME_LABEL: name, **dict(zip(self._definition.labels, labels, strict=True))}
        if bound:
            named[BUCKET_LABEL] = bound
        samples = [] if self._labels_only else [*with_ends(values, self._window_ms, self._stop_ms)]
        self._room.take(max(1, len(samples)))
        yield self._room.fits(self._encoder.series(named, samples))
