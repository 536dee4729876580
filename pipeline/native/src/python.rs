//! What Python sees of the table: `Table`, `Draft`, `Local`.

use crate::convert::*;
use crate::fork::Cores;
use crate::local::States;
use crate::ring::Segment;
use crate::state::State;
use crate::table::*;
use crate::time;
use crate::view::{AddView, ObserveView, SetView, View};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyType};
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::*};
use std::sync::Arc;

/// A process's unsent states. See `pipeline.publisher.table.Table`, which says the same in Python.
#[pyclass(frozen, module = "pipeline_native")]
pub struct Table {
    cores: Cores,
    hasher: foldhash::fast::RandomState,
    rising_ns: AtomicI64,
    next_view: AtomicU32,
    pub check: Py<PyAny>,
    opening: Py<PyAny>,
    full: Py<PyAny>,
    now_ms: Py<PyAny>,
    journal: Option<Py<PyAny>>,
    /// True if `now_ms` is the time of the system.
    on_system_clock: bool,
    ts_ahead_max_ms: i64,
    config: (usize, usize, usize, usize),
}

/// Take a shard's lock. Where it is taken, wait without the interpreter: who holds the shards across a fork may need it.
#[inline(always)]
fn lock<'a>(py: Python<'_>, core: &Core, shard: &'a Shard) -> Held<'a> {
    match shard.try_lock() {
        Some(held) => held,
        None => wait(py, core, shard),
    }
}

#[cold]
fn wait<'a>(py: Python<'_>, core: &Core, shard: &'a Shard) -> Held<'a> {
    loop {
        core.contended.fetch_add(1, Relaxed);
        py.detach(|| drop(shard.lock()));
        if let Some(held) = shard.try_lock() {
            return held;
        }
    }
}

impl Table {
    #[inline]
    pub fn core(&self) -> &Core {
        self.cores.get()
    }

    pub fn lane_count(&self) -> usize {
        self.config.2
    }

    pub fn next_view(&self) -> u32 {
        self.cores.join(); // Python never moves an object
        self.next_view.fetch_add(1, Relaxed)
    }

    #[inline]
    pub fn hash(&self, view: &ViewInfo, suffix: &[u8]) -> u32 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write_u32(view.id);
        hasher.write(suffix.get(WINDOW_BYTES..).unwrap_or(suffix)); // one that is looked up can be anything
        (hasher.finish() >> 16) as u32 ^ window_bits(window_of(suffix))
    }

    #[inline]
    pub fn key<'a>(&self, view: &'a Arc<ViewInfo>, suffix: &'a [u8]) -> Key<'a> {
        Key { view, suffix, hash: self.hash(view, suffix) }
    }

    pub fn now(&self, py: Python<'_>) -> PyResult<i64> {
        if self.on_system_clock {
            Ok(time::now_ms())
        } else {
            self.now_ms.bind(py).call0()?.extract()
        }
    }

    /// Whether it surely is in a window of a view now; false leaves that open.
    #[inline(always)]
    pub fn is_in(&self, py: Python<'_>, view: &ViewInfo, window: i64) -> PyResult<bool> {
        let end_ms = window + view.window_ms;
        if self.on_system_clock {
            Ok(time::surely_within(window, end_ms))
        } else {
            Ok((window..end_ms).contains(&self.now(py)?))
        }
    }

    /// The start of the window of a view in which the time is now.
    #[inline(always)]
    pub fn window_now(&self, py: Python<'_>, view: &ViewInfo) -> PyResult<i64> {
        let last = view.window_now.load(Relaxed);
        if self.is_in(py, view, last)? {
            return Ok(last);
        }
        let window = view.window_of(self.now(py)?);
        view.window_now.store(window, Relaxed);
        Ok(window)
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
            Some(State::I(ts)) if (0..=TS_MS_MAX).contains(&ts) && ts <= now.saturating_add(self.ts_ahead_max_ms) => {
                Ok((ts, now))
            }
            _ => {
                let kinds = py.import("pipeline.core.kinds")?;
                kinds.getattr("KINDS")?.get_item("last")?.call_method1("check", (py.None(), given))?;
                kinds.call_method1("check_ahead", (given, now, self.ts_ahead_max_ms))?;
                Err(PyValueError::new_err("ts_ms"))
            }
        }
    }

    /// Record a delta; false if it was dropped, because there is no memory for its series.
    #[inline(always)]
    pub fn record(&self, py: Python<'_>, key: Key<'_>, mut delta: State, places: &[Place]) -> PyResult<bool> {
        let core = self.core();
        let lane = core.lane();
        let mut held = lock(py, core, core.shard(key.hash, lane));
        // Under the lock, through which `close` goes: what is recorded without a question is recorded before it returns.
        let closed = core.closed.load(Relaxed);
        let mut known = false;
        if !closed {
            match core.record(&mut held, key, &mut delta, places.get(lane as usize), None) {
                Outcome::Done => return Ok(true),
                outcome => known = matches!(outcome, Outcome::Full(_) | Outcome::NoRoom(..)),
            }
        }
        drop(held);
        if !known {
            self.opening.bind(py).call0()?;
        }
        self.record_slowly(py, key, delta, closed)
    }

    /// Record a delta to a bound series of a view with windows, if it was last found in this window; false: nothing is done.
    #[inline(always)]
    pub fn record_in(
        &self,
        py: Python<'_>,
        view: &ViewInfo,
        hash: u32,
        window: i64,
        place: &Place,
        delta: &mut State,
    ) -> bool {
        let core = self.core();
        let mut held = lock(py, core, core.shard(hash, core.lane()));
        let closed = core.closed.load(Relaxed);
        !closed && matches!(core.record_in(&mut held, view, window, place, delta), Outcome::Done)
    }

    /// Record a delta that may need memory; `asked` says whether `opening` was called since the table was closed.
    #[cold]
    #[inline(never)]
    fn record_slowly(&self, py: Python<'_>, key: Key<'_>, mut delta: State, mut asked: bool) -> PyResult<bool> {
        let overflow = [&key.suffix[..WINDOW_BYTES], &key.view.overflow_labels].concat();
        let mut target = key;
        let mut core = self.core();
        let mut number = 0;
        loop {
            if !std::ptr::eq(core, self.core()) {
                (core, number) = (self.core(), 0); // what was called has forked: this is the child
            }
            let shard = core.shard_number(target.hash, core.lane());
            let outcome = {
                let mut held = lock(py, core, &core.shards[shard]);
                if core.closed.load(Relaxed) && !asked {
                    None
                } else {
                    Some(core.record(&mut held, target, &mut delta, None, Some(&mut number)))
                }
            };
            let Some(outcome) = outcome else {
                self.opening.bind(py).call0()?;
                asked = true;
                continue;
            };
            if number > 0 {
                // Another thread has given the series a number, or it is one too many.
                core.gone.lock().unwrap_or_else(|e| e.into_inner()).push(std::mem::take(&mut number));
            }
            match outcome {
                Outcome::Done => {
                    let redirected = target.suffix.as_ptr() == overflow.as_ptr();
                    key.view.overflow_count.fetch_add(redirected as u64, Relaxed);
                    return Ok(true);
                }
                Outcome::Full(bytes) => {
                    if !self.full.bind(py).call1((bytes, 1))?.is_truthy()? {
                        return Ok(false);
                    }
                }
                Outcome::Unnamed => {
                    let name = (PyBytes::new(py, &key.view.definition), PyBytes::new(py, target.suffix));
                    let Some(given) = self.ask(py, "define", name)? else { return Ok(false) };
                    number = given.extract()?;
                }
                Outcome::NoRoom(full, length) => {
                    let Some(made) = self.ask(py, "segment", (shard, full, length))? else { return Ok(false) };
                    let new = Segment::open(&made)?;
                    if std::ptr::eq(core, self.core()) {
                        let old = lock(py, core, &core.shards[shard]).ring.adopt(new);
                        drop(old);
                    }
                }
                _ => target = Key { hash: self.hash(key.view, &overflow), suffix: &overflow, ..key },
            }
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

    fn keep_cut(&self, cut: Cut) {
        let mut kept = self.core().cut.lock().unwrap_or_else(|e| e.into_inner());
        kept.positions = cut.positions;
        kept.gone.extend(cut.gone);
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
    #[pyo3(signature = (*, bytes_max, check, opening, full, now_ms, now_ns=None, ts_ahead_max_ms=3_600_000, local_series_max=100_000, shard_count=0, lane_count=0, journal=None))]
    fn new(
        py: Python<'_>,
        bytes_max: usize,
        check: Py<PyAny>,
        opening: Py<PyAny>,
        full: Py<PyAny>,
        now_ms: Py<PyAny>,
        now_ns: Option<Bound<'_, PyAny>>,
        ts_ahead_max_ms: i64,
        local_series_max: usize,
        shard_count: usize,
        lane_count: usize,
        journal: Option<Py<PyAny>>,
    ) -> PyResult<Table> {
        let lanes = match lane_count {
            0 if has_gil(py)? => 1,
            0 if journal.is_some() => std::thread::available_parallelism().map_or(1, |n| n.get().min(8)),
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let config = (bytes_max, shard_count, lanes.next_power_of_two(), local_series_max);
        let (core, spare) = new_cores(config, journal.is_some());
        Ok(Table {
            cores: Cores::new(core, spare),
            hasher: Default::default(),
            rising_ns: AtomicI64::new(0),
            next_view: AtomicU32::new(0),
            check,
            opening,
            full,
            now_ms,
            journal,
            on_system_clock: match now_ns {
                Some(now_ns) => now_ns.is(py.import("time")?.getattr("time_ns")?),
                None => false,
            },
            ts_ahead_max_ms,
            config,
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.check)?;
        visit.call(&self.opening)?;
        visit.call(&self.full)?;
        visit.call(&self.now_ms)?;
        visit.call(&self.journal)
    }

    #[pyo3(signature = (definition, series_max, view_type=None, spread=1))]
    fn define<'py>(
        slf: &Bound<'py, Table>,
        definition: &Bound<'py, PyAny>,
        series_max: usize,
        view_type: Option<Bound<'py, PyType>>,
        spread: u32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let by_kind = || -> PyResult<Bound<'py, PyType>> {
            let kind: String = definition.getattr("kind")?.extract()?;
            Ok(match kind.as_str() {
                "sum" => py.get_type::<AddView>(),
                "last" => py.get_type::<SetView>(),
                _ => py.get_type::<ObserveView>(),
            })
        };
        view_type.map_or_else(by_kind, Ok)?.call1((slf, definition, series_max, spread))
    }

    #[pyo3(signature = (partition_count, busy, batch_bytes_max, turn=0))]
    fn drain<'py>(
        &self,
        py: Python<'py>,
        partition_count: u32,
        busy: Option<&[u8]>,
        batch_bytes_max: usize,
        turn: u64,
    ) -> PyResult<Bound<'py, PyList>> {
        if partition_count == 0 || busy.is_some_and(|busy| busy.len() != partition_count as usize) {
            return Err(PyValueError::new_err("busy has a byte for each of at least one partition"));
        }
        if busy.is_some() && self.journal.is_some() {
            return Err(PyValueError::new_err("with a journal all partitions are drained"));
        }
        let busy = busy.unwrap_or(&[]).to_vec();
        let (drafts, cut) = self.alone(py, |core| core.drain(partition_count, &busy, batch_bytes_max, turn));
        let made = drafts.iter().map(|draft| Py::new(py, PyDraft(draft.clone()))).collect::<PyResult<Vec<_>>>();
        let made = made.and_then(|made| PyList::new(py, made));
        if made.is_err() {
            // There was no memory for the objects. Nothing is lost: the next drain returns it, and the cut is that one's.
            self.core().undelivered.lock().unwrap_or_else(|e| e.into_inner()).extend(drafts);
            self.core().gone.lock().unwrap_or_else(|e| e.into_inner()).extend(cut.gone);
        } else {
            self.keep_cut(cut);
        }
        made
    }

    fn waiting_states<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let (waiting, cut) = self.alone(py, Core::look);
        let rows = waiting.iter().map(|(view, suffix, state, count)| {
            let state = to_python(py, view.kind, state, *count)?;
            (PyBytes::new(py, &view.definition), PyBytes::new(py, suffix), state, *count).into_pyobject(py)
        });
        let made = PyList::new(py, rows.collect::<PyResult<Vec<_>>>()?)?;
        self.keep_cut(cut);
        Ok(made)
    }

    fn cut<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyDict>, Vec<u64>)> {
        let cut = {
            let mut kept = self.core().cut.lock().unwrap_or_else(|e| e.into_inner());
            Cut { positions: kept.positions.clone(), gone: std::mem::take(&mut kept.gone) }
        };
        Ok((positions(py, cut.positions.into_iter())?, cut.gone))
    }

    fn ends<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let core = self.core();
        let of =
            |(number, shard): (usize, &Shard)| shard.lock().ring.end().map(|(segment, offset)| (number, segment, offset));
        positions(py, py.detach(|| core.shards.iter().enumerate().filter_map(of).collect::<Vec<_>>()).into_iter())
    }

    fn snapshot(&self, py: Python<'_>) {
        self.alone(py, |core| core.snapshot());
    }

    fn local(&self, view: &Bound<'_, View>) -> Local {
        let info = &view.get().info;
        let states = self.core().published.lock().unwrap_or_else(|e| e.into_inner()).get(&info.id).cloned();
        Local { states: states.unwrap_or_else(|| Arc::new(States::new(info.kind))), view: view.clone().unbind() }
    }

    fn evict(&self, py: Python<'_>, silent_drains: u32) -> usize {
        self.alone(py, |core| core.evict(silent_drains))
    }

    fn evict_ended(&self, py: Python<'_>) -> PyResult<usize> {
        let now_ms = self.now(py)?;
        Ok(self.alone(py, |core| core.evict_ended(now_ms)))
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
        let (core, spare) = new_cores(self.config, self.journal.is_some());
        self.cores.replace(core, spare);
    }

    fn keep(&self) -> bool {
        self.journal.is_none() && self.cores.keep(new_cores(self.config, false).1)
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

    #[getter]
    fn shard_count(&self) -> usize {
        self.core().shards.len()
    }

    #[getter]
    fn contended_count(&self) -> u64 {
        self.core().contended.load(Relaxed)
    }
}

/// A core, and a small one that takes its place in a forked child.
fn new_cores(config: (usize, usize, usize, usize), journal: bool) -> (Core, Core) {
    let (bytes_max, shard_count, lane_count, local_series_max) = config;
    let core = |shard_count| Core::new(bytes_max, shard_count, lane_count, local_series_max, journal);
    (core(shard_count), core(1))
}

fn positions(py: Python<'_>, ends: impl Iterator<Item = (usize, i64, usize)>) -> PyResult<Bound<'_, PyDict>> {
    let by_shard = PyDict::new(py);
    for (shard, segment, offset) in ends {
        by_shard.set_item(shard, (segment, offset))?;
    }
    Ok(by_shard)
}

fn has_gil(py: Python<'_>) -> PyResult<bool> {
    let sys = py.import("sys")?;
    if !sys.hasattr("_is_gil_enabled")? {
        Ok(true)
    } else {
        sys.call_method0("_is_gil_enabled")?.extract()
    }
}

/// A batch to be: the groups of one partition. See `pipeline.publisher.table.Draft`.
#[pyclass(frozen, name = "Draft", module = "pipeline_native")]
pub struct PyDraft(Arc<Draft>);

#[pymethods]
impl PyDraft {
    #[getter]
    fn partition(&self) -> u32 {
        self.0.partition
    }

    #[getter]
    fn groups<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.groups)
    }

    #[getter]
    fn group_count(&self) -> usize {
        self.0.group_count
    }

    #[getter]
    fn series_count(&self) -> u64 {
        self.0.series_count
    }

    #[getter]
    fn delta_count(&self) -> u64 {
        self.0.delta_count
    }
}

/// The totals of a view as of a snapshot, by suffix. Never changes.
#[pyclass(frozen, mapping, module = "pipeline_native")]
pub struct Local {
    states: Arc<States>,
    view: Py<View>,
}

#[pymethods]
impl Local {
    fn __len__(&self) -> usize {
        self.states.entries.len()
    }

    fn __getitem__(&self, py: Python<'_>, suffix: &[u8]) -> PyResult<Py<PyAny>> {
        let view = self.view.get();
        match self.states.find(view.table.get().hash(&view.info, suffix), suffix) {
            Some(entry) => to_python(py, self.states.kind, &entry.state, entry.count),
            None => Err(PyKeyError::new_err(PyBytes::new(py, suffix).unbind())),
        }
    }

    fn __contains__(&self, suffix: &[u8]) -> bool {
        let view = self.view.get();
        self.states.find(view.table.get().hash(&view.info, suffix), suffix).is_some()
    }

    fn __iter__(&self) -> LocalIterator {
        LocalIterator { states: self.states.clone(), next: Default::default() }
    }

    #[getter]
    fn complete(&self) -> bool {
        self.states.complete
    }
}

#[pyclass(frozen)]
struct LocalIterator {
    states: Arc<States>,
    next: std::sync::atomic::AtomicUsize,
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
    m.add_class::<PyDraft>()?;
    m.add_class::<Local>()
}
