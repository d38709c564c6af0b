//! Numbers of fewer bits than those of f32, by operations on bits. Once they are read they are f32.

use kiln_runtime::tensor::DType;

use super::emit::{Bits, Emitted, Machine};
use crate::graph::op::BinaryFn;
use crate::loops::ir::Number;

/// A pattern of 32 bits.
fn bits<M: Machine>(machine: &mut M, bits: u32, wide: bool) -> Emitted<M::Value> {
    machine.number(DType::I32, Number::Int((bits as i32).into()), wide)
}

/// The f32 of that number.
fn number<M: Machine>(machine: &mut M, number: f64, wide: bool) -> Emitted<M::Value> {
    machine.number(DType::F32, Number::Float(number), wide)
}

/// An f32 rounded to a dtype of fewer bits, as an f32 again.
pub fn rounded<M: Machine>(
    machine: &mut M,
    dtype: DType,
    x: &M::Value,
    wide: bool,
) -> Emitted<M::Value> {
    let rounded = match dtype {
        DType::F16 => return rounded_to_f16(machine, x, wide),
        // To the nearest, and of two such to the even one.
        DType::BF16 => {
            let (one, below_half) = (bits(machine, 1, wide)?, bits(machine, 0x7fff, wide)?);
            let last = machine.shift(x, -16)?;
            let last = machine.bits(Bits::And, &last, &one)?;
            let more = machine.bits(Bits::Add, x, &below_half)?;
            let more = machine.bits(Bits::Add, &more, &last)?;
            let upper = bits(machine, 0xffff_0000, wide)?;
            machine.bits(Bits::And, &more, &upper)?
        }
        // To the nearest, and of two such to the one further from 0.
        _ => {
            let (half, kept) = (bits(machine, 0x1000, wide)?, bits(machine, !0x1fff, wide)?);
            let more = machine.bits(Bits::Add, x, &half)?;
            machine.bits(Bits::And, &more, &kept)?
        }
    };
    let nan = machine.binary(BinaryFn::Ne, DType::F32, x, x)?;
    let quiet = number(machine, f64::NAN, wide)?;
    machine.select(DType::F32, &nan, &quiet, &rounded)
}

/// The same of f16, which has fewer exponents: a sum with a number whose last bit is worth that of
/// the result is rounded as that is, and taking the number away again is exact.
fn rounded_to_f16<M: Machine>(machine: &mut M, x: &M::Value, wide: bool) -> Emitted<M::Value> {
    let (sign, magnitude) = (bits(machine, 1 << 31, wide)?, bits(machine, !(1 << 31), wide)?);
    let sign = machine.bits(Bits::And, x, &sign)?;
    let magnitude = machine.bits(Bits::And, x, &magnitude)?;
    let (power, up) = (bits(machine, 0x7f80_0000, wide)?, bits(machine, 13 << 23, wide)?);
    let large = machine.bits(Bits::And, x, &power)?;
    let large = machine.bits(Bits::Add, &large, &up)?;
    // Below the least normal f16 the last bit is 2^-24.
    let least = number(machine, 0.5, wide)?;
    let large = machine.binary(BinaryFn::Max, DType::F32, &large, &least)?;
    let sum = machine.binary(BinaryFn::Add, DType::F32, &magnitude, &large)?;
    let rounded = machine.binary(BinaryFn::Sub, DType::F32, &sum, &large)?;
    // From half a step beyond the largest f16 on: infinity, or NaN.
    let (end, infinity) = (number(machine, 65520.0, wide)?, number(machine, f64::INFINITY, wide)?);
    let inside = machine.binary(BinaryFn::Lt, DType::F32, &magnitude, &end)?;
    let beyond = machine.binary(BinaryFn::Mul, DType::F32, &magnitude, &infinity)?;
    let rounded = machine.select(DType::F32, &inside, &rounded, &beyond)?;
    machine.bits(Bits::Or, &rounded, &sign)
}

/// What the upper half of a word is as a number of a dtype of 16 bits.
pub fn widened<M: Machine>(
    machine: &mut M,
    dtype: DType,
    x: M::Value,
    wide: bool,
) -> Emitted<M::Value> {
    if dtype != DType::F16 {
        return Ok(x);
    }
    let (sign, magnitude) = (bits(machine, 1 << 31, wide)?, bits(machine, 0x7fff_0000, wide)?);
    let sign = machine.bits(Bits::And, &x, &sign)?;
    let magnitude = machine.bits(Bits::And, &x, &magnitude)?;
    let small = machine.shift(&magnitude, -3)?;
    // A product moves the exponent, and makes numbers below the least normal f16 normal.
    let scale = number(machine, 2f64.powi(112), wide)?;
    let value = machine.binary(BinaryFn::Mul, DType::F32, &small, &scale)?;
    let (end, top) = (number(machine, 65536.0, wide)?, bits(machine, 0x7f80_0000, wide)?);
    let inside = machine.binary(BinaryFn::Lt, DType::F32, &value, &end)?;
    let beyond = machine.bits(Bits::Or, &value, &top)?;
    let value = machine.select(DType::F32, &inside, &value, &beyond)?;
    machine.bits(Bits::Or, &value, &sign)
}

/// The other way round: a number of a dtype of 16 bits as the upper half of a word.
pub fn packed<M: Machine>(
    machine: &mut M,
    dtype: DType,
    x: &M::Value,
    wide: bool,
) -> Emitted<M::Value> {
    if dtype == DType::BF16 {
        return Ok(x.clone());
    }
    let (sign, magnitude) = (bits(machine, 1 << 31, wide)?, bits(machine, !(1 << 31), wide)?);
    let sign = machine.bits(Bits::And, x, &sign)?;
    let magnitude = machine.bits(Bits::And, x, &magnitude)?;
    let scale = number(machine, 2f64.powi(-112), wide)?;
    let small = machine.binary(BinaryFn::Mul, DType::F32, &magnitude, &scale)?;
    let small = machine.shift(&small, 3)?;
    let end = number(machine, 65536.0, wide)?;
    let inside = machine.binary(BinaryFn::Lt, DType::F32, &magnitude, &end)?;
    let nan = machine.binary(BinaryFn::Ne, DType::F32, x, x)?;
    let [quiet, infinity] = [0x7e00_0000, 0x7c00_0000].map(|b| f64::from(f32::from_bits(b)));
    let (quiet, infinity) = (number(machine, quiet, wide)?, number(machine, infinity, wide)?);
    let beyond = machine.select(DType::F32, &nan, &quiet, &infinity)?;
    let value = machine.select(DType::F32, &inside, &small, &beyond)?;
    machine.bits(Bits::Or, &value, &sign)
}

/// The products of the two bf16 of x and y, and z, added as f32: the upper ones first.
pub fn dot<M: Machine>(
    machine: &mut M,
    [x, y, z]: [&M::Value; 3],
    wide: bool,
) -> Emitted<M::Value> {
    let (zero, upper) = (number(machine, 0.0, wide)?, bits(machine, 0xffff_0000, wide)?);
    // As f32: what bits are a number of follows the first of the two.
    let [x, y] = [x, y].map(|word| machine.bits(Bits::Or, &zero, word));
    let (x, y) = (x?, y?);
    let [a, b] = [&x, &y].map(|word| machine.bits(Bits::And, word, &upper));
    let sum = machine.accumulate(DType::F32, &a?, &b?, z)?;
    let [a, b] = [&x, &y].map(|word| machine.shift(word, 16));
    machine.accumulate(DType::F32, &a?, &b?, &sum)
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::Tensor;

    use super::*;
    use crate::graph::eval::Value;
    use crate::graph::op::{Op, Type};
    use crate::graph::{Graph, Origin};
    use crate::{Compiler, interpret};

    /// Numbers of every exponent, beside and between those of fewer bits, and those that are none.
    #[test]
    fn numbers_are_rounded_and_widened_as_they_are_meant_to_be() {
        let near =
            [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xfff, 0x1000, 0x1001, 0x3000, 0x1_8000, 0x7f_ffff];
        let of = |sign: u32| {
            let powers = (0..=255u32).map(move |power| sign << 31 | power << 23);
            powers.flat_map(|power| near.map(|bits| f32::from_bits(power | bits)))
        };
        let mut values: Vec<f32> = (0..2).flat_map(of).collect();
        values.extend((0..values.len() % 16).map(|i| 65504.0 + i as f32 * 2.0));
        let x = Tensor::from_slice(&[values.len()], &values);
        for dtype in [DType::BF16, DType::F16, DType::TF32] {
            let mut graph = Graph::default();
            let input = graph.input("x", Type::new(DType::F32, &[values.len()]));
            let o: Origin = "y".into();
            let short = graph.add(Op::Cast(dtype), &[input], &o).unwrap();
            let wide = graph.add(Op::Cast(DType::F32), &[short], &o).unwrap();
            let half = graph.binary_number(BinaryFn::Mul, wide, 0.5, &o).unwrap();
            graph.outputs.extend([("short".into(), short), ("half".into(), half)]);
            agrees(&graph, &x);
            if dtype.bytes() == 2 {
                let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
                let all = Tensor::from_bytes(dtype, &[1 << 16], &bits).unwrap();
                let mut graph = Graph::default();
                let input = graph.input("x", Type::new(dtype, &[1 << 16]));
                let wide = graph.add(Op::Cast(DType::F32), &[input], &o).unwrap();
                let moved =
                    graph.add(Op::Slice([(7, 1, 65000)].into_iter().collect()), &[input], &o);
                graph.outputs.extend([("wide".into(), wide), ("moved".into(), moved.unwrap())]);
                agrees(&graph, &all);
            }
        }
    }

    /// Compiled code in vectors of every width gives the very numbers of the interpreter.
    fn agrees(graph: &Graph, x: &Tensor) {
        let want = interpret(graph, std::slice::from_ref(x));
        for wide in [false, true] {
            let compiler = Compiler::new().wide(wide);
            let executable = compiler.build(&compiler.optimise(graph).unwrap()).unwrap();
            for ((name, got), want) in executable.run(&[("x", x.view())]).unwrap().iter().zip(&want)
            {
                let of = |t: &Tensor| Value::from_tensor(t).as_f64s();
                let pairs = of(got).into_iter().zip(of(want)).enumerate();
                for (i, (a, b)) in pairs {
                    let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                    assert!(same, "{name} of {}, wide {wide}: {i} is {a}, not {b}", want.dtype());
                }
            }
        }
    }
}
