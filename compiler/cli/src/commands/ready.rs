//! What is run: a model that is compiled here, or a compiled one from a file. One whose shapes hang
//! on data that it computes is compiled while it runs.

use std::path::Path;
use std::time::{Duration, Instant};

use kiln::plan::Plan;
use kiln::{ArtifactFile, Executable, OnDemand, Precision};

use crate::args::{BuildArgs, CacheArgs, GivenArgs, InputArgs, ModelArgs, StateArgs};
use crate::commands::{
    compile, compiler, gather, model_name, open, threads, with_cache, with_states,
};
use crate::failure::Failure;
use crate::input::{self, Given, Inputs};
use crate::term::Term;

/// A model with tensors for its inputs.
pub struct Ready {
    /// The model.
    pub executable: Executable,
    /// Its inputs.
    pub inputs: Inputs,
    /// How long it took to read the file; for a compiled model, to check and load it as well.
    pub read: Duration,
    /// How long it took to compile; a compiled model is so already.
    pub compile: Option<Duration>,
}

/// A model that is run.
pub enum Found {
    /// It is compiled.
    Whole(Ready),
    /// It is compiled in stages as it runs, on these tensors.
    Staged(OnDemand, Given),
}

/// Makes a model ready to run. `fallback` says whether inputs that are not given may be random.
pub fn ready(given: &GivenArgs, fallback: bool, term: &Term) -> Result<Ready, Failure> {
    match find(given, fallback, term)? {
        Found::Whole(ready) => Ok(ready),
        Found::Staged(..) => Err(staged(&given.model)),
    }
}

/// A refusal of a model that runs in stages.
pub fn staged(model: &ModelArgs) -> Failure {
    let name = model_name(&model.model);
    let text = format!("{name} has shapes that hang on data that it computes: it runs in stages");
    Failure::usage(text).help("`kiln run` runs it, `kiln verify` checks it, both on the CPU")
}

/// What is run, compiled as far as it can be before.
pub fn find(given: &GivenArgs, fallback: bool, term: &Term) -> Result<Found, Failure> {
    let GivenArgs { model, build, cache, inputs, states } = given;
    if kiln::is_artifact(&model.model) {
        refuse_flags(model, build, cache)?;
        refuse_states(model, states)?;
        let begin = Instant::now();
        let file = opened(&model.model, term)?;
        return Ok(Found::Whole(loaded(file, &model.model, build, inputs, fallback, begin)?));
    }
    let (onnx, read) = open(model, term)?;
    let compiler = with_states(with_cache(compiler(model, build), cache), states);
    let (given, executable, compile) = match states.state.is_empty() {
        true => {
            let (given, settled) = gather(&onnx, inputs, fallback, &compiler)?;
            if settled.needs_stages() {
                return Ok(Found::Staged(compiler.on_demand(&onnx), given));
            }
            let compiler = settled;
            let (executable, compile) = compile(&onnx, &compiler, term)?;
            (given, executable, compile)
        }
        // Whoever keeps a state runs often: one executable for all lengths of the dims.
        false => {
            let names = onnx.inputs().iter().map(|port| port.name.clone()).collect();
            let given = input::gather(names, inputs, fallback)?;
            let begin = Instant::now();
            let executable = term.during("compile", None, || compiler.compile_ranges(&onnx))?;
            (given, executable, begin.elapsed())
        }
    };
    let inputs = complete(given, executable.plan(), fallback)?;
    Ok(Found::Whole(Ready { executable, inputs, read, compile: Some(compile) }))
}

/// Opens a compiled model; nothing of it runs.
pub fn opened(path: &Path, term: &Term) -> Result<ArtifactFile, Failure> {
    Ok(term.during("read", None, || kiln::open_artifact(path))?)
}

/// Loads a compiled model that was opened from `path` at `begin`.
pub fn loaded(
    file: ArtifactFile,
    path: &Path,
    build: &BuildArgs,
    inputs: &InputArgs,
    fallback: bool,
    begin: Instant,
) -> Result<Ready, Failure> {
    // SAFETY: the person named the file as one to be run; the help text says that it is code.
    let executable = unsafe { kiln::load_opened(file, path, threads(build)) }?;
    let read = begin.elapsed();
    let names = executable.inputs().iter().map(|port| port.name.clone()).collect();
    let inputs = complete(input::gather(names, inputs, fallback)?, executable.plan(), fallback)?;
    Ok(Ready { executable, inputs, read, compile: None })
}

/// Tensors for all inputs; states that are not given begin as the model says, unless anything may
/// be made up.
pub fn complete(given: Given, plan: &Plan, fallback: bool) -> Result<Inputs, Failure> {
    let mut ports = Vec::new();
    for (index, port) in plan.longest_inputs().into_iter().enumerate() {
        let is_state = plan.states.iter().any(|state| state.input == index);
        if !is_state || fallback || given.tensor(&port.name).is_some() {
            ports.push(port);
        }
    }
    given.complete(&ports)
}

/// States are decided when a model is compiled.
pub fn refuse_states(model: &ModelArgs, states: &StateArgs) -> Result<(), Failure> {
    if states.state.is_empty() {
        return Ok(());
    }
    let name = model_name(&model.model);
    let text = format!("--state is for models that are compiled, {name} is compiled already");
    Err(Failure::usage(text).help("a compiled model keeps the states that it was compiled with"))
}

/// A flag that does nothing would be a promise that is not kept.
pub fn refuse_flags(
    model: &ModelArgs,
    build: &BuildArgs,
    cache: &CacheArgs,
) -> Result<(), Failure> {
    let flags = [
        ("--dim", !model.dim.is_empty()),
        ("--max-nodes", model.max_nodes.is_some()),
        ("--max-memory", model.max_memory.is_some()),
        ("--no-egraph", build.no_egraph),
        ("--exact-conv", build.exact_conv),
        ("--precision", build.precision != Precision::F32),
        ("--no-wide", build.no_wide),
        ("--cache", cache.cache.is_some()),
    ];
    match flags.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => {
            let name = model_name(&model.model);
            let text =
                format!("{flag} is for models that are compiled, {name} is compiled already");
            Err(Failure::usage(text).help(format!("leave {flag} out, or give the .onnx file")))
        }
    }
}
