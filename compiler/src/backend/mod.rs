//! Backends: from loops to code. One walk over the loops (`emit.rs`), and machines behind it that
//! turn its steps into instructions.

pub mod cpu;
pub mod cuda;
pub mod dot;
pub mod emit;
mod invariant;
pub mod machine;
pub mod math;
mod math64;
pub mod rounded;
mod weave;
