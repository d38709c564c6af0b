//! Products of bytes for targets that multiply these: u8 that lie in memory as they are, and i8
//! that are weights.

use egg::Id;
use kiln_runtime::tensor::DType;

use super::cost::in_words;
use super::integers::{
    DEPTH, Worded, cast_from, difference, dtype, is_byte, is_everywhere, is_zero, sum_fits,
};
use super::lang::Egg;
use super::table::{add, find, shape};
use crate::graph::Constant;
use crate::graph::eval::{Data, Value};
use crate::graph::op::{Axes, BinaryFn, Contract, Op, ReduceFn, Shape};
use crate::graph::scalar::Parts;

/// A contraction of bytes without their zero points, of which one operand is constant, as one of
/// bytes as they are: what the zero point of the other one adds to a sum, itself times the sum of
/// the weights, is taken from it.
pub(super) fn of_bytes(egraph: &mut Egg, contract: &Contract, wholes: &[Id]) -> Option<Id> {
    let constant = [0, 1].map(|k: usize| egraph[wholes[k]].data.constant);
    let [w, x] = match constant {
        [false, true] => [1, 0],
        [true, false] => [0, 1],
        _ => return None,
    };
    if !egraph.analysis.dots.whole || !sum_fits(contract) {
        return None;
    }
    let words = match in_words(contract, constant, Parts::Quads) {
        true => None,
        false => Some(Worded::of(egraph, contract, wholes, constant, Parts::Quads)?),
    };
    let mut weights = signed(egraph, wholes[w], DEPTH)?;
    let (mut bytes, zero) = unsigned(egraph, wholes[x], DEPTH)?;
    if let Some(words) = &words {
        let number = zero.map(|zero| add(egraph, Op::Cast(DType::U8), &[zero]));
        bytes = words.operand(egraph, x, bytes, number);
        weights = words.operand(egraph, w, weights, None);
    }
    let contract = words.map_or_else(|| contract.clone(), |words| words.contract);
    let mut args = [bytes; 2];
    args[w] = weights;
    let args = args.map(|arg| add(egraph, Op::Cast(DType::I32), &[arg]));
    let sums = match zero {
        Some(_) => Some(sums_of_weights(egraph, &contract, w, args[w])?),
        None => None,
    };
    let rank = contract.n_out;
    let product = add(egraph, Op::Contract(Box::new(contract)), &args);
    let Some((zero, sums)) = zero.zip(sums) else { return Some(product) };
    let zero = add(egraph, Op::Reshape(Shape::from_elem(1, rank)), &[zero]);
    let added = add(egraph, Op::Binary(BinaryFn::Mul), &[zero, sums]);
    Some(add(egraph, Op::Binary(BinaryFn::Sub), &[product, added]))
}

/// The sums of an operand of a contraction, in i32, at the place of its other axes in the result.
fn sums_of_weights(egraph: &mut Egg, contract: &Contract, at: usize, w: Id) -> Option<Id> {
    let mut summed = Axes::new();
    let mut to = Shape::from_elem(1, contract.n_out);
    let mut last = None;
    for (d, index) in contract.maps[at].iter().enumerate() {
        let extent = shape(egraph, w)[d];
        if extent == 1 {
            continue;
        }
        let axis = index.as_axis().filter(|&axis| contract.extents[axis] == extent)?;
        if axis >= contract.n_out {
            summed.push(d as u8);
        } else {
            // In the order of the result, so that they only have to be named anew.
            if last.is_some_and(|last| axis <= last) {
                return None;
            }
            last = Some(axis);
            to[axis] = extent;
        }
    }
    let sums = add(egraph, Op::Reduce(ReduceFn::Sum, summed), &[w]);
    Some(add(egraph, Op::Reshape(to), &[sums]))
}

/// The i8 that a constant i32 class is: one without a zero point, or a u8 with one of 128.
fn signed(egraph: &mut Egg, id: Id, depth: usize) -> Option<Id> {
    if !egraph[id].data.constant || dtype(egraph, id) != DType::I32 {
        return None;
    }
    if let Some(x) = cast_from(egraph, id, |from| from == DType::I8) {
        return Some(x);
    }
    if let Some([x, y]) = find(egraph, id, |n| difference(egraph, n)) {
        let all = |number: i128| {
            let same = |constant: &Constant| match Value::from_constant(constant).data {
                Data::Int(values) => values.iter().all(|&v| v == number),
                _ => false,
            };
            is_everywhere(egraph, y, &same, DEPTH)
        };
        return match dtype(egraph, x) {
            DType::I8 if all(0) => Some(x),
            DType::U8 if all(128) => {
                let [x, y] = [x, y].map(|x| add(egraph, Op::Cast(DType::I16), &[x]));
                let x = add(egraph, Op::Binary(BinaryFn::Sub), &[x, y]);
                Some(add(egraph, Op::Cast(DType::I8), &[x]))
            }
            _ => None,
        };
    }
    let node = find(egraph, id, |n| match &n.op {
        Op::Permute(_) | Op::Reshape(_) => Some(n.clone()),
        _ => None,
    })?;
    let x = signed(egraph, node.args[0], depth.checked_sub(1)?)?;
    Some(add(egraph, node.op, &[x]))
}

/// An i32 class as the u8 that it is, and the zero point that is taken from that, an i32.
pub(super) fn unsigned(egraph: &mut Egg, id: Id, depth: usize) -> Option<(Id, Option<Id>)> {
    if dtype(egraph, id) != DType::I32 {
        return None;
    }
    if let Some(x) = cast_from(egraph, id, is_byte) {
        return Some(raised(egraph, x, None));
    }
    if let Some([x, y]) = find(egraph, id, |n| difference(egraph, n)) {
        if is_zero(egraph, y, DEPTH) {
            return Some(raised(egraph, x, None));
        }
        let whole = dtype(egraph, y) == DType::I32;
        let y = if whole { y } else { add(egraph, Op::Cast(DType::I32), &[y]) };
        return (egraph[y].data.ty.numel() == 1).then(|| raised(egraph, x, Some(y)));
    }
    let padded = find(egraph, id, |n| match &n.op {
        Op::Pad(_) if is_zero(egraph, n.args[1], DEPTH) => Some(n.clone()),
        _ => None,
    })?;
    let (x, zero) = unsigned(egraph, padded.args[0], depth.checked_sub(1)?)?;
    let fill = add(egraph, Op::Cast(DType::U8), &[zero.unwrap_or(padded.args[1])]);
    Some((add(egraph, padded.op, &[x, fill]), zero))
}

/// Bytes and their zero point as u8: i8 are raised by 128, and so is that.
fn raised(egraph: &mut Egg, x: Id, zero: Option<Id>) -> (Id, Option<Id>) {
    if dtype(egraph, x) == DType::U8 {
        return (x, zero);
    }
    // The last of the numbers from 0 on.
    let numbers = add(egraph, Op::Iota(Shape::from_elem(129, 1), 0), &[]);
    let most = add(egraph, Op::Reduce(ReduceFn::Max, Axes::from_elem(0, 1)), &[numbers]);
    let raise = |egraph: &mut Egg, x: Id, to: DType| {
        let by = add(egraph, Op::Reshape(Shape::from_elem(1, shape(egraph, x).len())), &[most]);
        let args = [x, by].map(|x| add(egraph, Op::Cast(to), &[x]));
        add(egraph, Op::Binary(BinaryFn::Add), &args)
    };
    let shorts = raise(egraph, x, DType::I16);
    let zero = match zero {
        Some(zero) => raise(egraph, zero, DType::I32),
        None => add(egraph, Op::Cast(DType::I32), &[most]),
    };
    (add(egraph, Op::Cast(DType::U8), &[shorts]), Some(zero))
}
