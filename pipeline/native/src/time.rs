//! The system's clock in ms since 1970, as Python's `time.time_ns` has it, and a cheap look at it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Bound of what `coarse_ms` is behind `now_ms`: a tick of the system is 10 ms at most.
const BEHIND_MS: i64 = 20;

pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// Whether it surely is between `start_ms` and `end_ms` now; false leaves that open. It costs a fifth of `now_ms`.
#[inline(always)]
pub fn surely_within(start_ms: i64, end_ms: i64) -> bool {
    let now_ms = coarse_ms();
    start_ms <= now_ms && now_ms < end_ms - BEHIND_MS
}

/// The time at the last tick of the system, which has it ready for all processes.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
#[inline(always)]
fn coarse_ms() -> i64 {
    #[repr(C)]
    struct Timespec(i64, i64);
    extern "C" {
        fn clock_gettime(clock: i32, to: *mut Timespec) -> i32;
    }
    const REALTIME_COARSE: i32 = 5;
    let mut at = Timespec(0, 0);
    // SAFETY: `Timespec` is what 64-bit Linux has under that name, and the call writes nothing else.
    match unsafe { clock_gettime(REALTIME_COARSE, &mut at) } {
        0 => at.0 * 1_000 + at.1 / 1_000_000,
        _ => now_ms(),
    }
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
#[inline(always)]
fn coarse_ms() -> i64 {
    now_ms()
}
