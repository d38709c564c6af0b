//! Fourier transforms and the windows that go before them.

use std::f64::consts::TAU;

use kiln_runtime::tensor::Tensor;
use smallvec::smallvec;

use super::call::{Call, Outputs, not_supported, one};
use super::tensor::dtype_of;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Op};

/// Elements of a window, or of the matrix of a transform, at most.
const MOST: usize = 1 << 26;

/// A number that an operand must be known to be.
fn number(call: &Call, index: usize) -> Result<Option<i64>, Diagnostic> {
    Ok(call.ints_input(index)?.and_then(|v| v.first().copied()))
}

/// The extent that an operand must be known to be.
fn length(call: &Call, index: usize) -> Result<Option<usize>, Diagnostic> {
    let fits = |n: i64| usize::try_from(n).ok().filter(|&n| (1..=MOST).contains(&n));
    number(call, index)?
        .map(|n| fits(n).ok_or_else(|| not_supported(format!("a length of {n}"))))
        .transpose()
}

/// A window whose value is a function of the angle, which goes round once.
fn window(call: &mut Call, value: impl Fn(f64) -> f64) -> Outputs {
    let periodic = call.int_or("periodic", 1) != 0;
    let dtype = dtype_of(i32::try_from(call.int_or("output_datatype", 1)).unwrap_or(0))?;
    let size = length(call, 0)?.ok_or_else(|| not_supported("a window without a size"))?;
    let round = if periodic { size } else { (size - 1).max(1) };
    let values: Vec<f64> = (0..size).map(|n| value(TAU * n as f64 / round as f64)).collect();
    let values = call.graph.tensor(&Tensor::from_slice(&[size], &values), &call.origin);
    one(call.graph.cast(values, dtype, &call.origin)?)
}

pub(super) fn hann(call: &mut Call) -> Outputs {
    window(call, |angle| 0.5 - 0.5 * angle.cos())
}

pub(super) fn hamming(call: &mut Call) -> Outputs {
    window(call, |angle| 25.0 / 46.0 - 21.0 / 46.0 * angle.cos())
}

pub(super) fn blackman(call: &mut Call) -> Outputs {
    window(call, |angle| 0.42 - 0.5 * angle.cos() + 0.08 * (2.0 * angle).cos())
}

/// Triangles over the frequencies of a spectrum, as wide as they are for the ear.
pub(super) fn mel_weight_matrix(call: &mut Call) -> Outputs {
    let dtype = dtype_of(i32::try_from(call.int_or("output_datatype", 1)).unwrap_or(0))?;
    let mut given = Vec::new();
    for i in 0..5 {
        given.push(call.known_input(i)?.as_f64s().first().copied().unwrap_or(0.0));
    }
    let [bands, length, rate, low, high] = given[..] else {
        return Err(not_supported("a matrix without its five numbers"));
    };
    let whole = |n: f64| (1.0..MOST as f64).contains(&n).then_some(n as usize);
    let sizes = whole(bands).zip(whole(length)).map(|(b, n)| (b, n / 2 + 1));
    let sizes = sizes.filter(|&(bands, bins)| bands.saturating_mul(bins) <= MOST);
    let (Some((bands, bins)), true) = (sizes, rate >= 1.0 && low <= high && low >= 0.0) else {
        return Err(not_supported(format!("weights for {given:?}")));
    };
    let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
    let step = (mel(high) - mel(low)) / (bands + 2) as f64;
    let bin = |i: usize| {
        let hertz = 700.0 * (10f64.powf((i as f64 * step + mel(low)) / 2595.0) - 1.0);
        ((length + 1.0) * hertz / rate).floor() as usize
    };
    let edges: Vec<usize> = (0..bands + 2).map(bin).collect();
    if edges[bands] >= bins || edges[bands + 1] > bins {
        return Err(not_supported(format!("{bins} frequencies, {} asked for", edges[bands + 1])));
    }
    let mut values = vec![0f64; bins * bands];
    for band in 0..bands {
        let [left, middle, right] = [0, 1, 2].map(|k: usize| edges[band + k]);
        for at in left..=middle {
            let part =
                if left == middle { 1.0 } else { (at - left) as f64 / (middle - left) as f64 };
            values[at * bands + band] = part;
        }
        for at in middle..right {
            values[at * bands + band] = (right - at) as f64 / (right - middle) as f64;
        }
    }
    let values = call.graph.tensor(&Tensor::from_slice(&[bins, bands], &values), &call.origin);
    one(call.graph.cast(values, dtype, &call.origin)?)
}

/// What a transform takes and gives along its axis: real numbers (1) or complex ones (2).
struct Transform {
    /// Points on the circle.
    round: usize,
    inverse: bool,
    /// Only the first half of the frequencies is given, or taken by an inverse transform.
    half: bool,
}

impl Transform {
    /// Elements that are read of `given`, and elements of the result, and of how many parts.
    fn sizes(&self, given: usize) -> (usize, usize, usize) {
        let unique = self.round / 2 + 1;
        match (self.half, self.inverse) {
            (false, _) => (given.min(self.round), self.round, 2),
            (true, false) => (given.min(self.round), unique, 2),
            (true, true) => (given.min(unique), self.round, 1),
        }
    }

    /// The matrix from the parts of the operand to those of the result. Angles are reduced in
    /// integers, so that they are exact.
    fn matrix(&self, (read, parts): (usize, usize), (made, out): (usize, usize)) -> Vec<f64> {
        let scale = if self.inverse { 1.0 / self.round as f64 } else { 1.0 };
        let turn = if self.inverse { 1.0 } else { -1.0 };
        let mut values = Vec::with_capacity(read * parts * made * out);
        for n in 0..read {
            // A frequency of the first half stands for its mirror image as well.
            let alone = n == 0 || 2 * n == self.round;
            let twice = if self.half && self.inverse && !alone { 2.0 } else { 1.0 };
            for part in 0..parts {
                for k in 0..made {
                    let angle = TAU * ((n * k) % self.round) as f64 / self.round as f64;
                    let (sin, cos) = (turn * angle).sin_cos();
                    let both = if part == 0 { [cos, sin] } else { [-sin, cos] };
                    values.extend(both[..out].iter().map(|v| v * scale * twice));
                }
            }
        }
        values
    }

    /// The transform along an axis of x, whose last axis has the parts of a number: a product with
    /// a matrix, in the square of the time of a fast one.
    fn apply(&self, call: &mut Call, x: NodeId, axis: usize) -> Added {
        let ty = call.ty(x);
        let (rank, dtype) = (ty.rank(), ty.dtype);
        let parts = ty.shape[rank - 1];
        let (read, made, out) = self.sizes(ty.shape[axis]);
        let fits = [read, parts, made, out].iter().try_fold(1usize, |n, &e| n.checked_mul(e));
        if fits.is_none_or(|n| n > MOST) {
            return Err(not_supported(format!("a transform of {} points", self.round)));
        }
        let matrix = self.matrix((read, parts), (made, out));
        let x = call.cut(x, axis, (0, 1, read))?;
        let order: Vec<usize> =
            (0..rank - 1).filter(|&d| d != axis).chain([axis, rank - 1]).collect();
        let (g, o) = (&mut *call.graph, &call.origin);
        let x = g.permute(x, &order, o)?;
        let mut shape: Vec<usize> = order[..rank - 2].iter().map(|&d| ty.shape[d]).collect();
        let rows: usize = shape.iter().product();
        let x = g.reshape(x, &[rows, read * parts], o)?;
        let matrix = g.tensor(&Tensor::from_slice(&[read * parts, made * out], &matrix), o);
        let matrix = g.cast(matrix, dtype, o)?;
        let y = g.matmul(x, matrix, o)?;
        shape.extend([made, out]);
        let y = g.reshape(y, &shape, o)?;
        let back: Vec<usize> =
            (0..rank).map(|d| order.iter().position(|&o| o == d).unwrap_or(d)).collect();
        g.permute(y, &back, o)
    }
}

/// The parts of the numbers of a signal.
fn check_parts(call: &Call, x: NodeId, least: usize) -> Result<usize, Diagnostic> {
    let ty = call.ty(x);
    match ty.shape.last() {
        Some(&parts @ 1..=2) if ty.rank() >= least && ty.dtype.is_float() => Ok(parts),
        _ => Err(not_supported(format!("a signal of {}{:?}", ty.dtype, ty.shape))
            .expected("floats whose last axis has the 1 or 2 parts of a number")),
    }
}

pub(super) fn dft(call: &mut Call) -> Outputs {
    let (inverse, half) = (call.int_or("inverse", 0) != 0, call.int_or("onesided", 0) != 0);
    let x = call.input(0)?;
    let parts = check_parts(call, x, 2)?;
    let shape = call.shape(x);
    let axis = match call.opset {
        ..20 => call.int_or("axis", 1),
        _ => number(call, 2)?.unwrap_or(-2),
    };
    let axis = call.axis(axis, shape.len())?;
    if axis + 1 == shape.len() {
        return Err(not_supported("a transform over the parts of numbers"));
    }
    if half && (parts == 2) != inverse {
        return Err(not_supported("half of the frequencies of numbers that are not real"));
    }
    let given = shape[axis];
    let usual = if half && inverse { 2 * given.saturating_sub(1) } else { given };
    let round = length(call, 1)?.unwrap_or(usual);
    if given == 0 || round == 0 {
        return Err(not_supported("a transform of no elements"));
    }
    one(Transform { round, inverse, half }.apply(call, x, axis)?)
}

pub(super) fn stft(call: &mut Call) -> Outputs {
    let half = call.int_or("onesided", 1) != 0;
    let x = call.input(0)?;
    let parts = check_parts(call, x, 3)?;
    let shape = call.shape(x);
    let [batch, signal, _] = shape[..] else {
        return Err(not_supported(format!("a signal of shape {shape:?}")));
    };
    let step = length(call, 1)?.ok_or_else(|| not_supported("frames without a step"))?;
    let window = call.optional(2);
    let frame = match (length(call, 3)?, window) {
        (Some(frame), _) => frame,
        (None, Some(window)) => call.ty(window).numel(),
        (None, None) => signal,
    };
    if frame == 0 || frame > signal || (half && parts == 2) {
        return Err(not_supported(format!(
            "frames of {frame} of a signal of {signal} with {parts} parts, onesided {half}"
        )));
    }
    let frames = (signal - frame) / step + 1;
    let (g, o) = (&mut *call.graph, &call.origin);
    let x = g.permute(x, &[0, 2, 1], o)?;
    // Elements that are in no frame would be in the last one.
    let used = (frames - 1) * step + frame;
    let x = g.add(Op::Slice(smallvec![(0, 1, batch), (0, 1, parts), (0, 1, used)]), &[x], o)?;
    let x = g.add(Op::Window(smallvec![(frame, step, 1)]), &[x], o)?;
    let mut x = g.permute(x, &[0, 2, 3, 1], o)?;
    if let Some(window) = window {
        let window = g.reshape(window, &[1, 1, frame, 1], o)?;
        x = g.binary(BinaryFn::Mul, x, window, o)?;
    }
    one(Transform { round: frame, inverse: false, half }.apply(call, x, 2)?)
}
