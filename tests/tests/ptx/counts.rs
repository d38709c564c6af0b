//! What kernels do, counted by the interpreter: instructions of all threads for each product or
//! element, and bytes that are read from memory for each byte of the operands.

use kiln::backend::cuda::Gpu;
use kiln::graph::Graph;
use kiln::graph::op::Composite;
use kiln::tensor::DType::{BF16, I8, U8};
use kiln::{Compiler, Precision};

use crate::{
    attention, convolution, inputs, product, ptx, rounded_product, rows, short_attention,
    short_product,
};

/// The counts of a graph whose products or elements are so many: instructions for each of them, and
/// bytes a byte.
fn counts(graph: &Graph, compiler: &Compiler, products: usize) -> [f64; 2] {
    let cuda = compiler.cuda_of(graph, Gpu::of(80).expect("a GPU")).expect("a text");
    let inputs = inputs(graph);
    let counts = ptx::counts(&cuda, &inputs).expect("results");
    let bytes: usize = inputs.iter().map(|x| x.bytes().len()).sum();
    [counts.instructions as f64 / products as f64, counts.read as f64 / bytes as f64]
}

#[test]
fn kernels_take_few_instructions_and_bytes() {
    let square = |n: usize| product(n, n, n, false);
    let short = |n, dtypes| short_product([n, 256, n], dtypes, [false, true]);
    let image = convolution([1, 64, 64, 1], ([28, 28], [3, 3]), (1, 1));
    let heads = [4, 128, 128, 64, 64];
    let tf32 = Compiler::new().precision(Precision::Tf32);
    let words = rounded_product([512, 256, 512], [false, false], &tf32);
    let all = [
        ("a product", square(256), 256 * 256 * 256, [1.55, 8.6]),
        ("of more blocks", product(1408, 64, 1536, false), 1408 * 64 * 1536, [1.45, 12.9]),
        ("columns that are rows", product(512, 64, 512, true), 512 * 64 * 512, [1.4, 14.0]),
        ("one row", product(1, 512, 1024, false), 512 * 1024, [4.4, 1.3]),
        ("one row, turned", product(1, 512, 1024, true), 512 * 1024, [6.9, 2.1]),
        ("a convolution", image, 64 * 64 * 9 * 28 * 28, [1.8, 19.5]),
        ("bf16", short(512, [BF16, BF16]), 512 * 256 * 512, [0.141, 12.1]),
        ("bytes", short(256, [U8, I8]), 256 * 256 * 256, [0.127, 8.1]),
        ("attention", attention(heads), 2 * 4 * 128 * 128 * 64, [2.4, 51.0]),
        ("attention of bf16", short_attention(heads, BF16), 2 * 4 * 128 * 128 * 64, [0.76, 3.2]),
    ];
    let plain =
        all.map(|(name, graph, products, most)| (name, graph, Compiler::new(), products, most));
    let words = ("tf32", words, tf32, 512 * 256 * 512, [0.26, 26.5]);
    for (name, graph, compiler, products, most) in plain.into_iter().chain([words]) {
        let found = counts(&graph, &compiler, products);
        println!("{name}: {:.3} instructions a product, {:.1} times read", found[0], found[1]);
        assert!(found[0] <= most[0] && found[1] <= most[1], "{name}: {found:?}, not {most:?}");
    }
}

#[test]
fn rows_take_few_instructions_and_are_read_once() {
    let norm = Composite::LayerNorm(1, 1e-5f32.to_bits());
    let all = [
        ("softmax of 64", rows(Composite::Softmax(1), 512, 64), [38.0, 1.0]),
        ("of 197", rows(Composite::Softmax(1), 12, 197), [40.5, 1.0]),
        ("of 768", rows(Composite::Softmax(1), 12, 768), [35.2, 1.0]),
        ("of 4096", rows(Composite::Softmax(1), 4, 4096), [38.6, 1.0]),
        ("of 20000", rows(Composite::Softmax(1), 4, 20000), [45.3, 1.0]),
        ("of 40000", rows(Composite::Softmax(1), 2, 40000), [72.3, 3.0]),
        ("layer norm of 64", rows(norm, 512, 64), [14.9, 1.0]),
        ("of 768", rows(norm, 12, 768), [12.2, 1.0]),
        ("of 4096", rows(norm, 4, 4096), [15.6, 1.0]),
    ];
    let mut problems = Vec::new();
    for (name, graph, most) in all {
        let elements = graph.ty(graph.outputs[0].1).numel();
        let found = counts(&graph, &Compiler::new(), elements);
        println!("{name}: {:.2} instructions an element, {:.2} times read", found[0], found[1]);
        if found[0] > most[0] || found[1] > most[1] {
            problems.push(format!("{name}: {found:?}, not {most:?}"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
