//! `kiln bench`: compile time, latency and memory.

use std::time::{Duration, Instant};

use kiln::tensor::{Tensor, TensorView, TensorViewMut};
use kiln::{Executable, RunError, Session};
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
    let given = (&args.inputs, &args.states);
    let ready = ready(&args.model, &args.build, &args.cache, given, true, term)?;
    let Ready { executable, inputs, read: load, compile } = ready;
    let mut run = Run::new(&executable, &inputs)?;
    term.during("warm up", Some(args.warmup), || run.measure(args.warmup))?;
    let mut times = term.during("measure", Some(args.time), || run.measure(args.time))?;
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
        let kernels = run.kernels()?;
        let rows = kernels.iter().map(|(name, ns)| json!({ "name": name, "ns": ns }));
        value["kernels"] = rows.collect();
        text += &table(&kernels);
    }
    term.report(value, &text)
}

/// A model with what it is run on again and again.
struct Run<'a> {
    executable: &'a Executable,
    inputs: &'a Inputs,
    way: Way<'a>,
}

enum Way<'a> {
    /// Tensors go in, and out into the same memory in every run.
    Into(Vec<Tensor>),
    /// A session keeps states; after a run they go back to these lengths of dims.
    Session(Box<Session>, Vec<(&'a str, TensorView<'a>)>, Vec<(String, usize)>),
}

impl<'a> Run<'a> {
    fn new(executable: &'a Executable, inputs: &'a Inputs) -> Result<Run<'a>, Failure> {
        let plan = executable.plan();
        let failure = |error: RunError| Failure::usage(error.to_string());
        if plan.states.iter().all(|state| !state.in_place) {
            let outputs = executable.run(&inputs.named()).map_err(failure)?;
            let outputs = outputs.into_iter().map(|(_, tensor)| tensor).collect();
            return Ok(Run { executable, inputs, way: Way::Into(outputs) });
        }
        let (mut session, mut others) = (executable.session(), Vec::new());
        let mut lengths: Vec<(String, usize)> = Vec::new();
        for ((name, view), port) in inputs.named().into_iter().zip(&plan.inputs) {
            let state = plan.states.iter().find(|s| plan.inputs[s.input].name == name);
            let Some(state) = state else {
                others.push((name, view));
                continue;
            };
            let value = Tensor::from_bytes(view.dtype, view.shape, view.bytes);
            let value = value.expect("a view has the bytes of its shape");
            session.set_state(name, value).map_err(failure)?;
            for length in port.lengths.iter().filter(|_| state.in_place) {
                let dim = plan.dims[length.dim].name.clone();
                let long = usize::try_from(view.shape[length.axis] as i64 - length.more);
                lengths.extend(long.ok().map(|long| (dim, long)));
            }
        }
        lengths.sort();
        lengths.dedup();
        Ok(Run { executable, inputs, way: Way::Session(Box::new(session), others, lengths) })
    }

    fn once(&mut self) -> Result<(), RunError> {
        match &mut self.way {
            Way::Into(outputs) => {
                let mut targets: Vec<TensorViewMut> =
                    outputs.iter_mut().map(Tensor::view_mut).collect();
                self.executable.run_into(&self.inputs.views(), &mut targets)
            }
            Way::Session(session, inputs, lengths) => {
                session.run(inputs)?;
                lengths.iter().try_for_each(|(dim, length)| session.rewind(dim, *length))
            }
        }
    }

    /// Runs for as long as `length` says, at least once, and gives the time of each run.
    fn measure(&mut self, length: Duration) -> Result<Vec<Duration>, Failure> {
        let mut times = Vec::with_capacity(1 << 16);
        let begin = Instant::now();
        let mut now = begin;
        while times.is_empty() || now - begin < length && times.len() < MAX_RUNS {
            self.once().map_err(|error| Failure::usage(error.to_string()))?;
            let end = Instant::now();
            times.push(end - now);
            now = end;
        }
        Ok(times)
    }

    /// The median time of each kernel over a few runs, in the order in which they run.
    fn kernels(&mut self) -> Result<Vec<(String, u64)>, Failure> {
        let Way::Into(outputs) = &mut self.way else {
            let text = "--kernels is not for models that keep a state in place";
            return Err(Failure::usage(text).help("compile without --state for such a table"));
        };
        let views = self.inputs.views();
        let mut targets: Vec<TensorViewMut> = outputs.iter_mut().map(Tensor::view_mut).collect();
        let profile = |_| self.executable.profile(&views, &mut targets);
        let runs = (0..9).map(profile).collect::<Result<Vec<_>, _>>();
        let runs = runs.map_err(|error| Failure::usage(error.to_string()))?;
        let median = |step: usize| {
            let mut times: Vec<u64> = runs.iter().map(|run| run[step].1).collect();
            times.sort_unstable();
            (kiln::error::sanitize(&runs[0][step].0), times[times.len() / 2])
        };
        Ok((0..runs[0].len()).map(median).collect())
    }
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
