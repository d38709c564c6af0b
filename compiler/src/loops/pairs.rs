//! Sums of products of short integers, two products at a time.
//!
//! Both operands are i16 that the contraction widens. The one that is broadcast has neighbours
//! along the sum side by side in memory, so that a pair of them is read as one i32; the other one
//! is packed with its pairs side by side. Products and sums are i32, as those that they stand for.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{Product, Strip, plain_load};
use super::ir::{BufferId, Expr, Loops, Param, Place, Scope, Var};
use super::lower::{Lower, Lowering};
use super::nest;
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

/// A kernel that packs an operand into panels, as [`contract::pack`](super::contract::pack) says;
/// for pairs of elements that lie so far apart the panels are `[..][width][2]`.
pub fn pack(
    lower: &Lower,
    source: BufferId,
    affine: &Affine,
    (order, n): (&[Var], Var),
    strip: Strip,
    (scratch, offset): (usize, usize),
    halves: Option<i64>,
) -> Lowering<(Loops, Affine)> {
    let mut packer = lower.fresh();
    let from = &lower.buffers[source];
    let dtype = from.dtype;
    let source = packer.buffer(dtype, from.len, Scope::Global, from.param);
    let count = if halves.is_some() { 2 } else { 1 };
    let len = count * affine.terms.iter().map(|t| lower.extents[t.0 as usize]).product::<usize>();
    let to = packer.buffer(dtype, len, Scope::Global, Param::Scratch(scratch));
    // Outer axes of the result come before the tile in memory, as they do in the loops.
    let tile = packer.var(strip.tiles)?;
    let inner: Vec<Var> =
        order.iter().map(|&v| packer.var(lower.extents[v as usize])).collect::<Lowering<_>>()?;
    let element = packer.var(strip.width)?;
    let half = halves.map(|_| packer.var(2)).transpose()?;
    let mut packed = Affine { offset: offset as i64, ..Affine::scaled(254, count as i64) };
    let mut step = (strip.width * count) as i64;
    for &v in order.iter().rev() {
        packed = packed.plus(v as usize, step);
        step *= lower.extents[v as usize] as i64;
    }
    packed = packed.plus(255, step);
    let place = packed.substitute(&|v| match v {
        255 => Affine::axis(tile as usize),
        254 => Affine::axis(element as usize),
        v => Affine::axis(inner[order.iter().position(|&o| o as usize == v).unwrap_or(0)] as usize),
    });
    let n_index = Affine {
        offset: strip.start as i64,
        ..Affine::scaled(tile as usize, strip.width as i64).plus(element as usize, 1)
    };
    let read = affine.substitute(&|v| match order.iter().position(|&o| o as usize == v) {
        Some(at) => Affine::axis(inner[at] as usize),
        None if v == n as usize => n_index.clone(),
        None => Affine::constant(0),
    });
    let mut vars = vec![tile];
    vars.extend(inner);
    vars.push(element);
    let (mut place, mut read) = (place, read);
    if let (Some(half), Some(step)) = (half, halves) {
        vars.push(half);
        place = place.plus(half as usize, 1);
        read = read.plus(half as usize, step);
    }
    let value = Arc::new(Expr::Load(source, Place::affine(read)));
    Ok((nest::store_nest(packer, vars, to, Place::affine(place), value), packed))
}
