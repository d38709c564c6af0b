//! Rules of quantised models: products of numbers that stand for bytes are products of integers.
//!
//! A byte without its zero point is an i16 of at most 255 in magnitude. That is what kernels keep
//! in memory and multiply (`loops/words.rs`), and what a border of zeros surrounds. Where the
//! target multiplies bytes (`bytes.rs`), they stay as they are: a border is then one of zero
//! points, and what these add to a sum, the same for each column of weights, is taken from it.

use egg::Id;
use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::algebra::number;
use super::bytes::{of_bytes, unsigned};
use super::cost::in_words;
use super::lang::{ENode, Egg};
use super::table::{add, find, permuted, shape};
use crate::graph::Constant;
use crate::graph::eval::{Data, Value, int_range};
use crate::graph::op::{Axes, BinaryFn, Contract, Op, ReduceFn, Shape};
use crate::graph::scalar::Parts;

/// Products of two such numbers that an i32 holds the sum of.
const MOST_SUMMED: usize = 33_000;
/// How far views of constants are looked through.
pub(super) const DEPTH: usize = 4;
/// Elements of constants that are looked at.
const FEW: usize = 1 << 16;

pub(super) fn dtype(egraph: &Egg, id: Id) -> DType {
    egraph[id].data.ty.dtype
}

/// What a class is cast from, of dtypes that `pick` takes.
pub(super) fn cast_from(egraph: &Egg, id: Id, pick: impl Fn(DType) -> bool) -> Option<Id> {
    let picked = |n: &ENode| matches!(n.op, Op::Cast(_)) && pick(dtype(egraph, n.args[0]));
    find(egraph, id, |n| picked(n).then(|| n.args[0]))
}

pub(super) fn is_byte(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::U8)
}

/// Whether a class is the number 0.
pub(super) fn is_zero(egraph: &Egg, id: Id, depth: usize) -> bool {
    let is_zero = |constant: &Constant| constant.bytes.iter().all(|&b| b == 0);
    egraph[id].data.ty.numel() == 1 && is_everywhere(egraph, id, &is_zero, depth)
}

/// Whether a class is a small constant that `holds` for, seen through what keeps its numbers.
pub(super) fn is_everywhere(
    egraph: &Egg,
    id: Id,
    holds: &dyn Fn(&Constant) -> bool,
    depth: usize,
) -> bool {
    egraph[id].nodes.iter().any(|n| match &n.op {
        Op::Const(i) => {
            let constant = &egraph.analysis.constants[*i as usize];
            constant.ty.numel() <= FEW && holds(constant)
        }
        Op::Cast(_) | Op::Reshape(_) | Op::Permute(_) | Op::Expand(_) => {
            depth > 0 && is_everywhere(egraph, n.args[0], holds, depth - 1)
        }
        _ => false,
    })
}

/// The bytes whose difference a node is, as classes of bytes or of constants with such values.
pub(super) fn difference(egraph: &Egg, node: &ENode) -> Option<[Id; 2]> {
    let Op::Binary(BinaryFn::Sub) = node.op else { return None };
    if dtype(egraph, node.args[0]) != DType::I32 {
        return None;
    }
    let x = cast_from(egraph, node.args[0], is_byte)?;
    let of = cast_from(egraph, node.args[1], |from| from == dtype(egraph, x));
    let small = || {
        let index = find(egraph, node.args[1], |n| match n.op {
            Op::Const(i) => Some(i as usize),
            _ => None,
        })?;
        let (low, high) = int_range(dtype(egraph, x));
        let value = Value::from_constant(&egraph.analysis.constants[index]);
        let Data::Int(values) = value.data else { return None };
        values.iter().all(|v| (low..=high).contains(v)).then_some(node.args[1])
    };
    Some([x, of.or_else(small)?])
}

/// The same difference in i16, which holds it; x alone where nothing is taken from it.
fn short_difference(egraph: &mut Egg, [x, y]: [Id; 2]) -> Id {
    let same = shape(egraph, x).len() == shape(egraph, y).len();
    let one = egraph[y].data.ty.numel() == 1;
    let zero = same && one && is_zero(egraph, y, DEPTH);
    let [x, y] = [x, y].map(|x| add(egraph, Op::Cast(DType::I16), &[x]));
    if zero { x } else { add(egraph, Op::Binary(BinaryFn::Sub), &[x, y]) }
}

/// The i16 that an i32 class is, where it is a byte or the difference of two.
fn short(egraph: &mut Egg, id: Id, depth: usize) -> Option<Id> {
    if dtype(egraph, id) != DType::I32 {
        return None;
    }
    if let Some(x) = cast_from(egraph, id, |from| from == DType::I16) {
        return Some(x);
    }
    if let Some(x) = cast_from(egraph, id, is_byte) {
        return Some(add(egraph, Op::Cast(DType::I16), &[x]));
    }
    if let Some(bytes) = find(egraph, id, |n| difference(egraph, n)) {
        return Some(short_difference(egraph, bytes));
    }
    let padded = find(egraph, id, |n| match &n.op {
        Op::Pad(_) if is_zero(egraph, n.args[1], DEPTH) => Some(n.clone()),
        _ => None,
    });
    let constant = egraph[id].data.constant;
    let moved = || {
        find(egraph, id, |n| match &n.op {
            Op::Permute(_) | Op::Reshape(_) if constant => Some(n.clone()),
            _ => None,
        })
    };
    let node = padded.or_else(moved)?;
    if depth == 0 {
        return None;
    }
    let x = short(egraph, node.args[0], depth - 1)?;
    let mut args = vec![x];
    for &fill in &node.args[1..] {
        args.push(add(egraph, Op::Cast(DType::I16), &[fill]));
    }
    Some(add(egraph, node.op, &args))
}

/// A number as an integer times a scale: both classes.
fn scaled(egraph: &mut Egg, id: Id, depth: usize) -> Option<(Id, Id)> {
    let product = find(egraph, id, |n| {
        let Op::Binary(BinaryFn::Mul) = n.op else { return None };
        let whole = |k: usize| cast_from(egraph, n.args[k], |from| from == DType::I32);
        let same = |k: usize| shape(egraph, n.args[k]) == shape(egraph, id);
        (0..2).find_map(|k| Some((whole(k).filter(|_| same(k))?, n.args[1 - k])))
    });
    if product.is_some() {
        return product;
    }
    // A border of zeros is one of the integers as well, where all have one scale.
    let constant = egraph[id].data.constant;
    let node = find(egraph, id, |n| match &n.op {
        Op::Pad(_) if is_zero(egraph, n.args[1], DEPTH) => Some(n.clone()),
        Op::Permute(_) | Op::Reshape(_) if constant => Some(n.clone()),
        _ => None,
    })?;
    let (x, scale) = scaled(egraph, node.args[0], depth.checked_sub(1)?)?;
    let one = egraph[scale].data.ty.numel() == 1;
    match &node.op {
        Op::Pad(_) if one => {
            let fill = add(egraph, Op::Cast(DType::I32), &[node.args[1]]);
            Some((add(egraph, node.op, &[x, fill]), scale))
        }
        Op::Permute(_) if one => Some((add(egraph, node.op, &[x]), scale)),
        Op::Permute(_) => {
            Some((add(egraph, node.op.clone(), &[x]), add(egraph, node.op, &[scale])))
        }
        Op::Reshape(to) if one => {
            let unit = add(egraph, Op::Reshape(Shape::from_elem(1, to.len())), &[scale]);
            Some((add(egraph, node.op, &[x]), unit))
        }
        _ => None,
    }
}

/// The scale of an operand as one of the result.
fn scale_of_result(egraph: &mut Egg, contract: &Contract, at: usize, scale: Id) -> Option<Id> {
    let of = shape(egraph, scale);
    let mut to = Shape::from_elem(1, contract.n_out);
    let mut long = (0..of.len()).filter(|&d| of[d] != 1);
    if let Some(d) = long.next() {
        let axis = contract.maps[at].get(d)?.as_axis().filter(|&a| a < contract.n_out)?;
        if long.next().is_some() || contract.extents[axis] != of[d] {
            return None;
        }
        to[axis] = of[d];
    }
    Some(if of == to { scale } else { add(egraph, Op::Reshape(to), &[scale]) })
}

/// A contraction whose sum can run over words, once an axis of both operands is the last one of the
/// first and has a whole number of them.
pub(super) struct Worded {
    pub(super) contract: Contract,
    /// The axis of each operand.
    axes: [usize; 2],
    /// The operand of which it becomes the last one, where it is not.
    moved: Option<usize>,
    /// How many more elements each operand gets there.
    more: [usize; 2],
}

/// From so many channels on, words are of these, else of the taps of a window along a row.
const MANY: usize = 8;

impl Worded {
    pub(super) fn of(
        egraph: &Egg,
        contract: &Contract,
        args: &[Id],
        constant: [bool; 2],
        parts: Parts,
    ) -> Option<Worded> {
        let x = constant.iter().position(|&c| !c)?;
        let channels = Worded::of_channels(egraph, contract, args, x, parts);
        let few = |p: &Worded| shape(egraph, args[x])[p.axes[x]] < MANY;
        let taps = || Worded::of_taps(egraph, contract, args, x, parts);
        let made = match channels {
            Some(channels) if !few(&channels) => Some(channels),
            other => taps().or(other),
        };
        made.filter(|p| in_words(&p.contract, constant, parts))
    }

    /// Words along the last axis of the operand `x`, of which windows take some.
    fn of_taps(
        egraph: &Egg,
        contract: &Contract,
        args: &[Id],
        x: usize,
        parts: Parts,
    ) -> Option<Worded> {
        let weights = 1 - x;
        let last = contract.maps[x].last()?;
        let tap = |&(k, step): &(u8, i64)| {
            let k = usize::from(k);
            let axis = contract.maps[weights].iter().position(|i| i.as_axis() == Some(k))?;
            let extent = contract.extents[k];
            let whole = shape(egraph, args[weights])[axis] == extent;
            let fits = k >= contract.n_out
                && step == 1
                && extent > 2
                && !extent.is_multiple_of(parts.count());
            (fits && whole).then_some((k, axis))
        };
        let (k, axis) = last.terms.iter().find_map(tap)?;
        let mut contract = contract.clone();
        let extent = contract.extents[k];
        contract.extents[k] = extent.next_multiple_of(parts.count());
        let added = contract.extents[k] - extent;
        let rank = contract.maps[x].len();
        let room = shape(egraph, args[x])[rank - 1] as i64;
        let reach = contract.maps[x][rank - 1].range(&contract.extents).1 + 1;
        let mut axes = [axis; 2];
        axes[x] = rank - 1;
        let mut more = [added; 2];
        more[x] = usize::try_from(reach - room).unwrap_or(0);
        Some(Worded { contract, axes, moved: None, more })
    }

    /// Words along an axis of both operands, the longest.
    fn of_channels(
        egraph: &Egg,
        contract: &Contract,
        args: &[Id],
        moved: usize,
        parts: Parts,
    ) -> Option<Worded> {
        let axis_of = |at: usize, k: usize| {
            contract.maps[at].iter().position(|index| index.as_axis() == Some(k))
        };
        let sums = contract.n_out..contract.extents.len();
        let longest = sums
            .filter(|&k| axis_of(0, k).is_some() && axis_of(1, k).is_some())
            .max_by_key(|&k| contract.extents[k])?;
        let axes = [axis_of(0, longest)?, axis_of(1, longest)?];
        let extent = contract.extents[longest];
        let same = (0..2).all(|at| shape(egraph, args[at])[axes[at]] == extent);
        let mut contract = contract.clone();
        let index = contract.maps[moved].remove(axes[moved]);
        contract.maps[moved].push(index);
        contract.extents[longest] = extent.next_multiple_of(parts.count());
        let more = [contract.extents[longest] - extent; 2];
        (same && extent > 2).then_some(Worded { contract, axes, moved: Some(moved), more })
    }

    /// An operand as it has to be; a border that it has, of zeros or of this number, is made with
    /// its new ones.
    pub(super) fn operand(&self, egraph: &mut Egg, at: usize, x: Id, number: Option<Id>) -> Id {
        let rank = shape(egraph, x).len();
        let axis = self.axes[at];
        let bordered = find(egraph, x, |n| match &n.op {
            Op::Pad(borders) => {
                let of_number = number.is_some_and(|of| egraph.find(of) == egraph.find(n.args[1]));
                let fits = of_number || is_zero(egraph, n.args[1], DEPTH);
                fits.then(|| (borders.clone(), n.args[0], n.args[1]))
            }
            _ => None,
        });
        let dtype = dtype(egraph, x);
        let (mut borders, x, fill) = match bordered {
            Some((borders, x, fill)) => (borders, x, Some(fill)),
            None => (SmallVec::from_elem((0, 0), rank), x, None),
        };
        borders[axis].1 += self.more[at];
        let mut order: Axes = (0..rank as u8).collect();
        if Some(at) == self.moved {
            let axis = order.remove(axis);
            order.push(axis);
        }
        let x = permuted(egraph, &order, x);
        if borders.iter().all(|&b| b == (0, 0)) {
            return x;
        }
        let fill = fill.unwrap_or_else(|| {
            // The numbers from 0 on, one of them.
            let zero = add(egraph, Op::Iota(Shape::from_elem(1, 1), 0), &[]);
            add(egraph, Op::Cast(dtype), &[zero])
        });
        let borders = order.iter().map(|&a| borders[usize::from(a)]).collect();
        add(egraph, Op::Pad(borders), &[x, fill])
    }
}

/// contract(i * s, j * t) = contract(i, j) * (s * t), the product of integers.
pub(super) fn contract_of_integers(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let to = egraph[node.args[0]].data.ty.dtype;
    let constant = [0, 1].map(|k: usize| egraph[node.args[k]].data.constant);
    if !to.is_float() || !sum_fits(contract) {
        return None;
    }
    let pairs = match in_words(contract, constant, Parts::Pairs) {
        true => None,
        false => Some(Worded::of(egraph, contract, &node.args, constant, Parts::Pairs)?),
    };
    let mut wholes = Vec::new();
    let mut scales = Vec::new();
    for at in 0..2 {
        let (whole, scale) = scaled(egraph, node.args[at], DEPTH)?;
        wholes.push(whole);
        scales.push(scale_of_result(egraph, contract, at, scale)?);
    }
    let sum = match of_bytes(egraph, contract, &wholes) {
        Some(sum) => sum,
        None => of_pairs(egraph, contract, &wholes, pairs)?,
    };
    let sum = add(egraph, Op::Cast(to), &[sum]);
    let scale = add(egraph, Op::Binary(BinaryFn::Mul), &scales);
    Some(add(egraph, Op::Binary(BinaryFn::Mul), &[sum, scale]))
}

/// Whether an i32 holds every sum of products of bytes.
pub(super) fn sum_fits(contract: &Contract) -> bool {
    contract.extents[contract.n_out..].iter().product::<usize>() <= MOST_SUMMED
}

/// A contraction of bytes without their zero points, or of differences of them, as one of i16.
fn of_pairs(
    egraph: &mut Egg,
    contract: &Contract,
    wholes: &[Id],
    pairs: Option<Worded>,
) -> Option<Id> {
    let mut args = Vec::new();
    for (at, &whole) in wholes.iter().enumerate() {
        let mut short = short(egraph, whole, DEPTH)?;
        if let Some(pairs) = &pairs {
            short = pairs.operand(egraph, at, short, None);
        }
        args.push(add(egraph, Op::Cast(DType::I32), &[short]));
    }
    let contract = pairs.map_or_else(|| contract.clone(), |pairs| pairs.contract);
    Some(add(egraph, Op::Contract(Box::new(contract)), &args))
}

/// contract(x, y) = contract(i32(i16(x)), i32(i16(y))) for bytes and differences of bytes; or the
/// same of bytes as they are.
pub(super) fn contract_of_shorts(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    match of_bytes(egraph, contract, &node.args) {
        Some(sum) => Some(sum),
        None => of_pairs(egraph, contract, &node.args, None),
    }
}

/// i32(x) - i32(y) = i32(i16(x) - i16(y)) for bytes: what a contraction reads is read by others.
pub(super) fn difference_of_bytes(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let bytes = difference(egraph, node)?;
    // Bytes without a zero point are not to be mixed up with what is multiplied in pairs.
    if egraph.analysis.dots.whole && is_zero(egraph, bytes[1], DEPTH) {
        return None;
    }
    let difference = short_difference(egraph, bytes);
    Some(add(egraph, Op::Cast(DType::I32), &[difference]))
}

/// max over windows of i * s = (max over windows of i) * s for a number s above 0, in i16 or in u8.
/// A border that is below all numbers is one of the least, where every window has an element
/// inside.
pub(super) fn pool_of_integers(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Reduce(ReduceFn::Max, _) = node.op else { return None };
    let window = find(egraph, node.args[0], |n| match &n.op {
        Op::Window(taps) => Some((taps.clone(), n.op.clone(), n.args[0])),
        _ => None,
    });
    let (taps, window, x) = window?;
    let lead = shape(egraph, x).len() - taps.len();
    let padded = find(egraph, x, |n| match &n.op {
        Op::Pad(borders) => Some((borders.clone(), n.args[0], n.args[1])),
        _ => None,
    });
    let inner = padded.as_ref().map_or(x, |p| p.1);
    let (whole, scale) = scaled(egraph, inner, 0)?;
    let to = dtype(egraph, x);
    let positive = number(egraph, scale).is_some_and(|s| s > 0.0) && to.is_float();
    if egraph[scale].data.ty.numel() != 1 || !positive {
        return None;
    }
    let (mut shorts, zero) = match egraph.analysis.dots.whole {
        true => unsigned(egraph, whole, 0)?,
        false => (short(egraph, whole, 0)?, None),
    };
    if let Some((borders, _, fill)) = padded {
        let below = number(egraph, fill).is_some_and(|v| v <= f64::from(f32::MIN));
        let (outer, along) = borders.split_at(lead);
        let within = along.iter().zip(&taps).all(|(b, t)| t.2 == 1 && b.0 < t.0 && b.1 < t.0);
        if !below || !within || outer.iter().any(|&b| b != (0, 0)) {
            return None;
        }
        // What is below all numbers becomes the least one.
        let fill = add(egraph, Op::Cast(dtype(egraph, shorts)), &[fill]);
        shorts = add(egraph, Op::Pad(borders), &[shorts, fill]);
    }
    let windows = add(egraph, window, &[shorts]);
    let most = add(egraph, node.op.clone(), &[windows]);
    let mut most = add(egraph, Op::Cast(DType::I32), &[most]);
    let unit = Shape::from_elem(1, shape(egraph, most).len());
    if let Some(zero) = zero {
        let zero = add(egraph, Op::Reshape(unit.clone()), &[zero]);
        most = add(egraph, Op::Binary(BinaryFn::Sub), &[most, zero]);
    }
    let most = add(egraph, Op::Cast(to), &[most]);
    let scale = add(egraph, Op::Reshape(unit), &[scale]);
    Some(add(egraph, Op::Binary(BinaryFn::Mul), &[most, scale]))
}

#[cfg(test)]
pub mod tests {
    use kiln_runtime::tensor::Tensor;
    use smallvec::smallvec;

    use super::*;
    use crate::graph::build::Added;
    use crate::graph::op::{Type, UnaryFn};
    use crate::graph::{Args, Graph, NodeId};

    /// A value in bytes, and back without its zero point: both i32.
    fn bytes(graph: &mut Graph, x: NodeId, zero: i64) -> Added {
        let o = "quantised".into();
        let y = graph.binary_number(BinaryFn::Mul, x, 4.0, &o)?;
        // Not halfway between two, where forms of x that are equal but for rounding would part.
        let y = graph.binary_number(BinaryFn::Add, y, 9.3, &o)?;
        let y = graph.unary(UnaryFn::Round, y, &o)?;
        let y = graph.cast(y, DType::U8, &o)?;
        let y = graph.cast(y, DType::I32, &o)?;
        let zero = graph.tensor(&Tensor::from_slice(&[], &[zero as u8]), &o);
        let zero = graph.cast(zero, DType::I32, &o)?;
        graph.binary(BinaryFn::Sub, y, zero, &o)
    }

    fn quarters(graph: &mut Graph, x: NodeId, to: DType) -> Added {
        let o = "quantised".into();
        let y = graph.cast(x, to, &o)?;
        graph.binary_number(BinaryFn::Mul, y, 0.25, &o)
    }

    /// A product, or a pooling, of what a value is in bytes.
    pub fn grow(graph: &mut Graph, draw: &mut dyn FnMut(usize) -> usize, x: NodeId) -> Added {
        let o = "quantised".into();
        let (to, shape) = (graph.ty(x).dtype, graph.ty(x).shape.clone());
        let zero = [0, 5][draw(2)];
        let whole = bytes(graph, x, zero)?;
        if shape.len() == 4 && draw(2) == 0 {
            let y = quarters(graph, whole, to)?;
            let below = graph.scalar(to, 0, f32::MIN.into(), &o);
            let borders = Op::Pad(smallvec![(0, 0), (0, 0), (1, 0), (1, 1)]);
            let y = graph.add(borders, &[y, below], &o)?;
            let y = graph.add(Op::Window(smallvec![(2, 1, 1), (2, 1, 1)]), &[y], &o)?;
            let y = graph.reduce(ReduceFn::Max, y, &[4, 5], &o)?;
            let to = graph.ty(y).shape[..4].to_vec();
            return graph.reshape(y, &to, &o);
        }
        let [k, n] = [shape[shape.len() - 1], [3, 10, 18][draw(3)]];
        let weights: Vec<i8> = (0..k * n).map(|_| draw(255) as i8).collect();
        let w = graph.tensor(&Tensor::from_slice(&[k, n], &weights), &o);
        // As if it were too large to be folded while the graph is built.
        let unfolded = |graph: &mut Graph, op: Op, args: &[NodeId], dtype: DType| {
            let ty = Type::of(dtype, graph.ty(args[0]).shape.clone());
            graph.push(op, Args::from_slice(args), ty, &"quantised".into())
        };
        let w = unfolded(graph, Op::Cast(DType::I32), &[w], DType::I32);
        if draw(3) == 0 {
            let w = graph.with_rank(w, shape.len(), &o)?;
            let y = graph.matmul(whole, w, &o)?;
            let y = graph.cast(y, to, &o)?;
            return graph.binary_number(BinaryFn::Mul, y, 1.0 / 1024.0, &o);
        }
        let scales: Vec<f64> = (0..n).map(|_| 0.5f64.powi(draw(4) as i32 + 8)).collect();
        let scales = graph.tensor(&Tensor::from_slice(&[1, n], &scales), &o);
        let scales = graph.cast(scales, to, &o)?;
        let w = unfolded(graph, Op::Cast(to), &[w], to);
        let w = unfolded(graph, Op::Binary(BinaryFn::Mul), &[w, scales], to);
        let w = graph.with_rank(w, shape.len(), &o)?;
        let y = quarters(graph, whole, to)?;
        graph.matmul(y, w, &o)
    }
}
