//! What warps ask memory for. All threads of a warp that are at the same load or store make one
//! request. In memory it takes a transaction for each sector that it touches; in shared memory as
//! many turns as it asks one bank for words.

use std::collections::HashMap;

use super::parse::{Code, Kernel, Space};

/// Bytes of a sector, and of a word of a bank.
const SECTOR: u64 = 32;
const WORD: u64 = 4;
const BANKS: u64 = 32;
const WARP: usize = 32;

/// Transactions of a launch.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Transactions {
    /// Sectors that were read from memory.
    pub read: u64,
    /// Sectors that were written there.
    pub written: u64,
    /// Turns of shared memory.
    pub shared: u64,
    /// How many of these there would have been if no two words were in one bank.
    pub least: u64,
}

impl std::ops::AddAssign for Transactions {
    fn add_assign(&mut self, other: Transactions) {
        self.read += other.read;
        self.written += other.written;
        self.shared += other.shared;
        self.least += other.least;
    }
}

/// A warp, the instruction, and how many times its thread was there before.
type Key = (usize, usize, u32);

/// The requests of a block so far.
#[derive(Default)]
pub(crate) struct Requests {
    all: HashMap<Key, Vec<(u64, u64)>>,
    visits: HashMap<(usize, usize), u32>,
}

impl Requests {
    /// Says that a thread touches so many bytes from an address on.
    pub(crate) fn touch(&mut self, thread: usize, at: usize, address: u64, bytes: usize) {
        let visit = self.visits.entry((thread, at)).or_default();
        *visit += 1;
        let request = self.all.entry((thread / WARP, at, *visit)).or_default();
        request.push((address, bytes as u64));
    }

    /// What they take.
    pub(crate) fn transactions(self, kernel: &Kernel) -> Transactions {
        let mut all = Transactions::default();
        for ((_, at, _), touched) in self.all {
            match &kernel.code[at].code {
                Code::Load(Space::Global, ..) | Code::Copy(..) => all.read += sectors(&touched),
                Code::Store(Space::Global, ..) => all.written += sectors(&touched),
                _ => {
                    let [turns, least] = turns(&touched);
                    all.shared += turns;
                    all.least += least;
                }
            }
        }
        all
    }
}

fn sectors(touched: &[(u64, u64)]) -> u64 {
    let of = |&(at, bytes): &(u64, u64)| at / SECTOR..=(at + bytes - 1) / SECTOR;
    let mut all: Vec<u64> = touched.iter().flat_map(of).collect();
    all.sort_unstable();
    all.dedup();
    all.len() as u64
}

/// Turns of shared memory, and the fewest: as many threads at once as ask for 128 bytes.
fn turns(touched: &[(u64, u64)]) -> [u64; 2] {
    let mut turns = [0, 0];
    let bytes = touched.first().map_or(WORD, |t| t.1).max(WORD);
    for part in touched.chunks((BANKS * WORD / bytes) as usize) {
        let of = |&(at, bytes): &(u64, u64)| at / WORD..=(at + bytes - 1) / WORD;
        let mut words: Vec<u64> = part.iter().flat_map(of).collect();
        words.sort_unstable();
        words.dedup();
        let mut banks = [0; BANKS as usize];
        words.iter().for_each(|word| banks[(word % BANKS) as usize] += 1);
        turns[0] += banks.into_iter().max().unwrap_or(0);
        turns[1] += 1;
    }
    turns
}
