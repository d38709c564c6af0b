//! Functions of rows: of any length, alone and with what is fused around them.

use kiln::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use kiln::graph::{Graph, NodeId};
use kiln::tensor::DType;

use crate::{agrees, rows};

const NORM: Composite = Composite::LayerNorm(1, 0x3727_c5ac);

#[test]
fn rows_of_any_length_are_right() {
    for columns in [64, 100, 127, 300, 1024, 1500] {
        for f in [Composite::Softmax(1), NORM] {
            let text = agrees(&format!("{f:?} of {columns}"), &rows(f, 3, columns));
            assert!(text.contains("shfl.sync"), "{f:?} of {columns} is folded by threads");
        }
    }
    // Many rows, each of more threads than a warp.
    assert!(agrees("many", &rows(NORM, 520, 1024)).contains("bar.sync"));
}

#[test]
fn parts_of_warps_share_short_rows() {
    for (count, columns) in
        [(8, 16), (24, 17), (64, 32), (16, 49), (40, 100), (2, 200), (2048, 64), (600, 256)]
    {
        for f in [Composite::Softmax(1), NORM] {
            let text = agrees(&format!("{f:?} of {count} {columns}"), &rows(f, count, columns));
            let alone = "a warp folds without the others of its block";
            assert!(text.contains("shfl.sync") && !text.contains("bar.sync"), "{alone}: {columns}");
        }
    }
}

/// A graph over rows of [rows, columns] and what is built of two of these.
fn fused(
    shape: &[usize],
    dtype: DType,
    build: impl FnOnce(&mut Graph, NodeId, NodeId) -> NodeId,
) -> Graph {
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(dtype, shape));
    let y = graph.input("y", Type::new(dtype, shape));
    let z = build(&mut graph, x, y);
    graph.outputs.push(("z".into(), z));
    graph
}

#[test]
fn what_is_fused_around_rows_is_right() {
    let o = &"rows".into();
    for (count, columns) in [(3, 1200), (16, 64), (5, 770), (2, 9000), (1, 33000), (32, 48)] {
        let last = [1];
        let shape = [count, columns];
        let name = |what: &str| format!("{what} of {count} {columns}");
        // What is folded is computed, and wanted again.
        let sum = fused(&shape, DType::F32, |g, x, y| {
            let x = g.binary(BinaryFn::Add, x, y, o).expect("a sum");
            let z = g.composite(NORM, x, o).expect("a norm");
            g.binary(BinaryFn::Mul, z, y, o).expect("a product")
        });
        agrees(&name("a sum"), &sum);
        // What is folded is not wanted again, but what it is made of is.
        let square = fused(&shape, DType::F32, |g, x, y| {
            let square = g.binary(BinaryFn::Mul, x, x, o).expect("a square");
            let most = g.reduce(ReduceFn::Max, square, &last, o).expect("the most");
            let x = g.unary(UnaryFn::Tanh, x, o).expect("a function");
            let x = g.binary(BinaryFn::Div, x, most, o).expect("shares");
            g.binary(BinaryFn::Add, x, y, o).expect("a sum")
        });
        agrees(&name("a square"), &square);
        // The same elements, and those of the row from its end on.
        let turned = fused(&shape, DType::F32, |g, x, y| {
            let e = g.composite(Composite::Softmax(1), x, o).expect("shares");
            let back = [(0, 1, count), (columns as i64 - 1, -1, columns)];
            let back = g.add(Op::Slice(back.into_iter().collect()), &[x], o).expect("a view");
            let e = g.binary(BinaryFn::Mul, e, back, o).expect("a product");
            g.binary(BinaryFn::Add, e, y, o).expect("a sum")
        });
        agrees(&name("turned"), &turned);
        for dtype in [DType::BF16, DType::F16] {
            let short = fused(&shape, dtype, |g, x, y| {
                let [x, y] = [x, y].map(|v| g.cast(v, DType::F32, o).expect("a cast"));
                let x = g.composite(Composite::Softmax(1), x, o).expect("shares");
                let x = g.binary(BinaryFn::Mul, x, y, o).expect("a product");
                g.cast(x, dtype, o).expect("a cast")
            });
            let text = agrees(&name("short"), &short);
            assert_eq!(text.contains("ld.global.v4"), columns % 4 == 0, "{dtype} of {columns}");
        }
    }
    // Rows of several axes, of which a factor has one only.
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::F32, &[6, 12, 40]));
    let scale = graph.input("scale", Type::new(DType::F32, &[1, 12, 1]));
    let z = graph.composite(NORM, x, o).expect("a norm");
    let z = graph.binary(BinaryFn::Mul, z, scale, o).expect("a product");
    graph.outputs.push(("z".into(), z));
    agrees("rows of two axes", &graph);
    // Scores of many heads.
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::F32, &[2, 3, 8, 50]));
    let mask = graph.input("mask", Type::new(DType::F32, &[2, 1, 8, 50]));
    let x = graph.binary(BinaryFn::Add, x, mask, o).expect("a sum");
    let z = graph.composite(Composite::Softmax(3), x, o).expect("shares");
    graph.outputs.push(("z".into(), z));
    agrees("scores", &graph);
}
