//! Resizing: along each axis, a sum of a few gathered neighbours with weights known here.

use kiln_runtime::tensor::{DType, Tensor};

use super::call::{Call, Outputs, not_supported, one};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Op, Shape};

/// Elements of an axis and neighbours of an element that tables are written for.
const MOST: usize = 1 << 16;

/// What is the same for all axes.
struct Settings {
    mode: String,
    coordinates: String,
    nearest: String,
    cubic: f64,
    antialias: bool,
    exclude_outside: bool,
    outside: f64,
}

/// One axis: from how many to how many, by which factor, of which part.
struct Axis {
    from: usize,
    to: usize,
    scale: f64,
    part: (f64, f64),
}

/// Where an element of the result lies in the operand.
fn place(settings: &Settings, axis: &Axis, i: usize) -> Result<f64, Diagnostic> {
    let (i, from, last) = (i as f64, axis.from as f64, axis.from as f64 - 1.0);
    let wide = axis.scale * from;
    Ok(match settings.coordinates.as_str() {
        "align_corners" if wide == 1.0 => 0.0,
        "align_corners" => i * last / (wide - 1.0),
        "asymmetric" => i / axis.scale,
        "tf_crop_and_resize" => {
            let (start, end) = axis.part;
            let inner = match wide == 1.0 {
                true => (end - start) * last / 2.0,
                false => i * (end - start) * last / (wide - 1.0),
            };
            inner + start * last
        }
        "pytorch_half_pixel" if wide == 1.0 => -0.5,
        "pytorch_half_pixel" | "half_pixel" => (i + 0.5) / axis.scale - 0.5,
        "half_pixel_symmetric" => {
            let adjustment = axis.to as f64 / wide;
            from / 2.0 * (1.0 - adjustment) + (i + 0.5) / axis.scale - 0.5
        }
        other => return Err(not_supported(format!("coordinate transformation {other}"))),
    })
}

/// Weights of neighbours at a distance, for a fraction in (0, 1].
fn weights(settings: &Settings, fraction: f64, scale: f64) -> Result<Vec<f64>, Diagnostic> {
    let a = settings.cubic;
    let cubic = |x: f64| {
        let x = x.abs();
        match x {
            _ if x <= 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
            _ if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
            _ => 0.0,
        }
    };
    let scale = if settings.antialias { scale.min(1.0) } else { 1.0 };
    let window = |reach: f64, f: &dyn Fn(f64) -> f64| {
        let start = (-reach / scale).floor() as i64 + 1;
        let end = 2 - start;
        let list: Vec<f64> = (start..end).map(|i| f(scale * (i as f64 - fraction))).collect();
        let sum: f64 = list.iter().sum();
        list.into_iter().map(|w| w / sum).collect()
    };
    Ok(match settings.mode.as_str() {
        "linear" => window(1.0, &|x| (1.0 - x.abs()).clamp(0.0, 1.0)),
        "cubic" => window(2.0, &cubic),
        "nearest" => {
            let right = match settings.nearest.as_str() {
                _ if fraction == 1.0 => true,
                "round_prefer_floor" => fraction > 0.5,
                "round_prefer_ceil" => fraction >= 0.5,
                "floor" => false,
                "ceil" => true,
                other => return Err(not_supported(format!("nearest mode {other}"))),
            };
            if right { vec![0.0, 1.0] } else { vec![1.0, 0.0] }
        }
        other => return Err(not_supported(format!("mode {other}"))),
    })
}

/// Neighbours of an element and their weights; `None` outside of the operand.
type Neighbours = Option<Vec<(i64, f64)>>;

/// Neighbours and their weights, for each element of the result; `None` outside of the operand.
fn neighbours(settings: &Settings, axis: &Axis) -> Result<Vec<Neighbours>, Diagnostic> {
    let last = axis.from as i64 - 1;
    let row = |i: usize| {
        let x = place(settings, axis, i)?;
        if !x.is_finite() || x.abs() > 1e9 {
            return Err(not_supported(format!("a scale of {}", axis.scale)));
        }
        let crop = settings.coordinates == "tf_crop_and_resize";
        if crop && (x < 0.0 || x > last as f64) {
            return Ok(None);
        }
        let fraction = if x == x.floor() { 1.0 } else { x - x.floor() };
        let mut list = weights(settings, fraction, axis.scale)?;
        // An even number of neighbours around x; at an integer, one more of them to the left.
        let first = (x.ceil() as i64) - (list.len() / 2) as i64;
        let inside = |at: i64| (0..=last).contains(&at);
        if settings.exclude_outside {
            for (k, w) in list.iter_mut().enumerate() {
                *w = if inside(first + k as i64) { *w } else { 0.0 };
            }
            let sum: f64 = list.iter().sum();
            list.iter_mut().for_each(|w| *w /= if sum == 0.0 { 1.0 } else { sum });
        }
        let at = |k: usize| (first + k as i64).clamp(0, last);
        Ok(Some(list.into_iter().enumerate().map(|(k, w)| (at(k), w)).collect()))
    };
    (0..axis.to).map(row).collect()
}

/// x with one axis resized.
fn resize_axis(call: &mut Call, x: NodeId, d: usize, settings: &Settings, axis: &Axis) -> Added {
    // The least window of a small scale is wide.
    let reach = if settings.antialias { 4.0 / axis.scale.min(1.0) } else { 4.0 };
    if axis.from == 0 || axis.to > MOST || !(0.0..MOST as f64).contains(&reach) {
        return Err(not_supported(format!("an axis of {} to {}", axis.from, axis.to)));
    }
    let rows = neighbours(settings, axis)?;
    let taps = rows.iter().flatten().map(Vec::len).max().unwrap_or(0);
    let ty = call.ty(x);
    let mut shape = Shape::from_elem(1, ty.rank());
    shape[d] = axis.to;
    if settings.mode == "nearest" && rows.iter().all(Option::is_some) {
        let pick = |row: &[(i64, f64)]| row.iter().find(|t| t.1 == 1.0).map_or(0, |t| t.0);
        let places: Vec<i64> = rows.iter().flatten().map(|row| pick(row)).collect();
        let index = call.graph.i64s(&[axis.to], &places, &call.origin);
        return call.graph.add(Op::Gather(d as u8), &[x, index], &call.origin);
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut sum = None;
    for tap in 0..taps {
        let of =
            |row: &Neighbours| row.as_ref().and_then(|r| r.get(tap)).copied().unwrap_or((0, 0.0));
        let places: Vec<i64> = rows.iter().map(|r| of(r).0).collect();
        let factors: Vec<f32> = rows.iter().map(|r| of(r).1 as f32).collect();
        if factors.iter().all(|&w| w == 0.0) {
            continue;
        }
        let index = g.i64s(&[axis.to], &places, o);
        let there = g.add(Op::Gather(d as u8), &[x, index], o)?;
        let factor = g.tensor(&Tensor::from_slice(&shape, &factors), o);
        let factor = g.cast(factor, ty.dtype, o)?;
        let part = g.binary(BinaryFn::Mul, there, factor, o)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => g.binary(BinaryFn::Add, sum, part, o)?,
        });
    }
    let inside: Vec<u8> = rows.iter().map(|r| r.is_some() as u8).collect();
    let outside = g.scalar(ty.dtype, ty.rank(), settings.outside, o);
    let Some(sum) = sum else {
        let mut to = ty.shape.clone();
        to[d] = axis.to;
        return g.expand(outside, &to, o);
    };
    if inside.iter().all(|&i| i == 1) {
        return Ok(sum);
    }
    let inside = g.tensor(&Tensor::from_slice(&shape, &inside), o);
    let inside = g.cast(inside, DType::Bool, o)?;
    g.select(inside, sum, outside, o)
}

/// The numbers of an operand that decides shapes; absent or empty is `None`.
fn floats(call: &Call, index: usize) -> Result<Option<Vec<f64>>, Diagnostic> {
    let Some(id) = call.optional(index) else { return Ok(None) };
    if call.ty(id).numel() == 0 {
        return Ok(None);
    }
    let value = call.known_input(index)?;
    Ok(Some(value.as_f64s()))
}

/// Extents and factors of the axes that are resized.
fn targets(
    call: &Call,
    axes: &[usize],
    scales: Option<Vec<f64>>,
    sizes: Option<Vec<f64>>,
) -> Result<Vec<(usize, f64)>, Diagnostic> {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let policy = call.string_or("keep_aspect_ratio_policy", "stretch");
    let from = |i: usize| shape[axes[i]] as f64;
    let bad = |list: &[f64]| {
        list.len() != axes.len() || list.iter().any(|v| !(0.0..=MOST as f64).contains(v))
    };
    match (scales, sizes) {
        (Some(scales), _) if !bad(&scales) => {
            let to = |i: usize| (from(i) * scales[i]) as usize;
            Ok((0..axes.len()).map(|i| (to(i), scales[i])).collect())
        }
        (None, Some(sizes)) if !bad(&sizes) => {
            let ratios = (0..axes.len()).map(|i| sizes[i] / from(i));
            let kept = match policy.as_str() {
                "not_larger" => ratios.fold(f64::INFINITY, f64::min),
                "not_smaller" => ratios.fold(0.0, f64::max),
                _ => {
                    return Ok(ratios.enumerate().map(|(i, r)| (sizes[i] as usize, r)).collect());
                }
            };
            let to = |i: usize| (kept * from(i) + 0.5) as usize;
            Ok((0..axes.len()).map(|i| (to(i), kept)).collect())
        }
        (scales, sizes) => Err(not_supported(format!("scales {scales:?} and sizes {sizes:?}"))),
    }
}

/// x with axes resized, in floating point.
fn resize_axes(
    call: &mut Call,
    settings: &Settings,
    axes: &[usize],
    targets: &[(usize, f64)],
    parts: Option<Vec<f64>>,
) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let exact = ty.dtype.is_float() || settings.mode == "nearest";
    let work = if exact { ty.dtype } else { DType::F32 };
    let mut y = call.graph.cast(x, work, &call.origin)?;
    for (i, (&d, &(to, scale))) in axes.iter().zip(targets).enumerate() {
        let part = match &parts {
            Some(parts) if parts.len() == 2 * axes.len() => (parts[i], parts[axes.len() + i]),
            _ => (0.0, 1.0),
        };
        let axis = Axis { from: ty.shape[d], to, scale, part };
        if to != axis.from || (scale - 1.0).abs() > 1e-9 || part != (0.0, 1.0) {
            y = resize_axis(call, y, d, settings, &axis)?;
        }
    }
    one(call.graph.cast(y, ty.dtype, &call.origin)?)
}

pub(super) fn resize(call: &mut Call) -> Outputs {
    let old = call.opset < 11;
    let coordinates = if old { "asymmetric" } else { "half_pixel" };
    let nearest = if old { "floor" } else { "round_prefer_floor" };
    let settings = Settings {
        mode: call.string_or("mode", "nearest"),
        coordinates: call.string_or("coordinate_transformation_mode", coordinates),
        nearest: call.string_or("nearest_mode", nearest),
        cubic: f64::from(call.float_or("cubic_coeff_a", -0.75)),
        antialias: call.int_or("antialias", 0) != 0,
        exclude_outside: call.int_or("exclude_outside", 0) != 0,
        outside: f64::from(call.float_or("extrapolation_value", 0.0)),
    };
    let rank = call.ty(call.input(0)?).rank();
    let axes = match call.ints("axes") {
        Some(axes) => call.axes(&axes, rank)?,
        None => (0..rank).collect(),
    };
    let (parts, scales, sizes) = match old {
        true => (None, floats(call, 1)?, None),
        false => (floats(call, 1)?, floats(call, 2)?, floats(call, 3)?),
    };
    let parts = parts.filter(|_| settings.coordinates == "tf_crop_and_resize");
    let targets = targets(call, &axes, scales, sizes)?;
    resize_axes(call, &settings, &axes, &targets, parts)
}

pub(super) fn upsample(call: &mut Call) -> Outputs {
    let mode = call.string_or("mode", "nearest");
    let settings = Settings {
        mode: if mode == "bilinear" { "linear".to_string() } else { mode },
        coordinates: "asymmetric".to_string(),
        nearest: "floor".to_string(),
        cubic: -0.75,
        antialias: false,
        exclude_outside: false,
        outside: 0.0,
    };
    let axes: Vec<usize> = (0..call.ty(call.input(0)?).rank()).collect();
    let scales = match call.floats("scales") {
        Some(scales) => Some(scales.into_iter().map(f64::from).collect()),
        None => floats(call, 1)?,
    };
    let targets = targets(call, &axes, scales, None)?;
    resize_axes(call, &settings, &axes, &targets, None)
}
