//! Losses over classes.

use kiln_runtime::tensor::DType;

use super::call::{Call, Outputs, not_supported};
use super::reduce::log_softmax_of;
use super::shape::element_places;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Op, ReduceFn, UnaryFn};

/// Minus the logarithm of the probability `[n, c, d..]` of each label `[n, d..]`, weighted.
fn loss(call: &mut Call, log: NodeId) -> Added {
    let reduction = call.string_or("reduction", "mean");
    let ignored = call.int("ignore_index");
    let labels = call.input(1)?;
    let (ty, mut column) = (call.ty(log), call.shape(labels));
    if ty.rank() < 2 || column.is_empty() {
        return Err(not_supported(format!("classes {:?}, labels {column:?}", ty.shape)));
    }
    let weights = call.optional(2);
    let shape = column.clone();
    column.insert(1, 1);
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut label = g.cast(labels, DType::I64, o)?;
    let one = g.scalar(ty.dtype, shape.len(), 1.0, o);
    let mut weight = g.expand(one, &shape, o)?;
    let mut counted = None;
    if let Some(ignored) = ignored {
        let ignored = g.i64s(&[], &[ignored], o);
        let same = g.binary(BinaryFn::Eq, label, ignored, o)?;
        let zero = g.scalar(DType::I64, shape.len(), 0.0, o);
        label = g.select(same, zero, label, o)?;
        counted = Some(same);
    }
    if let Some(weights) = weights {
        weight = g.add(Op::Gather(0), &[weights, label], o)?;
    }
    if let Some(ignored) = counted {
        let zero = g.scalar(ty.dtype, shape.len(), 0.0, o);
        weight = g.select(ignored, zero, weight, o)?;
    }
    let index = g.reshape(label, &column, o)?;
    let place = element_places(call, log, index, 1)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let flat = g.reshape(log, &[ty.numel()], o)?;
    let picked = g.add(Op::Gather(0), &[flat, place], o)?;
    let picked = g.reshape(picked, &shape, o)?;
    let minus = g.unary(UnaryFn::Neg, picked, o)?;
    let each = g.binary(BinaryFn::Mul, minus, weight, o)?;
    let axes: Vec<usize> = (0..shape.len()).collect();
    let total = g.reduce(ReduceFn::Sum, each, &axes, o)?;
    let y = match reduction.as_str() {
        "none" => return Ok(each),
        "sum" => total,
        "mean" => {
            let weight = g.reduce(ReduceFn::Sum, weight, &axes, o)?;
            g.binary(BinaryFn::Div, total, weight, o)?
        }
        other => return Err(not_supported(format!("reduction {other}"))),
    };
    g.reshape(y, &[], o)
}

pub(super) fn negative_log_likelihood(call: &mut Call) -> Outputs {
    let log = call.input(0)?;
    Ok(vec![Some(loss(call, log)?)])
}

pub(super) fn softmax_cross_entropy(call: &mut Call) -> Outputs {
    let scores = call.input(0)?;
    if call.ty(scores).rank() < 2 {
        return Err(not_supported("scores without an axis of classes"));
    }
    let log = log_softmax_of(call, scores, 1)?;
    Ok(vec![Some(loss(call, log)?), Some(log)])
}
