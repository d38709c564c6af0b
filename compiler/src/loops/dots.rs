//! Products whose last axis is shorter than a vector, such as that of a classifier of few classes:
//! the sum goes into lanes, and every result of a row is a dot product, folded at its end.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{Product, plain_load, repacked, zero};
use super::ir::{Expr, Kind, Loops, Place, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, origin_place};
use super::panels::packable;
use super::{nest, rewrite};
use crate::graph::op::{Affine, BinaryFn, ReduceFn};

/// Vectors of a sum at least, for a fold to be worth it.
const VECTORS: usize = 2;

/// The kernel of a product that is best summed in lanes; none where it is not of that kind. What
/// is constant is packed so that the sum reads neighbours.
pub fn lower(parent: &Lower, product: &Product, lowered: &mut Lowered) -> Lowering<Option<Loops>> {
    let Some((&n, rows)) = product.vars.split_last() else { return Ok(None) };
    let Some(sum) = sum_in_lanes(parent, product, n) else { return Ok(None) };
    let mut lower = parent.copy();
    let [mut x, mut y] = product.operands.clone();
    for operand in [&mut x, &mut y] {
        *operand = repacked(&mut lower, operand, product, sum, lowered)?;
    }
    let (lanes, extent) = (lower.target.lanes, lower.extents[usize::from(sum)]);
    let (steps, rest) = (extent / lanes, extent % lanes);
    let (lane, step, last) = (lower.var(lanes)?, lower.var(steps)?, lower.var(rest.max(1))?);
    let in_lanes = Affine::scaled(step.into(), lanes as i64).plus(lane.into(), 1);
    let one_by_one = Affine { offset: (steps * lanes) as i64, ..Affine::axis(last.into()) };
    let store = |buffer, place, value| Stmt::Store { buffer, place, value };
    let load = |buffer, place| Arc::new(Expr::Load(buffer, place));
    // Of each result: the start of its sum, its steps in lanes and one by one, and its end.
    let [mut wide, mut wide_steps, mut starts, mut single_steps, mut ends] =
        [const { Vec::new() }; 5];
    for result in 0..lower.extents[usize::from(n)] {
        let here =
            |s: Stmt| rewrite::substitute(&[s], n, &Affine::constant(result as i64)).into_iter();
        let [vector, cell] = [lanes, 1].map(|len| lower.register(DType::F32, len));
        let at = Place::affine(Affine::axis(lane.into()));
        let add = |to, place: Place| {
            let before = load(to, place.clone());
            here(store(to, place, Expr::Fma(x.clone(), y.clone(), before)))
        };
        wide.push(store(vector, at.clone(), zero(DType::F32)));
        wide_steps.extend(add(vector, at));
        starts.push(store(cell, origin_place(), zero(DType::F32)));
        single_steps.extend(add(cell, origin_place()));
        let folded = Arc::new(Expr::Fold(ReduceFn::Sum, vector));
        let all = Expr::Binary(BinaryFn::Add, load(cell, origin_place()), folded);
        ends.push(store(cell, origin_place(), all));
        let out = store(product.out, product.place.clone(), (*product.result).clone());
        let out: Vec<Stmt> = here(out).collect();
        ends.extend(rewrite::retarget(&out, product.cell, cell, &Affine::default()));
    }
    let vector = |body| vec![Stmt::For { var: lane, extent: lanes, kind: Kind::Vector, body }];
    let sums = |body: Vec<Stmt>, inner, index: &Affine| {
        let others = product.summed.iter().copied().filter(|&v| v != sum);
        let vars: Vec<Var> = others.chain([inner]).collect();
        nest::wrap(&lower.extents, &vars, rewrite::substitute(&body, sum, index), 0)
    };
    let mut body = vector(wide);
    body.extend(sums(vector(wide_steps), step, &in_lanes));
    body.extend(starts);
    if rest > 0 {
        body.extend(sums(single_steps, last, &one_by_one));
    }
    body.extend(ends);
    let body = nest::wrap(&lower.extents, rows, body, rows.len());
    lower.buffers[product.cell].len = 1;
    Ok(Some(lower.finish(body)))
}

/// The axis of the sum that goes into lanes: the longest of those along which both operands step by
/// one element, or can be packed so that they do.
fn sum_in_lanes(lower: &Lower, product: &Product, n: Var) -> Option<Var> {
    let lanes = lower.target.lanes;
    let extent = |v: Var| lower.extents[usize::from(v)];
    let operands = [plain_load(&product.operands[0])?, plain_load(&product.operands[1])?];
    let float = operands.iter().all(|o| lower.buffers[o.0].dtype == DType::F32);
    let fixed = product.vars.iter().chain(&product.summed).all(|&v| lower.span(v).is_none());
    let short = extent(n) < lanes && product.parts.is_none();
    if !(float && fixed && short) {
        return None;
    }
    let neighbours = |v: Var| {
        operands.iter().all(|&(buffer, place)| match place.coefficient(v.into()) {
            1 => true,
            0 => false,
            _ => lower.is_constant(buffer) && packable(lower, (buffer, place)),
        })
    };
    let long = |v: &Var| extent(*v) >= VECTORS * lanes && neighbours(*v);
    product.summed.iter().copied().filter(long).max_by_key(|&v| extent(v))
}
