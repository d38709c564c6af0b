//! `kiln bench`: compile time, latency and memory.

use std::time::Duration;

use kiln::error::sanitize;
use serde_json::json;

use crate::args::BenchArgs;
use crate::commands::again::Again;
use crate::commands::ready::{Ready, ready};
use crate::commands::{cuda, model_name};
use crate::failure::Failure;
use crate::stats::{peak_rss_mb, percentile};
use crate::term::{Term, bytes, milliseconds};

/// Runs that are measured, at most.
const MAX_RUNS: usize = 1 << 22;

/// Measures and prints.
pub fn run(args: &BenchArgs, term: &Term) -> Result<(), Failure> {
    let (device, given) = (&args.device, &args.given);
    let on_device = cuda::on_device(device, &given.model, term, |gpu| {
        let ready = cuda::ready(gpu, device, given, true, term)?;
        on_gpu(args, &ready, term)
    })?;
    if on_device.is_some() {
        return Ok(());
    }
    let ready = ready(given, true, term)?;
    let Ready { executable, inputs, read: load, compile } = ready;
    let mut run = Again::new(&executable, &inputs)?;
    let mut measure = |length| run.measure(length, MAX_RUNS);
    term.during("warm up", Some(args.warmup), || measure(args.warmup))?;
    let mut times = term.during("measure", Some(args.time), || measure(args.time))?;
    times.sort_unstable();
    let ms = |time: Duration| time.as_nanos() as f64 / 1e6;
    let (threads, rss) = (executable.pool().threads(), peak_rss_mb());
    let mut value = json!({
        "model": model_name(&args.given.model.model), "threads": threads, "compile_ms": compile.map(ms),
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
    term.report(value, &text)
}

/// Measures on a GPU, and prints.
fn on_gpu(args: &BenchArgs, ready: &cuda::Ready, term: &Term) -> Result<(), Failure> {
    let cuda::Ready { model, inputs, read, compile, load } = ready;
    let measure = |length| {
        let times = cuda::measure(model, inputs, length, MAX_RUNS);
        times.map_err(|error| cuda::failure(&error))
    };
    term.during("warm up", Some(args.warmup), || measure(args.warmup))?;
    let mut times = term.during("measure", Some(args.time), || measure(args.time))?;
    times.runs.sort_unstable();
    let ms = |time: Duration| time.as_nanos() as f64 / 1e6;
    let device = model.gpu().device();
    let mut value = json!({
        "model": model_name(&args.given.model.model), "device": device.name, "sm": device.sm,
        "read_ms": ms(*read), "compile_ms": compile.map(ms), "load_ms": ms(*load),
        "runs": times.runs.len(), "kernels_ms": ms(times.kernels),
        "stream_ms": times.stream.map(ms), "device_bytes": model.memory().total(),
    });
    let compile = compile.map(|compile| ("compile", milliseconds(compile)));
    let mut lines = vec![("read", milliseconds(*read)), ("load", milliseconds(*load))];
    lines.extend(compile);
    lines.push(("kernels", milliseconds(times.kernels)));
    lines.extend(times.stream.map(|time| ("stream", milliseconds(time))));
    let mut lines: Vec<(String, String)> =
        lines.into_iter().map(|(name, figure)| (name.to_string(), figure)).collect();
    for &percent in &args.percentiles {
        let time = percentile(&times.runs, percent);
        value[format!("p{percent}_ms")] = json!(ms(time));
        lines.push((format!("p{percent}"), milliseconds(time)));
    }
    let memory = bytes(model.memory().total());
    lines.push(("memory".into(), memory));
    let mut text = format!("{} runs on {}\n", times.runs.len(), sanitize(&device.name));
    text.extend(lines.iter().map(|(name, figure)| format!("{name:<10}{figure:>12}\n")));
    term.report(value, &text)
}
