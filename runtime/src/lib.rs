//! What a compiled Kiln model needs to run: tensors, plans, threads and memory.
//!
//! An [`artifact::Artifact`] is a [`plan::Plan`] (which kernel runs when, on which buffers), the
//! machine [`code`](code::Code) of the kernels and their constants. An [`session::Executable`]
//! runs it, cut in chunks over a [`pool::Pool`]. It comes from the compiler, or from a file
//! ([`load`]) that says what it is ([`manifest`]).

pub mod artifact;
pub mod code;
pub mod cpu;
pub mod given;
pub mod gpu;
pub mod hash;
pub mod load;
pub mod manifest;
pub mod memory;
pub mod npz;
pub mod plan;
pub mod pool;
mod run_error;
mod scratch;
pub mod session;
pub mod state;
pub mod tensor;
pub mod work;
