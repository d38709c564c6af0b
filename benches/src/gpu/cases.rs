//! The cases of the interpreter of PTX on a device: results beside those of the interpreter, bit
//! for bit, and beside what the graph means.

use std::path::Path;

use kiln::Compiler;
use kiln::backend::cuda::Gpu as Isa;
use kiln::graph::Graph;
use kiln::graph::eval::Value as Meaning;
use kiln::tensor::Tensor;
use kiln_cases::{ONNX, Random, Tolerance, difference, small, suite};
use kiln_cuda::{CudaModel, Gpu, Options};
use kiln_gpu::{Behaviour, Double};
use serde_json::{Value, json};

use crate::graphs;
use crate::say;

/// How far sums may be from those of the interpreter of graphs, which are f64.
const CLOSE: Tolerance = Tolerance { rtol: 1e-5, atol: 1e-5 };

/// Graphs beside the small models: sizes that fill tiles, and such that do not.
const GRAPHS: &[&str] = &[
    "product 64 64 64 f32",
    "product 70 37 90 f32",
    "product 16 16 16 f32",
    "product 129 40 68 f32",
    "product 65 17 131 f32",
    "product 1 300 70 f32",
    "tanh 3 1000",
    "tanh 3 111",
    "gelu 5 260",
    "add 7 33",
    "sum 9 700",
    "transpose 33 65",
    "softmax 3 64",
    "softmax 3 127",
    "softmax 3 1500",
    "layernorm 3 100",
    "layernorm 3 1024",
];

/// What came of a case.
enum Outcome {
    /// All bits are the interpreter's.
    Same,
    /// The largest difference to them.
    Differs(f64),
    /// It is not what the graph means, or fails.
    Wrong(String),
}

/// Runs all cases, and says what differs; false where anything is wrong.
pub fn all(gpu: &Gpu, isa: Isa, data: Option<&Path>) -> bool {
    let (mut count, mut differs, mut wrong) = (0, Vec::new(), Vec::new());
    let mut note = |name: &str, outcome: Outcome| {
        count += 1;
        let mut line = json!({ "case": name });
        match outcome {
            Outcome::Same => return,
            Outcome::Differs(most) => {
                line["largest_difference"] = json!(most);
                differs.push(name.to_string());
            }
            Outcome::Wrong(why) => {
                line["wrong"] = json!(why);
                wrong.push(name.to_string());
            }
        }
        say(&line);
    };
    for (name, make) in small::MODELS {
        note(name, case(gpu, isa, &small::graph(make), None));
    }
    for words in GRAPHS {
        let words_of: Vec<&str> = words.split(' ').collect();
        let graph = graphs::graph(&words_of);
        note(words, graph.map_or_else(Outcome::Wrong, |graph| case(gpu, isa, &graph, None)));
    }
    for (name, folder) in data.map(suite::cases).unwrap_or_default() {
        // What cannot be read or compiled is the same on every machine, and tested elsewhere.
        if let Ok(given) = suite::given(&folder)
            && Compiler::new().compile_cuda_of(&given.graph, &[isa]).is_ok()
        {
            note(&name, case(gpu, isa, &given.graph, Some((&given.inputs, &given.outputs))));
        }
    }
    let (differing, failing): (Vec<Value>, Vec<Value>) = (
        differs.into_iter().map(Value::from).collect(),
        wrong.into_iter().map(Value::from).collect(),
    );
    let right = failing.is_empty();
    let same = count - differing.len() - failing.len();
    say(&json!({ "cases": count, "same_bits": same, "differ": differing, "wrong": failing }));
    right
}

/// One case, with random inputs where none are given.
fn case(gpu: &Gpu, isa: Isa, graph: &Graph, given: Option<(&[Tensor], &[Tensor])>) -> Outcome {
    let outcome = || -> Result<Outcome, String> {
        let mut random = Random::new(5);
        let made: Vec<Tensor>;
        let (inputs, expected, tolerance) = match given {
            Some((inputs, outputs)) => (inputs, outputs.to_vec(), ONNX),
            None => {
                let types = graph.inputs.iter();
                made = types.map(|(_, ty)| graphs::tensor(ty, &mut random)).collect();
                (&made[..], kiln::interpret(graph, &made), CLOSE)
            }
        };
        let double = Gpu::with(Double::new(Behaviour { sm: isa.sm, ..Behaviour::default() }));
        let found = run(gpu, isa, graph, inputs)?;
        let interpreted = run(&double, isa, graph, inputs)?;
        let mut pairs = found.iter().zip(&expected);
        if let Some(why) = pairs.find_map(|(found, want)| difference(found, want, tolerance)) {
            return Ok(Outcome::Wrong(why));
        }
        let same = found.iter().zip(&interpreted).all(|(a, b)| a.bytes() == b.bytes());
        let most = found.iter().zip(&interpreted).map(|(a, b)| largest(a, b)).fold(0.0, f64::max);
        Ok(if same { Outcome::Same } else { Outcome::Differs(most) })
    };
    outcome().unwrap_or_else(Outcome::Wrong)
}

fn run(gpu: &Gpu, isa: Isa, graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let artifact = Compiler::new().compile_cuda_of(graph, &[isa]).map_err(|e| e.to_string())?;
    // SAFETY: the text was emitted from loops that were checked against the plan.
    let model = unsafe { CudaModel::new(gpu, &artifact, Options::default()) };
    let model = model.map_err(|e| e.to_string())?;
    let ports = graph.inputs.iter().zip(inputs);
    let named: Vec<_> = ports.map(|((name, _), tensor)| (name.as_str(), tensor.view())).collect();
    let found = model.run(&named).map_err(|e| e.to_string())?;
    Ok(found.into_iter().map(|(_, tensor)| tensor).collect())
}

/// The largest difference between elements of two tensors.
fn largest(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (Meaning::from_tensor(a).as_f64s(), Meaning::from_tensor(b).as_f64s());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).filter(|d| !d.is_nan()).fold(0.0, f64::max)
}
