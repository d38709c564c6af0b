//! `kiln compile`: a library or object with its header, or a stage of the pipeline as text.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use kiln::backend::cpu::Cpu;
use kiln::backend::cuda::Gpu;
use kiln::{Compiler, Form, Kind, Model, identifier};
use serde_json::json;

use crate::args::{CompileArgs, Device, Emit, Weights};
use crate::commands::cuda::{parts, refuse_for_gpus};
use crate::commands::{compiler, model_name, open, with_states};
use crate::failure::Failure;
use crate::files;
use crate::term::{Term, bytes};

/// Compiles and writes what was asked for.
pub fn run(args: &CompileArgs, term: &Term) -> Result<(), Failure> {
    let emit = what(args)?;
    if args.name.as_ref().is_some_and(|name| identifier(name) != *name) {
        let wrong = args.name.as_deref().unwrap_or_default();
        return Err(Failure::usage(format!("--name {wrong:?} is no name for a function in C"))
            .help(format!("letters, digits and _, such as {}", identifier(wrong))));
    }
    let cpu = Cpu::named(args.target.as_deref(), args.cpu.as_deref())?;
    let (model, _) = open(&args.model, term)?;
    let compiler = with_states(compiler(&args.model, &args.build), &args.states).target(cpu);
    let contents = match kind(emit) {
        _ if emit == Emit::Kiln => kiln_file(args, &compiler, &model, term)?,
        _ if args.device == Device::Cuda => cuda(args, emit, &compiler, &model, term)?,
        Some(kind) => package(args, (emit, kind), &compiler, &model, term)?,
        None => {
            let stages = term.during("compile", None, || compiler.stages(&model))?;
            if emit == Emit::Clif && stages.clif.is_empty() {
                term.note("note: every kernel is wide code here; --no-wide shows Cranelift's form");
            }
            text(match emit {
                Emit::Graph => &stages.graph,
                Emit::Fused => &stages.fused,
                Emit::Loops => &stages.loops,
                Emit::Clif => &stages.clif,
                Emit::Asm => &stages.asm,
                Emit::Plan
                | Emit::Ptx
                | Emit::Kiln
                | Emit::So
                | Emit::Obj
                | Emit::Staticlib
                | Emit::Header => &stages.plan,
            })
        }
    };
    let path = args.output.as_deref().unwrap_or(Path::new("-"));
    files::write(path, |out| out.write_all(&contents))?;
    if args.output.is_none() {
        return Ok(());
    }
    let (name, size) = (model_name(path), contents.len());
    term.note(format_args!("wrote {name} ({})", bytes(size as u64)));
    if term.json {
        let model = model_name(&args.model.model);
        let value = json!({ "ok": true, "model": model, "output": name, "bytes": size });
        return term.report(value, "");
    }
    Ok(())
}

/// What to write: as asked, or as the ending of the output says.
fn what(args: &CompileArgs) -> Result<Emit, Failure> {
    let ending = args.output.as_deref().and_then(Path::extension).and_then(|e| e.to_str());
    let emit = match (args.emit, ending) {
        (Some(emit), _) => emit,
        (None, Some("ptx")) => Emit::Ptx,
        (None, Some("kiln")) => Emit::Kiln,
        (None, Some("so")) => Emit::So,
        (None, Some("o" | "obj")) => Emit::Obj,
        (None, Some("a" | "lib")) => Emit::Staticlib,
        (None, Some("h")) => Emit::Header,
        (None, _) if args.device == Device::Cuda => Emit::Ptx,
        (None, _) if args.output.is_none() => Emit::Plan,
        (None, _) => {
            return Err(Failure::usage("the ending of the output does not say what to write")
                .help("end it with .so, .o, .a or .h, or say --emit"));
        }
    };
    if !args.sm.is_empty() && args.device != Device::Cuda {
        return Err(Failure::usage("--sm is for GPUs").help("say --device cuda as well"));
    }
    if args.device == Device::Cuda {
        refuse_for_gpus(&args.build)?;
        if args.target.is_some() || args.cpu.is_some() {
            return Err(Failure::usage("--target and --cpu are for CPUs").help("say --sm for GPUs"));
        }
    }
    let for_gpu = matches!(emit, Emit::Ptx | Emit::Kiln);
    if for_gpu != (args.device == Device::Cuda)
        && !matches!(emit, Emit::Graph | Emit::Fused | Emit::Loops | Emit::Plan)
    {
        return Err(Failure::usage("this is not what that device runs").help(
            "--device cuda goes with -o model.kiln, or --emit ptx, plan, loops, fused, graph",
        ));
    }
    let binary = matches!(emit, Emit::So | Emit::Obj | Emit::Staticlib | Emit::Kiln);
    if binary && args.output.is_none() && std::io::stdout().is_terminal() {
        return Err(Failure::usage("a library or object is no text for a terminal")
            .help("give a file with -o model.so"));
    }
    if args.weights == Weights::External && (!binary || args.output.is_none()) {
        return Err(Failure::usage("--weights external goes with a library or object in a file")
            .help("give a file with -o model.so"));
    }
    Ok(emit)
}

fn kind(emit: Emit) -> Option<Kind> {
    match emit {
        Emit::So | Emit::Header => Some(Kind::Shared),
        Emit::Obj => Some(Kind::Object),
        Emit::Staticlib => Some(Kind::Archive),
        Emit::Graph
        | Emit::Fused
        | Emit::Loops
        | Emit::Clif
        | Emit::Asm
        | Emit::Ptx
        | Emit::Kiln
        | Emit::Plan => None,
    }
}

/// A stage for a GPU as text; of PTX one text for each version.
fn cuda(
    args: &CompileArgs,
    emit: Emit,
    compiler: &Compiler,
    model: &Model,
    term: &Term,
) -> Result<Vec<u8>, Failure> {
    let gpus = versions(args)?;
    let lowered = || term.during("compile", None, || compiler.cuda(model, gpus[0]));
    let compiled = || term.during("compile", None, || compiler.compile_cuda(model, &gpus));
    let stage = match emit {
        Emit::Graph => kiln::graph::text::print(&compiler.graph_for_ranges(model)?),
        Emit::Fused => kiln::graph::text::print(&lowered()?.kernels),
        Emit::Loops => lowered()?.program.kernels.iter().map(kiln::loops::text::print).collect(),
        Emit::Plan => {
            let artifact = compiled()?;
            format!("{}device memory: {}\n", artifact.plan, parts(&artifact.memory()))
        }
        // What a file has: kernels that only constants hang on ran when it was compiled.
        _ => {
            let artifact = compiled()?;
            let texts = artifact.modules.iter().filter_map(|module| artifact.text(module));
            let texts = texts.map(|text| text.to_string_lossy());
            texts.collect::<Vec<_>>().join("\n")
        }
    };
    Ok(text(&stage))
}

/// The versions of the instruction set that are asked for.
fn versions(args: &CompileArgs) -> Result<Vec<Gpu>, Failure> {
    let versions = if args.sm.is_empty() { &[80][..] } else { &args.sm };
    let version = |&sm: &u32| {
        Gpu::of(sm).ok_or_else(|| {
            let known: Vec<String> = Gpu::known().iter().map(u32::to_string).collect();
            Failure::usage(format!("--sm {sm} is not known"))
                .help(format!("give one of {}", known.join(", ")))
        })
    };
    versions.iter().map(version).collect()
}

/// Compiles to a file for GPUs, and writes weights that go beside it.
fn kiln_file(
    args: &CompileArgs,
    compiler: &Compiler,
    model: &Model,
    term: &Term,
) -> Result<Vec<u8>, Failure> {
    let path = args.output.as_deref().filter(|path| *path != Path::new("-"));
    let stem = path.unwrap_or(&args.model.model).file_stem().unwrap_or_default();
    let name = args.name.clone().unwrap_or_else(|| identifier(&stem.to_string_lossy()));
    let weights = path.map(|path| path.with_extension("weights"));
    let weights = weights.filter(|_| args.weights == Weights::External);
    let file_name = |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
    let beside = weights.as_ref().and_then(file_name);
    let form = Form { kind: Kind::Object, name, file: None, weights: beside };
    let gpus = versions(args)?;
    let package = term.during("compile", None, || compiler.package_cuda(model, &gpus, &form))?;
    if let (Some(path), Some(weights)) = (&weights, &package.weights) {
        files::write(path, |out| out.write_all(weights.bytes()))?;
        term.note(format_args!("wrote {} ({})", model_name(path), bytes(weights.len() as u64)));
    }
    let memory = bytes(package.scratch_bytes as u64);
    term.note(format_args!("a run takes {memory} of device memory, with the weights"));
    Ok(package.file)
}

/// Compiles to a library, object or header, and writes what goes beside it.
fn package(
    args: &CompileArgs,
    (emit, kind): (Emit, Kind),
    compiler: &Compiler,
    model: &Model,
    term: &Term,
) -> Result<Vec<u8>, Failure> {
    let path = args.output.as_deref().filter(|path| *path != Path::new("-"));
    let stem = path.unwrap_or(&args.model.model).file_stem().unwrap_or_default();
    let name = args.name.clone().unwrap_or_else(|| {
        let stem = stem.to_string_lossy();
        identifier(stem.strip_prefix("lib").filter(|s| !s.is_empty()).unwrap_or(&stem))
    });
    let beside = |ending: &str| -> Option<PathBuf> {
        path.filter(|path| path.extension().is_none_or(|e| e != ending))
            .map(|path| path.with_extension(ending))
    };
    let weights = beside("weights").filter(|_| args.weights == Weights::External);
    let file_name = |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
    let file = path.map(Path::to_path_buf).as_ref().and_then(file_name);
    let form = Form { kind, name, file, weights: weights.as_ref().and_then(file_name) };
    let package = term.during("compile", None, || compiler.package(model, &form))?;
    if emit == Emit::Header {
        return Ok(package.header.into_bytes());
    }
    if let (Some(path), Some(weights)) = (&weights, &package.weights) {
        files::write(path, |out| out.write_all(weights.bytes()))?;
        term.note(format_args!("wrote {} ({})", model_name(path), bytes(weights.len() as u64)));
    }
    let longest = match args.model.dim.iter().any(|(_, range)| range.least < range.most) {
        true => " for the longest dims",
        false => "",
    };
    let scratch = bytes(package.scratch_bytes as u64);
    term.note(format_args!("a run takes {scratch} of memory{longest}"));
    if let Some(path) = beside("h") {
        files::write(&path, |out| out.write_all(package.header.as_bytes()))?;
        term.note(format_args!("wrote {}", model_name(&path)));
    }
    Ok(package.file)
}

/// Text without the control characters that names of a model may bring in.
fn text(stage: &str) -> Vec<u8> {
    let clean = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    stage.chars().map(clean).collect::<String>().into_bytes()
}
