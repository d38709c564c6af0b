//! Sums of products of short integers, two products at a time.
//!
//! Both operands are i16 that the contraction widens. The one that is broadcast has neighbours
//! along the sum side by side in memory, so that a pair of them is read as one i32; the other one
//! is packed with its pairs side by side. Products and sums are i32, as those that they stand for.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{Product, plain_load};
use super::ir::{Expr, Place, Var};
use super::lower::{Lower, Lowering};
use crate::graph::op::Affine;

/// The i16 that an i32 is widened from.
fn short<'e>(lower: &Lower, e: &'e Expr) -> Option<(usize, &'e Affine)> {
    let Expr::Cast(DType::I32, x) = e else { return None };
    plain_load(x).filter(|l| lower.buffers[l.0].dtype == DType::I16)
}

/// The product as a sum over pairs, where it is one: the innermost axis of the sum along which the
/// operand that is broadcast steps by one element has half as many turns.
pub fn paired(lower: &mut Lower, product: &Product) -> Lowering<Option<Product>> {
    let loads = [0, 1].map(|k: usize| short(lower, &product.operands[k]));
    let ([Some(x), Some(y)], Some(&n)) = (loads, product.vars.last()) else { return Ok(None) };
    let along = |load: (usize, &Affine), var: Var| load.1.coefficient(var as usize);
    let lanes = match [along(x, n), along(y, n)] {
        [0, s] if s != 0 => 1,
        [s, 0] if s != 0 => 0,
        _ => return Ok(None),
    };
    let (panel, other) = if lanes == 1 { (y, x) } else { (x, y) };
    let fits = |&&var: &&Var| {
        along(other, var) == 1
            && along(panel, var) != 0
            && lower.extents[var as usize].is_multiple_of(2)
            && lower.span(var).is_none()
    };
    let Some(&whole) = product.summed.iter().find(fits) else { return Ok(None) };
    let halves = along(panel, whole);
    let extent = lower.extents[whole as usize] / 2;
    let half = lower.var(extent)?;
    let twice = |affine: &Affine| {
        affine.substitute(&|v| match v == whole as usize {
            true => Affine::scaled(half as usize, 2),
            false => Affine::axis(v),
        })
    };
    let pair = |load: (usize, &Affine)| Arc::new(Expr::Pair(load.0, Place::affine(twice(load.1))));
    let operands = [pair(x), pair(y)];
    let summed = product.summed.iter().map(|&v| if v == whole { half } else { v });
    Ok(Some(Product {
        vars: product.vars.clone(),
        summed: summed.collect(),
        operands,
        cell: product.cell,
        out: product.out,
        place: product.place.clone(),
        result: product.result.clone(),
        halves: Some(halves),
    }))
}
