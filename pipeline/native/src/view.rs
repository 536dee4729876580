//! Views and bound series. What records is written to CPython's own calling convention, which costs a third of a wrapper.

use crate::convert::*;
use crate::labels::*;
use crate::python::Table;
use crate::state::{Kind, Number, Stamped, State};
use crate::table::{Key, Place, ViewInfo, WINDOW_BYTES};
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pyclass::{boolean_struct::True, PyClass};
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple, PyType};
use pyo3::IntoPyObjectExt;
use std::ffi::CStr;
use std::iter::repeat;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::Arc;

/// Rows that are recorded before other threads get the interpreter.
const ROWS_AT_ONCE: usize = 4_096;

/// A view that this process records to. See `pipeline.publisher.view.View`.
#[pyclass(frozen, subclass, module = "pipeline_native")]
pub struct View {
    pub table: Py<Table>,
    pub info: Arc<ViewInfo>,
    /// As it was given: its labels stand in the order in which this process names them.
    #[pyo3(get, name = "definition")]
    declared: Py<PyAny>,
    /// Label names in their own order, interned.
    names: Vec<Py<PyString>>,
    /// By place in that order, the place among the labels as declared.
    order: Vec<usize>,
}

/// A series that deltas can be recorded to. See `pipeline.publisher.view.Series`.
#[pyclass(frozen, subclass, module = "pipeline_native")]
pub struct Series {
    table: Py<Table>,
    info: Arc<ViewInfo>,
    #[pyo3(get)]
    view: Py<View>,
    suffix: Box<[u8]>,
    hash: u32,
    /// Where it was last found, by lane.
    places: Box<[Place]>,
}

/// A way to record. There is a subclass of `View` and one of `Series` for each.
struct Method {
    /// What their names begin with.
    title: &'static str,
    name: &'static CStr,
    of_view: &'static CStr,
    of_series: &'static CStr,
}

const METHODS: [Method; 3] = [
    Method {
        title: "Add",
        name: c"add",
        of_view: c"add($self, value=1, /, **labels)\n--\n\nAdd `value` to the series with these labels.",
        of_series: c"add($self, value=1, /, *, ts_ms=None)\n--\n\nAdd `value`.",
    },
    Method {
        title: "Observe",
        name: c"observe",
        of_view: c"observe($self, value, /, **labels)\n--\n\nObserve `value` in the series with these labels.",
        of_series: c"observe($self, value, /, *, ts_ms=None)\n--\n\nObserve `value`.",
    },
    Method {
        title: "Set",
        name: c"set",
        of_view: c"set($self, value, /, ts_ms=None, **labels)\n--\n\nSet the series with these labels, as of `ts_ms`.",
        of_series: c"set($self, value, /, ts_ms=None)\n--\n\nSet the value, as of `ts_ms`.",
    },
];

fn invalid(py: Python<'_>, text: String) -> PyErr {
    match py.import("pipeline.errors").and_then(|errors| errors.getattr("Invalid")?.call1((text,))) {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

impl View {
    /// Build the suffix of labels by their place in their own order; false: something is wrong with them.
    #[inline(always)]
    fn build<'py, T>(&self, suffix: &mut Suffix, value: impl Fn(usize) -> Option<T>) -> bool
    where
        T: std::ops::Deref<Target = Bound<'py, PyAny>>,
    {
        suffix.start(self.names.len());
        for place in 0..self.names.len() {
            match value(place).as_ref().and_then(|value| text(value)) {
                Some(label) if label.len() <= LABEL_BYTES_MAX => suffix.push_label(label),
                _ => return false,
            }
        }
        suffix.bytes().len() <= SUFFIX_BYTES_MAX
    }

    /// Build the suffix of labels by name; the keyword at `time` is none.
    #[inline(always)]
    fn by_name(&self, call: &Call<'_>, time: Option<usize>, suffix: &mut Suffix) -> PyResult<()> {
        let value = |place: usize| Some(call.get(call.find(self.names[place].bind(call.py), self.order[place])?));
        if call.label_count(time) == self.names.len() && self.build(suffix, value) {
            return Ok(());
        }
        *suffix = self.checked_names(call, time)?;
        Ok(())
    }

    #[cold]
    fn checked_names(&self, call: &Call<'_>, time: Option<usize>) -> PyResult<Suffix> {
        let by_name = PyDict::new(call.py);
        for (i, name) in call.names.iter().flat_map(|names| names.iter()).enumerate() {
            if Some(call.positional + i) != time {
                by_name.set_item(name, call.get(call.positional + i))?;
            }
        }
        self.checked_labels(&PyTuple::empty(call.py), Some(&by_name))
    }

    /// Build the suffix of labels in the order of their declaration.
    fn by_place(&self, values: &Bound<'_, PyTuple>) -> PyResult<Suffix> {
        let mut suffix = Suffix::empty();
        let value = |place: usize| values.get_borrowed_item(self.order[place]).ok();
        if values.len() == self.order.len() && self.build(&mut suffix, value) {
            return Ok(suffix);
        }
        self.checked_labels(values, None)
    }

    /// Build the suffix of labels of which the fast way could not, or raise what is wrong with them.
    #[cold]
    fn checked_labels(&self, values: &Bound<'_, PyTuple>, names: Option<&Bound<'_, PyDict>>) -> PyResult<Suffix> {
        let py = values.py();
        let names = names.cloned().unwrap_or_else(|| PyDict::new(py));
        let checked = py.import("pipeline.publisher.view")?.call_method1("label_values", (&self.declared, values, names))?;
        let checked = checked.cast_into::<PyTuple>()?;
        let mut suffix = Suffix::empty();
        if self.build(&mut suffix, |place| checked.get_borrowed_item(self.order[place]).ok()) {
            return Ok(suffix);
        }
        Err(PyValueError::new_err("label_values returns the texts of all labels"))
    }

    fn rows_error(&self, py: Python<'_>, column: &str, row: usize, error: PyErr) -> PyErr {
        invalid(py, format!("view {}: {column}row {row}: {}; nothing was recorded", self.info.name, error.value(py)))
    }

    /// The deltas of rows, all of them checked, and in which window each is.
    fn check_rows(&self, values: &Bound<'_, PyAny>, ts_ms: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<(State, i64)>> {
        let py = values.py();
        let (table, info) = (self.table.get(), &*self.info);
        let column = Column::read(values)?;
        let times = ts_ms.filter(|ts_ms| !ts_ms.is_none()).map(Column::read).transpose()?;
        if times.as_ref().is_some_and(|times| times.len() != column.len()) {
            return Err(invalid(py, format!("view {}: columns of different lengths; nothing was recorded", info.name)));
        }
        if times.is_some() && !info.is_timed {
            return Err(no_windows(py, info));
        }
        let now = table.now(py)?;
        let mut deltas = Vec::with_capacity(column.len());
        for row in 0..column.len() {
            let time = |times: &Column<'_>| table.time_of(py, Some(&times.get(py, row)?));
            let time = times.as_ref().map_or(Ok((now, now)), time);
            let (ts, _) = time.map_err(|e| self.rows_error(py, "column ts_ms, ", row, e))?;
            let delta = match column.number(row) {
                Some(number) if info.fits(number) => Ok(number.into()),
                _ => column.get(py, row).and_then(|value| state_of(table, info, &value, (ts, now))),
            };
            deltas.push((delta.map_err(|e| self.rows_error(py, "column value, ", row, e))?, info.window_of(ts)));
            breathe(py, row);
        }
        Ok(deltas)
    }

    /// Record rows whose suffixes lie in `arena`.
    fn record_rows(
        &self,
        py: Python<'_>,
        deltas: Vec<(State, i64)>,
        mut arena: Vec<u8>,
        suffixes: impl Iterator<Item = Range<usize>>,
    ) -> PyResult<usize> {
        let table = self.table.get();
        let (mut done, total) = (0, deltas.len());
        for (row, ((delta, window), suffix)) in deltas.into_iter().zip(suffixes).enumerate() {
            let suffix = &mut arena[suffix];
            suffix[..WINDOW_BYTES].copy_from_slice(&window.to_be_bytes());
            let recorded = table.record(py, table.key(&self.info, suffix), delta, &[]);
            done += recorded.map_err(|error| in_parts(py, error, done, total))? as usize;
            breathe(py, row);
        }
        Ok(done)
    }
}

/// An error in the midst of a batch, which says how much of it is recorded.
#[cold]
fn in_parts(py: Python<'_>, error: PyErr, done: usize, total: usize) -> PyErr {
    let view = py.import("pipeline.publisher.view");
    match view.and_then(|view| view.call_method1("in_parts", (error.value(py), done, total))) {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

/// Let other threads have the interpreter from time to time.
#[inline]
fn breathe(py: Python<'_>, row: usize) {
    if row % ROWS_AT_ONCE == ROWS_AT_ONCE - 1 {
        py.detach(std::thread::yield_now);
    }
}

/// A column of values: what a buffer of 64-bit floats or ints holds, or a copy of a sequence.
enum Column<'py> {
    Numbers(Vec<Number>),
    Objects(Bound<'py, PyTuple>),
}

impl<'py> Column<'py> {
    fn read(values: &Bound<'py, PyAny>) -> PyResult<Column<'py>> {
        fn numbers<T: Element>(values: &Bound<'_, PyAny>, number: fn(T) -> Number) -> Option<Vec<Number>> {
            let buffer = PyBuffer::get(values).ok().filter(|buffer| buffer.dimensions() == 1)?;
            Some(buffer.to_vec(values.py()).ok()?.into_iter().map(number).collect())
        }
        match numbers(values, Number::F).or_else(|| numbers(values, Number::I)) {
            Some(numbers) => Ok(Column::Numbers(numbers)),
            None => Ok(Column::Objects(tuple(values)?)),
        }
    }

    fn len(&self) -> usize {
        match self {
            Column::Numbers(numbers) => numbers.len(),
            Column::Objects(objects) => objects.len(),
        }
    }

    #[inline]
    fn number(&self, row: usize) -> Option<Number> {
        match self {
            Column::Numbers(numbers) => Some(numbers[row]),
            Column::Objects(objects) => plain(&*objects.get_borrowed_item(row).ok()?),
        }
    }

    fn get(&self, py: Python<'py>, row: usize) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Column::Numbers(numbers) => numbers[row].into_bound_py_any(py),
            Column::Objects(objects) => objects.get_item(row),
        }
    }
}

/// A copy of a sequence that nobody changes.
fn tuple<'py>(values: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
    Ok(values.py().get_type::<PyTuple>().call1((values,))?.cast_into()?)
}

/// A number that is a delta as it is.
#[inline(always)]
fn number(info: &ViewInfo, value: &Bound<'_, PyAny>) -> Option<Number> {
    plain(value).filter(|number| info.fits(*number))
}

/// The delta that a value is, as of a time and now.
#[inline]
fn state_of(table: &Table, info: &ViewInfo, value: &Bound<'_, PyAny>, (ts_ms, now_ms): (i64, i64)) -> PyResult<State> {
    if info.kind == Kind::Last {
        let value = value_of(&table.check, value)?;
        return Ok(State::L(Box::new(Stamped { ts_ms, recorded_ns: table.rise(now_ms), value })));
    }
    match number(info, value) {
        Some(delta) => Ok(delta.into()),
        None => checked(&table.check, info.kind, info.monotone, value),
    }
}

#[pymethods]
impl View {
    #[new]
    #[classmethod]
    fn new(cls: &Bound<'_, PyType>, table: Py<Table>, definition: Bound<'_, PyAny>, series_max: usize) -> PyResult<View> {
        let py = cls.py();
        let outline = py.import("pipeline.publisher.view")?.getattr("outline")?;
        let (names, order, encoded, prefix, overflow_labels): (Vec<_>, Vec<_>, Vec<u8>, Vec<u8>, Vec<u8>) =
            outline.call1((&definition, cls.getattr("method")?))?.extract()?;
        let kind: String = definition.getattr("kind")?.extract()?;
        let kind = Kind::of(&kind).ok_or_else(|| PyValueError::new_err(kind))?;
        let window_ms = definition.getattr("window_s")?.extract::<i64>()? * 1_000;
        let mut prefix_crc = crc32fast::Hasher::new();
        prefix_crc.update(&prefix);
        let info = ViewInfo {
            id: table.get().next_view.fetch_add(1, Relaxed),
            name: definition.getattr("view")?.extract()?,
            kind,
            monotone: definition.getattr("monotone")?.extract()?,
            window_ms,
            is_timed: window_ms > 0 || kind == Kind::Last,
            series_max,
            definition: encoded,
            overflow_labels,
            prefix_crc,
            overflow_count: AtomicU64::new(0),
        };
        Ok(View { table, info: Arc::new(info), declared: definition.unbind(), names, order })
    }

    #[classmethod]
    fn __init_subclass__(cls: &Bound<'_, PyType>) -> PyResult<()> {
        add_method(cls, |method| method.of_view, record_by_call::<View>)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.table)?;
        visit.call(&self.declared)
    }

    #[getter]
    fn overflow_count(&self) -> u64 {
        self.info.overflow_count.load(Relaxed)
    }

    #[pyo3(signature = (*values, **names))]
    fn labels<'py>(
        slf: &Bound<'py, View>,
        values: &Bound<'py, PyTuple>,
        names: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let all = PyTuple::new(slf.py(), [slf.as_any().clone()].into_iter().chain(values).collect::<Vec<_>>())?;
        slf.getattr(intern!(slf.py(), "series_type"))?.call(all, names)
    }

    #[pyo3(signature = (labels, values, ts_ms=None))]
    fn add_many(
        &self,
        labels: &Bound<'_, PyAny>,
        values: &Bound<'_, PyAny>,
        ts_ms: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let suffix = self.by_place(&tuple(labels)?)?.bytes().to_vec();
        let deltas = self.check_rows(values, ts_ms)?;
        let everywhere = repeat(0..suffix.len());
        self.record_rows(values.py(), deltas, suffix, everywhere)
    }

    #[pyo3(signature = (label_columns, values, ts_ms=None))]
    fn record_columns(
        &self,
        label_columns: Vec<Bound<'_, PyAny>>,
        values: &Bound<'_, PyAny>,
        ts_ms: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let py = values.py();
        let columns = label_columns.iter().map(tuple).collect::<PyResult<Vec<_>>>()?;
        let deltas = self.check_rows(values, ts_ms)?;
        if columns.len() != self.order.len() || columns.iter().any(|column| column.len() != deltas.len()) {
            let text = format!("view {}: a column of {} rows is needed for each label", self.info.name, deltas.len());
            return Err(invalid(py, text));
        }
        let (mut arena, mut suffixes) = (Vec::with_capacity(deltas.len() * 32), Vec::with_capacity(deltas.len()));
        for row in 0..deltas.len() {
            let mut suffix = Suffix::empty();
            if !self.build(&mut suffix, |place| columns[self.order[place]].get_borrowed_item(row).ok()) {
                let values = columns.iter().map(|column| column.get_item(row)).collect::<PyResult<Vec<_>>>()?;
                let checked = self.checked_labels(&PyTuple::new(py, values)?, None);
                suffix = checked.map_err(|e| self.rows_error(py, "", row, e))?;
            }
            suffixes.push(arena.len()..arena.len() + suffix.bytes().len());
            arena.extend_from_slice(suffix.bytes());
            breathe(py, row);
        }
        self.record_rows(py, deltas, arena, suffixes.into_iter())
    }
}

#[cold]
fn no_windows(py: Python<'_>, info: &ViewInfo) -> PyErr {
    invalid(py, format!("view {}: it has no windows, so its deltas have no ts_ms", info.name))
}

#[pymethods]
impl Series {
    #[new]
    #[pyo3(signature = (view, /, *values, **names))]
    fn new(view: &Bound<'_, View>, values: &Bound<'_, PyTuple>, names: Option<&Bound<'_, PyDict>>) -> PyResult<Series> {
        let View { table, info, .. } = view.get();
        let suffix = match names {
            None => view.get().by_place(values)?,
            Some(names) => view.get().checked_labels(values, Some(names))?,
        };
        Ok(Series {
            table: table.clone_ref(view.py()),
            info: info.clone(),
            view: view.clone().unbind(),
            suffix: suffix.bytes().into(),
            hash: table.get().hash(info, suffix.bytes()),
            places: (0..table.get().lane_count).map(|_| Place::default()).collect(),
        })
    }

    #[classmethod]
    fn __init_subclass__(cls: &Bound<'_, PyType>) -> PyResult<()> {
        add_method(cls, |method| method.of_series, record_by_call::<Series>)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.table)?;
        visit.call(&self.view)
    }

    #[getter]
    fn suffix<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.suffix)
    }
}

/// The arguments of a call that records: so many by position, then one for each name.
struct Call<'py> {
    py: Python<'py>,
    first: *const *mut ffi::PyObject,
    positional: usize,
    names: Option<Borrowed<'py, 'py, PyTuple>>,
    name_count: usize,
}

impl<'py> Call<'py> {
    #[inline]
    fn get(&self, place: usize) -> Borrowed<'_, 'py, PyAny> {
        debug_assert!(place < self.positional + self.name_count);
        // SAFETY: who calls has `place` from the counts, and CPython passes as many values; they are live as long as the call,
        // which `Call` does not outlive.
        unsafe { Borrowed::from_ptr(self.py, *self.first.add(place)) }
    }

    /// Where the value of a keyword is. Nearly always its name is the same, interned object, and stands where it is expected.
    #[inline(always)]
    fn find(&self, name: &Bound<'_, PyString>, expected: usize) -> Option<usize> {
        let names = self.names.as_deref().filter(|_| expected < self.name_count);
        if names.is_some_and(|names| names.get_borrowed_item(expected).is_ok_and(|other| other.is(name))) {
            return Some(self.positional + expected);
        }
        self.search(name)
    }

    #[inline(never)]
    fn search(&self, name: &Bound<'_, PyString>) -> Option<usize> {
        let names = self.names?;
        let is = |i: &usize| names.get_borrowed_item(*i).is_ok_and(|other| other.eq(name).unwrap_or(false));
        (0..self.name_count).find(is).map(|i| self.positional + i)
    }

    /// How many of the keywords are labels, if the one at `time` is none.
    #[inline]
    fn label_count(&self, time: Option<usize>) -> usize {
        self.name_count - time.is_some_and(|place| place >= self.positional) as usize
    }

    /// Check how many arguments there are, and return where `ts_ms` is, if it can be given by name.
    #[inline]
    fn time(&self, kind: Kind, by_name: bool) -> PyResult<Option<usize>> {
        let (least, most) = ((kind != Kind::Sum) as usize, 1 + (kind == Kind::Last) as usize);
        if self.positional < least || self.positional > most {
            let text = format!("takes {least} to {most} arguments by position; got {}", self.positional);
            return Err(PyTypeError::new_err(format!("{}() {text}", kind.method())));
        }
        let named = if by_name && self.name_count > 0 { self.find(intern!(self.py, "ts_ms"), 0) } else { None };
        if named.is_some() && self.positional > 1 {
            return Err(PyTypeError::new_err("set() got multiple values for argument 'ts_ms'"));
        }
        Ok(named.or((self.positional > 1).then_some(1)))
    }

    /// The delta that is given, and the start of its window.
    #[inline(always)]
    fn delta(&self, table: &Table, info: &ViewInfo, time: Option<usize>) -> PyResult<(State, i64)> {
        let time = time.map(|place| self.get(place));
        let times = if info.is_timed { table.time_of(self.py, time.as_deref())? } else { (0, 0) };
        let delta = if self.positional > 0 { state_of(table, info, &self.get(0), times)? } else { State::I(1) };
        Ok((delta, info.window_of(times.0)))
    }
}

/// What deltas are recorded to.
trait Target: PyClass<Frozen = True> + Sync {
    fn record(&self, call: &Call<'_>) -> PyResult<()>;
}

impl Target for View {
    #[inline(always)]
    fn record(&self, call: &Call<'_>) -> PyResult<()> {
        let (table, info) = (self.table.get(), &self.info);
        let mut suffix = Suffix::empty();
        if call.positional == 1 && !info.is_timed {
            self.by_name(call, None, &mut suffix)?;
            if let Some(delta) = number(info, &call.get(0)) {
                return table.record(call.py, table.key(info, suffix.bytes()), delta.into(), &[]).map(drop);
            }
        }
        self.record_any(call, &mut suffix)
    }
}

impl View {
    /// Record what may have a time, or is no plain number.
    #[inline(never)]
    fn record_any(&self, call: &Call<'_>, suffix: &mut Suffix) -> PyResult<()> {
        let (table, info) = (self.table.get(), &self.info);
        let time = call.time(info.kind, info.is_timed)?;
        self.by_name(call, time, suffix)?;
        let (delta, window) = call.delta(table, info, time)?;
        suffix.set_window(window);
        table.record(call.py, table.key(info, suffix.bytes()), delta, &[]).map(drop)
    }
}

impl Target for Series {
    #[inline(always)]
    fn record(&self, call: &Call<'_>) -> PyResult<()> {
        if !self.info.is_timed && call.name_count == 0 {
            let delta = match call.positional {
                1 => number(&self.info, &call.get(0)),
                _ => (call.positional == 0 && self.info.kind == Kind::Sum).then_some(Number::I(1)),
            };
            if let Some(delta) = delta {
                return self.table.get().record(call.py, self.key(), delta.into(), &self.places).map(drop);
            }
        }
        self.record_any(call)
    }
}

impl Series {
    #[inline(always)]
    fn key(&self) -> Key<'_> {
        Key { view: &self.info, suffix: &self.suffix, hash: self.hash }
    }

    /// Record what may have a time, or is no plain number.
    #[inline(never)]
    fn record_any(&self, call: &Call<'_>) -> PyResult<()> {
        let (table, info) = (self.table.get(), &self.info);
        let time = call.time(info.kind, true)?;
        if call.label_count(time) > 0 {
            return Err(PyTypeError::new_err("a bound series has its labels: only ts_ms can be given by name"));
        }
        if !info.is_timed && time.is_some_and(|place| !call.get(place).is_none()) {
            return Err(no_windows(call.py, info));
        }
        let (delta, window) = call.delta(table, info, time)?;
        if info.window_ms == 0 {
            return table.record(call.py, self.key(), delta, &self.places).map(drop);
        }
        let mut suffix = self.suffix.clone();
        suffix[..WINDOW_BYTES].copy_from_slice(&window.to_be_bytes());
        table.record(call.py, table.key(info, &suffix), delta, &[]).map(drop)
    }
}

type FastCall = unsafe extern "C" fn(
    *mut ffi::PyObject,
    *const *mut ffi::PyObject,
    ffi::Py_ssize_t,
    *mut ffi::PyObject,
) -> *mut ffi::PyObject;

/// # Safety
/// To be called by CPython only, as a method of `T`'s subclasses: then `slf` is one, this thread is attached, and the other
/// arguments are as METH_FASTCALL | METH_KEYWORDS says.
unsafe extern "C" fn record_by_call<T: Target>(
    slf: *mut ffi::PyObject,
    args: *const *mut ffi::PyObject,
    nargs: ffi::Py_ssize_t,
    kwnames: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: see above. The descriptor checks the type of `slf`; `kwnames` is a tuple of texts or null; and the caller keeps
    // all alive until this returns, and so longer than what is made of them here.
    let (py, slf, names) = unsafe {
        let py = Python::assume_attached();
        let names = Borrowed::from_ptr_or_opt(py, kwnames).map(|names| names.cast_unchecked::<PyTuple>());
        (py, Borrowed::from_ptr(py, slf).cast_unchecked::<T>(), names)
    };
    let name_count = names.map_or(0, |names| names.len());
    match slf.get().record(&Call { py, first: args, positional: nargs as usize, names, name_count }) {
        Ok(()) => py.None().into_ptr(),
        Err(error) => {
            error.restore(py);
            std::ptr::null_mut()
        }
    }
}

/// Give a type its recording method, unless somebody has overridden it. Subclasses get one too: CPython calls a method quickly
/// only if the object is exactly of the type that the method was made for.
fn add_method(to: &Bound<'_, PyType>, doc: fn(&Method) -> &'static CStr, function: FastCall) -> PyResult<()> {
    let name: String = to.getattr("method")?.extract()?;
    let Some(method) = METHODS.iter().find(|method| method.name.to_bytes() == name.as_bytes()) else { return Ok(()) };
    if let Some(inherited) = to.getattr_opt(&name)? {
        if inherited.get_type().name()? != "method_descriptor" {
            return Ok(());
        }
    }
    let def = Box::leak(Box::new(ffi::PyMethodDef {
        ml_name: method.name.as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: function },
        ml_flags: ffi::METH_FASTCALL | ffi::METH_KEYWORDS,
        ml_doc: doc(method).as_ptr(),
    }));
    // SAFETY: `to` is a type, and `def` lives for ever.
    let made = unsafe { Bound::from_owned_ptr_or_err(to.py(), ffi::PyDescr_NewMethod(to.as_ptr().cast(), def))? };
    to.setattr(name, made)
}

/// The class of views that record by a method.
pub fn view_type_of<'py>(py: Python<'py>, method: &str) -> PyResult<Bound<'py, PyType>> {
    let title = METHODS.iter().find(|known| known.name.to_bytes() == method.as_bytes()).map_or("", |known| known.title);
    Ok(py.import("pipeline_native")?.getattr(format!("{title}View"))?.cast_into()?)
}

/// Make the subclass of `View` or `Series` that records by a method.
fn subclass<'py>(
    m: &Bound<'py, PyModule>,
    of: Bound<'py, PyType>,
    method: &Method,
    series_type: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = m.py();
    let name = format!("{}{}", method.title, of.name()?);
    let body = PyDict::new(py);
    body.set_item("__module__", "pipeline_native")?;
    body.set_item("__slots__", PyTuple::empty(py))?;
    body.set_item("method", method.name.to_string_lossy())?;
    if let Some(series_type) = series_type {
        body.set_item("series_type", series_type)?;
    }
    let made = py.get_type::<PyType>().call1((&name, (of,), body))?;
    m.add(name, &made)?;
    Ok(made)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<View>()?;
    m.add_class::<Series>()?;
    for method in &METHODS {
        let series_type = subclass(m, m.py().get_type::<Series>(), method, None)?;
        subclass(m, m.py().get_type::<View>(), method, Some(series_type))?;
    }
    Ok(())
}
