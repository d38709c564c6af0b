//! The rules. Each is one function that takes a node and gives an equal one; `RULES` lists them
//! with how they treat rounding. Layout needs no tag: a layout is a [`Op::Permute`], so it is part
//! of the type, and these rules move permutations to where they cost nothing.

use std::collections::BTreeMap;

use egg::Id;
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::SmallVec;

use super::algebra::{
    add_zero, bounds_meet, constants_meet, neutral_number, scale_into_contract, scale_past_shift,
    small_power,
};
use super::contract::{
    contract_absorbs_expand, contract_absorbs_join, contract_absorbs_permute,
    contract_absorbs_split, contract_channels_last, contract_drops_unit_axes, contract_is_dots,
    contract_of_channels_last, contract_shares_heads, scale_out_of_contract,
};
use super::integers::{
    contract_of_integers, contract_of_shorts, difference_of_bytes, pool_of_integers,
};
use super::lang::{ENode, Egg};
use super::shuffle::{
    contract_absorbs_shuffle, contract_past_shuffle, pad_past_shuffle, pointwise_past_shuffle,
};
use super::siblings::{merge_siblings, pointwise_past_split};
use super::{Budget, Fired};
use crate::graph::op::{Axes, Op, Shape};

/// How a rule treats floating point results.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounding {
    /// Bit for bit the same.
    Exact,
    /// The same sum or product in another order.
    Reassociating,
}

/// A rule: from a node of a class to an equal class.
pub struct Rule {
    /// Name in reports.
    pub name: &'static str,
    /// What it does to rounding.
    pub rounding: Rounding,
    /// An equal class, where the rule applies.
    pub apply: fn(&mut Egg, &ENode) -> Option<Id>,
}

macro_rules! rules {
    ($($name:literal $rounding:ident $apply:ident;)*) => {
        &[$(Rule { name: $name, rounding: Rounding::$rounding, apply: $apply },)*]
    };
}

/// All rules; the last [`GROUPS`] ones look at several nodes at once and so start when the others
/// have found everything.
pub static RULES: &[Rule] = rules! {
    // p(q(x)) = (p then q)(x)
    "permute-permute" Exact permute_permute;
    // reshape(reshape(x)) = reshape(x)
    "reshape-reshape" Exact reshape_reshape;
    // A permutation that only moves unit axes is a reshape, and reshapes look through it.
    "reshape-of-unit-permute" Exact reshape_of_unit_permute;
    // A reshape that splits axes moves through a permutation.
    "reshape-split-permute" Exact reshape_split_permute;
    // A reshape that joins axes moves through a permutation that keeps them together.
    "reshape-join-permute" Exact reshape_join_permute;
    // A reshape that joins axes in another order than x has them: only these change places.
    "reshape-shuffle-permute" Exact reshape_shuffle_permute;
    // f(p(x)) = p(f(x))
    "unary-permute" Exact unary_permute;
    // f(p(x), y) = p(f(x, p'(y)))
    "binary-permute" Exact binary_permute;
    // pad(p(x)) = p(pad'(x))
    "pad-permute" Exact pad_permute;
    // slice(p(x)) = p(slice'(x))
    "slice-permute" Exact slice_permute;
    // reduce(p(x)) = p(reduce'(x))
    "reduce-permute" Exact reduce_permute;
    // A reduction over the only window there is, which is all of x, is one of x.
    "reduce-of-only-window" Exact reduce_of_only_window;
    // concat(p(x), p(y)) = p(concat'(x, y))
    "concat-permute" Exact concat_permute;
    // A pooling of p(x) is computed in the order of x.
    "pool-permute" Exact pool_permute;
    // f(shuffle(x), c) = shuffle(f(x, back(c)))
    "pointwise-past-shuffle" Exact pointwise_past_shuffle;
    // pad(shuffle(x)) = shuffle(pad(x)), the border along other axes
    "pad-past-shuffle" Exact pad_past_shuffle;
    // contract(shuffle(x), w) = shuffle(contract(x, back(w))), channel by channel
    "contract-past-shuffle" Exact contract_past_shuffle;
    // contract(shuffle(x), y) = contract'(x, y), the sum in whole turns of the shuffle
    "contract-absorbs-shuffle" Exact contract_absorbs_shuffle;
    // contract(p(x), y) = contract'(x, y)
    "contract-absorbs-permute" Exact contract_absorbs_permute;
    // contract(split(x), y) = contract'(x, y)
    "contract-absorbs-split" Exact contract_absorbs_split;
    // contract(join(x), y) = contract'(x, y), the joined axis of the sum split in two
    "contract-absorbs-join" Reassociating contract_absorbs_join;
    // contract(expand(x), y) = contract'(x, y): what repeats is read again
    "contract-absorbs-expand" Exact contract_absorbs_expand;
    // contract(join(expand(x)), y) = join(contract'(expand(x), y)): heads that share keys
    "contract-shares-heads" Exact contract_shares_heads;
    // contract(x, y) = sum(x * y), where no element is read often
    "contract-is-dots" Reassociating contract_is_dots;
    // Result axes of extent 1 that a reshape drops need not be there.
    "contract-drops-unit-axes" Exact contract_drops_unit_axes;
    // A contraction with constant weights may have its channels last.
    "contract-channels-last" Exact contract_channels_last;
    // contract(x, w) = contract'(p(x), w) for an input x of a convolution
    "contract-of-channels-last" Exact contract_of_channels_last;
    // s * contract(x, w) = contract(x, s * w): batch norms and scales go into weights.
    "scale-into-contract" Reassociating scale_into_contract;
    // contract(s * x, y) = s * contract(x, y) for a number s, where neither is constant
    "scale-out-of-contract" Reassociating scale_out_of_contract;
    // contract(i * s, j * t) = contract(i, j) * (s * t) for integers i and j
    "contract-of-integers" Reassociating contract_of_integers;
    // contract(i, j) = contract(i32(i16(i)), i32(i16(j))) for bytes and differences of bytes
    "contract-of-shorts" Exact contract_of_shorts;
    // i32(x) - i32(y) = i32(i16(x) - i16(y)) for bytes
    "difference-of-bytes" Exact difference_of_bytes;
    // max over windows of i * s = (max over windows of i) * s for integers i and a number s > 0
    "pool-of-integers" Exact pool_of_integers;
    // x * 1 = x, x / 1 = x, x - 0 = x
    "neutral-number" Exact neutral_number;
    // x + 0 = x (the sign of a zero may differ)
    "add-zero" Reassociating add_zero;
    // x^2 = x * x, x^3 = x^2 * x, x^4 = x^2 * x^2
    "small-power" Reassociating small_power;
    // (x + c) + d = x + (c + d), and products alike
    "constants-meet" Reassociating constants_meet;
    // max(max(x, c), d) = max(x, max(c, d)), and minima alike
    "bounds-meet" Exact bounds_meet;
    // (contract + c) * s = contract * s + c * s
    "scale-past-shift" Reassociating scale_past_shift;
    // contract(x, a) and contract(x, b) are parts of contract(x, a ++ b)
    "merge-siblings" Exact merge_siblings;
    // f(part of x) for all parts are parts of f(x)
    "pointwise-past-split" Exact pointwise_past_split;
};

/// Rules of groups.
const GROUPS: usize = 2;

/// Applies all rules until nothing new is found or a budget ends; counts the firings.
pub fn saturate(egraph: &mut Egg, budget: Budget) -> Fired {
    saturate_by(&|rule, egraph, node| (rule.apply)(egraph, node), egraph, budget)
}

/// Gives an equal class by a rule, where it applies.
pub(super) type Apply<'a> = dyn Fn(&Rule, &mut Egg, &ENode) -> Option<Id> + 'a;

/// The same, with rules applied as a test wants it.
pub(super) fn saturate_by(apply: &Apply, egraph: &mut Egg, budget: Budget) -> Fired {
    let mut fired: Fired = RULES.iter().map(|r| (r.name, BTreeMap::new())).collect();
    saturate_with((&RULES[..RULES.len() - GROUPS], apply), egraph, budget, &mut fired);
    saturate_with((RULES, apply), egraph, budget, &mut fired);
    fired
}

fn saturate_with(
    (rules, apply): (&[Rule], &Apply),
    egraph: &mut Egg,
    budget: Budget,
    fired: &mut Fired,
) {
    let mut sizes: FxHashMap<Id, usize> = FxHashMap::default();
    for _ in 0..budget.rounds {
        let nodes = unseen(egraph, &mut sizes);
        for (class, node) in nodes {
            egraph.analysis.origin = egraph[class].data.origin.clone();
            for rule in rules {
                if egraph.total_size() > budget.nodes {
                    break;
                }
                let Some(equal) = apply(rule, egraph, &node) else { continue };
                // A rule that changes a type is wrong; better no optimisation than a wrong one.
                let same = egraph[class].data.ty == egraph[equal].data.ty;
                assert!(same || !cfg!(test), "{} changes a type", rule.name);
                if same && egraph.union(class, equal) {
                    let origin = egraph[class].data.origin.clone().unwrap_or_default();
                    *fired.entry(rule.name).or_default().entry(origin).or_insert(0) += 1;
                }
            }
        }
        egraph.analysis.origin = None;
        egraph.rebuild();
        let grown = egraph.classes().any(|c| sizes.get(&c.id) != Some(&c.nodes.len()));
        if !grown || egraph.total_size() > budget.nodes {
            break;
        }
    }
}

/// Rules look at a node, its class, and at most this deep below the node.
const DEPTH: usize = 3;

/// The nodes that rules may see something new at, in order: their classes, or classes below, have
/// grown since the sizes were noted.
fn unseen(egraph: &Egg, sizes: &mut FxHashMap<Id, usize>) -> Vec<(Id, ENode)> {
    let grown: FxHashSet<Id> = egraph
        .classes()
        .filter(|c| sizes.insert(c.id, c.nodes.len()) != Some(c.nodes.len()))
        .map(|c| c.id)
        .collect();
    let mut below = grown.clone();
    let has =
        |set: &FxHashSet<Id>, n: &ENode| n.args.iter().any(|a| set.contains(&egraph.find(*a)));
    for _ in 1..DEPTH {
        let above: Vec<Id> = egraph
            .classes()
            .filter(|c| !below.contains(&c.id) && c.nodes.iter().any(|n| has(&below, n)))
            .map(|c| c.id)
            .collect();
        below.extend(above);
    }
    let mut nodes: Vec<(Id, ENode)> = egraph
        .classes()
        .filter(|c| !c.data.constant)
        .flat_map(|c| c.nodes.iter().map(|n| (c.id, n)))
        .filter(|(id, n)| grown.contains(id) || has(&below, n))
        .map(|(id, n)| (id, n.clone()))
        .collect();
    // Within a class the nodes are in order.
    nodes.sort_by_key(|n| n.0);
    nodes
}

/// The operation of a class that `pick` takes, the first where there are several: a class lists
/// its nodes in an order that depends on the graph alone.
pub(super) fn find<T>(egraph: &Egg, id: Id, pick: impl Fn(&ENode) -> Option<T>) -> Option<T> {
    egraph[id].nodes.iter().find_map(pick)
}

/// The permutation of a class, and what it permutes.
pub(super) fn permutation(egraph: &Egg, id: Id) -> Option<(Axes, Id)> {
    find(egraph, id, |n| match &n.op {
        Op::Permute(axes) => Some((axes.clone(), n.args[0])),
        _ => None,
    })
}

/// What a class is a reshape of.
pub(super) fn reshaped(egraph: &Egg, id: Id) -> Option<Id> {
    find(egraph, id, |n| matches!(n.op, Op::Reshape(_)).then(|| n.args[0]))
}

pub(super) fn shape(egraph: &Egg, id: Id) -> Shape {
    egraph[id].data.ty.shape.clone()
}

pub(super) fn inverse(axes: &[u8]) -> Axes {
    let mut inverse = Axes::from_elem(0, axes.len());
    axes.iter().enumerate().for_each(|(i, &a)| inverse[a as usize] = i as u8);
    inverse
}

fn is_identity(axes: &[u8]) -> bool {
    axes.iter().enumerate().all(|(i, &a)| i == a as usize)
}

pub(super) fn add(egraph: &mut Egg, op: Op, args: &[Id]) -> Id {
    egraph.add(ENode::new(op, args))
}

/// x with its axes in an order; x itself where the order changes nothing.
pub(super) fn permuted(egraph: &mut Egg, axes: &[u8], x: Id) -> Id {
    match is_identity(axes) {
        true => x,
        false => add(egraph, Op::Permute(Axes::from_slice(axes)), &[x]),
    }
}

fn permute_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Permute(outer) = &node.op else { return None };
    let (inner, x) = permutation(egraph, node.args[0])?;
    let joined: Axes = outer.iter().map(|&a| inner[a as usize]).collect();
    Some(permuted(egraph, &joined, x))
}

fn reshape_reshape(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reshape(to) = &node.op else { return None };
    let x = reshaped(egraph, node.args[0])?;
    Some(match shape(egraph, x) == *to {
        true => x,
        false => add(egraph, Op::Reshape(to.clone()), &[x]),
    })
}

fn reshape_of_unit_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reshape(to) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let from = shape(egraph, x);
    let moved: Vec<u8> = axes.iter().copied().filter(|&a| from[a as usize] != 1).collect();
    if !moved.windows(2).all(|w| w[0] < w[1]) {
        return None;
    }
    Some(match from == *to {
        true => x,
        false => add(egraph, Op::Reshape(to.clone()), &[x]),
    })
}

/// For each axis of `from`, the extents that replace it in `to`, where every axis is only split.
pub(super) fn split_of(from: &[usize], to: &[usize]) -> Option<Vec<Vec<usize>>> {
    let mut rest = to.iter().copied().peekable();
    let mut parts = Vec::new();
    for &extent in from {
        let mut part = Vec::new();
        let mut product = 1;
        while product < extent || part.is_empty() {
            let next = rest.next()?;
            product *= next;
            part.push(next);
        }
        if product != extent {
            return None;
        }
        parts.push(part);
    }
    // Unit axes at the end belong to the last one.
    for extent in rest {
        if extent != 1 {
            return None;
        }
        parts.last_mut()?.push(1);
    }
    Some(parts)
}

fn reshape_split_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reshape(to) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let from = shape(egraph, x);
    if to.len() <= from.len() || from.contains(&0) {
        return None;
    }
    let permuted_shape: Vec<usize> = axes.iter().map(|&a| from[a as usize]).collect();
    let parts = split_of(&permuted_shape, to)?;
    // Split x itself, then put the pieces in order.
    let mut split = Shape::new();
    let mut first_of = vec![0usize; from.len()];
    for (d, first) in first_of.iter_mut().enumerate() {
        let at = axes.iter().position(|&a| a as usize == d)?;
        *first = split.len();
        split.extend_from_slice(&parts[at]);
    }
    let order: Axes = axes
        .iter()
        .enumerate()
        .flat_map(|(at, &a)| (0..parts[at].len()).map(move |k| (a as usize, k)))
        .map(|(a, k)| (first_of[a] + k) as u8)
        .collect();
    let x = add(egraph, Op::Reshape(split), &[x]);
    Some(permuted(egraph, &order, x))
}

/// The first axis of x of each run of axes that a reshape joins after a permutation, and how many
/// these are, where they stand together in x.
fn joined_runs(axes: &[u8], from: &[usize], to: &[usize]) -> Option<Vec<(u8, usize)>> {
    if to.len() >= from.len() || from.contains(&0) {
        return None;
    }
    let permuted_shape: Vec<usize> = axes.iter().map(|&a| from[a as usize]).collect();
    let mut at = 0;
    let runs = split_of(to, &permuted_shape)?.into_iter().map(|run| {
        let members = &axes[at..at + run.len()];
        at += run.len();
        let (first, last) = (*members.iter().min()?, *members.iter().max()?);
        (usize::from(last - first) + 1 == run.len()).then_some((first, run.len()))
    });
    runs.collect()
}

fn reshape_join_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reshape(to) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let blocks = joined_runs(&axes, &shape(egraph, x), to)?;
    // Within a run the axes must be in the order that x has them.
    let in_order: Vec<u8> = blocks.iter().flat_map(|b| b.0..b.0 + b.1 as u8).collect();
    if in_order[..] != axes[..] {
        return None;
    }
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_unstable_by_key(|&b| blocks[b].0);
    let joined: Shape = order.iter().map(|&b| to[b]).collect();
    let x = add(egraph, Op::Reshape(joined), &[x]);
    let back: Axes =
        (0..blocks.len()).map(|b| order.iter().position(|&o| o == b).unwrap_or(b) as u8).collect();
    Some(permuted(egraph, &back, x))
}

fn reshape_shuffle_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reshape(to) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let blocks = joined_runs(&axes, &shape(egraph, x), to)?;
    // Each run in its own order, but where it is in x; then the runs by themselves.
    let mut local = axes.clone();
    let mut outer = axes.clone();
    let mut at = 0;
    for &(first, count) in &blocks {
        for k in 0..count {
            local[first as usize + k] = axes[at + k];
            outer[at + k] = first + k as u8;
        }
        at += count;
    }
    if is_identity(&local) || is_identity(&outer) {
        return None;
    }
    let shuffled = permuted(egraph, &local, x);
    let runs = permuted(egraph, &outer, shuffled);
    Some(add(egraph, node.op.clone(), &[runs]))
}

fn unary_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let (Op::Unary(_) | Op::Cast(_)) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let y = add(egraph, node.op.clone(), &[x]);
    Some(permuted(egraph, &axes, y))
}

fn binary_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let (Op::Binary(_) | Op::Select) = &node.op else { return None };
    let full = &egraph.lookup(node.clone())?;
    let result = shape(egraph, *full);
    // The permutation of an operand as large as the result leads.
    let (axes, _) = node
        .args
        .iter()
        .filter(|a| shape(egraph, **a) == result && !egraph[**a].data.constant)
        .find_map(|a| permutation(egraph, *a))?;
    let back = inverse(&axes);
    let mut args: SmallVec<[Id; 4]> = SmallVec::new();
    for &arg in &node.args {
        let known = find(egraph, arg, |n| match &n.op {
            Op::Permute(a) if *a == axes => Some(n.args[0]),
            _ => None,
        });
        args.push(match known {
            Some(x) => x,
            None => {
                let from = shape(egraph, arg);
                let to: Shape = back.iter().map(|&a| from[a as usize]).collect();
                let moved: Vec<u8> =
                    back.iter().copied().filter(|&a| from[a as usize] != 1).collect();
                // Moving unit axes only is no copy.
                if moved.windows(2).all(|w| w[0] < w[1]) {
                    if to == from { arg } else { add(egraph, Op::Reshape(to), &[arg]) }
                } else {
                    permuted(egraph, &back, arg)
                }
            }
        });
    }
    let y = add(egraph, node.op.clone(), &args);
    Some(permuted(egraph, &axes, y))
}

fn pad_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Pad(borders) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let mut moved = borders.clone();
    axes.iter().enumerate().for_each(|(i, &a)| moved[a as usize] = borders[i]);
    let y = add(egraph, Op::Pad(moved), &[x, node.args[1]]);
    Some(permuted(egraph, &axes, y))
}

fn slice_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Slice(ranges) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let mut moved = ranges.clone();
    axes.iter().enumerate().for_each(|(i, &a)| moved[a as usize] = ranges[i]);
    let y = add(egraph, Op::Slice(moved), &[x]);
    Some(permuted(egraph, &axes, y))
}

fn reduce_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reduce(f, folded) = &node.op else { return None };
    let (axes, x) = permutation(egraph, node.args[0])?;
    let mut moved: Axes = folded.iter().map(|&a| axes[a as usize]).collect();
    moved.sort_unstable();
    let y = add(egraph, Op::Reduce(*f, moved), &[x]);
    Some(permuted(egraph, &axes, y))
}

fn reduce_of_only_window(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reduce(f, folded) = &node.op else { return None };
    let (windows, x) = find(egraph, node.args[0], |n| match &n.op {
        Op::Window(windows) => Some((windows.clone(), n.args[0])),
        _ => None,
    })?;
    let from = shape(egraph, x);
    let (first, count) = (from.len() - windows.len(), windows.len());
    let all = windows.iter().zip(&from[first..]).all(|(w, &extent)| w.0 == extent);
    let taps: Axes = (first + count..first + 2 * count).map(|a| a as u8).collect();
    if !all || *folded != taps {
        return None;
    }
    let own = (first..first + count).map(|a| a as u8).collect();
    let y = add(egraph, Op::Reduce(*f, own), &[x]);
    let mut to = shape(egraph, y);
    to.extend(std::iter::repeat_n(1, count));
    Some(add(egraph, Op::Reshape(to), &[y]))
}

fn concat_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Concat(axis) = &node.op else { return None };
    let (axes, _) = permutation(egraph, node.args[0])?;
    let mut args: SmallVec<[Id; 4]> = SmallVec::new();
    for &arg in &node.args {
        args.push(find(egraph, arg, |n| match &n.op {
            Op::Permute(a) if *a == axes => Some(n.args[0]),
            _ => None,
        })?);
    }
    let y = add(egraph, Op::Concat(axes[*axis as usize]), &args);
    Some(permuted(egraph, &axes, y))
}

/// `reshape(reduce(window(p(x))))` as `p(p'(..))`: the inner permutation becomes the order in
/// which the kernel runs, so that it reads and writes along x's last axis.
fn pool_permute(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reshape(_) = &node.op else { return None };
    let class = egraph.lookup(node.clone())?;
    if permutation(egraph, class).is_some() {
        return None;
    }
    let window = find(egraph, node.args[0], |n| match &n.op {
        Op::Reduce(..) => Some(n.args[0]),
        _ => None,
    })?;
    let x = find(egraph, window, |n| match &n.op {
        Op::Window(_) => Some(n.args[0]),
        _ => None,
    })?;
    let (axes, _) = permutation(egraph, x)?;
    if shape(egraph, class).len() != axes.len() {
        return None;
    }
    let y = permuted(egraph, &inverse(&axes), class);
    Some(permuted(egraph, &axes, y))
}
