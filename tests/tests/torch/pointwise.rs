//! Functions of one, two and three numbers, and casts.

use kiln::graph::op::{BinaryFn, Op, Type, UnaryFn};
use kiln::tensor::DType;
use kiln_tests::Random;
use proptest::prelude::*;
use tch::{Kind, Tensor};

use crate::numbers::{Numbers, tensor};
use crate::trial::{Bound, Checked, Operand, Trial, kind, origin};
use crate::{cases, dtypes, property, property_of_dtypes, shape};

/// A function of one number, libtorch's, and the error in ulps of f32 and absolutely.
type Unary = (UnaryFn, fn(&Tensor) -> Tensor, f64, f64);

/// The bounds are those that `backend/math.rs` states.
const UNARY: [Unary; 15] = [
    (UnaryFn::Neg, |x| x.neg(), 0.0, 0.0),
    (UnaryFn::Abs, |x| x.abs(), 0.0, 0.0),
    (UnaryFn::Sign, |x| x.sign().where_self(&x.eq_tensor(x), x), 0.0, 0.0),
    (UnaryFn::Recip, |x| x.reciprocal(), 0.0, 0.0),
    (UnaryFn::Sqrt, |x| x.sqrt(), 0.0, 0.0),
    (UnaryFn::Exp, |x| x.exp(), 1.0, 0.0),
    (UnaryFn::Log, |x| x.log(), 2.0, 0.0),
    (UnaryFn::Sin, |x| x.sin(), 1.0, 2e-7),
    (UnaryFn::Cos, |x| x.cos(), 1.0, 2e-7),
    (UnaryFn::Tanh, |x| x.tanh(), 2.0, 0.0),
    // The interpreter's own erf is within 1e-13.
    (UnaryFn::Erf, |x| x.erf(), 2.0, 1e-13),
    (UnaryFn::Floor, |x| x.floor(), 0.0, 0.0),
    (UnaryFn::Ceil, |x| x.ceil(), 0.0, 0.0),
    (UnaryFn::Round, |x| x.round(), 0.0, 0.0),
    (UnaryFn::Not, |x| x.bitwise_not(), 0.0, 0.0),
];

fn unary_fits(f: UnaryFn, dtype: DType) -> bool {
    match f {
        UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Sign => dtype != DType::Bool,
        UnaryFn::Not => !dtype.is_float(),
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
        | UnaryFn::Round => dtype.is_float(),
    }
}

#[test]
fn unary() {
    assert!(UnaryFn::ALL.iter().all(|f| UNARY.iter().any(|row| row.0 == f.0)));
    let strategy = || (shape(0, 12, 0..=3), any::<u64>());
    property_of_dtypes(dtypes(), strategy, |dtype, (shape, seed)| {
        let mut trial = Trial::default();
        let x = trial.input(tensor(&mut Random::new(seed), dtype, &shape, Numbers::Any));
        for (f, torch, ulps, absolute) in UNARY.iter().filter(|row| unary_fits(row.0, dtype)) {
            let y = trial.graph.unary(*f, x.node, &origin());
            // libtorch itself is within one ulp of f64.
            let ulps = if dtype == DType::F64 { ulps.max(1.0) } else { *ulps };
            let bound = Bound::ulps(ulps).absolute(*absolute);
            trial.want((f.name(), dtype), y, torch(&x.exact), bound)?;
        }
        trial.check()
    });
}

/// Division as the graph defines it: by 0 gives 0, the least number by -1 wraps.
fn divide(x: &Tensor, y: &Tensor, f: fn(&Tensor, &Tensor) -> Tensor) -> Tensor {
    if x.is_floating_point() {
        return f(x, y);
    }
    let zero = y.eq(0);
    let safe = y.masked_fill(&zero, 1);
    // x / -1 traps for the least x; -x and 0 are right for every x.
    let minus = match x.kind() {
        Kind::Uint8 => zero.zeros_like(),
        _ => y.eq(-1),
    };
    let regular = f(x, &safe.masked_fill(&minus, 1));
    let one = Tensor::from(1i64).to_kind(x.kind());
    let special = f(x, &one) * &(Tensor::from(-1i64).to_kind(x.kind()));
    regular.where_self(&minus.logical_not(), &special).masked_fill(&zero, 0)
}

/// A function of two numbers and libtorch's.
type Binary = (BinaryFn, fn(&Tensor, &Tensor) -> Tensor);

const BINARY: [Binary; 15] = [
    (BinaryFn::Add, |x, y| x + y),
    (BinaryFn::Sub, |x, y| x - y),
    (BinaryFn::Mul, |x, y| x * y),
    (BinaryFn::Div, |x, y| divide(x, y, quotient)),
    (BinaryFn::Rem, |x, y| divide(x, y, |x, y| x.fmod_tensor(y))),
    (BinaryFn::Max, |x, y| x.maximum(y)),
    (BinaryFn::Min, |x, y| x.minimum(y)),
    (BinaryFn::Pow, |x, y| x.pow(y)),
    (BinaryFn::Eq, |x, y| x.eq_tensor(y)),
    (BinaryFn::Ne, |x, y| x.ne_tensor(y)),
    (BinaryFn::Lt, |x, y| x.lt_tensor(y)),
    (BinaryFn::Le, |x, y| x.le_tensor(y)),
    (BinaryFn::And, |x, y| x.bitwise_and_tensor(y)),
    (BinaryFn::Or, |x, y| x.bitwise_or_tensor(y)),
    (BinaryFn::Xor, |x, y| x.bitwise_xor_tensor(y)),
];

fn quotient(x: &Tensor, y: &Tensor) -> Tensor {
    if x.is_floating_point() { x / y } else { x.divide_tensor_mode(y, "trunc") }
}

fn binary_fits(f: BinaryFn, dtype: DType) -> bool {
    match f {
        BinaryFn::Add
        | BinaryFn::Sub
        | BinaryFn::Mul
        | BinaryFn::Div
        | BinaryFn::Rem
        | BinaryFn::Max
        | BinaryFn::Min
        | BinaryFn::Pow => dtype != DType::Bool,
        BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le => true,
        BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => !dtype.is_float(),
    }
}

/// Correctly rounded but for powers: of f64, what rounding y ln x changes; else they go through
/// f64 and are rounded once more. Machine code's remainders are exact while the quotient is.
fn binary_bound(f: BinaryFn, dtype: DType, x: &Operand, y: &Operand) -> Bound {
    match (f, dtype) {
        (BinaryFn::Pow, DType::F64) => {
            let exponent = (&y.exact * x.exact.abs().log()).abs().nan_to_num(0.0, 0.0, 0.0);
            let noise = (exponent + 1.0) * x.exact.pow(&y.exact).abs() * 2.0;
            Bound::ulps(4.0).noise(dtype, noise.nan_to_num(0.0, 0.0, 0.0))
        }
        (BinaryFn::Pow, _) => Bound::ulps(1.0),
        (BinaryFn::Rem, _) => Bound::EXACT.whole_quotients(dtype, &x.exact, &y.exact),
        _ => Bound::EXACT,
    }
}

/// Two shapes that repeat to a third one.
fn pair() -> impl Strategy<Value = (Vec<usize>, Vec<usize>)> {
    shape(0, 9, 0..=4).prop_flat_map(|shape| {
        let n = shape.len();
        proptest::collection::vec(0u8..4, n).prop_map(move |which| {
            let side = |one: u8| {
                shape.iter().zip(&which).map(|(&e, &w)| if w == one { 1 } else { e }).collect()
            };
            (side(0), side(1))
        })
    })
}

#[test]
fn binary() {
    assert!(BinaryFn::ALL.iter().all(|f| BINARY.iter().any(|row| row.0 == f.0)));
    let strategy = || (pair(), 0u8..4, any::<u64>());
    property_of_dtypes(dtypes(), strategy, |dtype, ((a, b), constant, seed)| {
        let mut trial = Trial::default();
        let mut random = Random::new(seed);
        let x = trial.input(tensor(&mut random, dtype, &a, Numbers::Any));
        let y = trial.either(constant == 0, tensor(&mut random, dtype, &b, Numbers::Any));
        for (f, torch) in BINARY.iter().filter(|row| binary_fits(row.0, dtype)) {
            let z = trial.graph.binary(*f, x.node, y.node, &origin());
            let bound = binary_bound(*f, dtype, &x, &y);
            trial.want((f.name(), dtype), z, torch(&x.exact, &y.exact), bound)?;
        }
        trial.check()
    });
}

/// Exponents that become products, roots or a quotient.
#[test]
fn powers_of_constants() {
    let strategy = || (shape(1, 12, 1..=3), any::<u64>());
    let all = dtypes().filter(|d| *d != DType::Bool);
    property_of_dtypes(all, strategy, |dtype, (shape, seed)| {
        let mut trial = Trial::default();
        let x = trial.input(tensor(&mut Random::new(seed), dtype, &shape, Numbers::NearOne));
        for exponent in [0.0, 1.0, 2.0, 3.0, 16.0, 0.5, -1.0, -0.5, -2.0] {
            let whole = exponent >= 1.0 && f64::fract(exponent) == 0.0;
            if !dtype.is_float() && !whole {
                continue;
            }
            let y = trial.graph.binary_number(BinaryFn::Pow, x.node, exponent, &origin());
            let torch = match dtype.is_float() {
                true => x.exact.pow_tensor_scalar(exponent),
                false => x.exact.pow_tensor_scalar(exponent as i64),
            };
            // A product of n factors rounds n - 1 times.
            let bound = Bound::ulps(exponent.abs().max(4.0));
            trial.want(("power", dtype), y, torch, bound)?;
        }
        trial.check()
    });
}

#[test]
fn select() {
    let strategy = || (pair(), 0u8..3, any::<u64>());
    property_of_dtypes(dtypes(), strategy, |dtype, ((a, b), which, seed)| {
        let mut trial = Trial::default();
        let mut random = Random::new(seed);
        // One of the three operands has the other shape.
        let shapes = [0, 1, 2].map(|k| if k == which { &b } else { &a });
        let c = trial.input(tensor(&mut random, DType::Bool, shapes[0], Numbers::Any));
        let x = trial.input(tensor(&mut random, dtype, shapes[1], Numbers::Any));
        let y = trial.input(tensor(&mut random, dtype, shapes[2], Numbers::Any));
        let z = trial.graph.select(c.node, x.node, y.node, &origin());
        let torch = x.exact.where_self(&c.exact, &y.exact);
        trial.want(("select", dtype), z, torch, Bound::EXACT)?;
        trial.check()
    });
}

/// A cast as the graph defines it: floats saturate, and NaN is 0.
fn cast(x: &Tensor, to: DType) -> Tensor {
    let (low, high) = kiln::graph::eval::int_range(to);
    if !x.is_floating_point() || to.is_float() || to == DType::Bool {
        return x.to_kind(kind(to));
    }
    let defined = x.nan_to_num(0.0, f64::INFINITY, f64::NEG_INFINITY);
    // The greatest number of 64 bits is none of f64; what lies above the one before is that.
    let top = high as f64;
    let above = defined.ge(top);
    let inside = defined.clamp(low as f64, top).masked_fill(&above, 0.0);
    inside.to_kind(Kind::Int64).masked_fill(&above, high as i64).to_kind(kind(to))
}

/// Machine code goes from long integers and f64 to short floats by way of f32: rounded twice.
fn cast_bound(from: DType, to: DType) -> Bound {
    let long = matches!(from, DType::F64 | DType::I32 | DType::I64);
    match to {
        DType::F16 | DType::BF16 if long => Bound::ulps(1.0),
        _ => Bound::EXACT,
    }
}

#[test]
fn casts() {
    let strategy = || (shape(0, 12, 0..=3), any::<u64>());
    property_of_dtypes(dtypes(), strategy, |dtype, (shape, seed)| {
        let mut trial = Trial::default();
        let x = trial.input(tensor(&mut Random::new(seed), dtype, &shape, Numbers::Any));
        for to in dtypes().filter(|to| *to != dtype) {
            let y = trial.graph.cast(x.node, to, &origin());
            trial.want(("cast", dtype), y, cast(&x.exact, to), cast_bound(dtype, to))?;
        }
        trial.check()
    });
}

/// Remainders where the quotient is nearly whole, and rounds to a whole number.
#[test]
fn remainders_near_multiples() {
    let strategy = || (1usize..40, any::<u64>());
    property_of_dtypes([DType::F32, DType::F64], strategy, |dtype, (n, seed)| {
        let mut random = Random::new(seed);
        let divisors = tensor(&mut random, dtype, &[n], Numbers::NearOne);
        let y = crate::trial::to_torch(&divisors);
        let multiple = &y * Tensor::from(1 + random.below(64) as i64).to_kind(y.kind());
        let infinite = Tensor::from(f64::INFINITY).to_kind(y.kind());
        let below = multiple.nextafter(&-&infinite);
        let rows = [&multiple, &below, &multiple.nextafter(&infinite)];
        let mut trial = Trial::default();
        let y = trial.input(divisors);
        for row in rows {
            let x = trial.input(crate::trial::from_torch(row));
            let z = trial.graph.binary(BinaryFn::Rem, x.node, y.node, &origin());
            let torch = x.exact.fmod_tensor(&y.exact);
            trial.want(("rem", dtype), z, torch, Bound::EXACT)?;
        }
        trial.check()
    });
}

/// An iota, which is a constant where it is small, and an iota in a larger kernel.
#[test]
fn iota() {
    let strategy = (shape(1, 12, 1..=4), any::<prop::sample::Index>(), any::<u64>());
    property(cases(DType::I64), strategy, |(shape, axis, seed)| -> Checked {
        let mut trial = Trial::default();
        let axis = axis.index(shape.len());
        let x = trial.input(tensor(&mut Random::new(seed), DType::I64, &shape, Numbers::Any));
        let iota =
            trial.graph.add(Op::Iota(shape.iter().copied().collect(), axis as u8), &[], &origin());
        let mut along = vec![1i64; shape.len()];
        along[axis] = shape[axis] as i64;
        let torch = Tensor::arange(along[axis], (Kind::Int64, tch::Device::Cpu))
            .reshape(&along)
            .expand(crate::longs(&shape), false);
        trial.want(("iota", DType::I64), iota.clone(), torch.shallow_clone(), Bound::EXACT)?;
        let node = iota.map_err(|d| TestCaseError::fail(d.to_string()))?;
        assert_eq!(*trial.graph.ty(node), Type::new(DType::I64, &shape));
        let sum = trial.graph.binary(BinaryFn::Add, x.node, node, &origin());
        trial.want(("iota", DType::I64), sum, torch + &x.exact, Bound::EXACT)?;
        trial.check()
    });
}
