//! What this machine can do at most: operations and bytes in a second, as kernels of Kiln's own
//! reach them that do nothing else. Kept in a file, so that it need not be measured every time.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln::graph::build::Added;
use kiln::graph::op::{BinaryFn, ReduceFn, Type};
use kiln::graph::{Graph, NodeId, Origin};
use kiln::tensor::{DType, Tensor};
use kiln::{Compiler, Executable};
use serde_json::{Value, json};

use crate::commands::doctor::processor;
use crate::failure::Failure;
use crate::files;
use crate::term::{Term, with_schema};

/// Measurements of which the best counts, where what is measured is kept.
const ROUNDS: usize = 6;
/// How long each kernel is run, at least.
const TIME: Duration = Duration::from_millis(25);
/// A product of matrices: the rows, and some columns at a time, stay in the first cache.
const ROWS: usize = 24;
const DEPTH: usize = 256;
/// Columns for each thread.
const COLUMNS: usize = 512;
/// Rows and columns of what is read from memory: 64 MiB, more than most caches hold.
const SHEET: [usize; 2] = [1 << 10, 1 << 14];
/// Name of the file.
const FILE: &str = "peak.json";

/// The most that so many threads can do.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Peak {
    /// Threads.
    pub threads: usize,
    /// Operations on f32 in a nanosecond.
    pub gflops: f64,
    /// Bytes to and from memory in a nanosecond.
    pub gb_per_s: f64,
}

impl Peak {
    /// As JSON, without a schema.
    pub fn json(&self) -> Value {
        json!({ "threads": self.threads, "gflops": self.gflops, "gb_per_s": self.gb_per_s })
    }

    /// As text.
    pub fn text(&self) -> String {
        format!("{:.1} GFLOP/s, {:.1} GB/s", self.gflops, self.gb_per_s)
    }
}

/// The best of some measurements: what else a machine does comes and goes.
pub fn best(threads: usize) -> Result<Peak, Failure> {
    let rounds = (0..ROUNDS).map(|_| measure(threads)).collect::<Result<Vec<Peak>, Failure>>()?;
    let most = |of: fn(&Peak) -> f64| rounds.iter().map(of).fold(0.0, f64::max);
    Ok(Peak { threads, gflops: most(|peak| peak.gflops), gb_per_s: most(|peak| peak.gb_per_s) })
}

/// Measures it.
fn measure(threads: usize) -> Result<Peak, Failure> {
    let compiler = Compiler::new().threads(threads);
    let columns = COLUMNS * threads.max(2);
    let product = kernel(&compiler, &[ROWS, DEPTH], |graph, x, origin| {
        let weight = filled(&[DEPTH, columns]);
        let weight = graph.tensor(&weight, origin);
        graph.matmul(x, weight, origin)
    })?;
    let flops = (2 * ROWS * DEPTH * columns) as f64;
    let gflops = flops / nanoseconds(&product, &filled(&[ROWS, DEPTH]))?;
    // Memory that is only read is faster than memory that is also written, on some machines.
    let read = kernel(&compiler, &SHEET, |g, x, origin| g.reduce(ReduceFn::Sum, x, &[1], origin))?;
    let both =
        kernel(&compiler, &SHEET, |g, x, origin| g.binary_number(BinaryFn::Mul, x, 2.0, origin))?;
    let sheet = filled(&SHEET);
    let bytes = sheet.bytes().len() as f64;
    let read = bytes / nanoseconds(&read, &sheet)?;
    let both = 2.0 * bytes / nanoseconds(&both, &sheet)?;
    Ok(Peak { threads, gflops, gb_per_s: read.max(both) })
}

/// A kernel of one input.
fn kernel(
    compiler: &Compiler,
    shape: &[usize],
    body: impl FnOnce(&mut Graph, NodeId, &Origin) -> Added,
) -> Result<Executable, Failure> {
    let (mut graph, origin) = (Graph::default(), Origin::from("peak"));
    let x = graph.input("x", Type::new(DType::F32, shape));
    let y = body(&mut graph, x, &origin).expect("the operands of these kernels fit");
    graph.outputs.push(("y".to_string(), y));
    Ok(compiler.build(&compiler.optimise(&graph)?)?)
}

/// A tensor in memory of its own: that of zeros may be one page again and again.
fn filled(shape: &[usize]) -> Tensor {
    let mut tensor = Tensor::zeros(DType::F32, shape);
    let bytes = tensor.bytes_mut().chunks_exact_mut(4);
    bytes.for_each(|element| element.copy_from_slice(&0.5f32.to_ne_bytes()));
    tensor
}

/// The least time of a run.
fn nanoseconds(executable: &Executable, given: &Tensor) -> Result<f64, Failure> {
    let mut result = Tensor::zeros(DType::F32, &executable.outputs()[0].shape);
    let mut run = || {
        let start = Instant::now();
        let ran = executable.run_into(&[given.view()], &mut [result.view_mut()]);
        ran.map(|()| start.elapsed()).map_err(|error| Failure::usage(error.to_string()))
    };
    // In the first run the system gives memory and threads wake up.
    run()?;
    let begin = Instant::now();
    let mut least = run()?;
    while begin.elapsed() < TIME {
        least = least.min(run()?);
    }
    Ok(least.as_nanos().max(1) as f64)
}

/// The file in a folder, or where the system keeps such files.
fn file(folder: Option<&Path>) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    let folder = match folder {
        Some(folder) => folder.to_path_buf(),
        None => cache()?.join("kiln"),
    };
    Some(folder.join(FILE))
}

/// Writes what was measured, and says where.
pub fn keep(folder: Option<&Path>, peaks: &[Peak]) -> Result<PathBuf, Failure> {
    let path = file(folder).ok_or_else(|| {
        let text = "there is no folder for caches: neither XDG_CACHE_HOME nor HOME is set";
        Failure::usage(text).help("name one: --calibration DIR")
    })?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| Failure::io(folder.display(), error))?;
    }
    let peaks: Vec<Value> = peaks.iter().map(Peak::json).collect();
    let value = with_schema(json!({
        "version": env!("CARGO_PKG_VERSION"), "processor": processor(), "peaks": peaks,
    }));
    files::write(&path, |out| writeln!(out, "{value:#}"))?;
    Ok(path)
}

/// What so many threads can do, and where that is from: a file, or measured now.
pub fn known_or_measured(
    folder: Option<&Path>,
    threads: usize,
    term: &Term,
) -> Result<(Peak, Option<PathBuf>), Failure> {
    let path = file(folder).filter(|path| path.exists());
    // A folder that a person names is meant to have it.
    if let (Some(folder), None) = (folder, &path) {
        let text = format!("{} has no {FILE}", folder.display());
        let help = format!("make one: kiln doctor --calibrate --calibration {}", folder.display());
        return Err(Failure::usage(text).help(help));
    }
    if let Some(path) = path {
        let bytes = files::read(&path)?;
        match find(&serde_json::from_slice(&bytes).unwrap_or_default(), threads) {
            Ok(peak) => return Ok((peak, Some(path))),
            Err(why) => term.note(format_args!(
                "note: {} {why}: what this machine can do is measured now",
                path.display()
            )),
        }
    }
    Ok((term.during("measure the machine", None, || measure(threads))?, None))
}

/// What a file says of so many threads of this machine, or why it says nothing.
fn find(value: &Value, threads: usize) -> Result<Peak, String> {
    if value["processor"] != json!(processor()) {
        return Err("is damaged, or of another processor".into());
    }
    if value["version"] != env!("CARGO_PKG_VERSION") {
        return Err("is of another version of Kiln".into());
    }
    let peaks = value["peaks"].as_array().map_or(&[][..], Vec::as_slice);
    let peak = peaks.iter().find(|peak| peak["threads"] == json!(threads));
    let number = |name: &str| peak?[name].as_f64().filter(|&n| n.is_finite() && n > 0.0);
    let missing = || format!("says nothing of {threads} threads");
    let gflops = number("gflops").ok_or_else(missing)?;
    Ok(Peak { threads, gflops, gb_per_s: number("gb_per_s").ok_or_else(missing)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_was_measured_on_this_machine() {
        let folder = tempfile::tempdir().expect("a folder");
        let peak = |threads| Peak { threads, gflops: 90.5, gb_per_s: 20.25 };
        let path = keep(Some(folder.path()), &[peak(1), peak(2)]).expect("a file");
        let value: Value = serde_json::from_slice(&files::read(&path).expect("it")).expect("JSON");
        assert_eq!((find(&value, 2), &value["schema"]), (Ok(peak(2)), &json!("kiln/1")));
        let why = |value: &Value, threads| find(value, threads).expect_err("nothing");
        assert!(why(&value, 3).contains("3 threads"));
        for (field, text) in [("processor", "processor"), ("version", "version")] {
            let mut other = value.clone();
            other[field] = json!("another");
            assert!(why(&other, 1).contains(text), "{field}");
        }
        let mut wrong = value.clone();
        wrong["peaks"][0]["gflops"] = json!(0);
        assert!(why(&wrong, 1).contains("1 threads"));
        assert!(find(&Value::Null, 1).is_err());
    }
}
