//! Rules of contractions: operands are read where they lie, whatever moved or repeated them, and
//! results come in the order that suits.

use egg::Id;
use smallvec::SmallVec;

use super::algebra::{is_given, with_constant};
use super::lang::{ENode, Egg};
use super::table::{add, find, inverse, permutation, permuted, reshaped, shape, split_of};
use crate::graph::op::{Affine, Axes, BinaryFn, Contract, Op, ReduceFn, Shape};

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
    let (from, to) = (shape(egraph, x), shape(egraph, node.args[at]));
    let map = through_view(&contract.maps[at], &Op::Permute(axes), &from, &to)?;
    with_operand(egraph, node, at, x, map)
}

/// The index map of an operand, as one of what the operand is a view of.
pub(super) fn through_view(
    map: &[Affine],
    op: &Op,
    from: &[usize],
    to: &[usize],
) -> Option<SmallVec<[Affine; 4]>> {
    match op {
        Op::Permute(axes) => Some(inverse(axes).iter().map(|&a| map[a as usize].clone()).collect()),
        Op::Expand(_) => {
            let place = |d: usize| match from[d] == to[d] {
                true => map[d].clone(),
                false => Affine::constant(0),
            };
            Some((0..map.len()).map(place).collect())
        }
        // The index of a split axis is the flat index of its parts.
        Op::Reshape(_) if !to.contains(&0) => {
            let mut rest = map.iter();
            let flat = |part: Vec<usize>| {
                part.iter().zip(&mut rest).fold(Affine::default(), |outer, (&extent, inner)| {
                    let sum = outer.terms.iter().fold(Affine::default(), |sum, t| {
                        sum.plus(t.0 as usize, t.1 * extent as i64)
                    });
                    let offset = outer.offset * extent as i64 + inner.offset;
                    let sum = inner.terms.iter().fold(sum, |s, t| s.plus(t.0 as usize, t.1));
                    Affine { offset, ..sum }
                })
            };
            Some(split_of(from, to)?.into_iter().map(flat).collect())
        }
        _ => None,
    }
}

pub(super) fn contract_absorbs_split(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    for at in 0..2 {
        let to = shape(egraph, node.args[at]);
        let Some(x) = reshaped(egraph, node.args[at]) else { continue };
        let op = Op::Reshape(to.clone());
        let from = shape(egraph, x);
        if let Some(map) = through_view(&contract.maps[at], &op, &from, &to) {
            return with_operand(egraph, node, at, x, map);
        }
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
    // Groups, along which both vary, come just before it: together they are one axis of the model.
    let group = |a: &usize| *a != channel && long(a) && uses(weight, *a);
    let others = (0..n).filter(|a| *a != channel && !group(a));
    let order: Axes =
        others.chain((0..n).filter(group)).chain([channel]).map(|a| a as u8).collect();
    if order.windows(2).all(|w| w[0] < w[1]) {
        return None;
    }
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

/// An input of the model that a convolution reads, with or without a border, may have its channels
/// last: in a network, operands have them so since they were computed.
pub(super) fn contract_of_channels_last(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    const CHANNELS: usize = 4;
    let Op::Contract(contract) = &node.op else { return None };
    let at = (0..2).find(|&k| egraph[node.args[1 - k]].data.constant)?;
    let map = &contract.maps[at];
    let summed = |i: &Affine| {
        i.as_axis().is_some_and(|a| a >= contract.n_out && contract.extents[a] >= CHANNELS)
    };
    let channels = map.iter().position(summed)?;
    if map.len() < 3 || channels + 1 == map.len() {
        return None;
    }
    let dims = (0..map.len()).filter(|&d| d != channels);
    let order: Axes = dims.chain([channels]).map(|d| d as u8).collect();
    let is_input = |egraph: &Egg, id: Id| {
        find(egraph, id, |n| matches!(n.op, Op::Input(_)).then_some(())).is_some()
    };
    let moved = if is_input(egraph, node.args[at]) {
        permuted(egraph, &order, node.args[at])
    } else {
        let (borders, x, fill) = find(egraph, node.args[at], |n| match &n.op {
            Op::Pad(borders) => Some((borders.clone(), n.args[0], n.args[1])),
            _ => None,
        })?;
        if !is_input(egraph, x) {
            return None;
        }
        let borders = order.iter().map(|&d| borders[d as usize]).collect();
        let x = permuted(egraph, &order, x);
        add(egraph, Op::Pad(borders), &[x, fill])
    };
    let map = order.iter().map(|&d| map[d as usize].clone()).collect();
    with_operand(egraph, node, at, moved, map)
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
pub(super) fn with_parts(contract: &Contract, axis: usize, part: &[usize]) -> Contract {
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

/// The same over operands whose axis `d` was joined of those parts, as they were before.
fn without_join(
    egraph: &mut Egg,
    node: &ENode,
    (axis, part): (usize, &[usize]),
    apart: &[(usize, Id, usize)],
) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let mut split = with_parts(contract, axis, part);
    let mut args = node.args.clone();
    for &(at, x, d) in apart {
        split.maps[at].remove(d);
        for k in 0..part.len() {
            split.maps[at].insert(d + k, Affine::axis(axis + k));
        }
        args[at] = x;
    }
    Some(add(egraph, Op::Contract(Box::new(split)), &args))
}

pub(super) fn contract_absorbs_join(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    for at in 0..2 {
        let to = shape(egraph, node.args[at]);
        let Some(x) = reshaped(egraph, node.args[at]) else { continue };
        let from = shape(egraph, x);
        let Some(joined) = joined_axis(contract, at, &from, &to) else { continue };
        let (d, axis, part) = joined;
        if axis >= contract.n_out {
            return without_join(egraph, node, (axis, &part), &[(at, x, d)]);
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
    let map = through_view(&contract.maps[at], &Op::Expand(to.clone()), &from, &to)?;
    with_operand(egraph, node, at, x, map)
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
        let Some((x, (d, axis, part))) = joined else { continue };
        let mut apart = vec![(at, x, d)];
        // The other operand is split where it runs along the same axis.
        let other = 1 - at;
        let whole = shape(egraph, node.args[other]);
        let along = |d: &usize| {
            contract.maps[other][*d].as_axis() == Some(axis) && whole[*d] == contract.extents[axis]
        };
        if let Some(d) = (0..whole.len()).find(along) {
            let to = whole[..d].iter().chain(&part).chain(&whole[d + 1..]).copied().collect();
            apart.push((other, add(egraph, Op::Reshape(to), &[node.args[other]]), d));
        }
        let split = without_join(egraph, node, (axis, &part), &apart)?;
        return Some(add(egraph, Op::Reshape(result), &[split]));
    }
    None
}

/// The axes of an operand, where each is an axis of the iteration space by itself, in their order
/// there: as a shape with extent 1 for the axes that the operand does not have.
fn as_axes(contract: &Contract, at: usize, from: &[usize]) -> Option<Shape> {
    let mut to = Shape::from_elem(1, contract.extents.len());
    let mut next = 0;
    for (index, &extent) in contract.maps[at].iter().zip(from) {
        if extent == 1 && (index.terms.is_empty() || index.as_axis().is_some()) {
            continue;
        }
        let axis = index.as_axis().filter(|&a| a >= next && contract.extents[a] == extent)?;
        to[axis] = extent;
        next = axis + 1;
    }
    Some(to)
}

/// A product in which no operand is read often is a sum of products along rows.
pub(super) fn contract_is_dots(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    const READS: usize = 8;
    const SHORTEST: usize = 16;
    let Op::Contract(contract) = &node.op else { return None };
    let n = contract.n_out;
    let long = contract.extents.last().is_some_and(|&e| e >= SHORTEST);
    if n + 1 != contract.extents.len() || !long || contract.extents.contains(&0) {
        return None;
    }
    if node.args.iter().any(|a| egraph[*a].data.constant) {
        return None;
    }
    let shapes = [0, 1].map(|k: usize| shape(egraph, node.args[k]));
    let largest = shapes.iter().map(|s| s.iter().product::<usize>()).max()?;
    if contract.extents.iter().product::<usize>() > READS * largest {
        return None;
    }
    let last = |k: usize| contract.maps[k].last().is_some_and(|a| a.as_axis() == Some(n));
    if !(last(0) && last(1)) {
        return None;
    }
    let to = [0, 1].map(|k: usize| as_axes(contract, k, &shapes[k]));
    let [Some(to_x), Some(to_y)] = to else { return None };
    let x = add(egraph, Op::Reshape(to_x), &node.args[..1]);
    let y = add(egraph, Op::Reshape(to_y), &node.args[1..]);
    let product = add(egraph, Op::Binary(BinaryFn::Mul), &[x, y]);
    if shape(egraph, product) != contract.extents {
        return None;
    }
    let sum = Op::Reduce(ReduceFn::Sum, Axes::from_slice(&[n as u8]));
    let sum = add(egraph, sum, &[product]);
    let result = Shape::from_slice(&contract.extents[..n]);
    Some(add(egraph, Op::Reshape(result), &[sum]))
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
