//! Attention, rotary positions and caches.

use kiln_runtime::tensor::DType;

use super::call::{Call, Outputs, not_supported, one};
use super::recurrent::MOST_STEPS;
use super::tensor::dtype_of;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Composite, Op, Shape, UnaryFn};

pub(super) fn count(call: &Call, name: &str) -> Result<usize, Diagnostic> {
    usize::try_from(call.int_or(name, 0))
        .ok()
        .filter(|&n| (1..1 << 31).contains(&n))
        .ok_or_else(|| not_supported(format!("operands of rank 3 without {name}")))
}

/// `[b, s, heads * d]` as `[b, heads, s, d]`; of rank 4 as it is.
pub(super) fn split_heads(call: &mut Call, x: NodeId, heads: &str) -> Added {
    let shape = call.shape(x);
    match shape[..] {
        [_, _, _, _] => Ok(x),
        [b, s, width] => {
            let heads = count(call, heads)?;
            if !width.is_multiple_of(heads) {
                return Err(not_supported(format!("{heads} heads of a width of {width}")));
            }
            let (g, o) = (&mut *call.graph, &call.origin);
            let apart = g.reshape(x, &[b, s, heads, width / heads], o)?;
            g.permute(apart, &[0, 2, 1, 3], o)
        }
        _ => Err(not_supported(format!("an operand of shape {shape:?}"))),
    }
}

/// Each head of `[b, heads, s, d]` as often as several heads of the query share it.
pub(super) fn repeat_heads(call: &mut Call, x: NodeId, heads: usize) -> Added {
    let shape = call.shape(x);
    let [b, own, s, d] = shape[..] else {
        return Err(not_supported(format!("an operand of shape {shape:?}")));
    };
    if own == heads {
        return Ok(x);
    }
    if own == 0 || !heads.is_multiple_of(own) {
        return Err(not_supported(format!("{heads} heads that share {own}")));
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let apart = g.reshape(x, &[b, own, 1, s, d], o)?;
    let spread = g.expand(apart, &[b, own, heads / own, s, d], o)?;
    g.reshape(spread, &[b, heads, s, d], o)
}

/// 0 where a bool is true, else minus infinity.
pub(super) fn bias_of(call: &mut Call, allowed: NodeId, dtype: DType) -> Added {
    let zero = call.number(dtype, 0, 0.0);
    let never = call.number(dtype, 0, f64::NEG_INFINITY);
    call.graph.select(allowed, zero, never, &call.origin)
}

/// What is added to the scores: mask, causality and padding; nothing where there is none.
fn score_bias(
    call: &mut Call,
    dtype: DType,
    (rows, columns): (usize, usize),
    past: usize,
) -> Result<Option<NodeId>, Diagnostic> {
    let mut biases = Vec::new();
    if let Some(mut mask) = call.optional(3) {
        let ty = call.ty(mask);
        let width = ty.shape.last().copied().unwrap_or(0);
        if ty.rank() < 2 || width > columns {
            return Err(not_supported(format!("a mask of shape {:?}", ty.shape)));
        }
        let outside = if ty.dtype == DType::Bool { 0.0 } else { f64::NEG_INFINITY };
        let fill = call.number(ty.dtype, 0, outside);
        let mut borders = smallvec::SmallVec::from_elem((0, 0), ty.rank());
        borders[ty.rank() - 1] = (0, if width == 1 { 0 } else { columns - width });
        mask = call.graph.add(Op::Pad(borders), &[mask, fill], &call.origin)?;
        biases.push(match ty.dtype {
            DType::Bool => bias_of(call, mask, dtype)?,
            _ => mask,
        });
    }
    if call.int_or("is_causal", 0) != 0 {
        let (g, o) = (&mut *call.graph, &call.origin);
        let row = g.add(Op::Iota(Shape::from_slice(&[rows, 1]), 0), &[], o)?;
        let row = g.binary_number(BinaryFn::Add, row, past as f64, o)?;
        let column = g.add(Op::Iota(Shape::from_slice(&[1, columns]), 1), &[], o)?;
        let allowed = g.binary(BinaryFn::Le, column, row, o)?;
        biases.push(bias_of(call, allowed, dtype)?);
    }
    if let Some(lengths) = call.optional(6) {
        let batch = call.ty(lengths).numel();
        let (g, o) = (&mut *call.graph, &call.origin);
        let lengths = g.reshape(lengths, &[batch, 1, 1, 1], o)?;
        let lengths = g.cast(lengths, DType::I64, o)?;
        let column = g.add(Op::Iota(Shape::from_slice(&[1, 1, 1, columns]), 3), &[], o)?;
        let allowed = g.binary(BinaryFn::Lt, column, lengths, o)?;
        biases.push(bias_of(call, allowed, dtype)?);
    }
    let mut sum = None;
    for bias in biases {
        sum = Some(match sum {
            None => bias,
            Some(sum) => call.graph.binary(BinaryFn::Add, sum, bias, &call.origin)?,
        });
    }
    Ok(sum)
}

/// A cache with new rows after it.
fn with_past(call: &mut Call, index: usize, x: NodeId) -> Added {
    match call.optional(index) {
        Some(past) => call.graph.add(Op::Concat(2), &[past, x], &call.origin),
        None => Ok(x),
    }
}

/// Scores of queries and keys, capped.
pub(super) fn scores(call: &mut Call, q: NodeId, k: NodeId) -> Added {
    let width = call.shape(q)[3];
    let scale = call.float("scale").map_or(1.0 / (width.max(1) as f64).sqrt(), f64::from);
    let cap = f64::from(call.float_or("softcap", 0.0));
    let (g, o) = (&mut *call.graph, &call.origin);
    // Half of the scale on each side, so that halves do not overflow.
    let q = g.binary_number(BinaryFn::Mul, q, scale.abs().sqrt().copysign(scale), o)?;
    let k = g.binary_number(BinaryFn::Mul, k, scale.abs().sqrt(), o)?;
    let k = g.permute(k, &[0, 1, 3, 2], o)?;
    let scores = g.matmul(q, k, o)?;
    if cap <= 0.0 {
        return Ok(scores);
    }
    let scaled = g.binary_number(BinaryFn::Mul, scores, 1.0 / cap, o)?;
    let capped = g.unary(UnaryFn::Tanh, scaled, o)?;
    g.binary_number(BinaryFn::Mul, capped, cap, o)
}

/// Scores of an attention that graphs may change, values, and the dtype of the result; all heads
/// apart, scores and values in the precision of the softmax.
pub(super) fn flexible(call: &mut Call) -> Result<(NodeId, NodeId, DType), Diagnostic> {
    let [q, k, v] = [call.input(0)?, call.input(1)?, call.input(2)?];
    let ranks = [q, k, v].map(|x| call.ty(x).rank());
    if ranks != [4; 3] {
        return Err(not_supported(format!("operands of rank {ranks:?}, not 4")));
    }
    let (dtype, heads) = (call.ty(v).dtype, call.shape(q)[1]);
    let wide = match call.int("softmax_precision") {
        Some(number) => dtype_of(i32::try_from(number).unwrap_or(0))?,
        None if call.ty(q).dtype == DType::F64 => DType::F64,
        None => DType::F32,
    };
    let (k, v) = (repeat_heads(call, k, heads)?, repeat_heads(call, v, heads)?);
    let scores = scores(call, q, k)?;
    let scores = call.graph.cast(scores, wide, &call.origin)?;
    Ok((scores, call.graph.cast(v, wide, &call.origin)?, dtype))
}

pub(super) fn attention(call: &mut Call) -> Outputs {
    let mode = call.int_or("qk_matmul_output_mode", 0);
    let precision = call.int("softmax_precision");
    let given = call.input(0)?;
    let ty = call.ty(given);
    let q = split_heads(call, given, "q_num_heads")?;
    let (k, v) = (call.input(1)?, call.input(2)?);
    let (k, v) = (split_heads(call, k, "kv_num_heads")?, split_heads(call, v, "kv_num_heads")?);
    for name in ["q_num_heads", "kv_num_heads"] {
        call.ignore(name);
    }
    let own = call.shape(k)[2];
    let (present_k, present_v) = (with_past(call, 4, k)?, with_past(call, 5, v)?);
    let (heads, rows) = (call.shape(q)[1], call.shape(q)[2]);
    let columns = call.shape(present_k)[2];
    let k = repeat_heads(call, present_k, heads)?;
    let v = repeat_heads(call, present_v, heads)?;
    let scores = scores(call, q, k)?;
    let biased = match score_bias(call, ty.dtype, (rows, columns), columns - own)? {
        Some(bias) => call.graph.binary(BinaryFn::Add, scores, bias, &call.origin)?,
        None => scores,
    };
    let wide = match precision {
        Some(number) => dtype_of(i32::try_from(number).unwrap_or(0))?,
        None => ty.dtype,
    };
    let (g, o) = (&mut *call.graph, &call.origin);
    let logits = g.cast(biased, wide, o)?;
    let weights = g.composite(Composite::Softmax(3), logits, o)?;
    let v = g.cast(v, wide, o)?;
    let mut y = g.matmul(weights, v, o)?;
    y = g.cast(y, ty.dtype, o)?;
    if ty.rank() == 3 {
        y = g.permute(y, &[0, 2, 1, 3], o)?;
        let shape = g.ty(y).shape.clone();
        y = g.reshape(y, &[shape[0], shape[1], shape[2] * shape[3]], o)?;
    }
    let shown = match mode {
        0 | 1 => scores,
        2 => biased,
        _ => g.cast(weights, ty.dtype, o)?,
    };
    Ok(vec![Some(y), Some(present_k), Some(present_v), Some(shown)])
}

/// Pairs of numbers turned by an angle that depends on the position.
pub(super) fn rotary(call: &mut Call) -> Outputs {
    let interleaved = call.int_or("interleaved", 0) != 0;
    let dim = call.int_or("rotary_embedding_dim", 0);
    let given = call.input(0)?;
    let from = call.shape(given);
    // Positions stand before or after the heads, depending on the rank.
    let (x, head_axis) = match from[..] {
        [_, _, _, _] => (given, 1),
        [b, s, width] => {
            let heads = count(call, "num_heads")?;
            if !width.is_multiple_of(heads) {
                return Err(not_supported(format!("{heads} heads of a width of {width}")));
            }
            (call.graph.reshape(given, &[b, s, heads, width / heads], &call.origin)?, 2)
        }
        _ => return Err(not_supported(format!("an operand of shape {from:?}"))),
    };
    call.ignore("num_heads");
    let width = call.shape(x)[3];
    let dim = match usize::try_from(dim) {
        Ok(0) => width,
        Ok(dim) if dim <= width => dim,
        _ => return Err(not_supported(format!("a rotation of {dim} of {width} numbers"))),
    };
    let half = dim / 2;
    let mut turns = Vec::new();
    for index in [1, 2] {
        let mut cache = call.input(index)?;
        if let Some(positions) = call.optional(3) {
            cache = call.graph.add(Op::Gather(0), &[cache, positions], &call.origin)?;
        }
        let mut shape = call.shape(cache);
        if shape.len() != 3 || shape[2] != half {
            return Err(not_supported(format!("a table of shape {shape:?}")));
        }
        shape.insert(head_axis, 1);
        turns.push(call.graph.reshape(cache, &shape, &call.origin)?);
    }
    let [cos, sin] = turns[..] else { return Err(not_supported("a table that is missing")) };
    let y = turned(call, x, [cos, sin], (dim, interleaved))?;
    one(call.graph.reshape(y, &from, &call.origin)?)
}

/// The first `dim` numbers of the last of four axes, as pairs that are turned by angles of which
/// the cosines and sines are given; neighbours are pairs, or numbers of the two halves.
pub(super) fn turned(
    call: &mut Call,
    x: NodeId,
    [cos, sin]: [NodeId; 2],
    (dim, interleaved): (usize, bool),
) -> Added {
    let (width, half) = (call.shape(x)[3], dim / 2);
    let (first, second) = match interleaved {
        true => ((0, 2, half), (1, 2, half)),
        false => ((0, 1, half), (half as i64, 1, half)),
    };
    let (a, b) = (call.cut(x, 3, first)?, call.cut(x, 3, second)?);
    let rest = call.cut(x, 3, (dim as i64, 1, width - dim))?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut product = |x, y| g.binary(BinaryFn::Mul, x, y, o);
    let (ac, bs) = (product(a, cos)?, product(b, sin)?);
    let (as_, bc) = (product(a, sin)?, product(b, cos)?);
    let real = g.binary(BinaryFn::Sub, ac, bs, o)?;
    let imaginary = g.binary(BinaryFn::Add, as_, bc, o)?;
    let turned = match interleaved {
        false => g.add(Op::Concat(3), &[real, imaginary], o)?,
        true => {
            let mut pair = g.ty(real).shape.clone();
            pair.push(1);
            let (real, imaginary) = (g.reshape(real, &pair, o)?, g.reshape(imaginary, &pair, o)?);
            let both = g.add(Op::Concat(4), &[real, imaginary], o)?;
            pair.truncate(3);
            pair.push(dim);
            g.reshape(both, &pair, o)?
        }
    };
    g.add(Op::Concat(3), &[turned, rest], o)
}

/// New rows written into a cache, from a place that each batch has for itself.
pub(super) fn tensor_scatter(call: &mut Call) -> Outputs {
    let (cache, update) = (call.input(0)?, call.input(1)?);
    let circular = call.string_or("mode", "linear") == "circular";
    let (into, from) = (call.shape(cache), call.shape(update));
    let axis = call.axis(call.int_or("axis", -2), into.len())?;
    let fits = axis > 0
        && from.len() == into.len()
        && from[axis] <= into[axis]
        && (0..into.len()).all(|d| d == axis || from[d] == into[d]);
    if !fits {
        return Err(not_supported(format!("rows {from:?} of a cache {into:?}")));
    }
    let (batch, between) = (into[0], into[1..axis].iter().product::<usize>());
    let (rows, new) = (into[axis], from[axis]);
    let space = Shape::from_slice(&[batch, between, new]);
    let start = call.optional(2);
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut row = g.add(Op::Iota(space.clone(), 2), &[], o)?;
    if let Some(start) = start {
        let start = g.cast(start, DType::I64, o)?;
        let start = g.reshape(start, &[batch, 1, 1], o)?;
        row = g.binary(BinaryFn::Add, row, start, o)?;
    }
    if circular {
        row = g.binary_number(BinaryFn::Rem, row, rows as f64, o)?;
    }
    for (d, step) in [(0, between * rows), (1, rows)] {
        let along = g.add(Op::Iota(space.clone(), d), &[], o)?;
        let along = g.binary_number(BinaryFn::Mul, along, step as f64, o)?;
        row = g.binary(BinaryFn::Add, row, along, o)?;
    }
    let mut flat = Shape::from_slice(&[batch * between * rows]);
    flat.extend_from_slice(&into[axis + 1..]);
    let cache = g.reshape(cache, &flat, o)?;
    flat[0] = batch * between * new;
    let update = g.reshape(update, &flat, o)?;
    let row = g.reshape(row, &[flat[0]], o)?;
    let y = g.add(Op::Scatter(None), &[cache, row, update], o)?;
    one(g.reshape(y, &into, o)?)
}

/// What a step of a recurrence of [`linear_attention`] reads, each `[b, heads, steps, d]`.
struct Recurrence {
    query: NodeId,
    key: NodeId,
    value: NodeId,
    /// Logarithms of what the state is multiplied with, for each head or each row of its state.
    decay: Option<NodeId>,
    /// How much of the difference to what the state gives for a key is added.
    beta: Option<NodeId>,
}

impl Recurrence {
    /// The state `[b, heads, keys, values]` after step `at`, and what it gives for the query.
    fn step(&self, call: &mut Call, state: NodeId, at: usize) -> Result<[NodeId; 2], Diagnostic> {
        let row = |call: &mut Call, x: NodeId| call.cut(x, 2, (at as i64, 1, 1));
        let mut state = state;
        if let Some(decay) = self.decay {
            let decay = row(call, decay)?;
            let (g, o) = (&mut *call.graph, &call.origin);
            let kept = g.unary(UnaryFn::Exp, decay, o)?;
            let kept = g.permute(kept, &[0, 1, 3, 2], o)?;
            state = g.binary(BinaryFn::Mul, state, kept, o)?;
        }
        let (key, mut value) = (row(call, self.key)?, row(call, self.value)?);
        if let Some(beta) = self.beta {
            let beta = row(call, beta)?;
            let (g, o) = (&mut *call.graph, &call.origin);
            let known = g.matmul(key, state, o)?;
            let new = g.binary(BinaryFn::Sub, value, known, o)?;
            value = g.binary(BinaryFn::Mul, new, beta, o)?;
        }
        let query = row(call, self.query)?;
        let (b, heads, keys) = match call.shape(query)[..] {
            [b, heads, _, keys] => (b, heads, keys),
            _ => return Err(not_supported("a query without heads")),
        };
        let own = call.shape(state)[1];
        let (g, o) = (&mut *call.graph, &call.origin);
        let column = g.permute(key, &[0, 1, 3, 2], o)?;
        let product = g.binary(BinaryFn::Mul, column, value, o)?;
        state = g.binary(BinaryFn::Add, state, product, o)?;
        // Heads of the query that share a state are rows of one product.
        let query = g.reshape(query, &[b, own, heads / own, keys], o)?;
        let y = g.matmul(query, state, o)?;
        let values = g.ty(y).shape[3];
        Ok([state, g.reshape(y, &[b, heads, 1, values], o)?])
    }
}

/// `[b, s, heads * d]` or, of one number for each head, `[b, s, heads]`, as `[b, heads, s, d]`.
fn split_numbers(call: &mut Call, x: NodeId, heads: usize) -> Added {
    match call.shape(x)[..] {
        [b, s, width] if width.is_multiple_of(heads) => {
            let apart = [b, s, heads, width / heads];
            let apart = call.graph.reshape(x, &apart, &call.origin)?;
            call.graph.permute(apart, &[0, 2, 1, 3], &call.origin)
        }
        ref shape => Err(not_supported(format!("an operand of shape {shape:?} for {heads} heads"))),
    }
}

/// The state that operand 3 gives, or zeros.
fn first_state(call: &mut Call, dtype: DType, shape: [usize; 4]) -> Added {
    let Some(state) = call.optional(3) else {
        let zero = call.number(dtype, 4, 0.0);
        return call.graph.expand(zero, &shape, &call.origin);
    };
    if call.shape(state)[..] != shape {
        return Err(not_supported(format!("a state of {:?}", call.shape(state))));
    }
    call.graph.cast(state, dtype, &call.origin)
}

/// Attention by a state that every step decays, corrects and adds to, one step after another.
pub(super) fn linear_attention(call: &mut Call) -> Outputs {
    call.ignore("chunk_size");
    let rule = call.string_or("update_rule", "gated_delta");
    let (heads, own) = (count(call, "q_num_heads")?, count(call, "kv_num_heads")?);
    let [decay, beta] = [4, 5].map(|k: usize| call.optional(k));
    let asked = match rule.as_str() {
        "linear" => [false, false],
        "gated" => [true, false],
        "delta" => [false, true],
        "gated_delta" => [true, true],
        other => return Err(not_supported(format!("the update rule {other:?}"))),
    };
    if asked != [decay.is_some(), beta.is_some()] || !heads.is_multiple_of(own) {
        let given = [decay, beta].map(|i| i.is_some());
        return Err(not_supported(format!(
            "the rule {rule} for {heads} heads of {own}, decay and beta given: {given:?}"
        )));
    }
    let dtype = call.ty(call.input(0)?).dtype;
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let split = |call: &mut Call, x: NodeId, heads: usize| {
        let x = call.graph.cast(x, wide, &call.origin)?;
        split_numbers(call, x, heads)
    };
    let query = call.input(0).and_then(|x| split(call, x, heads))?;
    let key = call.input(1).and_then(|x| split(call, x, own))?;
    let value = call.input(2).and_then(|x| split(call, x, own))?;
    let decay = decay.map(|x| split(call, x, own)).transpose()?;
    let beta = match beta {
        // One number for all heads.
        Some(x) if call.shape(x).last() == Some(&1) => Some(split(call, x, 1)?),
        beta => beta.map(|x| split(call, x, own)).transpose()?,
    };
    let (b, steps, keys) = match call.shape(query)[..] {
        [b, _, steps, keys] if call.shape(key)[..] == [b, own, steps, keys] => (b, steps, keys),
        ref shape => return Err(not_supported(format!("queries {shape:?} of other keys"))),
    };
    let values = call.shape(value)[3];
    if steps == 0 || steps > MOST_STEPS || call.shape(value)[..3] != [b, own, steps] {
        return Err(not_supported(format!("{steps} steps; at most {MOST_STEPS} are unrolled")));
    }
    let kept = call.optional(3).map_or(dtype, |state| call.ty(state).dtype);
    let mut state = first_state(call, wide, [b, own, keys, values])?;
    let scale = match f64::from(call.float_or("scale", 0.0)) {
        0.0 => 1.0 / (keys as f64).sqrt(),
        scale => scale,
    };
    let recurrence = Recurrence { query, key, value, decay, beta };
    let mut rows = Vec::with_capacity(steps);
    for at in 0..steps {
        let [next, row] = recurrence.step(call, state, at)?;
        state = next;
        rows.push(row);
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let y = g.add(Op::Concat(2), &rows, o)?;
    let y = g.binary_number(BinaryFn::Mul, y, scale, o)?;
    let y = g.permute(y, &[0, 2, 1, 3], o)?;
    let y = g.reshape(y, &[b, steps, heads * values], o)?;
    let y = g.cast(y, dtype, o)?;
    Ok(vec![Some(y), Some(g.cast(state, kept, o)?)])
}
