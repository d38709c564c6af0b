//! Attention: two contractions with a softmax between them, as one kernel. Its parts are found in
//! a body here, for what decides that it is one and for its loops.

use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::bodies::Places;
use super::choices::{ChoiceGraph, Kernel};
use super::kind::{Body, Kind, is_pointwise, only_splits};
use crate::graph::Node;
use crate::graph::op::{BinaryFn, Contract, Op, ReduceFn, UnaryFn};

/// Rows at least for which keys and values are brought into the order in which they are read.
pub const MANY: usize = 128;
/// Rows at most whose products with keys are each a sum across lanes.
pub const FEW: usize = 4;
/// Attentions kept for a value, each over other arguments: what these cost, the selection knows.
const KEEP: usize = 32;
/// Ways to scale and mask scores that are tried in a softmax.
const MASKS: usize = 4;

/// The parts of an attention, as nodes of its body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attention {
    /// The products of queries and keys.
    pub products: usize,
    /// What is folded to a maximum: scaled and masked products.
    pub scores: usize,
    /// The maximum of a row of scores.
    pub most: usize,
    /// What is summed.
    pub powers: usize,
    /// The sum of a row of powers.
    pub sum: usize,
    /// The weights of the values.
    pub weights: usize,
    /// The sums of weighted values.
    pub mixed: usize,
    /// Which operand of these the weights are.
    pub side: usize,
}

/// The attention that a body is, if it is one.
pub fn find(nodes: &[Node]) -> Option<Attention> {
    let at = |test: fn(&Op) -> bool| (0..nodes.len()).filter(move |&n| test(&nodes[n].op));
    let mut contracts = at(|op| matches!(op, Op::Contract(_)));
    let (products, mixed) = (contracts.next()?, contracts.next()?);
    let mut reduces = at(|op| matches!(op, Op::Reduce(..)));
    let (most, sum) = (reduces.next()?, reduces.next()?);
    if contracts.next().is_some() || reduces.next().is_some() {
        return None;
    }
    let arg = |n: usize, k: usize| nodes[n].args[k].index();
    let body = Body { nodes };
    let above = body.above(products);
    let sides: SmallVec<[usize; 2]> = (0..2).filter(|&k| above.contains(&arg(mixed, k))).collect();
    let &[side] = sides.as_slice() else { return None };
    let mut weights = arg(mixed, side);
    while let Op::Reshape(_) = nodes[weights].op {
        weights = arg(weights, 0);
    }
    let (scores, powers) = (arg(most, 0), arg(sum, 0));
    let found = Attention { products, scores, most, powers, sum, weights, mixed, side };
    let fits = found.has_stages(nodes, &above)
        && found.has_shapes(nodes)
        && found.has_factors(nodes)
        && found.is_float(nodes);
    fits.then_some(found)
}

impl Attention {
    /// How many rows share keys and values: those of the innermost axis that only weights have.
    pub fn rows(&self, nodes: &[Node]) -> usize {
        let Op::Contract(mixed) = &nodes[self.mixed].op else { return 1 };
        let uses = |k: usize, axis: usize| {
            mixed.maps[k].iter().any(|a| a.coefficient(axis) != 0) && mixed.extents[axis] > 1
        };
        let own = |axis: &usize| uses(self.side, *axis) && !uses(1 - self.side, *axis);
        (0..mixed.n_out).rev().find(own).map_or(1, |axis| mixed.extents[axis])
    }

    /// Whether every value is used where it still is: scores make powers, these the weights, and
    /// those the result, and nothing else leads from one to the next.
    fn has_stages(&self, nodes: &[Node], above: &[usize]) -> bool {
        let body = Body { nodes };
        let ends = [self.scores, self.powers, self.weights, nodes.len() - 1];
        let mut stage = vec![usize::MAX; nodes.len()];
        for (s, &end) in ends.iter().enumerate() {
            let below = body.below(end);
            for &n in above.iter().filter(|n| below[**n]) {
                stage[n] = stage[n].min(s);
            }
        }
        let [most, sum, mixed] = [self.most, self.sum, self.mixed].map(|n| stage[n]);
        let in_order = (stage[self.scores], stage[self.powers], stage[self.weights]) == (0, 1, 2)
            && (most, sum, mixed) == (1, 2, 3);
        let passes = |&n: &usize| {
            let args = nodes[n].args.iter().map(|a| a.index()).filter(|a| above.contains(a));
            args.into_iter()
                .all(|a| stage[n] == stage[a] || stage[n] == stage[a] + 1 && a == ends[stage[a]])
        };
        let is_known = |&n: &usize| match &nodes[n].op {
            Op::Contract(_) => true,
            Op::Reduce(..) => true,
            Op::Reshape(_) => stage[n] == 0 || stage[n] == 3,
            Op::Permute(_) => stage[n] == 3 && n > self.mixed,
            op if is_rounding(op) => stage[n] == 3 && n > self.mixed,
            op => is_pointwise(op) && stage[n] < 3,
        };
        let beside = (0..nodes.len()).filter(|n| !above.contains(n));
        in_order
            && above.iter().all(|n| stage[*n] < 4 && passes(n) && is_known(n))
            && beside.into_iter().all(|n| body.is_move(n))
    }

    /// Whether rows and keys are where loops look for them.
    fn has_shapes(&self, nodes: &[Node]) -> bool {
        let shape = |n: usize| nodes[n].ty.shape.as_slice();
        let full = shape(self.scores);
        let Some((&keys, outer)) = full.split_last() else { return false };
        let last = outer.len() as u8;
        let folds = |n: usize, f: ReduceFn| match &nodes[n].op {
            Op::Reduce(g, axes) => *g == f && axes.as_slice() == [last],
            _ => false,
        };
        let mut reduced = full.to_vec();
        reduced[outer.len()] = 1;
        let body = Body { nodes };
        let rows = body.above(self.scores).into_iter().filter(|&n| n <= self.weights);
        let is_row = |n: usize| shape(n) == full || shape(n) == reduced;
        let leading = |n: usize| -> Vec<usize> {
            let (_, outer) = shape(n).split_last().unwrap_or((&1, &[]));
            outer.iter().copied().filter(|&e| e != 1).collect()
        };
        let weights = nodes[self.mixed].args[self.side].index();
        let same = |n: usize| leading(n) == leading(weights) || leading(n) == leading(self.scores);
        let before = (self.products..=self.scores).filter(|&n| body.below(self.scores)[n]);
        let mut before = before.filter(|&n| body.above(self.products).contains(&n));
        keys >= 2
            && folds(self.most, ReduceFn::Max)
            && folds(self.sum, ReduceFn::Sum)
            && shape(self.powers) == full
            && shape(self.weights) == full
            && rows.into_iter().all(is_row)
            && shape(weights).last() == Some(&keys)
            && only_splits(full, shape(weights))
            && before.all(|n| shape(n).last() == Some(&keys) && same(n))
            && self.has_maps(nodes, keys)
            && self.ends_plain(nodes)
    }

    /// Whether powers are of e, and weights are powers times one number of the row, or 0 where that
    /// is none: so powers of another maximum, and sums of them, differ from these by a factor only.
    fn has_factors(&self, nodes: &[Node]) -> bool {
        let arg = |n: usize, k: usize| nodes[n].args[k].index();
        let single = |n: usize| nodes[n].ty.shape.last() == Some(&1);
        let is_power = |n: usize| {
            let apart = arg(n, 0);
            nodes[n].op == Op::Unary(UnaryFn::Exp)
                && nodes[apart].op == Op::Binary(BinaryFn::Sub)
                && [arg(apart, 0), arg(apart, 1)] == [self.scores, self.most]
        };
        let mut at = self.weights;
        while at != self.powers {
            at = match nodes[at].op {
                Op::Binary(BinaryFn::Mul) if single(arg(at, 0)) => arg(at, 1),
                Op::Binary(BinaryFn::Mul | BinaryFn::Div) if single(arg(at, 1)) => arg(at, 0),
                // A guard against rows without a finite score: is it a number?
                Op::Select if nodes[arg(at, 1)].ty.numel() == 1 => {
                    let (asked, x) = (arg(at, 0), arg(at, 2));
                    let guards = nodes[asked].op == Op::Binary(BinaryFn::Ne);
                    if !guards || [arg(asked, 0), arg(asked, 1)] != [x, x] {
                        return false;
                    }
                    x
                }
                _ => return false,
            };
        }
        is_power(self.powers)
    }

    /// Whether keys are the last axis of the products and the one axis that is summed later.
    fn has_maps(&self, nodes: &[Node], keys: usize) -> bool {
        let (Op::Contract(first), Op::Contract(second)) =
            (&nodes[self.products].op, &nodes[self.mixed].op)
        else {
            return false;
        };
        let uses = |c: &Contract, k: usize, axis: usize| {
            c.maps[k].iter().filter(|a| a.coefficient(axis) != 0).count()
        };
        let (key, value, n) =
            (first.n_out.wrapping_sub(1), second.n_out.wrapping_sub(1), second.n_out);
        let sides = |c: &Contract, axis: usize| [uses(c, 0, axis), uses(c, 1, axis)];
        let side = self.side;
        first.n_out > 0
            && second.n_out > 0
            && first.extents[key] == keys
            && sides(first, key).contains(&0)
            && !first.extents[first.n_out..].contains(&0)
            && first.extents.len() > first.n_out
            && second.extents[n..] == [keys]
            && second.maps[side].last().and_then(|a| a.as_axis()) == Some(n)
            && uses(second, side, n) == 1
            && second.extents[value] > 1
            && uses(second, side, value) == 0
            && uses(second, 1 - side, value) > 0
    }

    /// Whether the result is only moved, in another order with the same last axis, then in another
    /// shape; and perhaps rounded before that.
    fn ends_plain(&self, nodes: &[Node]) -> bool {
        let mut ends: Vec<&Op> = nodes[self.mixed + 1..].iter().map(|n| &n.op).collect();
        while let Some(Op::Reshape(_)) = ends.last() {
            ends.pop();
        }
        ends.retain(|op| !is_rounding(op));
        match ends.as_slice() {
            [] => true,
            [Op::Permute(axes)] => axes.last().is_some_and(|&a| a as usize + 1 == axes.len()),
            _ => false,
        }
    }

    /// Whether all of it runs in lanes of f32, or is of one short float, over axes that are in use
    /// whole.
    fn is_float(&self, nodes: &[Node]) -> bool {
        let body = Body { nodes };
        let whole = nodes.iter().all(|n| n.ty.used.is_empty() && n.ty.numel() > 0);
        let above = body.above(self.products);
        let (dtype, short) = (nodes[self.products].ty.dtype, is_short(nodes));
        let float = |&n: &usize| match &nodes[n].op {
            Op::Binary(f) if f.is_comparison() => true,
            _ if nodes[n].ty.dtype.is_rounded() && n > self.mixed => true,
            _ => nodes[n].ty.dtype == dtype,
        };
        let operands = [self.products, self.mixed].map(|n| &nodes[n].args);
        let operands = operands.into_iter().flatten().map(|a| a.index());
        let runs = |&n: &usize| short || body.is_vector_op(n);
        whole
            && (short || dtype == DType::F32)
            && above.iter().all(|n| float(n) && runs(n))
            && operands.into_iter().all(|n| nodes[n].ty.dtype == dtype)
    }
}

/// Whether the products of an attention are of short floats: lanes have none, warps multiply them.
pub fn is_short(nodes: &[Node]) -> bool {
    let mut products = nodes.iter().filter(|n| matches!(n.op, Op::Contract(_)));
    products.any(|n| matches!(n.ty.dtype, DType::F16 | DType::BF16))
}

/// Whether an operation makes numbers of fewer bits.
fn is_rounding(op: &Op) -> bool {
    matches!(op, Op::Cast(to) if to.is_rounded())
}

/// Whether a body is a softmax of scores, the one argument that is as large: a maximum, then a sum.
pub fn is_softmax(nodes: &[Node]) -> bool {
    let is_fold = |n: &&Node| matches!(n.op, Op::Reduce(..));
    let mut folds = nodes.iter().filter(is_fold);
    let (Some(first), Some(second), None) = (folds.next(), folds.next(), folds.next()) else {
        return false;
    };
    let is = |n: &Node, f: ReduceFn| matches!(n.op, Op::Reduce(g, _) if g == f);
    let size = nodes[first.args[0].index()].ty.numel();
    let large = nodes.iter().filter(|n| matches!(n.op, Op::Input(_)) && n.ty.numel() == size);
    is(first, ReduceFn::Max) && is(second, ReduceFn::Sum) && large.count() == 1
}

/// Adds the attentions that the kernels of a value and those of its operands make together: no two
/// of the three are a kernel, so fusing one by one does not get there.
pub fn add(graph: &mut ChoiceGraph, kernels: &mut [Vec<Kernel>]) {
    for value in 0..kernels.len() {
        let mut found: Vec<(f64, Kernel)> = Vec::new();
        for outer in of_kind(graph, &kernels[value], Kind::Contract) {
            for (at, &weights) in outer.args.iter().enumerate() {
                for row in softmaxes(graph, kernels, weights) {
                    let all = [outer, &row];
                    found.extend(attentions(graph, kernels, all, at, value as u32));
                }
            }
        }
        found.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        let mut seen: Vec<Places> = Vec::new();
        found.retain(|(_, kernel)| {
            let mut args = kernel.args.clone();
            args.sort_unstable();
            let new = seen.len() < KEEP && !seen.contains(&args);
            seen.push(args);
            new
        });
        kernels[value].extend(found.into_iter().map(|f| f.1));
    }
}

fn of_kind<'a>(graph: &ChoiceGraph, kernels: &'a [Kernel], kind: Kind) -> Vec<&'a Kernel> {
    kernels.iter().filter(|k| !k.alias && graph.bodies.kind(k.body) == kind).collect()
}

/// The softmaxes of a value, as they are kept, and with what scales and masks their scores.
fn softmaxes(graph: &mut ChoiceGraph, kernels: &[Vec<Kernel>], value: u32) -> Vec<Kernel> {
    let rows = of_kind(graph, &kernels[value as usize], Kind::Row).into_iter();
    let rows: Vec<&Kernel> = rows.filter(|k| is_softmax(&graph.bodies.get(k.body).nodes)).collect();
    let mut all: Vec<Kernel> = rows.iter().map(|k| (*k).clone()).collect();
    for row in rows {
        for (at, &arg) in row.args.iter().enumerate() {
            let maps = of_kind(graph, &kernels[arg as usize], Kind::Map).into_iter();
            for map in maps.take(MASKS) {
                let fused = super::cuts::fused(graph, row, at, map);
                all.extend(fused.filter(|k| !all.contains(k) && !k.args.contains(&value)));
            }
        }
    }
    all
}

/// The attentions of a contraction and the rows that make its operand `at`.
fn attentions(
    graph: &mut ChoiceGraph,
    kernels: &[Vec<Kernel>],
    [outer, row]: [&Kernel; 2],
    at: usize,
    value: u32,
) -> Vec<(f64, Kernel)> {
    let mut found = Vec::new();
    for (inner_at, &scores) in row.args.iter().enumerate() {
        for inner in of_kind(graph, &kernels[scores as usize], Kind::Contract) {
            let parts = [outer, row, inner].map(|k| (k.body, k.args.as_slice()));
            let Some((body, args)) = graph.bodies.fuse_three(parts, [at, inner_at]) else {
                continue;
            };
            if args.contains(&value) {
                continue;
            }
            let mut inside = outer.inside.clone();
            for &part in row.inside.iter().chain(&inner.inside) {
                if !inside.contains(&part) {
                    inside.push(part);
                }
            }
            let kernel = Kernel { body, args, inside, alias: false };
            found.push((graph.us(&kernel), kernel));
        }
    }
    found
}
