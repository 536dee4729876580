//! Views and bound series. What records is written to CPython's own calling convention, which costs a third of a wrapper.

use crate::convert::*;
use crate::labels::*;
use crate::python::Table;
use crate::state::{Kind, Stamped, State};
use crate::table::{window_bits, Key, Place, ViewInfo, WINDOW_BYTES};
use crate::wire::{write_array_head, write_str};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple, PyType};
use std::ffi::CStr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::*};
use std::sync::Arc;

/// The name by which the time of a delta is given.
const TIME: &str = "ts_ms";
/// Rows that are recorded before other threads get the interpreter.
const ROWS_AT_ONCE: usize = 4_096;

/// A view that this process records to. See `pipeline.publisher.table.View`.
#[pyclass(frozen, subclass, module = "pipeline_native")]
pub struct View {
    pub table: Py<Table>,
    pub info: Arc<ViewInfo>,
    /// As it was given: its labels stand in the order in which this process names them.
    declared: Py<PyAny>,
    /// Label names in their own order, interned.
    names: Vec<Py<PyString>>,
    /// By place in that order, the place among the labels as declared.
    order: Vec<usize>,
    /// Whether a label is named as the time of a delta is.
    has_time_label: bool,
    /// What `labels` returns, if it is a subclass.
    series_type: Option<Py<PyType>>,
}

#[pyclass(frozen, subclass, extends = View, module = "pipeline_native")]
pub struct AddView;
#[pyclass(frozen, subclass, extends = View, module = "pipeline_native")]
pub struct ObserveView;
#[pyclass(frozen, subclass, extends = View, module = "pipeline_native")]
pub struct SetView;

/// A series that deltas can be recorded to. See `pipeline.publisher.table.Series`.
#[pyclass(frozen, subclass, module = "pipeline_native")]
pub struct Series {
    table: Py<Table>,
    info: Arc<ViewInfo>,
    view: Py<View>,
    suffix: Box<[u8]>,
    hash: u32,
    /// Where it was last found, by lane.
    places: Box<[Place]>,
}

#[pyclass(frozen, subclass, extends = Series, module = "pipeline_native")]
pub struct AddSeries;
#[pyclass(frozen, subclass, extends = Series, module = "pipeline_native")]
pub struct ObserveSeries;
#[pyclass(frozen, subclass, extends = Series, module = "pipeline_native")]
pub struct SetSeries;

fn invalid(py: Python<'_>, text: String) -> PyErr {
    match py.import("pipeline.errors").and_then(|errors| errors.getattr("Invalid")?.call1((text,))) {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

impl View {
    fn open(
        slf: &Bound<'_, PyType>,
        table: Py<Table>,
        definition: Bound<'_, PyAny>,
        (series_max, spread): (usize, u32),
        method: &CStr,
    ) -> PyResult<View> {
        let py = slf.py();
        let record = py.import("pipeline.core.record")?;
        let canonical = record.call_method1("canonical", (&definition,))?;
        let declared: Vec<String> = definition.getattr("labels")?.extract()?;
        let labels: Vec<String> = canonical.getattr("labels")?.extract()?;
        let (name, kind_name): (String, String) =
            (definition.getattr("view")?.extract()?, definition.getattr("kind")?.extract()?);
        let kind = Kind::of(&kind_name).filter(|kind| match kind {
            Kind::Sum => method == c"add",
            Kind::Last => method == c"set",
            _ => method == c"observe",
        });
        let Some(kind) = kind else {
            return Err(invalid(
                py,
                format!("view {name}: kind {kind_name} is not recorded by {}", method.to_string_lossy()),
            ));
        };
        let travelling = record.call_method1("travelling", (&canonical,))?;
        let encoded = py.import("msgspec.msgpack")?.call_method1("encode", (travelling,))?;
        let prefix = record.call_method1("series_prefix", (&canonical,))?;
        let mut prefix_crc = crc32fast::Hasher::new();
        prefix_crc.update(prefix.cast::<PyBytes>()?.as_bytes());
        let overflow: String = record.getattr("OVERFLOW")?.extract()?;
        let mut overflow_labels = Vec::new();
        write_array_head(&mut overflow_labels, labels.len());
        labels.iter().for_each(|_| write_str(&mut overflow_labels, &overflow));
        let info = ViewInfo {
            id: table.get().next_view(),
            name,
            kind,
            monotone: definition.getattr("monotone")?.extract()?,
            window_ms: definition.getattr("window_s")?.extract::<i64>()? * 1_000,
            series_max,
            definition: encoded.cast::<PyBytes>()?.as_bytes().to_vec(),
            overflow_labels,
            prefix_crc,
            spread,
            window_now: AtomicI64::new(0),
            overflow_count: AtomicU64::new(0),
        };
        let order = labels.iter().filter_map(|label| declared.iter().position(|other| other == label)).collect();
        let has_time_label = labels.iter().any(|label| label == TIME);
        let names = labels.iter().map(|label| PyString::intern(py, label).unbind()).collect();
        let series_type = slf.getattr("series_type")?.cast_into::<PyType>()?;
        let own = [py.get_type::<AddSeries>(), py.get_type::<ObserveSeries>(), py.get_type::<SetSeries>()];
        let series_type = (!own.iter().any(|own| own.is(&series_type))).then(|| series_type.unbind());
        Ok(View { table, info: Arc::new(info), declared: definition.unbind(), names, order, has_time_label, series_type })
    }

    /// Build the suffix of labels by their place in their own order; false: something is wrong with them.
    #[inline(always)]
    fn build<'py, T>(&self, suffix: &mut Suffix, value: impl Fn(usize) -> Option<T>) -> bool
    where
        T: std::ops::Deref<Target = Bound<'py, PyAny>>,
    {
        suffix.start(self.names.len());
        for place in 0..self.names.len() {
            match value(place).as_ref().and_then(|value| text(value)) {
                Some(utf8) if utf8.len() <= LABEL_BYTES_MAX => suffix.push_label(utf8),
                _ => return false,
            }
        }
        suffix.bytes().len() <= SUFFIX_BYTES_MAX
    }

    /// Build the suffix of labels by name; the keyword at `skip` is none.
    #[inline]
    fn by_name(
        &self,
        names: Option<&Bound<'_, PyTuple>>,
        values: &Args<'_>,
        skip: Option<usize>,
        suffix: &mut Suffix,
    ) -> PyResult<()> {
        let given = names.map_or(0, |names| names.len());
        let value = |place: usize| {
            let found = find(names?, given, &self.names[place], self.order[place])?;
            (Some(found) != skip).then(|| values.get(found))
        };
        if given == self.names.len() + skip.is_some() as usize && self.build(suffix, value) {
            return Ok(());
        }
        let by_name = PyDict::new(values.py);
        for place in (0..given).filter(|place| Some(*place) != skip) {
            if let Some(names) = names {
                by_name.set_item(names.get_item(place)?, values.get(place))?;
            }
        }
        *suffix = self.checked_labels(&PyTuple::empty(values.py), Some(&by_name))?;
        Ok(())
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

    /// Record a delta of labels by name to the window in which the time is now; None: the labels are not as they should be, or
    /// there is a time among them, and nothing is done.
    #[inline]
    fn record_now(
        &self,
        py: Python<'_>,
        value: &Bound<'_, PyAny>,
        names: Option<&Bound<'_, PyTuple>>,
        values: &Args<'_>,
    ) -> Option<PyResult<()>> {
        let given = names.map_or(0, |names| names.len());
        let mut suffix = Suffix::empty();
        let label = |place: usize| Some(values.get(find(names?, given, &self.names[place], self.order[place])?));
        if given != self.names.len() || !self.build(&mut suffix, label) {
            return None;
        }
        let (table, info) = (self.table.get(), &self.info);
        let recorded = number(info, table, value).and_then(|delta| {
            suffix.set_window(table.window_now(py, info)?);
            table.record(py, table.key(info, suffix.bytes()), delta, &[])
        });
        Some(recorded.map(drop))
    }

    fn rows_error(&self, py: Python<'_>, column: &str, row: usize, error: PyErr) -> PyErr {
        let of = if column.is_empty() { String::new() } else { format!("column {column}, ") };
        invalid(py, format!("view {}: {of}row {row}: {}; nothing was recorded", self.info.name, error.value(py)))
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
        if times.is_some() && info.kind != Kind::Last && info.window_ms == 0 {
            return Err(no_windows(py, info));
        }
        let now = table.now(py)?;
        let mut deltas = Vec::with_capacity(column.len());
        for row in 0..column.len() {
            let ts = match &times {
                Some(times) => {
                    table.time_of(py, Some(&times.get(py, row)?)).map_err(|e| self.rows_error(py, "ts_ms", row, e))?.0
                }
                None => now,
            };
            let plain_number = match &column {
                Column::Numbers(numbers) if info.kind != Kind::Last => Some(numbers[row].clone()).filter(|s| fits(info, s)),
                _ => None,
            };
            let delta = match plain_number {
                Some(delta) => Ok(delta),
                None => column.get(py, row).and_then(|value| match info.kind {
                    Kind::Last => Ok(stamped(table, ts, now, value_of(&table.check, &value)?)),
                    _ => number(info, table, &value),
                }),
            };
            deltas.push((delta.map_err(|e| self.rows_error(py, "value", row, e))?, info.window_of(ts)));
            breathe(py, row);
        }
        Ok(deltas)
    }

    fn record_rows(&self, py: Python<'_>, deltas: Vec<(State, i64)>, suffixes: &mut Rows) -> PyResult<usize> {
        let table = self.table.get();
        let (mut done, total) = (0, deltas.len());
        for (row, (delta, window)) in deltas.into_iter().enumerate() {
            let suffix = suffixes.at(row);
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
    let said = || -> PyResult<Option<PyErr>> {
        if !error.is_instance(py, &py.import("pipeline.errors")?.getattr("PipelineError")?) {
            return Ok(None);
        }
        let text = format!("{}; {done} of the batch of {total} deltas were recorded before", error.value(py));
        Ok(Some(PyErr::from_value(error.get_type(py).call1((text,))?)))
    };
    said().ok().flatten().unwrap_or(error)
}

/// Let other threads have the interpreter from time to time.
#[inline]
fn breathe(py: Python<'_>, row: usize) {
    if row % ROWS_AT_ONCE == ROWS_AT_ONCE - 1 {
        py.detach(std::thread::yield_now);
    }
}

/// The suffixes of rows, or one of all of them.
struct Rows {
    arena: Vec<u8>,
    ends: Vec<usize>,
}

impl Rows {
    fn at(&mut self, row: usize) -> &mut [u8] {
        if self.ends.is_empty() {
            return &mut self.arena;
        }
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        &mut self.arena[start..self.ends[row]]
    }
}

/// A column of values: what a buffer of 64-bit floats or ints holds, or a copy of a sequence.
enum Column<'py> {
    Numbers(Vec<State>),
    Objects(Bound<'py, PyTuple>),
}

impl<'py> Column<'py> {
    fn read(values: &Bound<'py, PyAny>) -> PyResult<Column<'py>> {
        let py = values.py();
        if let Some(buffer) = PyBuffer::<f64>::get(values).ok().filter(|buffer| buffer.dimensions() == 1) {
            return Ok(Column::Numbers(buffer.to_vec(py)?.into_iter().map(State::F).collect()));
        }
        if let Some(buffer) = PyBuffer::<i64>::get(values).ok().filter(|buffer| buffer.dimensions() == 1) {
            return Ok(Column::Numbers(buffer.to_vec(py)?.into_iter().map(State::I).collect()));
        }
        Ok(Column::Objects(tuple(values)?))
    }

    fn len(&self) -> usize {
        match self {
            Column::Numbers(numbers) => numbers.len(),
            Column::Objects(objects) => objects.len(),
        }
    }

    fn get(&self, py: Python<'py>, row: usize) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Column::Numbers(numbers) => Ok(to_python(py, Kind::Sum, &numbers[row], 0)?.into_bound(py)),
            Column::Objects(objects) => objects.get_item(row),
        }
    }
}

/// A copy of a sequence that nobody changes.
fn tuple<'py>(values: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
    Ok(values.py().get_type::<PyTuple>().call1((values,))?.cast_into()?)
}

#[inline]
fn fits(info: &ViewInfo, delta: &State) -> bool {
    if matches!(info.kind, Kind::Distinct | Kind::TopK) {
        return false; // an item is hashed, and made a text
    }
    match delta {
        State::F(f) => f.is_finite() && !(info.monotone && *f < 0.0),
        State::I(i) => !(info.monotone && *i < 0),
        _ => false,
    }
}

#[inline(always)]
fn number(info: &ViewInfo, table: &Table, value: &Bound<'_, PyAny>) -> PyResult<State> {
    match plain(value) {
        Some(delta) if fits(info, &delta) => Ok(delta),
        _ => checked(&table.check, info.kind, info.monotone, value),
    }
}

fn stamped(table: &Table, ts_ms: i64, now_ms: i64, value: crate::state::Value) -> State {
    State::L(Box::new(Stamped { ts_ms, recorded_ns: table.rise(now_ms), value }))
}

/// Where a name stands among so many keywords: nearly always they are the same, interned object, and in the same order.
#[inline]
fn find(names: &Bound<'_, PyTuple>, count: usize, name: &Py<PyString>, first: usize) -> Option<usize> {
    // SAFETY: places are below `count`, the length of the tuple, whose items are live, and texts, because keywords are.
    unsafe {
        let item = |place: usize| ffi::PyTuple_GetItem(names.as_ptr(), place as ffi::Py_ssize_t);
        if first < count && item(first) == name.as_ptr() {
            return Some(first);
        }
        (0..count)
            .find(|place| item(*place) == name.as_ptr())
            .or_else(|| (0..count).find(|place| ffi::PyUnicode_Compare(item(*place), name.as_ptr()) == 0))
    }
}

#[pymethods]
impl View {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.table)?;
        visit.call(&self.declared)?;
        visit.call(&self.series_type)
    }

    #[getter]
    fn definition<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        self.declared.bind(py).clone()
    }

    #[getter]
    fn overflow_count(&self) -> u64 {
        self.info.overflow_count.load(Relaxed)
    }

    #[getter]
    fn spread(&self) -> u32 {
        self.info.spread
    }

    #[pyo3(signature = (*values, **names))]
    fn labels<'py>(
        slf: &Bound<'py, View>,
        values: &Bound<'py, PyTuple>,
        names: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let view = slf.get();
        if let Some(series_type) = &view.series_type {
            let mut all = vec![slf.clone().into_any()];
            all.extend(values.iter());
            return series_type.bind(py).call(PyTuple::new(py, all)?, names);
        }
        let series = PyClassInitializer::from(Series::open(slf, values, names)?);
        Ok(match view.info.kind {
            Kind::Sum => Bound::new(py, series.add_subclass(AddSeries))?.into_any(),
            Kind::Last => Bound::new(py, series.add_subclass(SetSeries))?.into_any(),
            _ => Bound::new(py, series.add_subclass(ObserveSeries))?.into_any(),
        })
    }

    #[pyo3(signature = (labels, values, ts_ms=None))]
    fn add_many(
        &self,
        labels: &Bound<'_, PyAny>,
        values: &Bound<'_, PyAny>,
        ts_ms: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let suffix = self.by_place(&tuple(labels)?)?;
        let deltas = self.check_rows(values, ts_ms)?;
        self.record_rows(values.py(), deltas, &mut Rows { arena: suffix.bytes().to_vec(), ends: Vec::new() })
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
        let mut rows = Rows { arena: Vec::with_capacity(deltas.len() * 32), ends: Vec::with_capacity(deltas.len()) };
        for row in 0..deltas.len() {
            let mut suffix = Suffix::empty();
            if !self.build(&mut suffix, |place| columns[self.order[place]].get_borrowed_item(row).ok()) {
                let values = columns.iter().map(|column| column.get_item(row)).collect::<PyResult<Vec<_>>>()?;
                let checked = self.checked_labels(&PyTuple::new(py, values)?, None);
                suffix = checked.map_err(|e| self.rows_error(py, "", row, e))?;
            }
            rows.arena.extend_from_slice(suffix.bytes());
            rows.ends.push(rows.arena.len());
            breathe(py, row);
        }
        self.record_rows(py, deltas, &mut rows)
    }
}

impl Series {
    fn open(of: &Bound<'_, View>, values: &Bound<'_, PyTuple>, names: Option<&Bound<'_, PyDict>>) -> PyResult<Series> {
        let view = of.get();
        let suffix = match names {
            None => view.by_place(values)?,
            Some(names) => view.checked_labels(values, Some(names))?,
        };
        let table = view.table.get();
        Ok(Series {
            table: view.table.clone_ref(of.py()),
            info: view.info.clone(),
            view: of.clone().unbind(),
            suffix: suffix.bytes().into(),
            hash: table.hash(&view.info, suffix.bytes()),
            places: (0..table.lane_count()).map(|_| Place::default()).collect(),
        })
    }

    #[inline]
    fn key(&self) -> Key<'_> {
        Key { view: &self.info, suffix: &self.suffix, hash: self.hash }
    }

    /// Record a delta to the window in which the time is now.
    #[inline(always)]
    fn record_now(&self, py: Python<'_>, table: &Table, mut delta: State) -> PyResult<()> {
        if let Some(place) = self.places.get(table.core().lane() as usize) {
            let last = place.window.load(Relaxed);
            if table.is_in(py, &self.info, last)? && table.record_in(py, &self.info, self.hash, last, place, &mut delta) {
                return Ok(());
            }
        }
        self.record_at(py, table, delta, self.info.window_of(table.now(py)?))
    }

    /// Record a delta to a window; 0 if the view has none.
    fn record_at(&self, py: Python<'_>, table: &Table, delta: State, window: i64) -> PyResult<()> {
        let mut suffix = self.suffix.clone();
        suffix[..WINDOW_BYTES].copy_from_slice(&window.to_be_bytes());
        let key = Key { view: &self.info, suffix: &suffix, hash: self.hash ^ window_bits(window) };
        table.record(py, key, delta, &self.places)?;
        Ok(())
    }
}

#[cold]
fn no_windows(py: Python<'_>, info: &ViewInfo) -> PyErr {
    invalid(py, format!("view {}: it has no windows, so its deltas have no ts_ms", info.name))
}

#[pymethods]
impl Series {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.table)?;
        visit.call(&self.view)
    }

    #[getter]
    fn view<'py>(&self, py: Python<'py>) -> Bound<'py, View> {
        self.view.bind(py).clone()
    }

    #[getter]
    fn suffix<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.suffix)
    }
}

macro_rules! constructors {
    ($view:ident, $series:ident, $number:ident, $name:literal, $view_doc:literal, $series_doc:literal) => {
        #[pymethods]
        impl $view {
            #[new]
            #[classmethod]
            #[pyo3(signature = (table, definition, series_max, spread=1))]
            fn new(
                cls: &Bound<'_, PyType>,
                table: Py<Table>,
                definition: Bound<'_, PyAny>,
                series_max: usize,
                spread: u32,
            ) -> PyResult<PyClassInitializer<$view>> {
                Ok(PyClassInitializer::from(View::open(cls, table, definition, (series_max, spread), $name)?)
                    .add_subclass($view))
            }

            #[classattr]
            fn series_type(py: Python<'_>) -> Bound<'_, PyType> {
                py.get_type::<$series>()
            }

            #[classmethod]
            fn __init_subclass__(cls: &Bound<'_, PyType>) -> PyResult<()> {
                add_method(cls, $name, $view_doc, view_record::<$number>)
            }
        }

        #[pymethods]
        impl $series {
            #[new]
            #[pyo3(signature = (view, /, *values, **names))]
            fn new(
                view: &Bound<'_, View>,
                values: &Bound<'_, PyTuple>,
                names: Option<&Bound<'_, PyDict>>,
            ) -> PyResult<PyClassInitializer<$series>> {
                Ok(PyClassInitializer::from(Series::open(view, values, names)?).add_subclass($series))
            }

            #[classmethod]
            fn __init_subclass__(cls: &Bound<'_, PyType>) -> PyResult<()> {
                add_method(cls, $name, $series_doc, series_record::<$number>)
            }
        }
    };
}

constructors!(
    AddView,
    AddSeries,
    ADD,
    c"add",
    c"add($self, value=1, /, **labels)\n--\n\nAdd `value` to the series with these labels.",
    c"add($self, value=1, /, *, ts_ms=None)\n--\n\nAdd `value`."
);
constructors!(
    ObserveView,
    ObserveSeries,
    OBSERVE,
    c"observe",
    c"observe($self, value, /, **labels)\n--\n\nObserve `value` in the series with these labels.",
    c"observe($self, value, /, *, ts_ms=None)\n--\n\nObserve `value`."
);
constructors!(
    SetView,
    SetSeries,
    SET,
    c"set",
    c"set($self, value, /, ts_ms=None, **labels)\n--\n\nSet the series with these labels, as of `ts_ms`.",
    c"set($self, value, /, ts_ms=None)\n--\n\nSet the value, as of `ts_ms`."
);

/// The arguments of a call, from the first keyword on.
struct Args<'py> {
    py: Python<'py>,
    first: *const *mut ffi::PyObject,
}

impl<'py> Args<'py> {
    #[inline]
    fn get(&self, place: usize) -> Borrowed<'_, 'py, PyAny> {
        // SAFETY: who calls counts places in the tuple of keywords, and CPython passes as many values behind `first`; they are
        // live as long as the call, which `Args` does not outlive.
        unsafe { Borrowed::from_ptr(self.py, *self.first.add(place)) }
    }
}

const ADD: u8 = 0;
const OBSERVE: u8 = 1;
const SET: u8 = 2;

type FastCall = unsafe extern "C" fn(
    *mut ffi::PyObject,
    *const *mut ffi::PyObject,
    ffi::Py_ssize_t,
    *mut ffi::PyObject,
) -> *mut ffi::PyObject;

/// What a call gives: the value, the time, and where the time stands among the keywords.
struct Given<'a, 'py> {
    value: Option<Borrowed<'a, 'py, PyAny>>,
    ts_ms: Option<Borrowed<'a, 'py, PyAny>>,
    skip: Option<usize>,
    names: Option<Borrowed<'a, 'py, PyTuple>>,
    keywords: Args<'py>,
}

#[inline]
fn call<'py, const METHOD: u8>(
    py: Python<'py>,
    args: *const *mut ffi::PyObject,
    nargs: ffi::Py_ssize_t,
    kwnames: *mut ffi::PyObject,
    timed: bool,
) -> PyResult<Given<'py, 'py>> {
    let nargs = nargs as usize;
    let most = 1 + (METHOD == SET) as usize;
    if nargs > most || (METHOD != ADD && nargs == 0) {
        let (name, least) = (["add", "observe", "set"][METHOD as usize], (METHOD != ADD) as usize);
        return Err(PyTypeError::new_err(format!("{name}() takes {least} to {most} arguments by position; got {nargs}")));
    }
    // SAFETY: CPython passes `nargs` values at `args`, then one for each name in `kwnames`, which is a tuple of texts or null;
    // all are live until the call returns, and so longer than what is made of them here.
    let (value, mut ts_ms, names, keywords) = unsafe {
        (
            (nargs > 0).then(|| Borrowed::from_ptr(py, *args)),
            (nargs > 1).then(|| Borrowed::from_ptr(py, *args.add(1))),
            (!kwnames.is_null()).then(|| Borrowed::from_ptr(py, kwnames).cast_unchecked::<PyTuple>()),
            Args { py, first: args.add(nargs) },
        )
    };
    let mut skip = None;
    if timed {
        if let Some(place) = names.as_ref().and_then(|names| find(names, names.len(), time_name(py), 0)) {
            if ts_ms.is_some() {
                return Err(PyTypeError::new_err("set() got multiple values for argument 'ts_ms'"));
            }
            skip = Some(place);
            // SAFETY: as in `Args::get`.
            ts_ms = Some(unsafe { Borrowed::from_ptr(py, *keywords.first.add(place)) });
        }
    }
    Ok(Given { value, ts_ms, skip, names, keywords })
}

/// The delta that a call gives, and the start of its window.
#[inline]
fn delta<const METHOD: u8>(py: Python<'_>, table: &Table, info: &ViewInfo, given: &Given<'_, '_>) -> PyResult<(State, i64)> {
    let timed = METHOD == SET || info.window_ms > 0;
    let (ts_ms, now_ms) = if timed { table.time_of(py, given.ts_ms.as_deref())? } else { (0, 0) };
    let delta = match &given.value {
        None => State::I(1),
        Some(value) if METHOD == SET => stamped(table, ts_ms, now_ms, value_of(&table.check, value)?),
        Some(value) => number(info, table, value)?,
    };
    Ok((delta, info.window_of(ts_ms)))
}

fn time_name(py: Python<'_>) -> &Py<PyString> {
    static NAME: pyo3::sync::PyOnceLock<Py<PyString>> = pyo3::sync::PyOnceLock::new();
    NAME.get_or_init(py, || PyString::intern(py, TIME).unbind())
}

#[inline]
fn returned(py: Python<'_>, result: PyResult<()>) -> *mut ffi::PyObject {
    match result {
        Ok(()) => py.None().into_ptr(),
        Err(error) => {
            error.restore(py);
            std::ptr::null_mut()
        }
    }
}

/// # Safety
/// To be called by CPython only, as a method of `View`'s subclasses: then `slf` is one, this thread is attached, and the
/// other arguments are as METH_FASTCALL | METH_KEYWORDS says.
unsafe extern "C" fn view_record<const METHOD: u8>(
    slf: *mut ffi::PyObject,
    args: *const *mut ffi::PyObject,
    nargs: ffi::Py_ssize_t,
    kwnames: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: see above. The descriptor checks the type of `slf`, and the caller keeps it alive.
    let (py, slf) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::from_ptr(py, slf).cast_unchecked::<View>())
    };
    let view = slf.get();
    let (table, info) = (view.table.get(), &view.info);
    if METHOD != SET && nargs == 1 && info.window_ms == 0 {
        // What most calls are, without a look for anything else.
        let keywords = Args { py, first: args.wrapping_add(1) };
        // SAFETY: there is one value, and `kwnames` is a tuple or null; the caller keeps both alive.
        let (value, names) = unsafe {
            let names = (!kwnames.is_null()).then(|| Borrowed::from_ptr(py, kwnames).cast_unchecked::<PyTuple>());
            (Borrowed::from_ptr(py, *args), names)
        };
        let mut suffix = Suffix::empty();
        let done = match view.by_name(names.as_deref(), &keywords, None, &mut suffix) {
            Ok(()) => match number(info, table, &value) {
                Ok(delta) => table.record(py, table.key(info, suffix.bytes()), delta, &[]),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        return returned(py, done.map(drop));
    }
    if METHOD != SET && nargs == 1 && info.window_ms > 0 && !view.has_time_label {
        // SAFETY: as above.
        let (value, names) = unsafe {
            let names = (!kwnames.is_null()).then(|| Borrowed::from_ptr(py, kwnames).cast_unchecked::<PyTuple>());
            (Borrowed::from_ptr(py, *args), names)
        };
        if let Some(done) = view.record_now(py, &value, names.as_deref(), &Args { py, first: args.wrapping_add(1) }) {
            return returned(py, done);
        }
    }
    let record = || {
        let timed = METHOD == SET || info.window_ms > 0;
        let given = call::<METHOD>(py, args, nargs, kwnames, timed)?;
        let mut suffix = Suffix::empty();
        view.by_name(given.names.as_deref(), &given.keywords, given.skip, &mut suffix)?;
        let (delta, window) = delta::<METHOD>(py, table, info, &given)?;
        if info.window_ms > 0 {
            suffix.set_window(window);
        }
        table.record(py, table.key(info, suffix.bytes()), delta, &[])?;
        Ok(())
    };
    returned(py, record())
}

/// # Safety
/// As `view_record`, of `Series`' subclasses.
unsafe extern "C" fn series_record<const METHOD: u8>(
    slf: *mut ffi::PyObject,
    args: *const *mut ffi::PyObject,
    nargs: ffi::Py_ssize_t,
    kwnames: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: as in `view_record`.
    let (py, slf) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::from_ptr(py, slf).cast_unchecked::<Series>())
    };
    let series = slf.get();
    let (table, info) = (series.table.get(), &series.info);
    if METHOD != SET && nargs <= 1 && kwnames.is_null() && (METHOD == ADD || nargs == 1) {
        // SAFETY: there is one value, which the caller keeps alive.
        let value = (nargs == 1).then(|| unsafe { Borrowed::from_ptr(py, *args) });
        let delta = value.map_or(Ok(State::I(1)), |value| number(info, table, &value));
        let done = delta.and_then(|delta| match info.window_ms {
            0 => table.record(py, series.key(), delta, &series.places).map(drop),
            _ => series.record_now(py, table, delta),
        });
        return returned(py, done);
    }
    let record = || {
        let given = call::<METHOD>(py, args, nargs, kwnames, true)?;
        if given.names.as_ref().is_some_and(|names| names.len() > given.skip.is_some() as usize) {
            return Err(PyTypeError::new_err("a bound series has its labels: only ts_ms can be given by name"));
        }
        if METHOD != SET && info.window_ms == 0 && given.ts_ms.as_ref().is_some_and(|ts_ms| !ts_ms.is_none()) {
            return Err(no_windows(py, info));
        }
        let (delta, window) = delta::<METHOD>(py, table, info, &given)?;
        series.record_at(py, table, delta, window)
    };
    returned(py, record())
}

/// Give a type its recording method, unless somebody has overridden it. Subclasses get one too: CPython calls a method quickly
/// only if the object is exactly of the type that the method was made for.
fn add_method(to: &Bound<'_, PyType>, name: &'static CStr, doc: &'static CStr, method: FastCall) -> PyResult<()> {
    let text = name.to_str().unwrap_or_default();
    if let Some(inherited) = to.getattr_opt(text)? {
        if inherited.get_type().name()? != "method_descriptor" {
            return Ok(());
        }
    }
    let def = Box::leak(Box::new(ffi::PyMethodDef {
        ml_name: name.as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: method },
        ml_flags: ffi::METH_FASTCALL | ffi::METH_KEYWORDS,
        ml_doc: doc.as_ptr(),
    }));
    // SAFETY: `to` is a type, and `def` lives for ever.
    let method = unsafe { Bound::from_owned_ptr_or_err(to.py(), ffi::PyDescr_NewMethod(to.as_ptr().cast(), def))? };
    to.setattr(text, method)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    m.add_class::<View>()?;
    m.add_class::<Series>()?;
    m.add_class::<AddView>()?;
    m.add_class::<ObserveView>()?;
    m.add_class::<SetView>()?;
    m.add_class::<AddSeries>()?;
    m.add_class::<ObserveSeries>()?;
    m.add_class::<SetSeries>()?;
    AddView::__init_subclass__(&py.get_type::<AddView>())?;
    ObserveView::__init_subclass__(&py.get_type::<ObserveView>())?;
    SetView::__init_subclass__(&py.get_type::<SetView>())?;
    AddSeries::__init_subclass__(&py.get_type::<AddSeries>())?;
    ObserveSeries::__init_subclass__(&py.get_type::<ObserveSeries>())?;
    SetSeries::__init_subclass__(&py.get_type::<SetSeries>())
}
