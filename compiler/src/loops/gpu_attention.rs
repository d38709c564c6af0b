//! Attention on a GPU: a block of threads for some rows of queries, which read keys and values
//! once for all of these. Their scores are in shared memory from the products to the sums of
//! weighted values.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::attention::{Tiles, mixed, query_of, row_of, scores, softmax};
use super::contract::{self, zero};
use super::gpu;
use super::gpu_pieces::{scaled, unroll};
use super::index::{Index, add, scale, to_expr};
use super::ir::{Expr, Kind, Loops, Number, Place, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, origin_place};
use super::nest::{self, wrap};
use super::rewrite::{computed, retarget, substitute};
use crate::graph::op::{Affine, BinaryFn};
use crate::rules::attention::Attention;

/// Keys at most: their scores have to fit into the shared memory of a block.
const KEYS: usize = 8 << 10;
/// Scores of a block at most.
const SCORES: usize = 10 << 10;
/// Threads of a block at most.
const THREADS: usize = 128;
/// Rows of a block at most, and blocks at least where fewer rows make more of them.
const ROWS: usize = 16;
const BLOCKS: usize = 64;
/// Products that are read from neighbours at once.
const NEAR: usize = 4;

/// Rows of a block: of so many in all, for so many keys, `outer` times.
fn rows(total: usize, keys: usize, outer: usize) -> usize {
    let fits = |rows: &usize| {
        let enough = outer * total.div_ceil(*rows) >= BLOCKS || *rows <= ROWS / 4;
        *rows <= total && rows * (keys + NEAR) <= SCORES && enough
    };
    let all = std::iter::successors(Some(ROWS), |rows| Some(rows / 2)).take_while(|r| *r > 1);
    all.into_iter().find(fits).unwrap_or(1)
}

/// The rows of a block in the making.
struct Block {
    /// The variable of a row in the block, and how many there are.
    line: (Var, usize),
    /// The variable of all rows, and where those of the block begin.
    query: Option<(Var, Index)>,
    /// Where they would begin if all blocks had rows of their own, where some have not.
    own: Option<Affine>,
}

/// The kernel of an attention, where the scores of a row fit into shared memory.
pub fn lower(
    mut lower: Lower,
    root: usize,
    parts: &Attention,
    name: &str,
) -> Lowering<Option<Lowered>> {
    let weight = lower.register(DType::F32, 1);
    lower.bind_cell(parts.weights, Expr::Load(weight, origin_place()));
    let product = contract::product(&mut lower, root, parts.mixed)?;
    let asked = lower.asked(parts.weights);
    lower.unbind(parts.weights);
    let (key, row) = row_of(&product, asked.as_deref())?;
    let (query, mut outer) = query_of(&product, parts, &row)?;
    let keys = lower.extents[key as usize];
    if keys > KEYS {
        return Ok(None);
    }
    let count: usize = outer.iter().map(|&v| lower.extents[v as usize]).product();
    let total = query.map_or(1, |q| lower.extents[q as usize]);
    let rows = rows(total, keys, count);
    lower.row_threads = keys.next_power_of_two().clamp(gpu::WARP, THREADS);
    // Behind its scores a row has a place for what all its weights are multiplied with.
    let step = (keys + 1).next_multiple_of(NEAR);
    let line = (lower.var(rows)?, rows);
    let shared = gpu::shared(&mut lower, DType::F32, rows * step);
    let line_of = (shared, Place::affine(scaled(line.0, step)));
    let scores = scores(&mut lower, parts, (&row, keys), &line_of)?;
    let mut shares = nest::reduce_pass(&mut lower, parts.most, &row, (&[keys], &[None]), None)?;
    let (softmax, scale) = softmax(&mut lower, parts, (&row, keys), &line_of)?;
    shares.extend(softmax);
    let mixed = mixed(product, parts.side, (key, scale), &line_of)?;
    let mut block = Block { line, query: None, own: None };
    if let Some(query) = query {
        let turn = lower.var(total.div_ceil(rows))?;
        outer.push(turn);
        let own = scaled(turn, rows);
        let mut start = Place::affine(own.clone());
        if !total.is_multiple_of(rows) {
            // The last block begins earlier, so that all of its rows are there.
            let last = Expr::Const(DType::I64, Number::Int((total - rows) as i128));
            let least = Expr::Binary(BinaryFn::Min, Arc::new(to_expr(&start)), Arc::new(last));
            start = Place { affine: Affine::default(), dynamic: Some(Arc::new(least)) };
            block.own = Some(own);
        }
        block.query = Some((query, start));
    }
    let mut body = block.each(&mut lower, &scores, false)?;
    let (var, extent) = line;
    body.push(Stmt::For { var, extent, kind: Kind::Serial, body: shares });
    body.extend(block.each(&mut lower, &mixed, true)?);
    let body = gpu::blocks(&mut lower, &outer, block.placed(&body))?;
    let kernels = vec![Loops { name: name.to_string(), ..lower.finish(body) }];
    Ok(Some(Lowered { kernels, scratch: Vec::new() }))
}

impl Block {
    /// A thread for each element of a contraction along its lanes: it sums those of all rows.
    fn each(&self, lower: &mut Lower, tiles: &Tiles, last: bool) -> Lowering<Vec<Stmt>> {
        let place = scaled(self.line.0, 1);
        let sums = lower.register(DType::F32, self.line.1);
        let own = |body: &[Stmt]| retarget(body, tiles.cell, sums, &place);
        let all = |body: Vec<Stmt>| unroll(self.line, body);
        let store = |value| Stmt::Store { buffer: tiles.cell, place: origin_place(), value };
        let mut body = all(own(&[store(zero(DType::F32))]));
        let update = all(own(&[tiles.update(tiles.operands[0].clone())]));
        body.extend(self.summed(lower, tiles, update)?);
        let mut end = tiles.end.clone();
        if last && let Some(result) = end.pop() {
            end.push(self.stored(result));
        }
        body.extend(all(own(&end)));
        gpu::pass(lower, vec![tiles.lanes], body)
    }

    /// Loops over a sum, some neighbours of which are written out.
    fn summed(&self, lower: &mut Lower, tiles: &Tiles, body: Vec<Stmt>) -> Lowering<Vec<Stmt>> {
        let Some((&inner, outer)) = tiles.summed.split_last() else { return Ok(body) };
        let extent = lower.extents[inner as usize];
        if !extent.is_multiple_of(NEAR) {
            return Ok(wrap(&lower.extents, &tiles.summed, body, 0));
        }
        let (turn, near) = (lower.var(extent / NEAR)?, (lower.var(NEAR)?, NEAR));
        let index = scaled(turn, NEAR).plus(near.0.into(), 1);
        let body = unroll(near, substitute(&body, inner, &index));
        let loops: Vec<Var> = outer.iter().copied().chain([turn]).collect();
        Ok(wrap(&lower.extents, &loops, body, 0))
    }

    /// A store of a row by its own block only.
    fn stored(&self, result: Stmt) -> Stmt {
        let (Some((_, start)), Some(own)) = (&self.query, &self.own) else { return result };
        let row = to_expr(&add(start, &Place::affine(scaled(self.line.0, 1))));
        let first = Arc::new(Expr::Index(own.clone()));
        let condition = Expr::Binary(BinaryFn::Le, first, Arc::new(row));
        Stmt::If { condition, then: vec![result], other: Vec::new() }
    }

    /// Statements with the row of all rows that each row of the block is.
    fn placed(&self, body: &[Stmt]) -> Vec<Stmt> {
        let Some((query, start)) = &self.query else { return body.to_vec() };
        let row = add(start, &Place::affine(scaled(self.line.0, 1)));
        computed(body, &|a| {
            let step = a.coefficient((*query).into());
            let mut rest = a.clone();
            rest.terms.retain(|t| t.0 != *query);
            add(&Place::affine(rest), &scale(&row, step, 0))
        })
    }
}
