//! One short program for each way to use Kiln:
//!
//! * `digits`: compile a model once, run it on many inputs without allocating;
//! * `serve`: share one compiled model between the threads of a service;
//! * `load`: load a compiled model without the compiler;
//! * `cuda`: compile a model for a GPU, and run it where there is one.
//!
//! Run one with `cargo run --release -p kiln-examples --example digits`.

use std::path::{Path, PathBuf};

/// A file that ships with the examples.
pub fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}
