//! One file for each command, and what they share.

pub mod again;
pub mod bench;
pub mod check;
pub mod compile;
pub mod cuda;
pub mod doctor;
pub mod explain;
pub mod inspect;
pub mod inspect_artifact;
pub mod inspect_cuda;
pub mod locate;
pub mod ops;
pub mod profile;
pub mod ready;
pub mod run;
pub mod shell;
pub mod verify;
pub mod verify_artifact;
pub mod verify_cuda;
pub mod verify_stages;

use std::path::Path;
use std::time::{Duration, Instant};

use kiln::error::sanitize;
use kiln::tensor::TensorView;
use kiln::{CacheUse, Compiler, Executable, Limits, Model};

use crate::args::{BuildArgs, CacheArgs, InputArgs, ModelArgs, StateArgs};
use crate::failure::Failure;
use crate::input::{self, Given};
use crate::term::Term;

/// The limits that the flags ask for.
fn limits(args: &ModelArgs) -> Limits {
    let default = Limits::default();
    Limits {
        max_nodes: args.max_nodes.unwrap_or(default.max_nodes),
        max_bytes: args.max_memory.unwrap_or(default.max_bytes),
        max_rank: args.max_rank.unwrap_or(default.max_rank),
        max_depth: args.max_depth.unwrap_or(default.max_depth),
        max_egraph: args.max_egraph.unwrap_or(default.max_egraph),
        max_kernels: args.max_kernels.unwrap_or(default.max_kernels),
    }
}

/// Reads a model, and says how long that took.
fn open(args: &ModelArgs, term: &Term) -> Result<(Model, Duration), Failure> {
    if kiln::is_artifact(&args.model) {
        let text = format!("{} is a compiled model", model_name(&args.model));
        return Err(Failure::usage(text).help("this needs the .onnx file"));
    }
    let begin = Instant::now();
    let limits = limits(args);
    let model = term.during("read", None, || Model::open(&args.model, &limits))?;
    Ok((model, begin.elapsed()))
}

/// The number of threads that the flags ask for.
fn threads(build: &BuildArgs) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    if build.threads == 0 { all() } else { build.threads }
}

/// A compiler as the flags ask for, without the extents of dims.
fn compiler(model: &ModelArgs, build: &BuildArgs) -> Compiler {
    let compiler = Compiler::new()
        .threads(threads(build))
        .egraph(!build.no_egraph)
        .wide(!build.no_wide)
        .exact_convolutions(build.exact_conv)
        .precision(build.precision)
        .limits(limits(model));
    model.dim.iter().fold(compiler, |compiler, (name, extent)| compiler.dim_range(name, *extent))
}

/// The compiler with the cache that the flags ask for.
fn with_cache(compiler: Compiler, args: &CacheArgs) -> Compiler {
    match &args.cache {
        Some(folder) => compiler.cache(folder),
        None => compiler,
    }
}

/// The compiler with the states that the flags name.
fn with_states(compiler: Compiler, args: &StateArgs) -> Compiler {
    args.state.iter().fold(compiler, |compiler, (input, output)| compiler.state(input, output))
}

/// Reads the tensors that the flags give, and tells the compiler the shapes that they settle.
fn gather(
    model: &Model,
    args: &InputArgs,
    fallback: bool,
    compiler: &Compiler,
) -> Result<(Given, Compiler), Failure> {
    let names = model.inputs().iter().map(|port| port.name.clone()).collect();
    let given = input::gather(names, args, fallback)?;
    let tensors: Vec<(&str, TensorView<'_>)> = model
        .inputs()
        .iter()
        .filter_map(|port| Some((port.name.as_str(), given.tensor(&port.name)?.view())))
        .collect();
    let compiler = compiler.for_inputs(model, &tensors)?;
    drop(tensors);
    Ok((given, compiler))
}

/// Compiles a model, and says how long that took.
fn compile(
    model: &Model,
    compiler: &Compiler,
    term: &Term,
) -> Result<(Executable, Duration), Failure> {
    let begin = Instant::now();
    let compiled = term.during("compile", None, || compiler.compile_through_cache(model))?;
    let (executable, cache) = compiled;
    say_cache(&cache, term);
    Ok((executable, begin.elapsed()))
}

/// Says what a cache did, where there is one.
fn say_cache(cache: &CacheUse, term: &Term) {
    if *cache != CacheUse::Off {
        term.detail(format_args!("cache: {}", sanitize(&cache.to_string())));
    }
}

/// The name of a model in results: that of its file.
fn model_name(path: &Path) -> String {
    sanitize(&path.display().to_string())
}
