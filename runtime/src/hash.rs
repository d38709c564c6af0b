//! Hashes of large files by all processors: the same blake3 as anywhere else, whose tree of blocks
//! can be computed in any order.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

/// A blake3 hash.
pub type Hash = [u8; 32];

/// What one thread takes at a time: a power of two, so that blocks are whole subtrees.
const BLOCK: usize = 1 << 20;
/// Blocks for which it is worth to start another thread.
const BLOCKS_OF_THREAD: usize = 4;
/// More threads than this are slower than memory.
const MAX_THREADS: usize = 8;

/// The hash of each part.
pub fn hashes(parts: &[&[u8]]) -> Vec<Hash> {
    let blocks = parts.iter().flat_map(|part| blocks(part)).collect();
    let values = values(blocks);
    let mut rest = &values[..];
    let take = |part: &&[u8]| {
        let (these, after) = rest.split_at(part.len().div_ceil(BLOCK).max(1));
        rest = after;
        root(these)
    };
    parts.iter().map(take).collect()
}

/// The hash of a file in which some bytes are taken as zeros.
///
/// # Panics
/// When the range does not lie in the file.
pub fn hash_without(file: &[u8], hole: Range<usize>) -> Hash {
    assert!(hole.start <= hole.end && hole.end <= file.len(), "{hole:?} of {} bytes", file.len());
    let mut blocks: Vec<Block<'_>> = blocks(file).collect();
    for block in &mut blocks {
        let len = block.bytes.len();
        let inside = |at: usize| at.clamp(block.offset, block.offset + len) - block.offset;
        let range = inside(hole.start)..inside(hole.end);
        if !range.is_empty() {
            block.bytes.to_mut()[range].fill(0);
        }
    }
    root(&values(blocks))
}

/// A part of a part.
struct Block<'a> {
    bytes: Cow<'a, [u8]>,
    offset: usize,
    /// Whether it is the whole.
    alone: bool,
}

impl Block<'_> {
    /// The hash of a whole part, else the value that its tree has here.
    fn value(&self) -> Hash {
        if self.alone {
            return *blake3::hash(&self.bytes).as_bytes();
        }
        let mut hasher = Hasher::new();
        hasher.set_input_offset(self.offset as u64).update(&self.bytes);
        hasher.finalize_non_root()
    }
}

/// At least one, for a hash of nothing as well.
fn blocks(part: &[u8]) -> impl Iterator<Item = Block<'_>> {
    let block = |offset: usize| {
        let bytes = Cow::Borrowed(&part[offset..part.len().min(offset + BLOCK)]);
        Block { bytes, offset, alone: part.len() <= BLOCK }
    };
    (0..part.len().max(1)).step_by(BLOCK).map(block)
}

fn values(blocks: Vec<Block<'_>>) -> Vec<Hash> {
    let bytes: usize = blocks.iter().map(|block| block.bytes.len()).sum();
    // The system is asked only where it matters: the answer takes longer than a small hash.
    let threads = match (bytes / (BLOCKS_OF_THREAD * BLOCK)).min(MAX_THREADS) {
        useful @ (0 | 1) => useful,
        useful => useful.min(thread::available_parallelism().map_or(1, usize::from)),
    };
    let next = AtomicUsize::new(0);
    let done = Mutex::new(vec![[0; 32]; blocks.len()]);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = blocks.get(index) else { return };
            let value = block.value();
            done.lock().unwrap_or_else(PoisonError::into_inner)[index] = value;
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // A thread that is refused is one that helps less.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The two halves of a tree: blake3 puts as many whole blocks as a power of two to the left.
fn halves(values: &[Hash]) -> (&[Hash], &[Hash]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

fn root(values: &[Hash]) -> Hash {
    if let [value] = values {
        return *value;
    }
    let (left, right) = halves(values);
    *merge_subtrees_root(&inner(left), &inner(right), Mode::Hash).as_bytes()
}

fn inner(values: &[Hash]) -> Hash {
    if let [value] = values {
        return *value;
    }
    let (left, right) = halves(values);
    merge_subtrees_non_root(&inner(left), &inner(right), Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_blake3() {
        let sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, 9 * BLOCK + 5];
        let bytes: Vec<u8> = (0..9 * BLOCK + 5).map(|i| ((i * 31) >> 3) as u8).collect();
        let parts: Vec<&[u8]> = sizes.iter().map(|&size| &bytes[..size]).collect();
        let expected: Vec<Hash> = parts.iter().map(|p| *blake3::hash(p).as_bytes()).collect();
        assert_eq!(hashes(&parts), expected);
        for hole in [0..32, BLOCK - 7..BLOCK + 25, 9 * BLOCK..9 * BLOCK + 5] {
            let mut zeros = bytes.clone();
            zeros[hole.clone()].fill(0);
            assert_eq!(hash_without(&bytes, hole), *blake3::hash(&zeros).as_bytes());
        }
    }
}
