//! The numbers that products are made of, where a person asks for others than the model's.
//!
//! Rounding is part of the graph: everything after it, interpreters included, computes what it
//! says. A number is rounded by a cast to the short dtype and one back, so that products still are
//! of f32 and sums keep its precision. Where a target multiplies the short dtype itself, kernels
//! read what is between the casts.

use kiln_runtime::tensor::DType;

use crate::graph::op::{Contract, Op, Type};
use crate::graph::{Args, Graph, Node, NodeId, Origin};
use crate::rules::cost::tile_of_products;

/// What the operands of products with weights are rounded to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Precision {
    /// Nothing: they are f32, as in the model.
    #[default]
    F32,
    /// bf16, which has the exponents of f32 and 7 bits of its mantissa.
    Bf16,
    /// f16, which has 10 bits of the mantissa and few exponents: numbers above 65504 become
    /// infinite, and those below 6e-5 lose bits.
    F16,
    /// tf32, which has the exponents of f32 and 10 bits of its mantissa, and takes as much memory.
    Tf32,
}

impl Precision {
    /// All of them.
    pub const ALL: [Precision; 4] =
        [Precision::F32, Precision::Bf16, Precision::F16, Precision::Tf32];

    /// What products are made of.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
            Precision::F16 => DType::F16,
            Precision::Tf32 => DType::TF32,
        }
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        self.dtype().name()
    }
}

/// Columns of weights that a product has at least to be worth it: those of a vector. Others, such
/// as those of a depthwise convolution or of a classifier of few classes, take little time.
const LEAST_COLUMNS: usize = 16;

/// The graph with the operands of its products rounded: matrix products and convolutions of f32 of
/// which one operand hangs on constants only, and the other one does not. Convolutions of 3 by 3
/// that have fewer products in f32 (`loops/winograd.rs`) are faster as they are, unless `exact`.
pub(crate) fn rounded(graph: Graph, precision: Precision, exact: bool) -> Graph {
    let short = precision.dtype();
    if short == DType::F32 {
        return graph;
    }
    let mut out = Graph::empty_like(&graph);
    out.bodies = graph.bodies.clone();
    let mut constant: Vec<bool> = Vec::with_capacity(graph.nodes.len());
    let mut place: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let fixed = node.args.iter().map(|a| constant[a.index()]);
        let fixed: Vec<bool> = fixed.collect();
        constant.push(!matches!(node.op, Op::Input(_)) && fixed.iter().all(|&c| c));
        let mut args: Args = node.args.iter().map(|a| place[a.index()]).collect();
        if let (Op::Contract(contract), &[x, y]) = (&node.op, &fixed[..])
            && x != y
            && node.ty.dtype == DType::F32
            && is_product(contract, usize::from(y))
            && (exact || !node.ty.used.is_empty() || !has_fewer(contract, usize::from(y)))
        {
            args.iter_mut().for_each(|x| *x = through(&mut out, short, *x, &node.origin));
        }
        place.push(out.push(node.op.clone(), args, node.ty.clone(), &node.origin));
    }
    let outputs = graph.outputs.iter();
    out.outputs = outputs.map(|(name, id)| (name.clone(), place[id.index()])).collect();
    out.live()
}

/// Whether a contraction with weights, the operand of that number, is one that is rounded: every
/// number of the other operand is multiplied with many columns of weights, and the sum runs along
/// an axis of both that has whole pairs.
fn is_product(contract: &Contract, weights: usize) -> bool {
    let extent = |axis: usize| contract.extents[axis];
    let uses = |k: usize, axis: usize| contract.maps[k].iter().any(|i| i.coefficient(axis) != 0);
    // An axis of the operand, or of each of its groups.
    let along = |k: usize, axis: usize| {
        contract.maps[k].iter().any(|index| {
            let others = index.terms.iter().filter(|t| usize::from(t.0) != axis);
            index.coefficient(axis) == 1 && others.into_iter().all(|t| t.1 >= extent(axis) as i64)
        })
    };
    let column = |&axis: &usize| uses(weights, axis) && !uses(1 - weights, axis);
    let columns = (0..contract.n_out).filter(column).map(extent).max();
    let mut sums = contract.n_out..contract.extents.len();
    let whole = sums.any(|a| along(0, a) && along(1, a) && extent(a).is_multiple_of(2));
    columns.is_some_and(|columns| columns >= LEAST_COLUMNS)
        && whole
        && !contract.extents.contains(&0)
}

/// Whether a convolution by fewer products in f32 is faster than by all of them in half the time.
fn has_fewer(contract: &Contract, weights: usize) -> bool {
    let rank = contract.n_out;
    let channels = (rank..contract.extents.len()).flat_map(|c| (0..rank).map(move |o| [c, o]));
    channels.into_iter().any(|c| tile_of_products(contract, weights, c).is_some_and(|m| m > 2))
}

/// A value rounded to a dtype, as f32 again.
fn through(graph: &mut Graph, dtype: DType, x: NodeId, origin: &Origin) -> NodeId {
    let ty = graph.ty(x).clone();
    let short = short(graph, dtype, x, origin);
    graph.push(Op::Cast(DType::F32), Args::from_slice(&[short]), ty, origin)
}

/// A value as that dtype. What is inside a border is rounded before it gets that, so that whatever
/// computes it stores both; and what has axes joined before they are, so that it is read in its own
/// axes.
fn short(graph: &mut Graph, dtype: DType, x: NodeId, origin: &Origin) -> NodeId {
    let node = graph.node(x).clone();
    let (op, args) = match node.op {
        Op::Pad(_) | Op::Reshape(_) if joins(graph, &node) => {
            (node.op, node.args.iter().map(|&a| short(graph, dtype, a, origin)).collect())
        }
        _ => (Op::Cast(dtype), Args::from_slice(&[x])),
    };
    // Not folded, so that kernels see what they widen.
    graph.push(op, args, Type { dtype, ..node.ty }, origin)
}

/// Whether a node, where it is a reshape, joins axes: not where it only drops or adds some of
/// extent 1.
fn joins(graph: &Graph, node: &Node) -> bool {
    let long = |ty: &Type| ty.shape.iter().copied().filter(|&e| e != 1).collect::<Vec<_>>();
    let is_reshape = matches!(node.op, Op::Reshape(_));
    !is_reshape || long(graph.ty(node.args[0])).len() > long(&node.ty).len()
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::Tensor;
    use smallvec::smallvec;

    use super::*;
    use crate::Compiler;
    use crate::backend::cuda::Gpu;
    use crate::graph::eval::{Value, eval};
    use crate::graph::op::{BinaryFn, UnaryFn};
    use crate::graph::scalar::round_float;
    use crate::loops::text::print;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    /// Those that round.
    fn shorter() -> impl Iterator<Item = Precision> {
        Precision::ALL.into_iter().filter(|p| p.dtype().is_rounded())
    }

    fn rounded_to(dtype: DType, values: &[f32]) -> Vec<f32> {
        values.iter().map(|&v| round_float(dtype, v.into()) as f32).collect()
    }

    /// A layer of one product with weights, its input, and how to read both.
    struct Layer<'a> {
        x: &'a [usize],
        w: &'a [usize],
        make: &'a dyn Fn(&mut Graph, NodeId, NodeId) -> NodeId,
    }

    impl Layer<'_> {
        /// The layer with what is before and after it, and with these weights.
        fn graph(&self, w: &[f32], before: UnaryFn) -> Graph {
            let (mut graph, o) = (Graph::default(), "layer".into());
            let x = graph.input("x", Type::new(DType::F32, self.x));
            let x = graph.unary(before, x, &o).expect("numbers");
            let w = graph.tensor(&Tensor::from_slice(self.w, w), &o);
            let y = (self.make)(&mut graph, x, w);
            let y = graph.binary_number(BinaryFn::Max, y, -0.25, &o).expect("numbers");
            graph.outputs.push(("y".into(), y));
            graph
        }

        fn given(&self) -> (Vec<f32>, Vec<f32>) {
            (numbers(self.x.iter().product(), 5), numbers(self.w.iter().product(), 9))
        }
    }

    fn matmul(graph: &mut Graph, x: NodeId, w: NodeId) -> NodeId {
        let rank = graph.ty(x).rank();
        let w = graph.with_rank(w, rank, &"layer".into()).expect("a matrix");
        graph.matmul(x, w, &"layer".into()).expect("fits")
    }

    /// A convolution whose channels come last.
    fn conv(
        groups: usize,
        step: usize,
        border: usize,
    ) -> impl Fn(&mut Graph, NodeId, NodeId) -> NodeId {
        move |graph, x, w| {
            let o: Origin = "layer".into();
            let x = graph.permute(x, &[0, 3, 1, 2], &o).expect("four axes");
            let zero = graph.scalar(DType::F32, 0, 0.0, &o);
            let borders = smallvec![(0, 0), (0, 0), (border, border), (border, border)];
            let x = graph.add(Op::Pad(borders), &[x, zero], &o).expect("four axes");
            let steps = (&[step; 2][..], &[1; 2][..]);
            let y = graph.conv([x, w], steps, groups, &o).expect("the weight fits");
            graph.permute(y, &[0, 2, 3, 1], &o).expect("four axes")
        }
    }

    /// The graph of a layer says what a layer of rounded numbers does, and so do its kernels, which
    /// sum pairs where the machine does: `pairs` says whether that is worth it.
    fn check(layer: &Layer, pairs: bool) {
        shorter().for_each(|precision| check_in(layer, precision, pairs));
    }

    fn check_in(layer: &Layer, precision: Precision, pairs: bool) {
        let (x, w) = layer.given();
        let short = |values: &[f32]| rounded_to(precision.dtype(), values);
        // Products of bf16 have bits to spare in f32, so that sums of few are nearly exact.
        let near = if precision == Precision::Bf16 { 2e-6 } else { 1e-5 };
        let given = |x: &[f32]| [Value::from_tensor(&Tensor::from_slice(layer.x, x))];
        let graph = rounded(layer.graph(&w, UnaryFn::Neg), precision, false);
        let expected = eval(&graph, &given(&x));
        let alike = layer.graph(&short(&w), UnaryFn::Neg);
        assert!(eval(&alike, &given(&short(&x))) == expected, "{:?}", layer.x);
        assert!(eval(&alike, &given(&x)) != expected, "{:?}: no number was rounded", layer.x);
        for (wide, egraph) in [(false, true), (true, false), (true, true)] {
            let compiler = Compiler::new().precision(precision).wide(wide).egraph(egraph);
            let kernels = compiler.optimise(&graph).unwrap_or_else(|e| panic!("{e}"));
            let program = compiler.lower(&kernels).unwrap_or_else(|e| panic!("{e}"));
            let text: String = program.kernels.iter().map(print).collect();
            let wanted = compiler.cpu().wanted_dots().rounded;
            let dots = pairs && wanted == Some(precision.dtype());
            assert!(text.contains("dot2bf16(") == dots || !egraph, "{:?}\n{text}", layer.x);
            let inputs = given(&x);
            crate::tests::check_loops(&kernels, &program, &inputs, (&expected, near));
            let executable = compiler.build(&kernels).unwrap_or_else(|e| panic!("{e}"));
            let x = Tensor::from_slice(layer.x, &x);
            let y = executable.run(&[("x", x.view())]).unwrap_or_else(|e| panic!("{e}"));
            let got = Value::from_tensor(&y[0].1).as_f64s();
            for (a, b) in got.iter().zip(expected[0].as_f64s()) {
                let close = (a - b).abs() <= near * (1.0 + b.abs());
                assert!(close, "{:?}, wide {wide}: {a} instead of {b}\n{text}", layer.x);
            }
        }
    }

    #[test]
    fn products_of_rounded_numbers() {
        for [m, k, n] in [[1, 70, 96], [5, 34, 37], [23, 64, 16], [3, 8, 50], [14, 128, 33]] {
            check(&Layer { x: &[m, k], w: &[k, n], make: &matmul }, true);
        }
        check(&Layer { x: &[3, 5, 12], w: &[12, 40], make: &matmul }, true);
        check(&Layer { x: &[2, 3, 130, 32], w: &[32, 48], make: &matmul }, true);
        // Columns of x are in lanes.
        let turned = |graph: &mut Graph, x: NodeId, w: NodeId| matmul(graph, w, x);
        check(&Layer { x: &[32, 20], w: &[32, 32], make: &turned }, false);
    }

    #[test]
    fn convolutions_of_rounded_numbers() {
        check(&Layer { x: &[2, 9, 11, 64], w: &[72, 64, 1, 1], make: &conv(1, 1, 0) }, true);
        check(&Layer { x: &[1, 9, 9, 32], w: &[19, 32, 3, 3], make: &conv(1, 2, 1) }, true);
        check(&Layer { x: &[1, 7, 7, 10], w: &[32, 10, 3, 3], make: &conv(1, 1, 1) }, true);
        check(&Layer { x: &[2, 12, 13, 64], w: &[64, 32, 3, 3], make: &conv(2, 1, 1) }, true);
    }

    #[test]
    fn what_gains_nothing_is_left_as_it_is() {
        let depthwise = conv(32, 1, 1);
        let window = conv(1, 1, 1);
        let both = |graph: &mut Graph, x: NodeId, _: NodeId| matmul(graph, x, x);
        for (layer, exact) in [
            (Layer { x: &[1, 9, 9, 32], w: &[32, 1, 3, 3], make: &depthwise }, false),
            (Layer { x: &[4, 32], w: &[32, 10], make: &matmul }, false),
            (Layer { x: &[4, 33], w: &[33, 64], make: &matmul }, false),
            (Layer { x: &[32, 32], w: &[4], make: &both }, false),
            (Layer { x: &[1, 14, 14, 32], w: &[32, 32, 3, 3], make: &window }, true),
        ] {
            let graph = layer.graph(&layer.given().1, UnaryFn::Neg);
            for precision in shorter() {
                let casts = |exact| {
                    let graph = rounded(graph.clone(), precision, exact);
                    graph.nodes.iter().filter(|n| n.op == Op::Cast(precision.dtype())).count()
                };
                assert_eq!((casts(false), casts(true) > 0), (0, exact), "{:?}", layer.w);
            }
            let same = rounded(graph.clone(), Precision::F32, true);
            assert_eq!(same.describe(), graph.describe());
        }
    }

    #[test]
    fn warps_of_a_gpu_multiply_what_is_rounded() {
        let layer = Layer { x: &[32, 64], w: &[64, 32], make: &matmul };
        let graph = layer.graph(&layer.given().1, UnaryFn::Neg);
        let gpu = Gpu::known().first().and_then(|&sm| Gpu::of(sm)).expect("a GPU");
        for (precision, product) in [
            (Precision::F32, None),
            (Precision::Bf16, Some("m16n8k16.row.col.f32.bf16.bf16")),
            (Precision::F16, Some("m16n8k16.row.col.f32.f16.f16")),
            (Precision::Tf32, Some("m16n8k8.row.col.f32.tf32.tf32")),
        ] {
            let compiler = Compiler::new().precision(precision);
            let text =
                compiler.cuda_of(&compiler.rounded(graph.clone()), gpu).expect("PTX").module.text;
            let found = product.is_none_or(|product| text.contains(product));
            assert!(
                found && text.contains("mma.sync") == product.is_some(),
                "{precision:?}\n{text}"
            );
        }
    }
}
