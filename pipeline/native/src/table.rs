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

use crate::local::{spread, Entry, States, Totals};
use crate::ring::Ring;
use crate::state::{int_bytes, Kind, Number, State};
use crate::wire::*;
use hashbrown::HashTable;
use lock_api::{GuardSend, RawMutex};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
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
    /// Whether its deltas have a time.
    pub is_timed: bool,
    pub series_max: usize,
    /// The definition as it travels.
    pub definition: Vec<u8>,
    /// The suffix of the overflow series, without its window.
    pub overflow_labels: Vec<u8>,
    pub prefix_crc: crc32fast::Hasher,
    pub overflow_count: AtomicU64,
}

impl ViewInfo {
    /// The start of the window of a time, in ms; 0 if the view has no windows.
    pub fn window_of(&self, ts_ms: i64) -> i64 {
        if self.window_ms == 0 {
            return 0;
        }
        ts_ms - ts_ms.rem_euclid(self.window_ms)
    }

    /// Whether a number is a delta as it is.
    #[inline(always)]
    pub fn fits(&self, number: Number) -> bool {
        let negative = match number {
            Number::F(f) if !f.is_finite() => return false,
            Number::F(f) => f < 0.0,
            Number::I(i) => i < 0,
        };
        !(self.monotone && negative) && self.kind != Kind::Last
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

#[derive(Default)]
struct Slot {
    view: Option<Arc<ViewInfo>>,
    suffix: Arc<[u8]>,
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

impl Slot {
    fn merged(&self, state: State) -> Option<Merged> {
        let Slot { suffix, count, hash, crc, .. } = self;
        let view = self.view.clone()?;
        Some(Merged { view, suffix: suffix.clone(), state, count: *count, hash: *hash, crc: *crc })
    }
}

#[derive(Default)]
pub struct Inner {
    index: HashTable<u32>,
    /// In chunks, which stay where they are when there are more: a vector that grows leaves holes in the heap.
    #[allow(clippy::vec_box)]
    chunks: Vec<Box<[Slot; CHUNK]>>,
    slot_count: usize,
    /// The places of those that are not in use.
    free: Vec<u32>,
    dirty: Vec<u32>,
    waiting: u64,
    pub ring: Ring,
}

#[inline(always)]
fn slot_in(chunks: &[Box<[Slot; CHUNK]>], at: u32) -> &Slot {
    &chunks[at as usize / CHUNK][at as usize % CHUNK]
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
        let slot = &self.chunks.get(at as usize / CHUNK)?[at as usize % CHUNK];
        (slot.stamp == stamp && stamp != 0).then_some(at)
    }

    fn insert(&mut self, slot: Slot) -> u32 {
        let hash = slot.hash;
        let at = self.free.pop().unwrap_or_else(|| {
            if self.slot_count.is_multiple_of(CHUNK) {
                self.chunks.push(Box::default());
            }
            self.slot_count += 1;
            self.slot_count as u32 - 1
        });
        *self.slot(at) = slot;
        self.index.insert_unique(spread(hash), at, |at| spread(slot_in(&self.chunks, *at).hash));
        at
    }
}

/// A lock that is a flag: to give it back is a store, where another mutex takes a second atomic operation, a fifth of what
/// recording costs. It is held for microseconds, so that waiting is rare.
pub struct Flag(AtomicBool);

// SAFETY: who has turned the flag from false to true has the lock, and nobody else, until it turns it back. Acquire and Release
// order what is done in between.
unsafe impl RawMutex for Flag {
    const INIT: Flag = Flag(AtomicBool::new(false));
    type GuardMarker = GuardSend;

    #[inline]
    fn try_lock(&self) -> bool {
        self.0.compare_exchange(false, true, Acquire, Relaxed).is_ok()
    }

    /// Wait for the lock; not while attached to the interpreter, which who holds the lock may be waiting for.
    fn lock(&self) {
        let mut tries = 0;
        while !self.try_lock() {
            tries += 1;
            match tries {
                0..100 => std::hint::spin_loop(),
                100..120 => std::thread::yield_now(),
                _ => std::thread::sleep(std::time::Duration::from_micros(50)),
            }
        }
    }

    // SAFETY: who calls has the lock: nothing but the guard that `lock_api` makes of it does.
    #[inline]
    unsafe fn unlock(&self) {
        self.0.store(false, Release);
    }
}

/// A part of the table with a lock and cache lines of its own.
#[repr(align(128))]
#[derive(Default)]
pub struct Shard(lock_api::Mutex<Flag, Inner>);

pub type Held<'a> = lock_api::MutexGuard<'a, Flag, Inner>;

impl std::ops::Deref for Shard {
    type Target = lock_api::Mutex<Flag, Inner>;

    #[inline]
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// Where a bound series was last found. It is there still if the slot has the same stamp.
#[derive(Default)]
pub struct Place {
    at: AtomicU32,
    stamp: AtomicU64,
}

/// What is needed to record a delta whose series may be new.
#[derive(Default)]
pub struct Insert {
    /// Whether `opening` was called since the table was closed.
    pub asked: bool,
    /// What the journal knows the series by, if it has been asked; what is used is taken.
    pub number: u64,
}

/// Why a delta is not recorded.
pub enum Refusal {
    /// The table is closed, and it was not asked whether the delta may be recorded.
    Closed,
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

/// Merged deltas of one series, and how many they are.
pub struct Merged {
    pub view: Arc<ViewInfo>,
    pub suffix: Arc<[u8]>,
    pub state: State,
    pub count: u64,
    hash: u32,
    crc: u32,
}

/// A batch to be: the groups of one partition. See `pipeline.publisher.batching.Draft`.
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
    /// In which process it is in use: see `crate::fork`.
    pub forks: AtomicU64,
    /// The parent's, if this is the closed one of a forked child that has neither begun anew nor gone on with it.
    pub left: Option<&'static Core>,
    pub closed: AtomicBool,
    pub shards: Box<[Shard]>,
    pub used: AtomicUsize,
    pub series: AtomicUsize,
    /// How many of them are not overflow series, by view.
    own_series: Mutex<HashMap<u32, usize>>,
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
    std::mem::size_of::<Slot>() + 14 + malloc_bytes(suffix.len() + 16)
}

impl Core {
    pub fn new(config: Config, forks: u64, left: Option<&'static Core>) -> Core {
        let shards = match config.shard_count {
            0 if config.journal => 1, // each has a ring, whose segments take room on the disk
            0 => SHARD_COUNT,
            n => n.next_power_of_two(),
        };
        Core {
            forks: AtomicU64::new(forks),
            left,
            closed: AtomicBool::new(left.is_some()),
            shards: (0..shards * config.lane_count).map(|_| Shard::default()).collect(),
            used: AtomicUsize::new(0),
            series: AtomicUsize::new(0),
            own_series: Mutex::default(),
            gate: Gate::default(),
            totals: Mutex::new(Totals { by_view: BTreeMap::new(), room: config.local_series_max }),
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
    /// stays unless it is done. `insert`: the series may be new; see there.
    #[inline(always)]
    pub fn record(
        &self,
        held: &mut Held<'_>,
        key: Key<'_>,
        delta: &mut State,
        place: Option<&Place>,
        insert: Option<&mut Insert>,
    ) -> Result<(), Refusal> {
        // Under the lock, through which `close` goes: what is recorded without a question is recorded before it returns.
        if self.closed.load(Relaxed) && !insert.as_ref().is_some_and(|insert| insert.asked) {
            return Err(Refusal::Closed);
        }
        let inner = &mut **held;
        let found = place.and_then(|place| inner.find_at(place));
        let at = match found.or_else(|| inner.find(key)) {
            Some(at) => at,
            None => self.insert(inner, key, delta, insert.ok_or(Refusal::Missing)?)?,
        };
        let Inner { chunks, ring, dirty, waiting, .. } = inner;
        let slot = &mut chunks[at as usize / CHUNK][at as usize % CHUNK];
        if let Some(place) = place.filter(|_| found.is_none()) {
            place.stamp.store(slot.stamp, Relaxed);
            place.at.store(at, Relaxed);
        }
        let more = delta.heap_bytes();
        if more > 0 && self.used.load(Relaxed) + more > self.bytes_max + slot.state.heap_bytes() {
            return Err(Refusal::Full(more));
        }
        if self.journal {
            if let Err(length) = ring.append(slot.number, delta) {
                return Err(Refusal::NoRoom(ring.end().map_or(-1, |end| end.0), length));
            }
        }
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
            dirty.push(at);
        }
        *waiting += 1;
        Ok(())
    }

    #[cold]
    fn insert(&self, inner: &mut Inner, key: Key<'_>, delta: &State, insert: &mut Insert) -> Result<u32, Refusal> {
        let Key { view, suffix, hash } = key;
        static STAMPS: AtomicU64 = AtomicU64::new(1);
        let own = !view.is_overflow(suffix);
        if own && locked(&self.own_series).get(&view.id).map_or(0, |count| *count) >= view.series_max {
            return Err(Refusal::Overflow);
        }
        let bytes = slot_bytes(suffix);
        if self.used.load(Relaxed) + bytes + delta.heap_bytes() > self.bytes_max {
            return Err(Refusal::Full(bytes + delta.heap_bytes()));
        }
        if self.journal && insert.number == 0 {
            return Err(Refusal::Unnamed);
        }
        self.used.fetch_add(bytes, Relaxed);
        self.series.fetch_add(1, Relaxed);
        *locked(&self.own_series).entry(view.id).or_default() += own as usize;
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
            number: std::mem::take(&mut insert.number),
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
        let (mut taken, cut) = self.take(partition_count, busy);
        if self.lane_mask > 0 {
            taken = merge_lanes(taken);
        }
        let mut groups: BTreeMap<(u32, u32), Vec<&Merged>> = BTreeMap::new();
        for merged in &taken {
            groups.entry((merged.crc % partition_count, merged.view.id)).or_default().push(merged);
        }
        let mut totals = locked(&self.totals);
        for group in groups.values() {
            let (states, room) = totals.of(group[0].view.id, group[0].view.kind);
            group.iter().for_each(|merged| states.merge(merged.hash, &merged.suffix, &merged.state, merged.count, room));
        }
        drop(totals);
        let mut drafts = std::mem::take(&mut *locked(&self.undelivered));
        encode(groups, bytes_max, &mut drafts);
        (drafts, cut)
    }

    /// Where the rings end now.
    pub fn ends(&self) -> Positions {
        let end = |(number, shard): (usize, &Shard)| shard.lock().ring.end().map(|end| (number, end));
        self.shards.iter().enumerate().filter_map(end).collect()
    }

    /// What waits, which stays where it is, and where the rings end as of that.
    pub fn look(&self) -> (Vec<Merged>, Cut) {
        let mut out = Vec::new();
        let gone = std::mem::take(&mut *locked(&self.gone));
        let positions = self.visit(usize::MAX, |slot| {
            out.extend(slot.merged(slot.state.clone()));
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

    fn take(&self, partition_count: u32, busy: &[u8]) -> (Vec<Merged>, Cut) {
        let drain = self.drains.fetch_add(1, Relaxed) + 1;
        // Nearly all the memory that is needed, before a lock is held.
        let mut out = Vec::with_capacity(self.shards.iter().map(|shard| shard.lock().dirty.len()).sum());
        // What is behind a ring's position is not in what was taken, and nothing before it is left out: so with a journal a
        // shard is taken in one hold.
        let hold_max = if self.journal { usize::MAX } else { HOLD_MAX };
        let gone = std::mem::take(&mut *locked(&self.gone));
        let positions = self.visit(hold_max, |slot| {
            if busy.get((slot.crc % partition_count) as usize).is_some_and(|busy| *busy != 0) {
                return true;
            }
            let heap = slot.state.heap_bytes();
            if heap > 0 {
                self.used.fetch_sub(heap, Relaxed);
            }
            slot.seen = drain;
            let state = std::mem::replace(&mut slot.state, State::Empty);
            out.extend(slot.merged(state));
            false
        });
        (out, (positions, gone))
    }

    /// Publish the totals together with what waits.
    pub fn snapshot(&self) {
        let mut waiting = Totals { by_view: BTreeMap::new(), room: usize::MAX };
        self.visit(HOLD_MAX, |slot| {
            if let Some(view) = &slot.view {
                let (states, room) = waiting.of(view.id, view.kind);
                states.merge(slot.hash, &slot.suffix, &slot.state, slot.count, room);
            }
            true
        });
        let mut totals = locked(&self.totals).clone();
        for (id, more) in waiting.by_view {
            let (states, room) = totals.of(id, more.kind);
            for Entry { suffix, state, count, hash } in &more.entries {
                states.merge(*hash, suffix, state, *count, room);
            }
        }
        *locked(&self.published) = totals.by_view.into_iter().map(|(id, states)| (id, Arc::new(states))).collect();
    }

    /// Let go of series in which nothing waits and that were silent for so many drains.
    pub fn evict(&self, silent_drains: u32) -> usize {
        let drain = self.drains.load(Relaxed);
        let mut gone = 0;
        for shard in self.shards.iter() {
            let mut next = 0;
            loop {
                let mut inner = shard.lock();
                let end = inner.slot_count.min(next + HOLD_MAX);
                gone += (next..end).filter(|at| self.let_go(&mut inner, *at as u32, drain, silent_drains)).count();
                next = end;
                if next == inner.slot_count {
                    if inner.free.len() == inner.slot_count && inner.dirty.is_empty() {
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
        *locked(&self.own_series).entry(view.id).or_default() -= !view.is_overflow(&suffix) as usize;
        self.used.fetch_sub(slot_bytes(&suffix), Relaxed);
        self.series.fetch_sub(1, Relaxed);
        if let Ok(found) = inner.index.find_entry(spread(hash), |other| *other == at) {
            found.remove();
        }
        inner.free.push(at);
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
fn merge_lanes(lanes: Vec<Merged>) -> Vec<Merged> {
    let mut out: Vec<Merged> = Vec::with_capacity(lanes.len());
    let mut places: HashMap<(u32, Arc<[u8]>), usize> = HashMap::new();
    for merged in lanes {
        let place = *places.entry((merged.view.id, merged.suffix.clone())).or_insert(out.len());
        match out.get_mut(place) {
            Some(into) => {
                into.count += merged.count;
                into.state.merge(merged.view.kind, merged.state);
            }
            None => out.push(merged),
        }
    }
    out
}

/// Make batches of up to `bytes_max` of series by partition and view, whose numbers are in the order of their definition.
fn encode(groups: BTreeMap<(u32, u32), Vec<&Merged>>, bytes_max: usize, drafts: &mut Vec<Draft>) {
    let mut batch = Batch::default();
    for ((partition, _), group) in groups {
        if partition != batch.draft.partition {
            batch.finish(drafts);
            batch.draft.partition = partition;
        }
        let view = &group[0].view;
        for merged in group {
            let count = if view.kind == Kind::Mean { int_bytes(merged.count as i64) } else { 0 };
            let entry = ENTRY_BYTES + merged.suffix.len() + merged.state.size() + count;
            let head = GROUP_BYTES + view.definition.len();
            let more = entry + if batch.entries == 0 { head } else { 0 };
            let crowded = batch.entries == 0 && batch.draft.group_count == GROUP_COUNT_MAX;
            if batch.size + more > bytes_max.saturating_sub(BATCH_BYTES) || crowded {
                batch.end_group(view);
                batch.finish(drafts);
            }
            batch.size += entry + if batch.entries == 0 { head } else { 0 };
            batch.add(merged);
        }
        batch.end_group(view);
    }
    batch.finish(drafts);
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
    fn add(&mut self, merged: &Merged) {
        write_bin(&mut self.suffixes, &merged.suffix);
        let [first, second, third] = &mut self.columns;
        match &merged.state {
            State::L(stamped) => {
                write_int(first, stamped.ts_ms);
                write_int(second, stamped.recorded_ns);
                stamped.value.write(third);
            }
            state => state.write(first),
        }
        if merged.view.kind == Kind::Mean {
            write_uint(second, merged.count);
        }
        self.entries += 1;
        self.draft.series_count += 1;
        self.draft.delta_count += merged.count;
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

    /// Begin anew in the same partition.
    fn finish(&mut self, drafts: &mut Vec<Draft>) {
        if self.draft.series_count == 0 {
            return;
        }
        let partition = self.draft.partition;
        let done = std::mem::replace(&mut self.draft, Draft { partition, ..Draft::default() });
        let mut groups = Vec::with_capacity(self.groups.len() + 5);
        write_array_head(&mut groups, done.group_count);
        groups.append(&mut self.groups);
        self.size = 0;
        drafts.push(Draft { groups: Arc::new(groups), ..done });
    }
}
