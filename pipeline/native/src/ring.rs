//! The ring of a shard: every delta that the shard takes in, as a record in a file that is mapped into memory and outlives
//! the process. The format is that of `pipeline/publisher/spool/ring.py`, which also makes the files.

use crate::state::State;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering::*};

const END_WORD: u64 = 3;
const END: &[u8] = &[0xc0];
const END_BYTES: usize = 24;

/// A segment that is written. Dropped without a shard's lock only: that attaches to the interpreter.
pub struct Segment {
    /// Keeps the file mapped, and where it is.
    map: PyBuffer<u8>,
    pub number: i64,
    pub offset: usize,
    limit: usize,
    seed: u32,
}

impl Segment {
    pub fn open(made: &Bound<'_, PyAny>) -> PyResult<Segment> {
        let map = PyBuffer::<u8>::get(&made.getattr("bytes")?)?;
        let limit: usize = made.getattr("limit")?.extract()?;
        let offset: usize = made.getattr("offset")?.extract()?;
        let fits = limit + END_BYTES <= map.len_bytes() && offset <= limit && offset & 7 == 0;
        if map.readonly() || !map.is_c_contiguous() || map.buf_ptr() as usize & 7 != 0 || !fits {
            return Err(PyValueError::new_err("no segment"));
        }
        let (number, seed) = (made.getattr("number")?.extract()?, made.getattr("seed")?.extract()?);
        Ok(Segment { map, offset, limit, number, seed })
    }

    #[inline]
    fn has_room(&self, length: usize) -> bool {
        self.offset + 16 + length <= self.limit
    }

    fn write(&mut self, word: u64, payload: &[u8]) {
        let covered = [(payload.len() as u64) << 32 | self.offset as u64, word];
        let header = (extend(self.seed, covered, payload) as u64) << 32 | payload.len() as u64;
        // SAFETY: `map` exports a writable, contiguous buffer that stays where it is until `map` is dropped, and `open` has
        // found it aligned to 8 and longer than `limit` by the record that ends it; who calls has checked that the record
        // ends before that, and `offset` is a multiple of 8. Nothing else in this process writes there: the Python that made
        // the segment leaves it alone, and `&mut self` is had under the shard's lock. Who maps the file in another process
        // reads it once this one is gone. The header is stored last, in one piece, so that a record counts once it is whole.
        unsafe {
            let record = self.map.buf_ptr().cast::<u8>().add(self.offset);
            record.add(8).copy_from_nonoverlapping(word.to_le_bytes().as_ptr(), 8);
            record.add(16).copy_from_nonoverlapping(payload.as_ptr(), payload.len());
            (*record.cast::<AtomicU64>()).store(header.to_le(), Release);
        }
        self.offset = (self.offset + 16 + payload.len() + 7) & !7;
    }
}

#[derive(Default)]
pub struct Ring {
    segment: Option<Segment>,
    /// The payload that is being made.
    payload: Vec<u8>,
}

impl Ring {
    /// Record a delta of a series; None: there is no room, and how many bytes the payload has.
    #[inline]
    pub fn append(&mut self, series: u64, delta: &State) -> Result<(), usize> {
        self.payload.clear();
        delta.write_delta(&mut self.payload);
        match &mut self.segment {
            Some(segment) if segment.has_room(self.payload.len()) => {
                segment.write(series << 2, &self.payload);
                Ok(())
            }
            _ => Err(self.payload.len()),
        }
    }

    /// Where the ring ends: the number of a segment, and the offset in it. None: nothing was ever recorded.
    pub fn end(&self) -> Option<(i64, usize)> {
        self.segment.as_ref().map(|segment| (segment.number, segment.offset))
    }

    /// Go on in another segment, unless it is an older one. Returns the one that is to be dropped, without the lock.
    pub fn adopt(&mut self, new: Segment) -> Option<Segment> {
        match &mut self.segment {
            Some(old) if old.number >= new.number => Some(new),
            Some(old) => {
                old.write(END_WORD, END);
                self.segment.replace(new)
            }
            None => self.segment.replace(new),
        }
    }
}

/// The CRC-32C of what `crc` is the checksum of, two words, in their little-endian bytes, and a payload.
#[inline]
fn extend(crc: u32, words: [u64; 2], payload: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: this machine has the instructions.
        return unsafe { extend_sse(crc, words, payload) };
    }
    extend_plain(crc, words, payload)
}

/// # Safety
/// The machine must have SSE 4.2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
unsafe fn extend_sse(crc: u32, words: [u64; 2], payload: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u64, _mm_crc32_u8};
    let mut crc = words.iter().fold(!crc as u64, |crc, word| _mm_crc32_u64(crc, *word));
    let chunks = payload.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        crc = _mm_crc32_u64(crc, u64::from_le_bytes(chunk.try_into().unwrap_or_default()));
    }
    !rest.iter().fold(crc as u32, |crc, byte| _mm_crc32_u8(crc, *byte))
}

fn extend_plain(crc: u32, words: [u64; 2], payload: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).chain(payload.iter().copied());
    !bytes.fold(!crc, |crc, byte| TABLE[(crc as u8 ^ byte) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    #[test]
    fn both_ways_are_one() {
        let payload: Vec<u8> = (0..100).map(|i| (i * 37) as u8).collect();
        for n in 0..100 {
            let words = [n as u64, 1 << n % 64];
            assert_eq!(
                super::extend(n, words, &payload[..n as usize]),
                super::extend_plain(n, words, &payload[..n as usize])
            );
        }
    }
}
