//! Whole models, compiled, against stored outputs: those of the ONNX suite or of onnxruntime.

use kiln::Compiler;
use kiln::graph::eval::Value;
use kiln::onnx::{ImportOptions, import};
use kiln::tensor::Tensor;
use kiln_tests::cases::{folders, name_of, read_case};
use kiln_tests::{Tolerance, difference, oracle, run_compiled};

/// The relative tolerance of the ONNX suite; 2e-3 there for the deepest. Outputs near zero get
/// room in proportion to the largest one.
fn tolerance(name: &str, reference: &Tensor) -> Tolerance {
    let rtol = if name.contains("densenet") { 2e-3 } else { 1e-3 };
    let largest = Value::from_tensor(reference).as_f64s().iter().fold(0.0, |m, v| v.abs().max(m));
    Tolerance { rtol, atol: 1e-5 * largest }
}

fn check(name: &str, folder: &std::path::Path) -> Result<(), String> {
    let case = read_case(folder, folder)?;
    let graph = import(case.model, &ImportOptions::default()).map_err(|e| e.to_string())?;
    let got = run_compiled(&graph, &case.inputs, &Compiler::new()).map_err(|e| e.to_string())?;
    if got.len() != case.outputs.len() {
        return Err(format!("{} outputs, expected {}", got.len(), case.outputs.len()));
    }
    for (got, want) in got.iter().zip(&case.outputs) {
        if let Some(difference) = difference(got, want, tolerance(name, want)) {
            return Err(difference);
        }
    }
    Ok(())
}

#[test]
fn models_give_their_stored_outputs() {
    let Some(models) = oracle("models") else { return };
    let mut problems = Vec::new();
    for folder in folders(&models) {
        let name = name_of(&folder);
        let start = std::time::Instant::now();
        let result = check(&name, &folder);
        println!("{name}: {result:?} after {:.1} s", start.elapsed().as_secs_f64());
        problems.extend(result.err().map(|why| format!("{name}: {why}")));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
