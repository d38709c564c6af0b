//! Operators of onnxruntime's own, against what it says of them.

use kiln::onnx::{ImportOptions, import};
use kiln_tests::cases::{folders, name_of, read_case};
use kiln_tests::{Tolerance, WAYS, difference, oracle};

/// Sums of f32 in another order than onnxruntime's.
const TOLERANCE: Tolerance = Tolerance { rtol: 1e-4, atol: 2e-5 };

#[test]
fn operators_give_what_onnxruntime_gives() {
    let Some(cases) = oracle("microsoft") else { return };
    let mut problems = Vec::new();
    let folders = folders(&cases);
    for folder in &folders {
        let name = name_of(folder);
        let case = read_case(folder, folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        let graph = match import(case.model, &ImportOptions::default()) {
            Ok(graph) => graph,
            Err(error) => {
                problems.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (way, run) in WAYS {
            let found = run(&graph, &case.inputs);
            let why = match &found {
                Err(why) => Some(why.clone()),
                Ok(found) if found.len() < case.outputs.len() => {
                    Some(format!("{} outputs, expected {}", found.len(), case.outputs.len()))
                }
                Ok(found) => {
                    let pairs = found.iter().zip(&case.outputs);
                    pairs.into_iter().find_map(|(a, b)| difference(a, b, TOLERANCE))
                }
            };
            problems.extend(why.map(|why| format!("{name} {way}: {why}")));
        }
    }
    assert!(folders.len() >= 35, "{} cases", folders.len());
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
