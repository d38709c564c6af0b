//! Models as torch exports them (`tests/models/export.py`), on demand and for ranges of their dims,
//! against what torch itself makes of two sets of inputs of other lengths. `tests/run` makes them
//! where KILN_EXPORT names a Python that has torch.

use std::path::Path;

use kiln::graph::eval::Value;
use kiln::tensor::{Tensor, TensorView};
use kiln::{Compiler, Limits, Model};
use kiln_tests::cases::{folders, name_of, read_case};
use kiln_tests::{Tolerance, difference, oracle};

/// What dims may be, by name.
const RANGES: &[(&str, usize, usize)] = &[("batch", 1, 4), ("sequence", 1, 64), ("past", 1, 40)];

/// What is not compiled for ranges yet, and what is said of it.
const REFUSED: &[(&str, &str)] = &[
    // The exporter has a symbol of its own for `past + sequence`.
    ("gpt2_cached", "s53"),
    ("llama_c", "s53"),
];

fn same(got: &[(String, Tensor)], want: &[Tensor], what: &str) -> Result<(), String> {
    assert_eq!(got.len(), want.len(), "{what}");
    for ((name, got), want) in got.iter().zip(want) {
        let largest = Value::from_tensor(want).as_f64s().iter().fold(0.0, |m, v| v.abs().max(m));
        let tolerance = Tolerance { rtol: 1e-3, atol: 1e-5 * largest };
        if let Some(difference) = difference(got, want, tolerance) {
            return Err(format!("{what}, {name}: {difference}"));
        }
    }
    Ok(())
}

fn check(folder: &Path) -> Result<(), String> {
    let name = name_of(folder);
    let model = Model::open(folder.join("model.onnx"), &Limits::default());
    let model = model.map_err(|e| format!("{name}: {e}"))?;
    let compiler = RANGES.iter().fold(Compiler::new(), |compiler, &(dim, least, most)| {
        let named = |port: &kiln::ModelPort| {
            let mut dims = port.dims.iter().flatten();
            dims.any(|d| matches!(d, kiln::Dim::Symbol(name) if name == dim))
        };
        match model.inputs().iter().any(named) {
            true => compiler.dim_range(dim, least..=most),
            false => compiler,
        }
    });
    let refused = REFUSED.iter().find(|(model, _)| name.starts_with(model));
    let ranged = match (compiler.compile_ranges(&model), refused) {
        (Ok(executable), None) => Some(executable),
        (Err(e), Some((_, text))) if e.to_string().contains(text) => None,
        (Err(e), _) => return Err(format!("{name} for ranges: {e}")),
        (Ok(_), Some(_)) => return Err(format!("{name} is compiled for ranges now")),
    };
    let on_demand = Compiler::new().on_demand(&model);
    for case in folders(folder) {
        let (inputs, what) = (read_case(folder, &case)?, format!("{name}/{}", name_of(&case)));
        let ports = model.inputs().iter().zip(&inputs.inputs);
        let given: Vec<(&str, TensorView)> =
            ports.map(|(port, tensor)| (port.name.as_str(), tensor.view())).collect();
        let got = on_demand.run(&given).map_err(|e| format!("{what}: {e}"))?;
        same(&got, &inputs.outputs, &format!("{what} on demand"))?;
        if let Some(ranged) = &ranged {
            let got = ranged.run(&given).map_err(|e| format!("{what}: {e}"))?;
            same(&got, &inputs.outputs, &format!("{what} for ranges"))?;
        }
    }
    Ok(())
}

#[test]
fn exports_give_what_torch_gives() {
    let Some(exports) = oracle("exports") else { return };
    let problems = folders(&exports).into_iter().filter_map(|folder| check(&folder).err());
    let problems: Vec<String> = problems.collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
