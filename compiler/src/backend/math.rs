//! Functions that no instruction computes, as polynomials over any [`Machine`]. Bounds are tested
//! against f64 (`tests` below and in the suite).

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::emit::{Bits, Emitted, Machine, Unsupported};
use super::math64::{self, exp64, log64};
use crate::graph::op::{BinaryFn, UnaryFn};
use crate::loops::ir::{Expr, Number};

/// Arithmetic on values of one dtype and width.
pub(super) struct Calc<'a, M: Machine> {
    pub machine: &'a mut M,
    pub dtype: DType,
    pub wide: bool,
}

pub(super) type V<M> = <M as Machine>::Value;

impl<M: Machine> Calc<'_, M> {
    pub fn c(&mut self, value: f64) -> Emitted<V<M>> {
        self.machine.number(self.dtype, Number::Float(value), self.wide)
    }

    fn bits(&mut self, bits: u32) -> Emitted<V<M>> {
        self.c(f32::from_bits(bits) as f64)
    }

    pub fn op(&mut self, f: BinaryFn, x: &V<M>, y: &V<M>) -> Emitted<V<M>> {
        self.machine.binary(f, self.dtype, x, y)
    }

    pub fn opc(&mut self, f: BinaryFn, x: &V<M>, y: f64) -> Emitted<V<M>> {
        let y = self.c(y)?;
        self.op(f, x, &y)
    }

    pub fn fma(&mut self, x: &V<M>, y: &V<M>, z: &V<M>) -> Emitted<V<M>> {
        self.machine.fma(self.dtype, x, y, z)
    }

    pub fn un(&mut self, f: UnaryFn, x: &V<M>) -> Emitted<V<M>> {
        self.machine.unary(f, self.dtype, x)
    }

    /// x < y ? a : b
    pub fn less(&mut self, x: &V<M>, y: f64, a: &V<M>, b: &V<M>) -> Emitted<V<M>> {
        let c = self.opc(BinaryFn::Lt, x, y)?;
        self.machine.select(self.dtype, &c, a, b)
    }

    /// Horner's scheme, highest coefficient first.
    pub fn poly(&mut self, x: &V<M>, coefficients: &[f64]) -> Emitted<V<M>> {
        let mut sum = self.c(coefficients[0])?;
        for &c in &coefficients[1..] {
            let c = self.c(c)?;
            sum = self.fma(&sum, x, &c)?;
        }
        Ok(sum)
    }

    /// x kept within bounds; NaN stays.
    pub fn clamp(&mut self, x: &V<M>, low: f64, high: f64) -> Emitted<V<M>> {
        let bound = self.c(low)?;
        let x = self.less(x, low, &bound, x)?;
        let bound = self.c(high)?;
        let above = self.op(BinaryFn::Lt, &bound, &x)?;
        self.machine.select(self.dtype, &above, &bound, &x)
    }
}

/// f(x), by the machine or by a polynomial.
pub fn unary<M: Machine>(
    machine: &mut M,
    f: UnaryFn,
    dtype: DType,
    x: &V<M>,
    wide: bool,
) -> Emitted<V<M>> {
    let known = matches!(
        f,
        UnaryFn::Exp | UnaryFn::Log | UnaryFn::Sin | UnaryFn::Cos | UnaryFn::Tanh | UnaryFn::Erf
    );
    let mut calc = Calc { machine, dtype, wide };
    match (f, dtype) {
        (UnaryFn::Exp, DType::F32) => exp(&mut calc, x),
        (UnaryFn::Log, DType::F32) => log(&mut calc, x),
        (UnaryFn::Tanh, DType::F32) => tanh(&mut calc, x),
        (UnaryFn::Erf, DType::F32) => erf(&mut calc, x),
        (UnaryFn::Sin, DType::F32) => sin(&mut calc, x, 0.0),
        (UnaryFn::Cos, DType::F32) => sin(&mut calc, x, 1.0),
        (UnaryFn::Exp, DType::F64) => exp64(&mut calc, x),
        (UnaryFn::Log, DType::F64) => math64::log(&mut calc, x),
        (UnaryFn::Tanh, DType::F64) => math64::tanh(&mut calc, x),
        (UnaryFn::Erf, DType::F64) => math64::erf(&mut calc, x),
        (UnaryFn::Sin, DType::F64) => math64::sin(&mut calc, x, 0.0),
        (UnaryFn::Cos, DType::F64) => math64::sin(&mut calc, x, 1.0),
        _ if known => Err(Unsupported(format!("{} of {dtype}", f.name()))),
        _ => calc.un(f, x),
    }
}

/// Adding 1.5 * 2^23 rounds a small f32 to an integer, and leaves that in its low bits.
const ROUNDS: f64 = 12_582_912.0;
/// What the exponent of 2^0 is stored as.
const BIAS: f64 = 127.0;

/// e^x = p * 2^n: p by a polynomial of degree 6 on |r| <= ln 2 / 2, an f32 that holds n + bias in
/// its low bits, and n.
fn exp_parts<M: Machine>(calc: &mut Calc<M>, x: &V<M>, bias: f64) -> Emitted<[V<M>; 3]> {
    let (log2, rounds) = (calc.c(std::f64::consts::LOG2_E)?, calc.c(ROUNDS + bias)?);
    let held = calc.fma(x, &log2, &rounds)?;
    let n = calc.op(BinaryFn::Sub, &held, &rounds)?;
    let (high, low) = (calc.c(-0.693145751953125)?, calc.c(-1.428606765330187e-6)?);
    let r = calc.fma(&n, &high, x)?;
    let r = calc.fma(&n, &low, &r)?;
    let p = calc.poly(
        &r,
        &[1.3814396225e-3, 8.3687780425e-3, 4.1668396443e-2, 1.6666519642e-1, 4.9999994040e-1],
    )?;
    let square = calc.op(BinaryFn::Mul, &r, &r)?;
    let p = calc.fma(&p, &square, &r)?;
    let p = calc.opc(BinaryFn::Add, &p, 1.0)?;
    Ok([p, held, n])
}

/// e^x within 1 ulp.
fn exp<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let x = calc.opc(BinaryFn::Max, x, -104.0)?;
    let x = calc.opc(BinaryFn::Min, &x, 89.0)?;
    let [p, held, n] = exp_parts(calc, &x, 2.0 * BIAS)?;
    if let Some(scaled) = calc.machine.scaled(&p, &n)? {
        return Ok(scaled);
    }
    // In two steps: 2^n itself may lie outside of the normal numbers.
    let half = calc.machine.shift(&held, -1)?;
    let rest = calc.machine.bits(Bits::Sub, &held, &half)?;
    let (a, b) = (calc.machine.shift(&half, 23)?, calc.machine.shift(&rest, 23)?);
    let p = calc.op(BinaryFn::Mul, &p, &a)?;
    calc.op(BinaryFn::Mul, &p, &b)
}

/// e^x within 1 ulp, for x in -87..=88.
fn exp_inside<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let [p, held, n] = exp_parts(calc, x, BIAS)?;
    if let Some(scaled) = calc.machine.scaled(&p, &n)? {
        return Ok(scaled);
    }
    let power = calc.machine.shift(&held, 23)?;
    calc.op(BinaryFn::Mul, &p, &power)
}

/// e^x within 1 ulp, but 0 where that is less than 2^-125: what is added to it does not show that.
fn exp_beside<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    // 2^(n-1) is 0 for the least n; for the largest one the product is infinite.
    let x = calc.opc(BinaryFn::Max, x, -87.2)?;
    let x = calc.opc(BinaryFn::Min, &x, 88.9)?;
    let [p, held, n] = exp_parts(calc, &x, BIAS - 1.0)?;
    if let Some(scaled) = calc.machine.scaled(&p, &n)? {
        return Ok(scaled);
    }
    let p = calc.op(BinaryFn::Add, &p, &p)?;
    let power = calc.machine.shift(&held, 23)?;
    calc.op(BinaryFn::Mul, &p, &power)
}

/// The function and its argument where a sum is 1 and that function.
pub fn beside_one<'a>(x: &'a Expr, y: &'a Expr) -> Option<(UnaryFn, &'a Arc<Expr>)> {
    let one = |e: &Expr| matches!(e, Expr::Const(_, Number::Float(v)) if *v == 1.0);
    let ((Expr::Unary(f, of), other) | (other, Expr::Unary(f, of))) = (x, y) else { return None };
    let known = matches!(f, UnaryFn::Exp | UnaryFn::Tanh);
    (known && one(other)).then_some((*f, of))
}

/// 1 + e^x, or 1 + tanh x = 2 / (1 + e^-2x) within 2e-7.
pub fn one_and<M: Machine>(machine: &mut M, f: UnaryFn, x: &V<M>, wide: bool) -> Emitted<V<M>> {
    let mut calc = Calc { machine, dtype: DType::F32, wide };
    let minus = match f {
        UnaryFn::Exp => {
            let e = exp_beside(&mut calc, x)?;
            return calc.opc(BinaryFn::Add, &e, 1.0);
        }
        _ => calc.opc(BinaryFn::Mul, x, -2.0)?,
    };
    let e = exp_beside(&mut calc, &minus)?;
    let e = calc.opc(BinaryFn::Add, &e, 1.0)?;
    let two = calc.c(2.0)?;
    calc.op(BinaryFn::Div, &two, &e)
}

/// Natural logarithm: exponent and a polynomial on the mantissa in sqrt(1/2)..sqrt(2), after
/// Moshier's Cephes `logf`.
fn log<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    // Subnormal numbers are scaled into the normal ones.
    let scaled = calc.opc(BinaryFn::Mul, x, 8_388_608.0)?;
    let tiny = f32::MIN_POSITIVE as f64;
    let y = calc.less(x, tiny, &scaled, x)?;
    let (bias, less) = (calc.c(-127.0)?, calc.c(-150.0)?);
    let bias = calc.less(x, tiny, &less, &bias)?;
    // Shifting sqrt(1/2) to 1 makes the split fall where the mantissa should wrap.
    let offset = calc.bits(0x3f80_0000 - 0x3f35_04f3)?;
    let moved = calc.machine.bits(Bits::Add, &y, &offset)?;
    let exponent = calc.machine.shift(&moved, -23)?;
    let exponent = calc.machine.int_to_float(&exponent)?;
    let exponent = calc.op(BinaryFn::Add, &exponent, &bias)?;
    let mask = calc.bits(0x007f_ffff)?;
    let mantissa = calc.machine.bits(Bits::And, &moved, &mask)?;
    let base = calc.bits(0x3f35_04f3)?;
    let mantissa = calc.machine.bits(Bits::Add, &mantissa, &base)?;
    let m = calc.opc(BinaryFn::Sub, &mantissa, 1.0)?;
    let p = calc.poly(
        &m,
        &[
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ],
    )?;
    let square = calc.op(BinaryFn::Mul, &m, &m)?;
    let cube = calc.op(BinaryFn::Mul, &square, &m)?;
    let p = calc.op(BinaryFn::Mul, &p, &cube)?;
    let low = calc.c(-2.12194440e-4)?;
    let p = calc.fma(&exponent, &low, &p)?;
    let half = calc.c(-0.5)?;
    let p = calc.fma(&square, &half, &p)?;
    let p = calc.op(BinaryFn::Add, &p, &m)?;
    let high = calc.c(0.693359375)?;
    let p = calc.fma(&exponent, &high, &p)?;
    // Outside of the positive finite numbers.
    let infinity = calc.c(f64::INFINITY)?;
    let finite = calc.op(BinaryFn::Lt, x, &infinity)?;
    let p = calc.machine.select(calc.dtype, &finite, &p, x)?;
    let zero = calc.c(0.0)?;
    let positive = calc.op(BinaryFn::Lt, &zero, x)?;
    let nan = calc.c(f64::NAN)?;
    let lowest = calc.c(f64::NEG_INFINITY)?;
    let is_zero = calc.op(BinaryFn::Eq, x, &zero)?;
    let other = calc.machine.select(calc.dtype, &is_zero, &lowest, &nan)?;
    calc.machine.select(calc.dtype, &positive, &p, &other)
}

/// tanh x within 2 ulp: a polynomial below 0.625 (Cephes `tanhf`), else from e^2x.
fn tanh<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let square = calc.op(BinaryFn::Mul, x, x)?;
    let p = calc.poly(
        &square,
        &[
            -5.70498872745e-3,
            2.06390887954e-2,
            -5.37397155531e-2,
            1.33314422036e-1,
            -3.33332819422e-1,
        ],
    )?;
    let p = calc.op(BinaryFn::Mul, &p, &square)?;
    let small = calc.fma(&p, x, x)?;
    let magnitude = calc.un(UnaryFn::Abs, x)?;
    let bounded = calc.opc(BinaryFn::Min, &magnitude, 20.0)?;
    let twice = calc.op(BinaryFn::Add, &bounded, &bounded)?;
    let e = exp_inside(calc, &twice)?;
    let e = calc.opc(BinaryFn::Add, &e, 1.0)?;
    let two = calc.c(-2.0)?;
    let q = calc.op(BinaryFn::Div, &two, &e)?;
    let large = calc.opc(BinaryFn::Add, &q, 1.0)?;
    let large = copy_sign(calc, &large, x)?;
    calc.less(&magnitude, 0.625, &small, &large)
}

fn copy_sign<M: Machine>(calc: &mut Calc<M>, x: &V<M>, sign: &V<M>) -> Emitted<V<M>> {
    let mask = calc.bits(0x8000_0000)?;
    let sign = calc.machine.bits(Bits::And, sign, &mask)?;
    calc.machine.bits(Bits::Or, x, &sign)
}

/// erf x within 2 ulp, on two ranges after Juffa's `erff`: a polynomial in x^2, and 1 - 2^y where y
/// is one in x. His exponent is that of e; here its coefficients are times log2 e. 2^y is 2^n times
/// a minimax polynomial of 2^r, relative error 7.5e-8, of which 1 - 2^y keeps a quarter.
fn erf<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let magnitude = calc.un(UnaryFn::Abs, x)?;
    let square = calc.op(BinaryFn::Mul, x, x)?;
    let p = calc.poly(
        &square,
        &[
            -5.99104969e-4,
            4.99339588e-3,
            -2.67667342e-2,
            1.12818025e-1,
            -3.76124859e-1,
            1.28379151e-1,
        ],
    )?;
    let small = calc.fma(&p, x, x)?;
    let t = calc.opc(BinaryFn::Min, &magnitude, 3.925)?;
    let y = calc.poly(
        &t,
        &[
            -2.495125636e-5,
            5.528532623e-4,
            -5.603332826e-3,
            3.499193415e-2,
            -1.540478703e-1,
            -9.158901671e-1,
            -1.628395157,
        ],
    )?;
    let y = calc.op(BinaryFn::Mul, &y, &t)?;
    let rounds = calc.c(ROUNDS + BIAS)?;
    let held = calc.op(BinaryFn::Add, &y, &rounds)?;
    let n = calc.op(BinaryFn::Sub, &held, &rounds)?;
    let r = calc.op(BinaryFn::Sub, &y, &n)?;
    // -2^r
    let p = calc.poly(
        &r,
        &[
            -1.327647074e-3,
            -9.675541907e-3,
            -5.550713282e-2,
            -2.402211971e-1,
            -6.931469671e-1,
            -1.000000072,
        ],
    )?;
    let (power, one) = (calc.machine.shift(&held, 23)?, calc.c(1.0)?);
    let large = calc.fma(&p, &power, &one)?;
    let large = copy_sign(calc, &large, x)?;
    calc.less(&magnitude, 0.921875, &small, &large)
}

/// sin(x + quarter * pi / 2), absolute error below 2e-7 for |x| <= 30000: reduction by pi / 2 in
/// three parts and the Cephes polynomials on |r| <= pi / 4. From 2^22 on, where neighbours are
/// half a radian apart, only the range of the result is right.
fn sin<M: Machine>(calc: &mut Calc<M>, x: &V<M>, quarter: f64) -> Emitted<V<M>> {
    let n = calc.opc(BinaryFn::Mul, x, std::f64::consts::FRAC_2_PI)?;
    let n = calc.un(UnaryFn::Round, &n)?;
    let mut r = x.clone();
    for part in [-1.5703125, -4.837512969970703e-4, -7.549789948768648e-8] {
        let part = calc.c(part)?;
        r = calc.fma(&n, &part, &r)?;
    }
    let r = within_one(calc, &r)?;
    let turn = calc.opc(BinaryFn::Add, &n, quarter)?;
    let square = calc.op(BinaryFn::Mul, &r, &r)?;
    let p = calc.poly(&square, &[-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1])?;
    let p = calc.op(BinaryFn::Mul, &p, &square)?;
    let sine = calc.fma(&p, &r, &r)?;
    let p = calc.poly(
        &square,
        &[2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2, -0.5],
    )?;
    let one = calc.c(1.0)?;
    let cosine = calc.fma(&p, &square, &one)?;
    // The quadrant: turn mod 4 in 0..4.
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

/// A number between -1 and 1 as it is, others as these; NaN stays.
pub(super) fn within_one<M: Machine>(calc: &mut Calc<M>, x: &V<M>) -> Emitted<V<M>> {
    let low = calc.opc(BinaryFn::Max, x, -1.0)?;
    calc.opc(BinaryFn::Min, &low, 1.0)
}

/// x^y. Small constant exponents are products; other floats go through e^(y ln x) in f64.
pub fn pow<M: Machine>(
    machine: &mut M,
    dtype: DType,
    x: &V<M>,
    y: &V<M>,
    exponent: Option<Number>,
) -> Emitted<V<M>> {
    let exponent = match exponent {
        Some(Number::Int(n)) => Some(n as f64),
        Some(Number::Float(v)) => Some(v),
        None => None,
    };
    match exponent {
        Some(0.5) if dtype.is_float() => return root(machine, dtype, x),
        Some(v) if v.fract() == 0.0 && (1.0..=16.0).contains(&v) => {
            let mut product = x.clone();
            for _ in 1..v as usize {
                product = machine.binary(BinaryFn::Mul, dtype, &product, x)?;
            }
            return Ok(product);
        }
        _ => {}
    }
    match dtype {
        DType::F64 => pow64(machine, x, y),
        DType::F32 => {
            let x = machine.cast(DType::F32, DType::F64, x)?;
            let y = machine.cast(DType::F32, DType::F64, y)?;
            let power = pow64(machine, &x, &y)?;
            machine.cast(DType::F64, DType::F32, &power)
        }
        DType::F16 | DType::BF16 | DType::TF32 | DType::Bool => {
            Err(Unsupported(format!("pow of {dtype}")))
        }
        _ => int_pow(machine, dtype, x, y),
    }
}

/// x^y of integers, which wraps: squares of x, one for each bit of y. A negative power is 0, but
/// for those of 1 and -1.
fn int_pow<M: Machine>(machine: &mut M, dtype: DType, x: &V<M>, y: &V<M>) -> Emitted<V<M>> {
    let number = |machine: &mut M, n: i128| machine.number(dtype, Number::Int(n), false);
    let zero = number(machine, 0)?;
    let one = number(machine, 1)?;
    let bits = dtype.bytes() * 8 - usize::from(dtype.is_signed());
    let mut power = one.clone();
    let mut square = x.clone();
    for k in 0..bits {
        let bit = number(machine, 1 << k)?;
        let bit = machine.binary(BinaryFn::And, dtype, y, &bit)?;
        let unset = machine.binary(BinaryFn::Eq, dtype, &bit, &zero)?;
        let more = machine.binary(BinaryFn::Mul, dtype, &power, &square)?;
        power = machine.select(dtype, &unset, &power, &more)?;
        square = machine.binary(BinaryFn::Mul, dtype, &square, &square)?;
    }
    if !dtype.is_signed() {
        return Ok(power);
    }
    // Of -1 a negative power is that of the magnitude, whose parity is the same. Products tell
    // nothing: other numbers have a square that wraps to 1.
    let minus = number(machine, -1)?;
    let is_one = machine.binary(BinaryFn::Eq, dtype, x, &one)?;
    let is_minus = machine.binary(BinaryFn::Eq, dtype, x, &minus)?;
    let lowest = machine.binary(BinaryFn::And, dtype, y, &one)?;
    let even = machine.binary(BinaryFn::Eq, dtype, &lowest, &zero)?;
    let of_minus = machine.select(dtype, &even, &one, x)?;
    let negative = machine.select(dtype, &is_minus, &of_minus, &zero)?;
    let negative = machine.select(dtype, &is_one, &one, &negative)?;
    let below = machine.binary(BinaryFn::Lt, dtype, y, &zero)?;
    machine.select(dtype, &below, &negative, &power)
}

/// x^0.5: the square root, but 0 for -0 and infinity for the least number.
fn root<M: Machine>(machine: &mut M, dtype: DType, x: &V<M>) -> Emitted<V<M>> {
    let mut calc = Calc { machine, dtype, wide: false };
    let root = calc.un(UnaryFn::Sqrt, x)?;
    let root = calc.un(UnaryFn::Abs, &root)?;
    let magnitude = calc.un(UnaryFn::Abs, x)?;
    let infinity = calc.c(f64::INFINITY)?;
    let is_infinite = calc.op(BinaryFn::Eq, &magnitude, &infinity)?;
    calc.machine.select(dtype, &is_infinite, &infinity, &root)
}

fn pow64<M: Machine>(machine: &mut M, x: &V<M>, y: &V<M>) -> Emitted<V<M>> {
    let mut calc = Calc { machine, dtype: DType::F64, wide: false };
    let magnitude = calc.un(UnaryFn::Abs, x)?;
    let log = log64(&mut calc, &magnitude)?;
    let product = calc.op(BinaryFn::Mul, y, &log)?;
    // 1 and -1 stay of magnitude 1 under infinite exponents.
    let zero = calc.c(0.0)?;
    let one = calc.c(1.0)?;
    let is_unit = calc.op(BinaryFn::Eq, &magnitude, &one)?;
    let product = calc.machine.select(DType::F64, &is_unit, &zero, &product)?;
    let power = exp64(&mut calc, &product)?;
    // A negative base, be it -0: odd exponents flip the sign; fractions have no value but for
    // -0 and the least infinity.
    let half = calc.opc(BinaryFn::Mul, y, 0.5)?;
    let half_whole = calc.un(UnaryFn::Floor, &half)?;
    let even = calc.op(BinaryFn::Eq, &half, &half_whole)?;
    let negated = calc.un(UnaryFn::Neg, &power)?;
    let signed = calc.machine.select(DType::F64, &even, &power, &negated)?;
    let whole = calc.un(UnaryFn::Floor, y)?;
    let integral = calc.op(BinaryFn::Eq, y, &whole)?;
    let (nan, infinity) = (calc.c(f64::NAN)?, calc.c(f64::INFINITY)?);
    let inverse = calc.un(UnaryFn::Recip, x)?;
    let is_infinite = calc.op(BinaryFn::Eq, &magnitude, &infinity)?;
    let fraction = calc.machine.select(DType::F64, &is_infinite, &power, &nan)?;
    let is_zero = calc.op(BinaryFn::Eq, x, &zero)?;
    let fraction = calc.machine.select(DType::F64, &is_zero, &power, &fraction)?;
    let signed = calc.machine.select(DType::F64, &integral, &signed, &fraction)?;
    let positive = calc.less(&inverse, 0.0, &signed, &power)?;
    let power = calc.less(x, 0.0, &signed, &positive)?;
    // x^0 and 1^y are 1, even for NaN.
    let is_zero = calc.op(BinaryFn::Eq, y, &zero)?;
    let power = calc.machine.select(DType::F64, &is_zero, &one, &power)?;
    let is_one = calc.op(BinaryFn::Eq, x, &one)?;
    calc.machine.select(DType::F64, &is_one, &one, &power)
}
