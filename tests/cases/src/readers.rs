//! Every reader of bytes that nobody trusts, as a function of bytes alone: for tests that damage
//! files, and for fuzzers.

use bytes::Bytes;
use kiln::loops::verify::verify as verify_loops;
use kiln::onnx::{ImportOptions, Limits};
use kiln::{ArtifactFile, manifest, npz};

/// Reads a file, or says why not.
pub type Reader = fn(&[u8]) -> Result<(), String>;

/// An array of NumPy.
pub fn npy(bytes: &[u8]) -> Result<(), String> {
    npz::read_npy(bytes).map(drop).map_err(|e| e.to_string())
}

/// An archive of arrays.
pub fn npz(bytes: &[u8]) -> Result<(), String> {
    npz::read_npz(bytes).map(drop).map_err(|e| e.to_string())
}

/// A tensor of ONNX.
pub fn pb(bytes: &[u8]) -> Result<(), String> {
    let tensor = kiln::onnx::read_tensor(Bytes::copy_from_slice(bytes));
    tensor.map(drop).map_err(|e| e.to_string())
}

/// The text of a graph, proved to be one.
pub fn graph_text(bytes: &[u8]) -> Result<(), String> {
    let graph = kiln::graph::text::parse(&String::from_utf8_lossy(bytes), &[]);
    let graph = graph.map_err(|e| e.to_string())?;
    kiln::graph::verify::verify(graph).map(drop).map_err(|e| e.to_string())
}

/// The text of loops, proved to stay within their buffers.
pub fn loops_text(bytes: &[u8]) -> Result<(), String> {
    let loops = kiln::loops::text::parse(&String::from_utf8_lossy(bytes));
    let loops = loops.map_err(|e| e.to_string())?;
    loops.iter().try_for_each(|loops| verify_loops(loops).map_err(|e| e.0))
}

/// A compiled model.
pub fn artifact(bytes: &[u8]) -> Result<(), String> {
    ArtifactFile::from_bytes(bytes).map(drop).map_err(|e| e.to_string())
}

/// A compiled model whose hash is made to fit, as one who means harm would write it.
pub fn sealed_artifact(bytes: &[u8]) -> Result<(), String> {
    const HEADER: usize = 64;
    let mut bytes = bytes.to_vec();
    let at = bytes.windows(manifest::MAGIC.len()).position(|w| w == manifest::MAGIC);
    if let Some(at) = at.filter(|at| at + HEADER <= bytes.len()) {
        manifest::seal(&mut bytes, at);
    }
    artifact(&bytes)
}

/// A model, imported with little memory.
pub fn model(bytes: &[u8]) -> Result<(), String> {
    let limits = Limits { nodes: 10_000, bytes: 64 << 20, ..Limits::default() };
    let options = ImportOptions { limits, ..ImportOptions::default() };
    let graph = kiln::onnx::import(Bytes::copy_from_slice(bytes), &options);
    graph.map(drop).map_err(|e| e.to_string())
}
