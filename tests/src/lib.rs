//! What the suites share: where references are, how a graph is run, how results are compared.

pub mod gpu;
pub mod grown;
pub mod machines;
pub mod mutate;
pub mod noise;
pub mod ptx;

use std::io::Write;
use std::path::PathBuf;

use kiln::backend::cpu::{Cpu, emit_all};
use kiln::graph::Graph;
use kiln::graph::eval::Value;
use kiln::tensor::{Tensor, TensorView};
use kiln::{Compiler, Executable, Form, Kind, RunError};

/// A folder of the references that `tests/run` makes, or `None` (said aloud) where there is none.
pub fn oracle(folder: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".oracle").join(folder);
    if path.is_dir() {
        return Some(path);
    }
    skip(&format!("{folder} is not there; `tests/run` makes it"));
    None
}

/// Says that a test cannot run here. Tests that pass are silent, so this goes around the capture.
pub fn skip(why: &str) {
    // A closed stderr is no reason to fail.
    let _ = writeln!(std::io::stderr().lock(), "skipped: {why}");
}

/// A number that a variable of the environment says, such as how many cases are tried.
pub fn environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

pub use kiln::interpret;
pub use kiln_cases::{ONNX, Random, Tolerance, cases, difference, small, suite};

/// What compiled code says.
pub fn run_compiled(
    graph: &Graph,
    inputs: &[Tensor],
    compiler: &Compiler,
) -> kiln::error::Result<Vec<Tensor>> {
    let executable = compiler.build(&compiler.optimise(graph)?)?;
    Ok(run(&executable, inputs).expect("the inputs are those of the graph"))
}

/// Computes the outputs of a graph, or says why not.
pub type Run = fn(&Graph, &[Tensor]) -> Result<Vec<Tensor>, String>;

/// Ways of computing a graph that must all give right results, with their names.
pub const WAYS: [(&str, Run); 6] = [
    ("interpreted", |graph, inputs| Ok(interpret(graph, inputs))),
    ("compiled", |graph, inputs| code(graph, inputs, &Compiler::new())),
    ("compiled without the e-graph", |graph, inputs| {
        code(graph, inputs, &Compiler::new().egraph(false))
    }),
    ("as loops", run_loops),
    ("as a library", run_library),
    ("as PTX", |graph, inputs| ptx::run(graph, inputs, &Compiler::new())),
];

fn code(graph: &Graph, inputs: &[Tensor], compiler: &Compiler) -> Result<Vec<Tensor>, String> {
    run_compiled(graph, inputs, compiler).map_err(|e| e.to_string())
}

/// What the interpreter of loops says.
pub fn run_loops(graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let compiler = Compiler::new();
    let kernels = compiler.optimise(graph).map_err(|e| e.to_string())?;
    let program = compiler.lower(&kernels).map_err(|e| e.to_string())?;
    let inputs: Vec<Value> = inputs.iter().map(Value::from_tensor).collect();
    let found = kiln::plan::eval::eval(&kernels, &program, &inputs).map_err(|e| e.to_string())?;
    Ok(found.iter().map(Value::to_tensor).collect())
}

/// What a shared library says that was written and loaded.
pub fn run_library(graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let form = Form::new(Kind::Shared, "net");
    let package = Compiler::new().package_of(graph, [0; 32], &form).map_err(|e| e.to_string())?;
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = folder.path().join("net.so");
    std::fs::write(&path, package.file).map_err(|e| e.to_string())?;
    // SAFETY: the file was written just now.
    let executable = unsafe { kiln::load(&path, 2) }.map_err(|e| e.to_string())?;
    run(&executable, inputs).map_err(|e| e.to_string())
}

/// Runs an executable on inputs in its order.
fn run(executable: &Executable, inputs: &[Tensor]) -> Result<Vec<Tensor>, RunError> {
    let names = executable.inputs().iter().map(|port| port.name.as_str());
    let named: Vec<(&str, TensorView)> = names.zip(inputs.iter().map(Tensor::view)).collect();
    Ok(executable.run(&named)?.into_iter().map(|(_, tensor)| tensor).collect())
}

/// The ways of compiling that must all give right results, with their names.
pub fn compilers() -> [(&'static str, Compiler); 3] {
    let compiler = Compiler::new().verify_code(true);
    [
        ("compiled", compiler.clone()),
        ("compiled without the e-graph", compiler.clone().egraph(false)),
        ("compiled without wide vectors", compiler.wide(false)),
    ]
}

/// One that makes code for CPUs without AVX and FMA, where this is a CPU of that architecture.
pub fn old_compiler() -> Option<(&'static str, Compiler)> {
    cfg!(target_arch = "x86_64").then(|| {
        let old = Cpu::named(None, Some("x86-64-v2")).expect("a level of x86-64");
        let compiler = Compiler::new().verify_code(true).target(old);
        ("compiled for a CPU without AVX and FMA", compiler)
    })
}

/// Makes code for a CPU, which this machine need not be able to run.
pub fn emit_for(cpu: Cpu, graph: &Graph) -> kiln::error::Result<()> {
    let compiler = Compiler::new().target(cpu.clone());
    let program = compiler.lower(&compiler.optimise(graph)?)?;
    emit_all(&program.kernels, &cpu, true, false).map(drop)
}
