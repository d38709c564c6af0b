//! What the CPU backend does not emit, by name. Such operations are only interpreted by the other
//! tests; the test here fails when the table is wrong in either direction.

use kiln::graph::Graph;
use kiln::graph::op::{Affine, BinaryFn, Composite, Contract, Op, ReduceFn, Type, UnaryFn};
use kiln::tensor::DType;
use kiln_tests::compilers;

use crate::dtypes;
use crate::trial::{Added, origin};

/// Operations and dtypes as they stand in messages, with the reason.
const REFUSED: &[(&str, &str)] = &[];

/// Whether an operation is in the table.
pub fn refused(name: &str) -> bool {
    REFUSED.iter().any(|r| r.0 == name)
}

/// The names of all operations that may be refused or not, each with one that is small.
fn operations() -> Vec<(String, Vec<DType>, Op)> {
    let index = |axes: &[usize]| axes.iter().map(|&a| Affine::axis(a)).collect();
    let product = Contract {
        extents: [4, 4, 4].into_iter().collect(),
        n_out: 2,
        maps: [index(&[0, 2]), index(&[2, 1])],
    };
    let mut all: Vec<(String, Vec<DType>, Op)> = Vec::new();
    let mut push = |name: &str, operands: &[Option<DType>], op: Op| {
        for dtype in dtypes() {
            let operands = operands.iter().map(|o| o.unwrap_or(dtype)).collect();
            all.push((format!("{name} of {dtype}"), operands, op.clone()));
        }
    };
    UnaryFn::ALL.iter().for_each(|(f, name)| push(name, &[None], Op::Unary(*f)));
    BinaryFn::ALL.iter().for_each(|(f, name)| push(name, &[None, None], Op::Binary(*f)));
    push("select", &[Some(DType::Bool), None, None], Op::Select);
    dtypes().for_each(|to| push("cast", &[None], Op::Cast(to)));
    push("reshape", &[None], Op::Reshape([2, 8].into_iter().collect()));
    push("permute", &[None], Op::Permute([1, 0].into_iter().collect()));
    push("slice", &[None], Op::Slice([(3, -1, 2), (0, 2, 2)].into_iter().collect()));
    push("window", &[None], Op::Window([(2, 1, 1)].into_iter().collect()));
    push("concat", &[None, None], Op::Concat(0));
    push("gather", &[None, Some(DType::I64)], Op::Gather(0));
    for (f, name) in ReduceFn::ALL {
        push(&format!("reduce {name}"), &[None], Op::Reduce(f, [0].into_iter().collect()));
        push(&format!("scan {name}"), &[None], Op::Scan(f, 0));
    }
    push("matmul", &[None, None], Op::Contract(Box::new(product)));
    for (name, f) in [
        ("sigmoid", Composite::Sigmoid),
        ("silu", Composite::Silu),
        ("gelu", Composite::Gelu),
        ("softmax", Composite::Softmax(1)),
        ("layer_norm", Composite::LayerNorm(1, 1e-5f32.to_bits())),
        ("rms_norm", Composite::RmsNorm(1, 1e-5f32.to_bits())),
    ] {
        push(name, &[None], Op::Composite(f));
    }
    all
}

/// A graph of one operation, or why there is none.
fn graph_of(operands: &[DType], op: &Op) -> Result<Graph, kiln::error::Diagnostic> {
    let mut graph = Graph::default();
    let args: Vec<_> = operands
        .iter()
        .enumerate()
        .map(|(i, &dtype)| graph.input(&format!("x{i}"), Type::new(dtype, &[4, 4])))
        .collect();
    let y: Added = graph.add(op.clone(), &args, &origin());
    graph.outputs.push(("y".into(), y?));
    Ok(graph)
}

#[test]
fn what_is_refused_is_in_the_table() {
    let mut problems = Vec::new();
    let mut seen = Vec::new();
    for (name, operands, op) in operations() {
        // Operations that the graph has not are nothing to emit.
        let Ok(graph) = graph_of(&operands, &op) else { continue };
        for (way, compiler) in compilers() {
            let built = compiler.optimise(&graph).and_then(|k| compiler.build(&k)).is_ok();
            if built == refused(&name) {
                problems.push(format!("{name} {way}: {}", if built { "built" } else { "refused" }));
            }
        }
        seen.push(name);
    }
    let unknown = REFUSED.iter().filter(|r| !seen.iter().any(|s| s == r.0));
    problems.extend(unknown.map(|(name, reason)| format!("{name} is not tried: {reason}")));
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
