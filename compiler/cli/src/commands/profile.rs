//! `kiln profile`: where the time of a model goes, and how close each kernel comes to the machine.

use std::time::{Duration, Instant};

use kiln::error::sanitize;
use kiln::plan::Plan;
use kiln::work::{Profile, Work, sum};
use serde_json::{Value, json};

use crate::args::ProfileArgs;
use crate::commands::again::Again;
use crate::commands::ready::{Ready, ready};
use crate::commands::{cuda, model_name};
use crate::failure::Failure;
use crate::files;
use crate::peak::{Peak, known_or_measured};
use crate::term::{Term, milliseconds};

/// Runs that are measured, at most and at least.
const MAX_RUNS: usize = 1000;
const MIN_RUNS: usize = 5;

/// What a kernel does, and how long it took.
struct Row {
    name: String,
    /// Its steps in the plan.
    steps: Vec<usize>,
    /// Nanoseconds, the median of all runs.
    ns: u64,
    flops: f64,
    bytes: f64,
    /// Nanoseconds that this machine needs at least: for operations in kernels in which these take
    /// longer than bytes, and for bytes in the others.
    least: [f64; 2],
}

impl Row {
    /// What takes longer.
    fn bound(&self) -> &'static str {
        if self.least[0] > self.least[1] { "compute" } else { "memory" }
    }

    /// The least time over the time that it took, in percent.
    fn roof(&self) -> f64 {
        100.0 * self.least.iter().sum::<f64>() / self.ns.max(1) as f64
    }

    fn rate(&self, what: f64) -> f64 {
        what / self.ns.max(1) as f64
    }

    fn json(&self, total: u64, plan: &Plan) -> Value {
        let steps = self.steps.iter().map(|&step| sanitize(&plan.steps[step].name));
        json!({
            "name": self.name, "steps": steps.collect::<Vec<_>>(), "us": self.ns as f64 / 1e3,
            "share": self.ns as f64 / total.max(1) as f64, "flops": self.flops,
            "bytes": self.bytes, "gflops": self.rate(self.flops),
            "gb_per_s": self.rate(self.bytes), "roof_percent": self.roof(), "bound": self.bound(),
        })
    }

    fn text(&self, total: u64) -> String {
        let share = 100.0 * self.ns as f64 / total.max(1) as f64;
        let (gflops, gb) = (self.rate(self.flops), self.rate(self.bytes));
        let time = milliseconds(Duration::from_nanos(self.ns));
        let (roof, bound, name) = (self.roof(), self.bound(), &self.name);
        format!("{time:>12} {share:>5.1}% {gflops:>8.1} {gb:>7.1} {roof:>4.0}% {bound:<8} {name}\n")
    }
}

/// Measures and prints.
pub fn run(args: &ProfileArgs, term: &Term) -> Result<(), Failure> {
    let (device, given) = (&args.device, &args.given);
    let on_device = cuda::on_device(device, &given.model, term, |gpu| {
        let ready = cuda::ready(gpu, device, given, true, term)?;
        let profiles = |length| cuda::profiles(&ready, length, MIN_RUNS, MAX_RUNS);
        term.during("warm up", Some(args.warmup), || profiles(args.warmup))?;
        let runs = term.during("measure", Some(args.time), || profiles(args.time))?;
        let machine = Machine {
            on: sanitize(&gpu.device().name),
            peak: cuda::peak(gpu),
            from: "by its clocks".into(),
            file: None,
        };
        report(args, ready.model.plan(), &runs, &machine, term)
    })?;
    if on_device.is_some() {
        return Ok(());
    }
    let Ready { executable, inputs, .. } = ready(given, true, term)?;
    let (plan, threads) = (executable.plan(), executable.pool().threads());
    let folder = args.calibration.calibration.as_deref();
    let (peak, file) = known_or_measured(folder, threads, term)?;
    let mut run = Again::new(&executable, &inputs)?;
    term.during("warm up", Some(args.warmup), || run.measure(args.warmup, usize::MAX))?;
    let runs = term.during("measure", Some(args.time), || profiles(&mut run, args.time))?;
    let file = file.map(|path| path.display().to_string());
    let from = file.as_ref().map_or("measured now".to_string(), |path| format!("from {path}"));
    let machine = Machine { on: format!("{threads} threads"), peak, from, file };
    report(args, plan, &runs, &machine, term)
}

/// What a model was measured on.
struct Machine {
    /// Threads, or the name of a GPU.
    on: String,
    /// What it can do at most.
    peak: Peak,
    /// Where that is from.
    from: String,
    /// The file, where there is one.
    file: Option<String>,
}

/// Prints a row for each kernel, and writes the trace.
fn report(
    args: &ProfileArgs,
    plan: &Plan,
    runs: &[Profile],
    machine: &Machine,
    term: &Term,
) -> Result<(), Failure> {
    let Machine { on, peak, from, file } = machine;
    let mut rows = rows(plan, runs, *peak);
    let total: u64 = rows.iter().map(|row| row.ns).sum();
    rows.sort_by_key(|row| std::cmp::Reverse(row.ns));
    let median = median_run(runs);
    if let Some(path) = &args.trace {
        let trace = trace(plan, median, &rows, on);
        files::write(path, |out| writeln!(out, "{trace}"))?;
        term.note(format_args!("wrote {}", path.display()));
    }
    let sum = |of: &dyn Fn(&Row) -> f64| rows.iter().map(of).sum();
    let all = Row {
        name: format!("all {} kernels", rows.len()),
        steps: (0..plan.steps.len()).collect(),
        ns: total,
        flops: sum(&|row| row.flops),
        bytes: sum(&|row| row.bytes),
        least: [sum(&|row| row.least[0]), sum(&|row| row.least[1])],
    };
    let mut peaks = peak.json();
    peaks["file"] = json!(file);
    let value = json!({
        "model": model_name(&args.given.model.model), "threads": peak.threads, "on": on,
        "runs": runs.len(), "run_us": median.total() as f64 / 1e3, "peak": peaks,
        "kernels": rows.iter().map(|row| row.json(total, plan)).collect::<Vec<_>>(),
        "total": all.json(total, plan),
    });
    let time = milliseconds(Duration::from_nanos(median.total()));
    let mut text = format!("{} runs on {on}, {time} each\n", runs.len());
    text += &format!("this machine: {} ({from})\n\n", peak.text());
    text += "        time  share  GFLOP/s    GB/s  roof          kernel\n";
    text.extend(rows.iter().chain([&all]).map(|row| row.text(total)));
    term.report(value, &text)
}

/// Runs for as long as `length` says.
fn profiles(run: &mut Again, length: Duration) -> Result<Vec<Profile>, Failure> {
    let (mut profiles, begin) = (Vec::new(), Instant::now());
    while profiles.len() < MIN_RUNS || begin.elapsed() < length && profiles.len() < MAX_RUNS {
        profiles.push(run.profile()?);
    }
    Ok(profiles)
}

/// The run of median time.
fn median_run(runs: &[Profile]) -> &Profile {
    let mut sorted: Vec<&Profile> = runs.iter().collect();
    sorted.sort_by_key(|run| run.total());
    sorted[sorted.len() / 2]
}

/// A row for each kernel, in the order in which they run.
fn rows(plan: &Plan, runs: &[Profile], peak: Peak) -> Vec<Row> {
    let mut steps = vec![Vec::new(); plan.work.len()];
    for (index, step) in plan.steps.iter().enumerate() {
        steps[step.work].push(index);
    }
    let row = |(work, steps): (&Work, Vec<usize>)| {
        let time = |run: &Profile| -> u64 {
            steps.iter().map(|&step| run.step(step)).map(|step| step.end - step.start).sum()
        };
        let mut times: Vec<u64> = runs.iter().map(time).collect();
        times.sort_unstable();
        let dims = &runs[0].dims;
        let (flops, bytes) = (sum(&work.flops, dims), sum(&work.bytes, dims));
        let (compute, memory) = (flops / peak.gflops, bytes / peak.gb_per_s);
        let least = if compute > memory { [compute, 0.0] } else { [0.0, memory] };
        Row { name: sanitize(&work.name), steps, ns: times[times.len() / 2], flops, bytes, least }
    };
    plan.work.iter().zip(steps).map(row).collect()
}

/// A run as Chrome's trace viewer and Perfetto read it.
fn trace(plan: &Plan, run: &Profile, rows: &[Row], on: &str) -> Value {
    let meta = |name: &str, value: String| {
        json!({
            "ph": "M", "pid": 1, "tid": 1, "name": name, "args": { "name": value },
        })
    };
    let mut events =
        vec![meta("process_name", "kiln".into()), meta("thread_name", format!("kernels, on {on}"))];
    let mut row_of: Vec<Option<&Row>> = vec![None; plan.steps.len()];
    rows.iter().for_each(|row| row.steps.iter().for_each(|&step| row_of[step] = Some(row)));
    for (index, step) in plan.steps.iter().enumerate() {
        let time = run.step(index);
        let args = row_of[index]
            .map(|row| json!({ "kernel": row.name, "flops": row.flops, "bytes": row.bytes }));
        events.push(json!({
            "name": sanitize(&step.name), "cat": "kernel", "ph": "X", "pid": 1, "tid": 1,
            "ts": time.start as f64 / 1e3, "dur": (time.end - time.start) as f64 / 1e3,
            "args": args,
        }));
    }
    json!({ "traceEvents": events, "displayTimeUnit": "ns" })
}
