//! PTX by its interpreter: the cases of the ONNX backend suite that the CPU passes, products and
//! rows of many sizes, planted faults; and what the assembler says of whole models.

mod assembled;
mod faults;

use std::path::Path;

use kiln::Compiler;
use kiln::backend::cuda::Gpu;
use kiln::graph::Graph;
use kiln::graph::op::{BinaryFn, Composite, Op, Type, UnaryFn};
use kiln::tensor::{DType, Tensor};
use kiln_tests::small::{MODELS, graph};
use kiln_tests::{ONNX, Random, Tolerance, difference, interpret, oracle, ptx, suite};

#[test]
fn every_case_that_the_cpu_passes_is_right_as_ptx() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let ledger = include_str!("../../ledger.txt");
    let passes = |name: &str| ledger.lines().any(|l| l.starts_with(&format!("{name} | pass")));
    let mut cases = suite::cases(&data);
    cases.retain(|(name, _)| passes(name));
    let results = suite::run_all(&cases, check);
    let wrong: Vec<String> = results
        .iter()
        .filter_map(|(name, result)| Some(format!("{name}: {}", result.as_ref().err()?)))
        .collect();
    println!("{} of {} cases are right as PTX", results.len() - wrong.len(), results.len());
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
    assert!(results.len() > 1000, "cases of the suite");
}

fn check(folder: &Path) -> Result<String, String> {
    let suite::Given { graph, inputs, outputs, .. } = suite::given(folder)?;
    let got = ptx::run(&graph, &inputs, &Compiler::new())?;
    let different = got.iter().zip(&outputs).find_map(|(got, want)| difference(got, want, ONNX));
    match different {
        None => Ok(String::new()),
        Some(why) => Err(format!("differs: {why}")),
    }
}

/// How far sums may be from those of the interpreter, which are f64.
const CLOSE: Tolerance = Tolerance { rtol: 1e-5, atol: 1e-5 };

/// Runs a graph as PTX and compares with the interpreter of graphs; gives the text.
fn agrees(name: &str, graph: &Graph) -> String {
    let mut random = Random::new(3);
    let inputs: Vec<Tensor> = graph.inputs.iter().map(|(_, ty)| random.tensor(&ty.shape)).collect();
    let cuda = Compiler::new().cuda_of(graph, Gpu::of(80).expect("a GPU")).expect(name);
    let module = kiln_ptx::parse(&cuda.module.text).expect(name);
    let got = ptx::run_text(&cuda, &module, &inputs).unwrap_or_else(|why| panic!("{name}: {why}"));
    for (got, want) in got.iter().zip(&interpret(graph, &inputs)) {
        assert_eq!(difference(got, want, CLOSE), None, "{name}");
    }
    cuda.module.text
}

/// A product of matrices, the second one given as its columns where `turned`, and a bias.
fn product(rows: usize, depth: usize, columns: usize, turned: bool) -> Graph {
    let mut graph = Graph::default();
    let origin = "product".into();
    let x = graph.input("x", Type::new(DType::F32, &[rows, depth]));
    let shape = if turned { [columns, depth] } else { [depth, columns] };
    let y = graph.input("y", Type::new(DType::F32, &shape));
    let bias = graph.input("bias", Type::new(DType::F32, &[1, columns]));
    let y = if turned { graph.permute(y, &[1, 0], &origin).expect("a view") } else { y };
    let z = graph.matmul(x, y, &origin).expect("a product");
    let z = graph.binary(BinaryFn::Add, z, bias, &origin).expect("a sum");
    graph.outputs.push(("z".into(), z));
    graph
}

/// A function of the rows of a matrix.
fn rows(f: Composite, rows: usize, columns: usize) -> Graph {
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::F32, &[rows, columns]));
    let y = graph.composite(f, x, &"rows".into()).expect("a function of rows");
    graph.outputs.push(("y".into(), y));
    graph
}

/// A function of every element.
fn elements(f: UnaryFn, shape: &[usize]) -> Graph {
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::F32, shape));
    let y = graph.unary(f, x, &"elements".into()).expect("a function");
    graph.outputs.push(("y".into(), y));
    graph
}

#[test]
fn tiles_of_any_size_are_right() {
    for (m, k, n) in
        [(64, 64, 64), (70, 37, 90), (16, 16, 16), (129, 40, 68), (65, 17, 131), (1530, 20, 1404)]
    {
        for turned in [false, true] {
            let text = agrees(&format!("{m} {k} {n}"), &product(m, k, n, turned));
            assert!(text.contains("cp.async"), "{m} {k} {n} goes through shared memory");
            let whole = k % 4 == 0 || !turned && n % 4 == 0;
            assert_eq!(text.contains("cp.async.cg"), whole, "{m} {k} {n} in pieces of 16 bytes");
        }
    }
}

/// A convolution of images with a border of so many zeros, and a bias.
fn convolution(
    [batch, ic, oc, groups]: [usize; 4],
    (image, window): ([usize; 2], [usize; 2]),
    (stride, border): (usize, usize),
) -> Graph {
    let (mut graph, origin) = (Graph::default(), "conv".into());
    let x = graph.input("x", Type::new(DType::F32, &[batch, ic, image[0], image[1]]));
    let w = [oc, ic / groups, window[0], window[1]];
    let w = graph.input("w", Type::new(DType::F32, &w));
    let bias = graph.input("bias", Type::new(DType::F32, &[1, oc, 1, 1]));
    let fill = graph.scalar(DType::F32, 0, 0.0, &origin);
    let borders = Op::Pad(vec![(0, 0), (0, 0), (border, border), (border, border)].into());
    let x = graph.add(borders, &[x, fill], &origin).expect("a border");
    let steps = (&[stride; 2][..], &[1; 2][..]);
    let y = graph.conv([x, w], steps, groups, &origin).expect("a convolution");
    let y = graph.binary(BinaryFn::Add, y, bias, &origin).expect("a sum");
    let y = graph.unary(UnaryFn::Tanh, y, &origin).expect("a function");
    graph.outputs.push(("y".into(), y));
    graph
}

#[test]
fn convolutions_of_any_size_are_tiles() {
    for (sizes, images, steps) in [
        ([1, 3, 24, 1], ([19, 22], [7, 7]), (2, 3)),
        ([1, 16, 20, 1], ([9, 8], [3, 3]), (1, 1)),
        ([2, 8, 17, 1], ([7, 12], [3, 3]), (1, 1)),
        ([3, 16, 16, 1], ([5, 4], [1, 1]), (1, 0)),
        ([2, 32, 16, 1], ([6, 6], [1, 1]), (2, 0)),
        ([1, 40, 64, 2], ([6, 7], [3, 2]), (1, 1)),
        ([2, 5, 16, 1], ([4, 40], [1, 5]), (1, 0)),
    ] {
        let text = agrees(&format!("{sizes:?}"), &convolution(sizes, images, steps));
        assert!(text.contains("cp.async"), "{sizes:?} goes through shared memory");
    }
    let depthwise = convolution([1, 20, 20, 20], ([8, 8], [3, 3]), (1, 1));
    assert!(!agrees("depthwise", &depthwise).contains("shared"));
}

#[test]
fn rows_of_any_length_are_right() {
    for columns in [64, 100, 127, 300, 1024, 1500] {
        for f in [Composite::Softmax(1), Composite::LayerNorm(1, 1e-5f32.to_bits())] {
            let text = agrees(&format!("{f:?} of {columns}"), &rows(f, 3, columns));
            assert!(text.contains("shfl.sync"), "{f:?} of {columns} is folded by threads");
        }
    }
}

#[test]
fn neighbours_are_read_at_once() {
    assert!(agrees("whole", &elements(UnaryFn::Tanh, &[3, 1000])).contains("ld.global.v4.f32"));
    assert!(!agrees("odd", &elements(UnaryFn::Tanh, &[3, 111])).contains(".v4"));
}

#[test]
fn the_small_models_are_right() {
    for (name, make) in MODELS {
        agrees(name, &graph(make));
    }
}
