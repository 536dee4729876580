//! States of the kinds that estimate: what `pipeline/core/kinds/sketches.py` says, number for number.

use crate::histogram::allocated;
use crate::wire::*;
use hashbrown::HashMap;

const EXACT_MAX: usize = 256;
const REGISTERS: usize = 4_096;
const REST_BITS: u32 = 52;
const TOPK_ITEMS_MAX: usize = 256;
/// Hashes for which memory is taken at a time.
const ROOM: usize = 16;

/// The hashes of a small set, in order, or the registers of a large one.
#[derive(Clone, Debug)]
pub enum Distinct {
    Exact(Vec<i64>),
    Registers(Box<[u8; REGISTERS]>),
}

impl Distinct {
    pub fn of(hash: i64) -> Distinct {
        let mut hashes = Vec::with_capacity(ROOM);
        hashes.push(hash);
        Distinct::Exact(hashes)
    }

    pub fn observe(&mut self, hash: i64) {
        match self {
            Distinct::Registers(registers) => see(registers, hash),
            Distinct::Exact(hashes) => {
                let Err(at) = hashes.binary_search(&hash) else { return };
                if hashes.len() == EXACT_MAX {
                    let mut registers = Box::new([0; REGISTERS]);
                    hashes.iter().for_each(|hash| see(&mut registers, *hash));
                    see(&mut registers, hash);
                    *self = Distinct::Registers(registers);
                    return;
                }
                if hashes.len() == hashes.capacity() {
                    hashes.reserve_exact(ROOM);
                }
                hashes.insert(at, hash);
            }
        }
    }

    pub fn merge(&mut self, mut other: Distinct) {
        if matches!((&*self, &other), (Distinct::Exact(_), Distinct::Registers(_))) {
            std::mem::swap(self, &mut other);
        }
        match (self, other) {
            (Distinct::Registers(mine), Distinct::Registers(others)) => {
                mine.iter_mut().zip(others.iter()).for_each(|(a, b)| *a = (*a).max(*b))
            }
            (mine, Distinct::Exact(hashes)) => hashes.into_iter().for_each(|hash| mine.observe(hash)),
            (Distinct::Exact(_), Distinct::Registers(_)) => {} // they were swapped
        }
    }

    pub fn heap_bytes(&self) -> usize {
        let own = match self {
            Distinct::Exact(hashes) => allocated(8 * hashes.capacity()),
            Distinct::Registers(_) => allocated(REGISTERS),
        };
        allocated(std::mem::size_of::<Distinct>()) + own
    }

    /// The bytes by which it can grow when a hash is observed.
    pub fn growth(&self) -> usize {
        match self {
            Distinct::Exact(hashes) if hashes.len() == EXACT_MAX => allocated(REGISTERS),
            Distinct::Exact(hashes) if hashes.len() == hashes.capacity() => 8 * ROOM + 16,
            _ => 0,
        }
    }

    pub fn first_bytes() -> usize {
        allocated(std::mem::size_of::<Distinct>()) + allocated(8 * ROOM)
    }

    pub fn packed(&self) -> Vec<u8> {
        match self {
            Distinct::Exact(hashes) => hashes.iter().flat_map(|hash| hash.to_be_bytes()).collect(),
            Distinct::Registers(registers) => registers.to_vec(),
        }
    }

    /// What it is charged for in a batch: `Distinct.size` in Python.
    pub fn size(&self) -> usize {
        8 + match self {
            Distinct::Exact(hashes) => 8 * hashes.len(),
            Distinct::Registers(_) => REGISTERS,
        }
    }
}

fn see(registers: &mut [u8; REGISTERS], hash: i64) {
    let index = (hash as u64 >> REST_BITS) as usize;
    let rank = ((hash as u64) << (64 - REST_BITS)).leading_zeros().min(REST_BITS) as u8 + 1;
    registers[index] = registers[index].max(rank);
}

/// Counts of items, of which the smallest are taken away from all when there are too many.
#[derive(Clone, Debug)]
pub struct TopK {
    pub total: u128,
    /// What each count may lack.
    pub error: u128,
    counts: HashMap<Box<str>, u128, foldhash::fast::RandomState>,
    heap_bytes: usize,
}

impl TopK {
    pub fn of(item: &str, count: u64) -> TopK {
        let mut new = TopK {
            total: count as u128,
            error: 0,
            counts: HashMap::default(),
            heap_bytes: allocated(std::mem::size_of::<TopK>()),
        };
        new.add(item, count as u128);
        new
    }

    fn add(&mut self, item: &str, count: u128) {
        match self.counts.get_mut(item) {
            Some(known) => *known += count,
            None => {
                self.heap_bytes += item_bytes(item);
                self.counts.insert(item.into(), count);
            }
        }
    }

    pub fn merge(&mut self, other: &TopK) {
        self.total += other.total;
        self.error += other.error;
        other.counts.iter().for_each(|(item, count)| self.add(item, *count));
        if self.counts.len() > TOPK_ITEMS_MAX {
            let mut sorted: Vec<u128> = self.counts.values().copied().collect();
            let (_, cut, _) = sorted.select_nth_unstable_by(TOPK_ITEMS_MAX, |a, b| b.cmp(a));
            let cut = *cut;
            self.error += cut;
            let heap_bytes = &mut self.heap_bytes;
            self.counts.retain(|item, count| {
                let kept = *count > cut;
                match kept {
                    true => *count -= cut,
                    false => *heap_bytes -= item_bytes(item),
                }
                kept
            });
        }
    }

    pub fn heap_bytes(&self) -> usize {
        self.heap_bytes
    }

    /// The bytes by which it can grow when another is merged.
    pub fn growth(&self, other: &TopK) -> usize {
        other.counts.keys().filter(|item| !self.counts.contains_key(&***item)).map(|item| item_bytes(item)).sum()
    }

    pub fn rows(&self) -> Vec<(&str, u128)> {
        let mut rows: Vec<_> = self.counts.iter().map(|(item, count)| (&**item, *count)).collect();
        rows.sort_unstable(); // the order of UTF-8 is that of code points
        rows
    }

    pub fn packed(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        write_array_head(&mut out, 2 * self.counts.len());
        for (item, count) in self.rows() {
            write_str(&mut out, item);
            write_count(&mut out, count);
        }
        out
    }

    /// Write the only delta in it, as a ring has it.
    pub fn write_delta(&self, out: &mut Vec<u8>) {
        for (item, count) in self.rows() {
            out.push(0x92);
            write_str(out, item);
            write_count(out, count);
        }
    }

    /// What it is charged for in a batch: `TopK.size` in Python.
    pub fn size(&self) -> usize {
        let items: usize = self.counts.iter().map(|(item, count)| 16 + item.len() + count_bytes(*count)).sum();
        16 + count_bytes(self.total) + count_bytes(self.error) + items
    }
}

/// The memory that an item is charged for: its text, and its place in a table that is half empty at worst.
fn item_bytes(item: &str) -> usize {
    allocated(item.len()) + 2 * (std::mem::size_of::<(Box<str>, u128)>() + 1)
}
