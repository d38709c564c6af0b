//! Indices while a kernel is lowered: affine where possible, else integer expressions, with the
//! views of the graph as functions from result index to operand index.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::ir::{Expr, Number, Place};
use crate::graph::eval::strides;
use crate::graph::op::{Affine, BinaryFn};

/// Extents of the loop variables so far; indices know their range from these.
pub type Extents = Vec<usize>;

/// One index: `affine + dynamic`, like a place.
pub type Index = Place;

fn number(value: i64) -> Expr {
    Expr::Const(DType::I64, Number::Int(value as i128))
}

/// The index as one value.
pub fn to_expr(index: &Index) -> Expr {
    match &index.dynamic {
        None => Expr::Index(index.affine.clone()),
        Some(dynamic) if index.affine == Affine::default() => (**dynamic).clone(),
        Some(dynamic) => {
            binary(BinaryFn::Add, Expr::Index(index.affine.clone()), (**dynamic).clone())
        }
    }
}

fn binary(f: BinaryFn, x: Expr, y: Expr) -> Expr {
    Expr::Binary(f, Arc::new(x), Arc::new(y))
}

/// The index that a value gives.
pub fn from_expr(e: Expr) -> Index {
    Index { affine: Affine::default(), dynamic: Some(Arc::new(e)) }
}

/// `index * factor + offset`
pub fn scale(index: &Index, factor: i64, offset: i64) -> Index {
    let mut affine = index.affine.substitute(&Affine::axis);
    affine.terms.iter_mut().for_each(|t| t.1 *= factor);
    affine.terms.retain(|t| t.1 != 0);
    affine.offset = affine.offset * factor + offset;
    let dynamic = index.dynamic.as_ref().filter(|_| factor != 0).map(|d| match factor {
        1 => d.clone(),
        _ => Arc::new(binary(BinaryFn::Mul, (**d).clone(), number(factor))),
    });
    Index { affine, dynamic }
}

/// `x + y`
pub fn add(x: &Index, y: &Index) -> Index {
    let mut affine = y.affine.terms.iter().fold(x.affine.clone(), |a, t| a.plus(t.0 as usize, t.1));
    affine.offset += y.affine.offset;
    let dynamic = match (&x.dynamic, &y.dynamic) {
        (Some(a), Some(b)) => Some(Arc::new(binary(BinaryFn::Add, (**a).clone(), (**b).clone()))),
        (a, b) => a.clone().or(b.clone()),
    };
    Index { affine, dynamic }
}

/// `index / divisor` and `index % divisor` of an index that is never negative.
pub fn div_rem(index: &Index, divisor: usize, extents: &Extents) -> (Index, Index) {
    let zero = Place::affine(Affine::default());
    if divisor == 1 {
        return (index.clone(), zero);
    }
    if index.dynamic.is_none() {
        let d = divisor as i64;
        let (mut quotient, mut rest) = (Affine::default(), Affine::default());
        for &(axis, c) in &index.affine.terms {
            match c % d {
                0 => quotient = quotient.plus(axis as usize, c / d),
                _ => rest = rest.plus(axis as usize, c),
            }
        }
        quotient.offset = index.affine.offset.div_euclid(d);
        rest.offset = index.affine.offset.rem_euclid(d);
        let (low, high) = rest.range(extents);
        if low >= 0 && high < d {
            return (Place::affine(quotient), Place::affine(rest));
        }
    }
    let whole = to_expr(index);
    let quotient = binary(BinaryFn::Div, whole.clone(), number(divisor as i64));
    (from_expr(quotient), from_expr(binary(BinaryFn::Rem, whole, number(divisor as i64))))
}

/// The flat row-major place of an index into a shape.
pub fn flatten(index: &[Index], shape: &[usize]) -> Place {
    let zero = Place::affine(Affine::default());
    index
        .iter()
        .zip(strides(shape))
        .fold(zero, |sum, (i, step)| add(&sum, &scale(i, step as i64, 0)))
}

/// The index into a shape of a flat row-major place.
pub fn unflatten(place: &Place, shape: &[usize], extents: &Extents) -> Vec<Index> {
    let mut index = vec![Place::affine(Affine::default()); shape.len()];
    let mut rest = place.clone();
    for d in (0..shape.len()).rev() {
        if shape[d] == 1 {
            continue;
        }
        // The outermost axis that is left takes all of the rest.
        if shape[..d].iter().all(|&e| e == 1) {
            index[d] = rest;
            break;
        }
        let (quotient, remainder) = div_rem(&rest, shape[d], extents);
        index[d] = remainder;
        rest = quotient;
    }
    index
}

/// The index into a shape that repeats to a larger one.
pub fn repeat_index(index: &[Index], shape: &[usize]) -> Vec<Index> {
    index
        .iter()
        .zip(shape)
        .map(|(i, &extent)| if extent == 1 { Place::affine(Affine::default()) } else { i.clone() })
        .collect()
}

/// The least of the index and a bound and the greatest of that and 0: for indices from data.
pub fn clamp(value: Expr, extent: usize) -> Expr {
    let below = binary(BinaryFn::Min, value, number(extent as i64 - 1));
    binary(BinaryFn::Max, below, number(0))
}

/// An index from data as Gather reads it: negative ones count from the end.
pub fn from_end(value: Expr, length: Expr) -> Expr {
    let negative = binary(BinaryFn::Lt, value.clone(), number(0));
    let moved = binary(BinaryFn::Add, value.clone(), length);
    Expr::Select(Arc::new(negative), Arc::new(moved), Arc::new(value))
}

/// `0 <= value < extent`
pub fn inside(value: Expr, extent: usize) -> Expr {
    let low = binary(BinaryFn::Le, number(0), value.clone());
    let high = binary(BinaryFn::Lt, value, number(extent as i64));
    binary(BinaryFn::And, low, high)
}

/// The greatest power of two that surely divides an index, of 2^16 at most.
pub fn multiple_of(e: &Expr) -> i64 {
    let of = |n: i64| 1 << n.trailing_zeros().min(16);
    match e {
        Expr::Index(index) => index.terms.iter().map(|t| of(t.1)).fold(of(index.offset), i64::min),
        Expr::Const(_, Number::Int(v)) => of(*v as i64),
        Expr::Cast(to, x) if !to.is_float() && to.bytes() >= 4 => multiple_of(x),
        Expr::Binary(BinaryFn::Mul, x, y) => (multiple_of(x) * multiple_of(y)).min(1 << 16),
        // What is left over, too.
        Expr::Binary(BinaryFn::Add | BinaryFn::Rem, x, y) => multiple_of(x).min(multiple_of(y)),
        _ => 1,
    }
}
