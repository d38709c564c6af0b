//! Models as torch exports them, with named dims (`KILN_EXPORT=PYTHON tests/run` makes them): what
//! is compiled for the shapes that it is given gives what torch gave; some are one executable for
//! all lengths of their dims, the others are refused with the node.

use kiln::tensor::TensorView;
use kiln::{Compiler, Limits, Model};
use kiln_tests::cases::{folders, name_of, read_case};
use kiln_tests::{Tolerance, difference, oracle};

const CLOSE: Tolerance = Tolerance { rtol: 1e-3, atol: 2e-5 };
/// Exports that are one executable for all lengths. The others are decoders with a cache, whose
/// masks are made of numbers that hang on its length.
const RANGES: [&str; 6] =
    ["bert", "gpt2_opset", "resnet18", "torch_encoder", "vit", "whisper_encoder"];

#[test]
fn exports_give_what_torch_gave() {
    let Some(exports) = oracle("exports") else { return };
    let all = folders(&exports);
    assert!(!all.is_empty(), "no exports in {}", exports.display());
    for folder in all {
        let name = name_of(&folder);
        let model = Model::open(folder.join("model.onnx"), &Limits::default());
        let model = model.unwrap_or_else(|e| panic!("{name}: {e}"));
        let dims = model.symbols().into_iter();
        let compiler = dims.fold(Compiler::new(), |c, dim| c.dim_range(dim, 1..=40));
        let ranged = match RANGES.iter().any(|known| name.starts_with(known)) {
            true => Some(compiler.compile_ranges(&model).unwrap_or_else(|e| panic!("{name}: {e}"))),
            false => {
                let error = compiler.compile_ranges(&model).expect_err(&name).to_string();
                assert!(error.contains("K0110") && error.contains("node_"), "{name}: {error}");
                None
            }
        };
        let on_demand = Compiler::new().on_demand(&model);
        for case in folders(&folder) {
            let data = read_case(&folder, &case).unwrap_or_else(|e| panic!("{name}: {e}"));
            let names = model.inputs().iter().map(|port| port.name.as_str());
            let inputs: Vec<(&str, TensorView)> =
                names.zip(data.inputs.iter().map(|tensor| tensor.view())).collect();
            let found = on_demand.run(&inputs).unwrap_or_else(|e| panic!("{name}: {e}"));
            let again = ranged.as_ref().map(|executable| executable.run(&inputs));
            let again = again.map(|found| found.unwrap_or_else(|e| panic!("{name}: {e}")));
            for outputs in [Some(found), again].into_iter().flatten() {
                assert_eq!(outputs.len(), data.outputs.len(), "{name}");
                for ((output, got), want) in outputs.iter().zip(&data.outputs) {
                    let far = difference(got, want, CLOSE);
                    assert!(far.is_none(), "{name}, {output}: {far:?}");
                }
            }
        }
    }
}
