//! How far f32 is from f64: layers of convolutions by each algorithm, and whole networks. The
//! reference is the same graph with every f32 an f64, which Kiln computes without fewer products;
//! `tests/torch` checks that path against libtorch.

use std::path::Path;

use kiln::graph::eval::Value;
use kiln::graph::op::{BinaryFn, Op, Type};
use kiln::graph::{Graph, NodeId};
use kiln::onnx::{ImportOptions, import};
use kiln::tensor::{DType, Tensor};
use kiln::{Compiler, Limits, Model, Precision};
use kiln_tests::cases::read_case;
use kiln_tests::{Random, oracle, run_compiled};

/// Of results of a layer, where inputs and results have a variance of 1.
const LAYER: f64 = 3e-5;
/// Of outputs of a network, relative to the largest.
const NETWORK: f64 = 3e-6;

/// Networks by the folders of their models.
const NETWORKS: [&str; 6] = [
    "cnn_b1",
    "encoder",
    "encoder_decomposed",
    "light_squeezenet_random",
    "mobilenet_v2",
    "resnet18",
];

/// Networks whose products are of bf16, and what that changes of their outputs, relative to the
/// largest: each operand is rounded by up to 2^-9 of itself, and layer after layer adds as much.
/// Those of f16 and tf32 have three bits more.
const ROUNDED: [(&str, f64); 7] = [
    ("bert_base_opset23", 4.5e-2),
    ("encoder", 3e-3),
    ("gpt2_decode_opset23", 1e-2),
    ("light_resnet50_random", 2e-2),
    ("mobilenet_v2", 1.2e-2),
    ("resnet18", 6e-3),
    ("vit_b16_opset23", 1e-2),
];

fn f64_for(dtype: DType) -> DType {
    if dtype == DType::F32 { DType::F64 } else { dtype }
}

fn widened_tensor(tensor: &Tensor) -> Tensor {
    match tensor.as_slice::<f32>() {
        Some(values) => {
            let values: Vec<f64> = values.iter().map(|&v| v.into()).collect();
            Tensor::from_slice(tensor.shape(), &values)
        }
        None => tensor.clone(),
    }
}

/// The same graph with f64 for every f32.
fn widened(graph: &Graph) -> Graph {
    let mut wide = Graph::default();
    let mut nodes: Vec<NodeId> = Vec::new();
    for (id, node) in graph.ids().zip(&graph.nodes) {
        let args: Vec<NodeId> = node.args.iter().map(|a| nodes[a.index()]).collect();
        let added = match &node.op {
            Op::Input(index) => {
                let (name, ty) = &graph.inputs[*index as usize];
                Ok(wide.input(name, Type::of(f64_for(ty.dtype), ty.shape.clone())))
            }
            Op::Const(_) => {
                let constant = graph.constant(id).expect("the operation says that it is one");
                let tensor = Value::from_constant(constant).to_tensor();
                Ok(wide.tensor(&widened_tensor(&tensor), &node.origin))
            }
            Op::Cast(to) => wide.add(Op::Cast(f64_for(*to)), &args, &node.origin),
            op => wide.add(op.clone(), &args, &node.origin),
        };
        nodes.push(added.expect("what holds of f32 holds of f64"));
    }
    wide.outputs = graph.outputs.iter().map(|o| (o.0.clone(), nodes[o.1.index()])).collect();
    wide
}

/// Results in f64.
fn reference(graph: &Graph, inputs: &[Tensor]) -> Vec<Tensor> {
    let inputs: Vec<Tensor> = inputs.iter().map(widened_tensor).collect();
    let compiler = Compiler::new().exact_convolutions(true);
    run_compiled(&widened(graph), &inputs, &compiler).expect("f64 is supported as f32 is")
}

/// The largest error of each output, and the largest magnitude of any.
fn errors(got: &[Tensor], want: &[Tensor]) -> (f64, f64) {
    let numbers = |t: &[Tensor]| -> Vec<f64> {
        t.iter().flat_map(|t| Value::from_tensor(t).as_f64s()).collect()
    };
    let (got, want) = (numbers(got), numbers(want));
    assert_eq!(got.len(), want.len());
    assert!(got.iter().chain(&want).all(|v| v.is_finite()), "results are numbers");
    let error = got.iter().zip(&want).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    (error, want.iter().fold(0.0, |m: f64, v| m.max(v.abs())))
}

/// Numbers of a normal distribution.
fn normal(random: &mut Random, shape: &[usize], scale: f64) -> Tensor {
    let mut next = || {
        let (u, v) = (f64::from(random.unit()), f64::from(random.unit()));
        let radius = (-2.0 * ((u + 1.0) / 2.0).max(1e-9).ln()).sqrt();
        (radius * (std::f64::consts::PI * v).cos() * scale) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_slice(shape, &values)
}

/// A convolution of 3 by 3 with a border, of what a layer before it gives, and its input. Where
/// `whole`, inputs and weights are bytes with a scale.
fn layer(random: &mut Random, channels: usize, extent: usize, whole: bool) -> (Graph, Tensor) {
    let (mut graph, o) = (Graph::default(), "conv".into());
    let shape = [1, extent, extent, channels];
    let dtype = if whole { DType::U8 } else { DType::F32 };
    let x = graph.input("x", Type::new(dtype, &shape));
    let x = graph.permute(x, &[0, 3, 1, 2], &o).expect("four axes");
    let fan_in = (9 * channels) as f64;
    let wide = [channels, channels, 3, 3];
    let (x, w, input) = match whole {
        false => {
            let w = graph.tensor(&normal(random, &wide, fan_in.sqrt().recip()), &o);
            let x = graph.binary_number(BinaryFn::Max, x, -10.0, &o).expect("numbers");
            (x, w, normal(random, &shape, 1.0))
        }
        true => {
            let count = wide.iter().product();
            let w: Vec<i8> = (0..count).map(|_| random.bits() as i8).collect();
            let w = graph.tensor(&Tensor::from_slice(&wide, &w), &o);
            let w = graph.cast(w, DType::I32, &o).expect("bytes are numbers");
            let w = graph.cast(w, DType::F32, &o).expect("integers are numbers");
            // The standard deviation of bytes is 74.
            let scale = (74.0 * fan_in.sqrt()).recip();
            let w = graph.binary_number(BinaryFn::Mul, w, scale, &o).expect("numbers");
            let x = graph.cast(x, DType::I32, &o).expect("bytes are numbers");
            let x = graph.binary_number(BinaryFn::Sub, x, 128.0, &o).expect("numbers");
            let x = graph.cast(x, DType::F32, &o).expect("integers are numbers");
            let x = graph.binary_number(BinaryFn::Mul, x, 1.0 / 74.0, &o).expect("numbers");
            let bytes: Vec<u8> = (0..shape.iter().product()).map(|_| random.bits() as u8).collect();
            (x, w, Tensor::from_slice(&shape, &bytes))
        }
    };
    let zero = graph.scalar(DType::F32, 0, 0.0, &o);
    let border = [(0, 0), (0, 0), (1, 1), (1, 1)].into_iter().collect();
    let x = graph.add(Op::Pad(border), &[x, zero], &o).expect("a border of each axis");
    let y = graph.conv([x, w], (&[1, 1], &[1, 1]), 1, &o).expect("the weight fits");
    graph.outputs.push(("y".into(), y));
    (graph, input)
}

/// Whether a layer is computed by fewer products, and whether by integers.
fn algorithm(graph: &Graph, compiler: &Compiler) -> (bool, bool) {
    let fused = compiler.optimise(graph).expect("a convolution");
    let kernels = compiler.lower(&fused).expect("a convolution").kernels;
    let fewer = kernels.iter().any(|k| k.name.ends_with(".products"));
    (fewer, kernels.iter().any(|k| kiln::loops::text::print(k).contains("= dot")))
}

#[test]
fn convolutions() {
    let (fewer, exact) = (Compiler::new(), Compiler::new().exact_convolutions(true));
    let mut random = Random::new(1);
    let mut lines = Vec::new();
    for (channels, extent) in [(64, 28), (256, 14), (64, 7), (512, 7)] {
        let (graph, input) = layer(&mut random, channels, extent, false);
        let want = reference(&graph, std::slice::from_ref(&input));
        for (name, compiler) in [("fewer products", &fewer), ("direct", &exact)] {
            let form = algorithm(&graph, compiler);
            assert_eq!(form, (name != "direct", false), "{name} of {channels} at {extent}");
            let got = run_compiled(&graph, std::slice::from_ref(&input), compiler);
            let (error, _) = errors(&got.expect("a convolution"), &want);
            lines.push(format!("{name}, {channels} channels at {extent}: {error:.2e}"));
            assert!(error <= LAYER, "{}", lines[lines.len() - 1]);
        }
    }
    for (channels, extent) in [(64, 28), (256, 14)] {
        let (graph, input) = layer(&mut random, channels, extent, true);
        assert!(algorithm(&graph, &fewer).1, "integers of {channels} at {extent}");
        let want = reference(&graph, std::slice::from_ref(&input));
        let got = run_compiled(&graph, &[input], &fewer).expect("a convolution");
        let (error, _) = errors(&got, &want);
        lines.push(format!("integers, {channels} channels at {extent}: {error:.2e}"));
        assert!(error <= LAYER, "{}", lines[lines.len() - 1]);
    }
    println!("{}", lines.join("\n"));
}

fn network(folder: &Path) -> Result<[f64; 2], String> {
    let case = read_case(folder, folder)?;
    let options = ImportOptions { folder: Some(folder.to_path_buf()), ..ImportOptions::default() };
    let graph = import(case.model, &options).map_err(|e| e.to_string())?;
    let want = reference(&graph, &case.inputs);
    let relative = |compiler: Compiler| {
        let got = run_compiled(&graph, &case.inputs, &compiler).map_err(|e| e.to_string())?;
        let (error, largest) = errors(&got, &want);
        Ok::<f64, String>(error / largest)
    };
    Ok([relative(Compiler::new())?, relative(Compiler::new().exact_convolutions(true))?])
}

#[test]
fn networks() {
    let Some(models) = oracle("models") else { return };
    let mut beyond = Vec::new();
    for name in NETWORKS {
        let [fewer, exact] = network(&models.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("{name}: {fewer:.2e} of the largest output, {exact:.2e} without fewer products");
        beyond.extend((fewer > NETWORK || exact > NETWORK).then_some(name));
    }
    assert!(beyond.is_empty(), "more than {NETWORK:e} of the largest output: {beyond:?}");
}

#[test]
fn networks_of_rounded_numbers() {
    let Some(models) = oracle("models") else { return };
    let mut beyond = Vec::new();
    for (name, bound) in ROUNDED {
        let folder = models.join(name);
        let inputs = read_case(&folder, &folder).unwrap_or_else(|e| panic!("{name}: {e}")).inputs;
        let path = folder.join("model.onnx");
        let model = Model::open(path, &Limits::default()).unwrap_or_else(|e| panic!("{e}"));
        let run = |precision| {
            let compiler = Compiler::new().precision(precision);
            let graph = compiler.graph(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
            run_compiled(&graph, &inputs, &compiler).unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        let exact = run(Precision::F32);
        for (precision, bound) in [
            (Precision::Bf16, bound),
            (Precision::F16, bound / 8.0),
            (Precision::Tf32, bound / 8.0),
        ] {
            let rounded = run(precision);
            let far = exact.iter().zip(&rounded).map(|(exact, rounded)| {
                let (error, largest) =
                    errors(std::slice::from_ref(rounded), std::slice::from_ref(exact));
                error / largest.max(f64::MIN_POSITIVE)
            });
            let far = far.fold(0.0, f64::max);
            println!("{name} in {}: {far:.2e} of the largest output", precision.name());
            assert!(far > 1e-5, "{name}: nothing was rounded");
            beyond.extend((far > bound).then_some((name, precision)));
        }
    }
    assert!(beyond.is_empty(), "more than was rounded: {beyond:?}");
}
