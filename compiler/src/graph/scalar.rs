//! What functions mean on one number. Both interpreters, of graphs and of loops, are these with
//! loops around them.

use kiln_runtime::tensor::DType;

use super::op::{BinaryFn, ReduceFn, UnaryFn};

/// One number.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Number {
    /// Of a floating point dtype.
    Float(f64),
    /// Of an integer dtype or bool.
    Int(i128),
}

/// f(x), of a dtype.
pub fn unary(f: UnaryFn, dtype: DType, x: Number) -> Number {
    match x {
        Number::Float(x) => Number::Float(round_float(dtype, float_unary(f, x))),
        Number::Int(x) => Number::Int(wrap(dtype, int_unary(f, x, dtype))),
    }
}

/// f(x, y) of numbers of a dtype; comparisons give a bool.
pub fn binary(f: BinaryFn, dtype: DType, x: Number, y: Number) -> Number {
    match (x, y) {
        (Number::Float(x), Number::Float(y)) if f.is_comparison() => {
            Number::Int(float_binary(f, x, y) as i128)
        }
        (Number::Float(x), Number::Float(y)) => {
            Number::Float(round_float(dtype, float_binary(f, x, y)))
        }
        (Number::Int(x), Number::Int(y)) => Number::Int(wrap(dtype, int_binary(f, x, y))),
        (Number::Float(_), Number::Int(_)) | (Number::Int(_), Number::Float(_)) => {
            unreachable!("operands have one dtype")
        }
    }
}

/// A number as another dtype.
pub fn cast(dtype: DType, x: Number) -> Number {
    match x {
        Number::Float(x) if dtype.is_float() => Number::Float(round_float(dtype, x)),
        Number::Float(x) => Number::Int(cast_to_int(dtype, x)),
        Number::Int(x) if dtype.is_float() => Number::Float(round_float(dtype, x as f64)),
        Number::Int(x) => Number::Int(wrap(dtype, x)),
    }
}

/// x * y + z of a dtype, rounded once.
pub fn fma(dtype: DType, x: Number, y: Number, z: Number) -> Number {
    match (x, y, z) {
        (Number::Float(x), Number::Float(y), Number::Float(z)) => Number::Float(match dtype {
            DType::F64 => x.mul_add(y, z),
            // The product is exact in f64; a sum rounded to odd may be rounded again.
            _ => round_float(dtype, sum_to_odd(x * y, z)),
        }),
        (Number::Int(x), Number::Int(y), Number::Int(z)) => {
            Number::Int(wrap(dtype, x.wrapping_mul(y).wrapping_add(z)))
        }
        _ => unreachable!("operands have one dtype"),
    }
}

/// What an i32 is made of where its parts are numbers by themselves, the first one lowest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parts {
    /// Two i16.
    Pairs,
    /// Four bytes: those of the first factor are u8, those of the second one i8.
    Quads,
    /// Two bf16.
    Halves,
}

/// The dot products of short numbers that a machine has instructions for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Dots {
    /// Of integers.
    pub whole: bool,
    /// Of this dtype, whose products are summed as f32.
    pub rounded: Option<DType>,
    /// Of all of these, by the warps of a GPU.
    pub warps: bool,
}

impl Parts {
    /// All of them.
    pub const ALL: [Parts; 3] = [Parts::Pairs, Parts::Quads, Parts::Halves];

    /// How many there are.
    pub fn count(self) -> usize {
        match self {
            Parts::Pairs | Parts::Halves => 2,
            Parts::Quads => 4,
        }
    }

    /// Those that factors are made of, in this order or in the other one.
    pub fn of(factors: [DType; 2]) -> Option<Parts> {
        let [x, y] = factors;
        let fits = |p: &Parts| p.dtypes() == factors || p.dtypes() == [y, x];
        Parts::ALL.into_iter().find(fits)
    }

    /// What their products are added as.
    pub fn sum(self) -> DType {
        match self {
            Parts::Pairs | Parts::Quads => DType::I32,
            Parts::Halves => DType::F32,
        }
    }

    /// What they are in the first and in the second factor.
    pub fn dtypes(self) -> [DType; 2] {
        match self {
            Parts::Pairs => [DType::I16, DType::I16],
            Parts::Quads => [DType::U8, DType::I8],
            Parts::Halves => [DType::BF16, DType::BF16],
        }
    }
}

/// The products of the parts of x and y, and z, added. Those of bf16 are added to z as `fma` does,
/// the last one first, as `vdpbf16ps` does; which takes numbers below the least normal one as 0.
pub fn dot(parts: Parts, x: Number, y: Number, z: Number) -> Number {
    if let (Number::Int(x), Number::Int(y), Parts::Halves) = (x, y, parts) {
        let part = |word: i128, k: usize| {
            let bits = (word >> (16 * k)) as u16;
            Number::Float(half::bf16::from_bits(bits).to_f64())
        };
        return [1, 0].into_iter().fold(z, |sum, k| fma(DType::F32, part(x, k), part(y, k), sum));
    }
    let (Number::Int(x), Number::Int(y), Number::Int(z)) = (x, y, z) else {
        unreachable!("parts of words are added as they are multiplied")
    };
    let [first, second] = parts.dtypes();
    let products = (0..parts.count()).map(|k| {
        let shift = 8 * first.bytes() * k;
        wrap(first, x >> shift) * wrap(second, y >> shift)
    });
    Number::Int(wrap(DType::I32, products.sum::<i128>() + z))
}

/// x + y, or where it is inexact, that of its two neighbours whose last bit is 1.
fn sum_to_odd(x: f64, y: f64) -> f64 {
    let sum = x + y;
    let other = sum - x;
    let error = (x - (sum - other)) + (y - other);
    if !sum.is_finite() || error == 0.0 || error.is_nan() || sum.to_bits() & 1 == 1 {
        return sum;
    }
    // Away from zero where the exact sum is larger in magnitude.
    let step = if (error > 0.0) == (sum > 0.0) { 1i64 } else { -1 };
    f64::from_bits(sum.to_bits().wrapping_add_signed(step))
}

/// The number as f32, or where there is none the neighbour with an odd mantissa: rounding that
/// once more gives what rounding the number would. (`half` drops the low half of an f64.)
fn sticky(v: f64) -> f32 {
    let near = v as f32;
    let exact = near as f64 == v || v.is_nan() || near.is_infinite();
    match near.to_bits() & 1 {
        0 if !exact => f32::from_bits(match (near as f64).abs() < v.abs() {
            true => near.to_bits() + 1,
            false => near.to_bits() - 1,
        }),
        _ => near,
    }
}

/// The nearest bf16.
pub fn bf16(v: f64) -> half::bf16 {
    half::bf16::from_f32(sticky(v))
}

/// The nearest f16.
pub fn f16(v: f64) -> half::f16 {
    half::f16::from_f32(sticky(v))
}

/// The nearest number with 10 bits of mantissa, of two such the one further from 0: as
/// `cvt.rna.tf32` rounds.
pub fn tf32(v: f64) -> f32 {
    let near = sticky(v);
    match near.is_nan() {
        true => f32::NAN,
        // What is carried out of the mantissa goes into the exponent, up to infinity.
        false => f32::from_bits((near.to_bits() + 0x1000) & !0x1fff),
    }
}

/// The nearest number of a floating point dtype.
pub fn round_float(dtype: DType, v: f64) -> f64 {
    match dtype {
        DType::F64 => v,
        DType::F16 => f16(v).to_f64(),
        DType::BF16 => bf16(v).to_f64(),
        DType::TF32 => tf32(v).into(),
        _ => v as f32 as f64,
    }
}

/// An integer wrapped to a dtype.
pub fn wrap(dtype: DType, v: i128) -> i128 {
    match dtype {
        DType::I8 => v as i8 as i128,
        DType::I16 => v as i16 as i128,
        DType::I32 => v as i32 as i128,
        DType::I64 => v as i64 as i128,
        DType::U8 => v as u8 as i128,
        DType::U16 => v as u16 as i128,
        DType::U32 => v as u32 as i128,
        DType::U64 => v as u64 as i128,
        DType::Bool => (v != 0) as i128,
        DType::F32 | DType::F16 | DType::BF16 | DType::TF32 | DType::F64 => v,
        DType::Small(_) => wrap(dtype.stored(), v),
    }
}

/// Least and greatest value of an integer dtype.
pub fn int_range(dtype: DType) -> (i128, i128) {
    match dtype {
        DType::I8 => (i8::MIN as i128, i8::MAX as i128),
        DType::I16 => (i16::MIN as i128, i16::MAX as i128),
        DType::I32 => (i32::MIN as i128, i32::MAX as i128),
        DType::I64 => (i64::MIN as i128, i64::MAX as i128),
        DType::U8 => (0, u8::MAX as i128),
        DType::U16 => (0, u16::MAX as i128),
        DType::U32 => (0, u32::MAX as i128),
        DType::U64 => (0, u64::MAX as i128),
        DType::Bool | DType::F32 | DType::F16 | DType::BF16 | DType::TF32 | DType::F64 => (0, 1),
        DType::Small(_) => int_range(dtype.stored()),
    }
}

/// Float to integer: truncated and saturated, NaN is 0; to bool it is `!= 0`.
pub fn cast_to_int(dtype: DType, v: f64) -> i128 {
    if dtype == DType::Bool {
        return (v != 0.0) as i128;
    }
    let (low, high) = int_range(dtype);
    (v as i128).clamp(low, high)
}

/// A function of one f64.
pub fn float_unary(f: UnaryFn, x: f64) -> f64 {
    match f {
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Sign if x == 0.0 || x.is_nan() => x,
        UnaryFn::Sign => x.signum(),
        UnaryFn::Recip => 1.0 / x,
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.ln(),
        UnaryFn::Sin => x.sin(),
        UnaryFn::Cos => x.cos(),
        UnaryFn::Tanh => x.tanh(),
        UnaryFn::Erf => erf(x),
        UnaryFn::Floor => x.floor(),
        UnaryFn::Ceil => x.ceil(),
        UnaryFn::Round => x.round_ties_even(),
        UnaryFn::Not => (x == 0.0) as u8 as f64,
    }
}

/// A function of one integer of a dtype, not yet wrapped.
pub fn int_unary(f: UnaryFn, x: i128, dtype: DType) -> i128 {
    match f {
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Sign => x.signum(),
        UnaryFn::Not if dtype == DType::Bool => (x == 0) as i128,
        UnaryFn::Not => !x,
        UnaryFn::Recip
        | UnaryFn::Sqrt
        | UnaryFn::Exp
        | UnaryFn::Log
        | UnaryFn::Sin
        | UnaryFn::Cos
        | UnaryFn::Tanh
        | UnaryFn::Erf
        | UnaryFn::Floor
        | UnaryFn::Ceil
        | UnaryFn::Round => unreachable!("inference refuses {f:?} of integers"),
    }
}

/// Error function: its Taylor series where that converges fast, else the continued fraction of
/// its complement (Abramowitz and Stegun 7.1.5 and 7.1.14); error below 1e-13.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    let value = if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        std::f64::consts::FRAC_2_SQRT_PI * sum
    } else if a > 6.5 {
        1.0
    } else {
        let tail = (1..60).rev().fold(a, |t, k| a + k as f64 / 2.0 / t);
        1.0 - (-a * a).exp() / (tail * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

/// A function of two f64; comparisons give 0 or 1.
pub fn float_binary(f: BinaryFn, a: f64, b: f64) -> f64 {
    match f {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        BinaryFn::Mul => a * b,
        BinaryFn::Div => a / b,
        BinaryFn::Rem => a % b,
        BinaryFn::Max if a.is_nan() || b.is_nan() => f64::NAN,
        BinaryFn::Min if a.is_nan() || b.is_nan() => f64::NAN,
        BinaryFn::Max => a.max(b),
        BinaryFn::Min => a.min(b),
        BinaryFn::Pow => a.powf(b),
        BinaryFn::Eq => (a == b) as u8 as f64,
        BinaryFn::Ne => (a != b) as u8 as f64,
        BinaryFn::Lt => (a < b) as u8 as f64,
        BinaryFn::Le => (a <= b) as u8 as f64,
        BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => {
            unreachable!("inference refuses {f:?} of floats")
        }
    }
}

/// A function of two integers, not yet wrapped; comparisons give 0 or 1.
pub fn int_binary(f: BinaryFn, a: i128, b: i128) -> i128 {
    match f {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        // Of 64-bit factors: the product fits.
        BinaryFn::Mul => a.wrapping_mul(b),
        BinaryFn::Div => a.checked_div(b).unwrap_or(0),
        BinaryFn::Rem => a.checked_rem(b).unwrap_or(0),
        BinaryFn::Max => a.max(b),
        BinaryFn::Min => a.min(b),
        BinaryFn::Pow => int_pow(a, b),
        BinaryFn::Eq => (a == b) as i128,
        BinaryFn::Ne => (a != b) as i128,
        BinaryFn::Lt => (a < b) as i128,
        BinaryFn::Le => (a <= b) as i128,
        BinaryFn::And => a & b,
        BinaryFn::Or => a | b,
        BinaryFn::Xor => a ^ b,
    }
}

/// a^b, wrapping; a negative exponent truncates the fraction.
fn int_pow(a: i128, b: i128) -> i128 {
    match (a, b) {
        (1, _) => 1,
        (-1, b) => {
            if b % 2 == 0 {
                1
            } else {
                -1
            }
        }
        (_, b) if b < 0 => 0,
        (a, b) => {
            let (mut result, mut base, mut rest) = (1i128, a, b);
            while rest > 0 {
                if rest & 1 == 1 {
                    result = result.wrapping_mul(base);
                }
                base = base.wrapping_mul(base);
                rest >>= 1;
            }
            result
        }
    }
}

/// What a reduction of no elements gives.
pub fn reduce_identity(f: ReduceFn, dtype: DType) -> (f64, i128) {
    let (low, high) = int_range(dtype);
    match f {
        ReduceFn::Sum => (0.0, 0),
        ReduceFn::Prod => (1.0, 1),
        ReduceFn::Max => (f64::NEG_INFINITY, low),
        ReduceFn::Min => (f64::INFINITY, high),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fma_rounds_once() {
        let number = |v: f32| Number::Float(v.into());
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let exponent = 100 + (state >> 58) as u32;
            f32::from_bits((state >> 32) as u32 & 0x807f_ffff | exponent << 23)
        };
        for _ in 0..20_000 {
            let (x, y, z) = (next(), next(), next());
            let found = fma(DType::F32, number(x), number(y), number(z));
            assert_eq!(found, number(x.mul_add(y, z)), "{x:e} * {y:e} + {z:e}");
        }
        let halfway = 1.0 + f32::EPSILON;
        let tiny = f32::MIN_POSITIVE;
        let tie = number(f32::EPSILON / 2.0);
        assert_eq!(
            fma(DType::F32, tie, number(1.0), number(halfway)),
            number(1.0 + 2.0 * f32::EPSILON)
        );
        let above = fma(DType::F32, number(tiny), number(tiny), number(1.0));
        assert_eq!(above, number(1.0));
    }

    #[test]
    fn integers_wrap_and_casts_saturate() {
        let int = Number::Int;
        assert_eq!(binary(BinaryFn::Add, DType::I8, int(127), int(1)), int(-128));
        assert_eq!(binary(BinaryFn::Div, DType::I32, int(5), int(0)), int(0));
        assert_eq!(unary(UnaryFn::Not, DType::U8, int(1)), int(254));
        assert_eq!(cast(DType::U8, Number::Float(300.0)), int(255));
        assert_eq!(cast(DType::I64, Number::Float(f64::NAN)), int(0));
        assert_eq!(cast(DType::Bool, int(2)), int(1));
        assert_eq!(cast(DType::F16, int(2049)), Number::Float(2048.0));
        assert_eq!(fma(DType::U8, int(16), int(17), int(1)), int(17));
    }

    #[test]
    fn ties_of_tf32_go_away_from_zero() {
        let step = 2f64.powi(-10);
        for (number, nearest) in [
            (1.0 + step / 2.0, 1.0 + step),
            (-1.0 - step / 2.0, -1.0 - step),
            (1.0 + step * 0.49, 1.0),
            (f64::from(f32::MAX), f64::INFINITY),
            (f64::NEG_INFINITY, f64::NEG_INFINITY),
            (f64::from(f32::from_bits(0x1000)), f64::from(f32::from_bits(0x2000))),
        ] {
            assert_eq!(round_float(DType::TF32, number), nearest);
        }
        assert!(round_float(DType::TF32, f64::from(f32::from_bits(0x7fff_ffff))).is_nan());
    }
}
