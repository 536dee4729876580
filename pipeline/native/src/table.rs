//! The publisher's table: states that accumulate in place, in shards.
//!
//! A series lives in the shard that its hash names, of the lane that its thread has. With the GIL there is one lane: threads
//! do not record at once anyhow. Without it there is a lane for each core, so that threads do not meet at a hot series, and
//! a drain merges what lies in several lanes.
//!
//! With a journal, each delta is also recorded to the ring of its shard, in the same hold of the lock as it is merged.
//!
//! A slot is reached by its place and under its shard's lock only, so all of this is safe Rust. No Python code runs under a
//! lock.

use crate::local::{spread, States, Totals};
use crate::ring::Ring;
use crate::state::{int_bytes, Kind, State};
use crate::wire::*;
use hashbrown::HashTable;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::cell::UnsafeCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

const SHARD_COUNT: usize = 64;
const CHUNK: usize = 32;
/// Slots that are looked at in one hold of a lock by who is not recording.
const HOLD_MAX: usize = 512;
pub const WINDOW_BYTES: usize = 8;

/// What a batch takes without its series, a group beyond its definition, and a series beyond its suffix and value, at most.
const BATCH_BYTES: usize = 280;
const GROUP_BYTES: usize = 32;
const ENTRY_BYTES: usize = 32;
const GROUP_COUNT_MAX: usize = 10_000;

/// What recording has to know of a view.
pub struct ViewInfo {
    pub id: u32,
    pub name: String,
    pub kind: Kind,
    pub monotone: bool,
    pub window_ms: i64,
    pub series_max: usize,
    /// The definition as it travels.
    pub definition: Vec<u8>,
    /// The suffix of the overflow series, without its window.
    pub overflow_labels: Vec<u8>,
    pub prefix_crc: crc32fast::Hasher,
    /// The series that count against `series_max`, of the core whose number is in the upper half.
    pub counted: AtomicU64,
    pub overflow_count: AtomicU64,
}

impl ViewInfo {
    fn series_count(&self, core: u32) -> u64 {
        let counted = self.counted.load(Relaxed);
        if (counted >> 32) as u32 == core {
            counted & 0xffff_ffff
        } else {
            0
        }
    }

    fn count(&self, core: u32, more: i64) {
        let to = |_| Some((core as u64) << 32 | (self.series_count(core) as i64 + more) as u64);
        let _ = self.counted.fetch_update(Relaxed, Relaxed, to);
    }

    /// Whether its deltas have a time.
    pub fn is_timed(&self) -> bool {
        self.window_ms > 0 || self.kind == Kind::Last
    }

    /// The start of the window of a time, in ms; 0 if the view has no windows.
    pub fn window_of(&self, ts_ms: i64) -> i64 {
        if self.window_ms == 0 {
            return 0;
        }
        ts_ms - ts_ms.rem_euclid(self.window_ms)
    }

    /// Whether a number is a delta as it is.
    #[inline]
    pub fn fits(&self, number: &State) -> bool {
        match number {
            State::F(f) => f.is_finite() && !(self.monotone && *f < 0.0) && self.kind != Kind::Last,
            State::I(i) => !(self.monotone && *i < 0) && self.kind != Kind::Last,
            _ => false,
        }
    }

    pub fn is_overflow(&self, suffix: &[u8]) -> bool {
        suffix[WINDOW_BYTES..] == *self.overflow_labels
    }
}

/// Which series: `hash` is that of the other two.
#[derive(Clone, Copy)]
pub struct Key<'a> {
    pub view: &'a Arc<ViewInfo>,
    pub suffix: &'a [u8],
    pub hash: u32,
}

struct Slot {
    view: Option<Arc<ViewInfo>>,
    suffix: Box<[u8]>,
    state: State,
    count: u64,
    hash: u32,
    crc: u32,
    /// The drain that last found something here, or before which the slot was made.
    seen: u32,
    /// The only one of its kind in this process, as long as the slot is in use; else 0.
    stamp: u64,
    /// What records of this series are known by in the rings; 0: there is no journal.
    number: u64,
}

#[derive(Default)]
pub struct Inner {
    index: HashTable<u32>,
    chunks: Vec<Vec<Slot>>,
    free: Vec<u32>,
    live: usize,
    dirty: Vec<u32>,
    waiting: u64,
    pub ring: Ring,
}

impl Inner {
    #[inline]
    fn slot(&mut self, at: u32) -> &mut Slot {
        &mut self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    #[inline(always)]
    fn find(&self, key: Key<'_>) -> Option<u32> {
        let is = |at: &u32| {
            let slot = slot_in(&self.chunks, *at);
            let same = slot.hash == key.hash && slot.view.as_ref().is_some_and(|v| Arc::ptr_eq(v, key.view));
            same && *slot.suffix == *key.suffix
        };
        self.index.find(spread(key.hash), is).copied()
    }

    #[inline]
    fn find_at(&self, place: &Place) -> Option<u32> {
        let (at, stamp) = (place.at.load(Relaxed), place.stamp.load(Relaxed));
        let slot = self.chunks.get(at as usize / CHUNK)?.get(at as usize % CHUNK)?;
        (slot.stamp == stamp && stamp != 0).then_some(at)
    }

    fn slot_count(&self) -> usize {
        self.live + self.free.len()
    }

    fn insert(&mut self, slot: Slot) -> u32 {
        let hash = slot.hash;
        let at = self.free.pop().unwrap_or(self.slot_count() as u32);
        if at as usize / CHUNK == self.chunks.len() {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        let chunk = &mut self.chunks[at as usize / CHUNK];
        match chunk.get_mut(at as usize % CHUNK) {
            Some(free) => *free = slot,
            None => chunk.push(slot),
        }
        self.live += 1;
        self.index.insert_unique(spread(hash), at, |at| spread(slot_in(&self.chunks, *at).hash));
        at
    }
}

#[inline]
fn slot_in(chunks: &[Vec<Slot>], at: u32) -> &Slot {
    &chunks[at as usize / CHUNK][at as usize % CHUNK]
}

/// A part of the table with a lock and cache lines of its own. The lock is a flag: to give it back is a store, where a mutex
/// takes a second atomic operation, a fifth of what recording costs. It is held for microseconds, so that waiting is rare.
#[repr(align(128))]
#[derive(Default)]
pub struct Shard {
    taken: AtomicBool,
    inner: UnsafeCell<Inner>,
}

// SAFETY: `inner` is reached through a `Held` only, of which there is one at a time: `try_lock` makes one if it was who turned
// `taken` from false to true, and its end turns `taken` back. Acquire and Release order what is done in between. `Inner` can
// be sent: it owns all that it holds, and what it shares, `ViewInfo`, is Sync.
unsafe impl Sync for Shard {}

pub struct Held<'a>(&'a Shard);

impl Shard {
    /// Take the lock if it is free.
    #[inline]
    pub fn try_lock(&self) -> Option<Held<'_>> {
        // A `Held` must not be made if the lock was taken: its end would give the lock back.
        if self.taken.compare_exchange(false, true, Acquire, Relaxed).is_ok() {
            Some(Held(self))
        } else {
            None
        }
    }

    /// Wait for the lock; not while attached to the interpreter, which who holds the lock may be waiting for.
    pub fn lock(&self) -> Held<'_> {
        let mut tries = 0;
        loop {
            if let Some(held) = self.try_lock() {
                return held;
            }
            tries += 1;
            match tries {
                0..100 => std::hint::spin_loop(),
                100..120 => std::thread::yield_now(),
                _ => std::thread::sleep(std::time::Duration::from_micros(50)),
            }
        }
    }
}

impl Drop for Held<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.taken.store(false, Release);
    }
}

impl std::ops::Deref for Held<'_> {
    type Target = Inner;

    #[inline]
    fn deref(&self) -> &Inner {
        // SAFETY: there is no other `Held` of this shard, and so no other reference to `inner`: see `Sync` above.
        unsafe { &*self.0.inner.get() }
    }
}

impl std::ops::DerefMut for Held<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Inner {
        // SAFETY: as in `deref`; `&mut self` keeps further references from being made through this `Held`.
        unsafe { &mut *self.0.inner.get() }
    }
}

/// Where a bound series was last found. It is there still if the slot has the same stamp.
#[derive(Default)]
pub struct Place {
    at: AtomicU32,
    stamp: AtomicU64,
}

/// What became of a delta.
pub enum Outcome {
    Done,
    /// The series is not in the table, and `insert` was not given.
    Missing,
    /// There are so many bytes too few.
    Full(usize),
    /// The view has as many series as it may have: the delta is one of the overflow series.
    Overflow,
    /// The series is new, and needs a number that the journal knows it by.
    Unnamed,
    /// There is no room in the segment of this number (-1: there is none yet) for a payload of so many bytes.
    NoRoom(i64, usize),
}

/// By shard, where its ring ends: a segment and the offset in it.
pub type Positions = BTreeMap<usize, (i64, usize)>;

/// What the journal has to know of a drain, or of a look at what waits: where the rings ended, and the numbers of series that
/// are in the table no more. All records of those lie before the positions.
pub type Cut = (Positions, Vec<u64>);

/// A series' view and suffix, its state, and how many deltas are in it.
pub type Waiting = (Arc<ViewInfo>, Box<[u8]>, State, u64);

/// Merged deltas of one series that were taken out. The suffix lies in an arena.
struct Taken {
    start: usize,
    len: usize,
    /// The place of its view among those of a drain.
    view: u32,
    partition: u32,
    hash: u32,
    count: u64,
    state: State,
}

/// What a drain has taken out.
#[derive(Default)]
struct Drained {
    taken: Vec<Taken>,
    arena: Vec<u8>,
    views: Vec<Arc<ViewInfo>>,
}

impl Drained {
    fn suffix(&self, of: &Taken) -> &[u8] {
        &self.arena[of.start..of.start + of.len]
    }
}

/// A batch to be: the groups of one partition. See `pipeline.publisher.drafts.Draft`.
#[pyclass(frozen, module = "pipeline_native")]
#[derive(Default, Clone)]
pub struct Draft {
    #[pyo3(get)]
    pub partition: u32,
    pub groups: Arc<Vec<u8>>,
    #[pyo3(get)]
    pub group_count: usize,
    #[pyo3(get)]
    pub series_count: u64,
    #[pyo3(get)]
    pub delta_count: u64,
}

#[pymethods]
impl Draft {
    #[getter]
    fn groups<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.groups)
    }
}

/// Take a lock that nothing leaves half done: a panic ends the process.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Lets one thread at a time drain, evict or take a snapshot; who holds it across a fork may do so too.
#[derive(Default)]
pub struct Gate {
    inside: Mutex<Option<u32>>,
    freed: Condvar,
}

impl Gate {
    /// Enter, waiting for others; false: this thread is inside already.
    pub fn enter(&self, me: u32) -> bool {
        let mut inside = locked(&self.inside);
        while inside.is_some_and(|other| other != me) {
            inside = self.freed.wait(inside).unwrap_or_else(|e| e.into_inner());
        }
        inside.replace(me).is_none()
    }

    /// Leave, if this thread is inside.
    pub fn leave(&self, me: u32) {
        if locked(&self.inside).take_if(|other| *other == me).is_some() {
            self.freed.notify_one();
        }
    }
}

/// How a table is to be.
#[derive(Clone, Copy)]
pub struct Config {
    pub bytes_max: usize,
    /// 0: as many as are good.
    pub shard_count: usize,
    pub lane_count: usize,
    pub local_series_max: usize,
    pub journal: bool,
}

/// Everything that a forked child must not find: it gets a new one, and never looks into the old one, of which another
/// thread may have held a lock.
pub struct Core {
    id: u32,
    /// In which process it is in use: see `crate::fork`.
    pub forks: AtomicU64,
    /// The parent's, if this is the closed one of a forked child that has neither begun anew nor gone on with it.
    pub left: Option<&'static Core>,
    pub closed: AtomicBool,
    pub shards: Box<[Shard]>,
    pub used: AtomicUsize,
    pub series: AtomicUsize,
    pub gate: Gate,
    totals: Mutex<Totals>,
    /// The totals as of the last snapshot.
    pub published: Mutex<HashMap<u32, Arc<States>>>,
    /// What was drained and not handed over, because Python had no memory for it.
    pub undelivered: Mutex<Vec<Draft>>,
    journal: bool,
    /// Numbers of series that are let go of, or were never used.
    pub gone: Mutex<Vec<u64>>,
    /// What belongs to what was handed over last.
    pub cut: Mutex<Cut>,
    drains: AtomicU32,
    bytes_max: usize,
    lane_mask: u32,
    lane_shift: u32,
}

fn malloc_bytes(n: usize) -> usize {
    ((n + 8 + 15) & !15).max(32)
}

/// What a series is charged for: its slot, its suffix, its places in the index and in the list of what is dirty.
fn slot_bytes(suffix: &[u8]) -> usize {
    std::mem::size_of::<Slot>() + 14 + malloc_bytes(suffix.len())
}

impl Core {
    pub fn new(config: Config, forks: u64, left: Option<&'static Core>) -> Core {
        static IDS: AtomicU32 = AtomicU32::new(1);
        let shards = match config.shard_count {
            0 if config.journal => 1, // each has a ring, whose segments take room on the disk
            0 => SHARD_COUNT,
            n => n.next_power_of_two(),
        };
        Core {
            id: IDS.fetch_add(1, Relaxed),
            forks: AtomicU64::new(forks),
            left,
            closed: AtomicBool::new(left.is_some()),
            shards: (0..shards * config.lane_count).map(|_| Shard::default()).collect(),
            used: AtomicUsize::new(0),
            series: AtomicUsize::new(0),
            gate: Gate::default(),
            totals: Mutex::new(Totals { by_view: HashMap::new(), room: config.local_series_max }),
            published: Mutex::default(),
            undelivered: Mutex::default(),
            journal: config.journal,
            gone: Mutex::default(),
            cut: Mutex::default(),
            drains: AtomicU32::new(0),
            bytes_max: config.bytes_max,
            lane_mask: config.lane_count as u32 - 1,
            lane_shift: shards.trailing_zeros(),
        }
    }

    /// Whether nobody but thread `me` is in the midst of anything here.
    pub fn is_whole(&self, me: u32) -> bool {
        let gate = self.gate.inside.try_lock().is_ok_and(|inside| inside.is_none_or(|other| other == me));
        let rest =
            self.totals.try_lock().is_ok() && self.published.try_lock().is_ok() && self.undelivered.try_lock().is_ok();
        gate && rest && self.shards.iter().all(|shard| shard.try_lock().is_some())
    }

    #[inline]
    pub fn lane(&self) -> u32 {
        if self.lane_mask == 0 {
            0
        } else {
            thread_index() & self.lane_mask
        }
    }

    #[inline]
    pub fn shard_number(&self, hash: u32, lane: u32) -> usize {
        let below = ((1u32 << self.lane_shift) - 1) & (hash >> 20);
        (lane << self.lane_shift | below) as usize
    }

    #[inline]
    pub fn shard(&self, hash: u32, lane: u32) -> &Shard {
        &self.shards[self.shard_number(hash, lane)]
    }

    /// Merge a delta into its series, and have the ring have it. `place` is where a bound series was last found, and `delta`
    /// stays unless it is done. `insert`: the series may be new; the number that is there, if it is not 0, becomes its own.
    #[inline(always)]
    pub fn record(
        &self,
        held: &mut Held<'_>,
        key: Key<'_>,
        delta: &mut State,
        place: Option<&Place>,
        insert: Option<&mut u64>,
    ) -> Outcome {
        let inner = &mut **held;
        let at = match place.and_then(|place| inner.find_at(place)) {
            Some(at) => at,
            None => match self.locate(inner, key, delta, place, insert) {
                Ok(at) => at,
                Err(outcome) => return outcome,
            },
        };
        let more = delta.heap_bytes();
        if more > 0 && self.used.load(Relaxed) + more > self.bytes_max + inner.slot(at).state.heap_bytes() {
            return Outcome::Full(more);
        }
        if self.journal {
            let series = inner.slot(at).number;
            if let Err(length) = inner.ring.append(series, delta) {
                return Outcome::NoRoom(inner.ring.end().map_or(-1, |end| end.0), length);
            }
        }
        let slot = inner.slot(at);
        if !slot.state.add_simply(key.view.kind, delta) {
            let was = slot.state.heap_bytes();
            slot.state.merge(key.view.kind, std::mem::replace(delta, State::Empty));
            let is = slot.state.heap_bytes();
            if is != was {
                self.used.fetch_add(is.wrapping_sub(was), Relaxed);
            }
        }
        slot.count += 1;
        if slot.count == 1 {
            inner.dirty.push(at);
        }
        inner.waiting += 1;
        Outcome::Done
    }

    #[inline(always)]
    fn locate(
        &self,
        inner: &mut Inner,
        key: Key<'_>,
        delta: &State,
        place: Option<&Place>,
        insert: Option<&mut u64>,
    ) -> Result<u32, Outcome> {
        let at = match (inner.find(key), insert) {
            (Some(at), _) => at,
            (None, None) => return Err(Outcome::Missing),
            (None, Some(number)) => self.insert(inner, key, delta, number)?,
        };
        if let Some(place) = place {
            place.stamp.store(inner.slot(at).stamp, Relaxed);
            place.at.store(at, Relaxed);
        }
        Ok(at)
    }

    #[cold]
    fn insert(&self, inner: &mut Inner, key: Key<'_>, delta: &State, number: &mut u64) -> Result<u32, Outcome> {
        let Key { view, suffix, hash } = key;
        static STAMPS: AtomicU64 = AtomicU64::new(1);
        let own = !view.is_overflow(suffix);
        if own && view.series_count(self.id) >= view.series_max as u64 {
            return Err(Outcome::Overflow);
        }
        let bytes = slot_bytes(suffix);
        if self.used.load(Relaxed) + bytes + delta.heap_bytes() > self.bytes_max {
            return Err(Outcome::Full(bytes + delta.heap_bytes()));
        }
        if self.journal && *number == 0 {
            return Err(Outcome::Unnamed);
        }
        self.used.fetch_add(bytes, Relaxed);
        self.series.fetch_add(1, Relaxed);
        view.count(self.id, own as i64);
        let mut crc = view.prefix_crc.clone();
        crc.update(suffix);
        let slot = Slot {
            view: Some(view.clone()),
            suffix: suffix.into(),
            state: State::Empty,
            count: 0,
            hash,
            crc: crc.finalize(),
            seen: self.drains.load(Relaxed),
            stamp: STAMPS.fetch_add(1, Relaxed),
            number: std::mem::take(number),
        };
        Ok(inner.insert(slot))
    }

    pub fn waiting(&self) -> u64 {
        let drained: u64 = locked(&self.undelivered).iter().map(|draft| draft.delta_count).sum();
        drained + self.shards.iter().map(|shard| shard.lock().waiting).sum::<u64>()
    }

    /// Take out what waits, but for busy partitions, merge it into the totals, and encode it as batches to be; they come behind
    /// what an earlier drain could not hand over.
    pub fn drain(&self, partition_count: u32, busy: &[u8], bytes_max: usize) -> (Vec<Draft>, Cut) {
        let (mut drained, cut) = self.take(partition_count, busy);
        if self.lane_mask > 0 {
            merge_lanes(&mut drained);
        }
        self.add_totals(&drained);
        let mut all = std::mem::take(&mut *locked(&self.undelivered));
        encode(&drained, partition_count, bytes_max, &mut all);
        (all, cut)
    }

    /// Where the rings end now.
    pub fn ends(&self) -> Positions {
        let end = |(number, shard): (usize, &Shard)| shard.lock().ring.end().map(|end| (number, end));
        self.shards.iter().enumerate().filter_map(end).collect()
    }

    /// What waits, which stays where it is, and where the rings end as of that.
    pub fn look(&self) -> (Vec<Waiting>, Cut) {
        let mut out = Vec::new();
        let gone = std::mem::take(&mut *locked(&self.gone));
        let positions = self.visit(usize::MAX, |slot| {
            out.extend(slot.view.clone().map(|view| (view, slot.suffix.clone(), slot.state.clone(), slot.count)));
            true
        });
        (out, (positions, gone))
    }

    /// Show every series in which something waits; what `keep` returns false of waits no more. Returns where the rings end.
    ///
    /// A shard's lock is held for so many series at a time.
    fn visit(&self, hold_max: usize, mut keep: impl FnMut(&mut Slot) -> bool) -> Positions {
        let mut positions = Positions::new();
        for (number, shard) in self.shards.iter().enumerate() {
            let mut inner = shard.lock();
            let dirty = std::mem::take(&mut inner.dirty);
            positions.extend(inner.ring.end().map(|end| (number, end)));
            let mut kept = Vec::new();
            for (i, part) in dirty.chunks(hold_max).enumerate() {
                if i > 0 {
                    drop(inner);
                    inner = shard.lock();
                }
                for at in part {
                    let slot = inner.slot(*at);
                    if keep(slot) {
                        kept.push(*at);
                    } else {
                        let count = std::mem::take(&mut slot.count);
                        inner.waiting -= count;
                    }
                }
            }
            kept.append(&mut inner.dirty);
            inner.dirty = kept;
        }
        positions
    }

    fn take(&self, partition_count: u32, busy: &[u8]) -> (Drained, Cut) {
        let drain = self.drains.fetch_add(1, Relaxed) + 1;
        let mut places: HashMap<u32, u32> = HashMap::new();
        let mut last = (0, 0);
        // Nearly all the memory that is needed, before a lock is held.
        let expected = self.shards.iter().map(|shard| shard.lock().dirty.len()).sum();
        let mut out =
            Drained { taken: Vec::with_capacity(expected), arena: Vec::with_capacity(expected * 64), views: Vec::new() };
        // What is behind a ring's position is not in what was taken, and nothing before it is left out: so with a journal a
        // shard is taken in one hold.
        let hold_max = if self.journal { usize::MAX } else { HOLD_MAX };
        let gone = std::mem::take(&mut *locked(&self.gone));
        let positions = self.visit(hold_max, |slot| {
            let partition = slot.crc % partition_count;
            if busy.get(partition as usize).is_some_and(|busy| *busy != 0) {
                return true;
            }
            let Some(view) = &slot.view else { return false };
            if out.views.is_empty() || last.0 != view.id {
                let place = *places.entry(view.id).or_insert_with(|| {
                    out.views.push(view.clone());
                    out.views.len() as u32 - 1
                });
                last = (view.id, place);
            }
            let heap = slot.state.heap_bytes();
            if heap > 0 {
                self.used.fetch_sub(heap, Relaxed);
            }
            slot.seen = drain;
            out.taken.push(Taken {
                start: out.arena.len(),
                len: slot.suffix.len(),
                view: last.1,
                partition,
                hash: slot.hash,
                count: slot.count,
                state: std::mem::replace(&mut slot.state, State::Empty),
            });
            out.arena.extend_from_slice(&slot.suffix);
            false
        });
        (out, (positions, gone))
    }

    fn add_totals(&self, drained: &Drained) {
        let mut totals = locked(&self.totals);
        let Totals { by_view, room } = &mut *totals;
        let known = |view: &Arc<ViewInfo>| by_view.remove(&view.id).unwrap_or_else(|| States::new(view.kind));
        let mut states: Vec<States> = drained.views.iter().map(known).collect();
        for t in &drained.taken {
            states[t.view as usize].merge(t.hash, drained.suffix(t), &t.state, t.count, room);
        }
        by_view.extend(drained.views.iter().map(|view| view.id).zip(states));
    }

    /// Publish the totals together with what waits.
    pub fn snapshot(&self) {
        let mut waiting: HashMap<u32, States> = HashMap::new();
        self.visit(HOLD_MAX, |slot| {
            if let Some(view) = &slot.view {
                let states = waiting.entry(view.id).or_insert_with(|| States::new(view.kind));
                states.merge(slot.hash, &slot.suffix, &slot.state, slot.count, &mut usize::MAX.clone());
            }
            true
        });
        let Totals { mut by_view, mut room } = locked(&self.totals).clone();
        for (id, more) in waiting {
            let states = by_view.entry(id).or_insert_with(|| States::new(more.kind));
            for entry in &more.entries {
                states.merge(entry.hash, &entry.suffix, &entry.state, entry.count, &mut room);
            }
        }
        *locked(&self.published) = by_view.into_iter().map(|(id, states)| (id, Arc::new(states))).collect();
    }

    /// Let go of series in which nothing waits and that were silent for so many drains.
    pub fn evict(&self, silent_drains: u32) -> usize {
        let drain = self.drains.load(Relaxed);
        let mut gone = 0;
        for shard in self.shards.iter() {
            let mut next = 0;
            loop {
                let mut inner = shard.lock();
                let end = inner.slot_count().min(next + HOLD_MAX);
                gone += (next..end).filter(|at| self.let_go(&mut inner, *at as u32, drain, silent_drains)).count();
                next = end;
                if next == inner.slot_count() {
                    if inner.live == 0 && inner.dirty.is_empty() {
                        *inner = Inner { ring: std::mem::take(&mut inner.ring), ..Inner::default() };
                    }
                    break;
                }
            }
        }
        gone
    }

    fn let_go(&self, inner: &mut Inner, at: u32, drain: u32, silent_drains: u32) -> bool {
        let slot = inner.slot(at);
        if slot.count > 0 || drain.wrapping_sub(slot.seen) < silent_drains {
            return false;
        }
        let Some(view) = slot.view.take() else { return false };
        slot.stamp = 0;
        if slot.number > 0 {
            locked(&self.gone).push(slot.number);
        }
        let suffix = std::mem::take(&mut slot.suffix);
        let hash = slot.hash;
        view.count(self.id, -(!view.is_overflow(&suffix) as i64));
        self.used.fetch_sub(slot_bytes(&suffix), Relaxed);
        self.series.fetch_sub(1, Relaxed);
        if let Ok(found) = inner.index.find_entry(spread(hash), |other| *other == at) {
            found.remove();
        }
        inner.free.push(at);
        inner.live -= 1;
        true
    }
}

/// A number that each thread keeps.
pub fn thread_index() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local!(static INDEX: u32 = NEXT.fetch_add(1, Relaxed));
    INDEX.with(|index| *index)
}

/// Have each series once, where it first stood.
fn merge_lanes(drained: &mut Drained) {
    let lanes = std::mem::take(&mut drained.taken);
    let mut index: HashTable<u32> = HashTable::with_capacity(lanes.len());
    for t in lanes {
        let is = |at: &u32| {
            let other = &drained.taken[*at as usize];
            other.hash == t.hash && other.view == t.view && drained.suffix(other) == drained.suffix(&t)
        };
        if let Some(at) = index.find(spread(t.hash), is).copied() {
            let into = &mut drained.taken[at as usize];
            into.count += t.count;
            into.state.merge(drained.views[t.view as usize].kind, t.state);
        } else {
            let at = drained.taken.len() as u32;
            index.insert_unique(spread(t.hash), at, |at| spread(drained.taken[*at as usize].hash));
            drained.taken.push(t);
        }
    }
}

/// What was taken, as the groups of batches of up to `bytes_max`: by partition, then by view in the order of their definition.
fn encode(drained: &Drained, partition_count: u32, bytes_max: usize, drafts: &mut Vec<Draft>) {
    let views = &drained.views;
    let mut in_order: Vec<usize> = (0..views.len()).collect();
    in_order.sort_by_key(|place| views[*place].id);
    let mut buckets: Vec<Vec<u32>> = vec![Vec::new(); partition_count as usize * views.len()];
    for (i, t) in drained.taken.iter().enumerate() {
        buckets[t.partition as usize * views.len() + t.view as usize].push(i as u32);
    }
    for partition in 0..partition_count {
        let mut batch = Batch { size: BATCH_BYTES, ..Batch::default() };
        for place in &in_order {
            let view = &views[*place];
            for i in &buckets[partition as usize * views.len() + place] {
                let t = &drained.taken[*i as usize];
                let count = if view.kind == Kind::Mean { int_bytes(t.count as i64) } else { 0 };
                let entry = ENTRY_BYTES + t.len + t.state.size() + count;
                let group = GROUP_BYTES + view.definition.len();
                let more = entry + if batch.entries == 0 { group } else { 0 };
                let crowded = batch.entries == 0 && batch.draft.group_count == GROUP_COUNT_MAX;
                if (batch.size + more > bytes_max || crowded) && batch.draft.series_count > 0 {
                    batch.end_group(view);
                    drafts.push(batch.finish(partition));
                }
                batch.size += entry + if batch.entries == 0 { group } else { 0 };
                batch.add(view.kind, t, drained.suffix(t));
            }
            batch.end_group(view);
        }
        if batch.draft.series_count > 0 {
            drafts.push(batch.finish(partition));
        }
    }
}

/// A batch to be that grows: the groups that are done, and the columns of the one that is not.
#[derive(Default)]
struct Batch {
    draft: Draft,
    groups: Vec<u8>,
    size: usize,
    entries: usize,
    suffixes: Vec<u8>,
    columns: [Vec<u8>; 3],
}

impl Batch {
    #[inline]
    fn add(&mut self, kind: Kind, t: &Taken, suffix: &[u8]) {
        write_bin(&mut self.suffixes, suffix);
        let [first, second, third] = &mut self.columns;
        match &t.state {
            State::L(stamped) => {
                write_int(first, stamped.ts_ms);
                write_int(second, stamped.recorded_ns);
                stamped.value.write(third);
            }
            state => state.write(first),
        }
        if kind == Kind::Mean {
            write_uint(second, t.count);
        }
        self.entries += 1;
        self.draft.series_count += 1;
        self.draft.delta_count += t.count;
    }

    fn end_group(&mut self, view: &ViewInfo) {
        let n = std::mem::take(&mut self.entries);
        if n == 0 {
            return;
        }
        let out = &mut self.groups;
        out.push(0x93);
        out.extend_from_slice(&view.definition);
        write_array_head(out, n);
        out.append(&mut self.suffixes);
        write_array_head(out, view.kind.width());
        for column in &mut self.columns[..view.kind.width()] {
            write_array_head(out, n);
            out.append(column);
        }
        self.draft.group_count += 1;
    }

    fn finish(&mut self, partition: u32) -> Draft {
        self.size = BATCH_BYTES;
        let draft = std::mem::take(&mut self.draft);
        let mut groups = Vec::with_capacity(self.groups.len() + 5);
        write_array_head(&mut groups, draft.group_count);
        groups.append(&mut self.groups);
        Draft { partition, groups: Arc::new(groups), ..draft }
    }
}
