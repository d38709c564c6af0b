//! The loop form of one kernel: explicit loops, loads and stores over flat buffers.

pub mod ahead;
pub mod attention;
pub mod boxes;
pub mod contract;
pub mod cursor;
pub mod dots;
pub mod eval;
pub mod gpu;
pub mod gpu_attention;
pub mod gpu_tiles;
pub mod index;
pub mod ir;
pub mod lanes;
pub mod lower;
pub mod moves;
pub mod narrow;
pub mod nest;
pub mod panels;
pub mod rewrite;
pub mod share;
pub mod straight;
pub mod text;
pub mod turn;
pub mod verify;
pub mod winograd;
pub mod words;
