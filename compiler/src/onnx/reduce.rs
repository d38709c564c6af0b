//! Operators that fold axes.

use kiln_runtime::tensor::DType;

use super::call::{Call, Outputs, not_supported, one};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Shape, UnaryFn};

/// The axes to fold, or `None` where nothing is to be done; and whether they stay.
fn axes_of(call: &mut Call, rank: usize) -> Result<(Option<Vec<usize>>, bool), Diagnostic> {
    let keep = call.int_or("keepdims", 1) != 0;
    let nothing = call.int_or("noop_with_empty_axes", 0) != 0;
    let axes = match call.ints("axes") {
        Some(axes) => Some(axes),
        None => call.ints_input(1)?,
    };
    let axes = match axes {
        Some(axes) if !axes.is_empty() => Some(call.axes(&axes, rank)?),
        _ if nothing => None,
        _ => Some((0..rank).collect()),
    };
    Ok((axes, keep))
}

/// x without the folded axes.
fn drop_axes(call: &mut Call, x: NodeId, axes: &[usize], keep: bool) -> Added {
    if keep {
        return Ok(x);
    }
    let shape = call.shape(x);
    let kept: Vec<usize> =
        (0..shape.len()).filter(|d| !axes.contains(d)).map(|d| shape[d]).collect();
    call.graph.reshape(x, &kept, &call.origin)
}

type Step = fn(&mut Call, NodeId) -> Added;

/// `after(f over axes of before(x))`
fn fold(call: &mut Call, f: ReduceFn, before: Step, after: Step) -> Outputs {
    let x = call.input(0)?;
    let (axes, keep) = axes_of(call, call.graph.ty(x).rank())?;
    let x = before(call, x)?;
    let y = match &axes {
        Some(axes) => call.graph.reduce(f, x, axes, &call.origin)?,
        None => x,
    };
    let y = after(call, y)?;
    one(drop_axes(call, y, axes.as_deref().unwrap_or(&[]), keep)?)
}

fn same(_: &mut Call, x: NodeId) -> Added {
    Ok(x)
}

fn square(call: &mut Call, x: NodeId) -> Added {
    call.graph.binary(BinaryFn::Mul, x, x, &call.origin)
}

fn unary<const F: usize>(call: &mut Call, x: NodeId) -> Added {
    const FUNCTIONS: [UnaryFn; 4] = [UnaryFn::Abs, UnaryFn::Sqrt, UnaryFn::Log, UnaryFn::Exp];
    call.graph.unary(FUNCTIONS[F], x, &call.origin)
}

/// An integer's root through f64.
fn root(call: &mut Call, x: NodeId) -> Added {
    let dtype = call.ty(x).dtype;
    if dtype.is_float() {
        return unary::<1>(call, x);
    }
    let wide = call.graph.cast(x, DType::F64, &call.origin)?;
    let root = unary::<1>(call, wide)?;
    call.graph.cast(root, dtype, &call.origin)
}

pub(super) fn sum(call: &mut Call) -> Outputs {
    fold(call, ReduceFn::Sum, same, same)
}

pub(super) fn prod(call: &mut Call) -> Outputs {
    fold(call, ReduceFn::Prod, same, same)
}

/// Bools are folded as numbers.
fn extreme(call: &mut Call, f: ReduceFn) -> Outputs {
    let x = call.input(0)?;
    if call.ty(x).dtype != DType::Bool {
        return fold(call, f, same, same);
    }
    fold(
        call,
        f,
        |c, x| c.graph.cast(x, DType::U8, &c.origin),
        |c, x| c.graph.cast(x, DType::Bool, &c.origin),
    )
}

pub(super) fn max(call: &mut Call) -> Outputs {
    extreme(call, ReduceFn::Max)
}

pub(super) fn min(call: &mut Call) -> Outputs {
    extreme(call, ReduceFn::Min)
}

pub(super) fn sum_square(call: &mut Call) -> Outputs {
    fold(call, ReduceFn::Sum, square, same)
}

pub(super) fn l1(call: &mut Call) -> Outputs {
    fold(call, ReduceFn::Sum, unary::<0>, same)
}

pub(super) fn l2(call: &mut Call) -> Outputs {
    fold(call, ReduceFn::Sum, square, root)
}

pub(super) fn log_sum(call: &mut Call) -> Outputs {
    fold(call, ReduceFn::Sum, same, unary::<2>)
}

/// ln of the sum of e^x, shifted by the maximum so that nothing overflows.
pub(super) fn log_sum_exp(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let (axes, keep) = axes_of(call, call.graph.ty(x).rank())?;
    let axes = axes.unwrap_or_default();
    if axes.iter().any(|&a| call.graph.ty(x).shape[a] == 0) {
        return fold(call, ReduceFn::Sum, unary::<3>, unary::<2>);
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let max = g.reduce(ReduceFn::Max, x, &axes, o)?;
    let shifted = g.binary(BinaryFn::Sub, x, max, o)?;
    let exp = g.unary(UnaryFn::Exp, shifted, o)?;
    let total = g.reduce(ReduceFn::Sum, exp, &axes, o)?;
    let log = g.unary(UnaryFn::Log, total, o)?;
    let y = g.binary(BinaryFn::Add, log, max, o)?;
    one(drop_axes(call, y, &axes, keep)?)
}

pub(super) fn mean(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let (axes, keep) = axes_of(call, call.graph.ty(x).rank())?;
    let Some(axes) = axes else { return one(x) };
    let dtype = call.ty(x).dtype;
    let y = if dtype.is_float() {
        call.graph.mean(x, &axes, &call.origin)?
    } else {
        let count: usize = axes.iter().map(|&a| call.graph.ty(x).shape[a]).product();
        let total = call.graph.reduce(ReduceFn::Sum, x, &axes, &call.origin)?;
        call.graph.binary_number(BinaryFn::Div, total, count.max(1) as f64, &call.origin)?
    };
    one(drop_axes(call, y, &axes, keep)?)
}

/// The first (or last) place of the extreme along an axis: the extreme of the indices where it is.
fn arg_extreme(call: &mut Call, f: ReduceFn) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let axis = call.axis(call.int_or("axis", 0), ty.rank())?;
    let keep = call.int_or("keepdims", 1) != 0;
    let last = call.int_or("select_last_index", 0) != 0;
    let extent = ty.shape[axis];
    let (g, o) = (&mut *call.graph, &call.origin);
    let best = g.reduce(f, x, &[axis], o)?;
    let here = g.binary(BinaryFn::Eq, x, best, o)?;
    let index = g.add(Op::Iota(ty.shape.clone(), axis as u8), &[], o)?;
    let (none, pick) = match last {
        true => (-1.0, ReduceFn::Max),
        false => (extent as f64, ReduceFn::Min),
    };
    let none = g.scalar(DType::I64, ty.rank(), none, o);
    let candidates = g.select(here, index, none, o)?;
    let y = g.reduce(pick, candidates, &[axis], o)?;
    one(drop_axes(call, y, &[axis], keep)?)
}

pub(super) fn arg_max(call: &mut Call) -> Outputs {
    arg_extreme(call, ReduceFn::Max)
}

pub(super) fn arg_min(call: &mut Call) -> Outputs {
    arg_extreme(call, ReduceFn::Min)
}

pub(super) fn cum_sum(call: &mut Call) -> Outputs {
    running(call, ReduceFn::Sum, 0.0)
}

pub(super) fn cum_prod(call: &mut Call) -> Outputs {
    running(call, ReduceFn::Prod, 1.0)
}

/// f of all elements up to each one, along an axis.
fn running(call: &mut Call, f: ReduceFn, identity: f64) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let axis = call.ints_input(1)?.and_then(|a| a.first().copied());
    let axis = axis.ok_or_else(|| not_supported("a running sum without an axis"))?;
    let axis = call.axis(axis, ty.rank())?;
    let exclusive = call.int_or("exclusive", 0) != 0;
    let reverse = call.int_or("reverse", 0) != 0;
    let n = ty.shape[axis];
    let along = |start: i64, step: i64, extent: usize| {
        let mut ranges: smallvec::SmallVec<[(i64, i64, usize); 6]> =
            ty.shape.iter().map(|&e| (0, 1, e)).collect();
        ranges[axis] = (start, step, extent);
        Op::Slice(ranges)
    };
    if n == 0 {
        return one(x);
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let flip = || along(n as i64 - 1, -1, n);
    let mut y = if reverse { g.add(flip(), &[x], o)? } else { x };
    y = g.add(Op::Scan(f, axis as u8), &[y], o)?;
    if exclusive {
        let first = g.scalar(ty.dtype, 0, identity, o);
        let cut = g.add(along(0, 1, n - 1), &[y], o)?;
        let mut borders = smallvec::SmallVec::from_elem((0, 0), ty.rank());
        borders[axis] = (1, 0);
        y = g.add(Op::Pad(borders), &[cut, first], o)?;
    }
    if reverse {
        y = g.add(flip(), &[y], o)?;
    }
    one(y)
}

/// Before opset 13, softmax treats all axes from `axis` on as one.
fn over_axis(call: &mut Call, f: impl Fn(&mut Call, NodeId, usize) -> Added) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let rank = shape.len();
    if call.opset >= 13 {
        let axis = call.axis(call.int_or("axis", -1), rank)?;
        return one(f(call, x, axis)?);
    }
    let axis = call.axis(call.int_or("axis", 1), rank)?;
    let inner: usize = shape[axis..].iter().product();
    let mut joined = Shape::from_slice(&shape[..axis]);
    joined.push(inner);
    let flat = call.graph.reshape(x, &joined, &call.origin)?;
    let y = f(call, flat, axis)?;
    one(call.graph.reshape(y, &shape, &call.origin)?)
}

pub(super) fn softmax(call: &mut Call) -> Outputs {
    over_axis(call, |c, x, axis| c.graph.composite(Composite::Softmax(axis as u8), x, &c.origin))
}

pub(super) fn log_softmax(call: &mut Call) -> Outputs {
    over_axis(call, log_softmax_of)
}

/// x - max - ln of the sum of e^(x - max), over one axis.
pub(super) fn log_softmax_of(call: &mut Call, x: NodeId, axis: usize) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let max = g.reduce(ReduceFn::Max, x, &[axis], o)?;
    let shifted = g.binary(BinaryFn::Sub, x, max, o)?;
    let exp = g.unary(UnaryFn::Exp, shifted, o)?;
    let total = g.reduce(ReduceFn::Sum, exp, &[axis], o)?;
    let log = g.unary(UnaryFn::Log, total, o)?;
    g.binary(BinaryFn::Sub, shifted, log, o)
}

/// 1 at the first greatest element of an axis, else 0.
pub(super) fn hardmax(call: &mut Call) -> Outputs {
    over_axis(call, |c, x, axis| {
        let ty = c.ty(x);
        let (g, o) = (&mut *c.graph, &c.origin);
        let best = g.reduce(ReduceFn::Max, x, &[axis], o)?;
        let here = g.binary(BinaryFn::Eq, x, best, o)?;
        let index = g.add(Op::Iota(ty.shape.clone(), axis as u8), &[], o)?;
        let none = g.scalar(DType::I64, ty.rank(), ty.shape[axis] as f64, o);
        let candidates = g.select(here, index, none, o)?;
        let first = g.reduce(ReduceFn::Min, candidates, &[axis], o)?;
        let first = g.binary(BinaryFn::Eq, index, first, o)?;
        g.cast(first, ty.dtype, o)
    })
}
