//! The rows of a group as they came in a batch: checked, and kept as states. See `pipeline/core/groups.py`.

use crate::convert::{TEXT_BYTES_MAX, TS_MS_MAX};
use crate::labels::{LABEL_BYTES_MAX, SUFFIX_BYTES_MAX};
use crate::read::Rest;
use crate::state::{Kind, Stamped, State, Value};
use foldhash::fast::RandomState;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::hash::{BuildHasher, Hasher};
use std::sync::LazyLock;

const BATCH_INT_BYTES_MAX: usize = 1_040;
const STATE_INT_BYTES_MAX: usize = 1_100;
const WINDOW_BYTES: usize = 8;
const WINDOW_START_MS_MAX: u64 = 1 << 53;
/// The largest count of a mean that is read from a batch: no number of rows makes them overflow.
const BATCH_COUNT_MAX: u64 = 1 << 32;
/// The largest count of a mean that is read from an entry, or kept: any overlay can be added to it.
pub const COUNT_MAX: u64 = 1 << 62;

static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::default);

pub fn hash_of(suffix: &[u8]) -> u64 {
    let mut hasher = HASHER.build_hasher();
    hasher.write(suffix);
    hasher.finish()
}

/// The start of the window of a suffix, in ms.
pub fn window_start(suffix: &[u8]) -> u64 {
    suffix.first_chunk::<WINDOW_BYTES>().map_or(0, |start| u64::from_be_bytes(*start))
}

/// A kind whose states the worker has here; None: only Python has them.
pub fn native_kind(name: &str) -> Option<Kind> {
    Kind::of(name).filter(|kind| matches!(kind, Kind::Sum | Kind::Min | Kind::Max | Kind::Mean | Kind::Last))
}

pub struct Row {
    pub at: usize,
    pub size: u32,
    pub hash: u64,
    pub state: State,
    pub count: u64,
}

/// Rows of a group, all of which are right.
#[pyclass(frozen, module = "pipeline_native")]
pub struct Rows {
    pub kind: Kind,
    pub suffixes: Py<PyBytes>,
    pub rows: Vec<Row>,
    earliest_ms: u64,
    latest_ms: u64,
}

/// What the suffixes and states of a group have to be.
struct Shape {
    kind: Kind,
    monotone: bool,
    window_ms: u64,
    width: usize,
}

impl Shape {
    fn is_right(&self, suffix: &[u8]) -> bool {
        let Some((window, labels)) = suffix.split_at_checked(WINDOW_BYTES) else { return false };
        let start = window_start(window);
        let fits = if self.window_ms == 0 {
            start == 0
        } else {
            start <= WINDOW_START_MS_MAX && start.is_multiple_of(self.window_ms)
        };
        fits && suffix.len() <= SUFFIX_BYTES_MAX && self.are_right(labels).is_some()
    }

    /// Some: they are as many texts as there are labels, in their only encoding.
    fn are_right(&self, labels: &[u8]) -> Option<()> {
        let mut rest = Rest(labels);
        if rest.array()? != self.width || labels[0] != if self.width < 16 { 0x90 | self.width as u8 } else { 0xdc } {
            return None;
        }
        for _ in 0..self.width {
            let before = rest.0.len();
            let size = rest.text()?.len();
            let head = match size {
                0..32 => 1,
                32..256 => 2,
                _ => 3,
            };
            if size > LABEL_BYTES_MAX || before - rest.0.len() != head + size {
                return None;
            }
        }
        rest.0.is_empty().then_some(())
    }

    fn rows(&self, suffixes: &[u8], columns: &[&[u8]]) -> Option<(Vec<Row>, u64, u64)> {
        let mut rest = Rest(suffixes);
        let count = rest.long_array()?;
        let mut columns: Vec<Rest> = columns.iter().map(|column| Rest(column)).collect();
        if count == 0 || columns.len() != self.kind.width() || count > suffixes.len() / (WINDOW_BYTES + 2) {
            return None;
        }
        for column in &mut columns {
            if column.long_array()? != count {
                return None;
            }
        }
        let mut rows = Vec::with_capacity(count);
        let (mut earliest, mut latest) = (u64::MAX, 0);
        for _ in 0..count {
            let suffix = rest.bytes()?;
            if !self.is_right(suffix) {
                return None;
            }
            let start = window_start(suffix);
            (earliest, latest) = (earliest.min(start), latest.max(start));
            let (state, count) = read_state(self.kind, &mut columns, BATCH_INT_BYTES_MAX, BATCH_COUNT_MAX)?;
            if self.monotone && is_negative(&state) {
                return None;
            }
            if let State::L(stamped) = &state {
                latest = latest.max(stamped.ts_ms as u64);
            }
            let at = suffixes.len() - rest.0.len() - suffix.len();
            rows.push(Row { at, size: suffix.len() as u32, hash: hash_of(suffix), state, count });
        }
        let done = rest.0.is_empty() && columns.iter().all(|column| column.0.is_empty());
        done.then_some((rows, earliest, latest))
    }
}

fn is_negative(state: &State) -> bool {
    match state {
        State::I(i) => *i < 0,
        State::F(f) | State::P(f, _) => *f < 0.0,
        State::B(b) => b.sign() == num_bigint::Sign::Minus,
        _ => false,
    }
}

/// A state from its columns, of each of which one value is taken; `columns` may be one for all of them.
fn read_state(kind: Kind, columns: &mut [Rest], int_bytes_max: usize, count_max: u64) -> Option<(State, u64)> {
    let last = columns.len() - 1;
    let state = match kind {
        Kind::Sum | Kind::Mean => columns[0].long_number(true, int_bytes_max)?,
        Kind::Min | Kind::Max => columns[0].long_number(false, int_bytes_max)?,
        Kind::Last => {
            let State::I(ts_ms @ 0..=TS_MS_MAX) = columns[0].number(false)? else { return None };
            let State::I(recorded_ns @ 0..) = columns[1.min(last)].number(false)? else { return None };
            let value = read_value(&mut columns[2.min(last)], int_bytes_max)?;
            State::L(Box::new(Stamped { ts_ms, recorded_ns, value }))
        }
        _ => return None,
    };
    if kind != Kind::Mean {
        return Some((state, 0));
    }
    match columns[1.min(last)].number(false)? {
        State::I(count @ 1..) if count as u64 <= count_max => Some((state, count as u64)),
        _ => None,
    }
}

fn read_value(rest: &mut Rest, int_bytes_max: usize) -> Option<Value> {
    match rest.0.first()? {
        0xc0 => rest.byte().map(|_| Value::Nil),
        0xc2 | 0xc3 => Some(Value::Bool(rest.byte()? == 0xc3)),
        0xa0..=0xbf | 0xd9..=0xda => {
            rest.text().filter(|text| text.len() <= TEXT_BYTES_MAX).map(|text| Value::S(text.into()))
        }
        _ => Some(match rest.long_number(false, int_bytes_max)? {
            State::I(i) => Value::I(i),
            State::F(f) => Value::F(f),
            State::B(b) => Value::B(b),
            _ => return None,
        }),
    }
}

/// The state of an entry, from what is behind its head and its expiry.
pub fn read_entry(kind: Kind, columns: &[u8]) -> Option<(State, u64)> {
    let mut rest = [Rest(columns)];
    let found = read_state(kind, &mut rest, STATE_INT_BYTES_MAX, COUNT_MAX)?;
    rest[0].0.is_empty().then_some(found)
}

#[pymethods]
impl Rows {
    /// The rows of a group, read without the interpreter's lock; None: one of them is unusual or wrong, so that Python reads
    /// them all. `suffixes` and each of `columns` are encoded arrays.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)]
    fn of(
        py: Python<'_>,
        kind: &str,
        monotone: bool,
        window_ms: u64,
        width: usize,
        suffixes: Bound<'_, PyBytes>,
        columns: Vec<Bound<'_, PyBytes>>,
    ) -> Option<Rows> {
        let kind = native_kind(kind)?;
        let shape = Shape { kind, monotone, window_ms, width };
        let (all, slices) = (suffixes.as_bytes(), columns.iter().map(|it| it.as_bytes()).collect::<Vec<_>>());
        let (rows, earliest_ms, latest_ms) = py.detach(|| shape.rows(all, &slices))?;
        Some(Rows { kind, suffixes: suffixes.unbind(), rows, earliest_ms, latest_ms })
    }

    fn __len__(&self) -> usize {
        self.rows.len()
    }

    /// The earliest start of a window.
    #[getter]
    fn earliest_ms(&self) -> u64 {
        self.earliest_ms
    }

    /// The latest start of a window, or timestamp of a state.
    #[getter]
    fn latest_ms(&self) -> u64 {
        self.latest_ms
    }
}
