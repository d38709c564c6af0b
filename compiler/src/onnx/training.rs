//! One step of an optimiser, which a model may do as any other arithmetic.

use kiln_runtime::tensor::DType;

use super::call::{Call, Outputs, not_supported};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, UnaryFn};

/// Rate and count of steps, and for each tensor that is optimised, its value and what goes with it.
struct Step {
    rate: NodeId,
    count: NodeId,
    tensors: Vec<Vec<NodeId>>,
}

/// The operands: all tensors, then as many of each of the `kinds` that go with them.
fn step(call: &Call, kinds: usize) -> Result<Step, Diagnostic> {
    let given = call.n_inputs().saturating_sub(2);
    if given == 0 || !given.is_multiple_of(kinds) {
        return Err(not_supported(format!("{given} operands, {kinds} for each tensor")));
    }
    let (rate, count) = (call.input(0)?, call.input(1)?);
    for scalar in [rate, count] {
        if call.ty(scalar).numel() != 1 {
            let shape = call.shape(scalar);
            return Err(not_supported(format!("a rate or a count of shape {shape:?}")));
        }
    }
    let many = given / kinds;
    let tensor = |i| (0..kinds).map(|k| call.input(2 + k * many + i)).collect();
    let tensors: Vec<Vec<NodeId>> = (0..many).map(tensor).collect::<Result<_, _>>()?;
    for of_one in &tensors {
        let ty = call.ty(of_one[0]);
        let other = of_one.iter().find(|&&t| call.ty(t) != ty);
        if let Some(&other) = other {
            let (x, y) = (ty.shape, call.shape(other));
            return Err(not_supported(format!("a tensor {x:?} that goes with one of {y:?}")));
        }
    }
    Ok(Step { rate, count, tensors })
}

/// Results of all tensors, each kind together.
fn results(of_each: Vec<Vec<NodeId>>) -> Outputs {
    let kinds = of_each.first().map_or(0, Vec::len);
    Ok((0..kinds).flat_map(|k| of_each.iter().map(move |results| Some(results[k]))).collect())
}

/// x * a
fn times(call: &mut Call, x: NodeId, a: f64) -> Added {
    call.graph.binary_number(BinaryFn::Mul, x, a, &call.origin)
}

/// x * a + y * b
fn mixed(call: &mut Call, (x, a): (NodeId, f64), (y, b): (NodeId, f64)) -> Added {
    let (x, y) = (times(call, x, a)?, times(call, y, b)?);
    call.graph.binary(BinaryFn::Add, x, y, &call.origin)
}

/// A number of the operands as one of a dtype that repeats over all elements.
fn scalar(call: &mut Call, x: NodeId, dtype: DType) -> Added {
    let x = call.graph.reshape(x, &[], &call.origin)?;
    call.graph.cast(x, dtype, &call.origin)
}

/// x - rate * direction
fn moved(call: &mut Call, x: NodeId, rate: NodeId, direction: NodeId) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let step = g.binary(BinaryFn::Mul, direction, rate, o)?;
    g.binary(BinaryFn::Sub, x, step, o)
}

/// x / (sqrt(h) + epsilon)
fn scaled(call: &mut Call, x: NodeId, h: NodeId, epsilon: f64) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let root = g.unary(UnaryFn::Sqrt, h, o)?;
    let below = g.binary_number(BinaryFn::Add, root, epsilon, o)?;
    g.binary(BinaryFn::Div, x, below, o)
}

pub(super) fn adagrad(call: &mut Call) -> Outputs {
    let norm = f64::from(call.float_or("norm_coefficient", 0.0));
    let decay = f64::from(call.float_or("decay_factor", 0.0));
    let epsilon = f64::from(call.float_or("epsilon", 1e-6));
    let step = step(call, 3)?;
    let mut all = Vec::new();
    for tensor in step.tensors {
        let [x, gradient, squares] = tensor[..] else { continue };
        let dtype = call.ty(x).dtype;
        let (rate, count) = (scalar(call, step.rate, dtype)?, scalar(call, step.count, dtype)?);
        let slower = times(call, count, decay)?;
        let slower = call.graph.binary_number(BinaryFn::Add, slower, 1.0, &call.origin)?;
        let rate = call.graph.binary(BinaryFn::Div, rate, slower, &call.origin)?;
        let gradient = mixed(call, (x, norm), (gradient, 1.0))?;
        let square = call.graph.binary(BinaryFn::Mul, gradient, gradient, &call.origin)?;
        let squares = call.graph.binary(BinaryFn::Add, squares, square, &call.origin)?;
        let direction = scaled(call, gradient, squares, epsilon)?;
        all.push(vec![moved(call, x, rate, direction)?, squares]);
    }
    results(all)
}

/// 1 - base^count
fn unbiased(call: &mut Call, base: f64, count: NodeId) -> Added {
    let base = call.number(call.ty(count).dtype, 0, base);
    let one = call.number(call.ty(count).dtype, 0, 1.0);
    let power = call.graph.binary(BinaryFn::Pow, base, count, &call.origin)?;
    call.graph.binary(BinaryFn::Sub, one, power, &call.origin)
}

pub(super) fn adam(call: &mut Call) -> Outputs {
    let norm = f64::from(call.float_or("norm_coefficient", 0.0));
    let after = f64::from(call.float_or("norm_coefficient_post", 0.0));
    let (alpha, beta) = (call.float_or("alpha", 0.9), call.float_or("beta", 0.999));
    let (alpha, beta) = (f64::from(alpha), f64::from(beta));
    let epsilon = f64::from(call.float_or("epsilon", 1e-6));
    let step = step(call, 4)?;
    let mut all = Vec::new();
    for tensor in step.tensors {
        let [x, gradient, momentum, squares] = tensor[..] else { continue };
        let dtype = call.ty(x).dtype;
        let (rate, count) = (scalar(call, step.rate, dtype)?, scalar(call, step.count, dtype)?);
        let gradient = mixed(call, (x, norm), (gradient, 1.0))?;
        let momentum = mixed(call, (momentum, alpha), (gradient, 1.0 - alpha))?;
        let square = call.graph.binary(BinaryFn::Mul, gradient, gradient, &call.origin)?;
        let squares = mixed(call, (squares, beta), (square, 1.0 - beta))?;
        let (first, second) = (unbiased(call, alpha, count)?, unbiased(call, beta, count)?);
        let (g, o) = (&mut *call.graph, &call.origin);
        let root = g.unary(UnaryFn::Sqrt, second, o)?;
        let later = g.binary(BinaryFn::Mul, rate, root, o)?;
        let later = g.binary(BinaryFn::Div, later, first, o)?;
        let zero = g.scalar(dtype, 0, 0.0, o);
        let is_later = g.binary(BinaryFn::Lt, zero, count, o)?;
        let rate = g.select(is_later, later, rate, o)?;
        let direction = scaled(call, momentum, squares, epsilon)?;
        let x = moved(call, x, rate, direction)?;
        all.push(vec![times(call, x, 1.0 - after)?, momentum, squares]);
    }
    results(all)
}

pub(super) fn momentum(call: &mut Call) -> Outputs {
    let norm = f64::from(call.float_or("norm_coefficient", 0.0));
    let (alpha, beta) = (call.float_or("alpha", 0.0), call.float_or("beta", 0.0));
    let (alpha, beta) = (f64::from(alpha), f64::from(beta));
    let nesterov = match call.string_or("mode", "standard").as_str() {
        "standard" => false,
        "nesterov" => true,
        other => return Err(not_supported(format!("the mode {other:?}"))),
    };
    let step = step(call, 3)?;
    let mut all = Vec::new();
    for tensor in step.tensors {
        let [x, gradient, momentum] = tensor[..] else { continue };
        let dtype = call.ty(x).dtype;
        let (rate, count) = (scalar(call, step.rate, dtype)?, scalar(call, step.count, dtype)?);
        let gradient = mixed(call, (x, norm), (gradient, 1.0))?;
        let numbers = [0.0, beta, 1.0].map(|v| call.number(dtype, 0, v));
        let (g, o) = (&mut *call.graph, &call.origin);
        // The first step takes the whole gradient.
        let is_later = g.binary(BinaryFn::Lt, numbers[0], count, o)?;
        let part = g.select(is_later, numbers[1], numbers[2], o)?;
        let taken = g.binary(BinaryFn::Mul, gradient, part, o)?;
        let momentum = mixed(call, (momentum, alpha), (taken, 1.0))?;
        let direction = match nesterov {
            true => mixed(call, (gradient, 1.0), (momentum, alpha))?,
            false => momentum,
        };
        all.push(vec![moved(call, x, rate, direction)?, momentum]);
    }
    results(all)
}

#[cfg(test)]
mod tests {
    use super::super::control::tests::{graph, model, node, port};

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let refused = |op: &str, shapes: &[&[i64]]| {
            let names = ["r", "t", "x", "g", "h", "v", "w"];
            let ports: Vec<_> =
                shapes.iter().zip(names).map(|(shape, name)| port(name, shape, 1)).collect();
            let op = format!("ai.onnx.preview.training.{op}");
            let step = node(&op, &names[..shapes.len()], &["y"]);
            model(graph(&ports, &[step], &["y"]), false).expect_err("operands that do not fit")
        };
        let (one, x): (&[i64], &[i64]) = (&[], &[3]);
        for (op, shapes, what) in [
            ("Adagrad", vec![one, one], "0 operands, 3 for each tensor"),
            ("Adagrad", vec![one, one, x, x], "2 operands, 3 for each tensor"),
            ("Adam", vec![one, one, x, x, x], "3 operands, 4 for each tensor"),
            ("Momentum", vec![x, one, x, x, x], "a rate or a count of shape [3]"),
            ("Momentum", vec![one, one, x, &[4], x], "[3] that goes with one of [4]"),
        ] {
            let problem = refused(op, &shapes);
            assert!(problem.contains(what), "{op}: {problem}");
        }
    }
}
