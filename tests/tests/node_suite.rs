//! The ONNX backend suite, interpreted and compiled, against a ledger.
//!
//! Every case passes or has a reason in `tests/ledger.txt`; a case that does better than its line
//! fails as one that does worse does. `BLESS=1` writes the ledger.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln::Compiler;
use kiln::error::Error;
use kiln::graph::Graph;
use kiln::onnx::proto::tensor_shape_proto::dimension::Value as Dim;
use kiln::onnx::proto::{GraphProto, ModelProto, ValueInfoProto};
use kiln::onnx::tensor_type;
use kiln::onnx::{ImportOptions, import};
use kiln::tensor::Tensor;
use kiln_tests::cases::{Case, folders, name_of, read, read_case};
use kiln_tests::{ONNX, difference, interpret, oracle, run_compiled};
use prost::Message;

const KINDS: [&str; 4] = ["node", "pytorch-converted", "pytorch-operator", "simple"];

/// The first problem in one line that does not depend on names and numbers of the model.
fn reason(error: &Error) -> String {
    let Some(first) = error.diagnostics.first() else { return "an error without a word".into() };
    match &first.op {
        Some(op) => format!("{op}: {}", first.message),
        None => first.message.clone(),
    }
}

/// Names of the inputs that are fed, in the order of the data, and extents of their named dims.
fn ports(graph: &GraphProto, inputs: &[Tensor]) -> (Vec<String>, Vec<(String, usize)>) {
    let mut dims = Vec::new();
    let mut names = Vec::new();
    for (value, tensor) in graph.input.iter().zip(inputs) {
        names.push(value.name.clone().unwrap_or_default());
        let ty = tensor_type(value);
        let shape = ty.and_then(|t| t.shape.as_ref()).map_or(&[][..], |s| &s.dim);
        for (dim, &extent) in shape.iter().zip(tensor.shape()) {
            if let Some(Dim::DimParam(name)) = &dim.value {
                dims.push((name.clone(), extent));
            }
        }
    }
    (names, dims)
}

/// Imports with as few inputs made constants as the model needs: none, then those that can define
/// shapes (integers of rank 0 or 1), then all but the first, then all.
fn specialise(case: &Case, names: &[String], dims: Vec<(String, usize)>) -> Result<Graph, String> {
    type Choice = fn(usize, &Tensor) -> bool;
    let choices: [Choice; 4] = [
        |_, _| false,
        |_, t| !t.dtype().is_float() && t.shape().len() < 2,
        |i, _| i > 0,
        |_, _| true,
    ];
    let mut first = None;
    for choice in choices {
        let chosen = names.iter().cloned().zip(case.inputs.iter().cloned()).enumerate();
        let values = chosen.filter(|(i, v)| choice(*i, &v.1)).map(|(_, v)| v).collect();
        let options = ImportOptions { dims: dims.clone(), values, ..ImportOptions::default() };
        match import(case.model.clone(), &options) {
            Ok(graph) => return Ok(graph),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(reason(&first.expect("four attempts have been made")))
}

fn compare(got: &[Tensor], want: &[Tensor]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} outputs, expected {}", got.len(), want.len()));
    }
    match got.iter().zip(want).find_map(|(got, want)| difference(got, want, ONNX)) {
        Some(difference) => Err(difference),
        None => Ok(()),
    }
}

/// What the ledger says of a case.
fn outcome(folder: &Path) -> Result<String, String> {
    let model = ModelProto::decode(read(&folder.join("model.onnx"))).map_err(|e| e.to_string())?;
    let ports_of = model.graph.as_ref().ok_or("no graph")?;
    let is_tensor = |v: &ValueInfoProto| tensor_type(v).is_some();
    if !ports_of.input.iter().chain(&ports_of.output).all(is_tensor) {
        return Err("a sequence or optional as input or output".into());
    }
    let case = read_case(folder, &folder.join("test_data_set_0"))?;
    let (names, dims) = ports(ports_of, &case.inputs);
    let graph = specialise(&case, &names, dims)?;
    let feed = |name: &String| names.iter().position(|n| n == name).map(|i| &case.inputs[i]);
    let inputs: Option<Vec<Tensor>> = graph.inputs.iter().map(|p| feed(&p.0).cloned()).collect();
    let inputs = inputs.ok_or("no data for an input")?;
    let fits = graph.inputs.iter().zip(&inputs).all(|((_, ty), t)| ty.shape[..] == *t.shape());
    if !fits {
        return Err("the data does not have the shape of the input".into());
    }
    compare(&interpret(&graph, &inputs), &case.outputs).map_err(|e| format!("differs: {e}"))?;
    let constants: Vec<&str> =
        names.iter().filter(|n| graph.inputs.iter().all(|p| p.0 != **n)).map(|n| &n[..]).collect();
    let note = match constants.as_slice() {
        [] => String::new(),
        names => format!(" with constant {}", names.join(" ")),
    };
    let compiled = run_compiled(&graph, &inputs, &Compiler::new()).map_err(|e| reason(&e));
    match compiled.and_then(|got| compare(&got, &case.outputs)) {
        Ok(()) => Ok(format!("pass{note}")),
        Err(why) => Ok(format!("interpreted{note}; compiled: {why}")),
    }
}

/// Runs all cases on all cores; results in the order of the cases.
fn run_all(cases: &[(String, PathBuf)]) -> BTreeMap<String, String> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((name, folder)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = catch_unwind(AssertUnwindSafe(|| outcome(folder)));
            let line = match result {
                Ok(Ok(line)) => line,
                Ok(Err(why)) => format!("no: {why}"),
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().cloned();
                    let text = text.or(panic.downcast_ref::<&str>().map(|s| s.to_string()));
                    format!("PANIC: {}", text.unwrap_or_default())
                }
            };
            done.push((name.clone(), line.replace('\n', " ")));
        }
        done
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("panics are caught")).collect()
    })
}

fn summary(results: &BTreeMap<String, String>, kind: &str) -> String {
    let of_kind = results.iter().filter(|r| r.0.starts_with(kind)).map(|r| r.1.as_str());
    let lines: Vec<&str> = of_kind.collect();
    let count = |start: &str| lines.iter().filter(|l| l.starts_with(start)).count();
    let (pass, specialised) = (count("pass"), count("pass with"));
    format!(
        "{kind}: {pass} of {} pass ({specialised} with inputs made constants), {} more interpreted",
        lines.len(),
        count("interpreted"),
    )
}

#[test]
fn every_case_is_as_the_ledger_says() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let mut cases = Vec::new();
    for kind in KINDS {
        let all = folders(&data.join(kind)).into_iter();
        cases.extend(all.map(|folder| (format!("{kind}/{}", name_of(&folder)), folder)));
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let results = run_all(&cases);
    std::panic::set_hook(hook);
    for kind in KINDS {
        println!("{}", summary(&results, kind));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ledger.txt");
    let mut text = String::from(
        "# What becomes of each case of the ONNX 1.22.0 suite; BLESS=1 writes this file.\n",
    );
    for (name, line) in &results {
        writeln!(text, "{name} | {line}").expect("a string takes all");
    }
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &text).expect("the ledger can be written");
    }
    let panics: Vec<_> = results.iter().filter(|r| r.1.starts_with("PANIC")).collect();
    assert!(panics.is_empty(), "panics: {panics:#?}");
    let ledger = std::fs::read_to_string(&path).unwrap_or_default();
    let known: std::collections::BTreeSet<&str> = ledger.lines().collect();
    let news: Vec<&str> = text.lines().filter(|l| !known.contains(l)).collect();
    assert!(news.is_empty(), "{} lines are not in the ledger:\n{}", news.len(), news.join("\n"));
    assert_eq!(ledger.lines().count(), text.lines().count(), "cases of the ledger");
}
