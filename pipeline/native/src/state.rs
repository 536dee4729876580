//! States of series and how deltas merge into them: what `pipeline/core/kinds` says, number for number.

use crate::wire::*;
use num_bigint::BigInt;
use num_traits::{FromPrimitive, ToPrimitive};
use pyo3::IntoPyObject;
use std::cmp::Ordering;

/// How deltas of a view merge. A kind whose state is a Python object would get an arm here and a `State` of its own, whose
/// references are taken and dropped outside of every lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Sum,
    Min,
    Max,
    Mean,
    Last,
}

impl Kind {
    pub fn of(name: &str) -> Option<Kind> {
        [Kind::Sum, Kind::Min, Kind::Max, Kind::Mean, Kind::Last].into_iter().find(|kind| kind.name() == name)
    }

    pub fn name(self) -> &'static str {
        ["sum", "min", "max", "mean", "last"][self as usize]
    }

    /// What its deltas are recorded by.
    pub fn method(self) -> &'static str {
        ["add", "observe", "observe", "observe", "set"][self as usize]
    }

    /// The columns of its states in a batch.
    pub fn width(self) -> usize {
        [1, 1, 1, 2, 3][self as usize]
    }
}

#[derive(Debug, Clone)]
pub struct Stamped {
    pub ts_ms: i64,
    pub recorded_ns: i64,
    /// A text, number, bool, or `Empty` for None.
    pub value: State,
}

/// A number as most deltas are. Beside `State` because it can be passed in registers, which shows where one is recorded.
#[derive(Clone, Copy, IntoPyObject)]
pub enum Number {
    I(i64),
    F(f64),
}

impl From<Number> for State {
    #[inline(always)]
    fn from(number: Number) -> State {
        match number {
            Number::I(i) => I(i),
            Number::F(f) => F(f),
        }
    }
}

/// The state of a series, one delta, or what a `last` view holds. The count of a mean stands beside it.
///
/// No variant has a payload of less than eight bytes: it would lie where the others have none, and moving any would cost more.
#[derive(Debug, Clone, Default)]
pub enum State {
    #[default]
    Empty,
    I(i64),
    F(f64),
    /// A float sum and its error term.
    P(f64, f64),
    B(Box<BigInt>),
    False,
    True,
    S(Box<str>),
    L(Box<Stamped>),
}

use State::*;

/// An int of any size, in the one form that it has.
pub fn int_state(v: BigInt) -> State {
    match v.to_i64() {
        Some(i) => I(i),
        None => B(Box::new(v)),
    }
}

pub fn int_bytes(i: i64) -> usize {
    (64 - i.unsigned_abs().leading_zeros() as usize).div_ceil(8)
}

fn big_bytes(b: &BigInt) -> usize {
    (b.bits() as usize).div_ceil(8)
}

impl State {
    /// Add a float or int as most of them are, to one of its own type with nothing rounded away; false: `merge` must do it.
    #[inline(always)]
    pub fn add_simply(&mut self, kind: Kind, delta: &State) -> bool {
        if !matches!(kind, Kind::Sum | Kind::Mean) {
            return false;
        }
        match (self, delta) {
            (F(a), F(b)) => add_exact(a, *b),
            (F(a), I(b)) => b.unsigned_abs() <= 1 << 53 && add_exact(a, *b as f64),
            (I(a), I(b)) => match a.checked_add(*b) {
                Some(total) => {
                    *a = total;
                    true
                }
                None => false,
            },
            _ => false,
        }
    }

    /// Merge a delta, or a state, into this one.
    pub fn merge(&mut self, kind: Kind, other: State) {
        let takes_over = match kind {
            _ if matches!(self, Empty) => true,
            Kind::Sum | Kind::Mean => return self.add(kind, &other),
            Kind::Min => other.compare(self) == Ordering::Less,
            Kind::Max => other.compare(self) == Ordering::Greater,
            Kind::Last => other.is_newer(self),
        };
        if takes_over {
            *self = other;
        }
    }

    fn add(&mut self, kind: Kind, other: &State) {
        if self.add_simply(kind, other) {
            return;
        }
        let floats = if self.is_int() && other.is_int() { None } else { self.as_floats().zip(other.as_floats()) };
        *self = floats.and_then(|(a, b)| two_sum(a, b)).unwrap_or_else(|| exactly(self, other));
    }

    fn is_int(&self) -> bool {
        matches!(self, I(_) | B(_))
    }

    /// A number as a float and what it leaves; None where it is beyond all floats.
    fn as_floats(&self) -> Option<(f64, f64)> {
        match self {
            F(f) => Some((*f, 0.0)),
            P(high, low) => Some((*high, *low)),
            I(i) => {
                let high = *i as f64;
                Some((high, (*i as i128 - high as i128) as f64))
            }
            B(b) => {
                let high = b.to_f64().filter(|f| f.is_finite())?;
                Some((high, (&**b - BigInt::from_f64(high)?).to_f64()?))
            }
            _ => None,
        }
    }

    fn compare(&self, other: &State) -> Ordering {
        match (self, other) {
            (I(a), I(b)) => a.cmp(b),
            (F(a), F(b)) => a.partial_cmp(b).unwrap_or(Ordering::Equal),
            (B(a), B(b)) => a.cmp(b),
            (I(a), B(b)) => BigInt::from(*a).cmp(b),
            // Numbers beyond 128 bits become the last ones within, which no 64-bit int is.
            (I(a), F(b)) => {
                (*a as i128).cmp(&(*b as i128)).then_with(|| 0.0.partial_cmp(&b.fract()).unwrap_or(Ordering::Equal))
            }
            // Beyond 64 bits what is behind the point decides nothing.
            (B(a), F(b)) => BigInt::from_f64(b.trunc()).map_or(Ordering::Equal, |b| (**a).cmp(&b)),
            (F(_), I(_) | B(_)) | (B(_), I(_)) => other.compare(self).reverse(),
            _ => Ordering::Equal,
        }
    }

    fn is_newer(&self, other: &State) -> bool {
        let (L(a), L(b)) = (self, other) else { return false };
        let newness = (a.ts_ms, a.recorded_ns).cmp(&(b.ts_ms, b.recorded_ns)).then_with(|| {
            let (mut mine, mut others) = (Vec::new(), Vec::new());
            a.value.write(&mut mine);
            b.value.write(&mut others);
            mine.cmp(&others)
        });
        newness == Ordering::Greater
    }

    /// Write a value, or a pair or triple of them.
    #[inline]
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            F(f) => write_float(out, *f),
            I(i) => write_int(out, *i),
            P(high, low) => {
                write_array_head(out, 2);
                write_float(out, *high);
                write_float(out, *low);
            }
            B(b) => write_big(out, b),
            Empty => out.push(0xc0),
            False => out.push(0xc2),
            True => out.push(0xc3),
            S(s) => write_str(out, s),
            L(stamped) => {
                write_array_head(out, 3);
                write_int(out, stamped.ts_ms);
                write_int(out, stamped.recorded_ns);
                stamped.value.write(out);
            }
        }
    }

    /// What it is charged for in a batch: `value_bytes` of `pipeline/publisher/table.py`.
    #[inline]
    pub fn size(&self) -> usize {
        match self {
            I(i) => int_bytes(*i),
            B(b) => big_bytes(b),
            S(s) => s.len(),
            L(s) => int_bytes(s.ts_ms) + int_bytes(s.recorded_ns) + s.value.size(),
            _ => 0,
        }
    }

    /// The bytes of memory that it takes beyond its own.
    #[inline]
    pub fn heap_bytes(&self) -> usize {
        match self {
            B(b) => 56 + big_bytes(b),
            S(text) => 16 + text.len(),
            L(s) => 64 + s.value.heap_bytes(),
            _ => 0,
        }
    }
}

/// Add to a float what leaves no error term; false: it would.
#[inline(always)]
fn add_exact(a: &mut f64, b: f64) -> bool {
    let total = *a + b;
    let part = total - *a;
    let exact = (*a - (total - part)) + (b - part) == 0.0; // not so for NaN
    if exact {
        *a = total;
    }
    exact
}

/// The sum of two floats with their error terms (Knuth's TwoSum); None where no float can hold it.
#[inline]
fn two_sum(a: (f64, f64), b: (f64, f64)) -> Option<State> {
    let total = a.0 + b.0;
    let part = total - a.0;
    let error = (a.0 - (total - part)) + (b.0 - part) + (a.1 + b.1);
    if error == 0.0 {
        return Some(F(total)); // not so for NaN, which an overflow leaves
    }
    let high = total + error;
    let part = high - total;
    let low = (total - (high - part)) + (error - part);
    if low == 0.0 {
        return Some(F(high));
    }
    low.is_finite().then_some(P(high, low))
}

/// The sum as an int, of what is of floats without what is behind the point.
#[cold]
fn exactly(a: &State, b: &State) -> State {
    let mut sum = BigInt::default();
    for state in [a, b] {
        match state {
            I(i) => sum += *i,
            B(b) => sum += &**b,
            F(f) => sum += BigInt::from_f64(*f).unwrap_or_default(),
            P(high, low) => sum += BigInt::from_f64(*high).unwrap_or_default() + BigInt::from_f64(*low).unwrap_or_default(),
            _ => {}
        }
    }
    int_state(sum)
}
