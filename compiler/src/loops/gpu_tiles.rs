//! Contractions on a GPU: a block of threads makes a tile of the result. Pieces of both operands
//! are brought into shared memory, where every element is read by many threads; each thread sums
//! some rows times some columns in registers. While one piece is summed, the next one is on its way
//! into other shared memory.
//!
//! Rows, columns and sums are groups of axes that are counted as one (`flat.rs`): the sum of a
//! convolution runs through channels and taps, its rows or columns through the pixels of images.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{Product, zero};
use super::flat::{Flat, Group, sum, times};
use super::gpu;
use super::gpu_own::{NEAR, Owns};
use super::gpu_pieces::{
    Operand, Piece, Pieces, below, in_groups, scaled, store, unroll, vector, without,
};
use super::gpu_thin::thin;
use super::ir::{
    BufferId, Expr, Kind, Loops, Multiply, Param, Place, Scope, Side, Stmt, Var, WARP_BYTES,
};
use super::lower::{Lower, Lowering, origin_place};
use super::nest::{accumulate, coalesce, is_vector};
use super::rewrite::{computed, retarget};
use crate::graph::op::{Affine, BinaryFn};

/// Rows and columns of a tile, the most first: of threads that multiply by themselves.
const TILES: [[usize; 2]; 5] = [[128, 128], [64, 128], [64, 64], [32, 64], [16, 64]];
/// Those of warps that multiply.
const WARP_TILES: [[usize; 2]; 5] = [[128, 128], [64, 128], [64, 64], [32, 64], [32, 32]];
/// Threads of a block.
const THREADS: usize = 256;
/// Bytes of a line of a piece: so many products of a sum are in shared memory at once.
const LINE: usize = 64;
/// Rows and columns of fewer elements are not tiled, nor sums of fewer products.
const LEAST: usize = 16;
const LEAST_SUM: usize = 8;
/// Blocks that a GPU runs at once, about: one for each of its processors.
const PROCESSORS: usize = 132;
/// Parts of a sum at most, each with so many pieces at least.
const PARTS: usize = 16;
const LEAST_PIECES: usize = 4;
/// Cycles that a launch takes.
const LAUNCH: usize = 3000;
/// Sums that are written out.
const WRITTEN_OUT: usize = 256;

/// The axes of a tile, and the operands that move along rows and along columns.
pub struct Axes {
    /// Those along which the first operand moves, and not the second one.
    pub rows: Group,
    /// The other way round.
    pub columns: Group,
    /// Those of the sum.
    pub sums: Group,
    /// The operands.
    pub operands: [Operand; 2],
    /// The loops around tiles.
    pub outer: Vec<Var>,
}

/// What a sum of products is summed in, for results of a dtype.
fn sums_of(dtype: DType) -> Option<DType> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::TF32 => Some(DType::F32),
        DType::I32 => Some(DType::I32),
        _ => None,
    }
}

/// An operand that is read as it lies, and may be widened to what sums are.
fn operand(lower: &Lower, e: &Expr, sums: DType) -> Option<Operand> {
    let load = match e {
        Expr::Cast(to, x) if *to == sums => x,
        e => e,
    };
    let Expr::Load(buffer, Place { affine, dynamic: None }) = load else { return None };
    let dtype = lower.buffers[*buffer].dtype;
    let short = dtype.is_rounded() || dtype.bytes() < 4;
    let known = dtype == sums || dtype.is_float() == sums.is_float() && short;
    (known && dtype != DType::Bool).then(|| Operand { buffer: *buffer, place: affine.clone() })
}

/// The kernels of a contraction in tiles, or of few rows, where it has axes for them.
pub fn tiles(
    lower: &mut Lower,
    product: &Product,
    scratch: &mut Vec<(DType, usize)>,
) -> Lowering<Option<Vec<Loops>>> {
    let [x, y] = product.operands.clone();
    let Some(dtype) = sums_of(lower.buffers[product.cell].dtype) else { return Ok(None) };
    let whole = |v: &Var| lower.span(*v).is_none();
    let fixed = product.vars.iter().chain(&product.summed).all(whole);
    if lower.target.threads < THREADS || !fixed {
        return Ok(None);
    }
    let cell = Arc::new(Expr::Load(product.cell, origin_place()));
    let update = store(product.cell, Affine::default(), Expr::Fma(x, y, cell));
    let result = Stmt::Store {
        buffer: product.out,
        place: product.place.clone(),
        value: (*product.result).clone(),
    };
    let (mut vars, mut sums) = (product.vars.clone(), product.summed.clone());
    let before = lower.extents.clone();
    let body = coalesce(lower, &mut vars, vec![update, result]);
    let body = coalesce(lower, &mut sums, body);
    let Some(axes) = axes(lower, &body, (vars.clone(), sums), dtype) else {
        lower.extents = before;
        return Ok(None);
    };
    let end = (product.cell, &body[1]);
    let sides = [axes.rows.extent(), axes.columns.extent()];
    if sides.into_iter().any(|n| n < LEAST) || axes.sums.extent() < LEAST_SUM {
        let thin = thin(lower, &axes, dtype, end)?;
        if thin.is_none() {
            lower.extents = before;
        }
        return Ok(thin.map(|body| vec![lower.copy().finish(body)]));
    }
    // Short floats are rounded once, at the end of their sums.
    let whole = lower.buffers[product.cell].dtype != dtype;
    let tile = Tile::new(lower, &axes, dtype, whole)?;
    let Some(part) = tile.part else {
        let body = tile.all(lower, &axes, end)?;
        return Ok(Some(vec![lower.copy().finish(body)]));
    };
    let mut last = lower.copy();
    let (partial, sums) = partial(lower, &axes, (product.cell, dtype), part, scratch);
    let inside = tile.all(lower, &axes, (product.cell, &partial))?;
    let first = Loops { name: "parts".into(), ..lower.copy().finish(inside) };
    // Then their sum, in the order of the parts.
    let turn = last.var(part.1)?;
    let (place, len) = sums;
    let more = last.buffer(dtype, len, Scope::Global, Param::Scratch(scratch.len() - 1));
    let place = sum(&without(&place, part.0), &scaled(turn, len / part.1));
    let cell = Arc::new(Expr::Load(product.cell, origin_place()));
    let more = Arc::new(Expr::Load(more, Place::affine(place)));
    let steps = [zero(dtype), Expr::Binary(BinaryFn::Add, cell, more)];
    let Stmt::Store { buffer, place, value } = body[1].clone() else {
        return Ok(None);
    };
    let end = (buffer, place, Arc::new(value));
    let second = accumulate(last, vars, vec![turn], product.cell, steps, end);
    Ok(Some(vec![first, second]))
}

/// The store of a part of a sum to memory of its own: what is stored, and where, of how many.
fn partial(
    lower: &mut Lower,
    axes: &Axes,
    (cell, dtype): (BufferId, DType),
    part: (Var, usize),
    scratch: &mut Vec<(DType, usize)>,
) -> (Stmt, (Affine, usize)) {
    let outer = Group::new(lower, axes.outer.clone());
    let (mut len, mut place) = (1, Affine::default());
    for group in [&axes.columns, &axes.rows, &outer] {
        for (var, extent) in group.axes().iter().rev() {
            place = sum(&place, &scaled(*var, len));
            len *= extent;
        }
    }
    place = sum(&place, &scaled(part.0, len));
    len *= part.1;
    let buffer = lower.buffer(dtype, len, Scope::Global, Param::Scratch(scratch.len()));
    scratch.push((dtype, len));
    let value = Expr::Load(cell, origin_place());
    (store(buffer, place.clone(), value), (place, len))
}

/// The axes that a tile can have.
fn axes(
    lower: &Lower,
    body: &[Stmt],
    (vars, mut sums): (Vec<Var>, Vec<Var>),
    dtype: DType,
) -> Option<Axes> {
    let [Stmt::Store { value: Expr::Fma(x, y, _), .. }, Stmt::Store { place, .. }] = body else {
        return None;
    };
    let loads = [operand(lower, x, dtype)?, operand(lower, y, dtype)?];
    let steps = |v: &Var| [0, 1].map(|k: usize| loads[k].place.coefficient((*v).into()));
    let only = |side: usize, v: &Var| steps(v)[side] != 0 && steps(v)[1 - side] == 0;
    // Columns are the axes that lie next to each other in the result.
    let near = vars.iter().find(|v| place.affine.coefficient((**v).into()) == 1);
    let side = near.or(vars.last()).is_some_and(|v| only(1, v));
    let of = |side: bool| vars.iter().copied().filter(move |v| only(side.into(), v)).collect();
    let [rows, columns] = [!side, side].map(|side| Group::new(lower, of(side)));
    let outer = vars.iter().copied().filter(|v| !only(0, v) && !only(1, v)).collect();
    // The innermost axis of the sum is the one along which most elements are neighbours.
    let neighbours = |v: &Var| {
        let units = steps(v).iter().filter(|s| **s == 1).count();
        (units, lower.extents[usize::from(*v)])
    };
    let best = (0..sums.len()).max_by_key(|&n| neighbours(&sums[n]))?;
    let last = sums.remove(best);
    sums.push(last);
    let sums = Group::new(lower, sums);
    let [x, y] = loads;
    let operands = if side { [x, y] } else { [y, x] };
    Some(Axes { rows, columns, sums, operands, outer })
}

/// The rows and columns of tiles, and the parts of sums, with which a kernel takes the least time.
fn shape(
    tiles: [[usize; 2]; 5],
    [blocks, rows, columns]: [usize; 3],
    (pieces, depth): (usize, usize),
    at_once: usize,
    most: usize,
) -> ([usize; 2], usize) {
    let parts = std::iter::successors(Some(1), |n| Some(2 * n));
    let parts = parts.take_while(|&n| n == 1 || n <= most && pieces >= LEAST_PIECES * n);
    // The ends of large tiles take many registers, which sums of few products do not pay for.
    let least = usize::from(pieces == 1);
    let tiles = &tiles[least..];
    let all = parts.flat_map(|parts| tiles.iter().map(move |tile| (*tile, parts)));
    let time = |&([r, c], parts): &([usize; 2], usize)| {
        let count = blocks * parts * rows.div_ceil(r) * columns.div_ceil(c);
        // Products, and what is read from shared memory for them, by 128 units; then partial sums
        // are written and read again, some 2 KB at once, by one launch more.
        let products = r * c / at_once + 32 * (r + c);
        let sums = count.div_ceil(PROCESSORS) * pieces.div_ceil(parts) * depth * products / 128;
        let more = LAUNCH + blocks * rows * columns * parts / 256;
        if parts > 1 { sums + more } else { sums }
    };
    all.min_by_key(time).unwrap_or((tiles[0], 1))
}

/// Whether warps can multiply operands of these dtypes.
fn by_warps(dtypes: [DType; 2]) -> bool {
    let byte = |t: DType| matches!(t, DType::I8 | DType::U8);
    dtypes[0] == dtypes[1] && dtypes[0].is_rounded() || dtypes.into_iter().all(byte)
}

/// A tile in the making.
struct Tile {
    dtype: DType,
    depth: usize,
    warp: bool,
    /// Pieces of a sum, or of each part of it; and the parts, where there are some.
    count: usize,
    part: Option<(Var, usize)>,
    pieces: [Piece; 2],
    owns: Owns,
    /// Where tiles begin.
    starts: [(Var, Affine); 2],
    /// Variables of the products of a piece, and of pairs of pieces.
    turn: (Var, usize),
    step: (Var, usize),
    pair: (Var, usize),
    /// The sums of all threads.
    sums: BufferId,
}

impl Tile {
    fn new(lower: &mut Lower, axes: &Axes, dtype: DType, whole: bool) -> Lowering<Tile> {
        let blocks = axes.outer.iter().map(|&v| lower.extents[usize::from(v)]).product();
        let dtypes = axes.operands.each_ref().map(|o| lower.buffers[o.buffer].dtype);
        let (warp, bytes) = (by_warps(dtypes), dtypes[0].bytes().max(dtypes[1].bytes()));
        let groups = [&axes.rows, &axes.columns];
        let tiles = if warp { WARP_TILES } else { TILES };
        let depth = LINE / bytes;
        let all = axes.sums.extent().div_ceil(depth);
        let work = [blocks, axes.rows.extent(), axes.columns.extent()];
        let most = if whole { 1 } else { PARTS };
        // Products that a unit for matrices makes while a thread makes one.
        let at_once = match (warp, bytes) {
            (false, _) => 1,
            (true, 4) => 4,
            (true, _) => 8,
        };
        let (tile, parts) = shape(tiles, work, (all, depth), at_once, most);
        let count = all.div_ceil(parts);
        let parts = all.div_ceil(count);
        let part = if parts > 1 { Some((lower.var(parts)?, parts)) } else { None };
        let near = if warp { 16 / bytes } else { NEAR };
        let kind = Pieces { depth, near, warp, threads: THREADS };
        let mut piece = |side: usize| {
            let groups = (groups[side], &axes.sums);
            Piece::new(lower, &axes.operands[side], groups, tile[side], kind)
        };
        let pieces = [piece(0)?, piece(1)?];
        let owns = match warp {
            true => Owns::of_warps(lower, tile)?,
            // Where lines are not neighbours in shared memory, threads beside each other read
            // lines beside each other.
            false => Owns::of_threads(lower, tile, pieces[1].along)?,
        };
        // What a step multiplies, and how many steps are written out.
        let each = if warp { WARP_BYTES / bytes } else { 1 };
        let own = owns.sums / THREADS;
        let step = (WRITTEN_OUT / own).clamp(1, depth / each);
        let mut start = |side: usize| -> Lowering<(Var, Affine)> {
            let block = lower.var(groups[side].extent().div_ceil(tile[side]))?;
            Ok((block, scaled(block, tile[side])))
        };
        let starts = [start(0)?, start(1)?];
        // After the first piece.
        let pairs = (count - 1) / 2;
        let turns = depth / each / step;
        Ok(Tile {
            dtype,
            depth,
            warp,
            count,
            part,
            pieces,
            starts,
            turn: (lower.var(turns)?, turns),
            step: (lower.var(step)?, step),
            pair: (lower.var(pairs.max(1))?, pairs),
            sums: lower.register(dtype, owns.sums),
            owns,
        })
    }

    /// What a thread does for each of its columns.
    fn across(&self, lanes: bool, body: Vec<Stmt>) -> Vec<Stmt> {
        let [high, low] = self.owns.columns.loops;
        unroll(high, if lanes { vector(low, body) } else { unroll(low, body) })
    }

    /// Brings a piece of both operands, the one that begins at a product.
    fn bring(&self, lower: &Lower, axes: &Axes, piece: &Affine, half: usize) -> Vec<Stmt> {
        let groups = [&axes.rows, &axes.columns];
        let bring = |side: usize| {
            let from = (groups[side], &self.starts[side].1);
            let to = self.pieces[side].buffers[half];
            self.pieces[side].bring(lower, &axes.operands[side], from, (&axes.sums, piece), to)
        };
        [bring(0), bring(1)].concat()
    }

    /// Sums the products of a piece.
    fn add(&self, lower: &Lower, half: usize, lanes: bool) -> Vec<Stmt> {
        let at = scaled(self.turn.0, self.step.1).plus(self.step.0.into(), 1);
        let step = if self.warp {
            self.multiply(lower, half, &at)
        } else {
            self.fma(lower, half, &at, lanes)
        };
        let body = unroll(self.step, step);
        let (var, extent) = self.turn;
        self.owns.all(vec![Stmt::For { var, extent, kind: Kind::Serial, body }])
    }

    /// A product of each row and column of a thread.
    fn fma(&self, lower: &Lower, half: usize, at: &Affine, lanes: bool) -> Vec<Stmt> {
        let load = |side: usize, line: &Affine| {
            let piece = &self.pieces[side];
            let buffer = piece.buffers[half];
            let load = Arc::new(Expr::Load(buffer, Place::affine(piece.place(line, at))));
            match lower.buffers[buffer].dtype == self.dtype {
                true => load,
                false => Arc::new(Expr::Cast(self.dtype, load)),
            }
        };
        let (x, y) = (load(0, &self.owns.rows.line), load(1, &self.owns.columns.line));
        let place = &self.owns.place;
        let before = Arc::new(Expr::Load(self.sums, Place::affine(place.clone())));
        let value = match self.dtype.is_float() {
            true => Expr::Fma(x, y, before),
            false => {
                Expr::Binary(BinaryFn::Add, before, Arc::new(Expr::Binary(BinaryFn::Mul, x, y)))
            }
        };
        let update = store(self.sums, place.clone(), value);
        self.owns.rows.each(self.across(lanes, vec![update]))
    }

    /// Products of the rows and columns of a warp.
    fn multiply(&self, lower: &Lower, half: usize, at: &Affine) -> Vec<Stmt> {
        let (rows, columns) = (&self.owns.rows, &self.owns.columns);
        let side = |side: usize, line: &Affine| {
            let piece = &self.pieces[side];
            let buffer = piece.buffers[half];
            let products = WARP_BYTES / lower.buffers[buffer].dtype.bytes();
            let place = piece.place(line, &times(at, products));
            Side { buffer, place, steps: piece.steps.map(|step| step as i64) }
        };
        let sides = [side(0, &rows.start), side(1, &columns.start)];
        let place = [rows.loops[1].0, columns.loops[1].0].into_iter();
        let lanes = &self.owns.threads[2..];
        // The lanes of a warp have sums of the same numbers.
        let place = place.fold(self.owns.place.clone(), |place, var| without(&place, var));
        let multiply = Multiply { sums: (self.sums, place), sides, lane: [lanes[0].0, lanes[1].0] };
        let body = vec![Stmt::Multiply(Box::new(multiply))];
        unroll(rows.loops[0], unroll(columns.loops[0], body))
    }

    /// Blocks of threads, one for each tile.
    fn all(&self, lower: &mut Lower, axes: &Axes, end: (BufferId, &Stmt)) -> Lowering<Vec<Stmt>> {
        let result = std::slice::from_ref(end.1);
        let innermost = axes.columns.innermost().filter(|_| axes.columns.holds(self.owns.near()));
        let vector = innermost.is_some_and(|n| is_vector(&lower.buffers, result, n.0));
        let lanes = vector && !self.warp && !self.pieces[1].along;
        let near = lanes || innermost.is_some() && self.warp;
        let first = store(self.sums, self.owns.place.clone(), zero(self.dtype));
        let mut body = self.owns.all(self.owns.rows.each(self.across(lanes, vec![first])));
        let count = self.count;
        let from = self.part.map_or(Affine::default(), |p| scaled(p.0, count * self.depth));
        let number = |n: usize| Affine { offset: (n * self.depth) as i64, ..from.clone() };
        body.extend(self.bring(lower, axes, &number(0), 0));
        // Two pieces a turn: each is summed while the one after it is brought.
        let (var, extent) = self.pair;
        let mut inside = Vec::new();
        for half in [0, 1] {
            let next = sum(&scaled(var, 2 * self.depth), &number(half + 1));
            inside.extend(self.bring(lower, axes, &next, 1 - half));
            inside.extend(self.add(lower, half, lanes));
        }
        if extent > 0 {
            body.push(Stmt::For { var, extent, kind: Kind::Serial, body: inside });
        }
        if count.is_multiple_of(2) {
            body.extend(self.bring(lower, axes, &number(count - 1), 1));
        }
        (0..2 - count % 2).for_each(|half| body.extend(self.add(lower, half, lanes)));
        body.extend(self.end(lower, axes, end, near));
        let starts =
            self.part.map(|part| part.0).into_iter().chain(self.starts.iter().map(|s| s.0));
        let loops: Vec<Var> = axes.outer.iter().copied().chain(starts).collect();
        gpu::blocks(lower, &loops, body)
    }

    /// The end: each element where there is one, or neighbours at once where they are `near`.
    fn end(
        &self,
        lower: &mut Lower,
        axes: &Axes,
        (cell, result): (BufferId, &Stmt),
        near: bool,
    ) -> Vec<Stmt> {
        let none = || (Affine::default(), 1);
        let (rows, columns) = (&self.owns.rows, &self.owns.columns);
        let row = Flat { base: sum(&self.starts[0].1, &rows.line), rest: none() };
        let column = sum(&self.starts[1].1, &columns.line);
        let [high, low] = columns.loops;
        let column = match near {
            true => Flat { base: without(&column, low.0), rest: (scaled(low.0, 1), low.1) },
            false => Flat { base: column, rest: none() },
        };
        let groups = [(&axes.rows, &row), (&axes.columns, &column)];
        let short = lower.buffers[cell].dtype;
        let place = &self.owns.place;
        let mut end = computed(std::slice::from_ref(result), &|a| in_groups(a, &groups));
        if short == self.dtype {
            end = retarget(&end, cell, self.sums, place);
        } else {
            // Short floats are rounded once, at the end of their sums.
            let at = scaled(low.0, 1);
            let rounded = lower.register(short, low.1);
            let before = Expr::Load(self.sums, Place::affine(place.clone()));
            let value = Expr::Cast(short, Arc::new(before));
            end = retarget(&end, cell, rounded, &at);
            end.insert(0, store(rounded, at, value));
        }
        let [all_rows, all] = [axes.rows.extent(), axes.columns.extent()];
        let end = match near {
            true => {
                let end = if self.warp { pairs(lower, low, end) } else { vector(low, end) };
                unroll(high, below(lower, &column.base, all - (low.1 - 1), end, Vec::new()))
            }
            false => self.across(false, below(lower, &column.base, all, end, Vec::new())),
        };
        let end = below(lower, &row.base, all_rows, end, Vec::new());
        self.owns.all(rows.each(end))
    }
}

/// Statements that end in a store, for two neighbours: both are computed before one is stored, so
/// that what is read for them, and they themselves, are beside each other.
pub fn pairs(lower: &mut Lower, near: (Var, usize), mut body: Vec<Stmt>) -> Vec<Stmt> {
    let Some(Stmt::Store { buffer, place, value }) = body.pop() else { return body };
    let kept = lower.register(lower.buffers[buffer].dtype, near.1);
    let at = scaled(near.0, 1);
    body.push(store(kept, at.clone(), value));
    let value = Expr::Load(kept, Place::affine(at));
    let store = Stmt::Store { buffer, place, value };
    [unroll(near, body), unroll(near, vec![store])].concat()
}
