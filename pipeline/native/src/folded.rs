//! Folded states of a definition, and committed ones: what `pipeline/core/changes.py` and `overlay.py` do with dicts.

use crate::convert::to_python;
use crate::rows::*;
use crate::state::{Kind, State};
use crate::wire::{write_int, write_uint};
use hashbrown::{HashMap, HashTable};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use std::sync::{Mutex, MutexGuard, PoisonError};

type Hasher = foldhash::fast::RandomState;

#[derive(Clone)]
struct Entry {
    at: usize,
    size: u32,
    hash: u64,
    state: State,
    count: u64,
}

/// States by suffix, in the order in which they came; the suffixes lie one behind the other.
#[derive(Default)]
struct Series {
    suffixes: Vec<u8>,
    entries: Vec<Entry>,
    index: HashTable<u32>,
}

impl Series {
    #[inline]
    fn suffix(&self, entry: &Entry) -> &[u8] {
        &self.suffixes[entry.at..entry.at + entry.size as usize]
    }

    #[inline]
    fn find(&self, hash: u64, suffix: &[u8]) -> Option<usize> {
        let is = |at: &u32| self.entries[*at as usize].hash == hash && self.suffix(&self.entries[*at as usize]) == suffix;
        self.index.find(hash, is).map(|at| *at as usize)
    }

    fn insert(&mut self, suffix: &[u8], hash: u64, state: State, count: u64) {
        let (at, size) = (self.suffixes.len(), suffix.len() as u32);
        self.suffixes.extend_from_slice(suffix);
        let entries = &self.entries;
        self.index.insert_unique(hash, entries.len() as u32, |at| entries[*at as usize].hash);
        self.entries.push(Entry { at, size, hash, state, count });
    }
}

/// The committed state of a folded one.
enum Before {
    /// In the store, perhaps: it must be asked.
    Asked,
    /// There is none.
    New,
    Cached(State, u64),
}

#[derive(Default)]
struct Inner {
    series: Series,
    /// Indexes of the entries in the order of their suffixes, once they are frozen.
    order: Vec<u32>,
    /// What is committed of each of these.
    before: Vec<Before>,
    /// Encodings of the merged states of these, one behind the other, and where each ends.
    values: Vec<u8>,
    ends: Vec<usize>,
}

/// Folded states of one definition. Safe from any thread; no method calls Python while it holds the lock.
#[pyclass(frozen, module = "pipeline_native")]
pub struct Folded {
    kind: Kind,
    inner: Mutex<Inner>,
}

impl Folded {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The order of suffixes: by the first eight bytes that differ, then by all.
fn in_order(series: &Series) -> Vec<u32> {
    let Some(first) = series.entries.first().map(|entry| series.suffix(entry)) else { return Vec::new() };
    let mut skip = first.len();
    for entry in &series.entries {
        let suffix = series.suffix(entry);
        skip = first.iter().zip(suffix).take(skip).take_while(|(a, b)| a == b).count();
    }
    let mut keyed: Vec<(u64, u32)> = series
        .entries
        .iter()
        .enumerate()
        .map(|(index, entry)| {
            let rest = &series.suffix(entry)[skip..];
            let mut key = [0; 8];
            let size = rest.len().min(8);
            key[..size].copy_from_slice(&rest[..size]);
            (u64::from_be_bytes(key), index as u32)
        })
        .collect();
    let suffix = |index: u32| series.suffix(&series.entries[index as usize]);
    keyed.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| suffix(a.1).cmp(suffix(b.1))));
    keyed.into_iter().map(|(_, index)| index).collect()
}

/// A committed value, read. None: it is unusual or wrong. `Some(None)`: it has expired, and nothing is merged with it.
fn read_value(kind: Kind, value: &[u8], head: &[u8], silent_ms: u64) -> Option<Option<(State, u64)>> {
    let rest = value.strip_prefix(head)?;
    let (columns, expires_at_ms) = match rest.split_first()? {
        (0x00, columns) => (columns, 0),
        (0xcf, rest) => {
            let (time, columns) = rest.split_first_chunk()?;
            (columns, Some(u64::from_be_bytes(*time)).filter(|time| *time > 0)?)
        }
        _ => return None,
    };
    let found = read_entry(kind, columns)?;
    Some(if 0 < expires_at_ms && expires_at_ms <= silent_ms { None } else { Some(found) })
}

fn write_state(kind: Kind, state: &State, count: u64, out: &mut Vec<u8>) {
    if let State::L(stamped) = state {
        write_int(out, stamped.ts_ms);
        write_int(out, stamped.recorded_ns);
    }
    state.write(out);
    if kind == Kind::Mean {
        write_uint(out, count);
    }
}

#[pymethods]
impl Folded {
    /// An empty one; None: only Python has states of this kind.
    #[staticmethod]
    fn of(kind: &str) -> Option<Folded> {
        Some(Folded { kind: native_kind(kind)?, inner: Mutex::default() })
    }

    fn __len__(&self) -> usize {
        self.lock().series.entries.len()
    }

    fn __contains__(&self, suffix: &[u8]) -> bool {
        self.lock().series.find(hash_of(suffix), suffix).is_some()
    }

    /// Merge the rows of a group. Raises `ValueError` if they are of another kind.
    fn fold(&self, py: Python<'_>, rows: &Rows) -> PyResult<()> {
        if rows.kind != self.kind {
            return Err(PyValueError::new_err("rows of another kind"));
        }
        let suffixes = rows.suffixes.bind(py).as_bytes();
        py.detach(|| {
            let series = &mut self.lock().series;
            for row in &rows.rows {
                let suffix = &suffixes[row.at..row.at + row.size as usize];
                match series.find(row.hash, suffix) {
                    None => series.insert(suffix, row.hash, row.state.clone(), row.count),
                    Some(at) => {
                        let entry = &mut series.entries[at];
                        if !entry.state.add_simply(self.kind, &row.state) {
                            entry.state.merge(self.kind, row.state.clone());
                        }
                        entry.count += row.count;
                    }
                }
            }
        });
        Ok(())
    }

    /// Forget states of windows that start before a time.
    fn drop_before(&self, py: Python<'_>, start_ms: u64) {
        py.detach(|| {
            let mut inner = self.lock();
            let old = std::mem::take(&mut inner.series);
            for entry in &old.entries {
                let suffix = old.suffix(entry);
                if window_start(suffix) >= start_ms {
                    inner.series.insert(suffix, entry.hash, entry.state.clone(), entry.count);
                }
            }
        })
    }

    /// The states by suffix, as Python has them.
    fn states<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (suffixes, entries) = {
            let inner = self.lock();
            (inner.series.suffixes.clone(), inner.series.entries.clone())
        };
        let by_suffix = PyDict::new(py);
        for entry in entries {
            let suffix = PyBytes::new(py, &suffixes[entry.at..entry.at + entry.size as usize]);
            by_suffix.set_item(suffix, to_python(py, self.kind, &entry.state, entry.count)?)?;
        }
        Ok(by_suffix)
    }

    /// Put the states in order, find out what is committed of each, and return of how many the store must be asked.
    ///
    /// Without `committed` nothing is.
    fn freeze(&self, py: Python<'_>, prefix: &[u8], committed: Option<&Committed>) -> usize {
        py.detach(|| {
            let inner = &mut *self.lock();
            inner.order = in_order(&inner.series);
            inner.before = match committed {
                None => inner.order.iter().map(|_| Before::New).collect(),
                Some(committed) => committed.find(prefix, &inner.series, &inner.order),
            };
            inner.before.iter().filter(|before| matches!(before, Before::Asked)).count()
        })
    }

    /// For each state in order, whether the store is asked for it.
    fn asked(&self) -> Vec<bool> {
        self.lock().before.iter().map(|before| matches!(before, Before::Asked)).collect()
    }

    /// For each state in order, the cached one that is committed, or None.
    fn cached(&self, py: Python<'_>) -> PyResult<Vec<Option<Py<PyAny>>>> {
        let found: Vec<Option<(State, u64)>> = {
            let inner = self.lock();
            let state = |before: &Before| match before {
                Before::Cached(state, count) => Some((state.clone(), *count)),
                _ => None,
            };
            inner.before.iter().map(state).collect()
        };
        found.into_iter().map(|it| it.map(|(state, count)| to_python(py, self.kind, &state, count)).transpose()).collect()
    }

    /// Keys of states from one place in the order to another; with `asked` only those for which the store is asked.
    fn keys<'py>(
        &self,
        py: Python<'py>,
        prefix: &[u8],
        start: usize,
        end: usize,
        asked: bool,
    ) -> PyResult<Bound<'py, PyList>> {
        let (bytes, ends) = py.detach(|| {
            let inner = self.lock();
            let end = end.min(inner.order.len());
            let start = start.min(end);
            let (mut bytes, mut ends) = (Vec::with_capacity((end - start) * (prefix.len() + 24)), Vec::new());
            for place in start..end {
                if asked && !matches!(inner.before[place], Before::Asked) {
                    continue;
                }
                bytes.extend_from_slice(prefix);
                bytes.extend_from_slice(inner.series.suffix(&inner.series.entries[inner.order[place] as usize]));
                ends.push(bytes.len());
            }
            (bytes, ends)
        });
        listed(py, &bytes, &ends)
    }

    /// Merge what is committed into the states, and return how many are new; None: nothing was done, because one of the
    /// values is unusual or wrong. `found` are those for which the store was asked.
    ///
    /// A value begins with `head`, then its expiry; `own` is how those of this commit begin. What has expired up to
    /// `silent_ms` counts as committed, but is not merged.
    fn merge(
        &self,
        py: Python<'_>,
        found: Vec<Option<Bound<'_, PyBytes>>>,
        head: &[u8],
        own: &[u8],
        silent_ms: u64,
    ) -> PyResult<Option<usize>> {
        let values: Vec<Option<&[u8]>> = found.iter().map(|it| it.as_ref().map(|value| value.as_bytes())).collect();
        py.detach(|| {
            let Inner { series, order, before, values: out, ends } = &mut *self.lock();
            if values.len() != before.iter().filter(|before| matches!(before, Before::Asked)).count() {
                return Err(PyValueError::new_err("another number of values than was asked for"));
            }
            let mut stored = Vec::with_capacity(values.len());
            for value in values {
                stored.push(match value {
                    None => None,
                    Some(value) => match read_value(self.kind, value, head, silent_ms) {
                        None => return Ok(None),
                        found => found,
                    },
                });
            }
            // Everything is read: from here on nothing can go wrong half way.
            let (mut stored, mut new_count) = (stored.into_iter(), 0);
            out.reserve(order.len() * (own.len() + 12));
            for (index, before) in order.iter().zip(before.iter_mut()) {
                let entry = &mut series.entries[*index as usize];
                let committed = match std::mem::replace(before, Before::New) {
                    Before::New => None,
                    Before::Cached(state, count) => Some(Some((state, count))),
                    Before::Asked => stored.next().flatten(),
                };
                match committed {
                    None => new_count += 1,
                    Some(None) => {} // expired
                    Some(Some((state, count))) => {
                        let folded = std::mem::replace(&mut entry.state, state);
                        if !entry.state.add_simply(self.kind, &folded) {
                            entry.state.merge(self.kind, folded);
                        }
                        entry.count += count;
                    }
                }
                out.extend_from_slice(own);
                write_state(self.kind, &entry.state, entry.count, out);
                ends.push(out.len());
            }
            Ok(Some(new_count))
        })
    }

    /// Values of merged states from one place in the order to another.
    fn values<'py>(&self, py: Python<'py>, start: usize, end: usize) -> PyResult<Bound<'py, PyList>> {
        let (bytes, ends) = py.detach(|| {
            let inner = self.lock();
            let end = end.min(inner.ends.len());
            let start = start.min(end);
            let first = if start == 0 { 0 } else { inner.ends[start - 1] };
            let last = if end == 0 { 0 } else { inner.ends[end - 1] };
            let ends: Vec<usize> = inner.ends[start..end].iter().map(|it| it - first).collect();
            (inner.values[first..last.max(first)].to_vec(), ends)
        });
        listed(py, &bytes, &ends)
    }
}

fn listed<'py>(py: Python<'py>, bytes: &[u8], ends: &[usize]) -> PyResult<Bound<'py, PyList>> {
    let mut start = 0;
    let items = ends.iter().map(|end| {
        let item = PyBytes::new(py, &bytes[start..*end]);
        start = *end;
        item
    });
    PyList::new(py, items)
}

/// Committed states of definitions by prefix, of the newer ones or the older ones.
#[derive(Default)]
struct Generation {
    by_prefix: HashMap<Box<[u8]>, Series, Hasher>,
    entry_count: usize,
    bytes: usize,
}

#[derive(Default)]
struct Kept {
    young: Generation,
    old: Generation,
    /// Hashes of all committed suffixes of a definition, of which no other series are committed. A hash can be of a series
    /// that is there no more, but none is missing.
    hashes: HashMap<Box<[u8]>, HashTable<u64>, Hasher>,
    hash_bytes: usize,
}

impl Kept {
    fn forget_hashes(&mut self, prefix: &[u8]) {
        if let Some(hashes) = self.hashes.remove(prefix) {
            self.hash_bytes -= hashes.allocation_size();
        }
    }

    fn forget_states(&mut self, prefix: &[u8]) {
        if let Some(states) = self.young.by_prefix.remove(prefix) {
            self.young.entry_count -= states.entries.len();
        }
        self.old.by_prefix.remove(prefix);
    }
}

/// What is known of committed states: some states, in two generations as in `core.overlay.Cache`; and of definitions that
/// began here, what is not committed.
#[pyclass(frozen, module = "pipeline_native")]
pub struct Committed {
    entries_half: usize,
    bytes_half: usize,
    hash_bytes_max: usize,
    kept: Mutex<Kept>,
}

impl Committed {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, prefix: &[u8], series: &Series, order: &[u32]) -> Vec<Before> {
        let kept = self.lock();
        let (young, old) = (kept.young.by_prefix.get(prefix), kept.old.by_prefix.get(prefix));
        let hashes = kept.hashes.get(prefix);
        let find = |index: &u32| {
            let entry = &series.entries[*index as usize];
            for states in [young, old].into_iter().flatten() {
                if let Some(at) = states.find(entry.hash, series.suffix(entry)) {
                    return Before::Cached(states.entries[at].state.clone(), states.entries[at].count);
                }
            }
            match hashes {
                Some(hashes) if hashes.find(entry.hash, |hash| *hash == entry.hash).is_none() => Before::New,
                _ => Before::Asked,
            }
        };
        order.iter().map(find).collect()
    }
}

#[pymethods]
impl Committed {
    #[new]
    fn new(entries_max: usize, bytes_max: usize) -> Committed {
        let bytes_half = bytes_max / 2;
        Committed { entries_half: entries_max / 2, bytes_half, hash_bytes_max: bytes_half / 2, kept: Mutex::default() }
    }

    /// Note that no series of a definition will be committed but those that `keep` is told of.
    fn begin(&self, prefix: &[u8]) {
        self.forget(prefix);
        self.lock().hashes.insert(prefix.into(), HashTable::new());
    }

    /// Forget all about a definition.
    fn forget(&self, prefix: &[u8]) {
        let mut kept = self.lock();
        kept.forget_states(prefix);
        kept.forget_hashes(prefix);
    }

    /// Note that merged states were committed; with `states` keep them, too.
    fn keep(&self, py: Python<'_>, prefix: &[u8], merged: &Folded, states: bool) {
        py.detach(|| {
            let folded = merged.lock();
            let kept = &mut *self.lock();
            if let Some(hashes) = kept.hashes.get_mut(prefix) {
                let before = hashes.allocation_size();
                for entry in &folded.series.entries {
                    if hashes.find(entry.hash, |hash| *hash == entry.hash).is_none() {
                        hashes.insert_unique(entry.hash, entry.hash, |hash| *hash);
                    }
                }
                kept.hash_bytes = kept.hash_bytes - before + hashes.allocation_size();
                if kept.hash_bytes > self.hash_bytes_max {
                    kept.forget_hashes(prefix);
                }
            }
            if !states || self.entries_half == 0 || self.bytes_half == 0 {
                return;
            }
            if folded.series.entries.iter().any(|entry| entry.count > COUNT_MAX) {
                kept.forget_states(prefix); // the store has them
                return;
            }
            let young = kept.young.by_prefix.entry(prefix.into()).or_default();
            kept.young.entry_count -= young.entries.len();
            for entry in &folded.series.entries {
                let suffix = folded.series.suffix(entry);
                match young.find(entry.hash, suffix) {
                    None => young.insert(suffix, entry.hash, entry.state.clone(), entry.count),
                    Some(at) => (young.entries[at].state, young.entries[at].count) = (entry.state.clone(), entry.count),
                }
                kept.young.bytes += suffix.len() + std::mem::size_of::<Entry>() + entry.state.heap_bytes();
            }
            kept.young.entry_count += young.entries.len();
            if kept.young.entry_count > self.entries_half || kept.young.bytes > self.bytes_half {
                kept.old = std::mem::take(&mut kept.young);
            }
        })
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Rows>()?;
    m.add_class::<Folded>()?;
    m.add_class::<Committed>()
}
