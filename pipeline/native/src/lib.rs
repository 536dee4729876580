//! The native core of `pipeline`: what is done per delta, per entry that a worker folds, per message of a commit, and per entry
//! of a scan. Its specifications are `pipeline/publisher/table.py`, `pipeline/core/overlay.py`, `pipeline/core/changes.py`,
//! `pipeline/adapters/kafka/transaction.py` and `pipeline/query/grouping.py`.

mod convert;
mod folded;
mod fork;
mod groups;
mod histogram;
mod kafka;
mod labels;
mod local;
mod python;
mod read;
mod ring;
mod rows;
mod sketches;
mod state;
mod table;
mod time;
mod view;
mod wire;

use pyo3::prelude::*;

/// Rises with every change of what Python sees of this crate; `pipeline/native/__init__.py` names the one that it needs.
const VERSION: u32 = 11;

#[pymodule(gil_used = false)]
fn pipeline_native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("VERSION", VERSION)?;
    m.add("SOURCES", option_env!("PIPELINE_NATIVE_SOURCES").unwrap_or(""))?;
    fork::watch();
    folded::register(m)?;
    groups::register(m)?;
    kafka::register(m)?;
    python::register(m)?;
    view::register(m)
}
