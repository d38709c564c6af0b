//! Rules of contractions: operands are read where they lie, whatever moved or repeated them, and
//! results come in the order that suits.

use egg::Id;
use smallvec::SmallVec;

use super::algebra::{is_given, with_constant};
use super::lang::{ENode, Egg};
use super::table::{add, find, inverse, permutation, permuted, reshaped, shape, split_of};
use crate::graph::op::{Affine, Axes, BinaryFn, Contract, Op, Shape};

/// A contraction with another operand and map.
fn with_operand(
    egraph: &mut Egg,
    node: &ENode,
    at: usize,
    x: Id,
    map: SmallVec<[Affine; 4]>,
) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let mut contract = contract.clone();
    contract.maps[at] = map;
    let mut args = node.args.clone();
    args[at] = x;
    Some(add(egraph, Op::Contract(contract), &args))
}

pub(super) fn contract_absorbs_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let at = (0..2).find(|&k| permutation(egraph, node.args[k]).is_some())?;
    let (axes, x) = permutation(egraph, node.args[at])?;
    let back = inverse(&axes);
    let map = back.iter().map(|&a| contract.maps[at][a as usize].clone()).collect();
    with_operand(egraph, node, at, x, map)
}

pub(super) fn contract_absorbs_split(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    for at in 0..2 {
        let to = shape(egraph, node.args[at]);
        let Some(x) = reshaped(egraph, node.args[at]) else { continue };
        let from = shape(egraph, x);
        if to.contains(&0) {
            continue;
        }
        let Some(parts) = split_of(&from, &to) else { continue };
        // The index of a split axis is the flat index of its parts.
        let mut d = 0;
        let mut map = SmallVec::new();
        for part in parts {
            let mut index = Affine::default();
            for &extent in &part {
                let scaled = index
                    .terms
                    .iter()
                    .fold(Affine::default(), |sum, t| sum.plus(t.0 as usize, t.1 * extent as i64));
                let inner = &contract.maps[at][d];
                let offset = index.offset * extent as i64 + inner.offset;
                let sum = inner.terms.iter().fold(scaled, |s, t| s.plus(t.0 as usize, t.1));
                index = Affine { offset, ..sum };
                d += 1;
            }
            map.push(index);
        }
        return with_operand(egraph, node, at, x, map);
    }
    None
}

pub(super) fn contract_drops_unit_axes(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reshape(to) = &node.op else { return None };
    let (contract, args) = find(egraph, node.args[0], |n| match &n.op {
        Op::Contract(c) => Some((c.clone(), n.args.clone())),
        _ => None,
    })?;
    let (out, summed) = contract.extents.split_at(contract.n_out);
    if to.len() >= out.len() {
        return None;
    }
    // Which result axes stay: in order, those that match, unit axes that do not match go.
    let mut kept = Vec::new();
    let mut want = to.iter().peekable();
    for (axis, &extent) in out.iter().enumerate() {
        let left = out.len() - axis;
        if want.peek() == Some(&&extent) && (extent != 1 || want.len() == left) {
            kept.push(axis);
            want.next();
        } else if extent != 1 {
            return None;
        }
    }
    if want.next().is_some() {
        return None;
    }
    let all: Vec<usize> = kept.iter().copied().chain(out.len()..contract.extents.len()).collect();
    let place = |axis: usize| match all.iter().position(|&a| a == axis) {
        Some(at) => Affine::axis(at),
        None => Affine::constant(0),
    };
    let maps =
        [0, 1].map(|k: usize| contract.maps[k].iter().map(|a| a.substitute(&place)).collect());
    let extents = kept.iter().map(|&a| out[a]).chain(summed.iter().copied()).collect();
    let smaller = Contract { extents, n_out: kept.len(), maps };
    Some(add(egraph, Op::Contract(Box::new(smaller)), &args))
}

pub(super) fn contract_channels_last(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let weight = (0..2).find(|&k| egraph[node.args[k]].data.constant)?;
    if egraph[node.args[1 - weight]].data.constant {
        return None;
    }
    let uses = |operand: usize, axis: usize| {
        contract.maps[operand].iter().any(|a| a.coefficient(axis) != 0)
    };
    // The channel: the last axis along which the weights vary and the other operand does not, or
    // (depthwise) along which both do.
    let n = contract.n_out;
    let long = |axis: &usize| contract.extents[*axis] > 1;
    let channel = (0..n)
        .rev()
        .filter(long)
        .find(|&a| uses(weight, a) && !uses(1 - weight, a))
        .or_else(|| (0..n).rev().filter(long).find(|&a| uses(weight, a)))?;
    if channel + 1 == n {
        return None;
    }
    let order: Axes = (0..n).filter(|&a| a != channel).chain([channel]).map(|a| a as u8).collect();
    let place = |axis: usize| match order.iter().position(|&o| o as usize == axis) {
        Some(at) => Affine::axis(at),
        None => Affine::axis(axis),
    };
    let maps =
        [0, 1].map(|k: usize| contract.maps[k].iter().map(|a| a.substitute(&place)).collect());
    let extents = order
        .iter()
        .map(|&a| contract.extents[a as usize])
        .chain(contract.extents[n..].iter().copied())
        .collect();
    let last = Contract { extents, n_out: n, maps };
    let y = add(egraph, Op::Contract(Box::new(last)), &node.args);
    Some(permuted(egraph, &inverse(&order), y))
}

/// The parts that one axis of an operand is joined of, where it is the only one that is, and an
/// axis of the iteration space by itself: the operand's axis, that axis, and the parts.
fn joined_axis(
    contract: &Contract,
    at: usize,
    from: &[usize],
    to: &[usize],
) -> Option<(usize, usize, Vec<usize>)> {
    if from.contains(&0) || from.len() <= to.len() {
        return None;
    }
    let parts = split_of(to, from)?;
    let mut joined = parts.into_iter().enumerate().filter(|(_, p)| p.len() > 1);
    let (Some((d, part)), None) = (joined.next(), joined.next()) else { return None };
    let axis = contract.maps[at][d].as_axis()?;
    (contract.extents[axis] == to[d]).then_some((d, axis, part))
}

/// The contraction with an axis of its space as several.
fn with_parts(contract: &Contract, axis: usize, part: &[usize]) -> Contract {
    let more = part.len() - 1;
    let renamed = |a: usize| {
        if a < axis {
            Affine::axis(a)
        } else if a > axis {
            Affine::axis(a + more)
        } else {
            let mut step = 1;
            let mut index = Affine::default();
            for (k, &extent) in part.iter().enumerate().rev() {
                index = index.plus(axis + k, step);
                step *= extent as i64;
            }
            index
        }
    };
    let mut extents = Shape::from_slice(&contract.extents[..axis]);
    extents.extend(part.iter().copied());
    extents.extend_from_slice(&contract.extents[axis + 1..]);
    let n_out = contract.n_out + if axis < contract.n_out { more } else { 0 };
    let maps =
        [0, 1].map(|k: usize| contract.maps[k].iter().map(|i| i.substitute(&renamed)).collect());
    Contract { extents, n_out, maps }
}

/// The same over the operand as it was before it was joined.
fn without_join(
    egraph: &mut Egg,
    node: &ENode,
    contract: &Contract,
    (at, x): (usize, Id),
    (d, axis, part): (usize, usize, Vec<usize>),
) -> Id {
    let mut split = with_parts(contract, axis, &part);
    split.maps[at].remove(d);
    for k in 0..part.len() {
        split.maps[at].insert(d + k, Affine::axis(axis + k));
    }
    let mut args = node.args.clone();
    args[at] = x;
    add(egraph, Op::Contract(Box::new(split)), &args)
}

pub(super) fn contract_absorbs_join(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    for at in 0..2 {
        let to = shape(egraph, node.args[at]);
        let Some(x) = reshaped(egraph, node.args[at]) else { continue };
        let from = shape(egraph, x);
        let Some(joined) = joined_axis(contract, at, &from, &to) else { continue };
        if joined.1 >= contract.n_out {
            return Some(without_join(egraph, node, contract, (at, x), joined));
        }
    }
    None
}

/// What a class is an expansion of.
fn expanded(egraph: &Egg, id: Id) -> Option<Id> {
    find(egraph, id, |n| matches!(n.op, Op::Expand(_)).then(|| n.args[0]))
}

pub(super) fn contract_absorbs_expand(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let at = (0..2).find(|&k| expanded(egraph, node.args[k]).is_some())?;
    let x = expanded(egraph, node.args[at])?;
    let (from, to) = (shape(egraph, x), shape(egraph, node.args[at]));
    let map = contract.maps[at].iter().enumerate().map(|(d, index)| match from[d] == to[d] {
        true => index.clone(),
        false => Affine::constant(0),
    });
    with_operand(egraph, node, at, x, map.collect())
}

/// Grouped queries: an axis of the result that an operand repeats in groups becomes two.
pub(super) fn contract_shares_heads(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let result: Shape = Shape::from_slice(&contract.extents[..contract.n_out]);
    for at in 0..2 {
        let to = shape(egraph, node.args[at]);
        let joined = find(egraph, node.args[at], |n| {
            let Op::Reshape(_) = n.op else { return None };
            expanded(egraph, n.args[0])?;
            let joined = joined_axis(contract, at, &shape(egraph, n.args[0]), &to)?;
            (joined.1 < contract.n_out).then_some((n.args[0], joined))
        });
        if let Some((x, joined)) = joined {
            let apart = without_join(egraph, node, contract, (at, x), joined);
            return Some(add(egraph, Op::Reshape(result), &[apart]));
        }
    }
    None
}

pub(super) fn scale_out_of_contract(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    if node.args.iter().any(|a| egraph[*a].data.constant) {
        return None;
    }
    for at in 0..2 {
        let scaled = find(egraph, node.args[at], |n| {
            let (x, scale) = with_constant(egraph, n, BinaryFn::Mul)?;
            let number = egraph[scale].data.ty.numel() == 1 && is_given(egraph, scale);
            (number && egraph[x].data.ty.dtype.is_float()).then_some((x, scale))
        });
        let Some((x, scale)) =
            scaled.filter(|s| shape(egraph, s.0) == shape(egraph, node.args[at]))
        else {
            continue;
        };
        let mut args = node.args.clone();
        args[at] = x;
        let y = add(egraph, node.op.clone(), &args);
        let unit = Shape::from_elem(1, contract.n_out);
        let scale = match shape(egraph, scale) == unit {
            true => scale,
            false => add(egraph, Op::Reshape(unit), &[scale]),
        };
        return Some(add(egraph, Op::Binary(BinaryFn::Mul), &[y, scale]));
    }
    None
}
