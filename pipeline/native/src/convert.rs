//! Between Python's objects and states.

use crate::state::{int_state, Kind, Number, State};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyFloat, PyInt, PyString};
use pyo3::IntoPyObjectExt;

pub const TS_MS_MAX: i64 = 1 << 53;
/// Texts that are longer are shown to `check`, which may find them too long for the log.
const LONG_TEXT: usize = 4_096;

/// A finite number of type float or int as it is; None: something else, or beyond 64 bits.
#[inline]
pub fn plain(value: &Bound<'_, PyAny>) -> Option<Number> {
    if value.is_exact_instance_of::<PyFloat>() {
        return value.extract().ok().filter(|f: &f64| f.is_finite()).map(Number::F);
    }
    if value.is_exact_instance_of::<PyInt>() {
        return value.extract().ok().map(Number::I);
    }
    None
}

/// A text in UTF-8; None: no text, or a lone surrogate in it.
#[inline(always)]
pub fn text<'a>(value: &'a Bound<'_, PyAny>) -> Option<&'a str> {
    // The exact check is the quicker one, and does for nearly all.
    if !value.is_exact_instance_of::<PyString>() && !value.is_instance_of::<PyString>() {
        return None;
    }
    // SAFETY: it was just checked.
    unsafe { value.cast_unchecked::<PyString>() }.to_str().ok()
}

/// What a `last` view can hold; None: whatever `check` says.
#[inline]
fn plain_value(value: &Bound<'_, PyAny>) -> Option<State> {
    if let Some(number) = plain(value) {
        Some(number.into())
    } else if value.is_exact_instance_of::<PyString>() {
        Some(State::S(text(value)?.into()))
    } else if value.is_exact_instance_of::<PyBool>() {
        Some(if value.is_truthy().ok()? { State::True } else { State::False })
    } else {
        value.is_none().then_some(State::Empty)
    }
}

/// The value that `check` makes of one that is not plain; or what it raises.
#[cold]
pub fn checked(check: &Py<PyAny>, kind: Kind, monotone: bool, value: &Bound<'_, PyAny>) -> PyResult<State> {
    let checked = check.bind(value.py()).call1((kind.name(), monotone, value))?;
    match if kind == Kind::Last { plain_value(&checked) } else { plain(&checked).map(State::from) } {
        Some(state) => Ok(state),
        None => Ok(int_state(checked.cast_exact::<PyInt>()?.extract()?)),
    }
}

/// The value that a `last` view is to hold.
#[inline]
pub fn value_of(check: &Py<PyAny>, value: &Bound<'_, PyAny>) -> PyResult<State> {
    match plain_value(value) {
        Some(plain) if !matches!(&plain, State::S(text) if text.len() > LONG_TEXT) => Ok(plain),
        _ => checked(check, Kind::Last, false, value),
    }
}

/// The object that a state is in Python; `count` is that of a mean.
pub fn to_python<'py>(py: Python<'py>, kind: Kind, state: &State, count: u64) -> PyResult<Bound<'py, PyAny>> {
    let number = match state {
        State::Empty => py.None().into_bound(py),
        State::I(i) => i.into_bound_py_any(py)?,
        State::F(f) => f.into_bound_py_any(py)?,
        State::P(high, low) => (high, low).into_bound_py_any(py)?,
        State::B(b) => (&**b).into_bound_py_any(py)?,
        State::False => false.into_bound_py_any(py)?,
        State::True => true.into_bound_py_any(py)?,
        State::S(s) => (&**s).into_bound_py_any(py)?,
        State::L(s) => (s.ts_ms, s.recorded_ns, to_python(py, kind, &s.value, 0)?).into_bound_py_any(py)?,
    };
    if kind == Kind::Mean {
        return (number, count).into_bound_py_any(py);
    }
    Ok(number)
}
