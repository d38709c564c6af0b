//! Operators that move elements or speak of shapes.

use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::call::{Call, Outputs, not_supported, one};
use super::place;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::eval::strides;
use crate::graph::op::{BinaryFn, Op, ReduceFn, Shape};

fn extent(value: i64) -> Result<usize, Diagnostic> {
    usize::try_from(value)
        .map_err(|_| Diagnostic::new("K0122", "a negative extent").found(value.to_string()))
}

/// Integers from an attribute in old opsets, from an operand in new ones.
fn ints_of(call: &mut Call, name: &str, index: usize) -> Result<Option<Vec<i64>>, Diagnostic> {
    match call.ints(name) {
        Some(ints) => Ok(Some(ints)),
        None => call.ints_input(index),
    }
}

pub(super) fn reshape(call: &mut Call) -> Outputs {
    call.ignore("consumed_inputs");
    let allow_zero = call.int_or("allowzero", 0) != 0;
    let x = call.input(0)?;
    let from = call.shape(x);
    let wanted =
        ints_of(call, "shape", 1)?.ok_or_else(|| not_supported("a reshape without a shape"))?;
    let mut shape = Shape::new();
    let mut open = None;
    for (i, &n) in wanted.iter().enumerate() {
        shape.push(match n {
            0 if !allow_zero => *from.get(i).ok_or_else(|| not_supported("0 beyond the rank"))?,
            -1 => {
                open = Some(i);
                1
            }
            n => extent(n)?,
        });
    }
    if let Some(at) = open {
        let rest = shape.iter().try_fold(1usize, |p, &e| p.checked_mul(e)).unwrap_or(0);
        shape[at] = call.ty(x).numel().checked_div(rest).unwrap_or(0);
    }
    one(call.graph.reshape(x, &shape, &call.origin)?)
}

pub(super) fn transpose(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let rank = call.ty(x).rank();
    let axes = match call.ints("perm") {
        Some(axes) => call.axes(&axes, rank)?,
        None => (0..rank).rev().collect(),
    };
    one(call.graph.permute(x, &axes, &call.origin)?)
}

pub(super) fn squeeze(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let axes = match ints_of(call, "axes", 1)? {
        Some(axes) => call.axes(&axes, shape.len())?,
        None => (0..shape.len()).filter(|&d| shape[d] == 1).collect(),
    };
    let kept: Vec<usize> =
        (0..shape.len()).filter(|d| !axes.contains(d)).map(|d| shape[d]).collect();
    one(call.graph.reshape(x, &kept, &call.origin)?)
}

pub(super) fn unsqueeze(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let axes = ints_of(call, "axes", 1)?.ok_or_else(|| not_supported("unsqueeze without axes"))?;
    let rank = shape.len() + axes.len();
    let axes = call.axes(&axes, rank)?;
    let mut rest = shape.iter();
    let shape: Option<Shape> =
        (0..rank).map(|d| if axes.contains(&d) { Some(1) } else { rest.next().copied() }).collect();
    let shape = shape.ok_or_else(|| not_supported("unsqueeze of an axis twice"))?;
    one(call.graph.reshape(x, &shape, &call.origin)?)
}

pub(super) fn flatten(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let rank = shape.len();
    let axis = call.int_or("axis", 1);
    let axis = if axis == rank as i64 { rank } else { call.axis(axis, rank.max(1))? };
    let sizes = [shape[..axis].iter().product(), shape[axis..].iter().product()];
    one(call.graph.reshape(x, &sizes, &call.origin)?)
}

/// x repeated to a shape that may have more axes, or 1 where x has more.
fn expand_to(call: &mut Call, x: NodeId, shape: &[usize]) -> Added {
    let rank = shape.len().max(call.ty(x).rank());
    let x = call.graph.with_rank(x, rank, &call.origin)?;
    let mut target: Shape = std::iter::repeat_n(1, rank - shape.len()).collect();
    target.extend_from_slice(shape);
    let from = call.shape(x);
    for (to, &from) in target.iter_mut().zip(&from) {
        if *to == 1 {
            *to = from;
        }
    }
    call.graph.expand(x, &target, &call.origin)
}

pub(super) fn expand(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.ints_input(1)?.ok_or_else(|| not_supported("an expand without a shape"))?;
    let shape: Vec<usize> = shape.into_iter().map(extent).collect::<Result<_, _>>()?;
    one(expand_to(call, x, &shape)?)
}

pub(super) fn tile(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let repeats = call.ints_input(1)?.ok_or_else(|| not_supported("a tile without repeats"))?;
    if repeats.len() != shape.len() || call.opset < 6 {
        return Err(not_supported(format!("repeats {repeats:?} of {shape:?}")));
    }
    // [a, b] -> [1, a, 1, b] -> [r, a, s, b] -> [r * a, s * b]
    let (mut apart, mut spread, mut joined) = (Shape::new(), Shape::new(), Shape::new());
    for (&e, &r) in shape.iter().zip(&repeats) {
        let r = extent(r)?;
        apart.extend([1, e]);
        spread.extend([r, e]);
        joined.push(r.checked_mul(e).ok_or_else(|| not_supported("an extent that overflows"))?);
    }
    let y = call.graph.reshape(x, &apart, &call.origin)?;
    let y = call.graph.expand(y, &spread, &call.origin)?;
    one(call.graph.reshape(y, &joined, &call.origin)?)
}

pub(super) fn pad(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let rank = ty.rank();
    let mode = call.string_or("mode", "constant");
    let pads = match call.ints("pads").or(call.ints("paddings")) {
        Some(pads) => pads,
        None => call.ints_input(1)?.ok_or_else(|| not_supported("a pad without pads"))?,
    };
    let axes = match call.ints_input(3)? {
        Some(axes) => call.axes(&axes, rank)?,
        None => (0..rank).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return Err(not_supported(format!("{} pads for {} axes", pads.len(), axes.len())));
    }
    let mut borders = vec![(0i64, 0i64); rank];
    for (i, &axis) in axes.iter().enumerate() {
        borders[axis] = (pads[i], pads[axes.len() + i]);
    }
    let fill = match call.optional(2) {
        Some(fill) => call.graph.reshape(fill, &[], &call.origin)?,
        None => {
            let value = f64::from(call.float_or("value", 0.0));
            call.number(ty.dtype, 0, value)
        }
    };
    call.ignore("value");
    match mode.as_str() {
        "constant" => one(pad_constant(call, x, &borders, fill)?),
        "edge" | "reflect" | "wrap" => one(pad_gather(call, x, &borders, &mode)?),
        other => Err(not_supported(format!("padding mode {other}"))),
    }
}

/// Padding by a value; negative borders cut.
pub(super) fn pad_constant(
    call: &mut Call,
    x: NodeId,
    borders: &[(i64, i64)],
    fill: NodeId,
) -> Added {
    let shape = call.shape(x);
    let mut cut: SmallVec<[(i64, i64, usize); 6]> = SmallVec::new();
    let mut grow: SmallVec<[(usize, usize); 6]> = SmallVec::new();
    for (&e, &(before, after)) in shape.iter().zip(borders) {
        let (cut_before, cut_after) = (before.min(0).unsigned_abs(), after.min(0).unsigned_abs());
        let kept = (e as u64).checked_sub(cut_before).and_then(|e| e.checked_sub(cut_after));
        let kept = kept.ok_or_else(|| not_supported("a negative pad larger than the axis"))?;
        let start = if kept == 0 { 0 } else { cut_before as i64 };
        cut.push((start, 1, kept as usize));
        grow.push((extent(before.max(0))?, extent(after.max(0))?));
    }
    let y = call.graph.add(Op::Slice(cut), &[x], &call.origin)?;
    call.graph.add(Op::Pad(grow), &[y, fill], &call.origin)
}

/// Places of an index that the importer writes out.
const MOST_PLACES: u64 = 1 << 24;

/// Padding by elements of the operand: a gather along each axis.
fn pad_gather(call: &mut Call, x: NodeId, borders: &[(i64, i64)], mode: &str) -> Added {
    let mut y = x;
    for (axis, &(before, after)) in borders.iter().enumerate() {
        let n = call.shape(y)[axis] as i64;
        if (before, after) == (0, 0) {
            continue;
        }
        let wild = before.unsigned_abs().max(after.unsigned_abs()).max(n as u64) > MOST_PLACES;
        if n == 0 || wild || before + n + after < 0 {
            return Err(not_supported(format!("{mode} padding of {n} by {before} and {after}")));
        }
        let from = |i: i64| match mode {
            "edge" => i.clamp(0, n - 1),
            "wrap" => i.rem_euclid(n),
            _ if n == 1 => 0,
            _ => {
                let i = i.rem_euclid(2 * (n - 1));
                i.min(2 * (n - 1) - i)
            }
        };
        let places: Vec<i64> = (-before..n + after).map(from).collect();
        let index = call.graph.i64s(&[places.len()], &places, &call.origin);
        y = call.graph.add(Op::Gather(axis as u8), &[y, index], &call.origin)?;
    }
    Ok(y)
}

pub(super) fn slice(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let starts =
        ints_of(call, "starts", 1)?.ok_or_else(|| not_supported("a slice without starts"))?;
    let ends = ints_of(call, "ends", 2)?.ok_or_else(|| not_supported("a slice without ends"))?;
    let axes = match ints_of(call, "axes", 3)? {
        Some(axes) => call.axes(&axes, shape.len())?,
        None => (0..starts.len()).collect(),
    };
    let steps = call.ints_input(4)?.unwrap_or_else(|| vec![1; starts.len()]);
    let count = starts.len();
    let fits = [ends.len(), axes.len(), steps.len()].iter().all(|&n| n == count)
        && axes.iter().all(|&a| a < shape.len())
        && !steps.contains(&0);
    if !fits {
        return Err(not_supported("starts, ends, axes and steps of other lengths, or a step of 0"));
    }
    let mut ranges: SmallVec<[(i64, i64, usize); 6]> = shape.iter().map(|&e| (0, 1, e)).collect();
    for i in 0..count {
        let n = shape[axes[i]] as i64;
        let at = |v: i64| if v < 0 { v.saturating_add(n) } else { v };
        let step = steps[i];
        let (least, most) = if step > 0 { (0, n) } else { (-1, n - 1) };
        if !call.graph.dims.is_empty() {
            let bounds = [starts[i], ends[i]].into_iter();
            let beyond = bounds.filter(|&bound| !(least..=most).contains(&at(bound)));
            call.graph.beyond.extend(beyond.map(|bound| (call.origin.clone(), bound)));
        }
        let (start, end) = (at(starts[i]).clamp(least, most), at(ends[i]).clamp(least, most));
        let reach = if step > 0 { end - start } else { start - end };
        let length = if reach <= 0 { 0 } else { (reach as u64).div_ceil(step.unsigned_abs()) };
        let start = if length == 0 { 0 } else { start };
        ranges[axes[i]] = (start, if length <= 1 { 1 } else { step }, length as usize);
    }
    one(call.graph.add(Op::Slice(ranges), &[x], &call.origin)?)
}

pub(super) fn split(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let axis = call.axis(call.int_or("axis", 0), shape.len())?;
    let parts = match ints_of(call, "split", 1)? {
        Some(parts) => parts.into_iter().map(extent).collect::<Result<Vec<usize>, _>>()?,
        None => {
            let count = extent(call.int_or("num_outputs", call.n_outputs() as i64))?.max(1);
            if count != call.n_outputs() {
                return Err(not_supported(format!("{count} parts, {} outputs", call.n_outputs())));
            }
            let part = shape[axis].div_ceil(count);
            (0..count).map(|i| part.min(shape[axis].saturating_sub(i * part))).collect()
        }
    };
    call.ignore("num_outputs");
    let total = parts.iter().try_fold(0usize, |sum, &part| sum.checked_add(part));
    if total != Some(shape[axis]) {
        return Err(not_supported(format!("parts {parts:?} of an axis of {}", shape[axis])));
    }
    let mut start = 0;
    let mut outputs = Vec::new();
    for part in parts {
        let mut ranges: SmallVec<[(i64, i64, usize); 6]> =
            shape.iter().map(|&e| (0, 1, e)).collect();
        ranges[axis] = (if part == 0 { 0 } else { start as i64 }, 1, part);
        start += part;
        outputs.push(Some(call.graph.add(Op::Slice(ranges), &[x], &call.origin)?));
    }
    Ok(outputs)
}

pub(super) fn concat(call: &mut Call) -> Outputs {
    let parts: Vec<NodeId> =
        (0..call.n_inputs()).map(|i| call.input(i)).collect::<Result<_, _>>()?;
    let first = *parts.first().ok_or_else(|| not_supported("a concat of nothing"))?;
    let axis = call.axis(call.int_or("axis", 1), call.ty(first).rank())?;
    one(call.graph.add(Op::Concat(axis as u8), &parts, &call.origin)?)
}

pub(super) fn gather(call: &mut Call) -> Outputs {
    let (x, index) = (call.input(0)?, call.input(1)?);
    let axis = call.axis(call.int_or("axis", 0), call.ty(x).rank())?;
    one(call.graph.add(Op::Gather(axis as u8), &[x, index], &call.origin)?)
}

/// An index as i64, from the end where negative.
fn positive(call: &mut Call, index: NodeId, extent: usize) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let index = g.cast(index, DType::I64, o)?;
    let negative = g.binary_number(BinaryFn::Lt, index, 0.0, o)?;
    let moved = g.binary_number(BinaryFn::Add, index, extent as f64, o)?;
    g.select(negative, moved, index, o)
}

/// The flat places of `x[i.., index[i..], i..]` for an index of x's rank.
pub(super) fn element_places(call: &mut Call, x: NodeId, index: NodeId, axis: usize) -> Added {
    let (shape, steps) = (call.shape(x), strides(&call.shape(x)));
    let of = call.shape(index);
    let at = positive(call, index, shape[axis])?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut place = g.binary_number(BinaryFn::Mul, at, steps[axis] as f64, o)?;
    for d in (0..shape.len()).filter(|&d| d != axis) {
        let along = g.add(Op::Iota(of.clone(), d as u8), &[], o)?;
        let step = g.binary_number(BinaryFn::Mul, along, steps[d] as f64, o)?;
        place = g.binary(BinaryFn::Add, place, step, o)?;
    }
    Ok(place)
}

pub(super) fn gather_elements(call: &mut Call) -> Outputs {
    let (x, index) = (call.input(0)?, call.input(1)?);
    let ty = call.ty(x);
    let axis = call.axis(call.int_or("axis", 0), ty.rank())?;
    let place = element_places(call, x, index, axis)?;
    let flat = call.graph.reshape(x, &[ty.numel()], &call.origin)?;
    one(call.graph.add(Op::Gather(0), &[flat, place], &call.origin)?)
}

/// The flat places of the leading axes that the last axis of an index names.
fn nd_places(call: &mut Call, shape: &[usize], index: NodeId, skip: usize) -> Added {
    let of = call.shape(index);
    let last = of.len() - 1;
    let steps = strides(shape);
    let mut place = None;
    for k in 0..of[last] {
        let ranges = of
            .iter()
            .enumerate()
            .map(|(d, &e)| if d == last { (k as i64, 1, 1) } else { (0, 1, e) });
        let part = call.graph.add(Op::Slice(ranges.collect()), &[index], &call.origin)?;
        let part = call.graph.reshape(part, &of[..last], &call.origin)?;
        let part = positive(call, part, shape[skip + k])?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let step = g.binary_number(BinaryFn::Mul, part, steps[skip + k] as f64, o)?;
        place = Some(match place {
            None => step,
            Some(before) => g.binary(BinaryFn::Add, before, step, o)?,
        });
    }
    place.ok_or_else(|| not_supported("an index of no axes"))
}

pub(super) fn gather_nd(call: &mut Call) -> Outputs {
    let (x, index) = (call.input(0)?, call.input(1)?);
    let batch = extent(call.int_or("batch_dims", 0))?;
    let (shape, of) = (call.shape(x), call.shape(index));
    let depth = of.last().copied().unwrap_or(0);
    if batch + depth > shape.len() || of.is_empty() || batch >= of.len() {
        return Err(not_supported(format!("an index {of:?} into {shape:?}")));
    }
    if batch == 0
        && depth > 0
        && let Some(view) = place::view(call.graph, [x, index], &call.origin)?
    {
        return one(view);
    }
    let lead = batch + depth;
    let mut place = nd_places(call, &shape[..lead], index, batch)?;
    let places = &of[..of.len() - 1];
    for (d, &step) in strides(&shape[..lead]).iter().enumerate().take(batch) {
        let (g, o) = (&mut *call.graph, &call.origin);
        let along = g.add(Op::Iota(Shape::from_slice(places), d as u8), &[], o)?;
        let step = g.binary_number(BinaryFn::Mul, along, step as f64, o)?;
        place = g.binary(BinaryFn::Add, place, step, o)?;
    }
    let mut rows = Shape::from_slice(&[shape[..lead].iter().product()]);
    rows.extend_from_slice(&shape[lead..]);
    let flat = call.graph.reshape(x, &rows, &call.origin)?;
    one(call.graph.add(Op::Gather(0), &[flat, place], &call.origin)?)
}

fn scatter_fold(call: &mut Call) -> Result<Option<ReduceFn>, Diagnostic> {
    Ok(match call.string_or("reduction", "none").as_str() {
        "none" => None,
        "add" => Some(ReduceFn::Sum),
        "mul" => Some(ReduceFn::Prod),
        "max" => Some(ReduceFn::Max),
        "min" => Some(ReduceFn::Min),
        other => return Err(not_supported(format!("reduction {other}"))),
    })
}

pub(super) fn scatter_nd(call: &mut Call) -> Outputs {
    let (x, index, updates) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let f = scatter_fold(call)?;
    let (shape, of) = (call.shape(x), call.shape(index));
    let depth = of.last().copied().unwrap_or(0);
    if depth == 0 || depth > shape.len() {
        return Err(not_supported(format!("an index {of:?} into {shape:?}")));
    }
    let place = nd_places(call, &shape[..depth], index, 0)?;
    let count: usize = of[..of.len() - 1].iter().product();
    let (g, o) = (&mut *call.graph, &call.origin);
    let place = g.reshape(place, &[count], o)?;
    let mut rows = Shape::from_slice(&[shape[..depth].iter().product()]);
    rows.extend_from_slice(&shape[depth..]);
    let flat = g.reshape(x, &rows, o)?;
    rows[0] = count;
    let updates = g.reshape(updates, &rows, o)?;
    let result = g.add(Op::Scatter(f), &[flat, place, updates], o)?;
    one(g.reshape(result, &shape, o)?)
}

pub(super) fn scatter_elements(call: &mut Call) -> Outputs {
    let (x, index, updates) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let f = scatter_fold(call)?;
    let ty = call.ty(x);
    let axis = call.axis(call.int_or("axis", 0), ty.rank())?;
    let place = element_places(call, x, index, axis)?;
    let count = call.ty(index).numel();
    let (g, o) = (&mut *call.graph, &call.origin);
    let place = g.reshape(place, &[count], o)?;
    let flat = g.reshape(x, &[ty.numel()], o)?;
    let updates = g.reshape(updates, &[count], o)?;
    let result = g.add(Op::Scatter(f), &[flat, place, updates], o)?;
    one(g.reshape(result, &ty.shape, o)?)
}

pub(super) fn shape(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let rank = call.shape(x).len() as i64;
    let at = |v: i64| (if v < 0 { v + rank } else { v }).clamp(0, rank) as usize;
    let (start, end) = (at(call.int_or("start", 0)), at(call.int_or("end", rank)));
    let (from, to) = (start.min(end), end);
    let some = |extents: &[i64]| extents[from..to].to_vec();
    one(call.graph.of_extents(x, &[to - from], some, &call.origin))
}

pub(super) fn size(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let product = |extents: &[i64]| vec![extents.iter().product()];
    one(call.graph.of_extents(x, &[], product, &call.origin))
}

pub(super) fn constant(call: &mut Call) -> Outputs {
    if let Some(constant) = call.tensor("value")? {
        return one(call.graph.constant_bytes(constant.ty, constant.bytes, &call.origin));
    }
    let tensor =
        |shape: &[usize], floats: &[f32]| kiln_runtime::tensor::Tensor::from_slice(shape, floats);
    if let Some(v) = call.float("value_float") {
        return one(call.graph.tensor(&tensor(&[], &[v]), &call.origin));
    }
    if let Some(v) = call.floats("value_floats") {
        return one(call.graph.tensor(&tensor(&[v.len()], &v), &call.origin));
    }
    if let Some(v) = call.int("value_int") {
        return one(call.graph.i64s(&[], &[v], &call.origin));
    }
    if let Some(v) = call.ints("value_ints") {
        return one(call.graph.i64s(&[v.len()], &v, &call.origin));
    }
    Err(not_supported("a constant that is no number or tensor"))
}

pub(super) fn constant_of_shape(call: &mut Call) -> Outputs {
    let shape = call.ints_input(0)?.ok_or_else(|| not_supported("a constant without a shape"))?;
    let shape: Vec<usize> = shape.into_iter().map(extent).collect::<Result<_, _>>()?;
    let value = match call.tensor("value")? {
        Some(constant) => {
            let value = call.graph.constant_bytes(constant.ty, constant.bytes, &call.origin);
            call.graph.reshape(value, &[], &call.origin)?
        }
        None => call.number(DType::F32, 0, 0.0),
    };
    one(expand_to(call, value, &shape)?)
}

pub(super) fn range(call: &mut Call) -> Outputs {
    let values: Vec<f64> = (0..3)
        .map(|i| {
            let first = call.known_input(i)?.as_f64s().first().copied();
            first.ok_or_else(|| not_supported("a range with bounds that are no numbers"))
        })
        .collect::<Result<_, _>>()?;
    let first = call.input(0)?;
    let dtype = call.ty(first).dtype;
    let count = ((values[1] - values[0]) / values[2]).ceil().max(0.0);
    if !count.is_finite() || count > (1u64 << 32) as f64 {
        return Err(not_supported(format!("a range of {count} elements")));
    }
    let shape = Shape::from_slice(&[count as usize]);
    let (g, o) = (&mut *call.graph, &call.origin);
    let index = g.add(Op::Iota(shape, 0), &[], o)?;
    let index = g.cast(index, dtype, o)?;
    let scaled = g.binary_number(BinaryFn::Mul, index, values[2], o)?;
    one(g.binary_number(BinaryFn::Add, scaled, values[0], o)?)
}

pub(super) fn trilu(call: &mut Call) -> Outputs {
    let upper = call.int_or("upper", 1) != 0;
    let x = call.input(0)?;
    let ty = call.ty(x);
    let rank = ty.rank();
    if rank < 2 {
        return Err(not_supported("trilu of less than two axes"));
    }
    let k = call.ints_input(1)?.and_then(|k| k.first().copied()).unwrap_or(0);
    let k = k.clamp(-(1 << 40), 1 << 40);
    let mut square = Shape::from_elem(1, rank);
    square[rank - 2..].copy_from_slice(&ty.shape[rank - 2..]);
    let zero = call.number(ty.dtype, rank, 0.0);
    let (g, o) = (&mut *call.graph, &call.origin);
    let row = g.add(Op::Iota(square.clone(), rank as u8 - 2), &[], o)?;
    let column = g.add(Op::Iota(square, rank as u8 - 1), &[], o)?;
    let moved = g.binary_number(BinaryFn::Add, row, k as f64, o)?;
    let kept = match upper {
        true => g.binary(BinaryFn::Le, moved, column, o)?,
        false => g.binary(BinaryFn::Le, column, moved, o)?,
    };
    one(g.select(kept, x, zero, o)?)
}

/// Blocks of channels to blocks of pixels, or back.
fn depth_space(call: &mut Call, to_space: bool) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    // Larger blocks than extents fit nothing; smaller ones have a square that fits.
    let block = extent(call.int_or("blocksize", 0))?.min(1 << 31);
    let mode = call.string_or("mode", "DCR");
    let [n, c, h, w] = shape[..] else { return Err(not_supported(format!("shape {shape:?}"))) };
    let (g, o) = (&mut *call.graph, &call.origin);
    let fits = match to_space {
        true => block > 0 && c.is_multiple_of(block * block),
        false => block > 0 && h.is_multiple_of(block) && w.is_multiple_of(block),
    };
    if !fits {
        return Err(not_supported(format!("blocks of {block} in {shape:?}")));
    }
    if to_space {
        let d = c / block / block;
        let (split, order): ([usize; 6], [usize; 6]) = match mode.as_str() {
            "DCR" => ([n, block, block, d, h, w], [0, 3, 4, 1, 5, 2]),
            _ => ([n, d, block, block, h, w], [0, 1, 4, 2, 5, 3]),
        };
        let y = g.reshape(x, &split, o)?;
        let y = g.permute(y, &order, o)?;
        return one(g.reshape(y, &[n, d, h * block, w * block], o)?);
    }
    let y = g.reshape(x, &[n, c, h / block, block, w / block, block], o)?;
    let y = g.permute(y, &[0, 3, 5, 1, 2, 4], o)?;
    one(g.reshape(y, &[n, c * block * block, h / block, w / block], o)?)
}

pub(super) fn depth_to_space(call: &mut Call) -> Outputs {
    depth_space(call, true)
}

pub(super) fn space_to_depth(call: &mut Call) -> Outputs {
    depth_space(call, false)
}
