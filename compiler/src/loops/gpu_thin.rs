//! Products of few rows on a GPU, such as those of one token with weights: what counts is that all
//! weights are read once, by as many threads as there can be. The threads of a block share a sum,
//! and fold it in an order that is always the same.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::zero;
use super::flat::{Flat, Group, sum};
use super::gpu;
use super::gpu_pieces::{Operand, below, in_groups, scaled, store, threads, unroll, vector};
use super::gpu_tiles::Axes;
use super::ir::{BufferId, Expr, Kind, Place, Stmt, Var};
use super::lower::{Lower, Lowering, origin_place};
use super::rewrite::{computed, retarget};
use crate::graph::op::{Affine, BinaryFn, ReduceFn};

/// Neighbours that a thread reads at once.
const NEAR: usize = 4;
/// Sums of fewer products are not shared.
const LEAST: usize = 64;
/// Rows at most: each thread has a sum for all of them.
const ROWS: usize = 15;
/// Threads of a block along columns, and along sums: fewer of many rows, for their sums to fit into
/// shared memory.
const ACROSS: usize = 8;
const DEEP: [usize; 2] = [32, 16];
/// Many rows are more.
const MANY: usize = 8;
/// Products of a thread at least, where a block has one column.
const EACH: usize = 64;

/// A product of few rows: the group of these, and that of the many columns, with their operands.
struct Thin<'a> {
    few: &'a Group,
    many: &'a Group,
    sums: &'a Group,
    operands: [&'a Operand; 2],
    dtype: DType,
}

/// The statements of a product of few rows.
pub fn thin(
    lower: &mut Lower,
    axes: &Axes,
    dtype: DType,
    end: (BufferId, &Stmt),
) -> Lowering<Option<Vec<Stmt>>> {
    let (rows, columns) = (&axes.rows, &axes.columns);
    let [x, y] = &axes.operands;
    let (few, many, operands) = match rows.extent() <= columns.extent() {
        true => (rows, columns, [x, y]),
        false => (columns, rows, [y, x]),
    };
    let sums = &axes.sums;
    let same = lower.buffers[end.0].dtype == dtype;
    if few.extent() > ROWS || sums.extent() < LEAST || !same {
        return Ok(None);
    }
    let thin = Thin { few, many, sums, operands, dtype };
    let next = |group: &Group| {
        let step = group.innermost().map(|v| operands[1].place.coefficient(v.0.into()));
        step == Some(1) && group.holds(NEAR)
    };
    // Lanes of other numbers are neighbours, or all the same.
    let step = sums.innermost().map_or(0, |v| operands[0].place.coefficient(v.0.into()));
    let lanes = dtype.is_float()
        && (matches!(step, 0 | 1) || lower.buffers[operands[0].buffer].dtype == DType::F32);
    let (body, blocks) = match (next(sums) && lanes, next(many)) {
        (true, _) => thin.along(lower, end)?,
        (_, true) => thin.across(lower, end)?,
        _ => return Ok(None),
    };
    let loops: Vec<Var> = axes.outer.iter().copied().chain(blocks).collect();
    Ok(Some(gpu::blocks(lower, &loops, body)?))
}

fn none() -> (Affine, usize) {
    (Affine::default(), 1)
}

impl Thin<'_> {
    /// Adds a product to a sum.
    fn add(
        &self,
        lower: &Lower,
        (sums, at): (BufferId, &Affine),
        [row, column, product]: [&Flat; 3],
    ) -> Stmt {
        let load = |side: usize, line: (&Group, &Flat)| {
            let Operand { buffer, place } = self.operands[side];
            let load = Expr::Load(*buffer, in_groups(place, &[line, (self.sums, product)]));
            match lower.buffers[*buffer].dtype == self.dtype {
                true => Arc::new(load),
                false => Arc::new(Expr::Cast(self.dtype, Arc::new(load))),
            }
        };
        let (x, y) = (load(0, (self.few, row)), load(1, (self.many, column)));
        let before = Arc::new(Expr::Load(sums, Place::affine(at.clone())));
        let value = match self.dtype.is_float() {
            true => Expr::Fma(x, y, before),
            false => {
                Expr::Binary(BinaryFn::Add, before, Arc::new(Expr::Binary(BinaryFn::Mul, x, y)))
            }
        };
        store(sums, at.clone(), value)
    }

    /// The result of a sum.
    fn end(
        &self,
        (cell, result): (BufferId, &Stmt),
        [row, column]: [&Flat; 2],
        sum: BufferId,
    ) -> Vec<Stmt> {
        let groups = [(self.few, row), (self.many, column)];
        let end = computed(std::slice::from_ref(result), &|a| in_groups(a, &groups));
        retarget(&end, cell, sum, &Affine::default())
    }

    /// A block for each column, whose threads share the products of its sums.
    fn along(&self, lower: &mut Lower, end: (BufferId, &Stmt)) -> Lowering<(Vec<Stmt>, Vec<Var>)> {
        let (depth, many) = (self.sums.extent(), self.many.extent());
        let all = (depth / EACH).clamp(gpu::WARP, lower.target.threads);
        let all = 1usize << all.ilog2();
        let turns = depth / (all * NEAR);
        let block = lower.var(many)?;
        let (thread, turn) = (lower.var(all)?, lower.var(turns.max(1))?);
        let near = (lower.var(NEAR)?, NEAR);
        let column = Flat { base: scaled(block, 1), rest: none() };
        let (mut first, mut step, mut tail, mut last) = (vec![], vec![], vec![], vec![]);
        let mut body = Vec::new();
        let base = scaled(thread, NEAR);
        let whole = Flat {
            base: base.clone().plus(turn.into(), (all * NEAR) as i64),
            rest: (scaled(near.0, 1), NEAR),
        };
        let left = Affine { offset: (turns * all * NEAR) as i64, ..base };
        let left = Flat { base: left, rest: (scaled(near.0, 1), NEAR) };
        for row in 0..self.few.extent() {
            let row = Flat { base: Affine::constant(row as i64), rest: none() };
            let (wide, cell) = (lower.register(self.dtype, NEAR), lower.register(self.dtype, 1));
            let parts = lower.register(self.dtype, all);
            let at = scaled(near.0, 1);
            first.push(store(wide, at.clone(), zero(self.dtype)));
            step.push(self.add(lower, (wide, &at), [&row, &column, &whole]));
            tail.push(self.add(lower, (wide, &at), [&row, &column, &left]));
            let folded = Expr::Fold(ReduceFn::Sum, wide);
            last.push(store(parts, scaled(thread, 1), folded));
            let all = Expr::Fold(ReduceFn::Sum, parts);
            body.push(store(cell, Affine::default(), all));
            body.extend(gpu::pass(lower, Vec::new(), self.end(end, [&row, &column], cell))?);
        }
        let mut inside = vector(near, first);
        if turns > 0 {
            let (kind, body) = (Kind::Serial, vector(near, step));
            inside.push(Stmt::For { var: turn, extent: turns, kind, body });
        }
        let bound = depth - (NEAR - 1);
        inside.extend(below(lower, &left.base, bound, vector(near, tail), Vec::new()));
        inside.extend(last);
        let mut out = threads(&[(thread, all)], inside);
        out.extend(body);
        Ok((out, vec![block]))
    }

    /// A block for some neighbouring columns: its threads share these, and the products of their
    /// sums.
    fn across(&self, lower: &mut Lower, end: (BufferId, &Stmt)) -> Lowering<(Vec<Stmt>, Vec<Var>)> {
        let (depth, many, few) = (self.sums.extent(), self.many.extent(), self.few.extent());
        let width = ACROSS * NEAR;
        let all = DEEP[usize::from(few > MANY)];
        let turns = depth / all;
        let block = lower.var(many.div_ceil(width))?;
        let (deep, fast) = ((lower.var(all)?, all), (lower.var(ACROSS)?, ACROSS));
        let (turn, near) = (lower.var(turns)?, (lower.var(NEAR)?, NEAR));
        let base = scaled(block, width).plus(fast.0.into(), NEAR as i64);
        let column = Flat { base, rest: (scaled(near.0, 1), NEAR) };
        let whole = scaled(deep.0, 1).plus(turn.into(), all as i64);
        let left = Affine { offset: (turns * all) as i64, ..scaled(deep.0, 1) };
        let [whole, left] = [whole, left].map(|base| Flat { base, rest: none() });
        let sums = lower.register(self.dtype, few * NEAR);
        let shared = gpu::shared(lower, self.dtype, all * few * width);
        let (mut first, mut step, mut tail, mut last) = (vec![], vec![], vec![], vec![]);
        for row in 0..few {
            let at = Affine { offset: (row * NEAR) as i64, ..scaled(near.0, 1) };
            let row_at = Flat { base: Affine::constant(row as i64), rest: none() };
            first.push(store(sums, at.clone(), zero(self.dtype)));
            step.push(self.add(lower, (sums, &at), [&row_at, &column, &whole]));
            tail.push(self.add(lower, (sums, &at), [&row_at, &column, &left]));
            let to = scaled(deep.0, few * width).plus(fast.0.into(), NEAR as i64);
            let to = Affine { offset: (row * width) as i64, ..to.plus(near.0.into(), 1) };
            last.push(store(shared, to, Expr::Load(sums, Place::affine(at))));
        }
        let mut inside = vec![Stmt::For {
            var: turn,
            extent: turns,
            kind: Kind::Serial,
            body: vector(near, step),
        }];
        inside.extend(below(lower, &left.base, depth, vector(near, tail), Vec::new()));
        let inside = below(lower, &column.base, many - (NEAR - 1), inside, Vec::new());
        let body = [vector(near, first), inside, vector(near, last)].concat();
        let mut out = threads(&[deep, fast], body);
        // Then a thread for each column.
        let (own, part) = ((lower.var(width)?, width), (lower.var(all)?, all));
        let column = sum(&scaled(block, width), &scaled(own.0, 1));
        let cell = lower.register(self.dtype, 1);
        let mut body = Vec::new();
        for row in 0..few {
            let from = scaled(part.0, few * width).plus(own.0.into(), 1);
            let from = Affine { offset: (row * width) as i64, ..from };
            let before = Arc::new(Expr::Load(cell, origin_place()));
            let more = Arc::new(Expr::Load(shared, Place::affine(from)));
            let value = Expr::Binary(BinaryFn::Add, before, more);
            body.push(store(cell, Affine::default(), zero(self.dtype)));
            body.extend(unroll(part, vec![store(cell, Affine::default(), value)]));
            let row = Flat { base: Affine::constant(row as i64), rest: none() };
            let column = Flat { base: column.clone(), rest: none() };
            body.extend(self.end(end, [&row, &column], cell));
        }
        out.extend(threads(&[own], below(lower, &column, many, body, Vec::new())));
        Ok((out, vec![block]))
    }
}
