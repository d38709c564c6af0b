//! Operators that belong to no family: selections, sums by letters, and functions of the rest.

use kiln_runtime::tensor::{DType, Tensor};
use smallvec::SmallVec;

use super::call::{Call, Outputs, not_supported, one};
use super::pointwise::polynomial;
use super::shape::pad_constant;
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{Affine, BinaryFn, Contract, Op, ReduceFn, Shape, UnaryFn};

/// Pairs of elements that a selection compares at most.
const MOST_PAIRS: usize = 1 << 26;

pub(super) fn tan(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let (sin, cos) = (g.unary(UnaryFn::Sin, x, o)?, g.unary(UnaryFn::Cos, x, o)?);
    one(g.binary(BinaryFn::Div, sin, cos, o)?)
}

/// arctan x of what is not negative, on three ranges by a rational function after Moshier's Cephes
/// `atan`, within 2 ulp of f64.
fn arctan(call: &mut Call, x: NodeId) -> Added {
    const P: [f64; 5] = [
        -0.875_060_860_003_190_4,
        -16.157_537_187_333_652,
        -75.008_557_923_147_05,
        -122.886_668_449_013_61,
        -64.850_219_049_420_25,
    ];
    const Q: [f64; 6] = [
        1.0,
        24.858_464_901_423_062,
        165.027_009_831_698_85,
        432.881_060_491_290_27,
        485.390_399_635_913_7,
        194.550_657_148_261_4,
    ];
    // tan(3 pi / 8)
    const FAR: f64 = 2.414_213_562_373_095;
    let (g, o) = (&mut *call.graph, &call.origin);
    let dtype = g.ty(x).dtype;
    let number = |g: &mut crate::graph::Graph, v| g.scalar(dtype, 0, v, o);
    let (far, near) = (number(g, FAR), number(g, 0.66));
    let far = g.binary(BinaryFn::Lt, far, x, o)?;
    let middle = g.binary(BinaryFn::Lt, near, x, o)?;
    let less = g.binary_number(BinaryFn::Sub, x, 1.0, o)?;
    let more = g.binary_number(BinaryFn::Add, x, 1.0, o)?;
    let between = g.binary(BinaryFn::Div, less, more, o)?;
    let beyond = g.unary(UnaryFn::Recip, x, o)?;
    let beyond = g.unary(UnaryFn::Neg, beyond, o)?;
    let r = g.select(middle, between, x, o)?;
    let r = g.select(far, beyond, r, o)?;
    let [zero, quarter, half] = [0.0, 0.5, 1.0].map(|v| number(g, v * std::f64::consts::FRAC_PI_2));
    let angle = g.select(middle, quarter, zero, o)?;
    let angle = g.select(far, half, angle, o)?;
    let square = g.binary(BinaryFn::Mul, r, r, o)?;
    let (p, q) = (polynomial(call, square, &P)?, polynomial(call, square, &Q)?);
    let (g, o) = (&mut *call.graph, &call.origin);
    let ratio = g.binary(BinaryFn::Div, p, q, o)?;
    let ratio = g.binary(BinaryFn::Mul, ratio, square, o)?;
    let ratio = g.binary(BinaryFn::Mul, ratio, r, o)?;
    let sum = g.binary(BinaryFn::Add, ratio, r, o)?;
    g.binary(BinaryFn::Add, angle, sum, o)
}

/// A function of floats, computed in f32 where they are shorter.
fn at_least_f32(call: &mut Call, f: impl Fn(&mut Call, NodeId) -> Added) -> Outputs {
    let x = call.input(0)?;
    let dtype = call.ty(x).dtype;
    if !dtype.is_float() {
        return Err(not_supported(format!("an angle of {dtype}")));
    }
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let x = call.graph.cast(x, wide, &call.origin)?;
    let y = f(call, x)?;
    one(call.graph.cast(y, dtype, &call.origin)?)
}

/// arctan x with the sign of x.
fn signed_arctan(call: &mut Call, x: NodeId) -> Added {
    let magnitude = call.graph.unary(UnaryFn::Abs, x, &call.origin)?;
    let y = arctan(call, magnitude)?;
    let minus = call.graph.unary(UnaryFn::Neg, y, &call.origin)?;
    let negative = call.graph.binary_number(BinaryFn::Lt, x, 0.0, &call.origin)?;
    call.graph.select(negative, minus, y, &call.origin)
}

pub(super) fn atan(call: &mut Call) -> Outputs {
    at_least_f32(call, signed_arctan)
}

/// 1 - x and 1 + x
fn apart_from_one(call: &mut Call, x: NodeId) -> Result<[NodeId; 2], Diagnostic> {
    let (g, o) = (&mut *call.graph, &call.origin);
    let minus = g.unary(UnaryFn::Neg, x, o)?;
    let down = g.binary_number(BinaryFn::Add, minus, 1.0, o)?;
    Ok([down, g.binary_number(BinaryFn::Add, x, 1.0, o)?])
}

/// arctan(x / sqrt((1 - x) * (1 + x)))
pub(super) fn asin(call: &mut Call) -> Outputs {
    at_least_f32(call, |call, x| {
        let [down, up] = apart_from_one(call, x)?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let product = g.binary(BinaryFn::Mul, down, up, o)?;
        let root = g.unary(UnaryFn::Sqrt, product, o)?;
        let ratio = g.binary(BinaryFn::Div, x, root, o)?;
        signed_arctan(call, ratio)
    })
}

/// 2 * arctan(sqrt((1 - x) / (1 + x)))
pub(super) fn acos(call: &mut Call) -> Outputs {
    at_least_f32(call, |call, x| {
        let [down, up] = apart_from_one(call, x)?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let ratio = g.binary(BinaryFn::Div, down, up, o)?;
        let root = g.unary(UnaryFn::Sqrt, ratio, o)?;
        let half = arctan(call, root)?;
        call.graph.binary(BinaryFn::Add, half, half, &call.origin)
    })
}

/// (e^x + sign * e^-x) / 2
fn hyperbolic(call: &mut Call, sign: f64) -> Outputs {
    let x = call.input(0)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let up = g.unary(UnaryFn::Exp, x, o)?;
    let down = g.unary(UnaryFn::Recip, up, o)?;
    let down = g.binary_number(BinaryFn::Mul, down, sign, o)?;
    let sum = g.binary(BinaryFn::Add, up, down, o)?;
    one(g.binary_number(BinaryFn::Mul, sum, 0.5, o)?)
}

pub(super) fn sinh(call: &mut Call) -> Outputs {
    hyperbolic(call, -1.0)
}

pub(super) fn cosh(call: &mut Call) -> Outputs {
    hyperbolic(call, 1.0)
}

/// ln(x + sqrt(x^2 + c))
fn area(call: &mut Call, x: NodeId, c: f64) -> Added {
    let (g, o) = (&mut *call.graph, &call.origin);
    let square = g.binary(BinaryFn::Mul, x, x, o)?;
    let sum = g.binary_number(BinaryFn::Add, square, c, o)?;
    let root = g.unary(UnaryFn::Sqrt, sum, o)?;
    let sum = g.binary(BinaryFn::Add, x, root, o)?;
    g.unary(UnaryFn::Log, sum, o)
}

/// Of the magnitude, so that nothing cancels; the sign comes back afterwards.
pub(super) fn asinh(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let magnitude = call.graph.unary(UnaryFn::Abs, x, &call.origin)?;
    let y = area(call, magnitude, 1.0)?;
    let sign = call.graph.unary(UnaryFn::Sign, x, &call.origin)?;
    one(call.graph.binary(BinaryFn::Mul, sign, y, &call.origin)?)
}

pub(super) fn acosh(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    one(area(call, x, -1.0)?)
}

/// ln((1 + x) / (1 - x)) / 2
pub(super) fn atanh(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let (g, o) = (&mut *call.graph, &call.origin);
    let up = g.binary_number(BinaryFn::Add, x, 1.0, o)?;
    let minus = g.unary(UnaryFn::Neg, x, o)?;
    let down = g.binary_number(BinaryFn::Add, minus, 1.0, o)?;
    let ratio = g.binary(BinaryFn::Div, up, down, o)?;
    let log = g.unary(UnaryFn::Log, ratio, o)?;
    one(g.binary_number(BinaryFn::Mul, log, 0.5, o)?)
}

/// x + bias below -lambd, x - bias above lambd, 0 between.
pub(super) fn shrink(call: &mut Call) -> Outputs {
    let bias = f64::from(call.float_or("bias", 0.0));
    let lambd = f64::from(call.float_or("lambd", 0.5));
    let x = call.input(0)?;
    let ty = call.ty(x);
    let (low, high) = (call.number(ty.dtype, 0, -lambd), call.number(ty.dtype, 0, lambd));
    let zero = call.number(ty.dtype, 0, 0.0);
    let (g, o) = (&mut *call.graph, &call.origin);
    let below = g.binary(BinaryFn::Lt, x, low, o)?;
    let above = g.binary(BinaryFn::Lt, high, x, o)?;
    let raised = g.binary_number(BinaryFn::Add, x, bias, o)?;
    let lowered = g.binary_number(BinaryFn::Sub, x, bias, o)?;
    let y = g.select(above, lowered, zero, o)?;
    one(g.select(below, raised, y, o)?)
}

/// Times or divided by a power of two; a division by 2^width, which wraps to 0, is 0.
pub(super) fn bit_shift(call: &mut Call) -> Outputs {
    let left = call.string_or("direction", "LEFT") == "LEFT";
    let (x, y) = (call.input(0)?, call.input(1)?);
    let dtype = call.ty(x).dtype;
    let powers: Vec<u64> = (0..65).map(|n| 1u64.checked_shl(n).unwrap_or(0)).collect();
    let (g, o) = (&mut *call.graph, &call.origin);
    let powers = g.tensor(&Tensor::from_slice(&[65], &powers), o);
    let powers = g.cast(powers, dtype, o)?;
    let place = g.cast(y, DType::I64, o)?;
    let power = g.add(Op::Gather(0), &[powers, place], o)?;
    let f = if left { BinaryFn::Mul } else { BinaryFn::Div };
    one(g.binary(f, x, power, o)?)
}

/// 1 on a diagonal of a matrix, else 0.
pub(super) fn eye_like(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let dtype = match call.int("dtype") {
        Some(number) => super::tensor::dtype_of(i32::try_from(number).unwrap_or(0))?,
        None => ty.dtype,
    };
    let k = call.int_or("k", 0);
    if ty.rank() != 2 {
        return Err(not_supported(format!("a diagonal of {:?}", ty.shape)));
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let row = g.add(Op::Iota(ty.shape.clone(), 0), &[], o)?;
    let column = g.add(Op::Iota(ty.shape.clone(), 1), &[], o)?;
    let row = g.binary_number(BinaryFn::Add, row, k as f64, o)?;
    let same = g.binary(BinaryFn::Eq, row, column, o)?;
    one(g.cast(same, dtype, o)?)
}

/// Determinants: each column gives a factor, the largest number in it, whose row goes; the others
/// are made 0 in that column.
pub(super) fn det(call: &mut Call) -> Outputs {
    const MOST_ROWS: usize = 128;
    let x = call.input(0)?;
    let ty = call.ty(x);
    let lead = ty.rank().saturating_sub(2);
    let m = ty.shape.last().copied().unwrap_or(0);
    if ty.rank() < 2 || ty.shape[lead] != m || m > MOST_ROWS {
        return Err(not_supported(format!("determinants of {:?}", ty.shape)));
    }
    let batch: usize = ty.shape[..lead].iter().product();
    let (g, o) = (&mut *call.graph, &call.origin);
    let mut rest = g.reshape(x, &[batch, m, m], o)?;
    let one_of_each = g.scalar(ty.dtype, 3, 1.0, o);
    let mut product = g.expand(one_of_each, &[batch, 1, 1], o)?;
    for n in (1..=m).rev() {
        let column = call.cut(rest, 2, (0, 1, 1))?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let size = g.unary(UnaryFn::Abs, column, o)?;
        let largest = g.reduce(ReduceFn::Max, size, &[1], o)?;
        let is_largest = g.binary(BinaryFn::Eq, size, largest, o)?;
        let row = g.add(Op::Iota(Shape::from_slice(&[1, n, 1]), 1), &[], o)?;
        let none = g.scalar(DType::I64, 3, n as f64 - 1.0, o);
        let at = g.select(is_largest, row, none, o)?;
        let at = g.reduce(ReduceFn::Min, at, &[1], o)?;
        let here = g.binary(BinaryFn::Eq, row, at, o)?;
        let zero = g.scalar(ty.dtype, 3, 0.0, o);
        let pivots = g.select(here, rest, zero, o)?;
        let pivots = g.reduce(ReduceFn::Sum, pivots, &[1], o)?;
        let pivot = call.cut(pivots, 2, (0, 1, 1))?;
        let (g, o) = (&mut *call.graph, &call.origin);
        product = g.binary(BinaryFn::Mul, product, pivot, o)?;
        // A row that goes from an odd place turns the sign.
        let odd = g.binary_number(BinaryFn::Rem, at, 2.0, o)?;
        let odd = g.binary_number(BinaryFn::Eq, odd, 1.0, o)?;
        let turned = g.unary(UnaryFn::Neg, product, o)?;
        product = g.select(odd, turned, product, o)?;
        if n == 1 {
            break;
        }
        let (before, after) =
            (call.cut(rest, 1, (0, 1, n - 1))?, call.cut(rest, 1, (1, 1, n - 1))?);
        let (g, o) = (&mut *call.graph, &call.origin);
        let row = g.add(Op::Iota(Shape::from_slice(&[1, n - 1, 1]), 1), &[], o)?;
        let is_before = g.binary(BinaryFn::Lt, row, at, o)?;
        let others = g.select(is_before, before, after, o)?;
        let column = call.cut(others, 2, (0, 1, 1))?;
        let (g, o) = (&mut *call.graph, &call.origin);
        // A column of zeros makes the product 0, whatever comes after.
        let none = g.binary_number(BinaryFn::Eq, pivot, 0.0, o)?;
        let unit = g.scalar(ty.dtype, 3, 1.0, o);
        let below = g.select(none, unit, pivot, o)?;
        let part = g.binary(BinaryFn::Div, column, below, o)?;
        let less = g.binary(BinaryFn::Mul, part, pivots, o)?;
        let others = g.binary(BinaryFn::Sub, others, less, o)?;
        rest = call.cut(others, 2, (1, 1, n - 1))?;
    }
    one(call.graph.reshape(product, &ty.shape[..lead], &call.origin)?)
}

/// One value at the place that an index names along a new axis, another elsewhere.
pub(super) fn one_hot(call: &mut Call) -> Outputs {
    let (index, values) = (call.input(0)?, call.input(2)?);
    let depth = call.known_input(1)?.as_f64s().first().copied();
    let depth = depth
        .filter(|d| (0.0..2f64.powi(31)).contains(d))
        .ok_or_else(|| not_supported("a depth that is no extent"))?;
    let mut shape = call.shape(index);
    let axis = call.axis(call.int_or("axis", -1), shape.len() + 1)?;
    shape.insert(axis, 1);
    let (g, o) = (&mut *call.graph, &call.origin);
    let index = g.cast(index, DType::I64, o)?;
    let index = g.reshape(index, &shape, o)?;
    // Indices below 0 count from the end.
    let zero = g.scalar(DType::I64, 0, 0.0, o);
    let negative = g.binary(BinaryFn::Lt, index, zero, o)?;
    let moved = g.binary_number(BinaryFn::Add, index, depth, o)?;
    let index = g.select(negative, moved, index, o)?;
    let mut along = Shape::from_elem(1, shape.len());
    along[axis] = depth as usize;
    let place = g.add(Op::Iota(along, axis as u8), &[], o)?;
    let here = g.binary(BinaryFn::Eq, index, place, o)?;
    let (off, on) = (call.cut(values, 0, (0, 1, 1))?, call.cut(values, 0, (1, 1, 1))?);
    one(call.graph.select(here, on, off, &call.origin)?)
}

/// The k first elements of an axis in order, with their indices. The rank of each element is the
/// number of those that come before it.
pub(super) fn top_k(call: &mut Call) -> Outputs {
    call.ignore("sorted");
    let largest = call.int_or("largest", 1) != 0;
    let x = call.input(0)?;
    let ty = call.ty(x);
    let axis = call.axis(call.int_or("axis", -1), ty.rank())?;
    let k = match call.int("k") {
        Some(k) => Some(k),
        None => call.ints_input(1)?.and_then(|k| k.first().copied()),
    };
    let n = ty.shape[axis];
    let k = k.and_then(|k| usize::try_from(k).ok()).filter(|&k| k <= n);
    let k = k.ok_or_else(|| not_supported(format!("that number of {n} elements")))?;
    if ty.numel().checked_mul(n).is_none_or(|pairs| pairs > MOST_PAIRS) {
        return Err(not_supported(format!("an order of {n} elements in {:?}", ty.shape)));
    }
    let rank = ty.rank();
    let order: Vec<usize> = (0..rank).filter(|&d| d != axis).chain([axis]).collect();
    let (g, o) = (&mut *call.graph, &call.origin);
    let last = g.permute(x, &order, o)?;
    let lead = Shape::from_slice(&g.ty(last).shape[..rank - 1]);
    let with = |tail: [usize; 2]| -> Shape { lead.iter().copied().chain(tail).collect() };
    let (down, across) = (g.reshape(last, &with([n, 1]), o)?, g.reshape(last, &with([1, n]), o)?);
    let ones = |tail: [usize; 2]| -> Shape { lead.iter().map(|_| 1).chain(tail).collect() };
    let row = g.add(Op::Iota(ones([n, 1]), rank as u8 - 1), &[], o)?;
    let column = g.add(Op::Iota(ones([1, n]), rank as u8), &[], o)?;
    let before = match largest {
        true => g.binary(BinaryFn::Lt, down, across, o)?,
        false => g.binary(BinaryFn::Lt, across, down, o)?,
    };
    let tie = g.binary(BinaryFn::Eq, down, across, o)?;
    let earlier = g.binary(BinaryFn::Lt, column, row, o)?;
    let tie = g.binary(BinaryFn::And, tie, earlier, o)?;
    let before = g.binary(BinaryFn::Or, before, tie, o)?;
    let before = g.cast(before, DType::I64, o)?;
    let ranks = g.reduce(ReduceFn::Sum, before, &[rank], o)?;
    let ranks = g.reshape(ranks, &with([1, n]), o)?;
    let wanted = g.add(Op::Iota(ones([k, 1]), rank as u8 - 1), &[], o)?;
    let here = g.binary(BinaryFn::Eq, ranks, wanted, o)?;
    let back: Vec<usize> = (0..axis).chain([rank - 1]).chain(axis..rank - 1).collect();
    let mut outputs = Vec::new();
    for (values, dtype) in [(across, ty.dtype), (column, DType::I64)] {
        let zero = g.scalar(dtype, 0, 0.0, o);
        let picked = g.select(here, values, zero, o)?;
        let sum = g.reduce(ReduceFn::Sum, picked, &[rank], o)?;
        let shape: Shape = lead.iter().copied().chain([k]).collect();
        let flat = g.reshape(sum, &shape, o)?;
        outputs.push(Some(g.permute(flat, &back, o)?));
    }
    Ok(outputs)
}

/// Cuts or borders axes evenly on both sides to given extents.
pub(super) fn center_crop_pad(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let wanted = call.ints_input(1)?.ok_or_else(|| not_supported("a crop without a shape"))?;
    let axes = match call.ints("axes") {
        Some(axes) => call.axes(&axes, ty.rank())?,
        None => (0..ty.rank()).collect(),
    };
    let fits = axes.len() == wanted.len() && wanted.iter().all(|&e| e >> 31 == 0);
    if !fits || ty.shape.iter().any(|&e| e >> 31 != 0) {
        return Err(not_supported(format!("{wanted:?} for axes {axes:?}")));
    }
    let mut borders = vec![(0, 0); ty.rank()];
    for (&axis, &to) in axes.iter().zip(&wanted) {
        let more = to - ty.shape[axis] as i64;
        // The odd element goes to the end of a border, and from the end of a cut.
        borders[axis] = (more / 2, more - more / 2);
    }
    let zero = call.number(ty.dtype, 0, 0.0);
    one(pad_constant(call, x, &borders, zero)?)
}

pub(super) fn global_lp_pool(call: &mut Call) -> Outputs {
    let p = call.int_or("p", 2) as f64;
    let x = call.input(0)?;
    let axes: Vec<usize> = (2..call.ty(x).rank()).collect();
    let (g, o) = (&mut *call.graph, &call.origin);
    let magnitude = g.unary(UnaryFn::Abs, x, o)?;
    let power = g.binary_number(BinaryFn::Pow, magnitude, p, o)?;
    let sum = g.reduce(ReduceFn::Sum, power, &axes, o)?;
    one(g.binary_number(BinaryFn::Pow, sum, 1.0 / p, o)?)
}

/// Letters of each operand and of the result; an ellipsis becomes digits.
struct Equation {
    operands: Vec<Vec<char>>,
    result: Vec<char>,
}

fn equation(text: &str, ranks: &[usize]) -> Result<Equation, Diagnostic> {
    let fail = || not_supported(format!("the equation {text} for ranks {ranks:?}"));
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match text.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (text.as_str(), None),
    };
    let terms: Vec<&str> = left.split(',').collect();
    if terms.len() != ranks.len() {
        return Err(fail());
    }
    // Axes of an ellipsis are numbered from the end, so that they align.
    let spell = |term: &str, rest: usize| -> Option<Vec<char>> {
        let dots: Option<String> =
            (0..rest).rev().map(|i| char::from_digit(i as u32, 36)).collect();
        let spelled = term.replacen("...", &dots?, 1);
        let plain = spelled.chars().all(|c| c.is_ascii_alphabetic() || c.is_ascii_digit());
        plain.then(|| spelled.chars().collect())
    };
    let mut operands = Vec::new();
    let mut longest = 0;
    for (term, &rank) in terms.iter().zip(ranks) {
        let letters = term.chars().filter(|c| *c != '.').count();
        let rest = if term.contains("...") { rank.checked_sub(letters) } else { Some(0) };
        let rest = rest.filter(|&r| r <= 10).ok_or_else(fail)?;
        longest = longest.max(rest);
        let spelled = spell(term, rest).filter(|s| s.len() == rank).ok_or_else(fail)?;
        operands.push(spelled);
    }
    let result = match right {
        Some(right) => spell(right, longest).ok_or_else(fail)?,
        None => {
            let all: Vec<char> = operands.concat();
            let mut once: Vec<char> = all.clone();
            once.retain(|c| c.is_ascii_digit() || all.iter().filter(|a| *a == c).count() == 1);
            // Digits stand for the ellipsis, whose axes go first, the outermost having the
            // greatest digit.
            once.sort_by_key(|&c| {
                (c.is_ascii_alphabetic(), if c.is_ascii_digit() { 255 - c as u8 } else { c as u8 })
            });
            once.dedup();
            once
        }
    };
    Ok(Equation { operands, result })
}

/// A sum of products over the letters that the result does not have.
pub(super) fn einsum(call: &mut Call) -> Outputs {
    let text = call.string_or("equation", "");
    let mut operands = Vec::new();
    for i in 0..call.n_inputs() {
        operands.push(call.input(i)?);
    }
    let ranks: Vec<usize> = operands.iter().map(|&x| call.ty(x).rank()).collect();
    let spelled = equation(&text, &ranks)?;
    if operands.len() == 1 {
        let dtype = call.ty(operands[0]).dtype;
        operands.push(call.number(dtype, 0, 1.0));
    }
    let [x, y] = operands[..] else {
        return Err(not_supported(format!("an equation of {} operands", operands.len())));
    };
    let letters_of = |i: usize| spelled.operands.get(i).map_or(&[][..], |l| &l[..]);
    let terms = [letters_of(0), letters_of(1)];
    let mut letters = spelled.result.clone();
    letters.extend(terms.concat());
    let mut space: Vec<char> = Vec::new();
    letters.into_iter().for_each(|c| {
        if !space.contains(&c) {
            space.push(c)
        }
    });
    let shapes = [call.shape(x), call.shape(y)];
    let mut extents = Shape::from_elem(1, space.len());
    let mut maps: [SmallVec<[Affine; 4]>; 2] = Default::default();
    for (i, term) in terms.iter().enumerate() {
        for (c, &extent) in term.iter().zip(&shapes[i]) {
            let axis = space.iter().position(|s| s == c).unwrap_or(0);
            let known = extents[axis];
            if known != extent && known != 1 && extent != 1 {
                return Err(not_supported(format!("{text}: {c} is {known} and {extent}")));
            }
            if extent != 1 {
                extents[axis] = extent;
            }
            maps[i].push(if extent == 1 { Affine::constant(0) } else { Affine::axis(axis) });
        }
    }
    let n_out = spelled.result.len();
    let repeated = (0..n_out).any(|i| spelled.result[..i].contains(&spelled.result[i]));
    let known = spelled.result.iter().all(|c| terms.iter().any(|t| t.contains(c)));
    if repeated || !known {
        return Err(not_supported(format!("the equation {text}")));
    }
    let contract = Contract { extents, n_out, maps }.without_unit_axes();
    one(call.graph.add(Op::Contract(Box::new(contract)), &[x, y], &call.origin)?)
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::Tensor;

    use super::super::control::tests::{graph, model, node, port};
    use crate::tests::compiled;

    /// By the first row, written out.
    fn expanded(rows: &[Vec<f64>]) -> f64 {
        let [first, rest @ ..] = rows else { return 1.0 };
        let without = |k: usize| -> Vec<Vec<f64>> {
            rest.iter().map(|row| [&row[..k], &row[k + 1..]].concat()).collect()
        };
        let sign = |k: usize| if k.is_multiple_of(2) { 1.0 } else { -1.0 };
        (0..first.len()).map(|k| sign(k) * first[k] * expanded(&without(k))).sum()
    }

    #[test]
    fn determinants_are_what_expansion_says() {
        for m in 1..=6usize {
            let count = 16;
            // Small whole numbers, many of them 0: some matrices have no inverse, and pivots move.
            let digits = |i: usize| ((i * 7919 + i / 3 * 31 + m) % 7) as f32 - 3.0;
            let mut values: Vec<f32> = (0..count * m * m).map(digits).collect();
            values.iter_mut().step_by(3).for_each(|v| *v = 0.0);
            let x = Tensor::from_slice(&[count / 4, 4, m, m], &values);
            let shape = [count as i64 / 4, 4, m as i64, m as i64];
            let made = graph(&[port("x", &shape, 1)], &[node("Det", &["x"], &["y"])], &["y"]);
            let found = compiled(&model(made, false).expect("a model"), &x);
            assert_eq!(found.shape(), [count / 4, 4]);
            let found = found.as_slice::<f32>().expect("f32").iter();
            for (matrix, got) in values.chunks(m * m).zip(found) {
                let row = |row: &[f32]| row.iter().map(|&v| f64::from(v)).collect();
                let rows: Vec<Vec<f64>> = matrix.chunks(m).map(row).collect();
                let want = expanded(&rows);
                assert!((f64::from(*got) - want).abs() < 1e-3, "{rows:?}: {got}, not {want}");
            }
        }
        for shape in [&[3][..], &[2, 3], &[1 << 40, 1 << 40]] {
            let made = graph(&[port("x", shape, 1)], &[node("Det", &["x"], &["y"])], &["y"]);
            assert!(model(made, false).is_err(), "{shape:?}");
        }
    }
}
