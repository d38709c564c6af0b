//! Functions of f64 that no instruction computes. Nothing here is fast: networks compute in f32,
//! and f64 is for the few that ask for it.

use kiln_runtime::tensor::DType;

use super::emit::{Emitted, Machine};
use super::math::{Calc, V, within_one};
use crate::graph::op::{BinaryFn, UnaryFn};

/// e^x in f64: 2^n times the Taylor series on |r| <= ln 2 / 2.
pub fn exp64<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let x = calc.clamp(x, -745.5, 710.0)?;
    let n = calc.opc(BinaryFn::Mul, &x, std::f64::consts::LOG2_E)?;
    let n = calc.un(UnaryFn::Round, &n)?;
    let (high, low) = (calc.c(-0.693_147_180_369_123_8)?, calc.c(-1.908_214_929_270_587_7e-10)?);
    let r = calc.fma(&n, &high, &x)?;
    let r = calc.fma(&n, &low, &r)?;
    let mut coefficients = vec![1.0f64];
    for k in 1..=13 {
        coefficients.push(coefficients[k - 1] / k as f64);
    }
    coefficients.reverse();
    let p = calc.poly(&r, &coefficients)?;
    let half = calc.opc(BinaryFn::Mul, &n, 0.5)?;
    let half = calc.un(UnaryFn::Floor, &half)?;
    let rest = calc.op(BinaryFn::Sub, &n, &half)?;
    let (a, b) = (pow2_64(calc, &half)?, pow2_64(calc, &rest)?);
    let p = calc.op(BinaryFn::Mul, &p, &a)?;
    calc.op(BinaryFn::Mul, &p, &b)
}

/// 2^n in f64 by repeated squaring: exact, and needs no integer bits of f64.
fn pow2_64<M: Machine>(calc: &mut Calc<M>, n: &V<M>) -> Emitted<V<M>> {
    let magnitude = calc.un(UnaryFn::Abs, n)?;
    let mut rest = magnitude;
    let mut power = calc.c(1.0)?;
    for k in (0..10).rev() {
        let step = f64::from(1u32 << k);
        let smaller = calc.opc(BinaryFn::Sub, &rest, step)?;
        let larger = calc.opc(BinaryFn::Mul, &power, step.exp2())?;
        power = calc.less(&rest, step, &power, &larger)?;
        rest = calc.less(&rest, step, &rest, &smaller)?;
    }
    let inverse = calc.un(UnaryFn::Recip, &power)?;
    calc.less(n, 0.0, &inverse, &power)
}

/// Natural logarithm in f64 of a number that is not negative: scaled into 1..2 by powers of two,
/// then 2 artanh((m - 1) / (m + 1)).
pub fn log64<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    // Subnormal numbers are scaled into the normal ones.
    let scaled = calc.opc(BinaryFn::Mul, x, 54f64.exp2())?;
    let mut m = calc.less(x, f64::MIN_POSITIVE, &scaled, x)?;
    let (none, less) = (calc.c(0.0)?, calc.c(-54.0)?);
    let mut exponent = calc.less(x, f64::MIN_POSITIVE, &less, &none)?;
    for k in (0..10).rev() {
        let step = f64::from(1u32 << k);
        let power = step.exp2();
        let down = calc.opc(BinaryFn::Mul, &m, 1.0 / power)?;
        let more = calc.opc(BinaryFn::Add, &exponent, step)?;
        exponent = calc.less(&m, power, &exponent, &more)?;
        m = calc.less(&m, power, &m, &down)?;
    }
    for k in (0..10).rev() {
        let step = f64::from(1u32 << k);
        let power = (-step).exp2();
        let bound = 2.0 * power;
        let up = calc.opc(BinaryFn::Mul, &m, 1.0 / power)?;
        let fewer = calc.opc(BinaryFn::Sub, &exponent, step)?;
        exponent = calc.less(&m, bound, &fewer, &exponent)?;
        m = calc.less(&m, bound, &up, &m)?;
    }
    // Numbers just below 1 keep the exponent 0: nothing cancels.
    let root = std::f64::consts::SQRT_2;
    let halved = calc.opc(BinaryFn::Mul, &m, 0.5)?;
    let more = calc.opc(BinaryFn::Add, &exponent, 1.0)?;
    exponent = calc.less(&m, root, &exponent, &more)?;
    m = calc.less(&m, root, &m, &halved)?;
    let low = calc.opc(BinaryFn::Sub, &m, 1.0)?;
    let high = calc.opc(BinaryFn::Add, &m, 1.0)?;
    let s = calc.op(BinaryFn::Div, &low, &high)?;
    let square = calc.op(BinaryFn::Mul, &s, &s)?;
    let coefficients: Vec<f64> = (0..20).rev().map(|k| 2.0 / f64::from(2 * k + 1)).collect();
    let p = calc.poly(&square, &coefficients)?;
    let p = calc.op(BinaryFn::Mul, &p, &s)?;
    let ln2 = calc.c(std::f64::consts::LN_2)?;
    let p = calc.fma(&exponent, &ln2, &p)?;
    let infinity = calc.c(f64::INFINITY)?;
    let finite = calc.op(BinaryFn::Lt, x, &infinity)?;
    let p = calc.machine.select(DType::F64, &finite, &p, x)?;
    let zero = calc.c(0.0)?;
    let is_zero = calc.op(BinaryFn::Eq, x, &zero)?;
    let lowest = calc.c(f64::NEG_INFINITY)?;
    calc.machine.select(DType::F64, &is_zero, &lowest, &p)
}

/// Natural logarithm; NaN below 0.
pub fn log<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let y = log64(calc, x)?;
    let nan = calc.c(f64::NAN)?;
    calc.less(x, 0.0, &nan, &y)
}

/// tanh x: sinh x / sqrt(1 + sinh^2 x) with the Taylor series of sinh below 0.5, else from e^2x.
pub fn tanh<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let square = calc.op(BinaryFn::Mul, x, x)?;
    let mut coefficients = vec![1.0f64];
    for k in 1..=9 {
        let last = coefficients[k - 1];
        coefficients.push(last / ((2 * k) * (2 * k + 1)) as f64);
    }
    coefficients.reverse();
    let p = calc.poly(&square, &coefficients)?;
    let sinh = calc.op(BinaryFn::Mul, &p, x)?;
    let one = calc.c(1.0)?;
    let cosh = calc.fma(&sinh, &sinh, &one)?;
    let cosh = calc.un(UnaryFn::Sqrt, &cosh)?;
    let small = calc.op(BinaryFn::Div, &sinh, &cosh)?;
    let magnitude = calc.un(UnaryFn::Abs, x)?;
    let twice = calc.op(BinaryFn::Add, &magnitude, &magnitude)?;
    let twice = calc.clamp(&twice, 0.0, 80.0)?;
    let e = exp64(calc, &twice)?;
    let e = calc.opc(BinaryFn::Add, &e, 1.0)?;
    let two = calc.c(-2.0)?;
    let q = calc.op(BinaryFn::Div, &two, &e)?;
    let large = calc.opc(BinaryFn::Add, &q, 1.0)?;
    let large = signed(calc, &large, x)?;
    calc.less(&magnitude, 0.5, &small, &large)
}

/// The magnitude with the sign of x.
fn signed<M: Machine>(calc: &mut Calc<M>, magnitude: &V<M>, x: &V<M>) -> Emitted<V<M>> {
    let negated = calc.un(UnaryFn::Neg, magnitude)?;
    calc.less(x, 0.0, &negated, magnitude)
}

/// erf x: below 3 the series 2 x / sqrt(pi) e^-x^2 sum of (2 x^2)^n / (1 3 5 .. 2n+1), whose terms
/// are all positive; above, 1 minus the continued fraction of erfc (Abramowitz and Stegun 7.1.6,
/// 7.1.14).
pub fn erf<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let magnitude = calc.un(UnaryFn::Abs, x)?;
    let t = calc.clamp(&magnitude, 0.0, 6.0)?;
    let square = calc.op(BinaryFn::Mul, &t, &t)?;
    let negative = calc.un(UnaryFn::Neg, &square)?;
    let e = exp64(calc, &negative)?;
    // The series, from its small end: 1 + z/3 (1 + z/5 (1 + z/7 ..)) with z = 2 x^2.
    let one = calc.c(1.0)?;
    let mut sum = one.clone();
    for n in (1..=70).rev() {
        let z = calc.opc(BinaryFn::Mul, &square, 2.0 / f64::from(2 * n + 1))?;
        sum = calc.fma(&z, &sum, &one)?;
    }
    let scaled = calc.opc(BinaryFn::Mul, x, std::f64::consts::FRAC_2_SQRT_PI)?;
    let scaled = calc.op(BinaryFn::Mul, &scaled, &e)?;
    let small = calc.op(BinaryFn::Mul, &scaled, &sum)?;
    // x + (1/2) / (x + 1 / (x + (3/2) / (x + 2 / ..)))
    let far = calc.clamp(&t, 1.0, 6.0)?;
    let mut fraction = far.clone();
    for n in (1..=40).rev() {
        let half = calc.c(f64::from(n) / 2.0)?;
        let step = calc.op(BinaryFn::Div, &half, &fraction)?;
        fraction = calc.op(BinaryFn::Add, &far, &step)?;
    }
    let e = calc.opc(BinaryFn::Mul, &e, std::f64::consts::FRAC_2_SQRT_PI / 2.0)?;
    let rest = calc.op(BinaryFn::Div, &e, &fraction)?;
    let large = calc.op(BinaryFn::Sub, &one, &rest)?;
    let large = signed(calc, &large, x)?;
    let y = calc.less(&magnitude, 3.0, &small, &large)?;
    // NaN is not less than 3.
    let number = calc.op(BinaryFn::Eq, x, x)?;
    calc.machine.select(DType::F64, &number, &y, x)
}

/// sin(x + quarter * pi / 2), absolute error below 1e-15 for |x| <= 1e5: reduction by pi / 2 in
/// three parts (as in fdlibm) and Taylor series on |r| <= pi / 4.
pub fn sin<M: Machine>(calc: &mut Calc<M>, x: &V<M>, quarter: f64) -> Emitted<V<M>> {
    let n = calc.opc(BinaryFn::Mul, x, std::f64::consts::FRAC_2_PI)?;
    let n = calc.un(UnaryFn::Round, &n)?;
    let mut r = x.clone();
    for bits in [0x3ff9_21fb_5440_0000u64, 0x3dd0_b461_1a60_0000, 0x3ba3_198a_2e03_7073] {
        let part = calc.c(-f64::from_bits(bits))?;
        r = calc.fma(&n, &part, &r)?;
    }
    let r = within_one(calc, &r)?;
    let square = calc.op(BinaryFn::Mul, &r, &r)?;
    // Coefficients of x - x^3/3! + .. and 1 - x^2/2! + ..
    let series = |start: u32| -> Vec<f64> {
        let factorial = |n: u32| (1..=n).map(f64::from).product::<f64>();
        let sign = |k: u32| if k.is_multiple_of(2) { 1.0 } else { -1.0 };
        (0..10).rev().map(|k| sign(k) / factorial(2 * k + start)).collect()
    };
    let sine = calc.poly(&square, &series(1))?;
    let sine = calc.op(BinaryFn::Mul, &sine, &r)?;
    let cosine = calc.poly(&square, &series(0))?;
    // The quadrant: (n + quarter) mod 4 in 0..4.
    let turn = calc.opc(BinaryFn::Add, &n, quarter)?;
    let scaled = calc.opc(BinaryFn::Mul, &turn, 0.25)?;
    let whole = calc.un(UnaryFn::Floor, &scaled)?;
    let four = calc.c(-4.0)?;
    let quadrant = calc.fma(&whole, &four, &turn)?;
    let halved = calc.opc(BinaryFn::Mul, &quadrant, 0.5)?;
    let pair = calc.un(UnaryFn::Floor, &halved)?;
    let two = calc.c(-2.0)?;
    let odd = calc.fma(&pair, &two, &quadrant)?;
    let value = calc.less(&odd, 0.5, &sine, &cosine)?;
    let negated = calc.un(UnaryFn::Neg, &value)?;
    calc.less(&quadrant, 1.5, &value, &negated)
}
