//! Numbers for the cases.

use kiln::graph::eval::{Data, Value, int_range};
use kiln::graph::op::Type;
use kiln::tensor::{DType, Tensor};
use kiln_tests::Random;

/// What numbers of a tensor are like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Numbers {
    /// Floats below 8, and one of eight is special; integers small or of all bits.
    Any,
    /// Floats below 4; integers of one digit.
    Calm,
    /// Floats of magnitude 1/2 to 2; integers of one digit.
    NearOne,
}

/// Floats that code gets wrong: zeros, infinities, NaN, ties, subnormal and large numbers.
fn special(dtype: DType, pick: usize) -> f64 {
    let subnormal = match dtype {
        DType::F16 => 3e-7,
        DType::F64 => 1e-310,
        _ => 1e-40,
    };
    let all = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -1.5,
        2.5,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        subnormal,
        -subnormal,
        1e4,
        -1e4,
    ];
    all[pick % all.len()]
}

fn float(random: &mut Random, dtype: DType, numbers: Numbers) -> f64 {
    let unit = f64::from(random.unit());
    match numbers {
        Numbers::Any if random.below(8) == 0 => special(dtype, random.below(1 << 20)),
        Numbers::Any => unit * 8.0,
        Numbers::Calm => unit * 4.0,
        Numbers::NearOne => (f64::from(random.unit()) * 2f64.ln()).exp().copysign(unit),
    }
}

fn int(random: &mut Random, dtype: DType, numbers: Numbers) -> i128 {
    let (low, high) = int_range(dtype);
    let small = (random.below(19) as i128 - 9).clamp(low, high);
    match numbers {
        Numbers::Any if random.below(2) == 0 => {
            low + i128::from(random.bits()).rem_euclid(high - low + 1)
        }
        Numbers::Any | Numbers::Calm | Numbers::NearOne => small,
    }
}

/// A tensor of such numbers.
pub fn tensor(random: &mut Random, dtype: DType, shape: &[usize], numbers: Numbers) -> Tensor {
    let ty = Type::new(dtype, shape);
    let n = ty.numel();
    let data = match dtype.is_float() {
        true => Data::Float((0..n).map(|_| float(random, dtype, numbers)).collect()),
        false => Data::Int((0..n).map(|_| int(random, dtype, numbers)).collect()),
    };
    Value { ty, data }.to_tensor()
}
