//! Times of kernels and models on a device, one line of words for each question.
//!
//! ```text
//! copy BYTES             a copy on the device
//! graph WORDS            a small graph (`graphs.rs`)
//! model FILE [DIM=N ..]  a whole model, an .onnx or .kiln file
//! forget                 gives back the memory of what was asked for
//! ```
//! An answer has the time of one run in milliseconds, the mean of some that follow one another on
//! the device: at least so many milliseconds of them.

use std::collections::HashMap;
use std::io::BufRead;

use kiln::backend::cuda::Gpu as Isa;
use kiln::gpu::GpuArtifact;
use kiln::graph::op::Type;
use kiln::plan::Plan;
use kiln::tensor::Tensor;
use kiln::work::{Work, sum};
use kiln::{Compiler, Limits, Model};
use kiln_cases::Random;
use kiln_cuda::driver::{Answer, Driver};
use kiln_cuda::{CudaModel, CudaSession, Gpu, Options};
use serde_json::{Value, json};

use crate::graphs;
use crate::say;

/// How long runs are repeated at least.
const AT_LEAST_MS: f64 = 25.0;
/// How often they are at most.
const MOST: u32 = 1000;

/// A model that was asked for, with inputs.
struct Known {
    session: CudaSession,
    inputs: Vec<(String, Tensor)>,
    /// Runs that take long enough together.
    repeats: u32,
}

/// Answers all questions of standard input.
pub fn serve(gpu: &Gpu, isa: Isa) {
    let mut known: HashMap<String, Known> = HashMap::new();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["forget"] => {
                known.clear();
                Ok(json!({}))
            }
            ["copy", bytes] => match bytes.parse() {
                Ok(bytes) => copy(gpu, bytes),
                Err(_) => Err(format!("`{bytes}` is no number of bytes")),
            },
            [] => continue,
            _ => timed(gpu, isa, &mut known, &line, &words),
        };
        say(&answer.unwrap_or_else(|why| json!({ "error": why })));
    }
}

fn timed(
    gpu: &Gpu,
    isa: Isa,
    known: &mut HashMap<String, Known>,
    line: &str,
    words: &[&str],
) -> Result<Value, String> {
    if !known.contains_key(line) {
        known.insert(line.to_string(), ready(gpu, artifact(isa, words)?)?);
    }
    let Known { session, inputs, repeats } = known.get_mut(line).ok_or("it is known")?;
    let named: Vec<_> = inputs.iter().map(|(name, t)| (name.as_str(), t.view())).collect();
    let ns = session.time(&named, *repeats).map_err(|e| format!("{e}; {}", e.help()))?;
    let plan = session.model().plan();
    let (flops, bytes) = (total(plan, |work| &work.flops), total(plan, |work| &work.bytes));
    Ok(json!({
        "ms": ns as f64 / 1e6, "repeats": repeats, "kernels": plan.steps.len(), "flops": flops,
        "bytes": bytes, "device_bytes": session.model().memory().total(),
        "weight_bytes": session.model().memory().weights,
    }))
}

/// What all kernels do, where dims are as long as they may be.
fn total(plan: &Plan, of: impl Fn(&Work) -> &Vec<kiln::work::Term>) -> f64 {
    let mut dims = [0; kiln::loops::ir::DIMS];
    for (length, dim) in dims.iter_mut().zip(&plan.dims) {
        *length = dim.most as i64;
    }
    plan.work.iter().map(|work| sum(of(work), &dims)).sum()
}

fn artifact(isa: Isa, words: &[&str]) -> Result<GpuArtifact, String> {
    match words {
        ["graph", words @ ..] => {
            let graph = graphs::graph(words)?;
            Compiler::new().compile_cuda_of(&graph, &[isa]).map_err(|e| e.to_string())
        }
        ["model", file] if kiln::is_cuda_artifact(file) => {
            let opened = kiln::open_artifact(file).map_err(|e| e.to_string())?;
            kiln::load_cuda(opened, file).map_err(|e| e.to_string())
        }
        ["model", file, dims @ ..] => {
            let model = Model::open(file, &Limits::default()).map_err(|e| e.to_string())?;
            let mut compiler = Compiler::new();
            for dim in dims {
                let (name, extent) = dim.split_once('=').ok_or(format!("`{dim}` is no DIM=N"))?;
                let extent = extent.parse().map_err(|_| format!("`{extent}` is no extent"))?;
                compiler = compiler.dim(name, extent);
            }
            compiler.compile_cuda(&model, &[isa]).map_err(|e| e.to_string())
        }
        _ => Err(format!("`{}` is no question", words.join(" "))),
    }
}

/// A model on the device, with random inputs, and how often it runs.
fn ready(gpu: &Gpu, artifact: GpuArtifact) -> Result<Known, String> {
    let fail = |e: kiln_cuda::CudaError| format!("{e}; {}", e.help());
    // SAFETY: the text was emitted from loops that were checked against the plan, or is of a file
    // that was named to be run.
    let model = unsafe { CudaModel::new(gpu, &artifact, Options::default()) }.map_err(fail)?;
    let mut random = Random::new(11);
    let input = |port: &kiln::plan::Port| {
        let tensor = graphs::tensor(&Type::new(port.dtype, &port.shape), &mut random);
        (port.name.clone(), tensor)
    };
    let inputs: Vec<(String, Tensor)> = model.plan().longest_inputs().iter().map(input).collect();
    let mut session = model.session().map_err(fail)?;
    let named: Vec<_> = inputs.iter().map(|(name, t)| (name.as_str(), t.view())).collect();
    // The first time has the driver's own work in it.
    session.time(&named, 1).map_err(fail)?;
    let once = session.time(&named, 3).map_err(fail)? as f64 / 1e6;
    let repeats = (AT_LEAST_MS / once.max(1e-6)).ceil().clamp(1.0, f64::from(MOST)) as u32;
    Ok(Known { session, inputs, repeats })
}

/// Times a copy on the device: what kernels that only move bytes are measured by.
fn copy(gpu: &Gpu, bytes: usize) -> Result<Value, String> {
    let driver = &**gpu.driver();
    let mut owned = Vec::new();
    let answer = copies(driver, bytes, &mut owned);
    owned.into_iter().rev().for_each(|what| driver.release(what));
    let ms = answer.map_err(|fault| fault.to_string())?;
    Ok(json!({ "ms": ms, "bytes": 2 * bytes }))
}

fn copies(
    driver: &dyn Driver,
    bytes: usize,
    owned: &mut Vec<kiln_cuda::driver::Resource>,
) -> Answer<f64> {
    let mut own = |answer: Answer<_>| {
        let what = answer?;
        owned.push(what);
        Ok(what)
    };
    let (to, from) = (own(driver.allocate(bytes))?, own(driver.allocate(bytes))?);
    let stream = own(driver.stream())?;
    let (begin, end) = (own(driver.event(true))?, own(driver.event(true))?);
    let time = |count: u32| {
        // SAFETY: all of it was given out above, and is waited for.
        unsafe {
            driver.record(begin, stream)?;
            for _ in 0..count {
                driver.copy(to.number(), from.number(), bytes, stream)?;
            }
            driver.record(end, stream)?;
            driver.synchronize(stream)?;
            Ok::<f64, _>(f64::from(driver.elapsed(begin, end)?) / f64::from(count))
        }
    };
    // SAFETY: as above.
    unsafe { driver.clear(from.number(), bytes, stream)? };
    let once = time(3)?;
    let count = (AT_LEAST_MS / once.max(1e-6)).ceil().clamp(1.0, f64::from(MOST));
    time(count as u32)
}
