//! Between Python's objects and states.

use crate::sketches::{Distinct, TopK};
use crate::state::{int_state, Kind, Stamped, State, Value};
use num_bigint::BigInt;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyFrozenSet, PyInt};

pub const TS_MS_MAX: i64 = 1 << 53;
pub const TEXT_BYTES_MAX: usize = 65_536;
/// Texts that are longer are shown to `check`, which may find them too long for the log.
const LONG_TEXT: usize = 4_096;

/// A finite number of type float or int as it is; None: something else, or beyond 64 bits.
#[inline]
pub fn plain(value: &Bound<'_, PyAny>) -> Option<State> {
    let object = value.as_ptr();
    // SAFETY: `object` is a live object, borrowed from `value`, and this thread is attached, as `Bound` proves. Both checks are
    // exact, so the conversions find a real float or int, and can neither fail nor run Python code.
    unsafe {
        if ffi::PyFloat_CheckExact(object) != 0 {
            let f = ffi::PyFloat_AsDouble(object);
            return f.is_finite().then_some(State::F(f));
        }
        if ffi::PyLong_CheckExact(object) != 0 {
            let mut overflow = 0;
            let i = ffi::PyLong_AsLongLongAndOverflow(object, &mut overflow);
            return (overflow == 0).then_some(State::I(i));
        }
    }
    None
}

/// The UTF-8 of a text, which lives as long as the text; None: no text, or a lone surrogate in it.
#[inline]
pub fn text<'a>(value: &'a Bound<'_, PyAny>) -> Option<&'a [u8]> {
    let object = value.as_ptr();
    let mut size = 0;
    // SAFETY: `object` is a live object and this thread is attached. A text keeps its UTF-8, and never changes; the slice is
    // bound to the borrow of `value`, which keeps the text alive. On failure the exception is cleared.
    unsafe {
        if ffi::PyUnicode_CheckExact(object) == 0 && ffi::PyUnicode_Check(object) == 0 {
            return None;
        }
        let data = ffi::PyUnicode_AsUTF8AndSize(object, &mut size);
        if data.is_null() {
            ffi::PyErr_Clear();
            return None;
        }
        Some(std::slice::from_raw_parts(data.cast::<u8>(), size as usize))
    }
}

fn exact_text(value: &Bound<'_, PyAny>) -> bool {
    // SAFETY: a type check of a live object.
    unsafe { ffi::PyUnicode_CheckExact(value.as_ptr()) != 0 }
}

/// An int of any size, which must be one of type int.
fn int_of(value: &Bound<'_, PyAny>) -> PyResult<State> {
    let bits: usize = value.call_method0("bit_length")?.extract()?;
    let signed = PyDict::new(value.py());
    signed.set_item("signed", true)?;
    let bytes = value.call_method("to_bytes", (bits / 8 + 1, "big"), Some(&signed))?;
    Ok(int_state(BigInt::from_signed_bytes_be(bytes.cast::<PyBytes>()?.as_bytes())))
}

/// A delta that is no plain number, once `check` has made one of it, or has raised what is wrong.
#[cold]
pub fn checked(check: &Py<PyAny>, kind: Kind, monotone: bool, value: &Bound<'_, PyAny>) -> PyResult<State> {
    let plain_value = check.bind(value.py()).call1((kind.name(), monotone, value))?;
    if kind == Kind::TopK {
        let (item, count): (String, u64) = plain_value.extract()?;
        return Ok(State::T(Box::new(TopK::of(&item, count))));
    }
    match plain(&plain_value) {
        Some(state) => Ok(state),
        None => int_of(&plain_value.cast_into_exact::<PyInt>()?.into_any()),
    }
}

/// What a `last` view can hold; None: whatever `check` says.
fn plain_value(value: &Bound<'_, PyAny>) -> Option<Value> {
    if value.is_none() {
        return Some(Value::Nil);
    }
    if let Ok(bool) = value.cast::<pyo3::types::PyBool>() {
        return Some(Value::Bool(bool.is_true()));
    }
    if exact_text(value) {
        let utf8 = text(value).filter(|utf8| utf8.len() <= TEXT_BYTES_MAX)?;
        return Some(Value::S(std::str::from_utf8(utf8).ok()?.into()));
    }
    match plain(value)? {
        State::I(i) => Some(Value::I(i)),
        State::F(f) => Some(Value::F(f)),
        _ => None,
    }
}

pub fn value_of(check: &Py<PyAny>, value: &Bound<'_, PyAny>) -> PyResult<Value> {
    if let Some(plain) = plain_value(value).filter(|plain| !matches!(plain, Value::S(text) if text.len() > LONG_TEXT)) {
        return Ok(plain);
    }
    let checked = check.bind(value.py()).call1((Kind::Last.name(), false, value))?;
    if let Some(plain) = plain_value(&checked) {
        return Ok(plain);
    }
    Ok(match int_of(&checked.cast_into_exact::<PyInt>()?.into_any())? {
        State::B(b) => Value::B(b),
        State::I(i) => Value::I(i),
        _ => Value::Nil,
    })
}

fn big_to_python(py: Python<'_>, b: &BigInt) -> PyResult<Py<PyAny>> {
    let signed = PyDict::new(py);
    signed.set_item("signed", true)?;
    let bytes = PyBytes::new(py, &b.to_signed_bytes_be());
    Ok(py.get_type::<PyInt>().call_method("from_bytes", (bytes, "big"), Some(&signed))?.unbind())
}

fn count_to_python(py: Python<'_>, count: u128) -> PyResult<Py<PyAny>> {
    match u64::try_from(count) {
        Ok(count) => Ok(count.into_pyobject(py)?.into_any().unbind()),
        Err(_) => big_to_python(py, &BigInt::from(count)),
    }
}

fn buckets_to_python<'py>(py: Python<'py>, buckets: &[(i32, u64)]) -> PyResult<Bound<'py, PyDict>> {
    let by_index = PyDict::new(py);
    for (index, count) in buckets {
        by_index.set_item(index, count)?;
    }
    Ok(by_index)
}

pub fn to_python(py: Python<'_>, kind: Kind, state: &State, count: u64) -> PyResult<Py<PyAny>> {
    let number = match state {
        State::Empty => py.None(),
        State::I(i) => i.into_pyobject(py)?.into_any().unbind(),
        State::F(f) => f.into_pyobject(py)?.into_any().unbind(),
        State::P(high, low) => (*high, *low).into_pyobject(py)?.into_any().unbind(),
        State::B(b) => big_to_python(py, b)?,
        State::L(stamped) => {
            let Stamped { ts_ms, recorded_ns, value } = &**stamped;
            let value = match value {
                Value::Nil => py.None(),
                Value::Bool(b) => (*b).into_pyobject(py)?.to_owned().into_any().unbind(),
                Value::I(i) => i.into_pyobject(py)?.into_any().unbind(),
                Value::F(f) => f.into_pyobject(py)?.into_any().unbind(),
                Value::B(b) => big_to_python(py, b)?,
                Value::S(s) => (**s).into_pyobject(py)?.into_any().unbind(),
            };
            (*ts_ms, *recorded_ns, value).into_pyobject(py)?.into_any().unbind()
        }
        State::D(d) => match &**d {
            Distinct::Exact(hashes) => PyFrozenSet::new(py, hashes)?.into_any().unbind(),
            Distinct::Registers(registers) => PyBytes::new(py, &registers[..]).into_any().unbind(),
        },
        State::T(t) => {
            let counts = PyDict::new(py);
            for (item, count) in t.rows() {
                counts.set_item(item, count_to_python(py, count)?)?;
            }
            let (total, error) = (count_to_python(py, t.total)?, count_to_python(py, t.error)?);
            (total, error, counts).into_pyobject(py)?.into_any().unbind()
        }
        State::H(h) => {
            let number = |state: &State| to_python(py, Kind::Sum, state, 0);
            let numbers = (number(&h.total)?, number(&h.least)?, number(&h.most)?);
            let [positive, negative] = h.buckets();
            let buckets = (buckets_to_python(py, &positive)?, buckets_to_python(py, &negative)?);
            let (total, least, most) = numbers;
            (total, least, most, h.schema, h.zeros, buckets.0, buckets.1).into_pyobject(py)?.into_any().unbind()
        }
    };
    Ok(if kind == Kind::Mean { (number, count).into_pyobject(py)?.into_any().unbind() } else { number })
}
