//! States of histograms: what `pipeline/core/kinds/histogram.py` says, number for number.

use crate::state::{Kind, State};
use crate::wire::*;
use num_bigint::{BigInt, BigUint};
use num_traits::ToPrimitive;
use std::cmp::Ordering;
use std::sync::LazyLock;

const SCHEMA_MAX: u32 = 8;
const STEPS: usize = 1 << SCHEMA_MAX;
const BUCKETS_MAX: usize = 160;
/// Buckets for which room is made at once.
const ROOM: usize = 4;
/// The least positive number that has a bucket: 2**-1022.
const LEAST: f64 = f64::MIN_POSITIVE;

/// Powers of the finest base from 1 to below 2, times 2**63, rounded down; and by the eight bits behind the first one, how
/// many of them are below all numbers that begin with those.
struct Bounds {
    powers: [u64; STEPS],
    below: [u8; STEPS],
}

static BOUNDS: LazyLock<Bounds> = LazyLock::new(|| {
    const PRECISION: u32 = 128;
    let root = (0..SCHEMA_MAX).fold(BigUint::from(2u32) << PRECISION, |root, _| (root << PRECISION).sqrt());
    let mut exact = BigUint::from(1u32) << PRECISION;
    let mut bounds = Bounds { powers: [0; STEPS], below: [0; STEPS] };
    for power in &mut bounds.powers {
        *power = (&exact >> (PRECISION - 63)).to_u64().unwrap_or(u64::MAX);
        exact = (&exact * &root) >> PRECISION;
    }
    for (first, below) in bounds.below.iter_mut().enumerate() {
        let least = 1 << 63 | (first as u64) << 55;
        *below = bounds.powers.iter().filter(|power| **power < least).count() as u8;
        // never all of them
    }
    bounds
});

/// How many bounds are below a number, of which there are the first 64 bits, the highest of them set.
#[inline]
fn bounds_below(top: u64) -> usize {
    let bounds = &*BOUNDS;
    let mut place = bounds.below[(top >> 55) as usize & (STEPS - 1)] as usize;
    while place < STEPS && bounds.powers[place] < top {
        place += 1;
    }
    place
}

/// Where a number is counted, with the finest schema.
#[derive(Clone, Copy)]
enum Place {
    Zero,
    Positive(i32),
    Negative(i32),
}

#[inline]
fn signed(negative: bool, exponent: i32, below: usize) -> Place {
    let index = (exponent - 1) * STEPS as i32 + below as i32 - 1;
    if negative {
        Place::Negative(index)
    } else {
        Place::Positive(index)
    }
}

#[inline]
fn place_of(value: &State) -> Place {
    match value {
        State::F(f) if f.abs() >= LEAST => {
            let bits = f.to_bits();
            let exponent = (bits >> 52 & 0x7ff) as i32 - 1022;
            signed(*f < 0.0, exponent, bounds_below(1 << 63 | bits << 11))
        }
        State::I(i) if *i != 0 => {
            let zeros = i.unsigned_abs().leading_zeros();
            signed(*i < 0, 64 - zeros as i32, bounds_below(i.unsigned_abs() << zeros))
        }
        State::B(b) => place_of_big(b),
        _ => Place::Zero,
    }
}

#[cold]
fn place_of_big(b: &BigInt) -> Place {
    let whole = b.magnitude();
    let more = whole.bits().saturating_sub(64); // an int of 64 bits at least
    let top = (whole >> more).to_u64().unwrap_or(u64::MAX);
    let mut below = bounds_below(top);
    if more > 0 && below < STEPS && BOUNDS.powers[below] == top {
        let bound = BigUint::from(1u32) << ((whole.bits() - 1) * STEPS as u64 + below as u64);
        below += (whole.pow(STEPS as u32) > bound) as usize; // its other bits decide, which is rare
    }
    signed(b.sign() == num_bigint::Sign::Minus, whole.bits() as i32, below)
}

#[derive(Clone, Copy, Debug)]
#[repr(C, packed(4))]
struct Bucket {
    count: u64,
    index: i32,
}

/// Buckets that hold something, in the order of their indexes.
#[derive(Clone, Debug, Default)]
struct Buckets(Vec<Bucket>);

impl Buckets {
    #[inline]
    fn find(&self, index: i32) -> Result<usize, usize> {
        self.0.binary_search_by(|bucket| { bucket.index }.cmp(&index))
    }

    #[inline]
    fn add(&mut self, index: i32, count: u64) {
        match self.find(index) {
            Ok(at) => self.0[at].count += count,
            Err(at) => {
                if self.0.len() == self.0.capacity() {
                    self.0.reserve_exact(ROOM);
                }
                self.0.insert(at, Bucket { count, index });
            }
        }
    }

    fn halve(&mut self) {
        let mut kept = 0;
        for at in 0..self.0.len() {
            let bucket = Bucket { index: self.0[at].index >> 1, ..self.0[at] };
            if kept > 0 && { self.0[kept - 1].index } == { bucket.index } {
                self.0[kept - 1].count += bucket.count;
            } else {
                self.0[kept] = bucket;
                kept += 1;
            }
        }
        self.0.truncate(kept);
    }

    fn heap_bytes(&self) -> usize {
        allocated(self.0.capacity() * std::mem::size_of::<Bucket>())
    }

    /// The bytes by which it grows if it has to take in one bucket more.
    fn growth(&self) -> usize {
        allocated((self.0.capacity() + ROOM) * std::mem::size_of::<Bucket>()) - self.heap_bytes()
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut before = None;
        for Bucket { index, count } in self.0.iter().copied() {
            write_int(out, before.map_or(index, |before| index - before - 1) as i64);
            write_uint(out, count);
            before = Some(index);
        }
    }
}

/// What the allocator takes for so many bytes.
fn allocated(n: usize) -> usize {
    if n == 0 {
        0
    } else {
        ((n + 8 + 15) & !15).max(32)
    }
}

#[derive(Clone, Debug)]
pub struct Histogram {
    pub total: State,
    pub least: State,
    pub most: State,
    pub zeros: u64,
    positive: Buckets,
    negative: Buckets,
    pub schema: i8,
}

impl Histogram {
    /// The state of one delta, which is a number.
    pub fn of(delta: State) -> Histogram {
        let mut new = Histogram {
            total: delta.clone(),
            least: delta.clone(),
            most: delta.clone(),
            zeros: 0,
            positive: Buckets::default(),
            negative: Buckets::default(),
            schema: SCHEMA_MAX as i8,
        };
        new.count(&delta);
        new
    }

    #[inline]
    pub fn observe(&mut self, delta: &State) {
        if !self.total.add_simply(Kind::Sum, delta) {
            self.total.merge(Kind::Sum, delta.clone());
        }
        if delta.compare(&self.least) == Ordering::Less {
            self.least = delta.clone();
        }
        if delta.compare(&self.most) == Ordering::Greater {
            self.most = delta.clone();
        }
        self.count(delta);
    }

    fn coarser_by(&self) -> u32 {
        (SCHEMA_MAX as i8 - self.schema) as u32
    }

    #[inline]
    fn count(&mut self, delta: &State) {
        let by = self.coarser_by();
        match place_of(delta) {
            Place::Zero => self.zeros += 1,
            Place::Positive(index) => self.positive.add(index >> by, 1),
            Place::Negative(index) => self.negative.add(index >> by, 1),
        }
        self.settle();
    }

    #[inline]
    fn settle(&mut self) {
        while self.positive.0.len() + self.negative.0.len() > BUCKETS_MAX {
            self.halve();
        }
    }

    #[cold]
    fn halve(&mut self) {
        self.schema -= 1;
        self.positive.halve();
        self.negative.halve();
    }

    pub fn merge(&mut self, other: Histogram) {
        let schema = self.schema.min(other.schema);
        while self.schema > schema {
            self.halve();
        }
        let by = (other.schema - schema) as u32;
        for (mine, others) in [(&mut self.positive, other.positive), (&mut self.negative, other.negative)] {
            for bucket in others.0 {
                mine.add(bucket.index >> by, bucket.count);
            }
        }
        self.total.merge(Kind::Sum, other.total);
        self.least.merge(Kind::Min, other.least);
        self.most.merge(Kind::Max, other.most);
        self.zeros += other.zeros;
        self.settle();
    }

    pub fn heap_bytes(&self) -> usize {
        let numbers = self.total.heap_bytes() + self.least.heap_bytes() + self.most.heap_bytes();
        allocated(std::mem::size_of::<Histogram>()) + numbers + self.positive.heap_bytes() + self.negative.heap_bytes()
    }

    /// The bytes by which it can grow when a delta is observed.
    #[inline]
    pub fn growth(&self, delta: &State) -> usize {
        let (buckets, index) = match place_of_if_full(self, delta) {
            Some(found) => found,
            None => return 3 * delta.heap_bytes(),
        };
        let new = buckets.find(index >> self.coarser_by()).is_err();
        3 * delta.heap_bytes() + if new { buckets.growth() } else { 0 }
    }

    /// The bytes that a new one takes.
    pub fn first_bytes(delta: &State) -> usize {
        allocated(std::mem::size_of::<Histogram>()) + Buckets::default().growth() + 3 * delta.heap_bytes()
    }

    /// Write schema and buckets: see `pack` in Python.
    pub fn pack(&self, out: &mut Vec<u8>) {
        write_array_head(out, 3 + 2 * (self.positive.0.len() + self.negative.0.len()));
        write_int(out, self.schema as i64);
        write_uint(out, self.zeros);
        write_uint(out, self.negative.0.len() as u64);
        self.negative.write(out);
        self.positive.write(out);
    }

    /// What it is charged for in a batch: `Histogram.size` in Python.
    pub fn size(&self) -> usize {
        let mut packed = Vec::with_capacity(64);
        self.pack(&mut packed);
        32 + self.total.size() + self.least.size() + self.most.size() + packed.len()
    }

    /// Index and count of the positive buckets, and of the negative ones.
    pub fn buckets(&self) -> [Vec<(i32, u64)>; 2] {
        [&self.positive, &self.negative].map(|buckets| buckets.0.iter().map(|it| (it.index, it.count)).collect())
    }
}

/// The buckets that a delta goes to, if they would have to grow for a new one; and its index, with the finest schema.
#[inline]
fn place_of_if_full<'a>(of: &'a Histogram, delta: &State) -> Option<(&'a Buckets, i32)> {
    let full = |buckets: &Buckets| buckets.0.len() == buckets.0.capacity();
    if !full(&of.positive) && !full(&of.negative) {
        return None;
    }
    match place_of(delta) {
        Place::Positive(index) if full(&of.positive) => Some((&of.positive, index)),
        Place::Negative(index) if full(&of.negative) => Some((&of.negative, index)),
        _ => None,
    }
}
