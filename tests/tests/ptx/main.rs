//! PTX by its interpreter: the cases of the ONNX backend suite that the CPU passes, products and
//! rows of many sizes, planted faults; and what the assembler says of whole models.

mod assembled;
mod counts;
mod faults;
mod moves;
mod row_kernels;
mod sums;

use std::path::Path;

use kiln::backend::cuda::Gpu;
use kiln::graph::op::{BinaryFn, Composite, Op, Type, UnaryFn};
use kiln::graph::{Graph, NodeId};
use kiln::tensor::{DType, Tensor};
use kiln::{Compiler, Precision};
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

/// The same for results of a dtype: of short floats, neighbours.
fn close(dtype: DType) -> Tolerance {
    match dtype {
        DType::BF16 => Tolerance { rtol: 2f64.powi(-7), atol: 1e-5 },
        DType::F16 => Tolerance { rtol: 2f64.powi(-10), atol: 1e-5 },
        _ => CLOSE,
    }
}

/// Random inputs of a graph: numbers of [-1, 1), or any bytes.
fn inputs(graph: &Graph) -> Vec<Tensor> {
    let mut random = Random::new(3);
    let of = |(_, ty): &(String, Type)| {
        let numbers = random.tensor(&ty.shape);
        let count = ty.numel();
        let bytes: Vec<u8> = match ty.dtype {
            // The upper halves of numbers; numbers of f16 between 2^-5 and 1.
            DType::BF16 => numbers.bytes().chunks(4).flat_map(|b| [b[2], b[3]]).collect(),
            DType::F16 => {
                let one = |bits: u64| (bits & 0x83ff | (10 + (bits >> 32) % 5) << 10) as u16;
                (0..count).flat_map(|_| one(random.bits()).to_le_bytes()).collect()
            }
            DType::I8 | DType::U8 => (0..count).map(|_| random.bits() as u8).collect(),
            _ => return numbers,
        };
        Tensor::from_bytes(ty.dtype, &ty.shape, &bytes).expect("as many bytes as the type has")
    };
    graph.inputs.iter().map(of).collect()
}

/// Runs a graph as PTX and compares with the interpreter of graphs; gives the text.
fn agrees(name: &str, graph: &Graph) -> String {
    agrees_by(name, graph, &Compiler::new())
}

fn agrees_by(name: &str, graph: &Graph, compiler: &Compiler) -> String {
    let inputs = inputs(graph);
    let cuda = compiler.cuda_of(graph, Gpu::of(80).expect("a GPU")).expect(name);
    let module = kiln_ptx::parse(&cuda.module.text).expect(name);
    let got = ptx::run_text(&cuda, &module, &inputs).unwrap_or_else(|why| panic!("{name}: {why}"));
    for (got, want) in got.iter().zip(&interpret(graph, &inputs)) {
        assert_eq!(difference(got, want, close(got.dtype())), None, "{name}");
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

#[test]
fn products_of_few_rows_share_their_sums() {
    for (m, k, n) in
        [(1, 64, 64), (1, 300, 40), (3, 96, 132), (15, 70, 36), (1, 1000, 8), (2, 2052, 20)]
    {
        for turned in [false, true] {
            let text = agrees(&format!("{m} {k} {n}"), &product(m, k, n, turned));
            let shared = if turned { k % 4 == 0 } else { n % 4 == 0 };
            let word = if turned { "shfl.sync" } else { "ld.shared" };
            assert_eq!(text.contains(word), shared, "{m} {k} {n} {turned}");
            assert_eq!(text.contains("ld.global.v4"), shared, "{m} {k} {n} {turned}");
        }
    }
}

#[test]
fn long_sums_are_made_in_parts() {
    for (m, k, n) in [(64, 1024, 64), (40, 999, 37), (17, 1300, 20)] {
        for turned in [false, true] {
            let text = agrees(&format!("{m} {k} {n}"), &product(m, k, n, turned));
            assert_eq!(text.matches(".entry").count(), 2, "{m} {k} {n} is two kernels");
        }
    }
    for channels in [90, 96, 208] {
        let deep = convolution([2, channels, 20, 1], ([6, 5], [3, 3]), (1, 1));
        assert!(agrees("deep", &deep).contains("_parts("), "the sum is made in parts");
        let short = convolution([2, channels * 4, 20, 1], ([6, 5], [1, 1]), (1, 0));
        assert!(agrees("short", &short).contains("_parts("), "the sum is made in parts");
    }
}

/// A product with weights, whose operands are rounded.
fn rounded_product(
    [rows, depth, columns]: [usize; 3],
    turned: [bool; 2],
    compiler: &Compiler,
) -> Graph {
    let (mut graph, origin) = (Graph::default(), "product".into());
    let of = |shape: [usize; 2], turned: bool| {
        if turned { [shape[1], shape[0]] } else { shape }
    };
    let x = graph.input("x", Type::new(DType::F32, &of([rows, depth], turned[0])));
    let w = Random::new(7).tensor(&of([depth, columns], turned[1]));
    let w = graph.tensor(&w, &origin);
    let operands = [0, 1].map(|k: usize| {
        let x = [x, w][k];
        if turned[k] { graph.permute(x, &[1, 0], &origin).expect("a view") } else { x }
    });
    let z = graph.matmul(operands[0], operands[1], &origin).expect("a product");
    graph.outputs.push(("z".into(), z));
    compiler.rounded(graph)
}

#[test]
fn warps_multiply_rounded_numbers() {
    for (precision, name) in [
        (Precision::Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32"),
        (Precision::F16, "m16n8k16.row.col.f32.f16.f16.f32"),
        (Precision::Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32"),
    ] {
        for sizes in [[64, 64, 64], [70, 38, 90], [16, 200, 40], [33, 96, 40]] {
            for turned in [[false, false], [false, true], [true, false], [true, true]] {
                let title = format!("{sizes:?} {precision:?} {turned:?}");
                let compiler = Compiler::new().precision(precision);
                let graph = rounded_product(sizes, turned, &compiler);
                let text = agrees_by(&title, &graph, &compiler);
                assert!(text.contains(name), "{title}\n{text}");
            }
        }
    }
}

/// A product of matrices of short floats, or of bytes whose sums are i32, twice.
fn short_product(
    [rows, depth, columns]: [usize; 3],
    dtypes: [DType; 2],
    turned: [bool; 2],
) -> Graph {
    let (mut graph, origin) = (Graph::default(), "product".into());
    let shapes = [[rows, depth], [depth, columns]];
    let operands = [0, 1].map(|k: usize| {
        let [mut shape, name] = [shapes[k], shapes[k]];
        shape.rotate_left(usize::from(turned[k]));
        let x = graph.input(["x", "y"][k], Type::new(dtypes[k], &shape));
        let x = if turned[k] { graph.permute(x, &[1, 0], &origin).expect("a view") } else { x };
        assert_eq!(graph.ty(x).shape[..], name);
        match dtypes[k].is_float() {
            true => x,
            false => graph.cast(x, DType::I32, &origin).expect("a cast"),
        }
    });
    let [x, y] = operands;
    let z = graph.matmul(x, y, &origin).expect("a product");
    let z = graph.binary(BinaryFn::Add, z, z, &origin).expect("a sum");
    graph.outputs.push(("z".into(), z));
    graph
}

#[test]
fn warps_multiply_short_numbers() {
    use DType::{BF16, F16, I8, U8};
    for (dtypes, name) in [
        ([BF16, BF16], "m16n8k16.row.col.f32.bf16.bf16.f32"),
        ([F16, F16], "m16n8k16.row.col.f32.f16.f16.f32"),
        ([U8, I8], "m16n8k32.row.col.s32.u8.s8.s32"),
        ([I8, I8], "m16n8k32.row.col.s32.s8.s8.s32"),
    ] {
        for (m, k, n) in [(64, 64, 64), (70, 37, 90), (16, 200, 40), (33, 96, 24)] {
            for turned in [[false, false], [false, true], [true, false], [true, true]] {
                let title = format!("{m} {k} {n} {dtypes:?} {turned:?}");
                let text = agrees(&title, &short_product([m, k, n], dtypes, turned));
                assert!(text.contains(name), "{title}");
                assert!(text.contains("ldmatrix"), "{title}");
            }
        }
    }
    // Several products for each thread of a tile, and what is read from memory 16 bytes at once.
    let large = short_product([700, 64, 768], [BF16, BF16], [false, false]);
    let text = agrees("large", &large);
    assert!(text.contains(".x2.trans") && text.contains("cp.async.cg"));
    let stores = |word: &str| text.matches(word).count();
    assert!(stores("st.global.v2.b16") > 0 && stores("st.global.b16") == 0, "neighbours at once");
}

#[test]
fn sums_of_short_floats_are_rounded_once() {
    let (mut graph, origin) = (Graph::default(), "product".into());
    let x = graph.input("x", Type::new(DType::BF16, &[32, 48]));
    let y = graph.input("y", Type::new(DType::BF16, &[48, 24]));
    let z = graph.matmul(x, y, &origin).expect("a product");
    let z = graph.cast(z, DType::F32, &origin).expect("a cast");
    graph.outputs.push(("z".into(), z));
    let given = inputs(&graph);
    let got = ptx::run(&graph, &given, &Compiler::new()).expect("results");
    let want = interpret(&graph, &given);
    // Sums that are nearly between two numbers may go to either.
    let near = Tolerance { rtol: 2f64.powi(-8), atol: 0.0 };
    assert_eq!(difference(&got[0], &want[0], near), None);
    let [got, want] = [&got, &want].map(|all| all[0].as_slice::<f32>().expect("f32").to_vec());
    let other = got.iter().zip(&want).filter(|(a, b)| a != b).count();
    assert!(other * 50 < got.len(), "{other} of {} are rounded otherwise", got.len());
    assert!(got.iter().all(|v| v.to_bits() & 0xffff == 0), "results are bf16");
}

/// The attention of queries to keys with values, masked.
fn attention(sizes: [usize; 5]) -> Graph {
    attention_by(sizes, DType::F32, |_, x| x)
}

/// The same of short floats.
fn short_attention(sizes: [usize; 5], dtype: DType) -> Graph {
    attention_by(sizes, dtype, |_, x| x)
}

/// The same with weights that are 0 where they are no numbers.
fn guarded_attention(sizes: [usize; 5]) -> Graph {
    attention_by(sizes, DType::F32, |graph, x| {
        let origin = "guard".into();
        let is_nan = graph.binary(BinaryFn::Ne, x, x, &origin).expect("a condition");
        let zero = graph.scalar(DType::F32, 3, 0.0, &origin);
        graph.select(is_nan, zero, x, &origin).expect("a choice")
    })
}

fn attention_by(
    [heads, queries, keys, depth, width]: [usize; 5],
    dtype: DType,
    weights: impl Fn(&mut Graph, NodeId) -> NodeId,
) -> Graph {
    let (mut graph, origin) = (Graph::default(), "attention".into());
    let mut input = |name, shape: &[usize]| graph.input(name, Type::new(dtype, shape));
    let q = input("q", &[heads, queries, depth]);
    let k = input("k", &[heads, keys, depth]);
    let v = input("v", &[heads, keys, width]);
    let mask = input("mask", &[1, queries, keys]);
    let k = graph.permute(k, &[0, 2, 1], &origin).expect("a view");
    let x = graph.matmul(q, k, &origin).expect("products");
    let x = graph.binary_number(BinaryFn::Mul, x, 0.5, &origin).expect("a product");
    let x = graph.binary(BinaryFn::Add, x, mask, &origin).expect("a sum");
    let x = graph.composite(Composite::Softmax(2), x, &origin).expect("shares");
    let x = weights(&mut graph, x);
    let y = graph.matmul(x, v, &origin).expect("sums");
    graph.outputs.push(("y".into(), y));
    graph
}

/// Of short floats, whose every step is rounded in the model, and the last one only in kernels.
#[test]
fn attention_of_short_floats_is_right() {
    for (dtype, near) in [(DType::F16, 2f64.powi(-8)), (DType::BF16, 2f64.powi(-5))] {
        for sizes in [
            [2, 16, 24, 8, 8],
            [1, 33, 70, 12, 20],
            [3, 5, 300, 16, 16],
            [2, 1, 40, 8, 8],
            [1, 20, 50, 5, 7],
            [6, 197, 197, 16, 16],
            [2, 40, 100, 64, 128],
            [12, 384, 65, 64, 64],
        ] {
            let graph = short_attention(sizes, dtype);
            let inputs = inputs(&graph);
            let cuda = Compiler::new().cuda_of(&graph, Gpu::of(80).expect("a GPU")).expect("text");
            let text = &cuda.module.text;
            let module = kiln_ptx::parse(text).expect("a text");
            let got = ptx::run_text(&cuda, &module, &inputs).expect("results");
            let want = interpret(&graph, &inputs);
            let bound = Tolerance { rtol: near, atol: near };
            assert_eq!(difference(&got[0], &want[0], bound), None, "{dtype} {sizes:?}");
            assert_eq!(text.matches(".entry").count(), 1, "{dtype} {sizes:?} is one kernel");
            assert_eq!(text.contains("mma.sync"), sizes[1] >= 16, "{dtype} {sizes:?}\n{text}");
        }
    }
}

#[test]
fn attention_of_any_size_is_right() {
    for sizes in [
        [2, 16, 24, 8, 8],
        [1, 33, 70, 12, 20],
        [3, 5, 300, 16, 16],
        [2, 1, 40, 8, 8],
        [6, 197, 197, 16, 16],
        [1, 18, 1500, 5, 7],
        [1, 3, 20_000, 8, 12],
        [2, 1, 5000, 16, 200],
    ] {
        let text = agrees(&format!("{sizes:?}"), &attention(sizes));
        assert_eq!(text.matches(".entry").count(), 1, "{sizes:?} is one kernel");
    }
}

/// Where no score is finite there is no number, or 0 where the model asks for that; and scores that
/// are finite in later blocks of keys only are as good as others.
#[test]
fn attention_of_masked_rows_is_right() {
    for guarded in [false, true] {
        let make = if guarded { guarded_attention } else { attention };
        let graph = make([2, 18, 300, 8, 12]);
        let mut inputs = inputs(&graph);
        let mask = inputs[3].as_slice_mut::<f32>().expect("f32");
        mask[..300].fill(f32::NEG_INFINITY);
        mask[300..500].fill(f32::NEG_INFINITY);
        mask[600 + 150..900].fill(f32::NEG_INFINITY);
        mask[900..1000].fill(f32::MIN);
        let cuda = Compiler::new().cuda_of(&graph, Gpu::of(80).expect("a GPU")).expect("a text");
        assert_eq!(cuda.module.entries.len(), 1, "one kernel");
        let module = kiln_ptx::parse(&cuda.module.text).expect("a text");
        let got = ptx::run_text(&cuda, &module, &inputs).expect("results");
        let want = interpret(&graph, &inputs);
        assert_eq!(difference(&got[0], &want[0], CLOSE), None, "guarded {guarded}");
        let first = want[0].as_slice::<f32>().expect("f32")[0];
        assert!(if guarded { first == 0.0 } else { first.is_nan() }, "{first}");
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
fn neighbours_are_read_at_once() {
    assert!(agrees("whole", &elements(UnaryFn::Tanh, &[3, 1000])).contains("ld.global.v4.f32"));
    assert!(!agrees("odd", &elements(UnaryFn::Tanh, &[3, 111])).contains(".v4"));
    for (dtype, word) in [(DType::F16, "ld.global.v4.b16"), (DType::BF16, "ld.global.v4.u16")] {
        for inside in [dtype, DType::F32] {
            let (mut graph, o) = (Graph::default(), &"short".into());
            let x = graph.input("x", Type::new(dtype, &[3, 400]));
            let row = graph.input("row", Type::new(dtype, &[1, 400]));
            let [x, row] = [x, row].map(|v| graph.cast(v, inside, o).expect("a cast"));
            let x = graph.binary(BinaryFn::Mul, x, row, o).expect("a product");
            let x = graph.unary(UnaryFn::Tanh, x, o).expect("a function");
            let x = graph.cast(x, dtype, o).expect("a cast");
            graph.outputs.push(("y".into(), x));
            assert!(agrees("short", &graph).contains(word), "{dtype} as {inside}");
        }
    }
}

#[test]
fn the_small_models_are_right() {
    for (name, make) in MODELS {
        agrees(name, &graph(make));
    }
}
