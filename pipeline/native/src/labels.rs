//! The suffix of a series while it is being built: on the stack as long as it is short.

use crate::table::WINDOW_BYTES;

pub const LABEL_BYTES_MAX: usize = 4_096;
pub const SUFFIX_BYTES_MAX: usize = 32_768;
const STACK_BYTES: usize = 128;

pub struct Suffix {
    stack: [u8; STACK_BYTES],
    /// All of it, once it is longer than the stack.
    heap: Vec<u8>,
    size: usize,
}

impl Suffix {
    /// Nothing yet: `start` begins it, in place, because what is returned by value may be copied.
    #[inline(always)]
    pub fn empty() -> Suffix {
        Suffix { stack: [0; STACK_BYTES], heap: Vec::new(), size: 0 }
    }

    /// Begin the suffix of a series in no window, of so many labels, which are to be pushed.
    #[inline(always)]
    pub fn start(&mut self, label_count: usize) {
        self.size = WINDOW_BYTES;
        self.heap.clear();
        if label_count < 16 {
            self.stack[WINDOW_BYTES] = 0x90 | label_count as u8;
            self.size += 1;
        } else {
            self.push(&[0xdc, (label_count >> 8) as u8, label_count as u8]);
        }
    }

    #[inline(always)]
    pub fn push_label(&mut self, label: &[u8]) {
        let (n, start) = (label.len(), self.size + 1);
        if n < 32 && start + 32 <= STACK_BYTES {
            self.stack[self.size] = 0xa0 | n as u8;
            copy(&mut self.stack[start..start + n], label);
            self.size = start + n;
        } else {
            self.push_long(label);
        }
    }

    #[cold]
    fn push_long(&mut self, label: &[u8]) {
        let n = label.len();
        match n {
            0..32 => self.push(&[0xa0 | n as u8]),
            32..256 => self.push(&[0xd9, n as u8]),
            _ => self.push(&[0xda, (n >> 8) as u8, n as u8]),
        }
        self.push(label);
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.size + bytes.len();
        if end <= STACK_BYTES {
            self.stack[self.size..end].copy_from_slice(bytes);
        } else {
            if self.heap.is_empty() {
                self.heap.extend_from_slice(&self.stack[..self.size]);
            }
            self.heap.extend_from_slice(bytes);
        }
        self.size = end;
    }

    #[inline(always)]
    pub fn bytes(&self) -> &[u8] {
        self.stack.get(..self.size).unwrap_or(&self.heap)
    }

    pub fn set_window(&mut self, start_ms: i64) {
        let all = if self.size <= STACK_BYTES { &mut self.stack[..] } else { &mut self.heap[..] };
        all[..WINDOW_BYTES].copy_from_slice(&start_ms.to_be_bytes());
    }
}

/// Copy few bytes in two moves that may overlap, without the call that copies any number.
#[inline(always)]
fn copy(to: &mut [u8], from: &[u8]) {
    let n = from.len().min(to.len());
    let (to, from) = (&mut to[..n], &from[..n]);
    match n {
        8..=16 => {
            to[..8].copy_from_slice(&from[..8]);
            to[n - 8..].copy_from_slice(&from[n - 8..]);
        }
        4..8 => {
            to[..4].copy_from_slice(&from[..4]);
            to[n - 4..].copy_from_slice(&from[n - 4..]);
        }
        2..4 => {
            to[..2].copy_from_slice(&from[..2]);
            to[n - 2..].copy_from_slice(&from[n - 2..]);
        }
        1 => to[0] = from[0],
        _ => to.copy_from_slice(from),
    }
}
