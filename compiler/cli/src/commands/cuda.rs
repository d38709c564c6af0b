//! Models on GPUs: made ready, run, timed, compared.

use std::path::Path;
use std::time::{Duration, Instant};

use kiln::backend::cuda::Gpu as Isa;
use kiln::error::{Diagnostic, sanitize};
use kiln::gpu::{DeviceMemory, GpuArtifact};
use kiln::graph::Graph;
use kiln::graph::eval::Value as Meaning;
use kiln::plan::Plan;
use kiln::tensor::{Tensor, TensorView};
use kiln::work::Profile;
use kiln::{ArtifactFile, Compiler, Model};
use kiln_cuda::driver::Device;
use kiln_cuda::{CudaError, CudaModel, CudaSession, Gpu, Options};

use crate::args::{BuildArgs, GivenArgs, ModelArgs};
use crate::commands::again::{Split, split};
use crate::commands::locate::{Probe, look, place, probed};
use crate::commands::ready::{complete, opened, refuse_flags, refuse_states};
use crate::commands::{compiler, gather, model_name, open, say_cache, with_cache, with_states};
use crate::device::{DeviceArgs, Place};
use crate::failure::{Exit, Failure, What};
use crate::input::{self, Inputs};
use crate::peak::Peak;
use crate::stats::Tolerance;
use crate::term::{Term, bytes, milliseconds};

/// A model on a device, with tensors for its inputs.
pub struct Ready {
    /// The model.
    pub model: CudaModel,
    /// Its inputs.
    pub inputs: Inputs,
    /// How long it took to read the file.
    pub read: Duration,
    /// How long it took to compile; a compiled model is so already.
    pub compile: Option<Duration>,
    /// How long the driver took to assemble the kernels, with copying the weights.
    pub load: Duration,
}

/// What a person is told; the exit code says what kind of failure it is.
pub fn failure(error: &CudaError) -> Failure {
    let (code, exit) = match error {
        CudaError::NoDriver => ("K1001", Exit::Incompatible),
        CudaError::OldDriver { .. } => ("K1002", Exit::Incompatible),
        CudaError::Start(_) => ("K1003", Exit::Incompatible),
        CudaError::NoDevice { .. } => ("K1004", Exit::Incompatible),
        CudaError::Architecture { .. } => ("K1005", Exit::Incompatible),
        CudaError::Assembly { .. } => ("K1006", Exit::Incompatible),
        CudaError::Memory { .. } => ("K1007", Exit::Limit),
        CudaError::Limit { .. } => ("K1008", Exit::Limit),
        CudaError::Artifact(_) => ("K1009", Exit::Io),
        CudaError::Run(error) => return Failure::usage(error.to_string()),
        CudaError::Step { .. } => ("K1011", Exit::Other),
        _ => ("K1010", Exit::Other),
    };
    let mut diagnostic = Diagnostic::new(code, error.to_string()).help(error.help());
    match error {
        CudaError::Step { step, kernel, .. } => {
            diagnostic = diagnostic.node(step).found(format!("kernel {kernel}"));
        }
        CudaError::Memory { memory, .. } | CudaError::Limit { memory, .. } => {
            diagnostic = diagnostic.expected(parts(memory));
        }
        _ => {}
    }
    Failure { exit, what: What::Diagnostics(vec![diagnostic]) }
}

/// What device memory consists of.
pub fn parts(memory: &DeviceMemory) -> String {
    let DeviceMemory { weights, arena, ports, kept } = *memory;
    let mut text = format!("{} of weights, {} of values", bytes(weights), bytes(arena));
    text += &format!(", {} of inputs and outputs", bytes(ports));
    if kept > 0 {
        text += &format!(", {} of states", bytes(kept));
    }
    format!("{text}: {}", bytes(memory.total()))
}

/// The device that the flags and the file ask for; none is the CPU.
fn asked_for(device: &DeviceArgs, model: &ModelArgs) -> Result<Option<usize>, Failure> {
    let for_gpu = kiln::is_cuda_artifact(&model.model);
    let name = model_name(&model.model);
    match device.device {
        _ if for_gpu && (device.device == Some(Place::Cpu) || device.fallback.is_some()) => {
            Err(Failure::usage(format!("{name} was compiled for GPUs: no CPU can run it"))
                .help("give the .onnx file"))
        }
        Some(Place::Cuda(_)) if !for_gpu && kiln::is_artifact(&model.model) => {
            Err(Failure::usage(format!("{name} was compiled for CPUs"))
                .help("compile it into a .kiln file: kiln compile --device cuda -o model.kiln"))
        }
        Some(Place::Cuda(ordinal)) => Ok(Some(ordinal)),
        None if for_gpu => Ok(Some(0)),
        Some(Place::Cpu) | None => {
            let flags = [
                ("--fallback", device.fallback.is_some()),
                ("--device-memory", device.device_memory.is_some()),
            ];
            match flags.iter().find(|(_, given)| *given) {
                None => Ok(None),
                Some((flag, _)) => {
                    Err(Failure::usage(format!("{flag} is for GPUs"))
                        .help("say --device cuda as well"))
                }
            }
        }
    }
}

/// Does work on the device that the flags ask for; none where that is the CPU, or a fallback to it.
pub fn on_device<T>(
    device: &DeviceArgs,
    model: &ModelArgs,
    term: &Term,
    work: impl FnOnce(&Gpu) -> Result<T, Failure>,
) -> Result<Option<T>, Failure> {
    let Some(ordinal) = asked_for(device, model)? else { return Ok(None) };
    let opened = term.during("open the device", None, || Gpu::open(ordinal));
    let done = opened.map_err(|error| failure(&error)).and_then(|gpu| work(&gpu));
    // Failures of the person's request, of files and of results are the same on every device.
    let falls_back = |exit| matches!(exit, Exit::Incompatible | Exit::Limit | Exit::Model);
    match done {
        Err(failed) if device.fallback.is_some() && falls_back(failed.exit) => {
            let why = match &failed.what {
                What::Diagnostics(list) => list.first().map(|d| d.message.clone()),
                What::Text(text, _) => Some(text.clone()),
                What::Said => None,
            };
            let why = sanitize(&why.unwrap_or_default());
            term.note(format_args!("note: {why}; this runs on the CPU, as --fallback cpu says"));
            Ok(None)
        }
        done => done.map(Some),
    }
}

/// A flag that does nothing would be a promise that is not kept.
pub fn refuse_for_gpus(build: &BuildArgs) -> Result<(), Failure> {
    let flags = [("--no-wide", build.no_wide)];
    match flags.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(Failure::usage(format!("{flag} is for CPUs so far"))
            .help(format!("leave {flag} out, or --device cuda"))),
    }
}

/// The instruction set that a device's kernels are made for.
pub fn isa(gpu: &Gpu) -> Result<Isa, Failure> {
    Isa::for_device(gpu.device().sm).ok_or_else(|| {
        let (device, made_for) = (gpu.device().clone(), Isa::known());
        failure(&CudaError::Architecture { device, made_for })
    })
}

/// Makes a model ready to run on a device. `fallback` says whether inputs that are not given may be
/// random.
pub fn ready(
    gpu: &Gpu,
    device: &DeviceArgs,
    given: &GivenArgs,
    fallback: bool,
    term: &Term,
) -> Result<Ready, Failure> {
    let GivenArgs { model, build, cache, inputs, states } = given;
    if kiln::is_artifact(&model.model) {
        refuse_flags(model, build, cache)?;
        refuse_states(model, states)?;
        let begin = Instant::now();
        let artifact = artifact(opened(&model.model, term)?, &model.model)?;
        let read = begin.elapsed();
        let names = artifact.plan.inputs.iter().map(|port| port.name.clone()).collect();
        let given = input::gather(names, inputs, fallback)?;
        let inputs = complete(given, &artifact.plan, fallback)?;
        let (model, load) = load(gpu, device, &artifact, term)?;
        return Ok(Ready { model, inputs, read, compile: None, load });
    }
    refuse_for_gpus(build)?;
    let isa = isa(gpu)?;
    let (onnx, read) = open(model, term)?;
    let compiler = with_states(with_cache(compiler(model, build), cache), states);
    let begin = Instant::now();
    let (given, graph) = match states.state.is_empty() {
        true => {
            let (given, compiler) = gather(&onnx, inputs, fallback, &compiler)?;
            (given, compiler.graph(&onnx)?)
        }
        // Whoever keeps a state runs often: one executable for all lengths of the dims.
        false => {
            let names = onnx.inputs().iter().map(|port| port.name.clone()).collect();
            (input::gather(names, inputs, fallback)?, compiler.graph_for_ranges(&onnx)?)
        }
    };
    let compiled =
        term.during("compile", None, || compiler.compile_cuda_through_cache(&onnx, &graph, &[isa]));
    let (artifact, used) = compiled?;
    let compile = Some(begin.elapsed());
    say_cache(&used, term);
    let inputs = complete(given, &artifact.plan, fallback)?;
    let (model, load) = load(gpu, device, &artifact, term)?;
    Ok(Ready { model, inputs, read, compile, load })
}

/// Compiles the graph of a model, or finds what was compiled before.
pub fn compiled(
    compiler: &Compiler,
    (model, graph): (&Model, &Graph),
    isa: Isa,
    term: &Term,
) -> Result<GpuArtifact, Failure> {
    let make = || compiler.compile_cuda_through_cache(model, graph, &[isa]);
    let (artifact, cache) = term.during("compile", None, make)?;
    say_cache(&cache, term);
    Ok(artifact)
}

/// The model in a file for GPUs.
pub fn artifact(file: ArtifactFile, path: &Path) -> Result<GpuArtifact, Failure> {
    Ok(kiln::load_cuda(file, path)?)
}

/// Brings a model to a device, and says what memory it takes.
pub fn load(
    gpu: &Gpu,
    device: &DeviceArgs,
    artifact: &GpuArtifact,
    term: &Term,
) -> Result<(CudaModel, Duration), Failure> {
    let gpu_is = gpu.device();
    let (number, name, sm) = (gpu_is.ordinal, sanitize(&gpu_is.name), gpu_is.sm);
    term.note(format_args!("cuda:{number} {name}, sm_{sm}; memory: {}", parts(&artifact.memory())));
    let options =
        Options { memory: device.device_memory.unwrap_or_default(), ..Options::default() };
    let begin = Instant::now();
    let model = term.during("load", None, || {
        // SAFETY: the text was emitted from loops that were checked against the plan, or the person
        // named the file as one to be run; the help text says that it is code.
        unsafe { CudaModel::new(gpu, artifact, options) }
    });
    let model = model.map_err(|error| failure(&error))?;
    let load = begin.elapsed();
    term.detail(format_args!("load: {}", milliseconds(load)));
    for (name, of) in model.footprints().map_err(|error| failure(&error))? {
        let (registers, spilled, shared) = (of.registers, of.spilled, of.shared);
        let name = sanitize(name);
        term.detail(format_args!(
            "{name}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared"
        ));
    }
    Ok((model, load))
}

/// A session in which the states that are given have their values, and the other inputs.
fn begin<'a>(model: &CudaModel, inputs: &'a Inputs) -> Result<(CudaSession, Split<'a>), CudaError> {
    let mut session = model.session()?;
    let split = split(model.plan(), inputs);
    for (name, value) in &split.states {
        session.set_state(name, value.clone())?;
    }
    Ok((session, split))
}

/// Runs so many times; the outputs of the last run, with the states that it leaves.
pub fn steps(
    model: &CudaModel,
    inputs: &Inputs,
    (count, stepwise): (u32, bool),
    term: &Term,
) -> Result<Vec<(String, Tensor)>, CudaError> {
    let (mut session, Split { others, .. }) = begin(model, inputs)?;
    let mut outputs = Vec::new();
    for step in 0..count {
        let begin = Instant::now();
        outputs = match stepwise {
            true => session.run_stepwise(&others)?,
            false => session.run(&others)?,
        };
        term.detail(format_args!("run {}: {}", step + 1, milliseconds(begin.elapsed())));
    }
    let plan = model.plan();
    for state in &plan.states {
        let value = session.state(&plan.inputs[state.input].name)?;
        let name = plan.outputs[state.output].name.clone();
        outputs.extend(value.map(|value| (name, value)));
    }
    let place = |name: &str| plan.outputs.iter().position(|port| port.name == name);
    outputs.sort_by_key(|(name, _)| place(name));
    Ok(outputs)
}

/// What a model on a device takes, measured.
pub struct Times {
    /// Times of whole runs, with copies of inputs and outputs.
    pub runs: Vec<Duration>,
    /// Time of all kernels of a run on the device.
    pub kernels: Duration,
    /// Time of a run in a pipeline, where the model has no states.
    pub stream: Option<Duration>,
}

/// How often the time of kernels is taken, and runs each time.
const TIMED: usize = 5;
const REPEATED: u32 = 20;

/// Measures for as long as `length` says.
pub fn measure(
    model: &CudaModel,
    inputs: &Inputs,
    length: Duration,
    most: usize,
) -> Result<Times, CudaError> {
    let (mut session, Split { others, lengths, .. }) = begin(model, inputs)?;
    let back = |session: &mut CudaSession| {
        lengths.iter().try_for_each(|(dim, length)| session.rewind(dim, *length))
    };
    let mut runs = Vec::new();
    let start = Instant::now();
    while runs.is_empty() || start.elapsed() < length && runs.len() < most {
        let begin = Instant::now();
        session.run(&others)?;
        runs.push(begin.elapsed());
        back(&mut session)?;
    }
    let mut kernels = Vec::new();
    for _ in 0..TIMED {
        kernels.push(session.time(&others, REPEATED)?);
        back(&mut session)?;
    }
    kernels.sort_unstable();
    drop(session);
    let stream = match model.plan().states.is_empty() {
        true => Some(stream(model, &others, length, most)?),
        false => None,
    };
    Ok(Times { runs, kernels: Duration::from_nanos(kernels[TIMED / 2]), stream })
}

/// Runs whose steps are timed, for as long as `length` says.
pub fn profiles(
    ready: &Ready,
    length: Duration,
    least: usize,
    most: usize,
) -> Result<Vec<Profile>, Failure> {
    let measure = || -> Result<Vec<Profile>, CudaError> {
        let (mut session, Split { others, lengths, .. }) = begin(&ready.model, &ready.inputs)?;
        let (mut profiles, start) = (Vec::new(), Instant::now());
        while profiles.len() < least || start.elapsed() < length && profiles.len() < most {
            profiles.push(session.profile(&others)?);
            lengths.iter().try_for_each(|(dim, length)| session.rewind(dim, *length))?;
        }
        Ok(profiles)
    };
    measure().map_err(|error| failure(&error))
}

/// What a device can do at most, by its clocks.
pub fn peak(gpu: &Gpu) -> Peak {
    let Device { processors, most: [flops, bytes], .. } = gpu.device();
    // Where the driver says nothing, everything is as near to 0 as can be.
    let most = |most: u32| f64::from(most.max(1));
    Peak { threads: *processors as usize, gflops: most(*flops), gb_per_s: most(*bytes) }
}

/// Time of a run in a pipeline.
fn stream(
    model: &CudaModel,
    inputs: &[(&str, TensorView<'_>)],
    length: Duration,
    most: usize,
) -> Result<Duration, CudaError> {
    let mut stream = model.stream()?;
    let (start, mut count) = (Instant::now(), 0);
    while count == 0 || start.elapsed() < length && (count as usize) < most {
        stream.push(inputs)?;
        count += 1;
    }
    while stream.finish()?.is_some() {}
    Ok(start.elapsed() / count)
}

/// Compiles kernels so that each result is an output of its own, runs them on the device, one after
/// another, and compares with `values`, those of the graph's interpreter.
pub fn probe(
    gpu: &Gpu,
    compiler: &Compiler,
    fused: &Graph,
    (values, inputs): (&[Meaning], &[Meaning]),
    tolerance: Tolerance,
) -> Result<Probe, Failure> {
    let graph = probed(fused);
    let artifact = compiler.build_cuda(&graph, &[isa(gpu)?])?;
    let fail = |error| failure(&error);
    // SAFETY: the text was emitted from loops that were checked against the plan.
    let model = unsafe { CudaModel::new(gpu, &artifact, Options::default()) }.map_err(fail)?;
    let tensors: Vec<Tensor> = inputs.iter().map(Meaning::to_tensor).collect();
    let names = plan_names(model.plan());
    let named: Vec<_> = names.iter().zip(&tensors).map(|(n, t)| (n.as_str(), t.view())).collect();
    let mut session = model.session().map_err(fail)?;
    let found = session.run_stepwise(&named).map_err(fail)?;
    let found: Vec<Tensor> = found.into_iter().map(|(_, tensor)| tensor).collect();
    let seen = look(&graph, values, &found, tolerance);
    let wrong = seen.wrong.map(|id| place("ptx", &graph, id));
    Ok(Probe { kernels: found.len(), worst: seen.worst, wrong })
}

fn plan_names(plan: &Plan) -> Vec<String> {
    plan.inputs.iter().map(|port| port.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use kiln_gpu::{Behaviour, Double};

    use crate::args::{Cli, Command, RunArgs, VerifyArgs};
    use crate::commands::verify_cuda::verify;

    fn digits() -> String {
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/digits.onnx").to_string()
    }

    fn term() -> Term {
        Term::new(&Cli::parse_from(["kiln", "doctor", "-q"]).output)
    }

    fn run_args(more: &[&str]) -> RunArgs {
        let all = [&["kiln", "run", "-q", "--dim", "batch=2", "-i", "random:5"], more].concat();
        match Cli::parse_from(all).command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn verify_args(more: &[&str]) -> VerifyArgs {
        let model = digits();
        let all = [&["kiln", "verify", "-q", &model, "--dim", "batch=1"], more].concat();
        match Cli::parse_from(all).command {
            Command::Verify(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_model_and_its_file_give_what_the_cpu_gives() {
        let model = digits();
        let args = run_args(&[&model]);
        let cpu = crate::commands::ready::ready(&args.given, false, &term()).expect("a model");
        let want = crate::commands::run::steps(&cpu.executable, &cpu.inputs, 1, &term());
        let want = want.expect("a run");
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("digits.kiln").display().to_string();
        let compile =
            ["compile", &model, "--device", "cuda", "--dim", "batch=2", "-o", &file, "-q"];
        let cli = Cli::parse_from([&["kiln"], &compile[..]].concat());
        let Command::Compile(compile) = cli.command else { panic!("{:?}", cli.command) };
        crate::commands::compile::run(&compile, &term()).expect("a file");
        let file = ["kiln", "run", "-q", &file, "-i", "random:5"];
        let Command::Run(file) = Cli::parse_from(file).command else { panic!("{file:?}") };
        for args in [args, file] {
            let double = Double::new(Behaviour::default());
            let gpu = Gpu::with(double.clone());
            let ready = ready(&gpu, &args.device, &args.given, false, &term()).expect("a model");
            let got = steps(&ready.model, &ready.inputs, (2, false), &term()).expect("a run");
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let tolerance = Tolerance { rtol: 1e-4, atol: 1e-6, of_largest: false };
                assert_eq!(tolerance.compare(got, want).outside, 0, "{name}");
            }
            let length = Duration::from_millis(1);
            let times = measure(&ready.model, &ready.inputs, length, 3).expect("runs");
            assert!(!times.runs.is_empty() && times.stream.is_some());
            assert!(times.kernels > Duration::ZERO);
            drop((gpu, ready));
            assert_eq!(double.problems(), [""; 0]);
        }
    }

    /// A model that was compiled for a device is found again by the next command, another one is
    /// not, and what is damaged is made anew.
    #[test]
    fn what_is_compiled_for_a_device_is_kept() {
        let (folder, model) = (tempfile::tempdir().expect("a folder"), digits());
        let cache = folder.path().join("cache");
        let text = cache.display().to_string();
        let files = || {
            let files = std::fs::read_dir(&cache).expect("a folder").flatten();
            let mut files: Vec<_> = files.map(|file| file.path()).collect();
            files.sort();
            files
        };
        let written = |file: &Path| std::fs::metadata(file).expect("a file").modified().ok();
        let run = |more: &[&str], sm: u32| {
            let double = Double::new(Behaviour { sm, ..Behaviour::default() });
            let gpu = Gpu::with(double.clone());
            let args = run_args(&[&[model.as_str(), "--cache", &text], more].concat());
            let ready = ready(&gpu, &args.device, &args.given, false, &term()).expect("a model");
            let got = steps(&ready.model, &ready.inputs, (1, false), &term()).expect("a run");
            drop((gpu, ready));
            assert_eq!(double.problems(), [""; 0]);
            got[0].1.bytes().to_vec()
        };
        let first = run(&[], 80);
        let [file] = &files()[..] else { panic!("{:?}", files()) };
        assert!(
            file.extension().is_some_and(|ending| ending == "kiln") && kiln::is_cuda_artifact(file)
        );
        let when = written(file);
        assert_eq!((run(&[], 80), written(file)), (first.clone(), when));
        // Another device of the same version, other options, another instruction set.
        assert_eq!((run(&[], 86), files().len()), (first.clone(), 1));
        run(&["--precision", "bf16"], 80);
        assert_eq!(files().len(), 2);
        run(&[], 90);
        assert_eq!(files().len(), 3);
        let mut bytes = std::fs::read(file).expect("a file");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(file, &bytes).expect("a file");
        assert_eq!(run(&[], 80), first);
        bytes[middle] ^= 1;
        assert!(std::fs::read(file).expect("a file") == bytes, "it was made anew");
    }

    #[test]
    fn kernels_are_timed_one_by_one() {
        let args = run_args(&[&digits()]);
        let gpu = Gpu::with(Double::new(Behaviour::default()));
        let ready = ready(&gpu, &args.device, &args.given, false, &term()).expect("a model");
        let runs = profiles(&ready, Duration::ZERO, 3, 5).expect("runs");
        assert_eq!(runs.len(), 3);
        assert!(runs.iter().all(|run| run.ends.len() == ready.model.plan().steps.len()));
        assert!(peak(&gpu).gflops >= 1.0);
    }

    #[test]
    fn results_are_compared_kernel_by_kernel() {
        for more in [&[][..], &["--kernels"]] {
            let args = verify_args(more);
            let (model, _) = open(&args.model, &term()).expect("a model");
            let compiler = compiler(&args.model, &args.build);
            let given = gather(&model, &args.inputs, true, &compiler).expect("tensors");
            let graph = given.1.graph(&model).expect("a graph");
            let double = Double::new(Behaviour::default());
            let gpu = Gpu::with(double.clone());
            let of = (&given.1, &model, &graph);
            verify(&args, &gpu, of, given.0, &term()).expect("all is well");
            drop(gpu);
            assert_eq!(double.problems(), [""; 0]);
        }
    }

    #[test]
    fn a_device_that_is_too_old_or_too_small_is_said_with_the_right_code() {
        let model = digits();
        let args = run_args(&[&model, "--device", "cuda", "--device-memory", "limit=1K"]);
        for (behaviour, exit) in [
            (Behaviour { sm: 75, ..Behaviour::default() }, Exit::Incompatible),
            (Behaviour { memory: 1 << 10, ..Behaviour::default() }, Exit::Limit),
        ] {
            let gpu = Gpu::with(Double::new(behaviour));
            let failed = ready(&gpu, &args.device, &args.given, false, &term());
            assert_eq!(failed.err().expect("it fails").exit, exit);
        }
    }
}
