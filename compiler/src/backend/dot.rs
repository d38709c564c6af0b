//! Dot products of bytes on machines that have no instruction for them.

use kiln_runtime::tensor::DType;

use super::emit::{Bits, Emitted, Machine};
use crate::graph::op::BinaryFn;
use crate::loops::ir::Number;

/// The products of the bytes of x, u8, and those of y, i8, and z, added as i32.
pub fn of_bytes<M: Machine>(
    machine: &mut M,
    [x, y, z]: [&M::Value; 3],
    wide: bool,
) -> Emitted<M::Value> {
    let low = machine.number(DType::I32, Number::Int(0xff), wide)?;
    let sign = machine.number(DType::I32, Number::Int(0x80), wide)?;
    let mut sum = z.clone();
    for byte in 0..4 {
        let [a, b] = [x, y].map(|word| {
            let moved = machine.shift(word, -8 * byte)?;
            machine.bits(Bits::And, &moved, &low)
        });
        let (a, b) = (a?, b?);
        let b = machine.bits(Bits::Xor, &b, &sign)?;
        let b = machine.bits(Bits::Sub, &b, &sign)?;
        let product = machine.binary(BinaryFn::Mul, DType::I32, &a, &b)?;
        sum = machine.bits(Bits::Add, &sum, &product)?;
    }
    Ok(sum)
}
