//! Operators that compute each element from elements at the same place.

use kiln_runtime::tensor::{DType, Small};

use super::call::{Call, Outputs, not_supported, one};
use super::small::{Manner, converted};
use super::tensor::dtype_of;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Composite, UnaryFn};

/// Operands of a binary operator. Before opset 7, the second one is aligned by `axis`.
fn operands(call: &mut Call) -> Result<(NodeId, NodeId), Diagnostic> {
    let (x, mut y) = (call.input(0)?, call.input(1)?);
    if call.opset < 7 {
        call.ignore("broadcast");
        call.ignore("consumed_inputs");
        if let Some(axis) = call.int("axis") {
            let rank = call.ty(x).rank();
            let axis = call.axis(axis, rank)?;
            let mut shape = call.shape(y);
            while shape.len() + axis < rank {
                shape.push(1);
            }
            y = call.graph.reshape(y, &shape, &call.origin)?;
        }
    }
    Ok((x, y))
}

fn binary_of(call: &mut Call, f: BinaryFn) -> Outputs {
    let (x, y) = operands(call)?;
    one(call.graph.binary(f, x, y, &call.origin)?)
}

macro_rules! binaries {
    ($($name:ident => $f:ident),*) => {
        $(pub(super) fn $name(call: &mut Call) -> Outputs { binary_of(call, BinaryFn::$f) })*
    };
}
binaries!(add => Add, sub => Sub, mul => Mul, div => Div, and => And, or => Or, xor => Xor,
    equal => Eq, less => Lt, less_equal => Le);

macro_rules! unaries {
    ($($name:ident => $f:ident),*) => {
        $(pub(super) fn $name(call: &mut Call) -> Outputs {
            call.ignore("consumed_inputs");
            let x = call.input(0)?;
            one(call.graph.unary(UnaryFn::$f, x, &call.origin)?)
        })*
    };
}
unaries!(neg => Neg, abs => Abs, sign => Sign, reciprocal => Recip, sqrt => Sqrt, exp => Exp,
    log => Log, sin => Sin, cos => Cos, tanh => Tanh, erf => Erf, floor => Floor, ceil => Ceil,
    round => Round, not => Not);

pub(super) fn greater(call: &mut Call) -> Outputs {
    let (x, y) = operands(call)?;
    one(call.graph.binary(BinaryFn::Lt, y, x, &call.origin)?)
}

pub(super) fn greater_equal(call: &mut Call) -> Outputs {
    let (x, y) = operands(call)?;
    one(call.graph.binary(BinaryFn::Le, y, x, &call.origin)?)
}

pub(super) fn pow(call: &mut Call) -> Outputs {
    let (x, y) = operands(call)?;
    let dtype = call.ty(x).dtype;
    let y_dtype = call.ty(y).dtype;
    // A fractional exponent of an integer would be lost in the integer's dtype.
    if !dtype.is_float() && y_dtype.is_float() {
        let wide = call.graph.cast(x, y_dtype, &call.origin)?;
        let power = call.graph.binary(BinaryFn::Pow, wide, y, &call.origin)?;
        return one(call.graph.cast(power, dtype, &call.origin)?);
    }
    let y = call.graph.cast(y, dtype, &call.origin)?;
    one(call.graph.binary(BinaryFn::Pow, x, y, &call.origin)?)
}

/// Remainder with the sign of the dividend where `fmod`, else of the divisor.
pub(super) fn modulo(call: &mut Call) -> Outputs {
    let fmod = call.int_or("fmod", 0) != 0;
    let (x, y) = (call.input(0)?, call.input(1)?);
    let (g, o) = (&mut *call.graph, &call.origin);
    let rest = g.binary(BinaryFn::Rem, x, y, o)?;
    if fmod {
        return one(rest);
    }
    let ty = g.ty(rest).clone();
    let zero = g.scalar(ty.dtype, ty.rank(), 0.0, o);
    let sum = g.binary(BinaryFn::Add, rest, y, o)?;
    let rest_negative = g.binary(BinaryFn::Lt, rest, zero, o)?;
    let y_negative = g.binary(BinaryFn::Lt, y, zero, o)?;
    let other_sign = g.binary(BinaryFn::Xor, rest_negative, y_negative, o)?;
    let nonzero = g.binary(BinaryFn::Ne, rest, zero, o)?;
    let moved = g.binary(BinaryFn::And, other_sign, nonzero, o)?;
    one(g.select(moved, sum, rest, o)?)
}

/// A polynomial in x, the highest coefficient first.
pub(super) fn polynomial(call: &mut Call, x: NodeId, coefficients: &[f64]) -> Added {
    let ty = call.ty(x);
    let first = call.number(ty.dtype, ty.rank(), coefficients[0]);
    coefficients[1..].iter().try_fold(first, |sum, &c| {
        let product = call.graph.binary(BinaryFn::Mul, sum, x, &call.origin)?;
        call.graph.binary_number(BinaryFn::Add, product, c, &call.origin)
    })
}

fn fold_of(call: &mut Call, f: BinaryFn) -> Result<NodeId, Diagnostic> {
    call.ignore("consumed_inputs");
    let mut result = call.input(0)?;
    for i in 1..call.n_inputs() {
        let next = call.input(i)?;
        result = call.graph.binary(f, result, next, &call.origin)?;
    }
    Ok(result)
}

pub(super) fn max(call: &mut Call) -> Outputs {
    one(fold_of(call, BinaryFn::Max)?)
}

pub(super) fn min(call: &mut Call) -> Outputs {
    one(fold_of(call, BinaryFn::Min)?)
}

pub(super) fn sum(call: &mut Call) -> Outputs {
    one(fold_of(call, BinaryFn::Add)?)
}

pub(super) fn mean(call: &mut Call) -> Outputs {
    let total = fold_of(call, BinaryFn::Add)?;
    let count = call.n_inputs() as f64;
    one(call.graph.binary_number(BinaryFn::Div, total, count, &call.origin)?)
}

pub(super) fn relu(call: &mut Call) -> Outputs {
    call.ignore("consumed_inputs");
    let x = call.input(0)?;
    one(call.graph.binary_number(BinaryFn::Max, x, 0.0, &call.origin)?)
}

/// x below 0 replaced by a function of it: `x < 0 ? f(x) : x`.
fn below_zero(call: &mut Call, f: impl Fn(&mut Call, NodeId) -> Added) -> Outputs {
    call.ignore("consumed_inputs");
    let x = call.input(0)?;
    let low = f(call, x)?;
    let negative = call.graph.binary_number(BinaryFn::Lt, x, 0.0, &call.origin)?;
    one(call.graph.select(negative, low, x, &call.origin)?)
}

pub(super) fn leaky_relu(call: &mut Call) -> Outputs {
    let alpha = f64::from(call.float_or("alpha", 0.01));
    below_zero(call, |c, x| c.graph.binary_number(BinaryFn::Mul, x, alpha, &c.origin))
}

pub(super) fn prelu(call: &mut Call) -> Outputs {
    let slope = call.input(1)?;
    below_zero(call, |c, x| {
        let mut slope = slope;
        // Old models give one slope per channel, aligned with axis 1.
        let (xs, ss) = (c.shape(x), c.shape(slope));
        if c.opset < 7 && ss.len() == 1 && xs.len() > 2 {
            let mut shape = ss.clone();
            shape.extend(std::iter::repeat_n(1, xs.len() - 2));
            slope = c.graph.reshape(slope, &shape, &c.origin)?;
        }
        c.graph.binary(BinaryFn::Mul, x, slope, &c.origin)
    })
}

/// scale * (e^(x / divisor) - 1)
fn exp_minus_one(call: &mut Call, x: NodeId, scale: f64, divisor: f64) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let scaled = g.binary_number(BinaryFn::Div, x, divisor, o)?;
    let exp = g.unary(UnaryFn::Exp, scaled, o)?;
    let less = g.binary_number(BinaryFn::Sub, exp, 1.0, o)?;
    g.binary_number(BinaryFn::Mul, less, scale, o)
}

pub(super) fn elu(call: &mut Call) -> Outputs {
    let alpha = f64::from(call.float_or("alpha", 1.0));
    below_zero(call, |c, x| exp_minus_one(c, x, alpha, 1.0))
}

pub(super) fn celu(call: &mut Call) -> Outputs {
    let alpha = f64::from(call.float_or("alpha", 1.0));
    below_zero(call, |c, x| exp_minus_one(c, x, alpha, alpha))
}

pub(super) fn selu(call: &mut Call) -> Outputs {
    let alpha = f64::from(call.float_or("alpha", 1.673_263_2));
    let gamma = f64::from(call.float_or("gamma", 1.050_701));
    let y = below_zero(call, |c, x| exp_minus_one(c, x, alpha, 1.0))?;
    let y = y[0].ok_or_else(|| not_supported("an absent result"))?;
    one(call.graph.binary_number(BinaryFn::Mul, y, gamma, &call.origin)?)
}

pub(super) fn thresholded_relu(call: &mut Call) -> Outputs {
    let alpha = f64::from(call.float_or("alpha", 1.0));
    let x = call.input(0)?;
    let ty = call.ty(x);
    let (zero, bound) =
        (call.number(ty.dtype, ty.rank(), 0.0), call.number(ty.dtype, ty.rank(), alpha));
    let above = call.graph.binary(BinaryFn::Lt, bound, x, &call.origin)?;
    one(call.graph.select(above, x, zero, &call.origin)?)
}

/// x kept within bounds.
pub(super) fn clamp(call: &mut Call, x: NodeId, low: f64, high: f64) -> Added {
    let x = call.graph.binary_number(BinaryFn::Max, x, low, &call.origin)?;
    call.graph.binary_number(BinaryFn::Min, x, high, &call.origin)
}

fn hard_sigmoid_of(call: &mut Call, x: NodeId, alpha: f64, beta: f64) -> Added {
    let scaled = call.graph.binary_number(BinaryFn::Mul, x, alpha, &call.origin)?;
    let moved = call.graph.binary_number(BinaryFn::Add, scaled, beta, &call.origin)?;
    clamp(call, moved, 0.0, 1.0)
}

pub(super) fn hard_sigmoid(call: &mut Call) -> Outputs {
    call.ignore("consumed_inputs");
    let (alpha, beta) = (call.float_or("alpha", 0.2), call.float_or("beta", 0.5));
    let x = call.input(0)?;
    one(hard_sigmoid_of(call, x, f64::from(alpha), f64::from(beta))?)
}

pub(super) fn hard_swish(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let gate = hard_sigmoid_of(call, x, 1.0 / 6.0, 0.5)?;
    one(call.graph.binary(BinaryFn::Mul, x, gate, &call.origin)?)
}

pub(super) fn clip(call: &mut Call) -> Outputs {
    call.ignore("consumed_inputs");
    let mut x = call.input(0)?;
    if call.opset < 11 {
        for (name, f) in [("min", BinaryFn::Max), ("max", BinaryFn::Min)] {
            if let Some(bound) = call.float(name) {
                x = call.graph.binary_number(f, x, f64::from(bound), &call.origin)?;
            }
        }
        return one(x);
    }
    for (i, f) in [(1, BinaryFn::Max), (2, BinaryFn::Min)] {
        if let Some(bound) = call.optional(i) {
            x = call.graph.binary(f, x, bound, &call.origin)?;
        }
    }
    one(x)
}

pub(super) fn sigmoid(call: &mut Call) -> Outputs {
    call.ignore("consumed_inputs");
    let x = call.input(0)?;
    one(call.graph.composite(Composite::Sigmoid, x, &call.origin)?)
}

pub(super) fn swish(call: &mut Call) -> Outputs {
    let alpha = f64::from(call.float_or("alpha", 1.0));
    let x = call.input(0)?;
    if alpha == 1.0 {
        return one(call.graph.composite(Composite::Silu, x, &call.origin)?);
    }
    let scaled = call.graph.binary_number(BinaryFn::Mul, x, alpha, &call.origin)?;
    let gate = call.graph.composite(Composite::Sigmoid, scaled, &call.origin)?;
    one(call.graph.binary(BinaryFn::Mul, x, gate, &call.origin)?)
}

pub(super) fn gelu(call: &mut Call) -> Outputs {
    let approximate = call.string_or("approximate", "none");
    let x = call.input(0)?;
    if approximate == "none" {
        return one(call.graph.composite(Composite::Gelu, x, &call.origin)?);
    }
    one(tanh_gelu(call, x)?)
}

/// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))
pub(super) fn tanh_gelu(call: &mut Call, x: NodeId) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let square = g.binary(BinaryFn::Mul, x, x, o)?;
    let cube = g.binary(BinaryFn::Mul, square, x, o)?;
    let cube = g.binary_number(BinaryFn::Mul, cube, 0.044715, o)?;
    let sum = g.binary(BinaryFn::Add, x, cube, o)?;
    let scaled = g.binary_number(BinaryFn::Mul, sum, (2.0 / std::f64::consts::PI).sqrt(), o)?;
    let tanh = g.unary(UnaryFn::Tanh, scaled, o)?;
    let gate = g.binary_number(BinaryFn::Add, tanh, 1.0, o)?;
    let half = g.binary_number(BinaryFn::Mul, x, 0.5, o)?;
    g.binary(BinaryFn::Mul, half, gate, o)
}

/// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|)
fn softplus_of(call: &mut Call, x: NodeId) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let magnitude = g.unary(UnaryFn::Abs, x, o)?;
    let minus = g.unary(UnaryFn::Neg, magnitude, o)?;
    let exp = g.unary(UnaryFn::Exp, minus, o)?;
    let sum = g.binary_number(BinaryFn::Add, exp, 1.0, o)?;
    let log = g.unary(UnaryFn::Log, sum, o)?;
    let positive = g.binary_number(BinaryFn::Max, x, 0.0, o)?;
    g.binary(BinaryFn::Add, positive, log, o)
}

pub(super) fn softplus(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    one(softplus_of(call, x)?)
}

pub(super) fn softsign(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let magnitude = call.graph.unary(UnaryFn::Abs, x, &call.origin)?;
    let sum = call.graph.binary_number(BinaryFn::Add, magnitude, 1.0, &call.origin)?;
    one(call.graph.binary(BinaryFn::Div, x, sum, &call.origin)?)
}

pub(super) fn mish(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let soft = softplus_of(call, x)?;
    let tanh = call.graph.unary(UnaryFn::Tanh, soft, &call.origin)?;
    one(call.graph.binary(BinaryFn::Mul, x, tanh, &call.origin)?)
}

pub(super) fn is_nan(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    one(call.graph.binary(BinaryFn::Ne, x, x, &call.origin)?)
}

pub(super) fn is_inf(call: &mut Call) -> Outputs {
    let positive = call.int_or("detect_positive", 1) != 0;
    let negative = call.int_or("detect_negative", 1) != 0;
    let x = call.input(0)?;
    let ty = call.ty(x);
    let mut result = call.number(DType::Bool, ty.rank(), 0.0);
    result = call.graph.expand(result, &ty.shape, &call.origin)?;
    for (wanted, bound) in [(positive, f64::INFINITY), (negative, f64::NEG_INFINITY)] {
        if wanted {
            let equal = call.graph.binary_number(BinaryFn::Eq, x, bound, &call.origin)?;
            result = call.graph.binary(BinaryFn::Or, result, equal, &call.origin)?;
        }
    }
    one(result)
}

pub(super) fn select(call: &mut Call) -> Outputs {
    let (c, x, y) = (call.input(0)?, call.input(1)?, call.input(2)?);
    one(call.graph.select(c, x, y, &call.origin)?)
}

pub(super) fn cast(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let manner = Manner::of(call, false)?;
    let to = call.int("to").ok_or_else(|| not_supported("a cast without `to`"))?;
    let dtype = dtype_of(i32::try_from(to).unwrap_or(0))?;
    one(converted(call, x, dtype, manner)?)
}

pub(super) fn cast_like(call: &mut Call) -> Outputs {
    let (x, like) = (call.input(0)?, call.input(1)?);
    let manner = Manner::of(call, false)?;
    let dtype = call.ty(like).dtype;
    one(converted(call, x, dtype, manner)?)
}

/// The bits of x as another dtype. Of a bool, any bit that is set makes it true.
pub(super) fn bit_cast(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let to = call.int("to").ok_or_else(|| not_supported("a cast without `to`"))?;
    let (from, to) = (call.ty(x).dtype, dtype_of(i32::try_from(to).unwrap_or(0))?);
    if from.bits() != to.bits() {
        let (few, many) = (from.bits(), to.bits());
        return Err(not_supported(format!("{few} bits of {from} as {many} bits of {to}")));
    }
    // Codes below zero have a byte of their own, whose upper bits say so.
    let x = match from {
        DType::Small(small) if small.is_signed() && to != from => {
            let other = if small.bits() == 4 { Small::U4 } else { Small::U2 };
            converted(call, x, DType::Small(other), Manner::WRAP)?
        }
        _ => x,
    };
    one(match to {
        DType::Small(small) if small.is_signed() && to != from => {
            let other = if small.bits() == 4 { Small::U4 } else { Small::U2 };
            let x = call.graph.bits(x, DType::Small(other), &call.origin)?;
            converted(call, x, to, Manner::WRAP)?
        }
        DType::Bool => {
            let bytes = call.graph.bits(x, DType::U8, &call.origin)?;
            call.graph.cast(bytes, DType::Bool, &call.origin)?
        }
        _ => call.graph.bits(x, to, &call.origin)?,
    })
}

/// Whether there is a value: tensors are there, and an operand that is none is not.
pub(super) fn has_element(call: &mut Call) -> Outputs {
    let there = if call.optional(0).is_some() { 1.0 } else { 0.0 };
    one(call.number(DType::Bool, 0, there))
}

pub(super) fn identity(call: &mut Call) -> Outputs {
    one(call.input(0)?)
}

/// In inference, and where nothing is dropped, dropout passes its operand on; its mask is all true.
pub(super) fn dropout(call: &mut Call) -> Outputs {
    for name in ["ratio", "is_test", "seed", "consumed_inputs"] {
        call.ignore(name);
    }
    let is_zero = |call: &Call, operand: usize| {
        Ok(call.known_input(operand)?.as_f64s().first() == Some(&0.0))
    };
    if call.optional(2).is_some() && !is_zero(call, 2)? {
        let kept = call.optional(1).is_some() && is_zero(call, 1)?;
        if !kept {
            return Err(not_supported("dropout in training mode, which is random"));
        }
    }
    let x = call.input(0)?;
    let shape = call.shape(x);
    let rank = shape.len();
    let mut outputs = vec![Some(x)];
    if call.n_outputs() > 1 {
        let yes = call.number(DType::Bool, rank, 1.0);
        outputs.push(Some(call.graph.expand(yes, &shape, &call.origin)?));
    }
    Ok(outputs)
}
