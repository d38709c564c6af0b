//! bf16, the upper halves of f32, by operations on bits.

use kiln_runtime::tensor::DType;

use super::emit::{Bits, Emitted, Machine};
use crate::graph::op::BinaryFn;
use crate::loops::ir::Number;

/// An f32 rounded to bf16, to the nearest and of two such to the even one, as an f32 again.
pub fn rounded<M: Machine>(machine: &mut M, x: &M::Value, wide: bool) -> Emitted<M::Value> {
    let mut bits = |bits: i64| machine.number(DType::I32, Number::Int(bits.into()), wide);
    let (one, below_half, upper) = (bits(1)?, bits(0x7fff)?, bits(-0x1_0000)?);
    let last = machine.shift(x, -16)?;
    let last = machine.bits(Bits::And, &last, &one)?;
    let rounded = machine.bits(Bits::Add, x, &below_half)?;
    let rounded = machine.bits(Bits::Add, &rounded, &last)?;
    let rounded = machine.bits(Bits::And, &rounded, &upper)?;
    let nan = machine.binary(BinaryFn::Ne, DType::F32, x, x)?;
    let quiet = machine.number(DType::F32, Number::Float(f64::NAN), wide)?;
    machine.select(DType::F32, &nan, &quiet, &rounded)
}

/// The products of the two bf16 of x and y, and z, added as f32: the upper ones first.
pub fn dot<M: Machine>(
    machine: &mut M,
    [x, y, z]: [&M::Value; 3],
    wide: bool,
) -> Emitted<M::Value> {
    let zero = machine.number(DType::F32, Number::Float(0.0), wide)?;
    let upper = machine.number(DType::I32, Number::Int(-0x1_0000), wide)?;
    // As f32: what bits are a number of follows the first of the two.
    let [x, y] = [x, y].map(|word| machine.bits(Bits::Or, &zero, word));
    let (x, y) = (x?, y?);
    let [a, b] = [&x, &y].map(|word| machine.bits(Bits::And, word, &upper));
    let sum = machine.accumulate(DType::F32, &a?, &b?, z)?;
    let [a, b] = [&x, &y].map(|word| machine.shift(word, 16));
    machine.accumulate(DType::F32, &a?, &b?, &sum)
}
