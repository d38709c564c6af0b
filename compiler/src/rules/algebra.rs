//! Rules of arithmetic. Constants are met by their values, so they hold for numbers of any layout.

use egg::Id;
use kiln_runtime::tensor::DType;

use super::integers::cast_from;
use super::lang::{ENode, Egg};
use super::table::{add, find, shape};
use crate::graph::eval::Value;
use crate::graph::op::{BinaryFn, Op, Shape};

/// The number that all elements of a class are, where it is a small constant.
pub(super) fn number(egraph: &Egg, id: Id) -> Option<f64> {
    const FEW: usize = 4096;
    let index = find(egraph, id, |n| match n.op {
        Op::Const(i) => Some(i as usize),
        _ => None,
    })?;
    let constant = &egraph.analysis.constants[index];
    if constant.ty.numel() > FEW || !constant.ty.dtype.is_float() {
        return None;
    }
    let values = Value::from_constant(constant).as_f64s();
    let first = *values.first()?;
    values.iter().all(|v| v.to_bits() == first.to_bits()).then_some(first)
}

/// The operands of a function with one constant: the value, then the constant.
pub(super) fn with_constant(egraph: &Egg, node: &ENode, f: BinaryFn) -> Option<(Id, Id)> {
    if node.op != Op::Binary(f) {
        return None;
    }
    let constant = |k: usize| egraph[node.args[k]].data.constant;
    match (constant(0), constant(1)) {
        (false, true) => Some((node.args[0], node.args[1])),
        // Only these may be turned round.
        (true, false) if is_commutative(f) => Some((node.args[1], node.args[0])),
        _ => None,
    }
}

fn is_commutative(f: BinaryFn) -> bool {
    matches!(f, BinaryFn::Add | BinaryFn::Mul | BinaryFn::Max | BinaryFn::Min)
}

/// Whether the constant repeats over the value, and not the value over the constant.
fn keeps_shape(egraph: &Egg, x: Id, constant: Id) -> bool {
    let (x, c) = (shape(egraph, x), shape(egraph, constant));
    x.iter().zip(&c).all(|(&x, &c)| c == x || c == 1)
}

pub(super) fn neutral_number(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    // Not 0 + x, which is 0 where x is -0.
    let neutral = [(BinaryFn::Mul, 1.0f64), (BinaryFn::Div, 1.0), (BinaryFn::Sub, 0.0)];
    neutral.into_iter().find_map(|(f, value)| {
        let (x, c) = with_constant(egraph, node, f)?;
        let same = number(egraph, c)?.to_bits() == value.to_bits() && keeps_shape(egraph, x, c);
        same.then_some(x)
    })
}

pub(super) fn add_zero(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let (x, c) = with_constant(egraph, node, BinaryFn::Add)?;
    (number(egraph, c)? == 0.0 && keeps_shape(egraph, x, c)).then_some(x)
}

pub(super) fn small_power(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let (x, c) = with_constant(egraph, node, BinaryFn::Pow)?;
    let times = [2.0, 3.0, 4.0].iter().position(|&p| number(egraph, c) == Some(p))?;
    if !keeps_shape(egraph, x, c) {
        return None;
    }
    let square = add(egraph, Op::Binary(BinaryFn::Mul), &[x, x]);
    Some(match times {
        0 => square,
        1 => add(egraph, Op::Binary(BinaryFn::Mul), &[square, x]),
        _ => add(egraph, Op::Binary(BinaryFn::Mul), &[square, square]),
    })
}

/// Whether a class is a constant of the model. Rules that make constants take only such ones:
/// where x = x * 1, constants made of made ones would never end.
pub(super) fn is_given(egraph: &Egg, id: Id) -> bool {
    egraph[id].nodes.iter().any(|n| matches!(n.op, Op::Const(_)))
}

/// (x f c) f d = x f (c f d)
fn joined(egraph: &mut Egg, node: &ENode, f: BinaryFn) -> Option<Id> {
    let (inner, d) = with_constant(egraph, node, f)?;
    let (x, c) =
        find(egraph, inner, |n| with_constant(egraph, n, f).filter(|(_, c)| is_given(egraph, *c)))?;
    let fits = egraph[x].data.ty.dtype.is_float() && keeps_shape(egraph, inner, d);
    if !fits || !is_given(egraph, d) {
        return None;
    }
    let constant = add(egraph, Op::Binary(f), &[c, d]);
    Some(add(egraph, Op::Binary(f), &[x, constant]))
}

pub(super) fn constants_meet(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    [BinaryFn::Add, BinaryFn::Mul].into_iter().find_map(|f| joined(egraph, node, f))
}

pub(super) fn bounds_meet(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    [BinaryFn::Max, BinaryFn::Min].into_iter().find_map(|f| joined(egraph, node, f))
}

pub(super) fn scale_past_shift(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let (inner, scale) = with_constant(egraph, node, BinaryFn::Mul)?;
    let (x, shift) = find(egraph, inner, |n| {
        with_constant(egraph, n, BinaryFn::Add).filter(|(_, c)| is_given(egraph, *c))
    })?;
    let is_product = |n: &ENode| matches!(n.op, Op::Contract(_)).then_some(());
    find(egraph, x, is_product)?;
    let fits = egraph[x].data.ty.dtype.is_float()
        && keeps_shape(egraph, x, shift)
        && keeps_shape(egraph, x, scale)
        && is_given(egraph, scale);
    if !fits {
        return None;
    }
    let scaled = add(egraph, Op::Binary(BinaryFn::Mul), &[x, scale]);
    let shift = add(egraph, Op::Binary(BinaryFn::Mul), &[shift, scale]);
    Some(add(egraph, Op::Binary(BinaryFn::Add), &[scaled, shift]))
}

pub(super) fn scale_into_contract(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Binary(BinaryFn::Mul) = &node.op else { return None };
    let at = (0..2).find(|&k| egraph[node.args[k]].data.constant)?;
    let (scale, other) = (node.args[at], node.args[1 - at]);
    let result = shape(egraph, other);
    let scale_shape = shape(egraph, scale);
    let (contract, args) = find(egraph, other, |n| match &n.op {
        Op::Contract(c) => Some((c.clone(), n.args.clone())),
        _ => None,
    })?;
    let weight = (0..2).find(|&k| egraph[args[k]].data.constant)?;
    // Scaled, they would not be short any more.
    if cast_from(egraph, args[weight], DType::is_rounded).is_some() {
        return None;
    }
    let along: Vec<usize> = (0..scale_shape.len()).filter(|&d| scale_shape[d] != 1).collect();
    if result.len() != scale_shape.len() || along.len() > 1 {
        return None;
    }
    let weight_shape = shape(egraph, args[weight]);
    let mut to = Shape::from_elem(1, weight_shape.len());
    if let Some(&axis) = along.first() {
        let d = contract.maps[weight].iter().position(|a| a.as_axis() == Some(axis))?;
        // A scale that repeats the result, or that misses weights nobody reads, has no place.
        if result[axis] != scale_shape[axis] || weight_shape[d] != scale_shape[axis] {
            return None;
        }
        to[d] = scale_shape[axis];
    }
    let scale = add(egraph, Op::Reshape(to), &[scale]);
    let scaled = add(egraph, Op::Binary(BinaryFn::Mul), &[args[weight], scale]);
    let mut args = args;
    args[weight] = scaled;
    Some(add(egraph, Op::Contract(contract), &args))
}
