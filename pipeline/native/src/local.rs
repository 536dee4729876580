//! States by series in the order in which they came: the totals of a process, and what drains of several lanes merge in.

use crate::state::{Kind, State};
use hashbrown::HashTable;
use std::collections::HashMap;
use std::sync::Arc;

#[derive(Clone)]
pub struct Entry {
    pub suffix: Arc<[u8]>,
    pub state: State,
    pub count: u64,
    pub hash: u32,
}

/// States of the series of one view.
#[derive(Clone)]
pub struct States {
    pub kind: Kind,
    pub entries: Vec<Entry>,
    pub complete: bool,
    index: HashTable<u32>,
}

/// Spread a hash over 64 bits: hashbrown takes its control bytes from the top ones.
pub fn spread(hash: u32) -> u64 {
    (hash as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

impl States {
    pub fn new(kind: Kind) -> States {
        States { kind, entries: Vec::new(), complete: true, index: HashTable::new() }
    }

    pub fn find(&self, hash: u32, suffix: &[u8]) -> Option<&Entry> {
        self.place(hash, suffix).map(|at| &self.entries[at])
    }

    fn place(&self, hash: u32, suffix: &[u8]) -> Option<usize> {
        let is = |at: &u32| {
            let entry = &self.entries[*at as usize];
            entry.hash == hash && *entry.suffix == *suffix
        };
        self.index.find(spread(hash), is).map(|at| *at as usize)
    }

    /// Merge a state of a series in; one that is not there yet takes one of `room`, or makes this incomplete.
    pub fn merge(&mut self, hash: u32, suffix: &[u8], state: State, count: u64, room: &mut usize) {
        if let Some(at) = self.place(hash, suffix) {
            let entry = &mut self.entries[at];
            entry.state.merge(self.kind, state);
            entry.count += count;
        } else if *room == 0 {
            self.complete = false;
        } else {
            *room -= 1;
            let at = self.entries.len() as u32;
            self.entries.push(Entry { suffix: suffix.into(), state, count, hash });
            let entries = &self.entries;
            self.index.insert_unique(spread(hash), at, |at| spread(entries[*at as usize].hash));
        }
    }
}

/// What a process has recorded since it began, and a drain has taken, by the id of the view.
pub struct Totals {
    pub by_view: HashMap<u32, States>,
    /// How many series more may be known.
    pub room: usize,
}
