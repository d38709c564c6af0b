//! An interpreter of PTX: of that part which Kiln emits, and nothing else.
//!
//! It runs whole grids, one thread after another up to the next barrier or shuffle, and says what a
//! GPU would keep to itself: registers and memory that are read before they are written, places
//! outside of buffers or not aligned, races between threads, threads that do not meet.

mod arithmetic;
mod memory;
mod parse;
mod requests;
mod run;
mod warp;

use std::fmt;

pub use memory::Memory;
pub use parse::{Kernel, Module, parse};
pub use requests::Transactions;
pub use run::{Copies, Counts, address, launch, launch_at, piece};

/// What a kernel does wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The kernel.
    pub kernel: String,
    /// The instruction.
    pub instruction: String,
    /// The block.
    pub block: usize,
    /// The thread in its block.
    pub thread: usize,
    /// What is wrong.
    pub why: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Fault { kernel, instruction, block, thread, why } = self;
        write!(f, "{kernel}: {why} at `{instruction}` in thread {thread} of block {block}")
    }
}
