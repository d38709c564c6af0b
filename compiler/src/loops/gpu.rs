//! Schedules for machines with thousands of threads: every element of a result has one of its own,
//! or the threads of a block share a row.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::gpu_turn::turned;
use super::ir::{BufferId, Expr, Kind, Param, Place, Scope, Stmt, Var};
use super::lanes::is_vector_of;
use super::lower::{Lower, Lowering, Refused, origin_place};
use super::nest::{coalesce, wrap};
use super::rewrite::{rewrite, substitute};
use crate::graph::op::{Affine, ReduceFn};
use crate::graph::used::span;

/// Elements that a thread reads and writes at once: 16 bytes of f32.
pub const VECTOR: usize = 4;

/// A thread for every turn of the loops over the axes of the result, or for four neighbours.
pub fn nest(lower: &mut Lower, mut vars: Vec<Var>, body: Vec<Stmt>) -> Vec<Stmt> {
    let mut body = coalesce(lower, &mut vars, body);
    if let Some(body) = turned(lower, &vars, &body) {
        return body;
    }
    if let Some(&inner) = vars.last()
        && let Some((outer, inside)) = in_vectors(lower, inner, &body)
    {
        vars.pop();
        vars.extend(outer);
        body = inside;
    }
    wrap(&lower.extents, &vars, body, vars.len())
}

/// Whether the turns of a loop can be the lanes of a thread, which computes short floats as f32.
pub fn is_vector(lower: &Lower, body: &[Stmt], var: Var) -> bool {
    is_vector_of(&lower.buffers, body, var, |dtype| match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    })
}

/// Statements for four neighbours along an axis, where all that they touch lies so.
fn in_vectors(lower: &mut Lower, inner: Var, body: &[Stmt]) -> Option<(Option<Var>, Vec<Stmt>)> {
    let extent = lower.extents[inner as usize];
    let stores = body.iter().all(|s| matches!(s, Stmt::Store { .. }));
    let fits = stores && extent.is_multiple_of(VECTOR) && lower.span(inner).is_none();
    if !fits || !is_vector(lower, body, inner) {
        return None;
    }
    let (outer, lane) = (lower.var(extent / VECTOR).ok()?, lower.var(VECTOR).ok()?);
    let index = Affine::scaled(outer as usize, VECTOR as i64).plus(lane as usize, 1);
    let body = substitute(body, inner, &index);
    let vector = Stmt::For { var: lane, extent: VECTOR, kind: Kind::Vector, body };
    Some((Some(outer), vec![vector]))
}

/// Rows of fewer elements are not shared, and those of fewer than the other by a warp at least.
const SHARED_ROW: usize = 16;
const LONG_ROW: usize = 64;
/// Elements of a row for each of its threads at least: of long rows, and of those that a part of a
/// warp shares.
const EACH: usize = 16;
const FEW: usize = 8;
/// Threads of a warp.
pub const WARP: usize = 32;
/// Threads that share a row at least, and at most.
const PART: usize = 4;
const MOST: usize = 1024;
/// Threads of a block of several rows at most, and the fewest blocks of such.
const BLOCK: usize = 128;
const BLOCKS: usize = 256;

/// How many threads share each of these many rows of a shape that these nodes fold; 0 where each
/// row has its own.
pub fn row_threads(lower: &Lower, rows: &[usize], shape: &[usize], reduces: &[usize]) -> usize {
    let elements: usize = shape.iter().product();
    let fits = |&reduce: &usize| {
        let operand = lower.ty(lower.body.nodes[reduce].args[0].index());
        let whole = (0..operand.rank()).all(|axis| span(operand, axis).is_none());
        // Shuffles move registers of 32 bits; bools are in predicates.
        let moves = operand.dtype.bytes() <= 4 && operand.dtype != DType::Bool;
        whole && moves && !lower.is_part()
    };
    // All loops over the row end with the last axis, whose elements threads share.
    let last = shape.last().copied().unwrap_or(0);
    if lower.target.threads == 0 || !reduces.iter().all(fits) || last < SHARED_ROW {
        return 0;
    }
    let power = |n: usize| 1 << n.max(1).ilog2();
    let part = power(last / FEW).clamp(PART, WARP);
    if rows.iter().any(|n| n.is_multiple_of(WARP / part)) && part < WARP {
        return part;
    }
    let threads = power((elements.min(last) / EACH).clamp(WARP, MOST));
    if elements >= LONG_ROW && last >= WARP { threads } else { 0 }
}

/// A buffer that the threads of a block share.
pub fn shared(lower: &mut Lower, dtype: DType, len: usize) -> BufferId {
    lower.buffer(dtype, len, Scope::Shared, Param::None)
}

/// A loop over threads.
fn threads(var: Var, extent: usize, body: Vec<Stmt>) -> Stmt {
    Stmt::For { var, extent, kind: Kind::Thread, body }
}

/// The lane of neighbours of a loop that threads take at once, where they can.
fn neighbours(lower: &mut Lower, last: Var, body: &[Stmt], can: bool) -> Lowering<Option<Var>> {
    let stores = body.iter().all(|s| matches!(s, Stmt::Store { .. }));
    let extent = lower.extents[last as usize];
    let takes = can && stores && extent.is_multiple_of(VECTOR) && is_vector(lower, body, last);
    let takes = match &lower.form {
        None => takes,
        Some(form) if form.near == 1 => false,
        Some(_) if takes => true,
        Some(_) => return Err(Refused("a pass over a row without neighbours".into())),
    };
    if takes { lower.var(VECTOR).map(Some) } else { Ok(None) }
}

/// Statements for every turn of a loop, by all threads: each takes one turn after another, as many
/// apart as there are threads, or some neighbours in lanes. Where there are parts of a cell, each
/// thread has one of them for it, or one for each lane.
fn shared_out(
    lower: &mut Lower,
    (last, outer): (Var, &[Var]),
    body: &[Stmt],
    (parts, lane): (Option<(BufferId, BufferId)>, Option<Var>),
) -> Lowering<Vec<Stmt>> {
    let (extent, all) = (lower.extents[last as usize], lower.row_threads);
    let near = if lane.is_some() { VECTOR } else { 1 };
    let (whole, rest) = (extent / (all * near), extent % (all * near) / near);
    let mut loops: Vec<usize> = outer.iter().map(|&v| lower.extents[v as usize]).collect();
    let turns = loops.iter().product::<usize>() * (whole + usize::from(rest > 0));
    loops.push(extent);
    if let Some(form) = &mut lower.form {
        form.goes(loops, turns)?;
    }
    let mut out = Vec::new();
    for (start, turns, width) in [(0, whole, all), (whole * all * near, 1, rest)] {
        if turns == 0 || width == 0 {
            continue;
        }
        let (thread, turn) = (lower.var(width)?, lower.var(turns)?);
        let own = Affine::scaled(thread as usize, near as i64);
        let own = lane.iter().fold(own, |own, &lane| own.plus(lane as usize, 1));
        let at = Affine { offset: start as i64, ..own.clone() };
        let at = at.plus(turn as usize, (all * near) as i64);
        let index = |a: &Affine| {
            a.substitute(&|v| if v == last as usize { at.clone() } else { Affine::axis(v) })
        };
        let loops: Vec<Var> = outer.iter().copied().chain([turn]).collect();
        let own = parts.map(|(cell, parts)| (cell, parts, own));
        let body = in_lane(lane, rewrite(body, &index, own.as_slice()));
        out.push(threads(thread, width, turns_of(lower, &loops, body)));
    }
    Ok(out)
}

/// Loops of one thread over its elements of a row: written out where it keeps these in registers.
fn turns_of(lower: &Lower, loops: &[Var], body: Vec<Stmt>) -> Vec<Stmt> {
    let kind = if lower.form.is_some() { Kind::Unroll } else { Kind::Serial };
    loops.iter().rev().fold(body, |body, &var| {
        vec![Stmt::For { var, extent: lower.extents[var as usize], kind, body }]
    })
}

/// Statements in the lanes of a variable, where there is one.
fn in_lane(lane: Option<Var>, body: Vec<Stmt>) -> Vec<Stmt> {
    match lane {
        Some(var) => vec![Stmt::For { var, extent: VECTOR, kind: Kind::Vector, body }],
        None => body,
    }
}

/// Statements over the axes of a row that threads share.
pub fn pass(lower: &mut Lower, mut vars: Vec<Var>, body: Vec<Stmt>) -> Lowering<Vec<Stmt>> {
    let Some(last) = vars.pop() else { return Ok(vec![threads(lower.var(1)?, 1, body)]) };
    let lane = neighbours(lower, last, &body, true)?;
    shared_out(lower, (last, &vars), &body, (None, lane))
}

/// Statements that fold into a cell for every turn of `last`: each thread folds its own part, then
/// all of them together.
pub fn reduce(
    lower: &mut Lower,
    f: ReduceFn,
    cell: BufferId,
    (last, outer): (Var, &[Var]),
    start: Expr,
    step: Vec<Stmt>,
) -> Lowering<Vec<Stmt>> {
    let (dtype, all) = (lower.buffers[cell].dtype, lower.row_threads);
    let lane = neighbours(lower, last, &step, dtype == DType::F32)?;
    let near = if lane.is_some() { VECTOR } else { 1 };
    let parts = lower.register(dtype, all * near);
    let thread = lower.var(all)?;
    let own = Affine::scaled(thread as usize, near as i64);
    let own = Place::affine(lane.iter().fold(own, |own, &lane| own.plus(lane as usize, 1)));
    let first = Stmt::Store { buffer: parts, place: own, value: start };
    let mut out = vec![threads(thread, all, in_lane(lane, vec![first]))];
    out.extend(shared_out(lower, (last, outer), &step, (Some((cell, parts)), lane))?);
    let before = Arc::new(Expr::Load(cell, origin_place()));
    let value = Expr::Binary(f.binary(dtype), before, Arc::new(Expr::Fold(f, parts)));
    out.push(Stmt::Store { buffer: cell, place: origin_place(), value });
    Ok(out)
}

/// Blocks of some rows each, where a warp or a part of one shares a row: statements for the rows of
/// a block, with `vars` over blocks.
pub fn grouped(lower: &mut Lower, vars: &mut [Var], body: Vec<Stmt>) -> Lowering<Vec<Stmt>> {
    let (width, rows) = (lower.row_threads, vars.iter().map(|&v| lower.extents[v as usize]));
    let total: usize = rows.product();
    // Shuffles are for whole warps.
    let least = WARP.div_ceil(width);
    let counts = std::iter::successors(Some(BLOCK / width), |n| Some(n / 2));
    let mut counts = counts.take_while(|&n| n >= least && n > 1 && width <= WARP);
    let enough = |n: usize| n == least || total >= n * BLOCKS;
    let split = counts.find_map(|n| {
        let fits = |&at: &usize| lower.extents[vars[at] as usize].is_multiple_of(n);
        if enough(n) { Some((n, (0..vars.len()).rev().find(fits)?)) } else { None }
    });
    let Some((count, at)) = split else { return Ok(body) };
    let (block, row) = (lower.var(lower.extents[vars[at] as usize] / count)?, lower.var(count)?);
    let index = Affine::scaled(block as usize, count as i64).plus(row as usize, 1);
    let body = substitute(&body, vars[at], &index);
    vars[at] = block;
    Ok(vec![threads(row, count, body)])
}

/// Loops over blocks around statements, one at least.
pub fn blocks(lower: &mut Lower, vars: &[Var], body: Vec<Stmt>) -> Lowering<Vec<Stmt>> {
    let single = if vars.is_empty() { Some(lower.var(1)?) } else { None };
    Ok(vars.iter().chain(&single).rev().fold(body, |body, &var| {
        let extent = lower.extents[var as usize];
        vec![Stmt::For { var, extent, kind: Kind::Block, body }]
    }))
}
