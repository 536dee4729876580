//! Forks, also those that C code makes and Python does not see: the child finds every table closed and empty.
//!
//! None of it is in the way of recording. Before `fork` returns in the child, each table's core is replaced by a spare one that
//! is closed, so that the next delta calls `opening`, where the publisher finds out in which process it is. The parent's core
//! stays as it is: another thread, which is not in the child, may have been in the midst of it.

use crate::table::{thread_index, Core};
use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering::*};
use std::sync::{Mutex, MutexGuard, Once};

/// The core in use, and what a fork puts in its place. The pointers are from `Box::into_raw`, or null where not said otherwise.
pub struct Cores {
    /// Never null.
    now: AtomicPtr<Core>,
    spare: AtomicPtr<Core>,
    /// The parent's, in a child that has neither begun anew nor gone on with it.
    left: AtomicPtr<Core>,
}

impl Cores {
    pub fn new(core: Core, spare: Core) -> Cores {
        let cores = Cores { now: Default::default(), spare: Default::default(), left: Default::default() };
        cores.replace(core, spare);
        cores
    }

    #[inline]
    pub fn get(&self) -> &Core {
        // SAFETY: the pointer is from `Box::into_raw`. What another takes the place of is never freed, and what is there last is
        // freed when the table is dropped, which `&self` outlives.
        unsafe { &*self.now.load(Acquire) }
    }

    /// Begin anew.
    pub fn replace(&self, core: Core, spare: Core) {
        spare.closed.store(true, Relaxed);
        self.left.store(null_mut(), Release);
        self.now.store(Box::into_raw(Box::new(core)), Release);
        // One that was there was in use by nobody: only `strike` takes it, and is alone in its process.
        let unused = self.spare.swap(Box::into_raw(Box::new(spare)), AcqRel);
        if !unused.is_null() {
            // SAFETY: from `Box::into_raw`, and nobody else has it.
            drop(unsafe { Box::from_raw(unused) });
        }
    }

    /// In the child, when no other thread runs.
    fn strike(&self) {
        let spare = self.spare.swap(null_mut(), AcqRel);
        if !spare.is_null() {
            self.left.store(self.now.swap(spare, AcqRel), Release);
        }
    }

    /// Go on with what the parent had; false if a thread may have been in the midst of it, or if it is not there.
    pub fn keep(&self, spare: Core) -> bool {
        let left = self.left.load(Acquire);
        if left.is_null() {
            return false;
        }
        // SAFETY: as in `get`: it was in use until the fork.
        if !unsafe { &*left }.is_whole(thread_index()) {
            return false;
        }
        spare.closed.store(true, Relaxed);
        self.left.store(null_mut(), Release);
        self.spare.store(Box::into_raw(Box::new(spare)), Release);
        self.now.store(left, Release);
        true
    }

    /// Have forks find this. To be called where it stays, until it is dropped.
    pub fn join(&self) {
        let mut all = lock();
        if !all.0.contains(&(self as *const Cores)) {
            all.0.push(self);
        }
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        lock().0.retain(|other| !std::ptr::eq(*other, self));
        for place in [&self.now, &self.spare] {
            let core = place.load(Acquire);
            if !core.is_null() {
                // SAFETY: from `Box::into_raw`, and nobody has a reference to the table any more.
                drop(unsafe { Box::from_raw(core) });
            }
        }
    }
}

/// Those that a fork is to find.
struct All(Vec<*const Cores>);

// SAFETY: what the pointers lead to is made of atomics, and stays there until it leaves the list, in its `drop`.
unsafe impl Send for All {}

static ALL: Mutex<All> = Mutex::new(All(Vec::new()));

fn lock() -> MutexGuard<'static, All> {
    ALL.lock().unwrap_or_else(|e| e.into_inner())
}

thread_local!(static HELD: Cell<Option<MutexGuard<'static, All>>> = const { Cell::new(None) });

extern "C" fn prepare() {
    let _ = HELD.try_with(|held| held.set(Some(lock())));
}

extern "C" fn parent() {
    let _ = HELD.try_with(|held| held.take());
}

extern "C" fn child() {
    let _ = HELD.try_with(|held| {
        for cores in held.take().iter().flat_map(|all| &all.0) {
            // SAFETY: what is in the list is not dropped while `ALL` is locked, which this thread has done.
            unsafe { &**cores }.strike();
        }
    });
}

/// Have the system call this at each fork.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(unix)]
        // SAFETY: the functions stay, because an extension module is never unloaded. In the child they call nothing that a
        // process with one of its parent's threads may not: atomics, and the end of a lock that this thread has. Without
        // memory for them (the only failure) Python's own hook is left.
        unsafe {
            pthread_atfork(prepare, parent, child);
        }
    });
}

#[cfg(unix)]
extern "C" {
    fn pthread_atfork(prepare: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) -> std::ffi::c_int;
}
