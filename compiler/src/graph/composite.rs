//! What the named functions mean: their definitions in simpler operations.

use super::build::Added;
use super::op::{BinaryFn, Composite, ReduceFn, UnaryFn};
use super::{Graph, NodeId, Origin};

/// Adds the definition of a named function of x.
pub fn define(graph: &mut Graph, f: Composite, x: NodeId, origin: &Origin) -> Added {
    match f {
        Composite::Sigmoid => {
            let minus = graph.unary(UnaryFn::Neg, x, origin)?;
            let exp = graph.unary(UnaryFn::Exp, minus, origin)?;
            let sum = graph.binary_number(BinaryFn::Add, exp, 1.0, origin)?;
            graph.unary(UnaryFn::Recip, sum, origin)
        }
        Composite::Silu => {
            let sigmoid = define(graph, Composite::Sigmoid, x, origin)?;
            graph.binary(BinaryFn::Mul, x, sigmoid, origin)
        }
        Composite::Gelu => {
            let scaled =
                graph.binary_number(BinaryFn::Mul, x, std::f64::consts::FRAC_1_SQRT_2, origin)?;
            let erf = graph.unary(UnaryFn::Erf, scaled, origin)?;
            let sum = graph.binary_number(BinaryFn::Add, erf, 1.0, origin)?;
            let half = graph.binary_number(BinaryFn::Mul, x, 0.5, origin)?;
            graph.binary(BinaryFn::Mul, half, sum, origin)
        }
        Composite::Softmax(axis) => {
            let axes = [axis as usize];
            let max = graph.reduce(ReduceFn::Max, x, &axes, origin)?;
            let shifted = graph.binary(BinaryFn::Sub, x, max, origin)?;
            let exp = graph.unary(UnaryFn::Exp, shifted, origin)?;
            let sum = graph.reduce(ReduceFn::Sum, exp, &axes, origin)?;
            let recip = graph.unary(UnaryFn::Recip, sum, origin)?;
            graph.binary(BinaryFn::Mul, exp, recip, origin)
        }
        Composite::LayerNorm(axis, epsilon) => {
            let axes: Vec<usize> = (axis as usize..graph.ty(x).rank()).collect();
            let mean = graph.mean(x, &axes, origin)?;
            let centred = graph.binary(BinaryFn::Sub, x, mean, origin)?;
            rms_norm(graph, centred, &axes, epsilon, origin)
        }
        Composite::RmsNorm(axis, epsilon) => {
            let axes: Vec<usize> = (axis as usize..graph.ty(x).rank()).collect();
            rms_norm(graph, x, &axes, epsilon, origin)
        }
    }
}

/// x / sqrt(mean of x^2 + epsilon)
fn rms_norm(graph: &mut Graph, x: NodeId, axes: &[usize], epsilon: u32, origin: &Origin) -> Added {
    let square = graph.binary(BinaryFn::Mul, x, x, origin)?;
    let mean = graph.mean(square, axes, origin)?;
    let epsilon = f32::from_bits(epsilon) as f64;
    let sum = graph.binary_number(BinaryFn::Add, mean, epsilon, origin)?;
    let root = graph.unary(UnaryFn::Sqrt, sum, origin)?;
    let recip = graph.unary(UnaryFn::Recip, root, origin)?;
    graph.binary(BinaryFn::Mul, x, recip, origin)
}
