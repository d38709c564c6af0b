//! Rules for several operations over one value at once: contractions with constant weights over
//! the same operand are one contraction whose result is split, and what happens to all parts of a
//! split may happen before it. Query, key and value projections become one product so, and so do
//! the 1x1 convolutions at the start of an inception block.
//!
//! A pairwise rule would list every subset of siblings; these take the whole group.

use egg::Id;
use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::lang::{ENode, Egg};
use super::table::{add, find, shape};
use crate::graph::op::{BinaryFn, Contract, Op};

/// Siblings that are merged at most.
const MOST: usize = 8;

/// The classes of the nodes over a class, each once, in order.
fn parents(egraph: &Egg, id: Id) -> Vec<Id> {
    let mut parents: Vec<Id> = egraph[id].parents().map(|p| egraph.find(p)).collect();
    parents.sort_unstable();
    parents.dedup();
    parents
}

fn is_concat(egraph: &Egg, id: Id) -> bool {
    egraph[id].nodes.iter().any(|n| matches!(n.op, Op::Concat(_)))
}

/// Elements `start..start + extent` along an axis.
fn part(egraph: &mut Egg, x: Id, axis: usize, start: usize, extent: usize) -> Id {
    let whole = shape(egraph, x);
    let mut ranges: SmallVec<[(i64, i64, usize); 6]> = whole.iter().map(|&e| (0, 1, e)).collect();
    ranges[axis] = (start as i64, 1, extent);
    add(egraph, Op::Slice(ranges), &[x])
}

/// A contraction whose weights are constant, as siblings compare it.
struct Product {
    contract: Contract,
    /// Which operand the weights are.
    weights: usize,
    /// The axis of the result along which only the weights vary.
    axis: usize,
    /// That axis of the weights.
    weights_axis: usize,
}

fn product(egraph: &Egg, node: &ENode) -> Option<Product> {
    let Op::Contract(contract) = &node.op else { return None };
    let constant = |k: usize| egraph[node.args[k]].data.constant;
    let weights = match (constant(0), constant(1)) {
        (true, false) => 0,
        (false, true) => 1,
        _ => return None,
    };
    let uses = |k: usize, axis: usize| contract.maps[k].iter().any(|a| a.coefficient(axis) != 0);
    let own = |&a: &usize| uses(weights, a) && !uses(1 - weights, a) && contract.extents[a] > 1;
    let mut axes = (0..contract.n_out).filter(own);
    let (Some(axis), None) = (axes.next(), axes.next()) else { return None };
    let weights_axis = contract.maps[weights].iter().position(|a| a.as_axis() == Some(axis))?;
    // Weights nobody reads have no place in a joined operand.
    let whole = shape(egraph, node.args[weights])[weights_axis] == contract.extents[axis];
    let contract = contract.as_ref().clone();
    (whole && !is_concat(egraph, node.args[weights])).then_some(Product {
        contract,
        weights,
        axis,
        weights_axis,
    })
}

/// Whether the value is used as it is, or in another shape or order by what takes parts of it (a
/// rotary embedding) or lays it beside something (a cache): not only moved, where the product has
/// another form; and not scaled by a constant, which goes into the weights.
fn is_final(egraph: &Egg, id: Id) -> bool {
    let moves = |n: &ENode| matches!(n.op, Op::Permute(_) | Op::Reshape(_));
    let mut forms = vec![id];
    let mut seen = 0;
    let mut read = false;
    while seen < forms.len() && seen < 8 {
        let form = forms[seen];
        seen += 1;
        for parent in parents(egraph, form) {
            let users = egraph[parent].nodes.iter();
            for n in users.filter(|n| n.args.iter().any(|a| egraph.find(*a) == form)) {
                let constant = n.args.iter().any(|a| egraph[*a].data.constant);
                if moves(n) {
                    if !forms.contains(&parent) {
                        forms.push(parent);
                    }
                } else if n.op == Op::Binary(BinaryFn::Mul) && constant {
                    return false;
                } else if form == id || matches!(n.op, Op::Slice(_) | Op::Concat(_)) {
                    read = true;
                }
            }
        }
    }
    read
}

/// contract(x, a) and contract(x, b) are parts of contract(x, a ++ b).
pub(super) fn merge_siblings(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let own = product(egraph, node)?;
    let x = egraph.find(node.args[1 - own.weights]);
    let mut alike = own.contract.clone();
    alike.extents[own.axis] = 0;
    let weights_shape = |egraph: &Egg, id: Id| {
        let mut shape = shape(egraph, id);
        shape[own.weights_axis] = 0;
        (shape, egraph[id].data.ty.dtype)
    };
    let own_weights = weights_shape(egraph, node.args[own.weights]);
    // Result, weights, and extent of each sibling.
    let mut group: Vec<(Id, Id, usize)> = Vec::new();
    for class in parents(egraph, x) {
        if !is_final(egraph, class) {
            continue;
        }
        let sibling = find(egraph, class, |n| {
            let mut other = product(egraph, n)?;
            let extent = other.contract.extents[other.axis];
            let weights = n.args[other.weights];
            other.contract.extents[other.axis] = 0;
            let same = (other.weights, other.axis) == (own.weights, own.axis)
                && egraph.find(n.args[1 - other.weights]) == x
                && other.contract == alike
                && weights_shape(egraph, weights) == own_weights;
            same.then_some((class, weights, extent))
        });
        group.extend(sibling);
    }
    let class = egraph.lookup(node.clone())?;
    if group.len() < 2 || group.len() > MOST || !group.iter().any(|g| g.0 == class) {
        return None;
    }
    // Other forms of the weights would make the same product again.
    if merged_parts(egraph, class, x) >= group.len() {
        return None;
    }
    let weights: Vec<Id> = group.iter().map(|g| g.1).collect();
    let joined = joined(egraph, own.weights_axis as u8, &weights);
    let mut contract = own.contract.clone();
    contract.extents[own.axis] = group.iter().map(|g| g.2).sum();
    let mut args = [x, x];
    args[own.weights] = joined;
    let merged = add(egraph, Op::Contract(Box::new(contract)), &args);
    let extents: Vec<(Id, usize)> = group.iter().map(|g| (g.0, g.2)).collect();
    split(egraph, merged, own.axis, &extents, class)
}

/// Weights side by side: those that are widened from a short float are so once they are.
fn joined(egraph: &mut Egg, axis: u8, weights: &[Id]) -> Id {
    let joined = add(egraph, Op::Concat(axis), weights);
    let inner = |&w: &Id| {
        find(egraph, w, |n| {
            let x = *n.args.first()?;
            let is_short = egraph[x].data.ty.dtype.is_rounded();
            (is_short && n.op == Op::Cast(DType::F32)).then_some(x)
        })
    };
    let inner: Option<Vec<Id>> = weights.iter().map(inner).collect();
    let Some(inner) = inner else { return joined };
    let dtype = |x: &Id| egraph[*x].data.ty.dtype;
    if inner.iter().any(|x| dtype(x) != dtype(&inner[0])) {
        return joined;
    }
    let short = add(egraph, Op::Concat(axis), &inner);
    let wide = add(egraph, Op::Cast(DType::F32), &[short]);
    egraph.union(joined, wide);
    joined
}

/// Of how many products over `x` the merged one is that a class is a part of; 0 where it is none.
fn merged_parts(egraph: &Egg, class: Id, x: Id) -> usize {
    let parts = |weights: Id| {
        find(egraph, weights, |n| matches!(n.op, Op::Concat(_)).then_some(n.args.len()))
    };
    let slices = egraph[class].nodes.iter().filter(|n| matches!(n.op, Op::Slice(_)));
    let products = slices
        .flat_map(|n| &egraph[n.args[0]].nodes)
        .filter(|n| matches!(n.op, Op::Contract(_)) && n.args.iter().any(|a| egraph.find(*a) == x));
    products.flat_map(|n| &n.args).filter_map(|&a| parts(a)).max().unwrap_or(0)
}

/// Makes classes equal to the parts of a value; gives the part that is one of them.
fn split(egraph: &mut Egg, x: Id, axis: usize, parts: &[(Id, usize)], own: Id) -> Option<Id> {
    let mut found = None;
    let mut start = 0;
    for &(class, extent) in parts {
        let slice = part(egraph, x, axis, start, extent);
        start += extent;
        if class == own {
            found = Some(slice);
        } else {
            egraph.union(class, slice);
        }
    }
    found
}

/// The value that a class is a part of along one axis: value, axis, start, extent.
fn part_of(egraph: &Egg, id: Id) -> Option<(Id, usize, usize, usize)> {
    find(egraph, id, |n| {
        let Op::Slice(ranges) = &n.op else { return None };
        let whole = shape(egraph, n.args[0]);
        let mut cut = (0..whole.len()).filter(|&d| ranges[d] != (0, 1, whole[d]));
        let (Some(axis), None) = (cut.next(), cut.next()) else { return None };
        let (start, step, extent) = ranges[axis];
        let merged = egraph[n.args[0]].nodes.iter().any(|n| {
            matches!(n.op, Op::Contract(_)) && n.args.iter().any(|a| is_concat(egraph, *a))
        });
        let pointwise =
            egraph[n.args[0]].nodes.iter().any(|n| matches!(n.op, Op::Unary(_) | Op::Binary(_)));
        (step == 1 && (merged || pointwise)).then_some((
            egraph.find(n.args[0]),
            axis,
            start as usize,
            extent,
        ))
    })
}

/// f(part of x, part of c) for all parts, where c are constants, is a part of f(x, c).
pub(super) fn pointwise_past_split(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    if !matches!(node.op, Op::Unary(_) | Op::Binary(_)) {
        return None;
    }
    let at = node.args.iter().position(|a| !egraph[*a].data.constant)?;
    let (x, axis, ..) = part_of(egraph, node.args[at])?;
    if node.args.iter().enumerate().any(|(k, a)| k != at && !egraph[*a].data.constant) {
        return None;
    }
    // All parts, in their order; they must be the whole.
    let mut parts: Vec<(usize, usize, Id)> = Vec::new();
    for class in parents(egraph, x) {
        let part = part_of(egraph, class).filter(|p| p.0 == x && p.1 == axis);
        parts.extend(part.map(|p| (p.2, p.3, class)));
    }
    parts.sort_unstable();
    let whole = shape(egraph, x)[axis];
    let covered = parts.iter().try_fold(0, |end, p| (p.0 == end).then_some(end + p.1));
    if covered != Some(whole) || parts.len() > MOST {
        return None;
    }
    // The same function of each part, with its constant.
    let mut results: Vec<(Id, usize)> = Vec::new();
    let mut constants: Vec<Id> = Vec::new();
    for &(_, extent, class) in &parts {
        let (result, constant) = parents(egraph, class).into_iter().find_map(|p| {
            find(egraph, p, |n| {
                let same = n.op == node.op && egraph.find(n.args[at]) == class;
                let other = n.args.iter().enumerate().find(|(k, _)| *k != at).map(|(_, a)| *a);
                let constant = other.is_none_or(|a| egraph[a].data.constant);
                (same && constant && shape(egraph, p) == shape(egraph, class)).then_some((p, other))
            })
        })?;
        results.push((result, extent));
        constants.extend(constant);
    }
    let class = egraph.lookup(node.clone())?;
    if !results.iter().any(|r| r.0 == class) {
        return None;
    }
    let mut args: SmallVec<[Id; 4]> = node.args.clone();
    args[at] = x;
    if !constants.is_empty() {
        let along = |egraph: &Egg, k: usize| shape(egraph, constants[k])[axis];
        let one = constants.iter().all(|&c| egraph.find(c) == egraph.find(constants[0]));
        let each = (0..parts.len()).all(|k| along(egraph, k) == parts[k].1);
        args[1 - at] = match (one && along(egraph, 0) == 1, each) {
            (true, _) => constants[0],
            (false, true) => {
                let others = |id: Id| {
                    let mut shape = shape(egraph, id);
                    shape[axis] = 0;
                    shape
                };
                if constants.iter().any(|&c| others(c) != others(constants[0])) {
                    return None;
                }
                add(egraph, Op::Concat(axis as u8), &constants)
            }
            (false, false) => return None,
        };
    }
    let y = egraph.add(ENode { op: node.op.clone(), args });
    split(egraph, y, axis, &results, class)
}
