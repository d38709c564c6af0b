//! One file for each command, and what they share.

pub mod bench;
pub mod check;
pub mod compile;
pub mod doctor;
pub mod explain;
pub mod inspect;
pub mod locate;
pub mod ops;
pub mod run;
pub mod shell;
pub mod verify;

use std::path::Path;
use std::time::{Duration, Instant};

use kiln::error::sanitize;
use kiln::{Compiler, Executable, Limits, Model, ModelPort};

use crate::args::{BuildArgs, InputArgs, ModelArgs};
use crate::failure::Failure;
use crate::input::{self, Given};
use crate::term::Term;

/// The limits that the flags ask for.
fn limits(args: &ModelArgs) -> Limits {
    let mut limits = Limits::default();
    if let Some(max_nodes) = args.max_nodes {
        limits.max_nodes = max_nodes;
    }
    if let Some(max_memory) = args.max_memory {
        limits.max_bytes = max_memory;
    }
    limits
}

/// Reads a model, and says how long that took.
fn open(args: &ModelArgs, term: &Term) -> Result<(Model, Duration), Failure> {
    let begin = Instant::now();
    let limits = limits(args);
    let model = term.during("read", None, || Model::open(&args.model, &limits))?;
    Ok((model, begin.elapsed()))
}

/// A compiler as the flags ask for, without the extents of dims.
fn compiler(model: &ModelArgs, build: &BuildArgs) -> Compiler {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if build.threads == 0 { all() } else { build.threads };
    let compiler = Compiler::new()
        .threads(threads)
        .egraph(!build.no_egraph)
        .wide(!build.no_wide)
        .limits(limits(model));
    model.dim.iter().fold(compiler, |compiler, (name, extent)| compiler.dim(name, *extent))
}

/// Reads the tensors that the flags give, and tells the compiler the dims that they settle.
fn gather(
    model: &Model,
    dims: &[(String, usize)],
    args: &InputArgs,
    fallback: bool,
    mut compiler: Compiler,
) -> Result<(Given, Compiler), Failure> {
    let names = model.inputs().iter().map(|port| port.name.clone()).collect();
    let given = input::gather(names, args, fallback)?;
    let mut known: Vec<&str> = dims.iter().map(|(name, _)| name.as_str()).collect();
    for port in model.inputs() {
        let Some(tensor) = given.tensor(&port.name) else { continue };
        for (dim, extent) in dim_names(port).into_iter().zip(tensor.shape()) {
            if let Some(dim) = dim.filter(|dim| !known.contains(dim)) {
                known.push(dim);
                compiler = compiler.dim(dim, *extent);
            }
        }
    }
    Ok((given, compiler))
}

/// The names of an input's dims; those that are numbers, or unknown, have none.
fn dim_names(port: &ModelPort) -> Vec<Option<&str>> {
    let dims = port.ty.split_once('[').map_or("", |(_, dims)| dims.trim_end_matches(']'));
    let name = |dim: &'_ str| dim != "?" && !dim.is_empty() && dim.parse::<u64>().is_err();
    dims.split(',').map(|dim| Some(dim).filter(|dim| name(dim))).collect()
}

/// Compiles a model, and says how long that took.
fn compile(
    model: &Model,
    compiler: &Compiler,
    term: &Term,
) -> Result<(Executable, Duration), Failure> {
    let begin = Instant::now();
    let executable = term.during("compile", None, || compiler.compile(model))?;
    Ok((executable, begin.elapsed()))
}

/// The name of a model in results: that of its file.
fn model_name(path: &Path) -> String {
    sanitize(&path.display().to_string())
}
