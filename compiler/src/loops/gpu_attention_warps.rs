//! Attention of short floats on a GPU, whose products warps multiply: queries, and a block of keys
//! and values after another, are brought into shared memory; powers of scores go through it from
//! one product to the other.

use kiln_runtime::tensor::DType;

use super::attention::Tiles;
use super::contract::zero;
use super::flat::{Group, sum, times};
use super::gpu_attention::{Block, Shape};
use super::gpu_own::{Own, Owns};
use super::gpu_pieces::{Operand, Piece, Pieces, below, scaled, store, unroll, without};
use super::gpu_tiles::pairs;
use super::ir::{BufferId, Expr, Multiply, Place, Side, Stmt, Var, WARP_BYTES, dtype};
use super::lower::{Lower, Lowering};
use super::rewrite::{retarget, substitute};
use crate::graph::op::Affine;

/// Threads of a block.
const THREADS: usize = 256;
/// Rows of a block, the most first, and its keys: what warps have tiles for.
const ROWS: [usize; 2] = [64, 32];
const KEYS: usize = 32;
/// Elements of 16 bytes.
const NEAR: usize = 8;
/// Products of a step.
const STEP: usize = WARP_BYTES / 2;
/// Bytes of shared memory that a block may have.
const SHARED: usize = 46 << 10;
/// Fewer rows are not worth a tile.
const LEAST: usize = 16;
/// Blocks at least, where fewer rows make more of them.
const BLOCKS: usize = 64;

/// The operands that warps multiply: queries, keys, values; and the axes of the two products.
pub struct Short {
    dtype: DType,
    operands: [Operand; 3],
    rows: Group,
    keys: Group,
    depth: Group,
    columns: Group,
    summed: Group,
}

/// The dtype that an operand is widened from.
fn short(lower: &Lower, e: &Expr) -> Option<DType> {
    let Expr::Cast(DType::F32, x) = e else { return None };
    Some(dtype(&lower.buffers, x)).filter(|t| t.is_rounded() && t.bytes() == 2)
}

/// An operand that is widened from a short float, as it lies.
fn operand(lower: &Lower, e: &Expr, dtype: DType) -> Option<Operand> {
    let Expr::Cast(DType::F32, load) = e else { return None };
    let Expr::Load(buffer, Place { affine, dynamic: None }) = &**load else { return None };
    let fits = lower.buffers[*buffer].dtype == dtype;
    fits.then(|| Operand { buffer: *buffer, place: affine.clone() })
}

impl Short {
    /// The operands of an attention, if it is of short floats.
    pub fn of(
        lower: &Lower,
        (query, key): (Option<Var>, Var),
        [scores, mixed]: &[Tiles; 2],
    ) -> Option<Short> {
        let dtype = short(lower, &mixed.operands[0])?;
        let query = query.filter(|q| lower.extents[usize::from(*q)] >= LEAST)?;
        let of = |e: &Expr| operand(lower, e, dtype);
        let operands =
            [of(&scores.operands[1])?, of(&scores.operands[0])?, of(&mixed.operands[0])?];
        let moves = |k: usize, v: Var| operands[k].place.coefficient(v.into()) != 0;
        let apart = !moves(0, scores.lanes) && !moves(1, query) && !moves(2, query);
        let group = |vars: &[Var]| Group::new(lower, vars.to_vec());
        (apart && !scores.summed.is_empty()).then(|| Short {
            dtype,
            operands,
            rows: group(&[query]),
            keys: group(&[scores.lanes]),
            depth: group(&scores.summed),
            columns: group(&[mixed.lanes]),
            summed: group(&[key]),
        })
    }

    /// Sizes in shared memory: products of a score, and columns of values.
    fn sizes(&self) -> [usize; 2] {
        let depth = self.depth.extent().next_power_of_two().max(STEP);
        [depth, self.columns.extent().next_power_of_two().max(KEYS)]
    }

    /// What a block has at once, where that fits into shared memory; all rows are there `outer`
    /// times.
    pub fn shape(&self, outer: usize) -> Option<Shape> {
        let [depth, columns] = self.sizes();
        let line = |n: usize| (n + NEAR) * 2;
        let bytes = |rows: usize| {
            let scores = 3 * rows * line(KEYS);
            scores + (rows + KEYS) * line(depth) + KEYS * line(columns) + 4 * (THREADS + rows)
        };
        let enough = |rows: usize| outer * self.rows.extent().div_ceil(rows) >= BLOCKS;
        let least = ROWS[ROWS.len() - 1];
        let fits = |rows: &usize| bytes(*rows) <= SHARED && (enough(*rows) || *rows == least);
        let rows = ROWS.into_iter().find(fits)?;
        Some(Shape { rows, keys: KEYS, threads: THREADS, short: Some(self.dtype) })
    }
}

/// What the warps of a block do.
pub struct Warps<'a> {
    short: &'a Short,
    block: &'a Block,
    scores: &'a Tiles,
    mixed: &'a Tiles,
    /// Queries, keys and values in shared memory.
    pieces: [Piece; 3],
    /// What threads have of the two products, and their sums.
    owns: [Owns; 2],
    sums: [BufferId; 2],
    /// Steps of both products.
    steps: [(Var, usize); 2],
}

impl<'a> Warps<'a> {
    /// Of a block.
    pub fn new(
        lower: &mut Lower,
        (short, block): (&'a Short, &'a Block),
        [scores, mixed]: &'a [Tiles; 2],
    ) -> Lowering<Warps<'a>> {
        let ([depth, columns], rows) = (short.sizes(), block.line.1);
        let mut piece = |k: usize, groups: (&Group, &Group), lines: usize, depth: usize| {
            let kind = Pieces { depth, near: NEAR, warp: true, threads: THREADS };
            Piece::new(lower, &short.operands[k], groups, lines, kind)
        };
        let pieces = [
            piece(0, (&short.rows, &short.depth), rows, depth)?,
            piece(1, (&short.keys, &short.depth), KEYS, depth)?,
            piece(2, (&short.columns, &short.summed), columns, KEYS)?,
        ];
        let owns = [Owns::of_warps(lower, [rows, KEYS])?, Owns::of_warps(lower, [rows, columns])?];
        let sums = [0, 1].map(|k: usize| lower.register(DType::F32, owns[k].sums));
        let mut steps =
            |n: usize| -> Lowering<(Var, usize)> { Ok((lower.var(n / STEP)?, n / STEP)) };
        let steps = [steps(depth)?, steps(KEYS)?];
        Ok(Warps { short, block, scores, mixed, pieces, owns, sums, steps })
    }

    /// Brings a piece of an operand.
    fn bring(&self, lower: &Lower, k: usize, lines: &Affine, products: &Affine) -> Vec<Stmt> {
        let short = self.short;
        let (group, sums) = match k {
            0 => (&short.rows, &short.depth),
            1 => (&short.keys, &short.depth),
            _ => (&short.columns, &short.summed),
        };
        let to = self.pieces[k].buffers[0];
        self.pieces[k].bring(lower, &short.operands[k], (group, lines), (sums, products), to)
    }

    /// Statements for each sum of a thread.
    fn each(&self, k: usize, body: Vec<Stmt>) -> Vec<Stmt> {
        let [high, low] = self.owns[k].columns.loops;
        self.owns[k].rows.each(unroll(high, unroll(low, body)))
    }

    /// Adds the products of two sides.
    fn multiply(&self, k: usize, sides: [Side; 2]) -> Vec<Stmt> {
        let own = &self.owns[k];
        let inner = [&own.rows, &own.columns].map(|side: &Own| side.loops[1].0);
        let place = inner.into_iter().fold(own.place.clone(), |place, var| without(&place, var));
        let lane = [own.threads[2].0, own.threads[3].0];
        let multiply = Multiply { sums: (self.sums[k], place), sides, lane };
        let body = vec![Stmt::Multiply(Box::new(multiply))];
        let body = unroll(own.rows.loops[0], unroll(own.columns.loops[0], body));
        unroll(self.steps[k], body)
    }

    /// Rows or columns of a piece, from a line on.
    fn side(&self, k: usize, line: &Affine, step: (Var, usize)) -> Side {
        let piece = &self.pieces[k];
        let place = piece.place(line, &scaled(step.0, STEP));
        Side { buffer: piece.buffers[0], place, steps: piece.steps.map(|step| step as i64) }
    }

    /// Before the first block of keys.
    pub fn first(&self, lower: &Lower) -> Vec<Stmt> {
        let place = self.owns[1].place.clone();
        let first = vec![store(self.sums[1], place, zero(DType::F32))];
        let start = self.block.start().affine;
        let mut body = self.bring(lower, 0, &start, &Affine::default());
        body.extend(self.owns[1].all(self.each(1, first)));
        body
    }

    /// Brings a block of keys and values, the ones from a place on, and computes the scores of so
    /// many.
    pub fn scores(&self, lower: &Lower, start: &Affine, count: usize) -> Vec<Stmt> {
        let mut body = self.bring(lower, 1, start, &Affine::default());
        body.extend(self.bring(lower, 2, &Affine::default(), start));
        let (own, sums) = (&self.owns[0], self.sums[0]);
        let first = vec![store(sums, own.place.clone(), zero(DType::F32))];
        let mut inside = self.each(0, first);
        let sides = [
            self.side(0, &own.rows.start, self.steps[0]),
            self.side(1, &own.columns.start, self.steps[0]),
        ];
        inside.extend(self.multiply(0, sides));
        let end = retarget(&self.scores.end, self.scores.cell, sums, &own.place);
        let end = self.block.at(&end, &own.rows.line);
        let end = substitute(&end, self.scores.lanes, &sum(start, &own.columns.line));
        // Rows behind the last one have scores as well, which nobody asks for.
        let (scores, step) = self.block.scores;
        let none = sum(&times(&own.rows.line, step), &own.columns.line);
        let none = vec![store(scores, none, zero(DType::F32))];
        let end = self.of_rows(lower, &own.rows, end, none);
        let end = below(lower, &own.columns.line, count, end, Vec::new());
        inside.extend(self.each(0, end));
        body.extend(own.all(inside));
        body
    }

    /// Statements for a row that there is, and others.
    fn of_rows(&self, lower: &Lower, own: &Own, then: Vec<Stmt>, other: Vec<Stmt>) -> Vec<Stmt> {
        let row = sum(&self.block.start().affine, &own.line);
        below(lower, &row, self.short.rows.extent(), then, other)
    }

    /// Adds the values of a block of keys, times their powers.
    pub fn add(&self) -> Vec<Stmt> {
        let own = &self.owns[1];
        let before = self.block.rescaled(self.mixed.cell);
        let before = retarget(&[before], self.mixed.cell, self.sums[1], &own.place);
        let mut body = self.each(1, self.block.at(&before, &own.rows.line));
        let (weights, step) = self.block.weights;
        let place = sum(&times(&own.rows.start, step), &scaled(self.steps[1].0, STEP));
        let sides = [
            Side { buffer: weights, place, steps: [step as i64, 1] },
            self.side(2, &own.columns.start, self.steps[1]),
        ];
        body.extend(self.multiply(1, sides));
        own.all(body)
    }

    /// Stores the results, neighbours at once where they come in pairs.
    pub fn end(&self, lower: &mut Lower) -> Vec<Stmt> {
        let own = &self.owns[1];
        let mut end = vec![self.block.weighted(self.mixed.cell)];
        end.extend(self.mixed.end.iter().cloned());
        let (lanes, width) = (self.mixed.lanes, self.short.columns.extent());
        let end = retarget(&end, self.mixed.cell, self.sums[1], &own.place);
        let end = substitute(&self.block.at(&end, &own.rows.line), lanes, &own.columns.line);
        let [high, low] = own.columns.loops;
        let end = match self.short.columns.holds(2) {
            true => {
                let first = without(&own.columns.line, low.0);
                let end = pairs(lower, low, end);
                below(lower, &first, width - 1, end, Vec::new())
            }
            false => unroll(low, below(lower, &own.columns.line, width, end, Vec::new())),
        };
        let end = self.of_rows(lower, &own.rows, unroll(high, end), Vec::new());
        own.all(own.rows.each(end))
    }
}
