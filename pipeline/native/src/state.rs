//! States of series and how deltas merge into them: what `pipeline/core/kinds` says, number for number.

use crate::histogram::Histogram;
use crate::sketches::{Distinct, TopK};
use crate::wire::*;
use num_bigint::BigInt;
use num_traits::{FromPrimitive, ToPrimitive};
use std::cmp::Ordering;

/// How deltas of a view merge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Sum,
    Min,
    Max,
    Mean,
    Last,
    Histogram,
    Distinct,
    TopK,
}

impl Kind {
    pub fn of(name: &str) -> Option<Kind> {
        Some(match name {
            "sum" => Kind::Sum,
            "min" => Kind::Min,
            "max" => Kind::Max,
            "mean" => Kind::Mean,
            "last" => Kind::Last,
            "histogram" => Kind::Histogram,
            "distinct" => Kind::Distinct,
            "topk" => Kind::TopK,
            _ => return None,
        })
    }

    pub fn name(self) -> &'static str {
        ["sum", "min", "max", "mean", "last", "histogram", "distinct", "topk"][self as usize]
    }

    /// The columns of its states in a batch.
    pub fn width(self) -> usize {
        [1, 1, 1, 2, 3, 4, 1, 3][self as usize]
    }
}

/// A text, number, bool or None that a `last` view holds.
#[derive(Debug, Clone)]
pub enum Value {
    Nil,
    Bool(bool),
    I(i64),
    F(f64),
    B(Box<BigInt>),
    S(Box<str>),
}

impl Value {
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Value::Nil => out.push(0xc0),
            Value::Bool(b) => out.push(0xc2 + *b as u8),
            Value::I(i) => write_int(out, *i),
            Value::F(f) => write_float(out, *f),
            Value::B(b) => write_big(out, b),
            Value::S(s) => write_str(out, s),
        }
    }

    fn size(&self) -> usize {
        match self {
            Value::I(i) => int_bytes(*i),
            Value::B(b) => big_bytes(b),
            Value::S(s) => s.len(),
            _ => 0,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Stamped {
    pub ts_ms: i64,
    pub recorded_ns: i64,
    pub value: Value,
}

/// The state of a series, or one delta. The count of a mean stands beside it.
#[derive(Debug, Clone)]
pub enum State {
    Empty,
    I(i64),
    F(f64),
    /// A float sum and its error term.
    P(f64, f64),
    B(Box<BigInt>),
    L(Box<Stamped>),
    H(Box<Histogram>),
    D(Box<Distinct>),
    T(Box<TopK>),
}

use State::*;

/// An int of any size, in the one form that it has.
pub fn int_state(v: BigInt) -> State {
    match v.to_i64() {
        Some(i) => I(i),
        None => B(Box::new(v)),
    }
}

fn int_bytes(i: i64) -> usize {
    (64 - i.unsigned_abs().leading_zeros() as usize).div_ceil(8)
}

fn big_bytes(b: &BigInt) -> usize {
    (b.bits() as usize).div_ceil(8)
}

impl State {
    /// Add a float or int as most of them are: to one of its own type with nothing rounded away, or a float to a float that
    /// has an error term. False: `merge` must do it.
    #[inline(always)]
    pub fn add_simply(&mut self, kind: Kind, delta: &State) -> bool {
        if !matches!(kind, Kind::Sum | Kind::Mean) {
            return false;
        }
        match (&mut *self, delta) {
            (F(a), F(b)) => add_exact(a, *b),
            (P(high, low), F(b)) => match two_sum((*high, *low), (*b, 0.0)) {
                Some(P(new_high, new_low)) => {
                    (*high, *low) = (new_high, new_low);
                    true
                }
                _ => false,
            },
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
        match kind {
            Kind::Sum | Kind::Mean => self.add(other),
            Kind::Min => {
                if matches!(self, Empty) || other.compare(self) == Ordering::Less {
                    *self = other
                }
            }
            Kind::Max => {
                if matches!(self, Empty) || other.compare(self) == Ordering::Greater {
                    *self = other
                }
            }
            Kind::Last => self.set(other),
            Kind::Histogram => match (&mut *self, other) {
                (H(a), H(b)) => a.merge(*b),
                (H(a), delta) => a.observe(&delta),
                (_, H(b)) => *self = H(b),
                (_, delta) => *self = H(Box::new(Histogram::of(delta))),
            },
            Kind::Distinct => match (&mut *self, other) {
                (D(a), D(b)) => a.merge(*b),
                (D(a), I(hash)) => a.observe(hash),
                (_, I(hash)) => *self = D(Box::new(Distinct::of(hash))),
                (_, other) => *self = other,
            },
            Kind::TopK => match (&mut *self, other) {
                (T(a), T(b)) => a.merge(&b),
                (_, other) => *self = other,
            },
        }
    }

    fn add(&mut self, other: State) {
        match (&mut *self, other) {
            (I(a), I(b)) => match a.checked_add(b) {
                Some(sum) => *a = sum,
                None => *self = int_state(BigInt::from(*a) + b),
            },
            (F(a), F(b)) => *self = two_sum((*a, 0.0), (b, 0.0)).unwrap_or_else(|| exactly(&F(*a), &F(b))),
            (Empty, other) => *self = other,
            (_, other) => self.add_mixed(other),
        }
    }

    #[cold]
    fn add_mixed(&mut self, other: State) {
        if self.is_int() && other.is_int() {
            *self = exactly(self, &other);
        } else {
            let floats = self.as_floats().zip(other.as_floats());
            *self = floats.and_then(|(a, b)| two_sum(a, b)).unwrap_or_else(|| exactly(self, &other));
        }
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

    pub fn compare(&self, other: &State) -> Ordering {
        match (self, other) {
            (I(a), I(b)) => a.cmp(b),
            (F(a), F(b)) => a.partial_cmp(b).unwrap_or(Ordering::Equal),
            (I(a), F(b)) => compare_int(*a, *b),
            (F(a), I(b)) => compare_int(*b, *a).reverse(),
            (B(a), B(b)) => a.cmp(b),
            (B(a), I(b)) => (**a).cmp(&BigInt::from(*b)),
            (I(a), B(b)) => BigInt::from(*a).cmp(b),
            (B(a), F(b)) => compare_big(a, *b),
            (F(a), B(b)) => compare_big(b, *a).reverse(),
            _ => Ordering::Equal,
        }
    }

    fn set(&mut self, other: State) {
        if let (L(a), L(b)) = (&*self, &other) {
            let newness = (a.ts_ms, a.recorded_ns).cmp(&(b.ts_ms, b.recorded_ns)).then_with(|| {
                let (mut mine, mut others) = (Vec::new(), Vec::new());
                a.value.write(&mut mine);
                b.value.write(&mut others);
                mine.cmp(&others)
            });
            if newness != Ordering::Less {
                return;
            }
        }
        *self = other;
    }

    /// Write a number, or a pair of them.
    #[inline]
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            F(f) => write_float(out, *f),
            I(i) => write_int(out, *i),
            P(high, low) => {
                out.push(0x92);
                write_float(out, *high);
                write_float(out, *low);
            }
            B(b) => write_big(out, b),
            L(stamped) => stamped.value.write(out),
            Empty | H(_) | D(_) | T(_) => out.push(0xc0), // these have columns of their own
        }
    }

    /// Write one delta, as a ring has it.
    #[inline]
    pub fn write_delta(&self, out: &mut Vec<u8>) {
        if let T(one) = self {
            return one.write_delta(out);
        }
        if let L(stamped) = self {
            out.push(0x93);
            write_int(out, stamped.ts_ms);
            write_int(out, stamped.recorded_ns);
        }
        self.write(out);
    }

    /// What it is charged for in a batch: `Kind.size` in Python.
    #[inline]
    pub fn size(&self) -> usize {
        match self {
            I(i) => int_bytes(*i),
            B(b) => big_bytes(b),
            L(s) => int_bytes(s.ts_ms) + int_bytes(s.recorded_ns) + s.value.size(),
            H(h) => h.size(),
            D(d) => d.size(),
            T(t) => t.size(),
            _ => 0,
        }
    }

    /// The bytes of memory that it takes beyond its own.
    #[inline]
    pub fn heap_bytes(&self) -> usize {
        match self {
            B(b) => 56 + big_bytes(b),
            L(s) => {
                64 + match &s.value {
                    Value::S(text) => 16 + text.len(),
                    Value::B(b) => 56 + big_bytes(b),
                    _ => 0,
                }
            }
            H(h) => h.heap_bytes(),
            D(d) => d.heap_bytes(),
            T(t) => t.heap_bytes(),
            _ => 0,
        }
    }

    /// The bytes by which merging a delta can make what it takes beyond its own memory larger, and how many of these the
    /// state gives back.
    #[inline(always)]
    pub fn growth(&self, kind: Kind, delta: &State) -> (usize, usize) {
        if !matches!(kind, Kind::Histogram | Kind::Distinct | Kind::TopK) {
            return match delta.heap_bytes() {
                0 => (0, 0),
                more => (more, self.heap_bytes()),
            };
        }
        match self {
            H(h) => (h.growth(delta), 0),
            D(d) => (d.growth(), 0),
            T(t) => match delta {
                T(delta) => (t.growth(delta), 0),
                _ => (0, 0),
            },
            _ => match kind {
                Kind::Distinct => (Distinct::first_bytes(), 0),
                Kind::TopK => (delta.heap_bytes(), 0),
                _ => (Histogram::first_bytes(delta), 0),
            },
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

fn compare_int(i: i64, f: f64) -> Ordering {
    const BEYOND: f64 = (1u64 << 63) as f64;
    if f >= BEYOND {
        return Ordering::Less;
    }
    if f < -BEYOND {
        return Ordering::Greater;
    }
    let whole = f.trunc();
    i.cmp(&(whole as i64)).then_with(|| (0.0).partial_cmp(&(f - whole)).unwrap_or(Ordering::Equal))
}

/// An int beyond 64 bits against a float: what is behind the point decides nothing.
fn compare_big(b: &BigInt, f: f64) -> Ordering {
    match BigInt::from_f64(f.trunc()) {
        Some(other) => b.cmp(&other),
        None => Ordering::Equal,
    }
}
