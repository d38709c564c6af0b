//! Quantised operators, exact in integers between a quantisation and the next.

use kiln_runtime::tensor::{DType, Small};

use super::call::{Call, Outputs, not_supported, one};
use super::contraction::{conv_of, matmul_of};
use super::small::{Manner, converted, numbers};
use super::tensor::dtype_of;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, ReduceFn, Shape, UnaryFn};

/// A scale or zero point so that it repeats over `shape`: one number, one per extent of an axis,
/// or one per block of an axis.
fn aligned(call: &mut Call, v: NodeId, shape: &[usize], axis: i64, block: i64) -> Added {
    let of = call.shape(v);
    if call.ty(v).numel() == 1 {
        return call.graph.reshape(v, &Shape::from_elem(1, shape.len()), &call.origin);
    }
    let axis = call.axis(axis, shape.len())?;
    if of.len() == 1 {
        let mut to = Shape::from_elem(1, shape.len());
        to[axis] = of[0];
        return call.graph.reshape(v, &to, &call.origin);
    }
    let block = usize::try_from(block).unwrap_or(0);
    let fits = of.len() == shape.len()
        && block > 0
        && of[axis].checked_mul(block).is_some_and(|n| n >= shape[axis]);
    if !fits {
        return Err(not_supported(format!("scales {of:?} of {shape:?} in blocks of {block}")));
    }
    let (mut apart, mut spread, mut joined) = (of.clone(), of.clone(), of.clone());
    apart.insert(axis + 1, 1);
    spread.insert(axis + 1, block);
    joined[axis] = of[axis] * block;
    let (g, o) = (&mut *call.graph, &call.origin);
    let y = g.reshape(v, &apart, o)?;
    let y = g.expand(y, &spread, o)?;
    let y = g.reshape(y, &joined, o)?;
    call.cut(y, axis, (0, 1, shape[axis]))
}

/// round(x / scale) + zero point, saturated.
fn quantised(
    call: &mut Call,
    x: NodeId,
    scale: NodeId,
    zero: Option<NodeId>,
    dtype: DType,
) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let work = g.ty(x).dtype;
    let scale = g.cast(scale, work, o)?;
    let y = g.binary(BinaryFn::Div, x, scale, o)?;
    let mut y = g.unary(UnaryFn::Round, y, o)?;
    if let Some(zero) = zero {
        let zero = g.cast(zero, work, o)?;
        y = g.binary(BinaryFn::Add, y, zero, o)?;
    }
    g.cast(y, dtype, o)
}

/// x / scale + zero point as codes: those of integers are saturated, those of fractions are rounded
/// as they are.
fn quantised_small(
    call: &mut Call,
    x: NodeId,
    scale: NodeId,
    zero: Option<NodeId>,
    (small, manner): (Small, Manner),
) -> Added {
    let work = call.ty(x).dtype;
    let scale = call.graph.cast(scale, work, &call.origin)?;
    let mut y = call.graph.binary(BinaryFn::Div, x, scale, &call.origin)?;
    if small.int_range().is_some() {
        y = call.graph.unary(UnaryFn::Round, y, &call.origin)?;
    }
    if let Some(zero) = zero {
        let zero = numbers(call, zero)?;
        let zero = call.graph.cast(zero, work, &call.origin)?;
        y = call.graph.binary(BinaryFn::Add, y, zero, &call.origin)?;
    }
    converted(call, y, DType::Small(small), manner)
}

fn named_dtype(call: &Call, name: &str) -> Result<Option<DType>, Diagnostic> {
    match call.int(name) {
        None | Some(0) => Ok(None),
        Some(number) => dtype_of(i32::try_from(number).unwrap_or(0)).map(Some),
    }
}

pub(super) fn quantize(call: &mut Call) -> Outputs {
    let manner = Manner::of(call, true)?;
    let (axis, block) = (call.int_or("axis", 1), call.int_or("block_size", 0));
    let named = named_dtype(call, "output_dtype")?;
    let precision = named_dtype(call, "precision")?;
    let (mut x, mut scale) = (call.input(0)?, call.input(1)?);
    let mut zero = call.optional(2);
    let shape = call.shape(x);
    let dtype = match zero {
        Some(zero) => call.ty(zero).dtype,
        None => named.unwrap_or(DType::U8),
    };
    let work = precision.unwrap_or(DType::F32);
    x = call.graph.cast(x, work, &call.origin)?;
    scale = aligned(call, scale, &shape, axis, block)?;
    if let Some(z) = zero {
        zero = Some(aligned(call, z, &shape, axis, block)?);
    }
    one(match dtype {
        DType::Small(small) => quantised_small(call, x, scale, zero, (small, manner))?,
        _ => quantised(call, x, scale, zero, dtype)?,
    })
}

/// x - zero point, in i32.
fn centred(call: &mut Call, x: NodeId, zero: Option<NodeId>) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let x = g.cast(x, DType::I32, o)?;
    match zero {
        None => Ok(x),
        Some(zero) => {
            let zero = g.cast(zero, DType::I32, o)?;
            g.binary(BinaryFn::Sub, x, zero, o)
        }
    }
}

pub(super) fn dequantize(call: &mut Call) -> Outputs {
    let (axis, block) = (call.int_or("axis", 1), call.int_or("block_size", 0));
    let named = named_dtype(call, "output_dtype")?;
    let (x, scale) = (call.input(0)?, call.input(1)?);
    let shape = call.shape(x);
    let dtype = named.unwrap_or(call.ty(scale).dtype);
    let scale = aligned(call, scale, &shape, axis, block)?;
    let zero = match call.optional(2) {
        Some(zero) => Some(aligned(call, zero, &shape, axis, block)?),
        None => None,
    };
    let x = numbers(call, x)?;
    let zero = zero.map(|zero| numbers(call, zero)).transpose()?;
    let whole = match (call.ty(x).dtype.is_float(), zero) {
        (false, zero) => centred(call, x, zero)?,
        (true, Some(zero)) => call.graph.binary(BinaryFn::Sub, x, zero, &call.origin)?,
        (true, None) => x,
    };
    let (g, o) = (&mut *call.graph, &call.origin);
    let whole = g.cast(whole, DType::F32, o)?;
    let scale = g.cast(scale, DType::F32, o)?;
    let y = g.binary(BinaryFn::Mul, whole, scale, o)?;
    one(g.cast(y, dtype, o)?)
}

/// Quantises to u8 by the range of the operand, which contains 0.
pub(super) fn dynamic_quantize(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let rank = call.ty(x).rank();
    let axes: Vec<usize> = (0..rank).collect();
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut ends = Vec::new();
    for (fold, f) in [(ReduceFn::Min, BinaryFn::Min), (ReduceFn::Max, BinaryFn::Max)] {
        let end = g.reduce(fold, x, &axes, o)?;
        ends.push(g.binary_number(f, end, 0.0, o)?);
    }
    let range = g.binary(BinaryFn::Sub, ends[1], ends[0], o)?;
    let scale = g.binary_number(BinaryFn::Div, range, 255.0, o)?;
    let low = g.unary(UnaryFn::Neg, ends[0], o)?;
    let zero = quantised(call, low, scale, None, DType::U8)?;
    let y = quantised(call, x, scale, Some(zero), DType::U8)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let (scale, zero) = (g.reshape(scale, &[], o)?, g.reshape(zero, &[], o)?);
    Ok(vec![Some(y), Some(scale), Some(zero)])
}

/// A value per row or column of a matrix, or one number.
fn per(call: &mut Call, v: NodeId, rank: usize, axis: usize) -> Added {
    let n = call.ty(v).numel();
    if call.ty(v).rank() > 1 {
        return Ok(v);
    }
    let mut shape = Shape::from_elem(1, rank);
    match shape.get_mut(axis) {
        Some(extent) => *extent = n,
        None => return Err(not_supported(format!("axis {axis} of a product of rank {rank}"))),
    }
    call.graph.reshape(v, &shape, &call.origin)
}

/// Operand i without its zero point; a list of zero points is one per extent of an axis.
fn whole(call: &mut Call, i: usize, zero: usize, from_end: usize) -> Added {
    let x = call.input(i)?;
    let rank = call.ty(x).rank();
    let zero = match call.optional(zero) {
        Some(zero) if rank >= from_end => Some(per(call, zero, rank, rank - from_end)?),
        other => other,
    };
    centred(call, x, zero)
}

pub(super) fn matmul_integer(call: &mut Call) -> Outputs {
    let (x, y) = (whole(call, 0, 2, 2)?, whole(call, 1, 3, 1)?);
    one(matmul_of(call, x, y)?)
}

pub(super) fn conv_integer(call: &mut Call) -> Outputs {
    let rank = call.ty(call.input(1)?).rank();
    let (x, weight) = (whole(call, 0, 2, rank)?, whole(call, 1, 3, rank)?);
    one(conv_of(call, x, weight, None)?)
}

/// The result of integers, scaled by `x * weight / y` and quantised.
fn rescaled(call: &mut Call, sum: NodeId, scales: [NodeId; 3], zero: NodeId) -> Outputs {
    let dtype = call.ty(zero).dtype;
    let (g, o) = (&mut *call.graph, &call.origin);
    let y = g.cast(sum, DType::F32, o)?;
    let [x_scale, w_scale, y_scale] = scales;
    let (x_scale, w_scale) = (g.cast(x_scale, DType::F32, o)?, g.cast(w_scale, DType::F32, o)?);
    let scale = g.binary(BinaryFn::Mul, x_scale, w_scale, o)?;
    let y = g.binary(BinaryFn::Mul, y, scale, o)?;
    one(quantised(call, y, y_scale, Some(zero), dtype)?)
}

pub(super) fn qlinear_matmul(call: &mut Call) -> Outputs {
    let (x, y) = (whole(call, 0, 2, 2)?, whole(call, 3, 5, 1)?);
    let sum = matmul_of(call, x, y)?;
    let rank = call.ty(sum).rank().max(2);
    let (a, b) = (call.input(1)?, call.input(4)?);
    let scales = [per(call, a, rank, rank - 2)?, per(call, b, rank, rank - 1)?, call.input(6)?];
    let zero = call.input(7)?;
    rescaled(call, sum, scales, zero)
}

pub(super) fn qlinear_conv(call: &mut Call) -> Outputs {
    let rank = call.ty(call.input(3)?).rank();
    let (x, weight) = (whole(call, 0, 2, rank)?, whole(call, 3, 5, rank)?);
    let bias = call.optional(8);
    let sum = conv_of(call, x, weight, bias)?;
    let scale = call.input(4)?;
    let scales = [call.input(1)?, per(call, scale, rank, 1)?, call.input(6)?];
    let zero = call.input(7)?;
    rescaled(call, sum, scales, zero)
}
