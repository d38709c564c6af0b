//! Images that are read between their elements, at places that are computed.

use kiln_runtime::tensor::{DType, Tensor};

use super::call::{Call, Outputs, not_supported, one};
use super::pointwise::clamp;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Op, ReduceFn, Shape, UnaryFn};

/// Places that the importer writes out at most.
const MOST: usize = 1 << 24;

/// One of the two elements around a place along an axis: its index, its weight, and whether there
/// is such an element.
type Side = (NodeId, NodeId, NodeId);

fn sides(call: &mut Call, place: NodeId, extent: usize) -> Result<[Side; 2], Diagnostic> {
    let last = extent as f64 - 1.0;
    let (g, o) = (&mut *call.graph, &call.origin);
    let before = g.unary(UnaryFn::Floor, place, o)?;
    let part = g.binary(BinaryFn::Sub, place, before, o)?;
    let rest = g.unary(UnaryFn::Neg, part, o)?;
    let rest = g.binary_number(BinaryFn::Add, rest, 1.0, o)?;
    let after = g.binary_number(BinaryFn::Add, before, 1.0, o)?;
    let mut side = |at: NodeId, weight: NodeId| -> Result<Side, Diagnostic> {
        let inside = clamp(call, at, 0.0, last)?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let there = g.binary(BinaryFn::Eq, at, inside, o)?;
        Ok((g.cast(inside, DType::I64, o)?, weight, there))
    };
    Ok([side(before, rest)?, side(after, part)?])
}

/// The four elements around places, weighed: rows of `[rows, channels]`, of which each image of
/// `h` by `w` begins at `begin`. Places, and the beginning, have one shape.
fn corners(
    call: &mut Call,
    (x, begin): (NodeId, NodeId),
    [y_place, x_place]: [NodeId; 2],
    [h, w]: [usize; 2],
) -> Result<Vec<NodeId>, Diagnostic> {
    let (down, across) = (sides(call, y_place, h)?, sides(call, x_place, w)?);
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut all = Vec::new();
    for (row, row_weight, row_there) in down {
        for (column, column_weight, column_there) in across {
            let index = g.binary_number(BinaryFn::Mul, row, w as f64, o)?;
            let index = g.binary(BinaryFn::Add, index, column, o)?;
            let index = g.binary(BinaryFn::Add, index, begin, o)?;
            let value = g.add(Op::Gather(0), &[x, index], o)?;
            let weight = g.binary(BinaryFn::Mul, row_weight, column_weight, o)?;
            let there = g.binary(BinaryFn::And, row_there, column_there, o)?;
            let mut shape = g.ty(index).shape.clone();
            shape.push(1);
            let (weight, there) = (g.reshape(weight, &shape, o)?, g.reshape(there, &shape, o)?);
            let weighed = g.binary(BinaryFn::Mul, value, weight, o)?;
            let none = g.scalar(g.ty(value).dtype, 0, 0.0, o);
            all.push(g.select(there, weighed, none, o)?);
        }
    }
    Ok(all)
}

fn folded(call: &mut Call, f: BinaryFn, values: &[NodeId]) -> Added {
    let first = *values.first().ok_or_else(|| not_supported("an image that is read nowhere"))?;
    values[1..].iter().try_fold(first, |all, &v| call.graph.binary(f, all, v, &call.origin))
}

/// Where the samples of each bin of a region lie along an axis of an image: `[regions, samples]`,
/// and whether that is in reach of the image.
fn samples(
    call: &mut Call,
    [start, end]: [NodeId; 2],
    [bins, ratio]: [usize; 2],
    (extent, half_pixel): (usize, bool),
) -> Result<[NodeId; 2], Diagnostic> {
    let dtype = call.ty(start).dtype;
    let mut size = call.graph.binary(BinaryFn::Sub, end, start, &call.origin)?;
    if !half_pixel {
        size = call.graph.binary_number(BinaryFn::Max, size, 1.0, &call.origin)?;
    }
    let at = |i: usize| (i / ratio) as f64 + ((i % ratio) as f64 + 0.5) / ratio as f64;
    let steps: Vec<f64> = (0..bins * ratio).map(at).collect();
    let (g, o) = (&mut *call.graph, &call.origin);
    let steps = g.tensor(&Tensor::from_slice(&[1, bins * ratio], &steps), o);
    let steps = g.cast(steps, dtype, o)?;
    let bin = g.binary_number(BinaryFn::Div, size, bins as f64, o)?;
    let place = g.binary(BinaryFn::Mul, bin, steps, o)?;
    let place = g.binary(BinaryFn::Add, place, start, o)?;
    let low = g.scalar(dtype, 2, -1.0, o);
    let low = g.binary(BinaryFn::Le, low, place, o)?;
    let high = g.scalar(dtype, 2, extent as f64, o);
    let high = g.binary(BinaryFn::Le, place, high, o)?;
    let there = g.binary(BinaryFn::And, low, high, o)?;
    Ok([clamp(call, place, 0.0, extent as f64 - 1.0)?, there])
}

/// Regions of images, cut into bins of which each is the mean or the greatest of samples.
pub(super) fn roi_align(call: &mut Call) -> Outputs {
    let usual = if call.opset < 16 { "output_half_pixel" } else { "half_pixel" };
    let half_pixel = match call.string_or("coordinate_transformation_mode", usual).as_str() {
        "half_pixel" => true,
        "output_half_pixel" => false,
        other => return Err(not_supported(format!("the coordinates {other:?}"))),
    };
    let mode = call.string_or("mode", "avg");
    let scale = f64::from(call.float_or("spatial_scale", 1.0));
    let whole = |call: &Call, name: &str, usual: i64| {
        let given = call.int_or(name, usual);
        let fits = usize::try_from(given).ok().filter(|&n| n > 0 && n < 1 << 12);
        fits.ok_or_else(|| not_supported(format!("{name} of {given}")))
    };
    let (rows, columns) = (whole(call, "output_height", 1)?, whole(call, "output_width", 1)?);
    // Without it, how many samples there are hangs on how large the regions are.
    let ratio = whole(call, "sampling_ratio", 0)?;
    let (x, regions, owner) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let ([xs, rs], os) = ([x, regions].map(|v| call.shape(v)), call.shape(owner));
    let same = os.len() == 1 && os.first() == rs.first();
    let ([images, c, h, w], [n, 4], true) = (&xs[..], &rs[..], same) else {
        return Err(not_supported(format!("regions {rs:?} of images {xs:?}, which are {os:?}")));
    };
    let (images, c, h, w, n) = (*images, *c, *h, *w, *n);
    if xs.contains(&0) {
        return Err(not_supported(format!("regions of images {xs:?}")));
    }
    let dtype = call.ty(x).dtype;
    let regions = call.graph.cast(regions, dtype, &call.origin)?;
    let regions = call.graph.binary_number(BinaryFn::Mul, regions, scale, &call.origin)?;
    let offset = if half_pixel { 0.5 } else { 0.0 };
    let regions = call.graph.binary_number(BinaryFn::Sub, regions, offset, &call.origin)?;
    let mut edges = [0, 1, 2, 3].map(|k| call.cut(regions, 1, (k, 1, 1)));
    let mut edge = |k: usize| std::mem::replace(&mut edges[k], Err(not_supported("an edge")));
    let (left, top, right, bottom) = (edge(0)?, edge(1)?, edge(2)?, edge(3)?);
    let [y, y_there] = samples(call, [top, bottom], [rows, ratio], (h, half_pixel))?;
    let [x_place, x_there] = samples(call, [left, right], [columns, ratio], (w, half_pixel))?;
    let (down, across) = (rows * ratio, columns * ratio);
    let (g, o) = (&mut *call.graph, &call.origin);
    let spread = |g: &mut crate::graph::Graph, v: NodeId, is_y: bool| {
        let apart = if is_y { [n, down, 1] } else { [n, 1, across] };
        let v = g.reshape(v, &apart, o)?;
        g.expand(v, &[n, down, across], o)
    };
    let (y, x_place) = (spread(g, y, true)?, spread(g, x_place, false)?);
    let (y_there, x_there) = (spread(g, y_there, true)?, spread(g, x_there, false)?);
    let there = g.binary(BinaryFn::And, y_there, x_there, o)?;
    let flat = g.permute(x, &[0, 2, 3, 1], o)?;
    let flat = g.reshape(flat, &[images * h * w, c], o)?;
    let begin = g.cast(owner, DType::I64, o)?;
    let begin = g.binary_number(BinaryFn::Mul, begin, (h * w) as f64, o)?;
    let begin = g.reshape(begin, &[n, 1, 1], o)?;
    let values = corners(call, (flat, begin), [y, x_place], [h, w])?;
    let (value, f) = match mode.as_str() {
        "avg" => (folded(call, BinaryFn::Add, &values)?, ReduceFn::Sum),
        "max" => (folded(call, BinaryFn::Max, &values)?, ReduceFn::Max),
        other => return Err(not_supported(format!("the mode {other:?}"))),
    };
    let (g, o) = (&mut *call.graph, &call.origin);
    let there = g.reshape(there, &[n, down, across, 1], o)?;
    let none = g.scalar(dtype, 0, 0.0, o);
    let value = g.select(there, value, none, o)?;
    let value = g.reshape(value, &[n, rows, ratio, columns, ratio, c], o)?;
    let mut all = g.reduce(f, value, &[2, 4], o)?;
    if f == ReduceFn::Sum {
        all = g.binary_number(BinaryFn::Div, all, (ratio * ratio) as f64, o)?;
    }
    let all = g.reshape(all, &[n, rows, columns, c], o)?;
    one(g.permute(all, &[0, 3, 1, 2], o)?)
}

/// Sizes of a convolution whose taps are moved by offsets.
struct Deform {
    groups: usize,
    offset_groups: usize,
    kernel: [usize; 2],
    strides: [i64; 2],
    dilations: [i64; 2],
    pads: [i64; 2],
    /// Extents of the result.
    out: [usize; 2],
}

impl Deform {
    /// Where the taps would be read without offsets, along both axes: `[taps, places]` each.
    fn places(&self) -> [Vec<f64>; 2] {
        let ([kernel_h, kernel_w], [h, w]) = (self.kernel, self.out);
        let (taps, places) = (kernel_h * kernel_w, h * w);
        [0, 1].map(|axis: usize| {
            let mut all = Vec::with_capacity(taps * places);
            for tap in 0..taps {
                for place in 0..places {
                    let (tap, at) = match axis {
                        0 => (tap / kernel_w, place / w),
                        _ => (tap % kernel_w, place % w),
                    };
                    let moved = at as i64 * self.strides[axis] + tap as i64 * self.dilations[axis];
                    all.push((moved - self.pads[axis]) as f64);
                }
            }
            all
        })
    }
}

fn deform(call: &Call, [xs, ws, os]: [&Shape; 3]) -> Result<Deform, Diagnostic> {
    let count = |name: &str| usize::try_from(call.int_or(name, 1)).unwrap_or(0);
    let (groups, offset_groups) = (count("group"), count("offset_group"));
    let list = |name: &str, len: usize, usual: i64| {
        let given = call.ints(name).unwrap_or_else(|| vec![usual; len]);
        let fits = given.len() == len && given.iter().all(|&v| (usual..1 << 31).contains(&v));
        if fits { Ok(given) } else { Err(not_supported(format!("{name} of {given:?}"))) }
    };
    let (strides, dilations) = (list("strides", 2, 1)?, list("dilations", 2, 1)?);
    let pads = list("pads", 4, 0)?;
    call.ignore("kernel_shape");
    let misfit = || {
        let what = format!("{groups} groups and {offset_groups} of offsets {os:?} for");
        not_supported(format!("{what} an image {xs:?} and a weight {ws:?}"))
    };
    let ([n, c, h, w], [o, own, kh, kw], [m, offsets, oh, ow]) = (&xs[..], &ws[..], &os[..]) else {
        return Err(misfit());
    };
    let taps = kh.checked_mul(*kw).filter(|&n| n > 0).ok_or_else(misfit)?;
    let out = |d: usize, (extent, kernel): (usize, usize)| {
        let reach = dilations[d].checked_mul(kernel as i64 - 1)?;
        let room = (extent as i64).checked_add(pads[d] + pads[d + 2])?.checked_sub(reach + 1)?;
        usize::try_from(room).ok().map(|room| room / strides[d] as usize + 1)
    };
    let fits = n == m
        && groups > 0
        && offset_groups > 0
        && !xs.contains(&0)
        && own.checked_mul(groups) == Some(*c)
        && o.is_multiple_of(groups)
        && c.is_multiple_of(offset_groups)
        && taps.checked_mul(2).and_then(|n| n.checked_mul(offset_groups)) == Some(*offsets)
        && [out(0, (*h, *kh)), out(1, (*w, *kw))] == [Some(*oh), Some(*ow)]
        && oh.checked_mul(*ow).and_then(|n| n.checked_mul(taps)).is_some_and(|n| n <= MOST);
    if !fits {
        return Err(misfit());
    }
    Ok(Deform {
        groups,
        offset_groups,
        kernel: [*kh, *kw],
        strides: [strides[0], strides[1]],
        dilations: [dilations[0], dilations[1]],
        pads: [pads[0], pads[1]],
        out: [*oh, *ow],
    })
}

/// A convolution whose taps are read between elements, where offsets say; 0 beyond the border.
pub(super) fn deform_conv(call: &mut Call) -> Outputs {
    let (x, weight, offset) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let [xs, ws, os] = [x, weight, offset].map(|v| call.shape(v));
    let sizes = deform(call, [&xs, &ws, &os])?;
    let (n, c, h, w) = (xs[0], xs[1], xs[2], xs[3]);
    let (own, taps, places) = (sizes.offset_groups, ws[2] * ws[3], os[2] * os[3]);
    let dtype = call.ty(x).dtype;
    let (g, o) = (&mut *call.graph, &call.origin);
    let offset = g.reshape(offset, &[n, own, taps, 2, places], o)?;
    let mut at = Vec::new();
    for (axis, base) in sizes.places().into_iter().enumerate() {
        let moved = call.cut(offset, 3, (axis as i64, 1, 1))?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let moved = g.reshape(moved, &[n, own, taps, places], o)?;
        let base = g.tensor(&Tensor::from_slice(&[1, 1, taps, places], &base), o);
        let base = g.cast(base, dtype, o)?;
        at.push(g.binary(BinaryFn::Add, moved, base, o)?);
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let image = g.reshape(x, &[n, own, c / own, h * w], o)?;
    let image = g.permute(image, &[0, 1, 3, 2], o)?;
    let image = g.reshape(image, &[n * own * h * w, c / own], o)?;
    let begins: Vec<i64> = (0..n * own).map(|i| (i * h * w) as i64).collect();
    let begin = g.i64s(&[n, own, 1, 1], &begins, o);
    let values = corners(call, (image, begin), [at[0], at[1]], [h, w])?;
    let mut value = folded(call, BinaryFn::Add, &values)?;
    if let Some(mask) = call.optional(4) {
        let (g, o) = (&mut *call.graph, &call.origin);
        let mask = g.reshape(mask, &[n, own, taps, places, 1], o)?;
        value = g.binary(BinaryFn::Mul, value, mask, o)?;
    }
    let (groups, (g, o)) = (sizes.groups, (&mut *call.graph, &call.origin));
    let value = g.permute(value, &[0, 1, 4, 2, 3], o)?;
    let value = g.reshape(value, &[n, groups, c / groups * taps, places], o)?;
    let weight = g.reshape(weight, &[1, groups, ws[0] / groups, c / groups * taps], o)?;
    let sum = g.matmul(weight, value, o)?;
    let mut y = g.reshape(sum, &[n, ws[0], os[2], os[3]], o)?;
    if let Some(bias) = call.optional(3) {
        let bias = call.graph.reshape(bias, &[1, ws[0], 1, 1], &call.origin)?;
        y = call.graph.binary(BinaryFn::Add, y, bias, &call.origin)?;
    }
    one(y)
}

/// Elements put where a pooling took them from, zeros elsewhere.
pub(super) fn max_unpool(call: &mut Call) -> Outputs {
    let (x, index) = (call.input(0)?, call.input(1)?);
    let shape = call.shape(x);
    let spatial = shape.len().saturating_sub(2);
    let kernel = call.ints("kernel_shape").unwrap_or_default();
    let strides = call.ints("strides").unwrap_or_else(|| vec![1; kernel.len()]);
    let pads = call.ints("pads").unwrap_or_else(|| vec![0; 2 * kernel.len()]);
    let misfit = || not_supported(format!("kernel {kernel:?}, strides {strides:?} for {shape:?}"));
    let same = kernel.len() == spatial && strides.len() == spatial && pads.len() == 2 * spatial;
    if spatial == 0 || !same || call.shape(index) != shape {
        return Err(misfit());
    }
    let extent = |d: usize| {
        let steps = (shape[2 + d] as i64).checked_sub(1)?.checked_mul(strides[d])?;
        let border = pads[d].checked_add(pads[spatial + d])?;
        usize::try_from(steps.checked_sub(border)?.checked_add(kernel[d])?).ok()
    };
    let inner: Option<Vec<usize>> = (0..spatial).map(extent).collect();
    let inner = inner.ok_or_else(misfit)?;
    let made: Shape = shape[..2].iter().chain(&inner).copied().collect();
    let (ty, count) = (call.ty(x), call.ty(x).numel());
    let (g, o) = (&mut *call.graph, &call.origin);
    // The size is checked where the zeros are made.
    let ones = Shape::from_elem(1, made.len());
    let zero = g.scalar(ty.dtype, made.len(), 0.0, o);
    let zero = g.reshape(zero, &ones, o)?;
    let zeros = g.expand(zero, &made, o)?;
    let all = g.ty(zeros).numel();
    let zeros = g.reshape(zeros, &[all], o)?;
    let (x, index) = (g.reshape(x, &[count], o)?, g.reshape(index, &[count], o)?);
    let y = g.add(Op::Scatter(None), &[zeros, index, x], o)?;
    let y = g.reshape(y, &made, o)?;
    let Some(wanted) = call.ints_input(2)? else { return one(y) };
    // What the result has more, it has behind.
    let border = |(&made, &wanted): (&usize, &i64)| {
        usize::try_from(wanted).ok()?.checked_sub(made).map(|more| (0, more))
    };
    let borders: Option<_> = made.iter().zip(&wanted).map(border).collect();
    let (Some(borders), true) = (borders, wanted.len() == made.len()) else {
        return Err(not_supported(format!("a result {wanted:?} of elements from {made:?}")));
    };
    let fill = call.number(ty.dtype, 0, 0.0);
    one(call.graph.add(Op::Pad(borders), &[y, fill], &call.origin)?)
}

#[cfg(test)]
mod tests {
    use super::super::control::tests::{graph, ints, model, node, port};
    use super::super::proto::AttributeProto;
    use super::*;
    use crate::tests::compiled;

    fn list(name: &str, ints: &[i64]) -> AttributeProto {
        AttributeProto { name: Some(name.into()), ints: ints.to_vec(), ..Default::default() }
    }

    fn refused(op: &str, shapes: &[(&[i64], i32)], attributes: &[AttributeProto]) -> String {
        let names = ["a", "b", "c", "d", "e"];
        let ports: Vec<_> = shapes
            .iter()
            .zip(names)
            .map(|(&(shape, dtype), name)| port(name, shape, dtype))
            .collect();
        let mut asked = node(op, &names[..shapes.len()], &["y"]);
        asked.attribute = attributes.to_vec();
        model(graph(&ports, &[asked], &["y"]), false).expect_err("sizes that do not fit")
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_and_named() {
        let most = i64::MAX;
        let image: (&[i64], i32) = (&[1, 2, 5, 5], 1);
        let boxes: (&[i64], i32) = (&[3, 4], 1);
        let pair = vec![image, (&[1, 2, 5, 5], 7)];
        let sampled = |n: i64| vec![ints("sampling_ratio", &[n])];
        for (op, shapes, attributes, what) in [
            ("RoiAlign", vec![image, boxes, (&[2], 7)], sampled(2), "[3, 4]"),
            ("RoiAlign", vec![(&[1, 2, 5], 1), boxes, (&[3], 7)], sampled(2), "[1, 2, 5]"),
            ("RoiAlign", vec![image, (&[3, 5], 1), (&[3], 7)], sampled(2), "[3, 5]"),
            ("RoiAlign", vec![image, (&[], 1), (&[3], 7)], sampled(2), "regions []"),
            ("RoiAlign", vec![image, boxes, (&[], 7)], sampled(2), "[3, 4]"),
            ("RoiAlign", vec![image, boxes, (&[3], 7)], sampled(0), "sampling_ratio of 0"),
            ("RoiAlign", vec![image, boxes, (&[3], 7)], sampled(most), "sampling_ratio of"),
            ("MaxUnpool", vec![image, boxes], vec![list("kernel_shape", &[2, 2])], "[2, 2]"),
            ("MaxUnpool", pair.clone(), vec![list("kernel_shape", &[2])], "[2]"),
            ("MaxUnpool", pair.clone(), vec![list("kernel_shape", &[1 << 40, 1 << 40])], "K0201"),
            (
                "MaxUnpool",
                pair.clone(),
                vec![list("kernel_shape", &[2, 2]), list("strides", &[most, most])],
                "K0130",
            ),
        ] {
            let problem = refused(op, &shapes, &attributes);
            assert!(problem.contains(what) && problem.contains(op), "{op} {what}: {problem}");
        }
        let weight: (&[i64], i32) = (&[4, 2, 2, 2], 1);
        let fits: (&[i64], i32) = (&[1, 8, 4, 4], 1);
        for (shapes, attributes) in [
            (vec![image, weight, (&[1, 7, 4, 4], 1)], vec![]),
            (vec![image, weight, (&[1, 8, 4, 3], 1)], vec![]),
            (vec![image, weight, (&[2, 8, 4, 4], 1)], vec![]),
            (vec![image, weight, fits], vec![ints("group", &[3])]),
            (vec![image, weight, fits], vec![ints("offset_group", &[0])]),
            (vec![image, weight, fits], vec![list("strides", &[most, 1])]),
            (vec![image, weight, fits], vec![list("pads", &[0, 0, 0, -1])]),
            (vec![image, (&[4, 2, 0, 2], 1), fits], vec![]),
        ] {
            let problem = refused("DeformConv", &shapes, &attributes);
            assert!(problem.contains("K0130"), "{shapes:?}: {problem}");
        }
    }

    /// Without offsets it is the convolution, whatever the groups are.
    #[test]
    fn without_offsets_nothing_is_moved() {
        let all = [
            list("strides", &[2, 1]),
            list("dilations", &[1, 2]),
            list("pads", &[1, 0, 1, 2]),
            ints("group", &[2]),
        ];
        let x: Vec<f32> = (0..2 * 4 * 6 * 7).map(|i| ((i * 37 % 23) as f32) - 11.0).collect();
        let x = Tensor::from_slice(&[2, 4, 6, 7], &x);
        let weights: Vec<f32> = (0..6 * 2 * 3 * 2).map(|i| ((i * 5 % 7) as f32) - 3.0).collect();
        let made = |op: &str, inputs: &[&str], more: Option<AttributeProto>| {
            let mut conv = node(op, inputs, &["y"]);
            conv.attribute = all.iter().cloned().chain(more).collect();
            let mut made = graph(&[port("x", &[2, 4, 6, 7], 1)], &[conv], &["y"]);
            let constant =
                |name: &str, dims: &[i64], values: &[f32]| super::super::proto::TensorProto {
                    name: Some(name.into()),
                    dims: dims.to_vec(),
                    data_type: Some(1),
                    float_data: values.to_vec(),
                    ..Default::default()
                };
            made.initializer.push(constant("w", &[6, 2, 3, 2], &weights));
            if inputs.len() == 3 {
                let shape = [2, 24, 3, 7];
                let zeros = vec![0.0; shape.iter().product::<i64>() as usize];
                made.initializer.push(constant("o", &shape, &zeros));
            }
            compiled(&model(made, false).expect("a model"), &x)
        };
        let plain = made("Conv", &["x", "w"], None);
        let moved = made("DeformConv", &["x", "w", "o"], Some(ints("offset_group", &[2])));
        // Whole numbers: sums are exact in any order.
        assert_eq!(plain.shape(), moved.shape());
        assert_eq!(plain.as_slice::<f32>(), moved.as_slice::<f32>());
    }
}
