//! The rows and columns of a tile that each thread of a block has.

use super::flat::sum;
use super::gpu_pieces::{scaled, threads, unroll};
use super::ir::{Stmt, Var, WARP_LINES};
use super::lower::{Lower, Lowering};
use crate::graph::op::Affine;

/// Threads along each side of a tile, where each multiplies by itself.
const SIDE: usize = 16;
/// Its neighbouring rows or columns.
pub const NEAR: usize = 4;
/// Rows and columns of warps.
const WARPS: [usize; 2] = [2, 4];
/// Rows and columns of the threads of a warp.
const LANES: [usize; 2] = [8, 4];

/// Rows or columns of a thread.
pub struct Own {
    /// The line of the tile.
    pub line: Affine,
    /// The first line of a product by a warp.
    pub start: Affine,
    /// Loops over its lines, outermost first.
    pub loops: [(Var, usize); 2],
    /// What they add to the number of a sum.
    number: Affine,
}

/// What each thread of a block has of a tile.
pub struct Owns {
    /// Loops over threads, outermost first.
    pub threads: Vec<(Var, usize)>,
    /// Rows.
    pub rows: Own,
    /// Columns.
    pub columns: Own,
    /// The number of a sum among those of all threads.
    pub place: Affine,
    /// How many these have.
    pub sums: usize,
}

impl Owns {
    /// Of a tile of so many rows and columns, whose threads multiply by themselves; `apart` where
    /// threads beside each other have columns beside each other.
    pub fn of_threads(lower: &mut Lower, tile: [usize; 2], apart: bool) -> Lowering<Owns> {
        let own = tile.map(|n| n / SIDE);
        let threads = vec![(lower.var(SIDE)?, SIDE), (lower.var(SIDE)?, SIDE)];
        let mut one = |k: usize, apart: bool, step: usize| -> Lowering<Own> {
            let low = own[k].min(NEAR);
            let (each, near) = if apart { (1, SIDE) } else { (low, 1) };
            let loops = [(lower.var(own[k] / low)?, own[k] / low), (lower.var(low)?, low)];
            let line = scaled(threads[k].0, each)
                .plus(loops[0].0.into(), (SIDE * NEAR) as i64)
                .plus(loops[1].0.into(), near as i64);
            let number = scaled(loops[0].0, low * step).plus(loops[1].0.into(), step as i64);
            Ok(Own { start: line.clone(), line, loops, number })
        };
        let (rows, columns) = (one(0, false, own[1])?, one(1, apart, 1)?);
        Ok(Owns::new(threads, rows, columns, own[0] * own[1]))
    }

    /// Of a tile whose warps multiply.
    pub fn of_warps(lower: &mut Lower, tile: [usize; 2]) -> Lowering<Owns> {
        let own = [0, 1].map(|k: usize| tile[k] / (WARPS[k] * WARP_LINES[k]));
        let mut threads = Vec::new();
        for extent in WARPS.into_iter().chain(LANES) {
            threads.push((lower.var(extent)?, extent));
        }
        // Of the 16 rows of a product a thread has two, 8 apart; of the 8 columns two neighbours.
        let mut one = |k: usize, lane: usize, apart: usize| -> Lowering<Own> {
            let loops = [(lower.var(own[k])?, own[k]), (lower.var(2)?, 2)];
            let start = scaled(threads[k].0, own[k] * WARP_LINES[k])
                .plus(loops[0].0.into(), WARP_LINES[k] as i64);
            let line = start.clone().plus(threads[2 + k].0.into(), lane as i64);
            let line = line.plus(loops[1].0.into(), apart as i64);
            let (many, few) = if k == 0 { (4 * own[1], 2) } else { (4, 1) };
            let number = scaled(loops[0].0, many).plus(loops[1].0.into(), few);
            Ok(Own { line, start, loops, number })
        };
        let (rows, columns) = (one(0, 1, 8)?, one(1, 2, 1)?);
        Ok(Owns::new(threads, rows, columns, 4 * own[0] * own[1]))
    }

    fn new(threads: Vec<(Var, usize)>, rows: Own, columns: Own, each: usize) -> Owns {
        let (mut sums, mut place) = (each, sum(&rows.number, &columns.number));
        for &(var, extent) in threads.iter().rev() {
            place = sum(&place, &scaled(var, sums));
            sums *= extent;
        }
        Owns { threads, rows, columns, place, sums }
    }

    /// Columns of a thread that are neighbours.
    pub fn near(&self) -> usize {
        self.columns.loops[1].1
    }

    /// Loops over all threads.
    pub fn all(&self, body: Vec<Stmt>) -> Vec<Stmt> {
        threads(&self.threads, body)
    }
}

impl Own {
    /// What a thread does for each of its lines.
    pub fn each(&self, body: Vec<Stmt>) -> Vec<Stmt> {
        unroll(self.loops[0], unroll(self.loops[1], body))
    }
}
