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
use super::flat::{Flat, Group, sum};
use super::gpu;
use super::index::{Index, add};
use super::ir::{BufferId, Expr, Kind, Number, Place, Stmt, Var};
use super::lower::{Lower, Lowering, origin_place};
use super::nest::{coalesce, is_vector};
use super::rewrite::{computed, retarget};
use crate::graph::op::{Affine, BinaryFn};

/// Threads along each side of a tile.
const SIDE: usize = 16;
/// Rows and columns of a thread, the most first.
const OWN: [[usize; 2]; 5] = [[8, 8], [4, 8], [4, 4], [2, 4], [1, 4]];
/// Products of a sum that are in shared memory at once.
const DEPTH: usize = 16;
/// Neighbours that a thread takes at once.
const VECTOR: usize = 4;
/// Rows and columns of fewer elements are not tiled, nor sums of fewer products.
const LEAST: usize = 16;
const LEAST_SUM: usize = 8;
/// Blocks that a GPU runs at once, about: one for each of its processors.
const PROCESSORS: usize = 132;
/// Sums that are written out.
const WRITTEN_OUT: usize = 256;

/// An operand: where it lies, and what it is widened to.
struct Operand {
    buffer: BufferId,
    place: Affine,
}

/// The axes of a tile, and the operands that move along rows and along columns.
struct Axes {
    rows: Group,
    columns: Group,
    sums: Group,
    operands: [Operand; 2],
    /// The loops around tiles.
    outer: Vec<Var>,
}

fn scaled(var: Var, step: usize) -> Affine {
    Affine::scaled(var.into(), step as i64)
}

fn unroll(var: Var, extent: usize, body: Vec<Stmt>) -> Vec<Stmt> {
    vec![Stmt::For { var, extent, kind: Kind::Unroll, body }]
}

fn vector(var: Var, body: Vec<Stmt>) -> Vec<Stmt> {
    vec![Stmt::For { var, extent: VECTOR, kind: Kind::Vector, body }]
}

fn threads([slow, fast]: [(Var, usize); 2], body: Vec<Stmt>) -> Stmt {
    let (kind, (var, extent)) = (Kind::Thread, fast);
    let body = vec![Stmt::For { var, extent, kind, body }];
    let (var, extent) = slow;
    Stmt::For { var, extent, kind, body }
}

fn store(buffer: BufferId, place: Affine, value: Expr) -> Stmt {
    Stmt::Store { buffer, place: Place::affine(place), value }
}

/// Statements where an index is below a bound; others where it is not. No question where it
/// always is.
fn below(
    lower: &Lower,
    index: &Affine,
    bound: usize,
    then: Vec<Stmt>,
    other: Vec<Stmt>,
) -> Vec<Stmt> {
    let (low, high) = index.range(&lower.extents);
    if high < bound as i64 || low >= bound as i64 {
        return if high < bound as i64 { then } else { other };
    }
    let bound = Arc::new(Expr::Const(DType::I64, Number::Int(bound as i128)));
    let condition = Expr::Binary(BinaryFn::Lt, Arc::new(Expr::Index(index.clone())), bound);
    vec![Stmt::If { condition, then, other }]
}

/// What a sum of products is summed in, for results of a dtype.
fn sums_of(dtype: DType) -> Option<DType> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Some(DType::F32),
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
    let known = dtype == sums || dtype.is_float() == sums.is_float() && dtype.bytes() < 4;
    (known && dtype != DType::Bool).then(|| Operand { buffer: *buffer, place: affine.clone() })
}

/// The statements of a contraction in tiles, where it has axes for them.
pub fn tiles(lower: &mut Lower, product: &Product) -> Lowering<Option<Vec<Stmt>>> {
    let [x, y] = product.operands.clone();
    let Some(dtype) = sums_of(lower.buffers[product.cell].dtype) else { return Ok(None) };
    let whole = |v: &Var| lower.span(*v).is_none();
    let fixed = product.vars.iter().chain(&product.summed).all(whole);
    if lower.target.threads < SIDE * SIDE || !fixed {
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
    let Some(axes) = axes(lower, &body, (vars, sums), dtype) else {
        lower.extents = before;
        return Ok(None);
    };
    let tile = Tile::new(lower, &axes, dtype)?;
    Ok(Some(tile.all(lower, &axes, (product.cell, &body[1]))?))
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
    let large = rows.extent() >= LEAST && columns.extent() >= LEAST;
    let [x, y] = loads;
    let operands = if side { [x, y] } else { [y, x] };
    let axes = Axes { rows, columns, sums, operands, outer };
    (large && axes.sums.extent() >= LEAST_SUM).then_some(axes)
}

/// Rows and columns of a thread with which the blocks of a kernel take the least time.
fn own(blocks: usize, rows: usize, columns: usize) -> [usize; 2] {
    let time = |[r, c]: &[usize; 2]| {
        let tiles = rows.div_ceil(SIDE * r) * columns.div_ceil(SIDE * c);
        let turns = (blocks * tiles).div_ceil(PROCESSORS);
        // Products, and what is read from shared memory for them.
        turns * (r * c + 2 * (r + c))
    };
    OWN.into_iter().min_by_key(time).unwrap_or(OWN[0])
}

/// A piece of an operand in shared memory.
struct Piece {
    /// Twice, so that one is filled while the other one is read.
    buffers: [BufferId; 2],
    /// Steps from line to line, and from product to product.
    steps: [usize; 2],
    /// Whether the products of a line are neighbours, or else the lines of a product.
    along: bool,
    /// Whether neighbours in memory are brought at once.
    vector: bool,
    /// Variables: of threads, of turns, and of neighbours.
    slow: (Var, usize),
    fast: (Var, usize),
    turn: (Var, usize),
    near: Var,
}

impl Piece {
    fn new(
        lower: &mut Lower,
        operand: &Operand,
        (group, sums): (&Group, &Group),
        lines: usize,
    ) -> Lowering<Piece> {
        let dtype = lower.buffers[operand.buffer].dtype;
        let step = |g: &Group| {
            g.innermost().map_or((0, 0), |v| (operand.place.coefficient(v.0.into()), v.1))
        };
        let (line, product) = (step(group), step(sums));
        let along = product.0 == 1 && (line.0 != 1 || product.1 > line.1);
        // Lines do not lie in the same banks, and are aligned to 16 bytes.
        let room = 16 / dtype.bytes();
        let steps = if along { [DEPTH + room, 1] } else { [1, lines + room] };
        let len = if along { lines * steps[0] } else { DEPTH * steps[1] };
        let (minor, major) = if along { (DEPTH, lines) } else { (lines, DEPTH) };
        let fast = minor / VECTOR;
        let slow = (SIDE * SIDE / fast).min(major);
        let vector = match along {
            true => sums.holds(VECTOR),
            false => line.0 == 1 && group.holds(VECTOR),
        };
        Ok(Piece {
            buffers: [(); 2].map(|()| gpu::shared(lower, dtype, len)),
            steps,
            along,
            vector,
            slow: (lower.var(slow)?, slow),
            fast: (lower.var(fast)?, fast),
            turn: (lower.var(major / slow)?, major / slow),
            near: lower.var(VECTOR)?,
        })
    }

    /// The place of an element.
    fn place(&self, line: &Affine, product: &Affine) -> Affine {
        let times = |a: &Affine, step: usize| {
            a.terms.iter().fold(Affine::constant(a.offset * step as i64), |sum, t| {
                sum.plus(t.0.into(), t.1 * step as i64)
            })
        };
        sum(&times(line, self.steps[0]), &times(product, self.steps[1]))
    }

    /// Brings a piece of an operand, zeros beyond its ends: neighbours in memory by neighbouring
    /// threads.
    fn bring(
        &self,
        lower: &Lower,
        operand: &Operand,
        (group, start): (&Group, &Affine),
        (sums, piece): (&Group, &Affine),
        to: BufferId,
    ) -> Stmt {
        let major = scaled(self.slow.0, 1).plus(self.turn.0.into(), self.slow.1 as i64);
        let minor = scaled(self.fast.0, VECTOR);
        let near = scaled(self.near, 1);
        let none = (Affine::default(), 1);
        // What stays within an innermost axis needs no division.
        let (line, product) = match self.along {
            true => (
                Flat { base: sum(start, &major), rest: none.clone() },
                match (sums.holds(DEPTH), self.vector) {
                    (true, _) => Flat { base: piece.clone(), rest: (sum(&minor, &near), DEPTH) },
                    (_, true) => Flat { base: sum(piece, &minor), rest: (near.clone(), VECTOR) },
                    _ => Flat { base: sum(piece, &sum(&minor, &near)), rest: none },
                },
            ),
            false => (
                match self.vector {
                    true => Flat { base: sum(start, &minor), rest: (near.clone(), VECTOR) },
                    false => Flat { base: sum(start, &sum(&minor, &near)), rest: none.clone() },
                },
                match sums.holds(DEPTH) {
                    true => Flat { base: piece.clone(), rest: (major.clone(), DEPTH) },
                    false => Flat { base: sum(piece, &major), rest: none },
                },
            ),
        };
        let inside = match self.along {
            true => self.place(&major, &sum(&minor, &near)),
            false => self.place(&sum(&minor, &near), &major),
        };
        let at = in_groups(&operand.place, &[(group, &line), (sums, &product)]);
        let copy = vec![store(to, inside.clone(), Expr::Load(operand.buffer, at))];
        let nothing = vec![store(to, inside, zero(lower.buffers[operand.buffer].dtype))];
        let each = |body: Vec<Stmt>| if self.vector { vector(self.near, body) } else { body };
        // Of neighbours that are brought at once the first one tells of all.
        let first = |flat: &Flat, neighbours: bool| match neighbours && self.vector {
            true => (without(&flat.whole(), self.near), VECTOR - 1),
            false => (flat.whole(), 0),
        };
        let (lines, depth) = (group.extent(), sums.extent());
        let (index, more) = first(&line, !self.along);
        let (copy, nothing) = (each(copy), each(nothing));
        let copy = below(lower, &index, lines - more, copy, nothing.clone());
        let (index, more) = first(&product, self.along);
        let copy = below(lower, &index, depth - more, copy, nothing);
        let copy = if self.vector { copy } else { unroll(self.near, VECTOR, copy) };
        threads([self.slow, self.fast], unroll(self.turn.0, self.turn.1, copy))
    }
}

/// The index without a variable.
fn without(index: &Affine, var: Var) -> Affine {
    let mut index = index.clone();
    index.terms.retain(|t| t.0 != var);
    index
}

/// A place with the axes of groups at indices.
fn in_groups(place: &Affine, groups: &[(&Group, &Flat)]) -> Index {
    groups.iter().fold(Place::affine(place.clone()), |at, (group, flat)| {
        let dynamic = Place { affine: Affine::default(), dynamic: at.dynamic };
        add(&group.place(&at.affine, flat), &dynamic)
    })
}

/// The rows or columns of a thread: `thread * each + low * near + high * SIDE * VECTOR`.
struct Own {
    thread: (Var, usize),
    low: (Var, usize, usize),
    high: (Var, usize),
}

impl Own {
    fn new(lower: &mut Lower, count: usize, apart: bool) -> Lowering<Own> {
        let low = count.min(VECTOR);
        let (each, near) = if apart { (1, SIDE) } else { (low, 1) };
        Ok(Own {
            thread: (lower.var(SIDE)?, each),
            low: (lower.var(low)?, low, near),
            high: (lower.var(count / low)?, count / low),
        })
    }

    /// The line of the tile.
    fn line(&self) -> Affine {
        scaled(self.thread.0, self.thread.1)
            .plus(self.low.0.into(), self.low.2 as i64)
            .plus(self.high.0.into(), (SIDE * VECTOR) as i64)
    }

    /// The number of it among those of the thread.
    fn number(&self) -> Affine {
        scaled(self.low.0, 1).plus(self.high.0.into(), self.low.1 as i64)
    }
}

/// Pairs of pieces of the sum after the first piece.
fn pairs(axes: &Axes) -> usize {
    (axes.sums.extent().div_ceil(DEPTH) - 1) / 2
}

/// A tile in the making.
struct Tile {
    dtype: DType,
    pieces: [Piece; 2],
    rows: Own,
    columns: Own,
    /// Where tiles begin.
    starts: [(Var, Affine); 2],
    /// Variables of the products of a piece, and of pairs of pieces.
    turn: (Var, usize),
    step: (Var, usize),
    pair: Var,
    /// The sums of all threads, and the place of one of them.
    sums: BufferId,
    place: Affine,
}

impl Tile {
    fn new(lower: &mut Lower, axes: &Axes, dtype: DType) -> Lowering<Tile> {
        let blocks = axes.outer.iter().map(|&v| lower.extents[usize::from(v)]).product();
        let own = own(blocks, axes.rows.extent(), axes.columns.extent());
        let tile = own.map(|n| n * SIDE);
        let groups = [&axes.rows, &axes.columns];
        let mut piece = |side: usize| {
            let groups = (groups[side], &axes.sums);
            Piece::new(lower, &axes.operands[side], groups, tile[side])
        };
        let pieces = [piece(0)?, piece(1)?];
        // Threads beside each other read lines beside each other, where these are not neighbours.
        let rows = Own::new(lower, own[0], false)?;
        let columns = Own::new(lower, own[1], pieces[1].along)?;
        let step = (WRITTEN_OUT / (own[0] * own[1])).clamp(1, DEPTH);
        let mut start = |side: usize| -> Lowering<(Var, Affine)> {
            let block = lower.var(groups[side].extent().div_ceil(tile[side]))?;
            Ok((block, scaled(block, tile[side])))
        };
        let starts = [start(0)?, start(1)?];
        let all = own[0] * own[1];
        let place = scaled(rows.thread.0, SIDE * all).plus(columns.thread.0.into(), all as i64);
        let row = rows.number();
        let place = row.terms.iter().fold(place, |p, t| p.plus(t.0.into(), t.1 * own[1] as i64));
        Ok(Tile {
            dtype,
            pieces,
            starts,
            turn: (lower.var(DEPTH / step)?, DEPTH / step),
            step: (lower.var(step)?, step),
            pair: lower.var(pairs(axes).max(1))?,
            sums: lower.register(dtype, SIDE * SIDE * all),
            place: sum(&place, &columns.number()),
            rows,
            columns,
        })
    }

    /// What a thread does for each of its rows and columns.
    fn each(&self, row: Vec<Stmt>) -> Vec<Stmt> {
        let (low, high) = (self.rows.low, self.rows.high);
        unroll(high.0, high.1, unroll(low.0, low.1, row))
    }

    /// What it does for each of its columns.
    fn across(&self, lanes: bool, body: Vec<Stmt>) -> Vec<Stmt> {
        let (low, high) = (self.columns.low, self.columns.high);
        let body = if lanes { vector(low.0, body) } else { unroll(low.0, low.1, body) };
        unroll(high.0, high.1, body)
    }

    fn threads(&self, body: Vec<Stmt>) -> Stmt {
        threads([(self.rows.thread.0, SIDE), (self.columns.thread.0, SIDE)], body)
    }

    /// Brings a piece of both operands, the one that begins at a product.
    fn bring(&self, lower: &Lower, axes: &Axes, piece: &Affine, half: usize) -> Vec<Stmt> {
        let groups = [&axes.rows, &axes.columns];
        let bring = |side: usize| {
            let from = (groups[side], &self.starts[side].1);
            let to = self.pieces[side].buffers[half];
            self.pieces[side].bring(lower, &axes.operands[side], from, (&axes.sums, piece), to)
        };
        vec![bring(0), bring(1)]
    }

    /// Sums the products of a piece.
    fn add(&self, lower: &Lower, half: usize, lanes: bool) -> Stmt {
        let at = scaled(self.turn.0, self.step.1).plus(self.step.0.into(), 1);
        let load = |side: usize, line: &Affine| {
            let piece = &self.pieces[side];
            let buffer = piece.buffers[half];
            let load = Arc::new(Expr::Load(buffer, Place::affine(piece.place(line, &at))));
            match lower.buffers[buffer].dtype == self.dtype {
                true => load,
                false => Arc::new(Expr::Cast(self.dtype, load)),
            }
        };
        let (x, y) = (load(0, &self.rows.line()), load(1, &self.columns.line()));
        let before = Arc::new(Expr::Load(self.sums, Place::affine(self.place.clone())));
        let value = match self.dtype.is_float() {
            true => Expr::Fma(x, y, before),
            false => {
                Expr::Binary(BinaryFn::Add, before, Arc::new(Expr::Binary(BinaryFn::Mul, x, y)))
            }
        };
        let update = store(self.sums, self.place.clone(), value);
        let update = unroll(self.step.0, self.step.1, self.each(self.across(lanes, vec![update])));
        let (var, extent) = self.turn;
        self.threads(vec![Stmt::For { var, extent, kind: Kind::Serial, body: update }])
    }

    /// Blocks of threads, one for each tile.
    fn all(&self, lower: &mut Lower, axes: &Axes, end: (BufferId, &Stmt)) -> Lowering<Vec<Stmt>> {
        let near = axes.columns.innermost().filter(|_| axes.columns.holds(VECTOR));
        let lanes = !self.pieces[1].along
            && near.is_some_and(|n| is_vector(&lower.buffers, std::slice::from_ref(end.1), n.0));
        let first = store(self.sums, self.place.clone(), zero(self.dtype));
        let mut body = vec![self.threads(self.each(self.across(lanes, vec![first])))];
        let count = axes.sums.extent().div_ceil(DEPTH);
        let number = |n: usize| Affine::constant((n * DEPTH) as i64);
        body.extend(self.bring(lower, axes, &number(0), 0));
        // Two pieces a turn: each is summed while the one after it is brought.
        let pairs = pairs(axes);
        let mut inside = Vec::new();
        for half in [0, 1] {
            let next = scaled(self.pair, 2 * DEPTH);
            let next = Affine { offset: ((half + 1) * DEPTH) as i64, ..next };
            inside.extend(self.bring(lower, axes, &next, 1 - half));
            inside.push(self.add(lower, half, lanes));
        }
        if pairs > 0 {
            let (var, kind) = (self.pair, Kind::Serial);
            body.push(Stmt::For { var, extent: pairs, kind, body: inside });
        }
        if count.is_multiple_of(2) {
            body.extend(self.bring(lower, axes, &number(count - 1), 1));
        }
        body.extend((0..2 - count % 2).map(|half| self.add(lower, half, lanes)));
        body.push(self.end(lower, axes, end, lanes));
        let loops: Vec<Var> =
            axes.outer.iter().copied().chain(self.starts.iter().map(|s| s.0)).collect();
        gpu::blocks(lower, &loops, body)
    }

    /// The end: each element where there is one.
    fn end(
        &self,
        lower: &mut Lower,
        axes: &Axes,
        (cell, result): (BufferId, &Stmt),
        lanes: bool,
    ) -> Stmt {
        let none = || (Affine::default(), 1);
        let row = Flat { base: sum(&self.starts[0].1, &self.rows.line()), rest: none() };
        let column = sum(&self.starts[1].1, &self.columns.line());
        let near = scaled(self.columns.low.0, 1);
        let column = match lanes {
            true => Flat { base: without(&column, self.columns.low.0), rest: (near, VECTOR) },
            false => Flat { base: column, rest: none() },
        };
        let groups = [(&axes.rows, &row), (&axes.columns, &column)];
        let short = lower.buffers[cell].dtype;
        let mut end = computed(std::slice::from_ref(result), &|a| in_groups(a, &groups));
        if short == self.dtype {
            end = retarget(&end, cell, self.sums, &self.place);
        } else {
            // Short floats are rounded once, at the end of their sums.
            let at = scaled(self.columns.low.0, 1);
            let rounded = lower.register(short, VECTOR);
            let before = Expr::Load(self.sums, Place::affine(self.place.clone()));
            let value = Expr::Cast(short, Arc::new(before));
            end = retarget(&end, cell, rounded, &at);
            end.insert(0, store(rounded, at, value));
        }
        let (rows, columns) = (axes.rows.extent(), axes.columns.extent());
        let high = self.columns.high;
        let end = match lanes {
            true => {
                let end = vector(self.columns.low.0, end);
                let more = VECTOR - 1;
                let end = below(lower, &column.base, columns - more, end, Vec::new());
                unroll(high.0, high.1, end)
            }
            false => self.across(false, below(lower, &column.base, columns, end, Vec::new())),
        };
        let end = below(lower, &row.base, rows, end, Vec::new());
        self.threads(self.each(end))
    }
}
