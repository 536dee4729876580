//! The native core of `pipeline`: what is done per delta, per entry of a scan, and per message of a commit. Its specifications
//! are `pipeline/publisher/table.py`, `pipeline/query/grouping.py` and `pipeline/adapters/kafka/transaction.py`.

mod convert;
mod fork;
mod groups;
mod histogram;
mod kafka;
mod labels;
mod local;
mod python;
mod ring;
mod sketches;
mod state;
mod table;
mod time;
mod view;
mod wire;

use pyo3::prelude::*;

/// Rises with every change of what Python sees of this crate; `pipeline/native/__init__.py` names the one that it needs.
const VERSION: u32 = 10;

#[pymodule(gil_used = false)]
fn pipeline_native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("VERSION", VERSION)?;
    m.add("SOURCES", option_env!("PIPELINE_NATIVE_SOURCES").unwrap_or(""))?;
    fork::watch();
    groups::register(m)?;
    kafka::register(m)?;
    python::register(m)?;
    view::register(m)
}
