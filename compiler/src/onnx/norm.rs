//! Normalisations.

use kiln_runtime::tensor::DType;

use super::call::{Call, Outputs, not_supported, one};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Shape, UnaryFn};

/// A value per channel, shaped to repeat over `[n, c, ..]`.
fn per_channel(call: &mut Call, v: NodeId, rank: usize) -> Added {
    let n = call.ty(v).numel();
    let mut shape = Shape::from_elem(1, rank.max(2));
    shape[1] = n;
    call.graph.reshape(v, &shape, &call.origin)
}

/// 1 / sqrt(x + epsilon)
fn inverse_root(call: &mut Call, x: NodeId, epsilon: f64) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let sum = g.binary_number(BinaryFn::Add, x, epsilon, o)?;
    let root = g.unary(UnaryFn::Sqrt, sum, o)?;
    g.unary(UnaryFn::Recip, root, o)
}

/// x * s + b with s = scale / sqrt(variance + epsilon), b = bias - mean * s.
pub(super) fn batch_norm(call: &mut Call) -> Outputs {
    for name in ["spatial", "is_test", "consumed_inputs"] {
        call.ignore(name);
    }
    let momentum = f64::from(call.float_or("momentum", 0.9));
    let training = call.int_or("training_mode", 0) != 0;
    let epsilon = f64::from(call.float_or("epsilon", 1e-5));
    let x = call.input(0)?;
    let ty = call.ty(x);
    let mut values = Vec::new();
    for i in 1..5 {
        let v = call.input(i)?;
        let v = call.graph.cast(v, ty.dtype, &call.origin)?;
        values.push(per_channel(call, v, ty.rank())?);
    }
    let [scale, bias, mut mean, mut variance] = values[..] else {
        return Err(not_supported("batch normalisation without its four values"));
    };
    let mut outputs = Vec::new();
    if training {
        // Those of the batch are taken, and the running ones move towards them.
        let own = moments(call, x)?;
        for (running, own) in [(mean, own[0]), (variance, own[1])] {
            let (g, o) = (&mut *call.graph, &call.origin);
            let kept = g.binary_number(BinaryFn::Mul, running, momentum, o)?;
            let new = g.binary_number(BinaryFn::Mul, own, 1.0 - momentum, o)?;
            let sum = g.binary(BinaryFn::Add, kept, new, o)?;
            let channels = g.ty(sum).numel();
            outputs.push(Some(g.reshape(sum, &[channels], o)?));
        }
        [mean, variance] = own;
    }
    let inverse = inverse_root(call, variance, epsilon)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let s = g.binary(BinaryFn::Mul, scale, inverse, o)?;
    let shift = g.binary(BinaryFn::Mul, mean, s, o)?;
    let b = g.binary(BinaryFn::Sub, bias, shift, o)?;
    let y = g.binary(BinaryFn::Mul, x, s, o)?;
    outputs.insert(0, Some(g.binary(BinaryFn::Add, y, b, o)?));
    Ok(outputs)
}

/// Mean and variance of each channel of `[n, c, ..]`.
fn moments(call: &mut Call, x: NodeId) -> Result<[NodeId; 2], Diagnostic> {
    let axes: Vec<usize> = (0..call.ty(x).rank()).filter(|&axis| axis != 1).collect();
    let (g, o) = (&mut *call.graph, &call.origin);
    let mean = g.mean(x, &axes, o)?;
    let apart = g.binary(BinaryFn::Sub, x, mean, o)?;
    let square = g.binary(BinaryFn::Mul, apart, apart, o)?;
    Ok([mean, g.mean(square, &axes, o)?])
}

/// Norms of halves are computed in f32, as ONNX asks (`stash_type` 1).
pub(super) fn stashed(call: &mut Call, x: NodeId) -> Added {
    call.ignore("stash_type");
    match call.ty(x).dtype {
        DType::F16 | DType::BF16 => call.graph.cast(x, DType::F32, &call.origin),
        _ => Ok(x),
    }
}

pub(super) fn layer_norm(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let axis = call.axis(call.int_or("axis", -1), ty.rank())?;
    let epsilon = call.float_or("epsilon", 1e-5);
    let wide = stashed(call, x)?;
    let f = Composite::LayerNorm(axis as u8, epsilon.to_bits());
    let mut y = call.graph.composite(f, wide, &call.origin)?;
    y = call.graph.cast(y, ty.dtype, &call.origin)?;
    let scale = call.input(1)?;
    y = call.graph.binary(BinaryFn::Mul, y, scale, &call.origin)?;
    if let Some(bias) = call.optional(2) {
        y = call.graph.binary(BinaryFn::Add, y, bias, &call.origin)?;
    }
    let mut outputs = vec![Some(y)];
    if call.n_outputs() > 1 {
        let axes: Vec<usize> = (axis..ty.rank()).collect();
        let mean = call.graph.mean(wide, &axes, &call.origin)?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let centred = g.binary(BinaryFn::Sub, wide, mean, o)?;
        let square = g.binary(BinaryFn::Mul, centred, centred, o)?;
        let variance = g.mean(square, &axes, o)?;
        let inverse = inverse_root(call, variance, f64::from(epsilon))?;
        outputs.extend([Some(mean), Some(inverse)]);
    }
    Ok(outputs)
}

pub(super) fn rms_norm(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let axis = call.axis(call.int_or("axis", -1), ty.rank())?;
    let epsilon = call.float_or("epsilon", 1e-5);
    let wide = stashed(call, x)?;
    let f = Composite::RmsNorm(axis as u8, epsilon.to_bits());
    let y = call.graph.composite(f, wide, &call.origin)?;
    let y = call.graph.cast(y, ty.dtype, &call.origin)?;
    let scale = call.input(1)?;
    one(call.graph.binary(BinaryFn::Mul, y, scale, &call.origin)?)
}

/// Normalises groups of channels and all their pixels.
fn normalise_groups(call: &mut Call, x: NodeId, groups: usize, epsilon: f32) -> Added {
    let shape = call.shape(x);
    let count = shape.get(1).copied().unwrap_or(0);
    if shape.len() < 2 || groups == 0 || !count.is_multiple_of(groups) {
        return Err(not_supported(format!("{groups} groups of {count} channels")));
    }
    let inner = count / groups * shape[2..].iter().product::<usize>();
    let wide = stashed(call, x)?;
    let flat = call.graph.reshape(wide, &[shape[0], groups, inner], &call.origin)?;
    let f = Composite::LayerNorm(2, epsilon.to_bits());
    let y = call.graph.composite(f, flat, &call.origin)?;
    let y = call.graph.reshape(y, &shape, &call.origin)?;
    let dtype = call.ty(x).dtype;
    call.graph.cast(y, dtype, &call.origin)
}

fn scale_channels(call: &mut Call, y: NodeId) -> Outputs {
    let rank = call.ty(y).rank();
    let (scale, bias) = (call.input(1)?, call.input(2)?);
    let (scale, bias) = (per_channel(call, scale, rank)?, per_channel(call, bias, rank)?);
    let y = call.graph.binary(BinaryFn::Mul, y, scale, &call.origin)?;
    one(call.graph.binary(BinaryFn::Add, y, bias, &call.origin)?)
}

pub(super) fn instance_norm(call: &mut Call) -> Outputs {
    call.ignore("consumed_inputs");
    let epsilon = call.float_or("epsilon", 1e-5);
    let x = call.input(0)?;
    let channels = call.shape(x).get(1).copied().unwrap_or(0);
    let y = normalise_groups(call, x, channels, epsilon)?;
    scale_channels(call, y)
}

pub(super) fn group_norm(call: &mut Call) -> Outputs {
    let epsilon = call.float_or("epsilon", 1e-5);
    let groups = usize::try_from(call.int_or("num_groups", 1)).unwrap_or(0);
    let x = call.input(0)?;
    let y = normalise_groups(call, x, groups, epsilon)?;
    // Opset 18 scales by group.
    let (scale, channels) = (call.input(1)?, call.shape(x)[1]);
    if call.ty(scale).numel() != channels {
        return Err(not_supported(
            "scale and bias by group (opset 18); opset 21 has them by channel",
        ));
    }
    scale_channels(call, y)
}

/// x / (bias + alpha / size * sum of squares over neighbouring channels)^beta
pub(super) fn lrn(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let size = usize::try_from(call.int_or("size", 1)).unwrap_or(0);
    let alpha = f64::from(call.float_or("alpha", 1e-4));
    let (beta, bias) =
        (f64::from(call.float_or("beta", 0.75)), f64::from(call.float_or("bias", 1.0)));
    if size == 0 || ty.rank() < 2 {
        return Err(not_supported(format!("{size} channels of {:?}", ty.shape)));
    }
    let rank = ty.rank();
    let zero = call.number(ty.dtype, 0, 0.0);
    let (g, o) = (&mut *call.graph, &call.origin);
    let square = g.binary(BinaryFn::Mul, x, x, o)?;
    let mut borders = smallvec::SmallVec::from_elem((0, 0), rank);
    borders[1] = ((size - 1) / 2, size / 2);
    let padded = g.add(Op::Pad(borders), &[square, zero], o)?;
    // Windows slide along trailing axes, so the channels go last.
    let order: Vec<usize> = (0..rank).filter(|&d| d != 1).chain([1]).collect();
    let moved = g.permute(padded, &order, o)?;
    let windows = g.add(Op::Window([(size, 1, 1)].into_iter().collect()), &[moved], o)?;
    let sums = g.reduce(ReduceFn::Sum, windows, &[rank], o)?;
    let kept: Vec<usize> = g.ty(sums).shape[..rank].to_vec();
    let sums = g.reshape(sums, &kept, o)?;
    let back: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    let sums = g.permute(sums, &back, o)?;
    let scaled = g.binary_number(BinaryFn::Mul, sums, alpha / size as f64, o)?;
    let base = g.binary_number(BinaryFn::Add, scaled, bias, o)?;
    // base^-beta as e^(-beta ln base): base is positive, and both run in lanes.
    let log = g.unary(UnaryFn::Log, base, o)?;
    let exponent = g.binary_number(BinaryFn::Mul, log, -beta, o)?;
    let power = g.unary(UnaryFn::Exp, exponent, o)?;
    one(g.binary(BinaryFn::Mul, x, power, o)?)
}

pub(super) fn mean_variance_norm(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let rank = call.ty(x).rank();
    let axes = call.ints("axes").unwrap_or_else(|| vec![0, 2, 3]);
    let axes = call.axes(&axes, rank)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let mean = g.mean(x, &axes, o)?;
    let centred = g.binary(BinaryFn::Sub, x, mean, o)?;
    let square = g.binary(BinaryFn::Mul, centred, centred, o)?;
    let variance = g.mean(square, &axes, o)?;
    let root = g.unary(UnaryFn::Sqrt, variance, o)?;
    let root = g.binary_number(BinaryFn::Add, root, 1e-9, o)?;
    one(g.binary(BinaryFn::Div, centred, root, o)?)
}

pub(super) fn lp_norm(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let rank = call.ty(x).rank();
    let axis = call.axis(call.int_or("axis", -1), rank)?;
    let p = call.int_or("p", 2);
    let (g, o) = (&mut *call.graph, &call.origin);
    let norm = match p {
        1 => {
            let magnitude = g.unary(UnaryFn::Abs, x, o)?;
            g.reduce(ReduceFn::Sum, magnitude, &[axis], o)?
        }
        2 => {
            let square = g.binary(BinaryFn::Mul, x, x, o)?;
            let sum = g.reduce(ReduceFn::Sum, square, &[axis], o)?;
            g.unary(UnaryFn::Sqrt, sum, o)?
        }
        other => return Err(not_supported(format!("the norm of order {other}"))),
    };
    // A vector of zeros stays zero.
    let zero = g.binary_number(BinaryFn::Eq, norm, 0.0, o)?;
    let ty = g.ty(norm).clone();
    let unit = g.scalar(ty.dtype, ty.rank(), 1.0, o);
    let safe = g.select(zero, unit, norm, o)?;
    one(g.binary(BinaryFn::Div, x, safe, o)?)
}
