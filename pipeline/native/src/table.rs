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
use crate::state::{Kind, State};
use crate::wire::*;
use hashbrown::HashTable;
use std::borrow::Cow;
use std::cell::UnsafeCell;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
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
    /// The number of partitions over which each series is spread.
    pub spread: u32,
    /// The start of the window in which the time was when it was last looked at.
    pub window_now: AtomicI64,
    pub overflow_count: AtomicU64,
}

impl ViewInfo {
    pub fn is_overflow(&self, suffix: &[u8]) -> bool {
        suffix[WINDOW_BYTES..] == *self.overflow_labels
    }

    /// The start of the window of a time, in ms; 0 if the view has no windows.
    #[inline]
    pub fn window_of(&self, ts_ms: i64) -> i64 {
        if self.window_ms == 0 {
            0
        } else {
            ts_ms - ts_ms.rem_euclid(self.window_ms)
        }
    }
}

/// The start of the window of a series.
pub fn window_of(suffix: &[u8]) -> i64 {
    suffix.first_chunk::<WINDOW_BYTES>().map_or(0, |start| i64::from_be_bytes(*start))
}

/// What a window changes in the hash of a series: not the bits that name its shard. So a series is in one shard in all of its
/// windows, and the places of a bound series are read and written under one lock.
#[inline(always)]
pub fn window_bits(window: i64) -> u32 {
    ((window as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 44) as u32
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
            let slot = &self.chunks[*at as usize / CHUNK][*at as usize % CHUNK];
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

    fn insert(&mut self, slot: Slot) -> u32 {
        let hash = slot.hash;
        let at = match self.free.pop() {
            Some(at) => {
                *self.slot(at) = slot;
                at
            }
            None => {
                if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
                    self.chunks.push(Vec::with_capacity(CHUNK));
                }
                let last = self.chunks.len() - 1;
                self.chunks[last].push(slot);
                (last * CHUNK + self.chunks[last].len() - 1) as u32
            }
        };
        self.live += 1;
        let chunks = &self.chunks;
        let hash_of = |at: &u32| spread(chunks[*at as usize / CHUNK][*at as usize % CHUNK].hash);
        self.index.insert_unique(spread(hash), at, hash_of);
        at
    }
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

/// Where a bound series was last found, and in which window. It is there still if the slot has the same stamp.
#[derive(Default)]
pub struct Place {
    at: AtomicU32,
    stamp: AtomicU64,
    pub window: AtomicI64,
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

/// What the journal has to know of a drain, or of a look at what waits.
#[derive(Default, Clone)]
pub struct Cut {
    /// By shard, where its ring ended.
    pub positions: Vec<(usize, i64, usize)>,
    /// Numbers of series that are in the table no more: all their records lie before the positions.
    pub gone: Vec<u64>,
}

/// A series' view and suffix, its state, and how many deltas are in it.
pub type Waiting = (Arc<ViewInfo>, Box<[u8]>, State, u64);

/// Merged deltas of one series that were taken out. The suffix lies in an arena.
struct Taken {
    start: usize,
    len: usize,
    view: u32,
    partition: u32,
    hash: u32,
    count: u64,
    state: State,
}

#[derive(Default)]
pub struct Draft {
    pub partition: u32,
    pub groups: Vec<u8>,
    pub group_count: usize,
    pub series_count: u64,
    pub delta_count: u64,
}

/// Lets one thread at a time drain, evict or take a snapshot; who holds it across a fork may do so too.
#[derive(Default)]
pub struct Gate {
    state: Mutex<(bool, u32)>,
    freed: Condvar,
}

impl Gate {
    /// Enter, waiting for others; false: this thread is inside already.
    pub fn enter(&self, me: u32) -> bool {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        while state.0 {
            if state.1 == me {
                return false;
            }
            state = self.freed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        *state = (true, me);
        true
    }

    /// Leave, if this thread is inside.
    pub fn leave(&self, me: u32) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if *state == (true, me) {
            state.0 = false;
            self.freed.notify_one();
        }
    }
}

/// Numbers of series that count against `series_max`, by view and window.
type Counts = HashMap<(u32, i64), u64, foldhash::fast::RandomState>;

/// Everything that a forked child must not find: it gets a new one, and never looks into the old one, of which another
/// thread may have held a lock.
pub struct Core {
    pub closed: AtomicBool,
    pub shards: Box<[Shard]>,
    pub used: AtomicUsize,
    pub series: AtomicUsize,
    pub contended: AtomicU64,
    pub gate: Gate,
    counts: Mutex<Counts>,
    /// The end of the window that ends first of those in which there are series, or before it.
    next_end_ms: AtomicI64,
    pub totals: Mutex<Totals>,
    /// The totals as of the last snapshot.
    pub published: Mutex<HashMap<u32, Arc<States>>>,
    /// What was drained and not handed over, because Python had no memory for it.
    pub undelivered: Mutex<Vec<Arc<Draft>>>,
    pub journal: bool,
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
    pub fn new(bytes_max: usize, shard_count: usize, lane_count: usize, local_series_max: usize, journal: bool) -> Core {
        let shards = match shard_count {
            0 if journal => 1, // each has a ring, whose segments take room on the disk
            0 => SHARD_COUNT,
            n => n.next_power_of_two(),
        };
        let lanes = lane_count.max(1).next_power_of_two();
        Core {
            closed: AtomicBool::new(false),
            shards: (0..shards * lanes).map(|_| Shard::default()).collect(),
            used: AtomicUsize::new(0),
            series: AtomicUsize::new(0),
            contended: AtomicU64::new(0),
            gate: Gate::default(),
            counts: Mutex::default(),
            next_end_ms: AtomicI64::new(i64::MAX),
            totals: Mutex::new(Totals { by_view: HashMap::new(), room: local_series_max }),
            published: Mutex::default(),
            undelivered: Mutex::default(),
            journal,
            gone: Mutex::default(),
            cut: Mutex::default(),
            drains: AtomicU32::new(0),
            bytes_max,
            lane_mask: lanes as u32 - 1,
            lane_shift: shards.trailing_zeros(),
        }
    }

    /// Whether nobody but thread `me` is in the midst of anything here.
    pub fn is_whole(&self, me: u32) -> bool {
        let gate = self.gate.state.try_lock().is_ok_and(|state| !state.0 || state.1 == me);
        let rest =
            self.totals.try_lock().is_ok() && self.published.try_lock().is_ok() && self.undelivered.try_lock().is_ok();
        let rest = rest && self.counts.try_lock().is_ok();
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
        let here = place.filter(|place| place.window.load(Relaxed) == window_of(key.suffix));
        let at = match here.and_then(|place| inner.find_at(place)) {
            Some(at) => at,
            None => match self.locate(inner, key, delta, place, insert) {
                Ok(at) => at,
                Err(outcome) => return outcome,
            },
        };
        self.merge_at(inner, at, key.view, delta)
    }

    /// Merge a delta into a bound series of a view with windows, if it was last found in this window, and is there still.
    #[inline(always)]
    pub fn record_in(&self, held: &mut Held<'_>, view: &ViewInfo, window: i64, place: &Place, delta: &mut State) -> Outcome {
        let inner = &mut **held;
        match inner.find_at(place) {
            Some(at) if place.window.load(Relaxed) == window => self.merge_at(inner, at, view, delta),
            _ => Outcome::Missing,
        }
    }

    #[inline(always)]
    fn merge_at(&self, inner: &mut Inner, at: u32, view: &ViewInfo, delta: &mut State) -> Outcome {
        let (more, less) = inner.slot(at).state.growth(view.kind, delta);
        if more > 0 && self.used.load(Relaxed) + more > self.bytes_max + less {
            return Outcome::Full(more);
        }
        if self.journal {
            let series = inner.slot(at).number;
            if let Err(length) = inner.ring.append(series, delta) {
                return Outcome::NoRoom(inner.ring.end().map_or(-1, |end| end.0), length);
            }
        }
        let slot = inner.slot(at);
        if !slot.state.add_simply(view.kind, delta) {
            let was = slot.state.heap_bytes();
            slot.state.merge(view.kind, std::mem::replace(delta, State::Empty));
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
            place.window.store(window_of(key.suffix), Relaxed);
        }
        Ok(at)
    }

    #[cold]
    fn insert(&self, inner: &mut Inner, key: Key<'_>, delta: &State, number: &mut u64) -> Result<u32, Outcome> {
        let Key { view, suffix, hash } = key;
        static STAMPS: AtomicU64 = AtomicU64::new(1);
        let own = !view.is_overflow(suffix);
        let window = window_of(suffix);
        if own && self.counts().get(&(view.id, window)).copied().unwrap_or(0) >= view.series_max as u64 {
            return Err(Outcome::Overflow);
        }
        let bytes = slot_bytes(suffix);
        let heap = State::Empty.growth(view.kind, delta).0;
        if self.used.load(Relaxed) + bytes + heap > self.bytes_max {
            return Err(Outcome::Full(bytes + heap));
        }
        if self.journal && *number == 0 {
            return Err(Outcome::Unnamed);
        }
        self.used.fetch_add(bytes, Relaxed);
        self.series.fetch_add(1, Relaxed);
        if own {
            *self.counts().entry((view.id, window)).or_insert(0) += 1;
        }
        if view.window_ms > 0 {
            self.next_end_ms.fetch_min(window + view.window_ms, Relaxed);
        }
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

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn waiting(&self) -> u64 {
        let undelivered = self.undelivered.lock().unwrap_or_else(|e| e.into_inner());
        let drained: u64 = undelivered.iter().map(|draft| draft.delta_count).sum();
        drained + self.shards.iter().map(|shard| shard.lock().waiting).sum::<u64>()
    }

    /// Take out what waits, but for busy partitions, merge it into the totals, and encode it as batches to be; they come behind
    /// what an earlier drain could not hand over.
    pub fn drain(&self, partition_count: u32, busy: &[u8], bytes_max: usize, turn: u64) -> (Vec<Arc<Draft>>, Cut) {
        let mut drafts = Vec::new();
        let mut arena = Vec::new();
        let mut views = Vec::new();
        let mut cut = self.begin_cut();
        let mut taken = self.take((partition_count, busy, turn), &mut arena, &mut views, &mut cut);
        if self.lane_mask > 0 {
            taken = merge_lanes(taken, &arena, &views);
        }
        self.add_totals(&taken, &arena, &views);
        encode(&taken, &arena, &views, partition_count, bytes_max, &mut drafts);
        let mut all = std::mem::take(&mut *self.undelivered.lock().unwrap_or_else(|e| e.into_inner()));
        all.extend(drafts.into_iter().map(Arc::new));
        (all, cut)
    }

    fn begin_cut(&self) -> Cut {
        Cut { positions: Vec::new(), gone: std::mem::take(&mut *self.gone.lock().unwrap_or_else(|e| e.into_inner())) }
    }

    /// What waits, which stays where it is, and where the rings end as of that.
    pub fn look(&self) -> (Vec<Waiting>, Cut) {
        let (mut out, mut cut) = (Vec::new(), self.begin_cut());
        for (number, shard) in self.shards.iter().enumerate() {
            let mut inner = shard.lock();
            let inner = &mut *inner;
            cut.positions.extend(inner.ring.end().map(|(segment, offset)| (number, segment, offset)));
            for at in &inner.dirty {
                let slot = &inner.chunks[*at as usize / CHUNK][*at as usize % CHUNK];
                out.extend(slot.view.clone().map(|view| (view, slot.suffix.clone(), slot.state.clone(), slot.count)));
            }
        }
        (out, cut)
    }

    fn take(
        &self,
        (partition_count, busy, turn): (u32, &[u8], u64),
        arena: &mut Vec<u8>,
        views: &mut Vec<Arc<ViewInfo>>,
        cut: &mut Cut,
    ) -> Vec<Taken> {
        let drain = self.drains.fetch_add(1, Relaxed) + 1;
        let mut places: HashMap<u32, u32> = HashMap::new();
        let mut last = (0, 0);
        let mut out = Vec::new();
        // What is behind a ring's position is not in what was taken, and nothing before it is left out: so with a journal a
        // shard is taken in one hold.
        let hold_max = if self.journal { usize::MAX } else { HOLD_MAX };
        for (number, shard) in self.shards.iter().enumerate() {
            let expected = shard.lock().dirty.len();
            reserve(&mut out, arena, expected.min(hold_max));
            let mut inner = shard.lock();
            let dirty = std::mem::take(&mut inner.dirty);
            cut.positions.extend(inner.ring.end().map(|(segment, offset)| (number, segment, offset)));
            let mut kept = Vec::new();
            for (i, part) in dirty.chunks(hold_max).enumerate() {
                if i > 0 {
                    drop(inner);
                    reserve(&mut out, arena, part.len());
                    inner = shard.lock();
                }
                for at in part {
                    let slot = inner.slot(*at);
                    let Some(view) = &slot.view else { continue };
                    let free = |partition: &u32| busy.get(*partition as usize).is_none_or(|busy| *busy == 0);
                    let Some(partition) = partitions_of(slot.crc, partition_count, view.spread, turn).find(free) else {
                        kept.push(*at);
                        continue;
                    };
                    if views.is_empty() || last.0 != view.id {
                        let place = *places.entry(view.id).or_insert_with(|| {
                            views.push(view.clone());
                            views.len() as u32 - 1
                        });
                        last = (view.id, place);
                    }
                    let heap = slot.state.heap_bytes();
                    if heap > 0 {
                        self.used.fetch_sub(heap, Relaxed);
                    }
                    let count = std::mem::take(&mut slot.count);
                    slot.seen = drain;
                    out.push(Taken {
                        start: arena.len(),
                        len: slot.suffix.len(),
                        view: last.1,
                        partition,
                        hash: slot.hash,
                        count,
                        state: std::mem::replace(&mut slot.state, State::Empty),
                    });
                    arena.extend_from_slice(&slot.suffix);
                    inner.waiting -= count;
                }
            }
            if !kept.is_empty() {
                kept.append(&mut inner.dirty);
                inner.dirty = kept;
            }
        }
        out
    }

    fn add_totals(&self, taken: &[Taken], arena: &[u8], views: &[Arc<ViewInfo>]) {
        let mut totals = self.totals.lock().unwrap_or_else(|e| e.into_inner());
        let Totals { by_view, room } = &mut *totals;
        let known = |view: &Arc<ViewInfo>| by_view.remove(&view.id).unwrap_or_else(|| States::new(view.kind));
        let mut states: Vec<States> = views.iter().map(known).collect();
        for t in taken {
            let (hash, suffix) = windowless(t.hash, &arena[t.start..t.start + t.len]);
            states[t.view as usize].merge(hash, &suffix, t.state.clone(), t.count, room);
        }
        by_view.extend(views.iter().map(|view| view.id).zip(states));
    }

    /// Publish the totals together with what waits.
    pub fn snapshot(&self) {
        let mut waiting: HashMap<u32, States> = HashMap::new();
        for shard in self.shards.iter() {
            let dirty = shard.lock().dirty.clone();
            for part in dirty.chunks(HOLD_MAX) {
                let mut inner = shard.lock();
                for at in part {
                    let slot = inner.slot(*at);
                    if let Some(view) = &slot.view {
                        let states = waiting.entry(view.id).or_insert_with(|| States::new(view.kind));
                        let (hash, suffix) = windowless(slot.hash, &slot.suffix);
                        states.merge(hash, &suffix, slot.state.clone(), slot.count, &mut usize::MAX.clone());
                    }
                }
            }
        }
        let mut totals = self.totals.lock().unwrap_or_else(|e| e.into_inner());
        let mut room = totals.room;
        for (id, states) in &waiting {
            totals.by_view.entry(*id).or_insert_with(|| States::new(states.kind));
        }
        let mut published = HashMap::new();
        for (id, states) in totals.by_view.iter() {
            let mut copy = states.clone();
            for entry in waiting.get(id).map_or(&[][..], |waiting| &waiting.entries) {
                copy.merge(entry.hash, &entry.suffix, entry.state.clone(), entry.count, &mut room);
            }
            published.insert(*id, Arc::new(copy));
        }
        *self.published.lock().unwrap_or_else(|e| e.into_inner()) = published;
    }

    /// Let go of series in which nothing waits and that were silent for so many drains.
    pub fn evict(&self, silent_drains: u32) -> usize {
        let drain = self.drains.load(Relaxed);
        self.let_go_of(|slot| drain.wrapping_sub(slot.seen) >= silent_drains)
    }

    /// Let go of series in which nothing waits and whose windows have ended; they get no more deltas but late ones.
    pub fn evict_ended(&self, now_ms: i64) -> usize {
        if now_ms < self.next_end_ms.load(Relaxed) {
            return 0;
        }
        self.next_end_ms.store(i64::MAX, Relaxed); // what comes in from now on lowers it, and so does what stays
        self.let_go_of(|slot| {
            let Some(view) = slot.view.as_ref().filter(|view| view.window_ms > 0) else { return false };
            let end_ms = window_of(&slot.suffix) + view.window_ms;
            if end_ms > now_ms || slot.count > 0 {
                self.next_end_ms.fetch_min(end_ms, Relaxed);
            }
            end_ms <= now_ms
        })
    }

    fn let_go_of(&self, wanted: impl Fn(&Slot) -> bool) -> usize {
        let mut gone = 0;
        for shard in self.shards.iter() {
            let mut next = 0;
            loop {
                let mut inner = shard.lock();
                let end = (next + HOLD_MAX).min(inner.chunks.len() * CHUNK);
                for at in next..end {
                    gone += self.let_go(&mut inner, at as u32, &wanted) as usize;
                }
                next = end;
                if next >= inner.chunks.len() * CHUNK {
                    if inner.live == 0 && inner.dirty.is_empty() {
                        *inner = Inner { ring: std::mem::take(&mut inner.ring), ..Inner::default() };
                    }
                    break;
                }
            }
        }
        gone
    }

    fn let_go(&self, inner: &mut Inner, at: u32, wanted: impl Fn(&Slot) -> bool) -> bool {
        let Some(slot) = inner.chunks[at as usize / CHUNK].get_mut(at as usize % CHUNK) else { return false };
        if slot.view.is_none() || !wanted(slot) || slot.count > 0 {
            return false;
        }
        let Some(view) = slot.view.take() else { return false };
        slot.stamp = 0;
        if slot.number > 0 {
            self.gone.lock().unwrap_or_else(|e| e.into_inner()).push(slot.number);
        }
        let suffix = std::mem::take(&mut slot.suffix);
        let hash = slot.hash;
        if !view.is_overflow(&suffix) {
            if let Entry::Occupied(mut count) = self.counts().entry((view.id, window_of(&suffix))) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
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

/// A series as the totals have it, which are over all windows: its hash and suffix in none.
fn windowless(hash: u32, suffix: &[u8]) -> (u32, Cow<'_, [u8]>) {
    match window_of(suffix) {
        0 => (hash, Cow::Borrowed(suffix)),
        window => (hash ^ window_bits(window), Cow::Owned([&[0; WINDOW_BYTES], &suffix[WINDOW_BYTES..]].concat())),
    }
}

/// The partitions that may take a series, the one whose turn it is first; see `partition_of` in `publisher/batching.py`.
#[inline]
fn partitions_of(crc: u32, partition_count: u32, spread: u32, turn: u64) -> impl Iterator<Item = u32> {
    let spread = spread.clamp(1, partition_count);
    (0..spread as u64).map(move |later| {
        let from_first = if spread == 1 { 0 } else { (turn + later) % spread as u64 };
        ((crc as u64 + from_first) % partition_count as u64) as u32
    })
}

fn reserve(out: &mut Vec<Taken>, arena: &mut Vec<u8>, count: usize) {
    out.reserve(count);
    arena.reserve(count * 64);
}

/// A number that each thread keeps.
pub fn thread_index() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local!(static INDEX: u32 = NEXT.fetch_add(1, Relaxed));
    INDEX.with(|index| *index)
}

/// Each series once, where it first stood.
fn merge_lanes(taken: Vec<Taken>, arena: &[u8], views: &[Arc<ViewInfo>]) -> Vec<Taken> {
    let mut out: Vec<Taken> = Vec::with_capacity(taken.len());
    let mut index: HashTable<u32> = HashTable::with_capacity(taken.len());
    for t in taken {
        let is = |at: &u32| {
            let o = &out[*at as usize];
            o.hash == t.hash && o.view == t.view && arena[o.start..o.start + o.len] == arena[t.start..t.start + t.len]
        };
        if let Some(at) = index.find(spread(t.hash), is).copied() {
            let into = &mut out[at as usize];
            into.count += t.count;
            into.state.merge(views[t.view as usize].kind, t.state);
        } else {
            index.insert_unique(spread(t.hash), out.len() as u32, |at| spread(out[*at as usize].hash));
            out.push(t);
        }
    }
    out
}

/// What was taken, as the groups of batches of up to `bytes_max`: by partition, then by view in the order of their definition.
fn encode(
    taken: &[Taken],
    arena: &[u8],
    views: &[Arc<ViewInfo>],
    partition_count: u32,
    bytes_max: usize,
    drafts: &mut Vec<Draft>,
) {
    let mut by_id: Vec<usize> = (0..views.len()).collect();
    by_id.sort_by_key(|place| views[*place].id);
    let mut rank = vec![0; views.len()];
    for (i, place) in by_id.iter().enumerate() {
        rank[*place] = i;
    }
    // A counting sort
    let bucket = |t: &Taken| t.partition as usize * views.len() + rank[t.view as usize];
    let mut starts = vec![0u32; partition_count as usize * views.len() + 1];
    for t in taken {
        starts[bucket(t) + 1] += 1;
    }
    for i in 1..starts.len() {
        starts[i] += starts[i - 1];
    }
    let mut next = starts.clone();
    let mut order = vec![0u32; taken.len()];
    for (i, t) in taken.iter().enumerate() {
        let place = &mut next[bucket(t)];
        order[*place as usize] = i as u32;
        *place += 1;
    }
    for partition in 0..partition_count {
        let mut batch = Batch { size: BATCH_BYTES, ..Batch::default() };
        for (i, place) in by_id.iter().enumerate() {
            let at = partition as usize * views.len() + i;
            let view = &views[*place];
            for number in &order[starts[at] as usize..starts[at + 1] as usize] {
                let t = &taken[*number as usize];
                let entry = ENTRY_BYTES
                    + t.len
                    + t.state.size()
                    + if view.kind == Kind::Mean { count_bytes(t.count.into()) } else { 0 };
                let group = GROUP_BYTES + view.definition.len();
                let more = entry + if batch.entries == 0 { group } else { 0 };
                let crowded = batch.entries == 0 && batch.draft.group_count == GROUP_COUNT_MAX;
                if (batch.size + more > bytes_max || crowded) && batch.draft.series_count > 0 {
                    batch.end_group(view);
                    drafts.push(batch.finish(partition));
                }
                batch.size += entry + if batch.entries == 0 { group } else { 0 };
                batch.add(view.kind, t, &arena[t.start..t.start + t.len]);
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
    size: usize,
    entries: usize,
    suffixes: Vec<u8>,
    columns: [Vec<u8>; 4],
}

impl Batch {
    #[inline]
    fn add(&mut self, kind: Kind, t: &Taken, suffix: &[u8]) {
        write_bin(&mut self.suffixes, suffix);
        let [first, second, third, fourth] = &mut self.columns;
        match &t.state {
            State::L(stamped) => {
                write_int(first, stamped.ts_ms);
                write_int(second, stamped.recorded_ns);
                stamped.value.write(third);
            }
            State::H(histogram) => {
                histogram.total.write(first);
                histogram.least.write(second);
                histogram.most.write(third);
                let mut packed = Vec::with_capacity(64);
                histogram.pack(&mut packed);
                write_ext(fourth, PACKED, &packed);
            }
            State::D(distinct) => write_ext(first, PACKED, &distinct.packed()),
            State::T(topk) => {
                write_count(first, topk.total);
                write_count(second, topk.error);
                write_ext(third, PACKED, &topk.packed());
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
        let out = &mut self.draft.groups;
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
        let mut draft = std::mem::take(&mut self.draft);
        let mut groups = Vec::with_capacity(draft.groups.len() + 5);
        write_array_head(&mut groups, draft.group_count);
        groups.append(&mut draft.groups);
        Draft { partition, groups, ..draft }
    }
}
