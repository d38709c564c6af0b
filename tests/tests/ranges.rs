//! One executable for all lengths of named dims: it gives what the same model gives that is
//! compiled for one length, and says clearly where it cannot be.

use kiln::tensor::{DType, Tensor, TensorView};
use kiln::{Compiler, Dim, Form, Kind, Limits, Model, Precision};
use kiln_tests::machines::machines;
use kiln_tests::{Random, Tolerance, difference, oracle};

fn model(name: &str) -> Option<Model> {
    let path = oracle("dynamic")?.join(name).join("model.onnx");
    Some(Model::open(path, &Limits::default()).expect("a model with named dims"))
}

/// Tensors for all inputs of a model, for these lengths of its dims.
fn inputs(model: &Model, dims: &[(&str, usize)], random: &mut Random) -> Vec<(String, Tensor)> {
    let ports = model.inputs().iter();
    let tensor = |port: &kiln::ModelPort| {
        let extent = |dim: &Dim| match dim {
            Dim::Known(extent) => *extent,
            Dim::Symbol(name) => dims.iter().find(|d| d.0 == name).expect("a named dim").1,
            Dim::Unknown => panic!("a dim without a name"),
        };
        let shape: Vec<usize> = port.dims.iter().flatten().map(extent).collect();
        let tensor = match port.ty.starts_with("i64") {
            true => {
                let ids: Vec<i64> = (0..shape.iter().product())
                    // A negative one counts from the end.
                    .map(|_| random.below(50) as i64 - if random.below(4) == 0 { 50 } else { 0 })
                    .collect();
                Tensor::from_slice(&shape, &ids)
            }
            false => random.tensor(&shape),
        };
        (port.name.clone(), tensor)
    };
    ports.map(tensor).collect()
}

fn views(inputs: &[(String, Tensor)]) -> Vec<(&str, TensorView<'_>)> {
    inputs.iter().map(|(name, tensor)| (name.as_str(), tensor.view())).collect()
}

/// Compares with the model compiled for one length, for all of these lengths.
fn check(name: &str, ranges: &[(&str, usize, usize)], lengths: &[&[usize]]) {
    let Some(model) = model(name) else { return };
    let exact = kiln_tests::compilers().map(|(way, compiler)| (way, compiler, 1e-5));
    // Sums that are rounded: kernels for one length may add in another order, and convolutions for
    // one length may have fewer products.
    let rounded = ("in bf16", Compiler::new().precision(Precision::Bf16), 2f64.powi(-6));
    for (way, compiler, apart) in exact.into_iter().chain([rounded]) {
        let ranged = ranges.iter().fold(compiler.clone(), |compiler, &(name, least, most)| {
            compiler.dim_range(name, least..=most)
        });
        let executable = ranged.compile_ranges(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
        let fixed = ranged.on_demand(&model);
        let mut random = Random::new(7);
        for lengths in lengths {
            let dims: Vec<(&str, usize)> =
                ranges.iter().zip(*lengths).map(|(range, &length)| (range.0, length)).collect();
            let inputs = inputs(&model, &dims, &mut random);
            let got = executable.run(&views(&inputs)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let want = fixed.run(&views(&inputs)).unwrap_or_else(|e| panic!("{name}: {e}"));
            for ((port, got), (_, want)) in got.iter().zip(&want) {
                let tolerance = Tolerance { rtol: apart, atol: apart };
                if let Some(difference) = difference(got, want, tolerance) {
                    panic!("{name} {dims:?}, {way}, {port}: {difference}");
                }
            }
        }
    }
}

#[test]
fn a_network_takes_any_batch() {
    check("cnn", &[("batch", 1, 9)], &[&[1], &[2], &[9], &[5], &[8]]);
}

#[test]
fn an_encoder_takes_any_batch_and_sequence() {
    let lengths: Vec<Vec<usize>> =
        [1, 2, 3].iter().flat_map(|&b| (1..=20).map(move |s| vec![b, s])).collect();
    let mut lengths: Vec<&[usize]> = lengths.iter().map(Vec::as_slice).collect();
    lengths.extend([&[4, 64][..], &[4, 63], &[1, 33], &[2, 40], &[1, 1]]);
    check("encoder", &[("batch", 1, 4), ("sequence", 1, 64)], &lengths);
}

#[test]
fn a_cache_may_have_any_length() {
    let lengths: Vec<Vec<usize>> = (1..=33).map(|past| vec![1 + past % 3, past]).collect();
    let lengths: Vec<&[usize]> = lengths.iter().map(Vec::as_slice).collect();
    check("decoder", &[("batch", 1, 3), ("past", 1, 33)], &lengths);
}

#[test]
fn axes_that_are_joined_and_parted_again_may_have_any_length() {
    let lengths: Vec<Vec<usize>> =
        [1, 2, 3, 4].iter().flat_map(|&b| [1, 2, 7, 8, 9, 20].map(|s| vec![b, s])).collect();
    let lengths: Vec<&[usize]> = lengths.iter().map(Vec::as_slice).collect();
    check("joined", &[("batch", 1, 4), ("sequence", 1, 20)], &lengths);
}

#[test]
fn which_of_two_dims_is_shorter_decides_nothing_in_silence() {
    let Some(model) = model("cut") else { return };
    let refused = |compiler: Compiler| {
        let text = compiler.compile_ranges(&model).expect_err("a slice by another dim").to_string();
        assert!(text.contains("K0110") && text.contains("/slice"), "{text}");
    };
    let compiler = || Compiler::new().dim_range("past", 1..=40);
    // The slice has all of x for the longest dims.
    refused(compiler().dim_range("sequence", 1..=64));
    refused(compiler().dim_range("sequence", 1..=40));
    refused(Compiler::new().dim_range("sequence", 1..=40).dim_range("past", 1..=40));
    refused(compiler().dim_range("sequence", 1..=8));
    refused(compiler().dim("sequence", 8));
    // A number that no length comes near cuts nothing.
    let lengths: &[&[usize]] = &[&[1, 1], &[10, 3], &[40, 64], &[39, 1]];
    check("cut_far", &[("past", 1, 40), ("sequence", 1, 64)], lengths);
}

#[test]
fn tensors_outside_of_a_range_are_refused_by_name() {
    let Some(model) = model("encoder") else { return };
    let compiler = Compiler::new().dim_range("batch", 2..=4).dim_range("sequence", 1..=64);
    let executable = compiler.compile_ranges(&model).expect("an executable");
    let mut random = Random::new(1);
    let mut error = |dims: &[(&str, usize)]| {
        let inputs = inputs(&model, dims, &mut random);
        executable.run(&views(&inputs)).expect_err("a length out of range").to_string()
    };
    let text = error(&[("batch", 1), ("sequence", 8)]);
    assert!(text.contains("`batch` 1, expected 2 to 4"), "{text}");
    let text = error(&[("batch", 2), ("sequence", 65)]);
    assert!(text.contains("`sequence` 65, expected 1 to 64"), "{text}");
    let ids = Tensor::zeros(DType::I64, &[2, 8]);
    let mask = Tensor::zeros(DType::F32, &[2, 7]);
    let text = executable.run(&[("ids", ids.view()), ("mask", mask.view())]);
    let text = text.expect_err("inputs that do not agree").to_string();
    assert!(text.contains("`sequence` 7, an earlier input made it 8"), "{text}");
    let mask = Tensor::zeros(DType::F32, &[2, 8, 1]);
    assert!(executable.run(&[("ids", ids.view()), ("mask", mask.view())]).is_err());
}

#[test]
fn a_length_that_is_computed_with_is_refused_with_the_node() {
    let Some(model) = model("mean") else { return };
    let compiler = Compiler::new().dim_range("sequence", 1..=64).dim("batch", 1);
    let text = compiler.compile_ranges(&model).expect_err("a mean over a dim").to_string();
    assert!(text.contains("/reducemean0") && text.contains("K0110"), "{text}");
    assert!(text.contains("--dim NAME=N"), "{text}");
    // Over another dim it is as good as any number.
    let compiler = Compiler::new().dim("sequence", 8).dim_range("batch", 1..=4);
    compiler.compile_ranges(&model).expect("a mean over a number");
    // And nothing of it is nothing.
    let compiler = Compiler::new().dim_range("batch", 0..=4).dim("sequence", 8);
    let executable = compiler.compile_ranges(&model).expect("a batch of nothing");
    let nothing = Tensor::zeros(DType::F32, &[0, 8, 8]);
    let outputs = executable.run(&[("x", nothing.view())]).expect("a run");
    assert_eq!(outputs[0].1.shape(), [0, 8]);
}

#[test]
fn memory_is_that_of_the_longest_run() {
    let Some(model) = model("encoder") else { return };
    let bytes = |most: usize| {
        let compiler = Compiler::new().dim("batch", 1).dim_range("sequence", 1..=most);
        compiler.compile_ranges(&model).expect("an executable").plan().arena_bytes
    };
    assert!(bytes(32) < bytes(64), "{} and {}", bytes(32), bytes(64));
}

#[test]
fn other_architectures_take_any_length() {
    let Some(model) = model("encoder") else { return };
    let ranges = |compiler: Compiler| {
        compiler.verify_code(true).dim_range("batch", 1..=3).dim_range("sequence", 1..=20)
    };
    let executable = ranges(Compiler::new()).compile_ranges(&model).expect("an executable");
    for machine in machines() {
        let mut machine = machine.lock().expect("no other test panics with it");
        let target = machine.cpu().triple.name;
        let form = Form::new(Kind::Shared, "net");
        let compiler = ranges(Compiler::new().target(machine.cpu().clone()));
        let library = compiler.package(&model, &form).expect("a package").file;
        let mut random = Random::new(9);
        for lengths in [[1, 1], [2, 7], [3, 20], [1, 13]] {
            let named = [("batch", lengths[0]), ("sequence", lengths[1])];
            let inputs = inputs(&model, &named, &mut random);
            let want = executable.run(&views(&inputs)).expect("a run");
            let length = |name: &str| named.iter().find(|n| n.0 == name).expect("a dim").1 as i64;
            let dims = executable.plan().dims.iter().map(|dim| length(&dim.name));
            let dims: Vec<i64> = dims.collect();
            let tensors: Vec<Tensor> = inputs.into_iter().map(|(_, tensor)| tensor).collect();
            let ports: Vec<(DType, Vec<usize>)> =
                want.iter().map(|(_, t)| (t.dtype(), t.shape().to_vec())).collect();
            let got = machine.run_library(&library, &dims, &tensors, &ports);
            let got = got.unwrap_or_else(|e| panic!("{target}, {lengths:?}: {e}"));
            for (got, (_, want)) in got.iter().zip(&want) {
                let tolerance = Tolerance { rtol: 1e-4, atol: 1e-5 };
                assert_eq!(difference(got, want, tolerance), None, "{target}, {lengths:?}");
            }
        }
    }
}
