//! What Python sees of the table: `Table`, `Local`.

use crate::convert::*;
use crate::fork::Cores;
use crate::local::{Entry, States};
use crate::ring::Segment;
use crate::state::{Number, State};
use crate::table::*;
use crate::view::{view_type_of, View};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyType};
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicUsize, Ordering::*};
use std::sync::Arc;

/// A process's unsent states. See `pipeline.publisher.table.Table`, which says the same in Python.
#[pyclass(frozen, module = "pipeline_native")]
pub struct Table {
    cores: Cores,
    hasher: foldhash::fast::RandomState,
    rising_ns: AtomicI64,
    /// The number of the next view.
    pub next_view: AtomicU32,
    pub check: Py<PyAny>,
    opening: Py<PyAny>,
    full: Py<PyAny>,
    now_ms: Py<PyAny>,
    journal: Option<Py<PyAny>>,
    ts_ahead_max_ms: i64,
    pub lane_count: usize,
}

/// Take a shard's lock. Where it is taken, wait without the interpreter: who holds the shards across a fork may need it.
#[inline(always)]
fn lock<'a>(py: Python<'_>, shard: &'a Shard) -> Held<'a> {
    loop {
        match shard.try_lock() {
            Some(held) => return held,
            None => wait(py, shard),
        }
    }
}

#[cold]
fn wait(py: Python<'_>, shard: &Shard) {
    py.detach(|| drop(shard.lock()));
}

impl Table {
    #[inline]
    pub fn core(&self) -> &Core {
        self.cores.get()
    }

    #[inline]
    pub fn hash(&self, view: &ViewInfo, suffix: &[u8]) -> u32 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write_u32(view.id);
        hasher.write(suffix);
        (hasher.finish() >> 16) as u32
    }

    #[inline]
    pub fn key<'a>(&self, view: &'a Arc<ViewInfo>, suffix: &'a [u8]) -> Key<'a> {
        Key { view, suffix, hash: self.hash(view, suffix) }
    }

    pub fn now(&self, py: Python<'_>) -> PyResult<i64> {
        self.now_ms.bind(py).call0()?.extract()
    }

    /// A time of recording, greater than every one before.
    pub fn rise(&self, now_ms: i64) -> i64 {
        let next = |last: i64| Some(now_ms.saturating_mul(1_000_000).max(last + 1));
        let last = self.rising_ns.fetch_update(Relaxed, Relaxed, next).unwrap_or(0);
        now_ms.saturating_mul(1_000_000).max(last + 1)
    }

    /// A time that was given, or now; with now.
    pub fn time_of(&self, py: Python<'_>, ts_ms: Option<&Bound<'_, PyAny>>) -> PyResult<(i64, i64)> {
        let now = self.now(py)?;
        let Some(given) = ts_ms.filter(|ts_ms| !ts_ms.is_none()) else { return Ok((now, now)) };
        match plain(given) {
            Some(Number::I(ts)) if (0..=TS_MS_MAX).contains(&ts) && ts <= now.saturating_add(self.ts_ahead_max_ms) => {
                Ok((ts, now))
            }
            _ => {
                py.import("pipeline.publisher.view")?.call_method1("check_time", (given, now, self.ts_ahead_max_ms))?;
                Err(PyValueError::new_err("ts_ms"))
            }
        }
    }

    /// Record a delta; false if it was dropped, because there is no memory for its series.
    #[inline(always)]
    pub fn record(&self, py: Python<'_>, key: Key<'_>, mut delta: State, places: &[Place]) -> PyResult<bool> {
        let core = self.core();
        let lane = core.lane();
        let mut held = lock(py, core.shard(key.hash, lane));
        let outcome = core.record(&mut held, key, &mut delta, places.get(lane as usize), None);
        drop(held);
        match outcome {
            Ok(()) => Ok(true),
            Err(refusal) => self.record_slowly(py, key, delta, refusal),
        }
    }

    /// Record a delta that was refused: do what is missing, and try again.
    #[cold]
    #[inline(never)]
    fn record_slowly(&self, py: Python<'_>, key: Key<'_>, mut delta: State, mut refusal: Refusal) -> PyResult<bool> {
        let overflow = [&key.suffix[..WINDOW_BYTES], &key.view.overflow_labels].concat();
        let mut target = key;
        let mut core = self.core();
        let mut insert = Insert::default();
        loop {
            let shard = core.shard_number(target.hash, core.lane());
            match refusal {
                Refusal::Missing | Refusal::Closed => {
                    self.opening.bind(py).call0()?;
                    insert.asked = matches!(refusal, Refusal::Closed);
                }
                Refusal::Full(bytes) => {
                    if !self.full.bind(py).call1((bytes, 1))?.is_truthy()? {
                        return Ok(false);
                    }
                }
                Refusal::Overflow => target = Key { hash: self.hash(key.view, &overflow), suffix: &overflow, ..key },
                Refusal::Unnamed => {
                    let name = (PyBytes::new(py, &key.view.definition), PyBytes::new(py, target.suffix));
                    let Some(given) = self.ask(py, "define", name)? else { return Ok(false) };
                    insert.number = given.extract()?;
                }
                Refusal::NoRoom(full, length) => {
                    let Some(made) = self.ask(py, "segment", (shard, full, length))? else { return Ok(false) };
                    let new = Segment::open(&made)?;
                    if std::ptr::eq(core, self.core()) {
                        let old = lock(py, &core.shards[shard]).ring.adopt(new);
                        drop(old);
                    }
                }
            }
            if !std::ptr::eq(core, self.core()) {
                (core, insert.number) = (self.core(), 0); // what was called has forked: this is the child
            }
            let shard = core.shard_number(target.hash, core.lane());
            let mut held = lock(py, &core.shards[shard]);
            let outcome = core.record(&mut held, target, &mut delta, None, Some(&mut insert));
            drop(held);
            if insert.number > 0 {
                // Another thread has given the series a number, or it is one too many.
                locked(&core.gone).push(std::mem::take(&mut insert.number));
            }
            let Err(again) = outcome else {
                let redirected = target.suffix.as_ptr() == overflow.as_ptr();
                key.view.overflow_count.fetch_add(redirected as u64, Relaxed);
                return Ok(true);
            };
            refusal = again;
        }
    }

    /// What the journal answers; None: the delta is to be dropped.
    fn ask<'py>(
        &self,
        py: Python<'py>,
        method: &str,
        arguments: impl pyo3::call::PyCallArgs<'py>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(journal) = &self.journal else { return Ok(None) };
        Ok(Some(journal.bind(py).call_method1(method, arguments)?).filter(|answer| !answer.is_none()))
    }

    fn keep_cut(&self, (positions, gone): Cut) {
        let mut kept = locked(&self.core().cut);
        kept.0 = positions;
        kept.1.extend(gone);
    }

    fn alone<R: Send>(&self, py: Python<'_>, work: impl FnOnce(&Core) -> R + Send) -> R {
        let core = self.core();
        py.detach(|| {
            let me = thread_index();
            let entered = core.gate.enter(me);
            let result = work(core);
            if entered {
                core.gate.leave(me);
            }
            result
        })
    }
}

#[pymethods]
impl Table {
    #[new]
    #[allow(clippy::too_many_arguments)] // keywords
    #[pyo3(signature = (*, bytes_max, check, opening, full, now_ms, ts_ahead_max_ms=3_600_000, local_series_max=100_000, shard_count=0, lane_count=0, journal=None))]
    fn new(
        py: Python<'_>,
        bytes_max: usize,
        check: Py<PyAny>,
        opening: Py<PyAny>,
        full: Py<PyAny>,
        now_ms: Py<PyAny>,
        ts_ahead_max_ms: i64,
        local_series_max: usize,
        shard_count: usize,
        lane_count: usize,
        journal: Option<Py<PyAny>>,
    ) -> PyResult<Table> {
        let journaled = journal.is_some();
        let lane_count = match lane_count {
            0 if has_gil(py)? => 1,
            0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(if journaled { 8 } else { usize::MAX })),
            n => n,
        };
        let lane_count = lane_count.next_power_of_two();
        let config = Config { bytes_max, shard_count, lane_count, local_series_max, journal: journaled };
        Ok(Table {
            cores: Cores::new(config),
            hasher: Default::default(),
            rising_ns: AtomicI64::new(0),
            next_view: AtomicU32::new(0),
            check,
            opening,
            full,
            now_ms,
            journal,
            ts_ahead_max_ms,
            lane_count,
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        [&self.check, &self.opening, &self.full, &self.now_ms].into_iter().try_for_each(|asked| visit.call(asked))?;
        visit.call(&self.journal)
    }

    #[pyo3(signature = (definition, series_max, view_type=None))]
    fn define<'py>(
        slf: &Bound<'py, Table>,
        definition: &Bound<'py, PyAny>,
        series_max: usize,
        view_type: Option<Bound<'py, PyType>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let by_kind = || {
            let record = py.import("pipeline.core.kinds")?.getattr("KINDS")?.get_item(definition.getattr("kind")?)?;
            view_type_of(py, &record.getattr("method")?.extract::<String>()?)
        };
        view_type.map_or_else(by_kind, Ok)?.call1((slf, definition, series_max))
    }

    #[pyo3(signature = (partition_count, busy, batch_bytes_max))]
    fn drain<'py>(
        &self,
        py: Python<'py>,
        partition_count: u32,
        busy: Option<&[u8]>,
        batch_bytes_max: usize,
    ) -> PyResult<Bound<'py, PyList>> {
        if partition_count == 0 || busy.is_some_and(|busy| busy.len() != partition_count as usize) {
            return Err(PyValueError::new_err("busy has a byte for each of at least one partition"));
        }
        if busy.is_some() && self.journal.is_some() {
            return Err(PyValueError::new_err("with a journal all partitions are drained"));
        }
        let busy = busy.unwrap_or(&[]).to_vec();
        let (drafts, cut) = self.alone(py, |core| core.drain(partition_count, &busy, batch_bytes_max));
        let made = drafts.iter().map(|draft| Py::new(py, draft.clone())).collect::<PyResult<Vec<_>>>();
        let made = made.and_then(|made| PyList::new(py, made));
        if made.is_err() {
            // There was no memory for the objects. Nothing is lost: the next drain returns it, and the cut is that one's.
            locked(&self.core().undelivered).extend(drafts);
            locked(&self.core().gone).extend(cut.1);
        } else {
            self.keep_cut(cut);
        }
        made
    }

    #[allow(clippy::type_complexity)] // that of `Table.waiting_states` in Python
    fn waiting_states<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<Vec<(Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyAny>, u64)>> {
        let (waiting, cut) = self.alone(py, Core::look);
        self.keep_cut(cut);
        let row = |Merged { view, suffix, state, count, .. }: &Merged| {
            let state = to_python(py, view.kind, state, *count)?;
            Ok((PyBytes::new(py, &view.definition), PyBytes::new(py, suffix), state, *count))
        };
        waiting.iter().map(row).collect()
    }

    fn cut(&self) -> Cut {
        let mut kept = locked(&self.core().cut);
        (kept.0.clone(), std::mem::take(&mut kept.1))
    }

    fn ends(&self, py: Python<'_>) -> Positions {
        let core = self.core();
        py.detach(|| core.ends())
    }

    fn snapshot(&self, py: Python<'_>) {
        self.alone(py, |core| core.snapshot());
    }

    fn local(&self, view: &Bound<'_, View>) -> Local {
        let info = &view.get().info;
        let states = locked(&self.core().published).get(&info.id).cloned();
        Local { states: states.unwrap_or_else(|| Arc::new(States::new(info.kind))), view: view.clone().unbind() }
    }

    fn evict(&self, py: Python<'_>, silent_drains: u32) -> usize {
        self.alone(py, |core| core.evict(silent_drains))
    }

    fn close(&self, py: Python<'_>) {
        let core = self.core();
        core.closed.store(true, Relaxed);
        py.detach(|| core.waiting()); // goes through the lock of every shard
    }

    fn hold(&self, py: Python<'_>) {
        let core = self.core();
        py.detach(|| core.gate.enter(thread_index()));
    }

    fn release(&self) {
        self.core().gate.leave(thread_index());
    }

    fn forget(&self) {
        self.cores.begin();
    }

    fn keep(&self) -> bool {
        self.journal.is_none() && self.cores.keep()
    }

    #[getter]
    fn used_bytes(&self) -> usize {
        self.core().used.load(Relaxed)
    }

    /// No locks: no Python code runs inside a change, so nothing interrupts one.
    fn step_over(&self) -> Vec<usize> {
        Vec::new()
    }

    #[getter]
    fn series_count(&self) -> usize {
        self.core().series.load(Relaxed)
    }

    #[getter]
    fn waiting_count(&self, py: Python<'_>) -> u64 {
        let core = self.core();
        py.detach(|| core.waiting())
    }
}

fn has_gil(py: Python<'_>) -> PyResult<bool> {
    let sys = py.import("sys")?;
    if !sys.hasattr("_is_gil_enabled")? {
        Ok(true)
    } else {
        sys.call_method0("_is_gil_enabled")?.extract()
    }
}

/// The totals of a view as of a snapshot, by suffix. Never changes.
#[pyclass(frozen, mapping, module = "pipeline_native")]
pub struct Local {
    states: Arc<States>,
    view: Py<View>,
}

impl Local {
    fn find(&self, suffix: &[u8]) -> Option<&Entry> {
        let view = self.view.get();
        let at = self.states.find(view.table.get().hash(&view.info, suffix), suffix)?;
        self.states.entries.get(at)
    }
}

#[pymethods]
impl Local {
    fn __len__(&self) -> usize {
        self.states.entries.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, suffix: &[u8]) -> PyResult<Bound<'py, PyAny>> {
        match self.find(suffix) {
            Some(entry) => to_python(py, self.states.kind, &entry.state, entry.count),
            None => Err(PyKeyError::new_err(PyBytes::new(py, suffix).unbind())),
        }
    }

    fn __contains__(&self, suffix: &[u8]) -> bool {
        self.find(suffix).is_some()
    }

    fn __iter__(&self) -> LocalIterator {
        LocalIterator { states: self.states.clone(), next: AtomicUsize::new(0) }
    }

    #[getter]
    fn complete(&self) -> bool {
        self.states.complete
    }
}

#[pyclass(frozen)]
struct LocalIterator {
    states: Arc<States>,
    next: AtomicUsize,
}

#[pymethods]
impl LocalIterator {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        let entry = self.states.entries.get(self.next.fetch_add(1, Relaxed))?;
        Some(PyBytes::new(py, &entry.suffix))
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Table>()?;
    m.add_class::<Draft>()?;
    m.add_class::<Local>()
}
