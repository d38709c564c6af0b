//! `kiln bench`: compile time, latency and memory.

use std::time::{Duration, Instant};

use kiln::Executable;
use kiln::tensor::{Tensor, TensorViewMut};
use serde_json::json;

use crate::args::BenchArgs;
use crate::commands::model_name;
use crate::commands::ready::{Ready, ready};
use crate::failure::Failure;
use crate::input::Inputs;
use crate::stats::{peak_rss_mb, percentile};
use crate::term::{Term, milliseconds};

/// Latencies are kept up to this number of runs; later ones count in the mean only.
const MAX_RUNS: usize = 1 << 22;

/// Measures and prints.
pub fn run(args: &BenchArgs, term: &Term) -> Result<(), Failure> {
    let ready = ready(&args.model, &args.build, &args.cache, &args.inputs, true, term)?;
    let Ready { executable, inputs, read: load, compile } = ready;
    let mut outputs = outputs(&executable, &inputs)?;
    term.during("warm up", Some(args.warmup), || {
        measure(&executable, &inputs, &mut outputs, args.warmup)
    })?;
    let mut times = term.during("measure", Some(args.time), || {
        measure(&executable, &inputs, &mut outputs, args.time)
    })?;
    times.sort_unstable();
    let ms = |time: Duration| time.as_nanos() as f64 / 1e6;
    let (threads, rss) = (executable.pool().threads(), peak_rss_mb());
    let mut value = json!({
        "model": model_name(&args.model.model), "threads": threads, "compile_ms": compile.map(ms),
        "load_ms": ms(load), "runs": times.len(), "min_ms": ms(percentile(&times, 0)),
    });
    let mut lines = match compile {
        Some(compile) => vec![("read", milliseconds(load)), ("compile", milliseconds(compile))],
        None => vec![("load", milliseconds(load))],
    };
    lines.push(("min", milliseconds(percentile(&times, 0))));
    let mut lines: Vec<(String, String)> =
        lines.into_iter().map(|(name, figure)| (name.to_string(), figure)).collect();
    for &percent in &args.percentiles {
        let time = percentile(&times, percent);
        value[format!("p{percent}_ms")] = json!(ms(time));
        lines.push((format!("p{percent}"), milliseconds(time)));
    }
    value["peak_rss_mb"] = json!(rss);
    lines.push(("memory".into(), rss.map_or("unknown".into(), |mb| format!("{mb:.1} MiB"))));
    let mut text = format!("{} runs on {threads} threads\n", times.len());
    text.extend(lines.iter().map(|(name, figure)| format!("{name:<10}{figure:>12}\n")));
    if args.kernels {
        let kernels = kernels(&executable, &inputs, &mut outputs)?;
        let rows = kernels.iter().map(|(name, ns)| json!({ "name": name, "ns": ns }));
        value["kernels"] = rows.collect();
        text += &table(&kernels);
    }
    term.report(value, &text)
}

/// Tensors for the outputs, as large as the inputs make them.
fn outputs(executable: &Executable, inputs: &Inputs) -> Result<Vec<Tensor>, Failure> {
    let outputs = executable.run(&inputs.named());
    let outputs = outputs.map_err(|error| Failure::usage(error.to_string()))?;
    Ok(outputs.into_iter().map(|(_, tensor)| tensor).collect())
}

fn targets(outputs: &mut [Tensor]) -> Vec<TensorViewMut<'_>> {
    outputs.iter_mut().map(Tensor::view_mut).collect()
}

/// Runs for as long as `length` says, at least once, and gives the time of each run.
fn measure(
    executable: &Executable,
    inputs: &Inputs,
    outputs: &mut [Tensor],
    length: Duration,
) -> Result<Vec<Duration>, Failure> {
    let (views, mut targets) = (inputs.views(), targets(outputs));
    let mut times = Vec::with_capacity(1 << 16);
    let begin = Instant::now();
    let mut now = begin;
    while times.is_empty() || now - begin < length && times.len() < MAX_RUNS {
        let result = executable.run_into(&views, &mut targets);
        result.map_err(|error| Failure::usage(error.to_string()))?;
        let end = Instant::now();
        times.push(end - now);
        now = end;
    }
    Ok(times)
}

/// The median time of each kernel over a few runs, in the order in which they run.
fn kernels(
    executable: &Executable,
    inputs: &Inputs,
    outputs: &mut [Tensor],
) -> Result<Vec<(String, u64)>, Failure> {
    let (views, mut targets) = (inputs.views(), targets(outputs));
    let profile = |_| executable.profile(&views, &mut targets);
    let runs = (0..9).map(profile).collect::<Result<Vec<_>, _>>();
    let runs = runs.map_err(|error| Failure::usage(error.to_string()))?;
    let median = |step: usize| {
        let mut times: Vec<u64> = runs.iter().map(|run| run[step].1).collect();
        times.sort_unstable();
        (kiln::error::sanitize(&runs[0][step].0), times[times.len() / 2])
    };
    Ok((0..runs[0].len()).map(median).collect())
}

/// Kernels with the share that each has of the whole, the slowest first.
fn table(kernels: &[(String, u64)]) -> String {
    let total: u64 = kernels.iter().map(|(_, ns)| ns).sum();
    let mut sorted: Vec<&(String, u64)> = kernels.iter().collect();
    sorted.sort_by_key(|(_, ns)| std::cmp::Reverse(*ns));
    let row = |(name, ns): &&(String, u64)| {
        let share = 100.0 * *ns as f64 / total.max(1) as f64;
        format!("{:>12} {share:>5.1}%  {name}\n", milliseconds(Duration::from_nanos(*ns)))
    };
    let rows: String = sorted.iter().map(row).collect();
    format!("\nkernels, slowest first\n{rows}")
}
