//! Forks, also those that C code makes and Python does not see: the child finds every table closed and empty.
//!
//! Each core knows in which process it is in use. In another one, a forked child, an empty and closed one takes its place, so
//! that the next delta calls `opening`, where the publisher finds out in which process it is. The parent's core stays as it
//! is: another thread, which is not in the child, may have been in the midst of it.

use crate::table::{thread_index, Config, Core};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::*};

/// How many forks lie between this process and the one that loaded the extension.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// The core in use: never null, and from `Box::into_raw`.
pub struct Cores {
    now: AtomicPtr<Core>,
    config: Config,
}

impl Cores {
    pub fn new(config: Config) -> Cores {
        let cores = Cores { now: AtomicPtr::default(), config };
        cores.begin();
        cores
    }

    /// Begin anew.
    pub fn begin(&self) {
        let core = Core::new(self.config, FORKS.load(Relaxed), None);
        self.now.store(Box::into_raw(Box::new(core)), Release);
    }

    #[inline]
    pub fn get(&self) -> &Core {
        let now = self.now.load(Acquire);
        // SAFETY: the pointer is from `Box::into_raw`. What another takes the place of is never freed, and what is there last is
        // freed when the table is dropped, which `&self` outlives.
        let core = unsafe { &*now };
        if core.forks.load(Relaxed) != FORKS.load(Relaxed) {
            return self.replace(now);
        }
        core
    }

    /// In a forked child: have a closed core take the place of the parent's.
    #[cold]
    fn replace(&self, now: *mut Core) -> &Core {
        // SAFETY: as in `get`; and it is never freed, because the closed core, or that of another thread, takes its place.
        let parents: &'static Core = unsafe { &*now };
        let config = Config { shard_count: 1, ..self.config };
        let closed = Core::new(config, FORKS.load(Relaxed), parents.left.or(Some(parents)));
        let _ = self.now.compare_exchange(now, Box::into_raw(Box::new(closed)), AcqRel, Acquire);
        self.get()
    }

    /// Go on with what the parent had; false if a thread may have been in the midst of it, or if it is not there.
    pub fn keep(&self) -> bool {
        let Some(left) = self.get().left.filter(|left| left.is_whole(thread_index())) else { return false };
        left.forks.store(FORKS.load(Relaxed), Relaxed);
        self.now.store((left as *const Core).cast_mut(), Release);
        true
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        // SAFETY: from `Box::into_raw`, and nobody has a reference to the table any more.
        drop(unsafe { Box::from_raw(*self.now.get_mut()) });
    }
}

extern "C" fn child() {
    FORKS.fetch_add(1, Relaxed);
}

/// Have the system count the forks.
pub fn watch() {
    #[cfg(unix)]
    // SAFETY: the function stays, because an extension module is never unloaded, and it does nothing that a process with one
    // of its parent's threads may not. Without memory for it (the only failure) Python's own hook is left.
    unsafe {
        libc::pthread_atfork(None, None, Some(child));
    }
}
