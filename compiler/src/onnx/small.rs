//! Numbers from codes and codes from numbers, by operations that every target has: what codes of
//! fractions stand for is looked up in a table, and the way back is arithmetic that vectors can do;
//! those of integers are the integers.

use kiln_runtime::tensor::{DType, Small, Tensor};

use super::call::{Call, not_supported};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Op, UnaryFn};
use crate::graph::small::{format, number};

/// Which power of two a number between two becomes.
#[derive(Clone, Copy)]
enum Rounding {
    /// The nearest one, of two the larger.
    Nearest,
    Up,
    Down,
}

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
    pub(super) const WRAP: Manner = Manner { rounding: Rounding::Up, saturate: true, clamp: false };

    /// As the attributes of a node say.
    pub(super) fn of(call: &Call, clamp: bool) -> Result<Manner, Diagnostic> {
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

/// A magnitude as `v * 2^(n + least)` with v below 2, and below 1 only where n is 0; gives v and
/// `n * unit`. The exponent is found by halving.
fn parted(
    call: &mut Call,
    magnitude: NodeId,
    (least, greatest): (i32, i32),
    unit: f64,
) -> Result<(NodeId, NodeId), Diagnostic> {
    let (g, o) = (&mut *call.graph, &call.origin);
    let (dtype, rank) = (g.ty(magnitude).dtype, g.ty(magnitude).rank());
    // Numbers below 1 are made larger at once, so that none of them loses bits.
    let below = g.binary_number(BinaryFn::Lt, magnitude, 1.0, o)?;
    let larger = g.binary_number(BinaryFn::Mul, magnitude, 2f64.powi(-least), o)?;
    let mut v = g.select(below, larger, magnitude, o)?;
    let none = g.scalar(dtype, rank, 0.0, o);
    let one = g.scalar(dtype, rank, f64::from(-least) * unit, o);
    let mut n = g.select(below, none, one, o)?;
    let mut step = (greatest.max(-least - 1).max(1) as u32 + 1).next_power_of_two() / 2;
    while step > 0 {
        let power = 2f64.powi(step as i32);
        let bound = g.scalar(dtype, rank, power, o);
        let reached = g.binary(BinaryFn::Le, bound, v, o)?;
        let smaller = g.binary_number(BinaryFn::Mul, v, 1.0 / power, o)?;
        let more = g.binary_number(BinaryFn::Add, n, f64::from(step) * unit, o)?;
        v = g.select(reached, smaller, v, o)?;
        n = g.select(reached, more, n, o)?;
        step /= 2;
    }
    Ok((v, n))
}

/// Codes of fractions. Without their signs they are in the order of their numbers, and as far apart
/// as these are within one exponent: the code is a sum of both.
fn fractions(call: &mut Call, x: NodeId, small: Small, manner: Manner) -> Added {
    let format = format(small).ok_or_else(|| not_supported("fractions of integers"))?;
    let work = if call.ty(x).dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let x = call.graph.cast(x, work, &call.origin)?;
    let magnitude = call.graph.unary(UnaryFn::Abs, x, &call.origin)?;
    let greatest = number(small, format.largest).log2().floor() as i32;
    let unit = 2f64.powi(format.mantissa);
    let (v, n) = parted(call, magnitude, (format.least, greatest), unit)?;
    let rank = call.ty(x).rank();
    let numbers = [0.0, format.sign.into(), format.largest.into(), format.nan.into()];
    let [zero, sign, largest, nan] = numbers.map(|v: f64| call.number(work, rank, v));
    let (g, o) = (&mut *call.graph, &call.origin);
    let digits = match (small, manner.rounding) {
        (Small::F8E8M0, Rounding::Up) => g.unary(UnaryFn::Ceil, v, o)?,
        (Small::F8E8M0, Rounding::Down) => g.unary(UnaryFn::Floor, v, o)?,
        (Small::F8E8M0, Rounding::Nearest) => {
            let v = g.binary_number(BinaryFn::Add, v, 0.5, o)?;
            g.unary(UnaryFn::Floor, v, o)?
        }
        _ => {
            let v = g.binary_number(BinaryFn::Mul, v, unit, o)?;
            g.unary(UnaryFn::Round, v, o)?
        }
    };
    let mut code = g.binary(BinaryFn::Add, digits, n, o)?;
    if small == Small::F8E8M0 {
        // The leading one has no bit; what is too small becomes the least power.
        code = g.binary_number(BinaryFn::Sub, code, 1.0, o)?;
        code = g.binary_number(BinaryFn::Max, code, 0.0, o)?;
    }
    let saturate = manner.saturate || format.beyond == format.largest;
    let limit = f64::from(format.largest) + if saturate { 0.0 } else { 1.0 };
    code = g.binary_number(BinaryFn::Min, code, limit, o)?;
    if format.sign != 0 {
        // Negative zero is below zero here: its reciprocal is, and that of infinity is not.
        let below = g.binary(BinaryFn::Lt, x, zero, o)?;
        let reciprocal = g.unary(UnaryFn::Recip, x, o)?;
        let reciprocal = g.binary(BinaryFn::Lt, reciprocal, zero, o)?;
        let bit = g.select(reciprocal, sign, zero, o)?;
        let mut bit = g.select(below, sign, bit, o)?;
        if format.one_zero() {
            let more = g.binary(BinaryFn::Lt, zero, code, o)?;
            let none = g.binary(BinaryFn::Lt, largest, code, o)?;
            bit = g.select(more, bit, zero, o)?;
            bit = g.select(none, zero, bit, o)?;
        }
        code = g.binary(BinaryFn::Add, code, bit, o)?;
    } else if !saturate {
        let least = g.scalar(work, rank, number(small, 0), o);
        let less = g.binary(BinaryFn::Lt, magnitude, least, o)?;
        code = g.select(less, nan, code, o)?;
    }
    let is_nan = g.binary(BinaryFn::Ne, x, x, o)?;
    code = g.select(is_nan, nan, code, o)?;
    let code = g.cast(code, DType::U8, o)?;
    g.bits(code, DType::Small(small), o)
}

#[cfg(test)]
mod tests {
    use super::super::control::tests::{graph, ints, model, node, port};
    use super::super::proto::{AttributeProto, TensorProto};
    use super::*;
    use crate::graph::Graph;
    use crate::graph::eval::Value;
    use crate::interpret;
    use crate::tests::compiled;

    const FRACTIONS: [(Small, i64); 6] = [
        (Small::F8E4M3FN, 17),
        (Small::F8E4M3FNUZ, 18),
        (Small::F8E5M2, 19),
        (Small::F8E5M2FNUZ, 20),
        (Small::F4E2M1, 23),
        (Small::F8E8M0, 24),
    ];

    fn cast(from: i32, to: i64, len: usize, more: &[AttributeProto]) -> Graph {
        let mut cast = node("Cast", &["x"], &["y"]);
        cast.attribute.push(ints("to", &[to]));
        cast.attribute.extend_from_slice(more);
        model(graph(&[port("x", &[len as i64], from)], &[cast], &["y"]), false).expect("a model")
    }

    /// Interpreted and compiled, which must be the same.
    fn both(graph: &Graph, x: &Tensor) -> Tensor {
        let meant = interpret(graph, std::slice::from_ref(x)).remove(0);
        let got = compiled(graph, x);
        assert!(got.bytes() == meant.bytes() && got.dtype() == meant.dtype(), "{got:?}");
        meant
    }

    /// Every number of f16, and what lies between codes and right beside that.
    fn probes(small: Small) -> Vec<f32> {
        let mut all: Vec<f32> =
            (0..=u16::MAX).map(|bits| half::f16::from_bits(bits).to_f32()).collect();
        let mut codes: Vec<f64> = (0..=255).map(|code| number(small, code)).collect();
        codes.retain(|v| v.is_finite());
        codes.sort_by(f64::total_cmp);
        for pair in codes.windows(2) {
            let middle = ((pair[0] + pair[1]) / 2.0) as f32;
            all.extend([middle, middle.next_up(), middle.next_down()]);
        }
        let largest = codes[codes.len() - 1] as f32;
        all.extend([largest * 1.03, largest * 1.0625, largest * 1.07, largest * 1.125]);
        all.extend([largest * 1.2, largest * -1.2, f32::MAX, f32::MIN, f32::MIN_POSITIVE]);
        all
    }

    /// The number that v becomes, by looking at all that there are.
    fn nearest(small: Small, v: f64, saturate: bool) -> f64 {
        let codes = if small == Small::F4E2M1 { 0..8u8 } else { 0..128 };
        let known: Vec<(u8, f64)> =
            codes.map(|c| (c, number(small, c))).filter(|c| c.1.is_finite()).collect();
        let (last, largest) = known[known.len() - 1];
        let size = v.abs();
        if size > largest {
            let half = (largest - known[known.len() - 2].1) / 2.0;
            let beyond = size > largest + half || (size == largest + half && last % 2 == 1);
            return match saturate || small == Small::F4E2M1 || !beyond {
                true => largest.copysign(v),
                false if small == Small::F8E5M2 => f64::INFINITY.copysign(v),
                false => f64::NAN,
            };
        }
        let nearer = |a: &(u8, f64), b: &(u8, f64)| {
            let by = |c: &(u8, f64)| ((c.1 - size).abs(), c.0 % 2);
            by(a).partial_cmp(&by(b)).expect("numbers")
        };
        known.into_iter().min_by(nearer).expect("some").1.copysign(v)
    }

    #[test]
    fn fractions_become_the_nearest_codes() {
        for (small, to) in &FRACTIONS[..5] {
            let probes = probes(*small);
            let x = Tensor::from_slice(&[probes.len()], &probes);
            for saturate in [1, 0] {
                let made = cast(1, *to, probes.len(), &[ints("saturate", &[saturate])]);
                let found = both(&made, &x);
                assert_eq!(found.dtype(), DType::Small(*small));
                for (v, code) in probes.iter().zip(found.bytes()) {
                    if v.is_nan() {
                        let none = *small == Small::F4E2M1 || number(*small, *code).is_nan();
                        assert!(none, "{small:?} of NaN is {code:#x}");
                        continue;
                    }
                    let want = nearest(*small, f64::from(*v), saturate == 1);
                    let got = number(*small, *code);
                    let same = got == want || got.is_nan() && want.is_nan();
                    assert!(same, "{small:?} of {v:e} is {code:#x}, {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn powers_of_two_are_rounded_as_the_model_says() {
        let probes = probes(Small::F8E8M0);
        let x = Tensor::from_slice(&[probes.len()], &probes);
        let least = 2f64.powi(-127);
        for mode in ["up", "down", "nearest"] {
            let mode_of = AttributeProto {
                name: Some("round_mode".into()),
                s: Some(mode.as_bytes().to_vec().into()),
                ..Default::default()
            };
            let found = both(&cast(1, 24, probes.len(), &[mode_of]), &x);
            for (v, &code) in probes.iter().zip(found.bytes()) {
                let (size, got) = (f64::from(v.abs()), number(Small::F8E8M0, code));
                let fits = match mode {
                    _ if v.is_nan() => code == 255,
                    _ if size >= 2f64.powi(127) => code == 254,
                    _ if size <= least => code == 0,
                    "up" => got >= size && got / 2.0 < size,
                    "down" => got <= size && got * 2.0 > size,
                    _ => got * 0.75 <= size && size < got * 1.5,
                };
                assert!(fits, "{v:e} {mode} is {code}, {got:e}");
            }
        }
    }

    #[test]
    fn codes_become_their_numbers() {
        for (small, from) in FRACTIONS {
            let codes: Vec<u8> = (0..=255).collect();
            let x = Tensor::from_bytes(DType::Small(small), &[256], &codes).expect("bytes");
            let found = both(&cast(from as i32, 1, 256, &[]), &x);
            for (&code, &got) in codes.iter().zip(found.as_slice::<f32>().expect("f32")) {
                let want = number(small, code) as f32;
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan());
            }
        }
    }

    #[test]
    fn integers_lose_their_upper_bits_where_they_are_cast() {
        let values: Vec<i64> = (-40..40).collect();
        let x = Tensor::from_slice(&[values.len()], &values);
        for (to, bits, signed) in [(21, 4, false), (22, 4, true), (25, 2, false), (26, 2, true)] {
            let found = both(&cast(7, to, values.len(), &[]), &x);
            for (v, &code) in values.iter().zip(found.bytes()) {
                let low = v & ((1 << bits) - 1);
                let below = signed && low >= 1 << (bits - 1);
                let want = if below { low - (1 << bits) } else { low };
                assert_eq!(i64::from(code as i8), want, "{v} as {to}");
            }
        }
    }

    /// Weights of 4 bits, quantised in blocks of a column, in a product.
    #[test]
    fn weights_of_four_bits_are_multiplied_as_what_they_stand_for() {
        let (rows, inner, columns, block) = (3usize, 8usize, 5usize, 4usize);
        let codes: Vec<i8> = (0..inner * columns).map(|i| (i * 7 % 16) as i8 - 8).collect();
        let packed: Vec<u8> =
            codes.chunks(2).map(|c| (c[0] as u8 & 15) | (c[1] as u8) << 4).collect();
        let tensor = |name: &str, dims: &[usize], data_type: i32, raw: Vec<u8>| TensorProto {
            name: Some(name.into()),
            dims: dims.iter().map(|&d| d as i64).collect(),
            data_type: Some(data_type),
            raw_data: Some(raw.into()),
            ..Default::default()
        };
        let scales: Vec<f32> =
            (0..inner / block * columns).map(|i| 0.5f32.powi(i as i32 % 3)).collect();
        let scale_bytes = scales.iter().flat_map(|v| v.to_ne_bytes()).collect();
        let mut read = node("DequantizeLinear", &["w", "s"], &["f"]);
        read.attribute.extend([ints("axis", &[0]), ints("block_size", &[block as i64])]);
        let nodes = [read, node("MatMul", &["x", "f"], &["y"])];
        let mut made = graph(&[port("x", &[rows as i64, inner as i64], 1)], &nodes, &["y"]);
        made.initializer = vec![
            tensor("w", &[inner, columns], 22, packed.clone()),
            tensor("s", &[inner / block, columns], 1, scale_bytes),
        ];
        let x: Vec<f32> = (0..rows * inner).map(|i| i as f32 * 0.25 - 2.0).collect();
        let given = Tensor::from_slice(&[rows, inner], &x);
        let compiled = compiled(&model(made.clone(), false).expect("a model"), &given);
        for (i, &got) in compiled.as_slice::<f32>().expect("f32").iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let product = |k: usize| {
                let scale = scales[k / block * columns + column];
                x[row * inner + k] * f32::from(codes[k * columns + column]) * scale
            };
            // Products and sums of few bits are exact.
            assert_eq!(got, (0..inner).map(product).sum::<f32>(), "row {row}, column {column}");
        }
        made.initializer[0].raw_data = Some(packed[1..].to_vec().into());
        let problem = model(made, false).expect_err("a byte is missing");
        assert!(problem.contains("20 for i4[8, 5]") && problem.contains("19"), "{problem}");
    }

    #[test]
    fn codes_are_moved_and_never_computed_with() {
        let x: Vec<u8> = (0..12).map(|i| i * 19).collect();
        let x = Tensor::from_bytes(DType::Small(Small::F8E5M2), &[3, 4], &x).expect("bytes");
        let made = |nodes: &[_]| model(graph(&[port("x", &[3, 4], 19)], nodes, &["y"]), false);
        let moves = [
            node("Transpose", &["x"], &["t"]),
            node("Identity", &["t"], &["i"]),
            node("Concat", &["t", "i"], &["c"]),
            node("Flatten", &["c"], &["f"]),
            node("Shape", &["f"], &["s"]),
            node("Expand", &["f", "s"], &["y"]),
        ];
        let mut moves = moves.to_vec();
        moves[2].attribute.push(ints("axis", &[1]));
        let found = both(&made(&moves).expect("a model"), &x);
        let place = |i: usize| x.bytes()[(i % 6 % 3) * 4 + i / 6];
        assert_eq!(found.dtype(), x.dtype());
        assert_eq!(found.bytes(), (0..24).map(place).collect::<Vec<u8>>());
        for op in ["Add", "Max", "Less", "Equal"] {
            let problem = made(&[node(op, &["x", "x"], &["y"])]).expect_err("codes");
            assert!(problem.contains("codes are cast or dequantised before"), "{op}: {problem}");
        }
    }

    #[test]
    fn bits_are_those_of_the_other_type() {
        let cast = |from: i32, to: i64, len: i64| {
            let mut cast = node("BitCast", &["x"], &["y"]);
            cast.attribute.push(ints("to", &[to]));
            model(graph(&[port("x", &[len], from)], &[cast], &["y"]), false)
        };
        let x = Tensor::from_slice(&[4], &[1.5f32, -0.0, f32::NAN, f32::NEG_INFINITY]);
        let bits = both(&cast(1, 6, 4).expect("a model"), &x);
        assert_eq!((bits.dtype(), bits.bytes()), (DType::I32, x.bytes()));
        let codes: Vec<u8> = (0..16).map(|c| if c < 8 { c } else { c | 0xf0 }).collect();
        let signed = Tensor::from_bytes(DType::Small(Small::I4), &[16], &codes).expect("bytes");
        let plain = both(&cast(22, 23, 16).expect("a model"), &signed);
        assert_eq!(plain.bytes(), (0..16).collect::<Vec<u8>>());
        let again = both(&cast(23, 22, 16).expect("a model"), &plain);
        assert_eq!(again.bytes(), signed.bytes());
        let bytes = Tensor::from_slice(&[3], &[0u8, 1, 200]);
        let held = both(&cast(2, 9, 3).expect("a model"), &bytes);
        assert_eq!(Value::from_tensor(&held).as_f64s(), [0.0, 1.0, 1.0]);
        let problem = cast(1, 11, 4).expect_err("other widths");
        assert!(problem.contains("32 bits of f32 as 64 bits of f64"), "{problem}");
    }
}
