//! Moves that change which axis lies side by side in memory.

use kiln::Compiler;
use kiln::backend::cuda::Gpu;
use kiln::graph::Graph;
use kiln::graph::op::{BinaryFn, Op, Type, UnaryFn};
use kiln::tensor::DType;

use crate::{agrees, inputs, ptx};

/// A tensor with its axes in another order.
pub fn permuted(shape: &[usize], axes: &[usize], dtype: DType) -> Graph {
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(dtype, shape));
    let y = graph.permute(x, axes, &"moved".into()).expect("a view");
    graph.outputs.push(("y".into(), y));
    graph
}

/// The same with what networks do around it: a bias along the last axis, a function, and a sum with
/// what lies as the result does.
fn fused(shape: &[usize], axes: &[usize]) -> Graph {
    let (mut graph, o) = (Graph::default(), &"moved".into());
    let to: Vec<usize> = axes.iter().map(|&a| shape[a]).collect();
    let mut row = vec![1; to.len()];
    row[to.len() - 1] = to[to.len() - 1];
    let x = graph.input("x", Type::new(DType::F32, shape));
    let bias = graph.input("bias", Type::new(DType::F32, &row));
    let rest = graph.input("rest", Type::new(DType::F32, &to));
    let y = graph.permute(x, axes, o).expect("a view");
    let y = graph.binary(BinaryFn::Add, y, bias, o).expect("a sum");
    let y = graph.unary(UnaryFn::Exp, y, o).expect("a function");
    let y = graph.binary(BinaryFn::Sub, y, rest, o).expect("a difference");
    graph.outputs.push(("y".into(), y));
    graph
}

/// Rows of several heads with their halves rotated by angles, and beside them some columns.
fn rotated(rows: usize, width: usize, more: usize) -> Graph {
    let (mut graph, o) = (Graph::default(), &"rotated".into());
    let mut input = |name, shape: &[usize]| graph.input(name, Type::new(DType::F32, shape));
    let x = input("x", &[3, rows, 2 * width]);
    let [cos, sin] = ["cos", "sin"].map(|name| input(name, &[1, rows, width]));
    let rest = input("rest", &[3, rows, more.max(1)]);
    let half = |graph: &mut Graph, start: usize| {
        let part = [(0, 1, 3), (0, 1, rows), (start as i64, 1, width)];
        graph.add(Op::Slice(part.into_iter().collect()), &[x], o).expect("a view")
    };
    let (a, b) = (half(&mut graph, 0), half(&mut graph, width));
    let mut turned = |f, x, y| {
        let x = graph.binary(BinaryFn::Mul, x, cos, o).expect("a product");
        let y = graph.binary(BinaryFn::Mul, y, sin, o).expect("a product");
        graph.binary(f, x, y, o).expect("a sum")
    };
    let (c, d) = (turned(BinaryFn::Sub, a, b), turned(BinaryFn::Add, b, a));
    let all = if more > 0 { vec![c, d, rest] } else { vec![c, d] };
    let y = graph.add(Op::Concat(2), &all, o).expect("a row");
    graph.outputs.push(("y".into(), y));
    graph
}

#[test]
fn parts_of_rows_have_a_thread_for_each_element() {
    for (rows, width, more) in [(7, 32, 0), (5, 24, 9), (3, 8, 70)] {
        let name = format!("{rows} {width} {more}");
        let graph = rotated(rows, width, more);
        agrees(&name, &graph);
        let cuda = Compiler::new().cuda_of(&graph, Gpu::of(80).expect("a GPU")).expect("a text");
        let threads: usize = cuda.module.entries.iter().map(|e| e.blocks * e.threads).sum();
        assert!(threads >= 3 * rows * width, "{name}: {threads} threads");
    }
}

/// Orders of axes, with shapes whose axes are multiples of a square's sides, and others.
const MOVES: [(&[usize], &[usize]); 8] = [
    (&[64, 96], &[1, 0]),
    (&[33, 70], &[1, 0]),
    (&[9, 100], &[1, 0]),
    (&[2, 24, 14, 14], &[0, 2, 3, 1]),
    (&[2, 7, 9, 40], &[0, 3, 1, 2]),
    (&[30, 40, 5], &[1, 2, 0]),
    (&[2, 5, 36, 20], &[0, 1, 3, 2]),
    (&[12, 8, 4, 16], &[0, 3, 2, 1]),
];

#[test]
fn moves_of_any_shape_go_through_shared_memory() {
    for (shape, axes) in MOVES {
        let name = format!("{shape:?} {axes:?}");
        let text = agrees(&name, &fused(shape, axes));
        assert!(text.contains("st.shared") && text.contains("bar.sync"), "{name}");
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::U8] {
            agrees(&format!("{name} {dtype}"), &permuted(shape, axes, dtype));
        }
    }
    // What lies side by side as it is needs no squares, nor do a few channels of pixels.
    let others: [(&[usize], &[usize]); 4] = [
        (&[6, 5, 40], &[1, 0, 2]),
        (&[1, 3, 20, 20], &[0, 2, 3, 1]),
        (&[3, 40, 50], &[2, 1, 0]),
        (&[2, 31, 4, 33], &[3, 2, 1, 0]),
    ];
    for (shape, axes) in others {
        let text = agrees(&format!("{shape:?} {axes:?}"), &fused(shape, axes));
        assert!(!text.contains("st.shared"), "{shape:?} {axes:?}");
    }
}

/// Sectors of memory for each that the operands and results fill, and turns of shared memory for
/// each that it takes without conflicts.
fn sectors(graph: &Graph) -> [f64; 2] {
    let cuda = Compiler::new().cuda_of(graph, Gpu::of(80).expect("a GPU")).expect("a text");
    let inputs = inputs(graph);
    let all = ptx::counts(&cuda, &inputs).expect("results").transactions;
    let out: usize = graph.outputs.iter().map(|o| graph.ty(o.1).size_bytes()).sum();
    let bytes = inputs.iter().map(|x| x.bytes().len()).sum::<usize>() + out;
    let turns = all.shared as f64 / all.least.max(1) as f64;
    [(all.read + all.written) as f64 * 32.0 / bytes as f64, turns]
}

#[test]
fn moves_read_and_write_whole_sectors() {
    let most = [
        ("a matrix", permuted(&[256, 320], &[1, 0], DType::F32), [1.01, 1.01]),
        ("channels last", permuted(&[2, 64, 28, 28], &[0, 2, 3, 1], DType::F32), [1.01, 1.01]),
        ("channels first", permuted(&[2, 28, 28, 64], &[0, 3, 1, 2], DType::F32), [1.01, 1.01]),
        ("of odd lengths", permuted(&[131, 197], &[1, 0], DType::F32), [1.26, 1.01]),
        ("bf16", permuted(&[256, 320], &[1, 0], DType::BF16), [1.01, 1.34]),
        ("a rotation", rotated(64, 32, 0), [1.6, 1.01]),
        ("with a sum", fused(&[2, 64, 28, 28], &[0, 2, 3, 1]), [1.09, 1.01]),
    ];
    let mut problems = Vec::new();
    for (name, graph, most) in most {
        let found = sectors(&graph);
        println!("{name}: {:.2} times the sectors, {:.2} times the turns", found[0], found[1]);
        if found[0] > most[0] || found[1] > most[1] {
            problems.push(format!("{name}: {found:?}, not {most:?}"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
