//! Operators of onnxruntime's own (`com.microsoft`) that exporters of language models write:
//! attention with caches, fused norms and functions, weights of few bits. Their meaning is that of
//! onnxruntime 1.31 on CPUs (docs/ContribOperators.md there).

use kiln_runtime::tensor::DType;

use super::attention::{bias_of, count, repeat_heads, scores, split_heads, turned};
use super::call::{Call, Outputs, not_supported, one};
use super::norm::stashed;
use super::pointwise::tanh_gelu;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Composite, Op, Shape};

/// x, and a bias where there is one.
fn with_bias(call: &mut Call, x: NodeId, index: usize) -> Added {
    match call.optional(index) {
        Some(bias) => call.graph.binary(BinaryFn::Add, x, bias, &call.origin),
        None => Ok(x),
    }
}

pub(super) fn fast_gelu(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let x = with_bias(call, x, 1)?;
    one(tanh_gelu(call, x)?)
}

pub(super) fn bias_gelu(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let x = with_bias(call, x, 1)?;
    one(call.graph.composite(Composite::Gelu, x, &call.origin)?)
}

/// x * sigmoid(alpha * x)
pub(super) fn quick_gelu(call: &mut Call) -> Outputs {
    let alpha = f64::from(call.float_or("alpha", 1.702));
    let x = call.input(0)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let scaled = g.binary_number(BinaryFn::Mul, x, alpha, o)?;
    let gate = g.composite(Composite::Sigmoid, scaled, o)?;
    one(g.binary(BinaryFn::Mul, x, gate, o)?)
}

/// The sum of an input, what skipped a layer and perhaps a bias, normalised along the last axis and
/// scaled. Outputs 1 and 2, which training reads, are not made.
fn skip_norm(
    call: &mut Call,
    bias: usize,
    norm: impl Fn(u8, u32) -> Composite,
) -> Result<(NodeId, NodeId), Diagnostic> {
    let epsilon = call.float_or("epsilon", 1e-12);
    let (x, skip) = (call.input(0)?, call.input(1)?);
    let ty = call.ty(x);
    if ty.rank() == 0 {
        return Err(not_supported("a norm of one number"));
    }
    let sum = call.graph.binary(BinaryFn::Add, x, skip, &call.origin)?;
    let sum = with_bias(call, sum, bias)?;
    let wide = stashed(call, sum)?;
    let f = norm(ty.rank() as u8 - 1, epsilon.to_bits());
    let y = call.graph.composite(f, wide, &call.origin)?;
    let y = call.graph.cast(y, ty.dtype, &call.origin)?;
    let scale = call.input(2)?;
    Ok((call.graph.binary(BinaryFn::Mul, y, scale, &call.origin)?, sum))
}

pub(super) fn skip_layer_norm(call: &mut Call) -> Outputs {
    let (y, sum) = skip_norm(call, 4, Composite::LayerNorm)?;
    Ok(vec![Some(with_bias(call, y, 3)?), None, None, Some(sum)])
}

pub(super) fn skip_rms_norm(call: &mut Call) -> Outputs {
    let (y, sum) = skip_norm(call, 3, Composite::RmsNorm)?;
    Ok(vec![Some(y), None, None, Some(sum)])
}

/// Rows of two tables of cosines and sines for positions `[b or 1, s]`, `[b or 1, 1, s, d]`.
fn angles(
    call: &mut Call,
    tables: [NodeId; 2],
    positions: NodeId,
) -> Result<[NodeId; 2], Diagnostic> {
    let mut rows = [positions; 2];
    for (row, table) in rows.iter_mut().zip(tables) {
        if call.ty(table).rank() != 2 {
            return Err(not_supported(format!("a table of shape {:?}", call.shape(table))));
        }
        let (g, o) = (&mut *call.graph, &call.origin);
        let found = g.add(Op::Gather(0), &[table, positions], o)?;
        let mut shape = g.ty(found).shape.clone();
        shape.insert(1, 1);
        *row = g.reshape(found, &shape, o)?;
    }
    Ok(rows)
}

pub(super) fn rotary(call: &mut Call) -> Outputs {
    for (name, what) in [("is_packed_batching", "packed batches"), ("scale", "a scale")] {
        let plain = if name == "scale" {
            call.float_or(name, 1.0) == 1.0
        } else {
            call.int_or(name, 0) == 0
        };
        if !plain {
            return Err(not_supported(format!("{what} of rotary positions")));
        }
    }
    let interleaved = call.int_or("interleaved", 0) != 0;
    let given = call.input(0)?;
    let from = call.shape(given);
    let tables = [call.input(2)?, call.input(3)?];
    let half = call.shape(tables[0]).last().copied().unwrap_or(0);
    let dim = match call.int_or("rotary_embedding_dim", 0) {
        0 => 2 * half,
        dim => usize::try_from(dim).unwrap_or(0),
    };
    // Without a number of heads, they are as wide as the tables say.
    let x = match (from.len(), call.int_or("num_heads", 0)) {
        (3, 0) if half > 0 && from[2].is_multiple_of(2 * half) => {
            let (g, o) = (&mut *call.graph, &call.origin);
            let x = g.reshape(given, &[from[0], from[1], from[2] / (2 * half), 2 * half], o)?;
            g.permute(x, &[0, 2, 1, 3], o)?
        }
        _ => split_heads(call, given, "num_heads")?,
    };
    let (batch, steps, width) = (call.shape(x)[0], call.shape(x)[2], call.shape(x)[3]);
    if dim != 2 * half || dim > width {
        return Err(not_supported(format!(
            "a rotation of {dim} of {width} numbers by {half} angles"
        )));
    }
    let positions = call.input(1)?;
    let positions = match call.ty(positions).numel() {
        // Where the first one stands.
        1 if batch * steps != 1 => {
            let (g, o) = (&mut *call.graph, &call.origin);
            let first = g.reshape(positions, &[1, 1], o)?;
            let along = g.add(Op::Iota(Shape::from_slice(&[1, steps]), 1), &[], o)?;
            g.binary(BinaryFn::Add, along, first, o)?
        }
        n if n == batch * steps => call.graph.reshape(positions, &[batch, steps], &call.origin)?,
        n => return Err(not_supported(format!("{n} positions for {batch} times {steps}"))),
    };
    let turns = angles(call, tables, positions)?;
    let mut y = turned(call, x, turns, (dim, interleaved))?;
    if from.len() == 3 {
        y = call.graph.permute(y, &[0, 2, 1, 3], &call.origin)?;
    }
    one(call.graph.reshape(y, &from, &call.origin)?)
}

/// Values weighted by a softmax of scores, `[b, heads, s, d]` as `[b, s, heads * d]`.
fn mixed(call: &mut Call, scores: NodeId, v: NodeId) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let weights = g.composite(Composite::Softmax(3), scores, o)?;
    let y = g.matmul(weights, v, o)?;
    let y = g.permute(y, &[0, 2, 1, 3], o)?;
    let shape = g.ty(y).shape.clone();
    g.reshape(y, &[shape[0], shape[1], shape[2] * shape[3]], o)
}

/// A part of a bias of queries, keys and values, added to one of them `[b, s, width]`.
fn with_part(call: &mut Call, x: NodeId, start: usize) -> Added {
    let Some(bias) = call.optional(3) else { return Ok(x) };
    let width = call.shape(x).last().copied().unwrap_or(0);
    let all = call.shape(bias);
    if call.ty(x).rank() != 3 || all.len() != 1 || start + width > all[0] {
        return Err(not_supported(format!("a bias {all:?} of {:?}", call.shape(x))));
    }
    let part = call.cut(bias, 0, (start as i64, 1, width))?;
    call.graph.binary(BinaryFn::Add, x, part, &call.origin)
}

/// What is added to scores for keys that a mask `[b, t]` of 0 and 1, or lengths `[b]`, leave out.
fn padding(call: &mut Call, mask: NodeId, (dtype, columns): (DType, usize)) -> Added {
    let never = f64::from(call.float_or("mask_filter_value", -10000.0));
    let shape = call.shape(mask);
    let (g, o) = (&mut *call.graph, &call.origin);
    let allowed = match shape[..] {
        [batch] => {
            let lengths = g.reshape(mask, &[batch, 1, 1, 1], o)?;
            let lengths = g.cast(lengths, DType::I64, o)?;
            let column = g.add(Op::Iota(Shape::from_slice(&[1, 1, 1, columns]), 3), &[], o)?;
            g.binary(BinaryFn::Lt, column, lengths, o)?
        }
        [batch, width] if width == columns => {
            let mask = g.reshape(mask, &[batch, 1, 1, columns], o)?;
            g.cast(mask, DType::Bool, o)?
        }
        [batch, rows, width] if width == columns => {
            let mask = g.reshape(mask, &[batch, 1, rows, columns], o)?;
            g.cast(mask, DType::Bool, o)?
        }
        _ => return Err(not_supported(format!("a mask of shape {shape:?} for {columns} keys"))),
    };
    let zero = call.number(dtype, 0, 0.0);
    let never = call.number(dtype, 0, never);
    call.graph.select(allowed, zero, never, &call.origin)
}

pub(super) fn multi_head_attention(call: &mut Call) -> Outputs {
    if call.optional(8).is_some() || call.optional(9).is_some() {
        return Err(not_supported("a cache that is shared, with its length as an operand"));
    }
    let query = call.input(0)?;
    let ty = call.ty(query);
    let (Some(key), Some(value), 3) = (call.optional(1), call.optional(2), ty.rank()) else {
        return Err(not_supported("queries, keys and values in one tensor"));
    };
    let heads = count(call, "num_heads")?;
    let width = ty.shape[2];
    let query = with_part(call, query, 0)?;
    let q = split_heads(call, query, "num_heads")?;
    let mut cached = Vec::new();
    for (x, start, past) in [(key, width, 6), (value, 2 * width, 7)] {
        // Of rank 4, it has its heads and its bias already.
        let x = if call.ty(x).rank() == 3 { with_part(call, x, start)? } else { x };
        let x = split_heads(call, x, "num_heads")?;
        cached.push(match call.optional(past) {
            Some(past) => call.graph.add(Op::Concat(2), &[past, x], &call.origin)?,
            None => x,
        });
    }
    let (k, v) = (cached[0], cached[1]);
    if call.shape(k)[1] != heads || call.shape(v)[1] != heads {
        return Err(not_supported(format!("keys {:?} of {heads} heads", call.shape(k))));
    }
    let (rows, columns) = (call.shape(q)[2], call.shape(k)[2]);
    let mut scores = scores(call, q, k)?;
    if call.int_or("unidirectional", 0) != 0 {
        let allowed = causal(call, (rows, columns), columns.saturating_sub(rows))?;
        let bias = bias_of(call, allowed, ty.dtype)?;
        scores = call.graph.binary(BinaryFn::Add, scores, bias, &call.origin)?;
    }
    match call.optional(4) {
        Some(mask) => {
            let bias = padding(call, mask, (ty.dtype, columns))?;
            scores = call.graph.binary(BinaryFn::Add, scores, bias, &call.origin)?;
        }
        None => call.ignore("mask_filter_value"),
    }
    scores = with_bias(call, scores, 5)?;
    Ok(vec![Some(mixed(call, scores, v)?), Some(k), Some(v)])
}

/// Whether key `j` is not after query `i`, of which the first one stands at `past`.
fn causal(call: &mut Call, (rows, columns): (usize, usize), past: usize) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let row = g.add(Op::Iota(Shape::from_slice(&[rows, 1]), 0), &[], o)?;
    let row = g.binary_number(BinaryFn::Add, row, past as f64, o)?;
    let column = g.add(Op::Iota(Shape::from_slice(&[1, columns]), 1), &[], o)?;
    g.binary(BinaryFn::Le, column, row, o)
}

/// The caches, queries and keys of an attention whose heads share keys.
struct Grouped {
    query: NodeId,
    /// Keys and values of this run, `[b, own, s, d]`.
    new: [NodeId; 2],
    /// How many keys each batch had before, and the last one that it has, `[b, 1, 1, 1]`.
    before: NodeId,
    last: NodeId,
}

/// A cache `[b, own, rows, d]` with new rows written after those that each batch has.
fn appended(
    call: &mut Call,
    (past, new): (Option<NodeId>, NodeId),
    rows: usize,
    before: NodeId,
) -> Added {
    let Some(past) = past.filter(|past| call.ty(*past).numel() > 0) else {
        return Ok(new);
    };
    let (into, from) = (call.shape(past), call.shape(new));
    let (&[batch, own, room, width], &[_, _, steps, _]) = (&into[..], &from[..]) else {
        return Err(not_supported(format!("a cache of shape {into:?}")));
    };
    if [batch, own, width] != [from[0], from[1], from[3]] {
        return Err(not_supported(format!("rows {from:?} of a cache {into:?}")));
    }
    let zero = call.number(call.ty(past).dtype, 0, 0.0);
    let (g, o) = (&mut *call.graph, &call.origin);
    let more = rows.saturating_sub(room);
    let borders = [(0, 0), (0, 0), (0, more), (0, 0)].into_iter().collect();
    let past = g.add(Op::Pad(borders), &[past, zero], o)?;
    // Batches, heads and rows as one axis.
    let rows = room + more;
    let space = Shape::from_slice(&[batch, own, steps, 1]);
    let mut at = g.add(Op::Iota(space.clone(), 2), &[], o)?;
    at = g.binary(BinaryFn::Add, at, before, o)?;
    for (axis, step) in [(0, own * rows), (1, rows)] {
        let along = g.add(Op::Iota(space.clone(), axis), &[], o)?;
        let along = g.binary_number(BinaryFn::Mul, along, step as f64, o)?;
        at = g.binary(BinaryFn::Add, at, along, o)?;
    }
    let past = g.reshape(past, &[batch * own * rows, width], o)?;
    let new = g.reshape(new, &[batch * own * steps, width], o)?;
    let at = g.reshape(at, &[batch * own * steps], o)?;
    let y = g.add(Op::Scatter(None), &[past, at, new], o)?;
    g.reshape(y, &[batch, own, rows, width], o)
}

/// Queries, and keys and values of this run, turned where they are to be.
fn grouped(call: &mut Call) -> Result<Grouped, Diagnostic> {
    let (heads, own) = (count(call, "num_heads")?, count(call, "kv_num_heads")?);
    let given = call.input(0)?;
    let shape = call.shape(given);
    let &[batch, steps, width] = &shape[..] else {
        return Err(not_supported(format!("queries of shape {shape:?}")));
    };
    let parts = match (call.optional(1), call.optional(2)) {
        (Some(key), Some(value)) => [given, key, value],
        // All in one: heads of queries, of keys, of values.
        _ => {
            let each = width / (heads + 2 * own).max(1);
            let starts = [(0, heads), (heads, own), (heads + own, own)];
            let mut parts = [given; 3];
            for (part, (start, count)) in parts.iter_mut().zip(starts) {
                *part = call.cut(given, 2, ((start * each) as i64, 1, count * each))?;
            }
            parts
        }
    };
    let q = split_heads(call, parts[0], "num_heads")?;
    let k = split_heads(call, parts[1], "kv_num_heads")?;
    let v = split_heads(call, parts[2], "kv_num_heads")?;
    // How many keys there are with those of this run, less one.
    let last = call.input(5)?;
    if call.ty(last).numel() != batch {
        return Err(not_supported(format!("lengths {:?} of {batch} batches", call.shape(last))));
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let last = g.cast(last, DType::I64, o)?;
    let last = g.reshape(last, &[batch, 1, 1, 1], o)?;
    let before = g.binary_number(BinaryFn::Add, last, 1.0 - steps as f64, o)?;
    let mut before = g.binary_number(BinaryFn::Max, before, 0.0, o)?;
    if call.optional(3).is_none_or(|past| call.ty(past).numel() == 0) {
        before = call.graph.binary_number(BinaryFn::Mul, before, 0.0, &call.origin)?;
    }
    let interleaved = call.int_or("rotary_interleaved", 0) != 0;
    if call.int_or("do_rotary", 0) == 0 {
        return Ok(Grouped { query: q, new: [k, v], before, last });
    }
    let tables = [call.input(7)?, call.input(8)?];
    let positions = match call.optional(9) {
        Some(positions) => positions,
        None => {
            let (g, o) = (&mut *call.graph, &call.origin);
            let along = g.add(Op::Iota(Shape::from_slice(&[batch, steps]), 1), &[], o)?;
            let first = g.reshape(before, &[batch, 1], o)?;
            g.binary(BinaryFn::Add, along, first, o)?
        }
    };
    let turns = angles(call, tables, positions)?;
    let dim = 2 * call.shape(tables[0])[1];
    if dim > call.shape(q)[3] {
        return Err(not_supported(format!("a rotation of {dim} of {} numbers", call.shape(q)[3])));
    }
    let query = turned(call, q, turns, (dim, interleaved))?;
    let k = turned(call, k, turns, (dim, interleaved))?;
    Ok(Grouped { query, new: [k, v], before, last })
}

pub(super) fn grouped_query_attention(call: &mut Call) -> Outputs {
    let window = call.int_or("local_window_size", -1);
    if call.int_or("smooth_softmax", 0) > 0 || call.optional(11).is_some() {
        return Err(not_supported("a softmax with a sink"));
    }
    for name in ["k_quant_type", "v_quant_type"] {
        if call.string_or(name, "NONE") != "NONE" {
            return Err(not_supported("a quantised cache"));
        }
    }
    let Grouped { query, new, before, last } = grouped(call)?;
    for name in
        ["num_heads", "kv_num_heads", "do_rotary", "rotary_interleaved", "kv_cache_bit_width"]
    {
        call.ignore(name);
    }
    let ty = call.ty(query);
    let (heads, steps) = (ty.shape[1], ty.shape[2]);
    let room = call.optional(3).map_or(0, |past| call.shape(past).get(2).copied().unwrap_or(0));
    let known = call.known_input(6).ok().and_then(|v| v.as_f64s().first().copied());
    let rows = known.map_or(room + steps, |total| (total.max(0.0) as usize).max(room));
    let caches = [call.optional(3), call.optional(4)];
    let k = appended(call, (caches[0], new[0]), rows, before)?;
    let v = appended(call, (caches[1], new[1]), rows, before)?;
    let columns = call.shape(k)[2];
    let (own_k, own_v) = (repeat_heads(call, k, heads)?, repeat_heads(call, v, heads)?);
    let scores = scores(call, query, own_k)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let row = g.add(Op::Iota(Shape::from_slice(&[1, 1, steps, 1]), 2), &[], o)?;
    let row = g.binary(BinaryFn::Add, row, before, o)?;
    let column = g.add(Op::Iota(Shape::from_slice(&[1, 1, 1, columns]), 3), &[], o)?;
    // Rows behind the end of a short batch see what there is.
    let end = g.binary(BinaryFn::Min, row, last, o)?;
    let mut allowed = g.binary(BinaryFn::Le, column, end, o)?;
    if window > 0 {
        let first = g.binary_number(BinaryFn::Sub, row, window as f64, o)?;
        let near = g.binary(BinaryFn::Lt, first, column, o)?;
        allowed = g.binary(BinaryFn::And, allowed, near, o)?;
    }
    let bias = bias_of(call, allowed, ty.dtype)?;
    let scores = call.graph.binary(BinaryFn::Add, scores, bias, &call.origin)?;
    let scores = with_bias(call, scores, 10)?;
    Ok(vec![Some(mixed(call, scores, own_v)?), Some(k), Some(v)])
}

/// Codes of some bits, each row's one after the other from the low bits of a byte on: `[n, bytes]`
/// as `[n, count]` of u8.
fn unpacked(call: &mut Call, packed: NodeId, (bits, count): (u32, usize)) -> Added {
    let shape = call.shape(packed);
    let &[n, bytes] = &shape[..] else {
        return Err(not_supported(format!("packed numbers of shape {shape:?}")));
    };
    let each = 8 / bits as usize;
    if bytes.checked_mul(each).is_none_or(|all| all < count) {
        return Err(not_supported(format!("{bytes} bytes for {count} numbers of {bits} bits")));
    }
    let mut parts = Vec::new();
    for part in 0..each as u32 {
        let (g, o) = (&mut *call.graph, &call.origin);
        let down = f64::from(1u32 << (bits * part));
        let high = g.binary_number(BinaryFn::Div, packed, down, o)?;
        let code = g.binary_number(BinaryFn::Rem, high, f64::from(1u32 << bits), o)?;
        parts.push(g.reshape(code, &[n, bytes, 1], o)?);
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let codes = if bits == 8 { packed } else { g.add(Op::Concat(2), &parts, o)? };
    let codes = g.reshape(codes, &[n, bytes * each], o)?;
    call.cut(codes, 1, (0, 1, count))
}

/// A product with weights of 2, 4 or 8 bits, `[n, blocks, bytes of a block]`, which have a scale
/// and perhaps a zero point for every block of a row.
pub(super) fn matmul_of_bits(call: &mut Call) -> Outputs {
    call.ignore("accuracy_level");
    let size = |call: &Call, name: &str| usize::try_from(call.int_or(name, 0)).unwrap_or(0);
    let (k, n) = (size(call, "K"), size(call, "N"));
    let (bits, block) = (call.int_or("bits", 4), size(call, "block_size"));
    if ![2, 4, 8].contains(&bits) || k == 0 || n == 0 || block < 16 || k > 1 << 32 {
        return Err(not_supported(format!("{bits} bits, blocks of {block}, {k} by {n} weights")));
    }
    if call.optional(4).is_some() {
        return Err(not_supported("weights in an order of their own (g_idx)"));
    }
    let bits = bits as u32;
    let (x, packed, scales) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let dtype = call.ty(x).dtype;
    if !dtype.is_float() {
        return Err(not_supported(format!("a product of {dtype} with weights of {bits} bits")));
    }
    let blocks = k.div_ceil(block);
    let found = (call.ty(packed).numel(), call.ty(scales).numel());
    let bytes = block.saturating_mul(bits as usize) / 8;
    let of_scales = n.saturating_mul(blocks);
    let wanted = (of_scales.saturating_mul(bytes), of_scales);
    if found != wanted || call.ty(packed).dtype != DType::U8 {
        let (codes, scales) = (call.shape(packed), call.shape(scales));
        return Err(not_supported(format!("weights {codes:?} with scales {scales:?}")));
    }
    let packed = call.graph.reshape(packed, &[n, blocks * bytes], &call.origin)?;
    let codes = unpacked(call, packed, (bits, blocks * block))?;
    let zero = match call.optional(3) {
        None => call.number(dtype, 2, f64::from(1u32 << (bits - 1))),
        Some(zero) if call.ty(zero).dtype == DType::U8 => {
            let all = call.ty(zero).numel();
            let zero = call.graph.reshape(zero, &[n, all / n], &call.origin)?;
            unpacked(call, zero, (bits, blocks))?
        }
        Some(zero) => call.graph.reshape(zero, &[n, blocks], &call.origin)?,
    };
    let (g, o) = (&mut *call.graph, &call.origin);
    let zero = g.cast(zero, dtype, o)?;
    let apart = if g.ty(zero).numel() == 1 { [1, 1, 1] } else { [n, blocks, 1] };
    let zero = g.reshape(zero, &apart, o)?;
    let codes = g.cast(codes, dtype, o)?;
    let codes = g.reshape(codes, &[n, blocks, block], o)?;
    let scales = g.reshape(scales, &[n, blocks, 1], o)?;
    let scales = g.cast(scales, dtype, o)?;
    let w = g.binary(BinaryFn::Sub, codes, zero, o)?;
    let w = g.binary(BinaryFn::Mul, w, scales, o)?;
    let w = g.reshape(w, &[n, blocks * block], o)?;
    let w = call.cut(w, 1, (0, 1, k))?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let w = g.permute(w, &[1, 0], o)?;
    let rank = g.ty(x).rank();
    let w = g.with_rank(w, rank, o)?;
    let y = g.matmul(x, w, o)?;
    one(with_bias(call, y, 5)?)
}
