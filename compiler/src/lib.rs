//! Kiln: a tensor compiler. It takes a trained network and makes machine code of it.

pub mod backend;
pub mod compile;
pub mod error;
pub mod graph;
pub mod loops;
pub mod plan;

#[cfg(test)]
mod tests;
