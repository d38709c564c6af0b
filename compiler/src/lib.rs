//! Kiln: a tensor compiler. It takes a trained network and makes machine code of it.

pub mod error;
pub mod graph;
