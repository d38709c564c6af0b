//! Backends: from loops to code.

pub mod cpu;
pub mod cuda;
