//! Images that are read at places which are computed, or put together of blocks.

use kiln_runtime::tensor::{DType, Tensor};

use super::call::{Call, Outputs, not_supported, one};
use super::pointwise::{clamp, polynomial};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Op, ReduceFn, UnaryFn};

/// Places that the importer writes out at most.
const MOST: usize = 1 << 24;

/// Positive extents that an operand must be known to be.
fn extents(call: &Call, index: usize) -> Result<Vec<usize>, Diagnostic> {
    let given = call.ints_input(index)?.unwrap_or_default();
    let known: Option<Vec<usize>> =
        given.iter().map(|&e| usize::try_from(e).ok().filter(|&e| e > 0 && e < MOST)).collect();
    let all = known.as_ref().and_then(|k| k.iter().try_fold(1usize, |n, &e| n.checked_mul(e)));
    match (known, all) {
        (Some(known), Some(all)) if all <= MOST => Ok(known),
        _ => Err(not_supported(format!("extents of {given:?}"))),
    }
}

/// The places of the elements of a result of shape `[n, c, d..]`, moved by a matrix for each n.
pub(super) fn affine_grid(call: &mut Call) -> Outputs {
    let aligned = call.int_or("align_corners", 0) != 0;
    let theta = call.input(0)?;
    let size = extents(call, 1)?;
    let spatial = size.get(2..).unwrap_or(&[]);
    let rank = spatial.len();
    if rank == 0 || call.shape(theta)[..] != [size[0], rank, rank + 1] {
        let shape = call.shape(theta);
        return Err(not_supported(format!("matrices {shape:?} for places of {size:?}")));
    }
    let along = |extent: usize, i: usize| match (aligned, extent) {
        (true, 1) => 0.0,
        (true, _) => 2.0 * i as f64 / (extent - 1) as f64 - 1.0,
        (false, _) => (2 * i + 1) as f64 / extent as f64 - 1.0,
    };
    let places: usize = spatial.iter().product();
    let mut values = Vec::with_capacity(places * (rank + 1));
    for place in 0..places {
        // The last axis of the image comes first, and a 1 behind all.
        let mut rest = place;
        for &extent in spatial.iter().rev() {
            values.push(along(extent, rest % extent));
            rest /= extent;
        }
        values.push(1.0);
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let base = g.tensor(&Tensor::from_slice(&[1, places, rank + 1], &values), o);
    let base = g.cast(base, g.ty(theta).dtype, o)?;
    let theta = g.permute(theta, &[0, 2, 1], o)?;
    let grid = g.matmul(base, theta, o)?;
    let shape: Vec<usize> = [size[0]].iter().chain(spatial).chain([&rank]).copied().collect();
    one(g.reshape(grid, &shape, o)?)
}

/// What is beyond the border of an image.
#[derive(Clone, Copy, PartialEq)]
enum Beyond {
    Zeros,
    Border,
    Reflection,
}

/// How an axis of an image is read.
#[derive(Clone, Copy)]
struct Along {
    extent: usize,
    aligned: bool,
    beyond: Beyond,
}

impl Along {
    /// A coordinate in -1..=1 as one in elements.
    fn place(self, call: &mut Call, x: NodeId) -> Added {
        let (extent, (g, o)) = (self.extent as f64, (&mut *call.graph, &call.origin));
        let x = g.binary_number(BinaryFn::Add, x, 1.0, o)?;
        if self.aligned {
            return g.binary_number(BinaryFn::Mul, x, (extent - 1.0) / 2.0, o);
        }
        let x = g.binary_number(BinaryFn::Mul, x, extent, o)?;
        let x = g.binary_number(BinaryFn::Sub, x, 1.0, o)?;
        g.binary_number(BinaryFn::Mul, x, 0.5, o)
    }

    /// A place that lies beyond the border, moved as `beyond` says.
    fn moved(self, call: &mut Call, x: NodeId) -> Added {
        let last = self.extent as f64 - 1.0;
        match self.beyond {
            Beyond::Zeros => Ok(x),
            Beyond::Border => clamp(call, x, 0.0, last),
            Beyond::Reflection => {
                let (low, high) = if self.aligned { (0.0, last) } else { (-0.5, last + 0.5) };
                let (span, o) = (high - low, &call.origin);
                let g = &mut *call.graph;
                if span == 0.0 {
                    return g.binary_number(BinaryFn::Mul, x, 0.0, o);
                }
                // To and fro between both ends.
                let x = g.binary_number(BinaryFn::Sub, x, low, o)?;
                let x = g.unary(UnaryFn::Abs, x, o)?;
                let x = g.binary_number(BinaryFn::Rem, x, 2.0 * span, o)?;
                let x = g.binary_number(BinaryFn::Sub, x, span, o)?;
                let x = g.unary(UnaryFn::Abs, x, o)?;
                let x = g.unary(UnaryFn::Neg, x, o)?;
                g.binary_number(BinaryFn::Add, x, high, o)
            }
        }
    }

    /// The index of a whole place, and whether there is such an element, where that is asked.
    fn index(self, call: &mut Call, x: NodeId) -> Result<(NodeId, Option<NodeId>), Diagnostic> {
        let last = self.extent as f64 - 1.0;
        let x = if self.beyond == Beyond::Reflection { self.moved(call, x)? } else { x };
        let inside = clamp(call, x, 0.0, last)?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let there = match self.beyond {
            Beyond::Zeros => Some(g.binary(BinaryFn::Eq, x, inside, o)?),
            Beyond::Border | Beyond::Reflection => None,
        };
        Ok((g.cast(inside, DType::I64, o)?, there))
    }
}

/// How elements around a place are weighed: offsets from the one before it, and their weights,
/// for the part of a place behind that element. Cubic ones are Keys' with -0.75.
fn weights(call: &mut Call, mode: &str, part: NodeId) -> Result<Vec<(f64, NodeId)>, Diagnostic> {
    const A: f64 = -0.75;
    let (near, far) = ([A + 2.0, -(A + 3.0), 0.0, 1.0], [A, -5.0 * A, 8.0 * A, -4.0 * A]);
    let other = call.graph.unary(UnaryFn::Neg, part, &call.origin)?;
    let other = call.graph.binary_number(BinaryFn::Add, other, 1.0, &call.origin)?;
    if mode == "linear" {
        return Ok(vec![(0.0, other), (1.0, part)]);
    }
    let mut all = Vec::new();
    for (offset, distance, curve) in
        [(-1.0, part, far), (0.0, part, near), (1.0, other, near), (2.0, other, far)]
    {
        let more = if curve == far { 1.0 } else { 0.0 };
        let distance = call.graph.binary_number(BinaryFn::Add, distance, more, &call.origin)?;
        all.push((offset, polynomial(call, distance, &curve)?));
    }
    Ok(all)
}

/// What is read along one axis for each place: indices, and weights where they are not 1.
type Taps = Vec<(NodeId, Option<NodeId>)>;

fn taps(call: &mut Call, along: Along, mode: &str, x: NodeId) -> Result<Taps, Diagnostic> {
    let mut place = along.place(call, x)?;
    if mode == "nearest" {
        place = call.graph.unary(UnaryFn::Round, place, &call.origin)?;
    }
    let place = along.moved(call, place)?;
    let dtype = call.ty(place).dtype;
    let weighed = |call: &mut Call, weight: Option<NodeId>, there: Option<NodeId>| {
        let there = there.map(|t| call.graph.cast(t, dtype, &call.origin)).transpose()?;
        match (weight, there) {
            (Some(w), Some(t)) => call.graph.binary(BinaryFn::Mul, w, t, &call.origin).map(Some),
            (weight, there) => Ok(weight.or(there)),
        }
    };
    if mode == "nearest" {
        // A reflected place may lie between elements.
        let whole = match along.beyond {
            Beyond::Reflection => {
                let inside = clamp(call, place, 0.0, along.extent as f64 - 1.0)?;
                call.graph.unary(UnaryFn::Floor, inside, &call.origin)?
            }
            Beyond::Zeros | Beyond::Border => place,
        };
        let (index, there) = along.index(call, whole)?;
        return Ok(vec![(index, weighed(call, None, there)?)]);
    }
    let before = call.graph.unary(UnaryFn::Floor, place, &call.origin)?;
    let part = call.graph.binary(BinaryFn::Sub, place, before, &call.origin)?;
    let mut taps = Vec::new();
    for (offset, weight) in weights(call, mode, part)? {
        let at = call.graph.binary_number(BinaryFn::Add, before, offset, &call.origin)?;
        let (index, there) = along.index(call, at)?;
        taps.push((index, weighed(call, Some(weight), there)?));
    }
    Ok(taps)
}

/// How images are read between their elements, and beyond their borders.
fn modes(call: &Call) -> Result<(&'static str, Beyond), Diagnostic> {
    let mode = match call.string_or("mode", "linear").as_str() {
        "linear" | "bilinear" => "linear",
        "cubic" | "bicubic" => "cubic",
        "nearest" => "nearest",
        other => return Err(not_supported(format!("the mode {other:?}"))),
    };
    let beyond = match call.string_or("padding_mode", "zeros").as_str() {
        "zeros" => Beyond::Zeros,
        "border" => Beyond::Border,
        "reflection" => Beyond::Reflection,
        other => return Err(not_supported(format!("the padding {other:?}"))),
    };
    Ok((mode, beyond))
}

/// `[n, c, d..]` read at places `[n, p.., axes]`, those of the last axis first.
pub(super) fn grid_sample(call: &mut Call) -> Outputs {
    let aligned = call.int_or("align_corners", 0) != 0;
    let (mode, beyond) = modes(call)?;
    let (x, grid) = (call.input(0)?, call.input(1)?);
    let (xs, gs) = (call.shape(x), call.shape(grid));
    let rank = xs.len().saturating_sub(2);
    let fits = rank > 0 && gs.len() == xs.len() && gs[0] == xs[0] && gs[rank + 1] == rank;
    if !fits || xs.contains(&0) {
        return Err(not_supported(format!("an image {xs:?} read at places {gs:?}")));
    }
    let (n, c, spatial) = (xs[0], xs[1], &xs[2..]);
    let points: usize = gs[1..=rank].iter().product();
    // Places and weights are fractions, and places are counted.
    let dtype = call.ty(x).dtype;
    let wide = if call.ty(grid).dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let grid = call.graph.cast(grid, wide, &call.origin)?;
    let grid = call.graph.reshape(grid, &[n, points, rank], &call.origin)?;
    // Where each image begins, and no weight.
    let begins: Vec<i64> = (0..n).map(|i| (i * spatial.iter().product::<usize>()) as i64).collect();
    let begin = call.graph.i64s(&[n, 1, 1], &begins, &call.origin);
    let mut reads: Taps = vec![(begin, None)];
    let mut step = 1.0;
    for (axis, &extent) in spatial.iter().enumerate().rev() {
        let coordinate = call.cut(grid, 2, ((rank - 1 - axis) as i64, 1, 1))?;
        let along = Along { extent, aligned, beyond };
        let mut next = Vec::new();
        for (index, weight) in taps(call, along, mode, coordinate)? {
            let (g, o) = (&mut *call.graph, &call.origin);
            let index = g.binary_number(BinaryFn::Mul, index, step, o)?;
            for &(before, by) in &reads {
                let index = g.binary(BinaryFn::Add, index, before, o)?;
                let weight = match (weight, by) {
                    (Some(w), Some(by)) => Some(g.binary(BinaryFn::Mul, w, by, o)?),
                    (weight, by) => weight.or(by),
                };
                next.push((index, weight));
            }
        }
        reads = next;
        step *= extent as f64;
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let order: Vec<usize> = [0].into_iter().chain(2..rank + 2).chain([1]).collect();
    let x = g.permute(x, &order, o)?;
    let x = g.reshape(x, &[n * spatial.iter().product::<usize>(), c], o)?;
    let mut sum: Option<NodeId> = None;
    for (index, weight) in reads {
        let index = g.reshape(index, &[n, points], o)?;
        let mut value = g.add(Op::Gather(0), &[x, index], o)?;
        if let Some(weight) = weight {
            value = g.cast(value, wide, o)?;
            value = g.binary(BinaryFn::Mul, value, weight, o)?;
        }
        sum = Some(sum.map_or(Ok(value), |sum| g.binary(BinaryFn::Add, sum, value, o))?);
    }
    let sum = sum.ok_or_else(|| not_supported("an image that is read nowhere"))?;
    let sum = g.cast(sum, dtype, o)?;
    let y = g.permute(sum, &[0, 2, 1], o)?;
    let shape: Vec<usize> = [n, c].iter().chain(&gs[1..=rank]).copied().collect();
    one(g.reshape(y, &shape, o)?)
}

/// Blocks `[n, c * block, l]` added up where they lie in an image.
pub(super) fn col2im(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let (image, block) = (extents(call, 1)?, extents(call, 2)?);
    let rank = image.len();
    let list = |name: &str, len: usize, usual: i64| {
        let given = call.ints(name).unwrap_or_else(|| vec![usual; len]);
        let fits = given.len() == len && given.iter().all(|&v| (usual..1 << 31).contains(&v));
        if fits { Ok(given) } else { Err(not_supported(format!("{name} of {given:?}"))) }
    };
    let (strides, dilations) = (list("strides", rank, 1)?, list("dilations", rank, 1)?);
    let pads = list("pads", 2 * rank, 0)?;
    let steps: Option<Vec<usize>> = (0..rank)
        .map(|d| {
            let reach = dilations[d] * (*block.get(d)? as i64 - 1);
            let room = image[d] as i64 + pads[d] + pads[rank + d] - reach - 1;
            usize::try_from(room).ok().map(|room| room / strides[d] as usize + 1)
        })
        .collect();
    let shape = call.shape(x);
    let of_block: usize = block.iter().product();
    let fits = |steps: &Vec<usize>| {
        let places = steps.iter().try_fold(of_block, |n, &e| n.checked_mul(e));
        let blocks = matches!(shape[..], [_, c, l]
            if c.is_multiple_of(of_block) && l.checked_mul(of_block) == places);
        block.len() == rank && blocks && places.is_some_and(|n| n <= MOST)
    };
    let Some(steps) = steps.filter(fits) else {
        return Err(not_supported(format!("blocks {shape:?} of {block:?} in an image {image:?}")));
    };
    let (n, c) = (shape[0], shape[1] / of_block);
    let (count, pixels): (usize, usize) = (steps.iter().product(), image.iter().product());
    let mut places = Vec::with_capacity(of_block * count);
    for k in 0..of_block {
        for l in 0..count {
            let (mut k, mut l, mut place, mut scale) = (k, l, 0i64, 1i64);
            let mut inside = true;
            for d in (0..rank).rev() {
                let at = (l % steps[d]) as i64 * strides[d] + (k % block[d]) as i64 * dilations[d]
                    - pads[d];
                inside &= (0..image[d] as i64).contains(&at);
                place += at * scale;
                scale *= image[d] as i64;
                (k, l) = (k / block[d], l / steps[d]);
            }
            // What lies in the border goes nowhere.
            places.push(if inside { place } else { pixels as i64 });
        }
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let x = g.reshape(x, &[n, c, of_block, count], o)?;
    let x = g.permute(x, &[2, 3, 0, 1], o)?;
    let x = g.reshape(x, &[of_block * count, n * c], o)?;
    let places = g.i64s(&[of_block * count], &places, o);
    let zero = g.scalar(g.ty(x).dtype, 2, 0.0, o);
    let zero = g.expand(zero, &[pixels, n * c], o)?;
    let y = g.add(Op::Scatter(Some(ReduceFn::Sum)), &[zero, places, x], o)?;
    let y = g.permute(y, &[1, 0], o)?;
    let shape: Vec<usize> = [n, c].into_iter().chain(image).collect();
    one(g.reshape(y, &shape, o)?)
}

/// The first elements of each sequence the other way round.
pub(super) fn reverse_sequence(call: &mut Call) -> Outputs {
    let (x, lengths) = (call.input(0)?, call.input(1)?);
    let shape = call.shape(x);
    let (batch, time) = (call.int_or("batch_axis", 1), call.int_or("time_axis", 0));
    if shape.len() < 2 || ![(0, 1), (1, 0)].contains(&(batch, time)) {
        return Err(not_supported(format!("sequences of {shape:?} along {time} and {batch}")));
    }
    let (batch, time) = (batch as usize, time as usize);
    if call.shape(lengths)[..] != [shape[batch]] {
        return Err(not_supported(format!("lengths {:?} of {shape:?}", call.shape(lengths))));
    }
    let mut along = [1, 1];
    along[batch] = shape[batch];
    let both = [shape[0], shape[1]];
    let steps = [shape[1] as f64, 1.0];
    let (g, o) = (&mut *call.graph, &call.origin);
    let lengths = g.cast(lengths, DType::I64, o)?;
    let lengths = g.reshape(lengths, &along, o)?;
    let iota = |axis| Op::Iota(both.into_iter().collect(), axis as u8);
    let (at, own) = (g.add(iota(time), &[], o)?, g.add(iota(batch), &[], o)?);
    let inside = g.binary(BinaryFn::Lt, at, lengths, o)?;
    let back = g.binary(BinaryFn::Sub, lengths, at, o)?;
    let back = g.binary_number(BinaryFn::Sub, back, 1.0, o)?;
    let from = g.select(inside, back, at, o)?;
    let from = g.binary_number(BinaryFn::Mul, from, steps[time], o)?;
    let own = g.binary_number(BinaryFn::Mul, own, steps[batch], o)?;
    let place = g.binary(BinaryFn::Add, from, own, o)?;
    let flat: Vec<usize> = [shape[0] * shape[1]].iter().chain(&shape[2..]).copied().collect();
    let rows = g.reshape(x, &flat, o)?;
    one(g.add(Op::Gather(0), &[rows, place], o)?)
}

#[cfg(test)]
mod tests {
    use super::super::control::tests::{graph, model, node, port};
    use super::super::proto::AttributeProto;

    /// What a node says that has integers as its second operand and, where given, as its third.
    fn refused(op: &str, shape: &[i64], lists: &[&[i64]], pads: &[i64]) -> String {
        let mut nodes = Vec::new();
        let ints = |name: &str, list: &[i64]| AttributeProto {
            name: Some(name.into()),
            ints: list.to_vec(),
            ..Default::default()
        };
        let names = ["first", "second"];
        for (name, list) in names.iter().zip(lists) {
            let mut constant = node("Constant", &[], &[name]);
            constant.attribute.push(ints("value_ints", list));
            nodes.push(constant);
        }
        let inputs: Vec<&str> = ["x"].into_iter().chain(names).take(1 + lists.len()).collect();
        let mut asked = node(op, &inputs, &["y"]);
        asked.attribute.extend((!pads.is_empty()).then(|| ints("pads", pads)));
        nodes.push(asked);
        model(graph(&[port("x", shape, 1)], &nodes, &["y"]), false).expect_err("no such sizes")
    }

    #[test]
    fn sizes_that_are_none_are_refused_and_named() {
        let most = (1 << 31) - 1;
        for (op, shape, lists, pads) in [
            ("AffineGrid", &[0, 0, 1][..], &[&[][..]][..], &[][..]),
            ("AffineGrid", &[5, 0, 1], &[&[5]], &[]),
            ("AffineGrid", &[1, 2, 3], &[&[1, 1, -4, 4]], &[]),
            ("Col2Im", &[1, 1, 1], &[&[5, 5], &[2]], &[]),
            ("Col2Im", &[1, 1, 1], &[&[1, 1, 1], &[1, 1, 1]], &[most; 6]),
        ] {
            let problem = refused(op, shape, lists, pads);
            assert!(problem.contains("K0130") && problem.contains(op), "{op} {shape:?}: {problem}");
        }
    }
}
