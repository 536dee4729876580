//! Messages of a commit, given to librdkafka thousands at a time, without a Python call for each.
//!
//! The library is the one inside confluent_kafka's wheel; `pipeline/adapters/kafka/batches.py` looks up its functions. The
//! handle of a client comes by librdkafka's own means: this extension is a plugin of the client (`plugin.library.paths`), and
//! its interceptor is told of each new client, in the thread that makes it.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PySequence};
use pyo3::{PyTraverseError, PyVisit};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void, CString};
use std::mem::transmute;
use std::ptr::null_mut;
use std::sync::OnceLock;

/// How many messages are given to librdkafka in one call, while the interpreter is let go of.
const CHUNK: usize = 10_000;
/// `RD_KAFKA_MSG_F_COPY`: librdkafka has copied key and value when the call returns.
const COPY: c_int = 2;
/// `RD_KAFKA_RESP_ERR__INVALID_ARG`
const INVALID_ARG: c_int = -186;

/// `RD_KAFKA_RESP_ERR__FAIL`
const FAIL: c_int = -196;

/// `rd_kafka_message_t` of librdkafka's public header.
#[repr(C)]
struct Message {
    err: c_int,
    topic: *mut c_void,
    partition: i32,
    value: *const c_void,
    value_len: usize,
    key: *const c_void,
    key_len: usize,
    offset: i64,
    private: *mut c_void,
}

/// Messages that another thread's interpreter need not know of.
struct Chunk(Vec<Message>);

// SAFETY: the pointers lead to bytes objects, which never change and outlive the chunk, or are null.
unsafe impl Send for Chunk {}

type OnNew = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void, *mut c_char, usize) -> c_int;
type AddOnNew = unsafe extern "C" fn(*mut c_void, *const c_char, OnNew, *mut c_void) -> c_int;
type TopicNew = unsafe extern "C" fn(*mut c_void, *const c_char, *mut c_void) -> *mut c_void;
type TopicDestroy = unsafe extern "C" fn(*mut c_void);
type ProduceBatch = unsafe extern "C" fn(*mut c_void, i32, c_int, *mut Message, c_int) -> c_int;

#[derive(Clone, Copy)]
struct Functions {
    add_on_new: AddOnNew,
    topic_new: TopicNew,
    topic_destroy: TopicDestroy,
    produce_batch: ProduceBatch,
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
thread_local!(static NEWEST: Cell<usize> = const { Cell::new(0) });

/// Note the client that this thread makes.
///
/// # Safety
/// It reads nothing that it is given, and keeps `client` as a number.
unsafe extern "C" fn on_new(client: *mut c_void, _: *const c_void, _: *mut c_void, _: *mut c_char, _: usize) -> c_int {
    NEWEST.with(|newest| newest.set(client as usize));
    0
}

/// Called by librdkafka when it loads this extension as a plugin of a client.
///
/// # Safety
/// `conf` is the configuration that is being made, and `error` null or room for `size` bytes, as rdkafka_plugin.c has it.
#[no_mangle]
pub unsafe extern "C" fn conf_init(conf: *mut c_void, _: *mut *mut c_void, error: *mut c_char, size: usize) -> c_int {
    if !error.is_null() && size > 0 {
        // SAFETY: there is room for one byte. librdkafka reads a text here if this fails.
        unsafe { *error = 0 };
    }
    match FUNCTIONS.get() {
        // SAFETY: the function is librdkafka's, which copies the name, and `on_new` stays: an extension is never unloaded.
        Some(functions) => unsafe { (functions.add_on_new)(conf, c"pipeline".as_ptr(), on_new, null_mut()) },
        None => INVALID_ARG,
    }
}

/// A topic of a client: librdkafka's reference to it, for one call of `produce`.
struct Topic {
    address: usize,
    destroy: TopicDestroy,
}

impl Drop for Topic {
    fn drop(&mut self) {
        // SAFETY: the address is from `topic_new`, and given back once. The client is there: its owner borrows its object.
        unsafe { (self.destroy)(self.address as *mut c_void) }
    }
}

#[pyclass(frozen, module = "pipeline_native")]
pub struct BatchProducer {
    /// The `rd_kafka_t` of the client.
    client: usize,
    /// confluent_kafka's Producer, which destroys the client when it is freed itself.
    producer: Py<PyAny>,
}

#[pymethods]
impl BatchProducer {
    /// Tell the addresses of librdkafka's functions, and forget the client that this thread made last.
    #[staticmethod]
    fn expect(add_on_new: usize, topic_new: usize, topic_destroy: usize, produce_batch: usize) -> PyResult<()> {
        if [add_on_new, topic_new, topic_destroy, produce_batch].contains(&0) {
            return Err(PyRuntimeError::new_err("a function of librdkafka has no address"));
        }
        // SAFETY: the caller looked the addresses up by the functions' names, in the library whose types these are.
        FUNCTIONS.get_or_init(|| unsafe {
            Functions {
                add_on_new: transmute::<usize, AddOnNew>(add_on_new),
                topic_new: transmute::<usize, TopicNew>(topic_new),
                topic_destroy: transmute::<usize, TopicDestroy>(topic_destroy),
                produce_batch: transmute::<usize, ProduceBatch>(produce_batch),
            }
        });
        NEWEST.with(|newest| newest.set(0));
        Ok(())
    }

    /// The client that this thread has made since `expect`, which is that of `producer`; None if there was none.
    #[staticmethod]
    fn of(producer: Py<PyAny>) -> Option<BatchProducer> {
        let client = NEWEST.with(|newest| newest.replace(0));
        (client != 0).then_some(BatchProducer { client, producer })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.producer) // its callbacks may lead back to this object
    }

    /// Enqueue messages with `keys[start:end]` and `values[start:end]`. Returns the number of the first that is not enqueued,
    /// and its error, or `end` and 0.
    #[allow(clippy::too_many_arguments)] // Python's call has them all
    fn produce(
        &self,
        py: Python<'_>,
        topic: &str,
        partition: i32,
        keys: &Bound<'_, PySequence>,
        values: &Bound<'_, PySequence>,
        start: usize,
        end: usize,
    ) -> PyResult<(usize, i32)> {
        let functions = *FUNCTIONS.get().ok_or_else(|| PyRuntimeError::new_err("librdkafka's functions are not known"))?;
        let name = CString::new(topic)?;
        let client = self.client;
        // SAFETY: the client lives as long as `producer`, which `self` has, and librdkafka copies the name.
        let address =
            py.detach(|| unsafe { (functions.topic_new)(client as *mut c_void, name.as_ptr(), null_mut()) } as usize);
        if address == 0 {
            return Ok((start, INVALID_ARG));
        }
        let topic = Topic { address, destroy: functions.topic_destroy };
        let mut at = start;
        while at < end {
            let to = (at + CHUNK).min(end);
            let (chunk, _held) = gather(keys, values, at, to)?;
            let error = py.detach(|| enqueue(functions.produce_batch, &topic, partition, chunk));
            if let Some((number, error)) = error {
                return Ok((at + number, error));
            }
            at = to;
        }
        Ok((end.max(start), 0))
    }
}

/// Return messages as librdkafka takes them, and what keeps their bytes alive.
fn gather<'py>(
    keys: &Bound<'py, PySequence>,
    values: &Bound<'py, PySequence>,
    start: usize,
    end: usize,
) -> PyResult<(Chunk, Vec<Bound<'py, PyBytes>>)> {
    let mut chunk = Vec::with_capacity(end - start);
    let mut held = Vec::with_capacity(2 * (end - start));
    let mut hold = |bytes: Bound<'py, PyAny>| -> PyResult<(*const c_void, usize)> {
        if bytes.is_none() {
            return Ok((null_mut(), 0));
        }
        let bytes = bytes.cast_into::<PyBytes>()?;
        let place = (bytes.as_bytes().as_ptr().cast(), bytes.as_bytes().len());
        held.push(bytes);
        Ok(place)
    };
    for number in start..end {
        let (key, key_len) = hold(keys.get_item(number)?)?;
        let (value, value_len) = hold(values.get_item(number)?)?;
        let (topic, private) = (null_mut(), null_mut());
        chunk.push(Message { err: 0, topic, partition: 0, value, value_len, key, key_len, offset: 0, private });
    }
    Ok((Chunk(chunk), held))
}

/// Enqueue a chunk; return the number and error of the first message that is not enqueued.
fn enqueue(call: ProduceBatch, topic: &Topic, partition: i32, chunk: Chunk) -> Option<(usize, i32)> {
    let Chunk(mut messages) = chunk;
    // SAFETY: the topic is there, the messages are as librdkafka's header describes them, and it copies what they point to.
    let sent =
        unsafe { call(topic.address as *mut c_void, partition, COPY, messages.as_mut_ptr(), messages.len() as c_int) };
    if sent as usize == messages.len() {
        return None;
    }
    let first = messages.iter().position(|message| message.err != 0);
    Some(first.map_or((0, FAIL), |number| (number, messages[number].err)))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<BatchProducer>()
}
