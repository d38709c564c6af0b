//! Reductions along axes that are not the last ones, on a GPU: where there are few results, the
//! threads of a block share what each of them folds.

use kiln_runtime::tensor::DType;

use super::gpu;
use super::gpu_pieces::{below, scaled, store, threads, unroll};
use super::ir::{BufferId, Expr, Kind, Place, Stmt, Var};
use super::lower::{Lower, Lowering, origin_place};
use super::nest::{coalesce, wrap};
use super::rewrite::{each_load, substitute};
use crate::graph::op::{Affine, ReduceFn};

/// Results that are enough for a thread each.
const ENOUGH: usize = 1 << 16;
/// Elements of a result that are not worth sharing.
const FEW: usize = 32;
/// Threads of a block, and those along its results at most.
const THREADS: usize = 256;
const ACROSS: usize = gpu::WARP;

/// A reduction in a thread: the first value of a cell, what each element does to it, and what
/// becomes of it.
pub struct Sum {
    /// What folds.
    pub f: ReduceFn,
    /// The cell.
    pub cell: BufferId,
    /// Its first value.
    pub start: Expr,
    /// A store to the cell.
    pub update: Stmt,
    /// A store of a result.
    pub result: Stmt,
}

/// The loops of a reduction over the axes of a result and those that are folded, where threads
/// share it.
pub fn shared(lower: &mut Lower, vars: [&[Var]; 2], sum: &Sum) -> Lowering<Option<Vec<Stmt>>> {
    let extents = lower.extents.clone();
    let made = joined(lower, vars, sum)?;
    if made.is_none() {
        // Loops that were joined are none.
        lower.extents = extents;
    }
    Ok(made)
}

fn joined(
    lower: &mut Lower,
    [vars, folded]: [&[Var]; 2],
    sum: &Sum,
) -> Lowering<Option<Vec<Stmt>>> {
    let [mut vars, mut folded] = [vars.to_vec(), folded.to_vec()];
    let all = vec![sum.update.clone(), sum.result.clone()];
    let all = coalesce(lower, &mut vars, all);
    let all = coalesce(lower, &mut folded, all);
    let [update, result] = &all[..] else { return Ok(None) };
    let count = |vars: &[Var]| vars.iter().map(|&v| lower.extents[v as usize]).product::<usize>();
    let whole = vars.iter().chain(&folded).all(|&v| lower.span(v).is_none());
    if !whole || count(&vars) > ENOUGH || count(&folded) < FEW {
        return Ok(None);
    }
    let Stmt::Store { value, .. } = update else { return Ok(None) };
    let beside = |v: Option<&Var>| {
        let mut found = false;
        each_load(value, &mut |_, place| {
            found |= v.is_some_and(|&v| place.affine.coefficient(v.into()) == 1);
        });
        found
    };
    let long = |v: Option<&Var>| v.is_some_and(|&v| lower.extents[v as usize] >= gpu::WARP);
    let dtype = lower.buffers[sum.cell].dtype;
    let folds = dtype.bytes() <= 4 && dtype != DType::Bool;
    let [across, along] = [vars.last(), folded.last()].map(beside);
    if across {
        columns(lower, (&vars, &folded), sum, [update, result])
    } else if along && long(folded.last()) && folds {
        rows(lower, (&vars, &folded), sum, [update, result])
    } else {
        Ok(None)
    }
}

/// A block for some neighbouring results: each thread folds a part for one of them, through shared
/// memory these become one.
fn columns(
    lower: &mut Lower,
    (vars, folded): (&[Var], &[Var]),
    sum: &Sum,
    [update, result]: [&Stmt; 2],
) -> Lowering<Option<Vec<Stmt>>> {
    let extent = |lower: &Lower, v: Var| lower.extents[v as usize];
    let Some((&last, outer)) = vars.split_last() else { return Ok(None) };
    // The longest of the folded axes is shared out.
    let Some(&deep) = folded.iter().max_by_key(|&&v| extent(lower, v)) else { return Ok(None) };
    let [width, depth] = [last, deep].map(|v| extent(lower, v));
    let across = width.next_power_of_two().min(ACROSS);
    let parts = (THREADS / across).min(1 << depth.ilog2());
    if parts < 2 {
        return Ok(None);
    }
    let (tile, own) = (lower.var(width.div_ceil(across))?, (lower.var(across)?, across));
    let (part, turn) = ((lower.var(parts)?, parts), lower.var(depth / parts)?);
    let column = scaled(tile, across).plus(own.0.into(), 1);
    let dtype = lower.buffers[sum.cell].dtype;
    let square = gpu::shared(lower, dtype, parts * across);
    let start = store(sum.cell, Affine::default(), sum.start.clone());
    let at = |stmt: &Stmt, index: &Affine| substitute(std::slice::from_ref(stmt), last, index);
    let step = |index: &Affine| substitute(&at(update, &column), deep, index);
    // All turns that all parts make, and then one that some do.
    let whole = scaled(turn, parts).plus(part.0.into(), 1);
    let rest = Affine { offset: (depth / parts * parts) as i64, ..scaled(part.0, 1) };
    let mut folds = vec![Stmt::For {
        var: turn,
        extent: depth / parts,
        kind: Kind::Serial,
        body: step(&whole),
    }];
    if !depth.is_multiple_of(parts) {
        folds.extend(below(lower, &rest, depth, step(&rest), Vec::new()));
    }
    let others: Vec<Var> = folded.iter().copied().filter(|&v| v != deep).collect();
    let mut body = vec![start.clone()];
    body.extend(wrap(&lower.extents, &others, folds, 0));
    let kept = Expr::Load(sum.cell, origin_place());
    body.push(store(square, scaled(part.0, across).plus(own.0.into(), 1), kept));
    let body = below(lower, &column, width, body, Vec::new());
    let mut out = threads(&[part, own], body);
    // Then a thread for each result.
    let (own, part) = ((lower.var(across)?, across), (lower.var(parts)?, parts));
    let column = scaled(tile, across).plus(own.0.into(), 1);
    let from = Place::affine(scaled(part.0, across).plus(own.0.into(), 1));
    let [before, more] =
        [(sum.cell, origin_place()), (square, from)].map(|(b, p)| Expr::Load(b, p).into());
    let value = Expr::Binary(sum.f.binary(dtype), before, more);
    let mut body = vec![start];
    body.extend(unroll(part, vec![store(sum.cell, Affine::default(), value)]));
    body.extend(substitute(std::slice::from_ref(result), last, &column));
    out.extend(threads(&[own], below(lower, &column, width, body, Vec::new())));
    let blocks: Vec<Var> = outer.iter().copied().chain([tile]).collect();
    gpu::blocks(lower, &blocks, out).map(Some)
}

/// A block for each result, whose threads go along the last of the folded axes.
fn rows(
    lower: &mut Lower,
    (vars, folded): (&[Var], &[Var]),
    sum: &Sum,
    [update, result]: [&Stmt; 2],
) -> Lowering<Option<Vec<Stmt>>> {
    let Some((&last, outer)) = folded.split_last() else { return Ok(None) };
    let extent = lower.extents[last as usize];
    lower.row_threads = 1 << extent.clamp(gpu::WARP, THREADS).ilog2();
    let mut body = vec![store(sum.cell, Affine::default(), sum.start.clone())];
    let (step, start) = (vec![update.clone()], sum.start.clone());
    body.extend(gpu::reduce(lower, sum.f, sum.cell, (last, outer), start, step)?);
    body.extend(gpu::pass(lower, Vec::new(), vec![result.clone()])?);
    gpu::blocks(lower, vars, body).map(Some)
}
