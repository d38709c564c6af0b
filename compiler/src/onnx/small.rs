//! Numbers from codes and codes from numbers, by operations that every target has: codes of
//! fractions are looked up in tables, both ways; those of integers are the integers.

use bytes::Bytes;
use kiln_runtime::tensor::{DType, Small, Tensor};

use super::call::{Call, not_supported};
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Op, Type, UnaryFn};
use crate::graph::small::{Rounding, number, ranks};

/// What happens to numbers that a type of codes does not have.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// Which way a power of two goes; others go to the nearest one.
    rounding: Rounding,
    /// Fractions: whether what is too large becomes the largest number.
    saturate: bool,
    /// Integers: whether they are kept in the range, as quantised ones are, or lose their upper
    /// bits, as cast ones do.
    clamp: bool,
}

impl Manner {
    /// Integers lose their upper bits.
    pub(super) const WRAP: Manner =
        Manner { rounding: Rounding::Up, saturate: true, clamp: false };

    /// As the attributes of a node say.
    pub(super) fn of(call: &Call, clamp: bool) -> Result<Manner, crate::error::Diagnostic> {
        let saturate = call.int_or("saturate", 1) != 0;
        let rounding = match call.string_or("round_mode", "up").as_str() {
            "up" => Rounding::Up,
            "down" => Rounding::Down,
            "nearest" => Rounding::Nearest,
            other => return Err(not_supported(format!("round_mode `{other}`"))),
        };
        Ok(Manner { rounding, saturate, clamp })
    }
}

/// Codes as the numbers that they stand for: f32, or bytes where they are integers. Other values
/// are numbers as they are.
pub(super) fn numbers(call: &mut Call, x: NodeId) -> Added {
    let dtype = call.ty(x).dtype;
    let DType::Small(small) = dtype else { return Ok(x) };
    let (g, o) = (&mut *call.graph, &call.origin);
    let bytes = g.bits(x, dtype.stored(), o)?;
    if small.int_range().is_some() {
        return Ok(bytes);
    }
    let table: Vec<f32> = (0..=255).map(|code| number(small, code) as f32).collect();
    let table = g.tensor(&Tensor::from_slice(&[256], &table), o);
    let place = g.cast(bytes, DType::I32, o)?;
    g.add(Op::Gather(0), &[table, place], o)
}

/// x as another dtype, whatever both are.
pub(super) fn converted(call: &mut Call, x: NodeId, dtype: DType, manner: Manner) -> Added {
    if call.ty(x).dtype == dtype {
        return Ok(x);
    }
    let x = numbers(call, x)?;
    let DType::Small(small) = dtype else { return call.graph.cast(x, dtype, &call.origin) };
    match small.int_range() {
        Some(range) => integers(call, x, small, range, manner),
        None => fractions(call, x, small, manner),
    }
}

/// Codes that are integers.
fn integers(call: &mut Call, x: NodeId, small: Small, range: (i8, i8), manner: Manner) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let dtype = DType::Small(small);
    let (low, high) = (f64::from(range.0), f64::from(range.1));
    let x = if manner.clamp && g.ty(x).dtype.is_float() {
        // Before it is an integer, which may be too small for it.
        let x = g.binary_number(BinaryFn::Max, x, low, o)?;
        let x = g.binary_number(BinaryFn::Min, x, high, o)?;
        g.cast(x, DType::I32, o)?
    } else {
        let x = g.cast(x, DType::I32, o)?;
        let count = f64::from(1 << small.bits());
        let x = g.binary_number(BinaryFn::And, x, count - 1.0, o)?;
        // The upper half of the codes stands for what is below zero.
        let x = g.binary_number(BinaryFn::Xor, x, -low, o)?;
        g.binary_number(BinaryFn::Add, x, low, o)?
    };
    let x = g.cast(x, dtype.stored(), o)?;
    g.bits(x, dtype, o)
}

/// Codes of fractions: the rank of a magnitude among the bounds is found by halving.
fn fractions(call: &mut Call, x: NodeId, small: Small, manner: Manner) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let work = if g.ty(x).dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let power = small == Small::F8E8M0;
    let rounding = if power { manner.rounding } else { Rounding::NearestEven };
    let ranks = ranks(small, work, rounding, manner.saturate);
    let ranks = ranks.ok_or_else(|| not_supported("a table of integers"))?;
    let count = ranks.bounds.len() + 1;
    let bounds: Vec<f32> = ranks.bounds.iter().map(|&bound| bound as f32).collect();
    let bounds = match work {
        DType::F64 => Tensor::from_slice(&[count - 1], &ranks.bounds),
        _ => Tensor::from_slice(&[count - 1], &bounds),
    };
    let bounds = g.tensor(&bounds, o);
    let x = g.cast(x, work, o)?;
    let magnitude = g.unary(UnaryFn::Abs, x, o)?;
    let rank = g.ty(x).rank();
    let mut place = g.scalar(DType::I32, rank, 0.0, o);
    let mut step = count / 2;
    while step > 0 {
        let at = g.binary_number(BinaryFn::Add, place, (step - 1) as f64, o)?;
        let bound = g.add(Op::Gather(0), &[bounds, at], o)?;
        let reached = g.binary(BinaryFn::Le, bound, magnitude, o)?;
        let reached = g.cast(reached, DType::I32, o)?;
        let more = g.binary_number(BinaryFn::Mul, reached, step as f64, o)?;
        place = g.binary(BinaryFn::Add, place, more, o)?;
        step /= 2;
    }
    // Negative zero is below zero here: its reciprocal is, which that of negative infinity is not.
    let below = g.binary_number(BinaryFn::Lt, x, 0.0, o)?;
    let reciprocal = g.unary(UnaryFn::Recip, x, o)?;
    let reciprocal = g.binary_number(BinaryFn::Lt, reciprocal, 0.0, o)?;
    let negative = g.binary(BinaryFn::Or, below, reciprocal, o)?;
    let negative = g.cast(negative, DType::I32, o)?;
    let more = g.binary_number(BinaryFn::Mul, negative, count as f64, o)?;
    let place = g.binary(BinaryFn::Add, place, more, o)?;
    let is_nan = g.binary(BinaryFn::Ne, x, x, o)?;
    let last = g.scalar(DType::I32, rank, (2 * count) as f64, o);
    let place = g.select(is_nan, last, place, o)?;
    let ty = Type::new(DType::U8, &[ranks.codes.len()]);
    let codes = g.constant_bytes(ty, Bytes::from(ranks.codes), o);
    let code = g.add(Op::Gather(0), &[codes, place], o)?;
    g.bits(code, DType::Small(small), o)
}
