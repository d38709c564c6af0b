//! Whole models, compiled, against stored outputs: those of the ONNX suite or of onnxruntime.

use std::fmt::Write;
use std::path::Path;

use kiln::Compiler;
use kiln::graph::Graph;
use kiln::graph::eval::Value;
use kiln::onnx::{ImportOptions, import};
use kiln::plan::kernels::Program;
use kiln::tensor::Tensor;
use kiln_tests::cases::{folders, name_of, read_case};
use kiln_tests::{Tolerance, difference, oracle};

/// Kernels of a layer at most, by the beginning of a model's name.
const MOST: [(&str, usize); 3] = [("bert", 12), ("minilm", 12), ("llama", 14)];

/// Elements of a quantised model that are equal to the stored ones at least; the others were
/// halfway between two steps somewhere.
const EQUAL: f64 = 0.8;

/// The relative tolerance of the ONNX suite; 2e-3 there for the deepest. Outputs near zero get
/// room in proportion to the largest one.
/// Outputs of quantised models are some steps from the stored ones at most.
fn tolerance(name: &str, reference: &Tensor) -> Tolerance {
    if name.starts_with("qdq") {
        let steps = if name.contains("resnet") { 2.0 } else { 1.0 };
        return Tolerance { rtol: 1e-5, atol: steps * step(reference) };
    }
    let rtol = if name.contains("densenet") { 2e-3 } else { 1e-3 };
    let largest = Value::from_tensor(reference).as_f64s().iter().fold(0.0, |m, v| v.abs().max(m));
    Tolerance { rtol, atol: 1e-5 * largest }
}

/// The step of a value that was quantised: the least difference of two elements.
fn step(value: &Tensor) -> f64 {
    let mut values = Value::from_tensor(value).as_f64s();
    values.sort_by(f64::total_cmp);
    let steps = values.windows(2).map(|w| w[1] - w[0]).filter(|step| *step > 0.0);
    steps.fold(f64::INFINITY, f64::min)
}

/// The share of elements that are equal.
fn equal(got: &Tensor, want: &Tensor) -> f64 {
    let [got, want] = [got, want].map(|t| Value::from_tensor(t).as_f64s());
    let same = got.iter().zip(&want).filter(|(a, b)| (*a - *b).abs() <= 1e-5 * b.abs());
    same.count() as f64 / want.len() as f64
}

/// A model of a folder, with external data that lies beside it.
fn graph_of(model: bytes::Bytes, folder: &Path) -> Result<Graph, String> {
    let options = ImportOptions { folder: Some(folder.to_path_buf()), ..ImportOptions::default() };
    import(model, &options).map_err(|e| e.to_string())
}

/// How many kernels a model has in all, and one of its layers, which repeat; 0 where none do.
/// Kernels are those of 128 bit vectors, so that every machine counts the same.
fn kernels(program: &Program) -> (usize, usize) {
    const SHORTEST: usize = 6;
    let launches = program.launches.iter().filter(|l| !l.constant);
    let kernels: Vec<usize> = launches.map(|l| l.kernel).collect();
    let repeats = |&period: &usize| {
        let pairs = kernels.windows(2 * period);
        pairs.into_iter().any(|w| w[..period] == w[period..])
    };
    (kernels.len(), (SHORTEST..=kernels.len() / 2).find(repeats).unwrap_or(0))
}

fn check(name: &str, folder: &Path) -> Result<(usize, usize), String> {
    let case = read_case(folder, folder)?;
    let graph = graph_of(case.model, folder)?;
    let compiler = Compiler::new();
    let fused = compiler.optimise(&graph).map_err(|e| e.to_string())?;
    let portable = compiler.clone().wide(false);
    let portable = portable.optimise(&graph).and_then(|fused| portable.lower(&fused));
    let portable = portable.map_err(|e| e.to_string())?;
    let executable = compiler.build(&fused).map_err(|e| e.to_string())?;
    let inputs = graph.inputs.iter().zip(&case.inputs);
    let inputs: Vec<_> = inputs.map(|(port, t)| (port.0.as_str(), t.view())).collect();
    let got = executable.run(&inputs).map_err(|e| e.to_string())?;
    if got.len() != case.outputs.len() {
        return Err(format!("{} outputs, expected {}", got.len(), case.outputs.len()));
    }
    for ((_, got), want) in got.iter().zip(&case.outputs) {
        if let Some(difference) = difference(got, want, tolerance(name, want)) {
            return Err(difference);
        }
        if name.starts_with("qdq") {
            let share = equal(got, want);
            println!("{name}: {:.1} % of elements are equal", 100.0 * share);
            if share < EQUAL {
                return Err(format!("{share} of the elements are equal, expected {EQUAL}"));
            }
        }
    }
    Ok(kernels(&portable))
}

/// Every model, and how many kernels it becomes; `KILN_BLESS=1` writes `golden/kernels.txt` anew.
#[test]
fn models_give_their_stored_outputs_by_few_kernels() {
    let Some(models) = oracle("models") else { return };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/kernels.txt");
    let mut problems = Vec::new();
    let mut counts = String::from("# model, kernels in all, kernels of a layer that repeats\n");
    for folder in folders(&models) {
        let name = name_of(&folder);
        let start = std::time::Instant::now();
        let result = check(&name, &folder);
        println!("{name}: {result:?} after {:.1} s", start.elapsed().as_secs_f64());
        match result {
            Ok((all, layer)) => {
                let _ = writeln!(counts, "{name} {all} {layer}");
                let most = MOST.iter().find(|m| name.starts_with(m.0));
                problems.extend(most.filter(|m| layer == 0 || layer > m.1).map(|m| {
                    format!("{name}: {layer} kernels of a layer, expected {} at most", m.1)
                }));
            }
            Err(why) => problems.push(format!("{name}: {why}")),
        }
    }
    if std::env::var_os("KILN_BLESS").is_some() {
        std::fs::write(&golden, &counts).expect("a file beside the tests");
    }
    let want = std::fs::read_to_string(&golden).unwrap_or_default();
    for (want, got) in want.lines().zip(counts.lines()).filter(|(want, got)| want != got) {
        problems.push(format!("{want}, now {got}; KILN_BLESS=1 writes golden/kernels.txt anew"));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
