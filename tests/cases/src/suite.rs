//! The cases of the ONNX backend suite: what each one is given and should give.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln::error::Error;
use kiln::graph::Graph;
use kiln::onnx::proto::tensor_shape_proto::dimension::Value as Dim;
use kiln::onnx::proto::{GraphProto, ModelProto, ValueInfoProto};
use kiln::onnx::tensor_type;
use kiln::onnx::{ImportOptions, import};
use kiln::tensor::Tensor;
use kiln::{Limits, Model};
use prost::Message;

use crate::cases::{Case, folders, name_of, read, read_case};

/// Kinds of cases.
pub const KINDS: [&str; 4] = ["node", "pytorch-converted", "pytorch-operator", "simple"];

/// The first problem in one line that does not depend on names and numbers of the model.
pub fn reason(error: &Error) -> String {
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

/// A case that can be run.
pub struct Given {
    /// Its graph.
    pub graph: Graph,
    /// The inputs of that.
    pub inputs: Vec<Tensor>,
    /// What should come out.
    pub outputs: Vec<Tensor>,
    /// Names of all inputs of the model, of which some may be constants of the graph.
    pub names: Vec<String>,
    /// The model.
    pub model: Model,
    /// Tensors for all of its inputs.
    pub all: Vec<Tensor>,
}

/// Reads the case of a folder, or says why it cannot be run.
pub fn given(folder: &Path) -> Result<Given, String> {
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
    let model = Model::from_bytes(case.model, &Limits::default()).map_err(|e| reason(&e))?;
    Ok(Given { graph, inputs, outputs: case.outputs, names, model, all: case.inputs })
}

/// The folders of all cases, by name.
pub fn cases(data: &Path) -> Vec<(String, PathBuf)> {
    let mut cases = Vec::new();
    for kind in KINDS {
        let all = folders(&data.join(kind)).into_iter();
        cases.extend(all.map(|folder| (format!("{kind}/{}", name_of(&folder)), folder)));
    }
    cases
}

/// Checks all cases on all cores; a panic is an error that begins with `PANIC`.
pub fn run_all(
    cases: &[(String, PathBuf)],
    check: fn(&Path) -> Result<String, String>,
) -> BTreeMap<String, Result<String, String>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((name, folder)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = catch_unwind(AssertUnwindSafe(|| check(folder)));
            let result = result.unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or(panic.downcast_ref::<&str>().map(|s| s.to_string()));
                Err(format!("PANIC: {}", text.unwrap_or_default()))
            });
            done.push((name.clone(), result));
        }
        done
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("panics are caught")).collect()
    });
    std::panic::set_hook(hook);
    results
}
