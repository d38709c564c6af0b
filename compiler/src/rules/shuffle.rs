//! Rules of shuffles: an axis is split in two, these are exchanged and joined again, as networks do
//! between convolutions of groups of channels. What treats every element alike, or each with its
//! own constants, may come before a shuffle, and a sum over shuffled channels reads them where they
//! lie: so a shuffle meets the product that it was meant for, and no data moves.

use egg::Id;
use smallvec::SmallVec;

use super::contract::with_parts;
use super::lang::{ENode, Egg};
use super::table::{add, permutation, reshaped, shape};
use crate::graph::op::{Affine, Axes, Op, Shape};

/// A shuffle: element `i * outer + j` along an axis is element `j * inner + i` of a value.
#[derive(Clone, Copy, PartialEq)]
struct Shuffle {
    axis: usize,
    outer: usize,
    inner: usize,
}

/// The shuffle that a class is, and of what.
fn shuffle(egraph: &Egg, id: Id) -> Option<(Shuffle, Id)> {
    let (axes, split) = permutation(egraph, reshaped(egraph, id)?)?;
    let axis = (0..axes.len()).find(|&d| axes[d] as usize != d)?;
    let exchanged = |(d, &a): (usize, &u8)| {
        a as usize
            == match d {
                _ if d == axis => axis + 1,
                _ if d == axis + 1 => axis,
                _ => d,
            }
    };
    let (whole, parts) = (shape(egraph, id), shape(egraph, split));
    let x = reshapes(egraph, split).find(|x| shape(egraph, *x) == whole)?;
    let joined = whole.len() + 1 == parts.len()
        && parts[axis..].iter().take(2).all(|&extent| extent > 1)
        && whole[..axis] == parts[..axis]
        && whole[axis + 1..] == parts[axis + 2..];
    let found = Shuffle { axis, outer: parts[axis], inner: *parts.get(axis + 1)? };
    (joined && axes.iter().enumerate().all(exchanged)).then_some((found, x))
}

/// All that a class is a reshape of.
fn reshapes(egraph: &Egg, id: Id) -> impl Iterator<Item = Id> + '_ {
    egraph[id].nodes.iter().filter(|n| matches!(n.op, Op::Reshape(_))).map(|n| n.args[0])
}

/// How many operations deep constants are looked at.
const DEPTH: usize = 4;

/// Whether a constant is one of the model, or made of such without moving any.
fn is_in_order(egraph: &Egg, id: Id, depth: usize) -> bool {
    egraph[id].nodes.iter().any(|n| match n.op {
        Op::Const(_) => true,
        Op::Unary(_) | Op::Binary(_) | Op::Cast(_) | Op::Reshape(_) if depth > 0 => {
            n.args.iter().all(|a| is_in_order(egraph, *a, depth - 1))
        }
        _ => false,
    })
}

impl Shuffle {
    /// The same along another axis.
    fn along(self, axis: usize) -> Shuffle {
        Shuffle { axis, ..self }
    }

    /// What undoes it.
    fn back(self) -> Shuffle {
        Shuffle { axis: self.axis, outer: self.inner, inner: self.outer }
    }

    /// A constant shuffled so, where it is one of the model or made of such in their order: were
    /// those shuffled again that were shuffled before, there would be no end where shuffles return
    /// to where they began.
    fn of_constant(self, egraph: &mut Egg, x: Id) -> Option<Id> {
        is_in_order(egraph, x, DEPTH).then(|| self.of(egraph, x))
    }

    /// A value shuffled so.
    fn of(self, egraph: &mut Egg, x: Id) -> Id {
        let whole = shape(egraph, x);
        let mut parts = Shape::from_slice(&whole[..self.axis]);
        parts.extend([self.outer, self.inner]);
        parts.extend_from_slice(&whole[self.axis + 1..]);
        let mut axes: Axes = (0..parts.len() as u8).collect();
        axes.swap(self.axis, self.axis + 1);
        let split = add(egraph, Op::Reshape(parts), &[x]);
        let exchanged = add(egraph, Op::Permute(axes), &[split]);
        add(egraph, Op::Reshape(whole), &[exchanged])
    }
}

/// f(shuffle(x), c) = shuffle(f(x, back(c)))
pub(super) fn pointwise_past_shuffle(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    if !matches!(node.op, Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_)) {
        return None;
    }
    let result = egraph.lookup(node.clone())?;
    let result = shape(egraph, result);
    let whole = |a: &&Id| !egraph[**a].data.constant && shape(egraph, **a) == result;
    let (how, _) = node.args.iter().filter(whole).find_map(|a| shuffle(egraph, *a))?;
    let mut args: SmallVec<[Id; 4]> = SmallVec::new();
    for &arg in &node.args {
        args.push(match shuffle(egraph, arg) {
            Some((other, x)) if other == how => x,
            _ if shape(egraph, arg)[how.axis] == 1 => arg,
            _ if egraph[arg].data.constant => how.back().of_constant(egraph, arg)?,
            _ => return None,
        });
    }
    let y = add(egraph, node.op.clone(), &args);
    Some(how.of(egraph, y))
}

/// pad(shuffle(x)) = shuffle(pad(x)), where the border lies along other axes.
pub(super) fn pad_past_shuffle(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Pad(borders) = &node.op else { return None };
    let (how, x) = shuffle(egraph, node.args[0])?;
    if borders[how.axis] != (0, 0) {
        return None;
    }
    let y = add(egraph, node.op.clone(), &[x, node.args[1]]);
    Some(how.of(egraph, y))
}

/// contract(shuffle(x), w) = shuffle(contract(x, back(w))), where an axis of the result is the
/// shuffled one and the weights are constant: a depthwise convolution.
pub(super) fn contract_past_shuffle(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let weights = (0..2).find(|&k| egraph[node.args[k]].data.constant)?;
    let (how, x) = shuffle(egraph, node.args[1 - weights])?;
    let extent = how.outer * how.inner;
    let axis = contract.maps[1 - weights][how.axis].as_axis()?;
    let is_alone = |k: usize, d: usize| {
        let uses = |(at, index): (usize, &Affine)| at == d || index.coefficient(axis) == 0;
        contract.maps[k].iter().enumerate().all(uses)
    };
    let along = contract.maps[weights].iter().position(|i| i.as_axis() == Some(axis))?;
    let fits = axis < contract.n_out
        && contract.extents[axis] == extent
        && shape(egraph, node.args[weights])[along] == extent
        && is_alone(1 - weights, how.axis)
        && is_alone(weights, along);
    if !fits {
        return None;
    }
    let mut args = node.args.clone();
    args[1 - weights] = x;
    args[weights] = how.along(along).back().of_constant(egraph, node.args[weights])?;
    let y = add(egraph, node.op.clone(), &args);
    Some(how.along(axis).of(egraph, y))
}

/// contract(shuffle(x), y) = contract'(x, y), where an axis of the sum runs through whole turns of
/// the shuffle, and groups begin with one: a convolution of groups of channels.
pub(super) fn contract_absorbs_shuffle(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let Op::Contract(contract) = &node.op else { return None };
    let at = (0..2).find(|&k| shuffle(egraph, node.args[k]).is_some())?;
    let (how, x) = shuffle(egraph, node.args[at])?;
    let (outer, inner) = (how.outer as i64, how.inner as i64);
    let index = &contract.maps[at][how.axis];
    let (group, axis) = match index.terms[..] {
        [(a, step), (b, 1)] if step != 1 => ((a, step), usize::from(b)),
        [(b, 1), (a, step)] => ((a, step), usize::from(b)),
        _ => return None,
    };
    let extent = contract.extents[axis];
    let whole = group.1 % outer == 0 && extent.is_multiple_of(how.outer) && index.offset == 0;
    if !whole || axis < contract.n_out || usize::from(group.0) >= contract.n_out {
        return None;
    }
    let mut split = with_parts(contract, axis, &[extent / how.outer, how.outer]);
    // Turns lie side by side in x, what is within one lies apart.
    split.maps[at][how.axis] =
        Affine::scaled(usize::from(group.0), group.1 / outer).plus(axis, 1).plus(axis + 1, inner);
    let mut args = node.args.clone();
    args[at] = x;
    Some(add(egraph, Op::Contract(Box::new(split)), &args))
}

#[cfg(test)]
pub mod tests {
    use kiln_runtime::tensor::{DType, Tensor};

    use crate::graph::build::Added;
    use crate::graph::op::{BinaryFn, Op};
    use crate::graph::{Graph, NodeId};

    fn weights(
        graph: &mut Graph,
        draw: &mut dyn FnMut(usize) -> usize,
        shape: &[usize],
        to: DType,
    ) -> Added {
        let o = "weights".into();
        let numbers: Vec<f64> =
            (0..shape.iter().product()).map(|_| draw(9) as f64 / 4.0 - 1.0).collect();
        let w = graph.tensor(&Tensor::from_slice(shape, &numbers), &o);
        graph.cast(w, to, &o)
    }

    /// Channels of a value, shuffled; then what may be done to each, and a convolution of groups.
    pub fn grow(graph: &mut Graph, draw: &mut dyn FnMut(usize) -> usize, x: NodeId) -> Added {
        let o = "shuffled".into();
        let (dtype, n) = (graph.ty(x).dtype, graph.ty(x).numel());
        let (outer, inner) = [(2, 2), (3, 2), (2, 4), (2, 3)][draw(4)];
        let channels = outer * inner;
        let last = draw(2) == 0;
        let (at, along) =
            if last { ([1, n, 1], [1, 1, channels]) } else { ([1, 1, n], [1, channels, 1]) };
        let x = graph.reshape(x, &at, &o)?;
        let c = weights(graph, draw, &along, dtype)?;
        let y = graph.binary(BinaryFn::Mul, x, c, &o)?;
        let y = if last {
            let y = graph.reshape(y, &[1, n, outer, inner], &o)?;
            let y = graph.permute(y, &[0, 3, 2, 1], &o)?;
            graph.reshape(y, &[1, channels, n], &o)?
        } else {
            let y = graph.reshape(y, &[1, outer, inner, n], &o)?;
            let y = graph.permute(y, &[0, 2, 1, 3], &o)?;
            graph.reshape(y, &[1, channels, n], &o)?
        };
        let y = match draw(3) {
            0 => {
                let zero = graph.scalar(dtype, 0, 0.0, &o);
                let borders = Op::Pad(smallvec::smallvec![(0, 0), (0, 0), (1, 1)]);
                graph.add(borders, &[y, zero], &o)?
            }
            1 => {
                let scale = weights(graph, draw, &[1, channels, 1], dtype)?;
                graph.binary(BinaryFn::Sub, y, scale, &o)?
            }
            _ => y,
        };
        let w = weights(graph, draw, &[channels, 1, 1], dtype)?;
        let y = match draw(2) {
            0 => graph.conv([y, w], (&[1], &[1]), channels, &o)?,
            _ => y,
        };
        let groups = outer.min(channels / outer);
        let w = weights(graph, draw, &[2 * groups, channels / groups, 1], dtype)?;
        graph.conv([y, w], (&[1], &[1]), groups, &o)
    }
}
