//! Matrix products, convolutions and pooling.

use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::call::{Call, Outputs, not_supported, one};
use super::shape::pad_constant;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Shape, UnaryFn};

pub(super) fn matmul(call: &mut Call) -> Outputs {
    let (x, y) = (call.input(0)?, call.input(1)?);
    one(matmul_of(call, x, y)?)
}

/// The product of matrices, batches of them, or vectors.
pub(super) fn matmul_of(call: &mut Call, x: NodeId, y: NodeId) -> Added {
    let (xs, ys) = (call.shape(x), call.shape(y));
    if xs.is_empty() || ys.is_empty() {
        return Err(not_supported("a matrix product of scalars"));
    }
    // Vectors become matrices of one row or column, whose axis goes afterwards.
    let rank = xs.len().max(ys.len()).max(2);
    let (g, o) = (&mut *call.graph, &call.origin);
    let x = if xs.len() == 1 { g.reshape(x, &[1, xs[0]], o)? } else { x };
    let y = if ys.len() == 1 { g.reshape(y, &[ys[0], 1], o)? } else { y };
    let (x, y) = (g.with_rank(x, rank, o)?, g.with_rank(y, rank, o)?);
    let z = g.matmul(x, y, o)?;
    let mut shape = g.ty(z).shape.clone();
    if ys.len() == 1 {
        shape.pop();
    }
    if xs.len() == 1 {
        shape.remove(rank - 2);
    }
    g.reshape(z, &shape, o)
}

pub(super) fn gemm(call: &mut Call) -> Outputs {
    call.ignore("broadcast");
    let (alpha, beta) = (call.float_or("alpha", 1.0), call.float_or("beta", 1.0));
    let (trans_a, trans_b) = (call.int_or("transA", 0) != 0, call.int_or("transB", 0) != 0);
    let (mut x, mut y) = (call.input(0)?, call.input(1)?);
    let c = call.optional(2);
    // Old models hand over the pixels of an image as they are.
    if call.ty(x).rank() > 2 && call.opset < 9 {
        let shape = call.shape(x);
        let sizes = [shape[0], shape[1..].iter().product()];
        x = call.graph.reshape(x, &sizes, &call.origin)?;
    }
    if call.ty(x).rank() != 2 || call.ty(y).rank() != 2 {
        return Err(not_supported(format!(
            "operands {:?} and {:?}",
            call.shape(x).as_slice(),
            call.shape(y).as_slice()
        )));
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    if trans_a {
        x = g.permute(x, &[1, 0], o)?;
    }
    if trans_b {
        y = g.permute(y, &[1, 0], o)?;
    }
    let mut z = g.matmul(x, y, o)?;
    if alpha != 1.0 {
        z = g.binary_number(BinaryFn::Mul, z, f64::from(alpha), o)?;
    }
    if let Some(mut c) = c {
        if beta != 1.0 {
            c = g.binary_number(BinaryFn::Mul, c, f64::from(beta), o)?;
        }
        z = g.binary(BinaryFn::Add, z, c, o)?;
    }
    one(z)
}

fn sizes(values: &[i64]) -> Result<Vec<usize>, Diagnostic> {
    values
        .iter()
        .map(|&v| {
            usize::try_from(v).ok().filter(|&v| v < 1 << 31).ok_or_else(|| {
                not_supported(format!("strides, dilations or kernels of {values:?}"))
            })
        })
        .collect()
}

/// Windows over the spatial axes of `[n, c, d..]`.
struct Windows {
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    /// Borders before and after each spatial axis.
    pads: Vec<(i64, i64)>,
    /// Further border that only makes the last, partial window whole.
    ceil: Vec<i64>,
}

fn windows(call: &mut Call, spatial: &[usize], kernel: Vec<usize>) -> Result<Windows, Diagnostic> {
    let n = spatial.len();
    let strides = sizes(&call.ints("strides").unwrap_or_else(|| vec![1; n]))?;
    let dilations = sizes(&call.ints("dilations").unwrap_or_else(|| vec![1; n]))?;
    let auto = call.string_or("auto_pad", "NOTSET");
    let given = call.ints("pads").unwrap_or_else(|| vec![0; 2 * n]);
    let ceil_mode = call.int_or("ceil_mode", 0) != 0;
    let fits =
        kernel.len() == n && strides.len() == n && dilations.len() == n && given.len() == 2 * n;
    if !fits || strides.contains(&0) || dilations.contains(&0) || kernel.contains(&0) {
        return Err(not_supported(format!(
            "kernel {kernel:?}, strides {strides:?}, dilations {dilations:?}, pads {given:?}"
        )));
    }
    let mut pads = Vec::new();
    let mut ceil = Vec::new();
    for d in 0..n {
        let reach = (kernel[d] - 1)
            .checked_mul(dilations[d])
            .filter(|&r| r < 1 << 31)
            .ok_or_else(|| not_supported("a window that is too large"))? as i64;
        let (extent, stride) = (spatial[d] as i64, strides[d] as i64);
        let (before, after) = match auto.as_str() {
            "NOTSET" => (given[d], given[n + d]),
            "VALID" => (0, 0),
            "SAME_UPPER" | "SAME_LOWER" => {
                let out = (extent + stride - 1) / stride;
                let total = ((out - 1) * stride + reach + 1 - extent).max(0);
                let small = total / 2;
                if auto == "SAME_UPPER" { (small, total - small) } else { (total - small, small) }
            }
            other => return Err(not_supported(format!("auto_pad {other}"))),
        };
        if before.unsigned_abs() > 1 << 31 || after.unsigned_abs() > 1 << 31 {
            return Err(not_supported("a border that is too large"));
        }
        let room = extent + before + after - reach - 1;
        let rest = room.rem_euclid(stride);
        // A partial window counts where it starts within the operand or its first border.
        let starts_inside = room - rest + stride < extent + before;
        let more = ceil_mode && room >= 0 && rest != 0 && starts_inside;
        pads.push((before, after));
        ceil.push(if more { stride - rest } else { 0 });
    }
    Ok(Windows { kernel, strides, dilations, pads, ceil })
}

fn spatial_of(call: &Call, x: NodeId) -> Result<Vec<usize>, Diagnostic> {
    let shape = call.shape(x);
    if shape.len() < 3 {
        return Err(not_supported(format!("an operand {shape:?} without spatial axes")));
    }
    Ok(shape[2..].to_vec())
}

fn padded(call: &mut Call, x: NodeId, w: &Windows, fill: f64) -> Added {
    let dtype = call.ty(x).dtype;
    let mut borders = vec![(0, 0); 2];
    borders.extend(w.pads.iter().zip(&w.ceil).map(|(p, &c)| (p.0, p.1 + c)));
    let fill = if dtype.is_float() || fill.is_finite() {
        call.number(dtype, 0, fill)
    } else {
        let (low, _) = crate::graph::eval::int_range(dtype);
        call.number(dtype, 0, low as f64)
    };
    pad_constant(call, x, &borders, fill)
}

pub(super) fn conv(call: &mut Call) -> Outputs {
    let (x, weight) = (call.input(0)?, call.input(1)?);
    let bias = call.optional(2);
    one(conv_of(call, x, weight, bias)?)
}

/// The convolution that the attributes describe.
pub(super) fn conv_of(call: &mut Call, x: NodeId, weight: NodeId, bias: Option<NodeId>) -> Added {
    let spatial = spatial_of(call, x)?;
    let kernel: Vec<usize> = call.shape(weight).get(2..).unwrap_or(&[]).to_vec();
    call.ignore("kernel_shape");
    let groups = usize::try_from(call.int_or("group", 1)).unwrap_or(0);
    let w = windows(call, &spatial, kernel)?;
    let x = padded(call, x, &w, 0.0)?;
    let window = (w.strides.as_slice(), w.dilations.as_slice());
    let y = call.graph.conv([x, weight], window, groups, &call.origin)?;
    match bias {
        Some(bias) => add_bias(call, y, bias),
        None => Ok(y),
    }
}

/// Each channel convolved with its own weights along time, what came before it in front: that is a
/// state, or zeros. The last elements are the next state.
pub(super) fn causal_conv(call: &mut Call) -> Outputs {
    let activation = call.string_or("activation", "none");
    let (x, weight) = (call.input(0)?, call.input(1)?);
    let (xs, ws) = (call.shape(x), call.shape(weight));
    let (batch, channels, length, taps) = match (&xs[..], &ws[..]) {
        (&[n, c, l], &[o, 1, taps]) if o == c && taps > 0 => (n, c, l, taps),
        _ => return Err(not_supported(format!("a causal convolution of {xs:?} with {ws:?}"))),
    };
    let (before, dtype) = (taps - 1, call.ty(x).dtype);
    let state = match call.optional(3) {
        Some(state) if call.shape(state)[..] == [batch, channels, before] => state,
        Some(state) => {
            let (found, wanted) = (call.shape(state), [batch, channels, before]);
            return Err(not_supported(format!("a state of {found:?} instead of {wanted:?}")));
        }
        None => {
            let zero = call.number(dtype, 3, 0.0);
            call.graph.expand(zero, &[batch, channels, before], &call.origin)?
        }
    };
    let all = match before {
        0 => x,
        _ => call.graph.add(Op::Concat(2), &[state, x], &call.origin)?,
    };
    let mut y = call.graph.conv([all, weight], (&[1], &[1]), channels, &call.origin)?;
    if let Some(bias) = call.optional(2) {
        y = add_bias(call, y, bias)?;
    }
    y = match activation.as_str() {
        "none" => y,
        "silu" | "swish" => call.graph.composite(Composite::Silu, y, &call.origin)?,
        other => return Err(not_supported(format!("the activation {other:?}"))),
    };
    let next = call.cut(all, 2, (length as i64, 1, before))?;
    Ok(vec![Some(y), Some(next)])
}

/// Borders that a transposed convolution takes off its result, per spatial axis.
fn transposed_pads(
    call: &Call,
    extents: &[usize],
    strides: &[usize],
    reaches: &[i64],
    more: &[i64],
) -> Result<Vec<(i64, i64)>, Diagnostic> {
    let n = extents.len();
    let auto = call.string_or("auto_pad", "NOTSET");
    let given = call.ints("pads").unwrap_or_else(|| vec![0; 2 * n]);
    let wanted = call.ints("output_shape");
    let fits = given.len() == 2 * n
        && given.iter().all(|p| p.unsigned_abs() < 1 << 31)
        && wanted.as_ref().is_none_or(|w| w.len() == n && w.iter().all(|&e| e >> 31 == 0));
    if !fits {
        return Err(not_supported(format!("pads {given:?} and output shape {wanted:?}")));
    }
    let pads = (0..n).map(|d| {
        let whole = (extents[d] as i64 - 1) * strides[d] as i64 + reaches[d] + 1 + more[d];
        let target = match (&wanted, auto.as_str()) {
            (Some(wanted), _) => wanted[d],
            (None, "SAME_UPPER" | "SAME_LOWER") => extents[d] as i64 * strides[d] as i64,
            (None, "VALID") => return (0, 0),
            (None, _) => return (given[d], given[n + d]),
        };
        let total = whole - target;
        if total < 0 {
            return (0, total);
        }
        let (small, large) = (total / 2, total - total / 2);
        if auto == "SAME_UPPER" { (small, large) } else { (large, small) }
    });
    Ok(pads.collect())
}

/// Spread by the strides, bordered, and convolved with the mirrored weight.
pub(super) fn conv_transpose(call: &mut Call) -> Outputs {
    let (x, weight) = (call.input(0)?, call.input(1)?);
    let extents = spatial_of(call, x)?;
    let n = extents.len();
    let (xs, ws) = (call.shape(x), call.shape(weight));
    let groups = usize::try_from(call.int_or("group", 1)).unwrap_or(0);
    call.ignore("kernel_shape");
    let strides = sizes(&call.ints("strides").unwrap_or_else(|| vec![1; n]))?;
    let dilations = sizes(&call.ints("dilations").unwrap_or_else(|| vec![1; n]))?;
    let more = call.ints("output_padding").unwrap_or_else(|| vec![0; n]);
    let fits = ws.len() == n + 2
        && ws[0] == xs[1]
        && groups > 0
        && ws[0].is_multiple_of(groups)
        && [strides.len(), dilations.len(), more.len()] == [n; 3]
        && !strides.contains(&0)
        && !dilations.contains(&0)
        && !ws.contains(&0)
        && ws[2..].iter().chain(&extents).all(|&e| e < 1 << 31)
        && more.iter().all(|&m| m >> 31 == 0);
    if !fits {
        return Err(not_supported(format!(
            "input {xs:?}, weight {ws:?}, groups {groups}, strides {strides:?}, \
             dilations {dilations:?}, output padding {more:?}"
        )));
    }
    let reaches: Vec<i64> =
        (0..n).map(|d| (ws[2 + d] as i64 - 1).saturating_mul(dilations[d] as i64)).collect();
    if reaches.iter().any(|&r| r >> 31 != 0) {
        return Err(not_supported("a window that is too large"));
    }
    let pads = transposed_pads(call, &extents, &strides, &reaches, &more)?;
    let mut y = x;
    for (d, &stride) in strides.iter().enumerate() {
        y = spread(call, y, 2 + d, stride)?;
    }
    let zero = call.number(call.ty(x).dtype, 0, 0.0);
    let mut borders = vec![(0, 0); 2];
    borders.extend((0..n).map(|d| (reaches[d] - pads[d].0, reaches[d] - pads[d].1 + more[d])));
    y = pad_constant(call, y, &borders, zero)?;
    let weight = mirrored(call, weight, groups)?;
    let ones = vec![1; n];
    y = call.graph.conv([y, weight], (&ones, &dilations), groups, &call.origin)?;
    one(match call.optional(2) {
        Some(bias) => add_bias(call, y, bias)?,
        None => y,
    })
}

/// Zeros between the elements of an axis, so that they stand a stride apart.
fn spread(call: &mut Call, x: NodeId, axis: usize, stride: usize) -> Added {
    let shape = call.shape(x);
    if stride == 1 || shape[axis] == 0 {
        return Ok(x);
    }
    let zero = call.number(call.ty(x).dtype, 0, 0.0);
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut apart = shape.clone();
    apart.insert(axis + 1, 1);
    let y = g.reshape(x, &apart, o)?;
    let mut borders = SmallVec::from_elem((0, 0), apart.len());
    borders[axis + 1] = (0, stride - 1);
    let y = g.add(Op::Pad(borders), &[y, zero], o)?;
    let mut joined = shape.clone();
    joined[axis] *= stride;
    let y = g.reshape(y, &joined, o)?;
    call.cut(y, axis, (0, 1, (shape[axis] - 1) * stride + 1))
}

/// The weight `[c, o / groups, k..]` of a transposed convolution as `[o, c / groups, k..]`, with
/// the taps in reverse.
fn mirrored(call: &mut Call, weight: NodeId, groups: usize) -> Added {
    let shape = call.shape(weight);
    let mut y = weight;
    for (axis, &extent) in shape.iter().enumerate().skip(2) {
        y = call.cut(y, axis, (extent as i64 - 1, -1, extent))?;
    }
    let mut apart = Shape::from_slice(&[groups, shape[0] / groups, shape[1]]);
    apart.extend_from_slice(&shape[2..]);
    let order: Vec<usize> = [0, 2, 1].into_iter().chain(3..apart.len()).collect();
    let mut joined = Shape::from_slice(&[groups * shape[1], shape[0] / groups]);
    joined.extend_from_slice(&shape[2..]);
    let (g, o) = (&mut *call.graph, &call.origin);
    let y = g.reshape(y, &apart, o)?;
    let y = g.permute(y, &order, o)?;
    g.reshape(y, &joined, o)
}

/// y plus a number for each channel.
fn add_bias(call: &mut Call, y: NodeId, bias: NodeId) -> Added {
    let mut shape = Shape::from_elem(1, call.ty(y).rank());
    shape[1] = call.ty(bias).numel();
    let bias = call.graph.reshape(bias, &shape, &call.origin)?;
    call.graph.binary(BinaryFn::Add, y, bias, &call.origin)
}

/// f over the windows of a padded operand, as `[n, c, e..]`.
fn pool(call: &mut Call, padded: NodeId, w: &Windows, f: ReduceFn) -> Added {
    let windows = windowed(call, padded, w)?;
    let y = folded(call, windows, w, f)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let shape: Vec<usize> = g.ty(y).shape[..g.ty(padded).rank()].to_vec();
    g.reshape(y, &shape, o)
}

/// The windows of a padded operand, as `[n, c, e.., k..]`.
fn windowed(call: &mut Call, padded: NodeId, w: &Windows) -> Added {
    let axes: SmallVec<[(usize, usize, usize); 3]> =
        (0..w.kernel.len()).map(|d| (w.kernel[d], w.strides[d], w.dilations[d])).collect();
    call.graph.add(Op::Window(axes), &[padded], &call.origin)
}

/// f over each window.
fn folded(call: &mut Call, windows: NodeId, w: &Windows, f: ReduceFn) -> Added {
    let rank = call.ty(windows).rank();
    let folded: Vec<usize> = (rank - w.kernel.len()..rank).collect();
    call.graph.reduce(f, windows, &folded, &call.origin)
}

fn pool_windows(call: &mut Call, x: NodeId) -> Result<Windows, Diagnostic> {
    let spatial = spatial_of(call, x)?;
    let kernel =
        call.ints("kernel_shape").ok_or_else(|| not_supported("pooling without a kernel"))?;
    windows(call, &spatial, sizes(&kernel)?)
}

/// Largest elements of windows and, where it is asked for, their places in the whole operand.
pub(super) fn max_pool(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let by_columns = call.int_or("storage_order", 0) != 0;
    let w = pool_windows(call, x)?;
    let bordered = padded(call, x, &w, f64::NEG_INFINITY)?;
    let most = pool(call, bordered, &w, ReduceFn::Max)?;
    if call.n_outputs() < 2 {
        return one(most);
    }
    // More than any place, and what the border has.
    const NOWHERE: f64 = (1u64 << 53) as f64;
    let shape = call.shape(x);
    let mut order: Vec<usize> = (2..shape.len()).collect();
    if !by_columns {
        order.reverse();
    }
    let mut place = call.number(DType::I64, shape.len(), 0.0);
    let mut step = 1.0;
    for axis in order.into_iter().chain([1, 0]) {
        let (g, o) = (&mut *call.graph, &call.origin);
        let along = g.add(Op::Iota(shape.clone(), axis as u8), &[], o)?;
        let along = g.binary_number(BinaryFn::Mul, along, step, o)?;
        place = g.binary(BinaryFn::Add, place, along, o)?;
        step *= shape[axis] as f64;
    }
    let places = padded(call, place, &w, NOWHERE)?;
    let (values, places) = (windowed(call, bordered, &w)?, windowed(call, places, &w)?);
    let largest = folded(call, values, &w, ReduceFn::Max)?;
    let nowhere = call.number(DType::I64, call.ty(places).rank(), NOWHERE);
    let found = call.graph.binary(BinaryFn::Eq, values, largest, &call.origin)?;
    let found = call.graph.select(found, places, nowhere, &call.origin)?;
    let first = folded(call, found, &w, ReduceFn::Min)?;
    let shape = call.shape(most);
    let first = call.graph.reshape(first, &shape, &call.origin)?;
    Ok(vec![Some(most), Some(first)])
}

pub(super) fn average_pool(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let include = call.int_or("count_include_pad", 0) != 0;
    let w = pool_windows(call, x)?;
    let sums = padded(call, x, &w, 0.0)?;
    let sums = pool(call, sums, &w, ReduceFn::Sum)?;
    let bordered = w.pads.iter().any(|&p| p != (0, 0));
    let partial = w.ceil.iter().any(|&c| c != 0);
    if !partial && (include || !bordered) {
        let count: usize = w.kernel.iter().product();
        return one(call.graph.binary_number(
            BinaryFn::Mul,
            sums,
            1.0 / count as f64,
            &call.origin,
        )?);
    }
    // The number of elements in each window: the same sum over ones.
    let ty = call.ty(x);
    let mut shape = Shape::from_slice(&[1, 1]);
    shape.extend_from_slice(&ty.shape[2..]);
    let one_value = call.number(ty.dtype, shape.len(), 1.0);
    let mut ones = call.graph.expand(one_value, &shape, &call.origin)?;
    let mut counted = Windows { pads: w.pads.clone(), ceil: w.ceil.clone(), ..w };
    if include {
        let fill = call.number(ty.dtype, 0, 1.0);
        let mut borders = vec![(0, 0); 2];
        borders.extend(counted.pads.iter().copied());
        ones = pad_constant(call, ones, &borders, fill)?;
        counted.pads = vec![(0, 0); counted.kernel.len()];
    }
    let ones = padded(call, ones, &counted, 0.0)?;
    let counts = pool(call, ones, &counted, ReduceFn::Sum)?;
    one(call.graph.binary(BinaryFn::Div, sums, counts, &call.origin)?)
}

/// The p-norm of each window.
pub(super) fn lp_pool(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let p = call.int_or("p", 2);
    let w = pool_windows(call, x)?;
    let padded = padded(call, x, &w, 0.0)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let magnitude = g.unary(UnaryFn::Abs, padded, o)?;
    let power = g.binary_number(BinaryFn::Pow, magnitude, p as f64, o)?;
    let sums = pool(call, power, &w, ReduceFn::Sum)?;
    let inverse = 1.0 / p as f64;
    one(call.graph.binary_number(BinaryFn::Pow, sums, inverse, &call.origin)?)
}

fn global(call: &mut Call) -> Result<(NodeId, Vec<usize>), Diagnostic> {
    let x = call.input(0)?;
    spatial_of(call, x)?;
    Ok((x, (2..call.ty(x).rank()).collect()))
}

pub(super) fn global_average_pool(call: &mut Call) -> Outputs {
    let (x, axes) = global(call)?;
    one(call.graph.mean(x, &axes, &call.origin)?)
}

pub(super) fn global_max_pool(call: &mut Call) -> Outputs {
    let (x, axes) = global(call)?;
    one(call.graph.reduce(ReduceFn::Max, x, &axes, &call.origin)?)
}
