//! Groups of a scan: entries of a store, merged by some of their labels. See `pipeline/query/grouping.py`.

use crate::convert::to_python;
use crate::read::Rest;
use crate::state::{Kind, State};
use crate::wire::write_str;
use hashbrown::HashMap;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use std::sync::{Mutex, PoisonError};

/// The largest count of a mean that is read here: no number of entries makes them overflow.
const COUNT_MAX: i64 = 1 << 32;

#[derive(Debug)]
struct Group {
    state: State,
    count: u64,
}

type ByLabels = HashMap<Box<[u8]>, Group, foldhash::fast::RandomState>;

/// Entries of one kind, merged by labels. Safe from any thread.
#[pyclass(frozen, module = "pipeline_native")]
pub struct Groups {
    kind: Kind,
    merged: Mutex<ByLabels>,
}

impl Groups {
    /// The state in a value: the head of an entry, then its columns and no more.
    fn state(&self, value: &[u8]) -> Option<Group> {
        let mut rest = Rest(value);
        let (kind, width) = (self.kind, self.kind.width());
        if rest.byte()? != 2 || rest.array()? != 2 + width || rest.text()? != kind.name() {
            return None;
        }
        match rest.byte()? {
            0x00 => {}
            0xcf => _ = rest.uint(8)?,
            _ => return None,
        }
        let state = rest.number(matches!(kind, Kind::Sum | Kind::Mean))?;
        let count = match kind {
            Kind::Mean => match rest.number(false)? {
                State::I(count @ 1..=COUNT_MAX) => count as u64,
                _ => return None,
            },
            _ => 0,
        };
        rest.0.is_empty().then_some(Group { state, count })
    }

    fn add_all(&self, rows: &[(&[u8], &[u8])], skip: usize, width: usize, columns: &[Option<usize>]) -> Option<()> {
        let mut keys = Vec::with_capacity(rows.len() * 16);
        let mut found = Vec::with_capacity(rows.len());
        let mut labels = Vec::with_capacity(width);
        for (key, value) in rows {
            let mut rest = Rest(key.get(skip..)?);
            if rest.array()? != width {
                return None;
            }
            labels.clear();
            for _ in 0..width {
                labels.push(rest.text()?);
            }
            if !rest.0.is_empty() {
                return None;
            }
            for column in columns {
                write_str(&mut keys, column.map_or(Some(""), |index| labels.get(index).copied())?);
            }
            found.push((keys.len(), self.state(value)?));
        }
        // Everything is read: from here on nothing can go wrong half way.
        let mut merged = self.merged.lock().unwrap_or_else(PoisonError::into_inner);
        let mut start = 0;
        for (end, new) in found {
            let key = &keys[start..end];
            start = end;
            match merged.get_mut(key) {
                Some(old) => {
                    old.state.merge(self.kind, new.state);
                    old.count += new.count;
                }
                None => _ = merged.insert(key.into(), new),
            }
        }
        Some(())
    }
}

#[pymethods]
impl Groups {
    /// Groups of a kind; None for a kind whose states only Python reads.
    #[staticmethod]
    fn of(kind: &str) -> Option<Groups> {
        let kind = Kind::of(kind).filter(|kind| matches!(kind, Kind::Sum | Kind::Min | Kind::Max | Kind::Mean))?;
        Some(Groups { kind, merged: Mutex::default() })
    }

    /// Merge entries, without the interpreter's lock; false: nothing was done, because one of them is unusual or wrong.
    ///
    /// The labels of a key begin behind `skip` bytes, and are `width`; the groups have those of the indexes in `columns`,
    /// with an empty text for None.
    fn add(
        &self,
        py: Python<'_>,
        entries: &Bound<'_, PyList>,
        skip: usize,
        width: usize,
        columns: Vec<Option<usize>>,
    ) -> PyResult<bool> {
        let mut held = Vec::with_capacity(entries.len());
        for entry in entries.iter() {
            held.push(entry.extract::<(Bound<'_, PyBytes>, Bound<'_, PyBytes>)>()?);
        }
        let rows: Vec<_> = held.iter().map(|(key, value)| (key.as_bytes(), value.as_bytes())).collect();
        Ok(py.detach(|| self.add_all(&rows, skip, width, &columns)).is_some())
    }

    fn __len__(&self) -> usize {
        self.merged.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Return the merged states by label values, and forget them.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let merged = std::mem::take(&mut *self.merged.lock().unwrap_or_else(PoisonError::into_inner));
        let by_labels = PyDict::new(py);
        for (key, group) in merged {
            let mut rest = Rest(&key);
            let labels: Vec<_> = std::iter::from_fn(|| rest.text()).collect();
            by_labels.set_item(PyTuple::new(py, labels)?, to_python(py, self.kind, &group.state, group.count)?)?;
        }
        Ok(by_labels)
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Groups>()
}
