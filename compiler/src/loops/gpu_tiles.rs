//! Contractions on a GPU: a block of threads makes a tile of the result. Pieces of both operands
//! are brought into shared memory, where every element is read by many threads; each thread sums
//! four rows times four columns in registers.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{Product, plain_load};
use super::gpu;
use super::ir::{BufferId, Expr, Kind, Number, Param, Place, Scope, Stmt, Var};
use super::lower::{Lower, Lowering, origin_place};
use super::nest::{coalesce, is_vector, wrap};
use super::rewrite::{retarget, substitute};
use crate::graph::op::{Affine, BinaryFn};

/// Threads along each side of a tile.
const SIDE: usize = 16;
/// Rows and columns of a thread.
const OWN: usize = 4;
/// Rows and columns of a tile.
const TILE: usize = SIDE * OWN;
/// Products of a sum that are in shared memory at once.
const DEPTH: usize = 16;
/// How far apart the lines of a piece lie: not in the same banks, and aligned to 16 bytes.
const LINE: i64 = TILE as i64 + 4;
/// Axes of fewer elements are not tiled.
const LEAST: usize = 16;

/// The axes of a tile, and the operands that move along them.
struct Axes {
    /// Of rows, columns and the sum.
    m: Var,
    n: Var,
    k: Var,
    /// Loaded for rows, and for columns.
    operands: [Arc<Expr>; 2],
    /// The loops around tiles, and around the innermost one of the sum.
    outer: Vec<Var>,
    sums: Vec<Var>,
}

/// Variables of the threads of a tile.
#[derive(Clone, Copy)]
struct Threads {
    slow: Var,
    fast: Var,
}

impl Threads {
    fn all(self, body: Vec<Stmt>) -> Stmt {
        let kind = Kind::Thread;
        let inner = Stmt::For { var: self.fast, extent: SIDE, kind, body };
        Stmt::For { var: self.slow, extent: SIDE, kind, body: vec![inner] }
    }
}

fn axis(var: Var) -> Affine {
    Affine::axis(var as usize)
}

fn unroll(var: Var, extent: usize, body: Vec<Stmt>) -> Stmt {
    Stmt::For { var, extent, kind: Kind::Unroll, body }
}

fn store(buffer: BufferId, place: Affine, value: Expr) -> Stmt {
    Stmt::Store { buffer, place: Place::affine(place), value }
}

const ZERO: Expr = Expr::Const(DType::F32, Number::Float(0.0));

/// Statements where an index is below a bound; others where it is not. No question where it
/// always is.
fn below(
    index: &Affine,
    bound: usize,
    most: usize,
    then: Vec<Stmt>,
    other: Vec<Stmt>,
) -> Vec<Stmt> {
    if most <= bound {
        return then;
    }
    let bound = Arc::new(Expr::Const(DType::I64, Number::Int(bound as i128)));
    let condition = Expr::Binary(BinaryFn::Lt, Arc::new(Expr::Index(index.clone())), bound);
    vec![Stmt::If { condition, then, other }]
}

/// The statements of a contraction in tiles, where it has axes for them.
pub fn tiles(lower: &mut Lower, product: &Product) -> Lowering<Option<Vec<Stmt>>> {
    let [x, y] = product.operands.clone();
    if lower.target.threads < SIDE * SIDE {
        return Ok(None);
    }
    let cell = Arc::new(Expr::Load(product.cell, origin_place()));
    let update =
        Stmt::Store { buffer: product.cell, place: origin_place(), value: Expr::Fma(x, y, cell) };
    let result = Stmt::Store {
        buffer: product.out,
        place: product.place.clone(),
        value: (*product.result).clone(),
    };
    let whole = |v: &Var| lower.span(*v).is_none();
    if !product.vars.iter().chain(&product.summed).all(whole) {
        return Ok(None);
    }
    let (mut vars, mut sums) = (product.vars.clone(), product.summed.clone());
    let before = lower.extents.clone();
    let body = coalesce(lower, &mut vars, vec![update, result]);
    let body = coalesce(lower, &mut sums, body);
    let Some(axes) = axes(lower, &body, vars, sums) else {
        lower.extents = before;
        return Ok(None);
    };
    Ok(Some(tile(lower, &axes, product.cell, &body[1])?))
}

/// The axes that a tile can have.
fn axes(lower: &Lower, body: &[Stmt], vars: Vec<Var>, mut sums: Vec<Var>) -> Option<Axes> {
    let [Stmt::Store { value: Expr::Fma(x, y, _), .. }, _] = body else { return None };
    let loads = [plain_load(x)?, plain_load(y)?];
    if loads.iter().any(|l| lower.buffers[l.0].dtype != DType::F32) {
        return None;
    }
    let moves = |side: usize, v: Var| loads[side].1.coefficient(v as usize) != 0;
    let long = |v: &Var| lower.extents[*v as usize] >= LEAST;
    let only = |side: usize, v: Var| moves(side, v) && !moves(1 - side, v);
    let k = sums.pop().filter(|k| long(k) && moves(0, *k) && moves(1, *k))?;
    let n = vars.iter().rev().copied().find(|v| long(v) && (only(0, *v) || only(1, *v)))?;
    let side = usize::from(only(1, n));
    let m = vars.iter().rev().copied().find(|v| long(v) && only(1 - side, *v))?;
    let operands = if side == 1 { [x.clone(), y.clone()] } else { [y.clone(), x.clone()] };
    let outer = vars.into_iter().filter(|v| *v != m && *v != n).collect();
    Some(Axes { m, n, k, operands, outer, sums })
}

/// Blocks of threads, one for each tile.
fn tile(lower: &mut Lower, axes: &Axes, cell: BufferId, result: &Stmt) -> Lowering<Vec<Stmt>> {
    let extent = |v: Var| lower.extents[v as usize];
    let [rows, columns, depth] = [axes.m, axes.n, axes.k].map(extent);
    let tiles = [rows, columns].map(|n| n.div_ceil(TILE));
    let [across, down] = [lower.var(tiles[0])?, lower.var(tiles[1])?];
    let threads = Threads { slow: lower.var(SIDE)?, fast: lower.var(SIDE)? };
    let [piece, i, j] = [lower.var(depth.div_ceil(DEPTH))?, lower.var(OWN)?, lower.var(OWN)?];
    let start = |block: Var| Affine::scaled(block as usize, TILE as i64);
    let line = Affine::scaled(threads.slow as usize, OWN as i64);
    let column = Affine::scaled(threads.fast as usize, OWN as i64);
    // Each thread has its own sums.
    let sums = lower.register(DType::F32, TILE * TILE);
    let own = Affine::scaled(threads.slow as usize, (SIDE * OWN * OWN) as i64)
        .plus(threads.fast as usize, (OWN * OWN) as i64)
        .plus(i as usize, OWN as i64)
        .plus(j as usize, 1);
    let lanes = columns.is_multiple_of(OWN)
        && is_vector(&lower.buffers, std::slice::from_ref(result), axes.n);
    let each = |body: Vec<Stmt>| {
        let kind = if lanes { Kind::Vector } else { Kind::Unroll };
        vec![Stmt::For { var: j, extent: OWN, kind, body }]
    };
    let mut pieces = Vec::new();
    let mut inside = Vec::new();
    for (side, (own, block)) in [(axes.m, across), (axes.n, down)].into_iter().enumerate() {
        let len = DEPTH * LINE as usize;
        lower.buffers.push(super::ir::Buffer {
            dtype: DType::F32,
            len,
            scope: Scope::Shared,
            param: Param::None,
        });
        pieces.push(lower.buffers.len() - 1);
        let operand = (&axes.operands[side], own, axes.k);
        inside.push(bring(lower, operand, (pieces[side], start(block), piece), threads)?);
    }
    let turn = lower.var(DEPTH)?;
    let at =
        |place: &Affine, more: Var| place.clone().plus(turn as usize, LINE).plus(more as usize, 1);
    let load =
        |side: usize, place: Affine| Arc::new(Expr::Load(pieces[side], Place::affine(place)));
    let before = Arc::new(Expr::Load(sums, Place::affine(own.clone())));
    let value = Expr::Fma(load(0, at(&line, i)), load(1, at(&column, j)), before);
    let update = unroll(i, OWN, each(vec![store(sums, own.clone(), value)]));
    inside.push(threads.all(vec![unroll(turn, DEPTH, vec![update])]));
    let first = unroll(i, OWN, each(vec![store(sums, own.clone(), ZERO)]));
    let mut body = vec![threads.all(vec![first])];
    let loops: Vec<Var> = axes.sums.iter().copied().chain([piece]).collect();
    body.extend(wrap(&lower.extents, &loops, inside, 0));
    // The end: each element where there is one.
    let plus = |start: Affine, more: &Affine| {
        more.terms.iter().fold(start, |sum, t| sum.plus(t.0 as usize, t.1))
    };
    let row = plus(start(across), &line).plus(i as usize, 1);
    let first_column = plus(start(down), &column);
    let place = first_column.clone().plus(j as usize, 1);
    let end = retarget(std::slice::from_ref(result), cell, sums, &own);
    let end = substitute(&substitute(&end, axes.m, &row), axes.n, &place);
    let reach = tiles.map(|n| n * TILE);
    let end = match lanes {
        true => below(&first_column, columns - OWN + 1, reach[1] - OWN + 1, each(end), Vec::new()),
        false => each(below(&place, columns, reach[1], end, Vec::new())),
    };
    let end = below(&row, rows, reach[0], end, Vec::new());
    body.push(threads.all(vec![unroll(i, OWN, end)]));
    let loops: Vec<Var> = axes.outer.iter().copied().chain([across, down]).collect();
    gpu::blocks(lower, &loops, body)
}

/// Brings a piece of an operand into shared memory, zeros beyond its ends: neighbours in memory by
/// neighbouring threads.
fn bring(
    lower: &mut Lower,
    (operand, own, k): (&Arc<Expr>, Var, Var),
    (shared, start, piece): (BufferId, Affine, Var),
    threads: Threads,
) -> Lowering<Stmt> {
    let along = plain_load(operand).is_some_and(|l| l.1.coefficient(k as usize) == 1);
    let (across, deep) = match along {
        true => (threads.slow, threads.fast),
        false => (threads.fast, threads.slow),
    };
    let turn = lower.var(OWN)?;
    let line = axis(across).plus(turn as usize, SIDE as i64);
    let line_index = line.terms.iter().fold(start, |sum, t| sum.plus(t.0 as usize, t.1));
    let deep_index = axis(deep).plus(piece as usize, DEPTH as i64);
    let place = line.plus(deep as usize, LINE);
    let copy = vec![store(shared, place.clone(), (**operand).clone())];
    let copy = substitute(&substitute(&copy, own, &line_index), k, &deep_index);
    let zero = vec![store(shared, place, ZERO)];
    let [lines, depth] = [own, k].map(|v| lower.extents[v as usize]);
    let reach = lines.next_multiple_of(TILE);
    let copy = below(&line_index, lines, reach, copy, zero.clone());
    let copy = below(&deep_index, depth, depth.next_multiple_of(DEPTH), copy, zero);
    Ok(threads.all(vec![unroll(turn, OWN, copy)]))
}
