//! Attention on a GPU: a block of threads for some rows of queries, which read blocks of keys and
//! values one after another, once for all of these rows. What a block of keys adds to the sums of
//! weighted values is in powers of the greatest score so far; where a later block has a greater
//! one, the sums so far are multiplied by what that makes of their powers. So shared memory holds
//! the scores of a block of keys only, however many keys there are.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::attention::{Tiles, as_dtype, mixed, query_of, row_of, scores};
use super::contract::{self, zero};
use super::gpu;
use super::gpu_attention_warps::{Short, Warps};
use super::gpu_pieces::{below, scaled, store, threads, unroll};
use super::index::{Index, add, scale, to_expr};
use super::ir::{BufferId, Expr, Kind, Loops, Number, Place, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, Refused, origin_place};
use super::nest::wrap;
use super::rewrite::{computed, retarget, substitute};
use crate::graph::op::{Affine, BinaryFn, UnaryFn};
use crate::rules::attention::Attention;

/// Threads of a block at most.
const THREADS: usize = 128;
/// Rows of a block at most, and blocks at least where fewer rows make more of them.
const ROWS: usize = 16;
const BLOCKS: usize = 64;
/// Scores of a block of keys for each thread.
const EACH: usize = 16;
/// Products that are read from neighbours at once.
const NEAR: usize = 4;
/// Scores between lines, so that threads beside each other do not read the same bank.
const ROOM: usize = 8;

/// Rows of a block: of so many in all, `outer` times.
fn rows(total: usize, outer: usize) -> usize {
    let fits = |rows: &usize| {
        let enough = outer * total.div_ceil(*rows) >= BLOCKS || *rows <= ROWS / 4;
        *rows <= total && enough
    };
    let all = std::iter::successors(Some(ROWS), |rows| Some(rows / 2)).take_while(|r| *r > 1);
    all.into_iter().find(fits).unwrap_or(1)
}

/// What the threads of a block do.
pub struct Block {
    /// The variable of a row in the block, and how many there are.
    pub line: (Var, usize),
    /// The variable of all rows, and where those of the block begin.
    query: Option<(Var, Index)>,
    /// Where they would begin if all blocks had rows of their own, where some have not.
    own: Option<Affine>,
    /// The variable of blocks of keys, and how many keys these have.
    turn: (Var, usize),
    /// Loops over the threads of a row, and over rows.
    shares: [(Var, usize); 2],
    /// Shared memory: the scores of a block of keys, and the step from row to row.
    pub scores: (BufferId, usize),
    /// The same of their powers, which may take the place of scores.
    pub weights: (BufferId, usize),
    /// One number for each thread, and one for each row.
    parts: BufferId,
    factors: BufferId,
    /// Registers of the threads of a row: the greatest score so far, their sum of powers, and a
    /// number of the moment.
    most: BufferId,
    sum: BufferId,
    now: BufferId,
}

/// A value of f32.
fn number(value: f64) -> Arc<Expr> {
    Arc::new(Expr::Const(DType::F32, Number::Float(value)))
}

fn load(buffer: BufferId, place: &Affine) -> Arc<Expr> {
    Arc::new(Expr::Load(buffer, Place::affine(place.clone())))
}

fn two(f: BinaryFn, x: &Arc<Expr>, y: &Arc<Expr>) -> Expr {
    Expr::Binary(f, x.clone(), y.clone())
}

/// Rows and keys that a block of threads has at once, and the short floats that its warps multiply.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Rows.
    pub rows: usize,
    /// Keys.
    pub keys: usize,
    /// Threads, a multiple of the rows.
    pub threads: usize,
    /// Of what powers are, where warps multiply them with values.
    pub short: Option<DType>,
}

/// What there is to do for a block of threads.
struct Work {
    block: Block,
    /// The two products.
    tiles: [Tiles; 2],
    /// The index of a row of weights, and the variables of all rows and of the sum of values.
    row: Vec<Index>,
    query: Option<Var>,
    key: Var,
    /// Loops over blocks, and how often there are all rows.
    outer: Vec<Var>,
    count: usize,
}

/// The kernel of an attention.
pub fn lower(lower: Lower, root: usize, parts: &Attention, name: &str) -> Lowering<Lowered> {
    let mut by_threads = lower.fresh();
    let work = Work::new(&mut by_threads, root, parts, None)?;
    let short = Short::of(&by_threads, (work.query, work.key), &work.tiles);
    let (body, lower) = match short.and_then(|short| short.shape(work.count)) {
        None => (work.by_threads(&mut by_threads, parts)?, by_threads),
        Some(shape) => {
            let mut by_warps = lower.fresh();
            let work = Work::new(&mut by_warps, root, parts, Some(shape))?;
            (work.by_warps(&mut by_warps, parts)?, by_warps)
        }
    };
    let kernels = vec![Loops { name: name.to_string(), ..lower.finish(body) }];
    Ok(Lowered { kernels, scratch: Vec::new() })
}

impl Work {
    fn new(
        lower: &mut Lower,
        root: usize,
        parts: &Attention,
        shape: Option<Shape>,
    ) -> Lowering<Work> {
        let weight = lower.register(lower.ty(parts.weights).dtype, 1);
        lower.bind_cell(parts.weights, Expr::Load(weight, origin_place()), None);
        let product = contract::product(lower, root, parts.mixed)?;
        let asked = lower.asked(parts.weights);
        lower.unbind(parts.weights);
        let (key, row) = row_of(&product, asked.as_deref())?;
        let (query, mut outer) = query_of(&product, parts, &row)?;
        let keys = lower.extents[key as usize];
        let count: usize = outer.iter().map(|&v| lower.extents[v as usize]).product();
        let total = query.map_or(1, |q| lower.extents[q as usize]);
        let shape = shape.unwrap_or_else(|| {
            let (rows, threads) =
                (rows(total, count), keys.next_power_of_two().clamp(gpu::WARP, THREADS));
            Shape { rows, keys: EACH * threads / rows, threads, short: None }
        });
        let mut block = Block::new(lower, shape, keys)?;
        if let Some(query) = query {
            outer.push(block.begin(lower, query, total)?);
        }
        let ((line, _), (turn, most), (buffer, step)) = (block.line, block.turn, block.scores);
        // A key has its place among those of its block.
        let start = scaled(line, step).plus(turn.into(), -(most as i64));
        let line_of = (buffer, Place::affine(start));
        let scores = scores(lower, parts, (&row, keys), &line_of)?;
        let mixed = mixed(lower, product, parts.side, (key, None), &line_of)?;
        Ok(Work { block, tiles: [scores, mixed], row, query, key, outer, count })
    }

    /// Statements for all blocks of keys: made for where such a block begins, of so many.
    fn all_keys(
        &self,
        lower: &mut Lower,
        of: impl Fn(&mut Lower, &Affine, usize) -> Lowering<Vec<Stmt>>,
    ) -> Lowering<Vec<Stmt>> {
        let (turn, most) = self.block.turn;
        let keys = lower.extents[self.key as usize];
        let (whole, rest) = (keys / most, keys % most);
        let mut body = Vec::new();
        if whole > 0 {
            let inside = of(lower, &scaled(turn, most), most)?;
            body.push(Stmt::For { var: turn, extent: whole, kind: Kind::Serial, body: inside });
        }
        if rest > 0 {
            let inside = of(lower, &Affine::constant((whole * most) as i64), rest)?;
            body.extend(substitute(&inside, turn, &Affine::constant(whole as i64)));
        }
        Ok(body)
    }

    /// Each thread multiplies by itself.
    fn by_threads(&self, lower: &mut Lower, parts: &Attention) -> Lowering<Vec<Stmt>> {
        let (block, [scores, mixed]) = (&self.block, &self.tiles);
        let sums = Columns::new(lower, block, mixed)?;
        let mut body = block.first();
        body.extend(sums.first((block, mixed)));
        body.extend(self.all_keys(lower, |lower, start, count| {
            let mut body = block.scores(lower, scores, (start, count))?;
            body.extend(block.powers(lower, count)?);
            body.extend(sums.add(lower, (block, mixed), (self.key, start, count))?);
            Ok(body)
        })?);
        body.extend(block.last(lower, parts, &self.row)?);
        body.extend(sums.end(lower, (block, mixed)));
        gpu::blocks(lower, &self.outer, body)
    }

    /// Warps multiply.
    fn by_warps(&self, lower: &mut Lower, parts: &Attention) -> Lowering<Vec<Stmt>> {
        let (block, tiles) = (&self.block, &self.tiles);
        let refuse = || Refused("operands that warps do not multiply".into());
        let short = Short::of(lower, (self.query, self.key), tiles).ok_or_else(refuse)?;
        let warps = Warps::new(lower, (&short, block), tiles)?;
        let mut body = block.first();
        body.extend(warps.first(lower));
        body.extend(self.all_keys(lower, |lower, start, count| {
            let mut body = warps.scores(lower, start, count);
            body.extend(block.powers(lower, count)?);
            body.extend(warps.add());
            Ok(body)
        })?);
        body.extend(block.last(lower, parts, &self.row)?);
        body.extend(warps.end(lower));
        gpu::blocks(lower, &self.outer, body)
    }
}

impl Block {
    /// Of a shape, for so many keys.
    fn new(lower: &mut Lower, shape: Shape, keys: usize) -> Lowering<Block> {
        let Shape { rows, keys: most, threads, short } = shape;
        lower.row_threads = threads;
        let (share, step) = (threads / rows, most + ROOM);
        let scores = (gpu::shared(lower, DType::F32, rows * step), step);
        let weights = match short {
            Some(dtype) => (gpu::shared(lower, dtype, rows * step), step),
            None => scores,
        };
        Ok(Block {
            line: (lower.var(rows)?, rows),
            query: None,
            own: None,
            turn: (lower.var((keys / most).max(1))?, most),
            shares: [(lower.var(rows)?, rows), (lower.var(share)?, share)],
            scores,
            weights,
            parts: gpu::shared(lower, DType::F32, threads),
            factors: gpu::shared(lower, DType::F32, rows),
            most: lower.register(DType::F32, threads),
            sum: lower.register(DType::F32, threads),
            now: lower.register(DType::F32, threads),
        })
    }

    /// The rows of each block, of so many in all; gives the variable of blocks.
    fn begin(&mut self, lower: &mut Lower, query: Var, total: usize) -> Lowering<Var> {
        let (_, rows) = self.line;
        let block = lower.var(total.div_ceil(rows))?;
        let own = scaled(block, rows);
        let mut start = Place::affine(own.clone());
        if !total.is_multiple_of(rows) && !self.is_short() {
            // The last block begins earlier, so that all of its rows are there.
            let last = Expr::Const(DType::I64, Number::Int((total - rows) as i128));
            let least = Expr::Binary(BinaryFn::Min, Arc::new(to_expr(&start)), Arc::new(last));
            start = Place { affine: Affine::default(), dynamic: Some(Arc::new(least)) };
            self.own = Some(own);
        }
        self.query = Some((query, start));
        Ok(block)
    }

    /// Whether warps multiply powers of scores.
    fn is_short(&self) -> bool {
        self.weights.0 != self.scores.0
    }

    /// Where its rows begin.
    pub fn start(&self) -> Index {
        self.query.as_ref().map_or(origin_place(), |query| query.1.clone())
    }

    /// Number of a thread of a row.
    fn thread(&self) -> Affine {
        let [(row, _), (share, shares)] = self.shares;
        scaled(row, shares).plus(share.into(), 1)
    }

    /// Statements for each thread of each row.
    fn each(&self, body: Vec<Stmt>) -> Vec<Stmt> {
        threads(&self.shares, self.at(&body, &scaled(self.shares[0].0, 1)))
    }

    /// Before the first block of keys.
    fn first(&self) -> Vec<Stmt> {
        let at = self.thread();
        let most = store(self.most, at.clone(), (*number(f64::NEG_INFINITY)).clone());
        self.each(vec![most, store(self.sum, at, zero(DType::F32))])
    }

    /// A thread for each key: it sums the products of all rows.
    fn scores(
        &self,
        lower: &mut Lower,
        tiles: &Tiles,
        (start, count): (&Affine, usize),
    ) -> Lowering<Vec<Stmt>> {
        let place = scaled(self.line.0, 1);
        let sums = lower.register(DType::F32, self.line.1);
        let own = |body: &[Stmt]| retarget(body, tiles.cell, sums, &place);
        let all = |body: Vec<Stmt>| unroll(self.line, body);
        let first = store(tiles.cell, Affine::default(), zero(DType::F32));
        let mut body = all(own(&[first]));
        let update = all(own(&[tiles.update(tiles.operands[0].clone())]));
        body.extend(match tiles.summed.split_last() {
            None => update,
            Some((&inner, outer)) => {
                let extent = lower.extents[inner as usize];
                let body = in_fours(lower, inner, extent, update)?;
                wrap(&lower.extents, outer, body, 0)
            }
        });
        body.extend(all(own(&tiles.end)));
        let key = lower.var(count)?;
        let index = start.clone().plus(key.into(), 1);
        let body = substitute(&self.placed(&body), tiles.lanes, &index);
        gpu::pass(lower, vec![key], body)
    }

    /// The powers of a block of keys in place of their scores; the greatest score so far and the
    /// sum of powers; and for each row what becomes of its powers so far.
    fn powers(&self, lower: &mut Lower, count: usize) -> Lowering<Vec<Stmt>> {
        let [(row, _), (share, shares)] = self.shares;
        let at = self.thread();
        let own = if self.is_short() { self.turn.1 } else { count }.div_ceil(shares);
        let turn = (lower.var(own)?, own);
        let element = scaled(turn.0, shares).plus(share.into(), 1);
        let score = scaled(row, self.scores.1).plus(turn.0.into(), shares as i64);
        let score = score.plus(share.into(), 1);
        let set = |buffer: BufferId, value: Expr| store(buffer, at.clone(), value);
        let [most, sum, now] = [self.most, self.sum, self.now].map(|buffer| load(buffer, &at));
        let mut first = vec![set(self.now, (*number(f64::NEG_INFINITY)).clone())];
        let greater = two(BinaryFn::Max, &now, &load(self.scores.0, &score));
        let greater = vec![set(self.now, greater)];
        first.extend(unroll(turn, below(lower, &element, count, greater, Vec::new())));
        first.push(set(self.parts, (*now).clone()));
        // Where no score is finite yet, powers are 0, as if there were one.
        let finite = |x: &Arc<Expr>| Arc::new(two(BinaryFn::Max, x, &number(f32::MIN.into())));
        let power = |x: &Arc<Expr>, most: &Arc<Expr>| {
            let apart = Arc::new(two(BinaryFn::Sub, x, &finite(most)));
            Arc::new(Expr::Unary(UnaryFn::Exp, apart))
        };
        let mut second = vec![set(self.now, (*most).clone())];
        let (other, turns) = (lower.var(shares)?, shares);
        let part = scaled(row, shares).plus(other.into(), 1);
        let greater = two(BinaryFn::Max, &now, &load(self.parts, &part));
        second.extend(in_fours(lower, other, turns, vec![set(self.now, greater)])?);
        let factor = power(&finite(&most), &now);
        let one = store(self.factors, scaled(row, 1), (*factor).clone());
        second.extend(below(lower, &scaled(share, 1), 1, vec![one], Vec::new()));
        second.push(set(self.sum, two(BinaryFn::Mul, &sum, &factor)));
        second.push(set(self.most, (*now).clone()));
        let value = (*power(&load(self.scores.0, &score), &most)).clone();
        let add = two(BinaryFn::Add, &sum, &now);
        let dtype = lower.buffers[self.weights.0].dtype;
        let keep = |value: Arc<Expr>| {
            store(self.weights.0, score.clone(), (*as_dtype(lower, dtype, value)).clone())
        };
        let all = vec![set(self.now, value), set(self.sum, add), keep(now)];
        // Warps multiply what is behind the last key as well.
        let none = if self.is_short() { vec![keep(number(0.0))] } else { Vec::new() };
        second.extend(unroll(turn, below(lower, &element, count, all, none)));
        Ok([self.each(first), self.each(second)].concat())
    }

    /// After the last block of keys: for each row what its weighted sums are multiplied with, which
    /// is the weight that a power of 1 has.
    fn last(&self, lower: &mut Lower, parts: &Attention, row: &[Index]) -> Lowering<Vec<Stmt>> {
        let [(line, _), (share, shares)] = self.shares;
        let at = self.thread();
        let [most, sum, now] = [self.most, self.sum, self.now].map(|buffer| load(buffer, &at));
        let first = store(self.parts, at.clone(), (*sum).clone());
        // Of a row without a finite score the sum is no number, as without blocks.
        let start = store(self.now, at.clone(), two(BinaryFn::Sub, &most, &most));
        let other = lower.var(shares)?;
        let part = scaled(line, shares).plus(other.into(), 1);
        let add = store(self.now, at.clone(), two(BinaryFn::Add, &now, &load(self.parts, &part)));
        let mut second = vec![start];
        second.extend(in_fours(lower, other, shares, vec![add])?);
        for (node, value) in [(parts.sum, now), (parts.powers, number(1.0))] {
            let value = as_dtype(lower, lower.ty(node).dtype, value);
            lower.bind_cell(node, (*value).clone(), None);
        }
        let mut index = row.to_vec();
        index.push(origin_place());
        let weight = lower.value(parts.weights, &index)?;
        let weight = (*as_dtype(lower, DType::F32, weight)).clone();
        let weight = store(self.factors, scaled(self.line.0, 1), weight);
        second.extend(below(lower, &scaled(share, 1), 1, vec![weight], Vec::new()));
        Ok([self.each(vec![first]), self.each(second)].concat())
    }

    /// What a sum of a row becomes before values of a block of keys are added.
    pub fn rescaled(&self, cell: BufferId) -> Stmt {
        let factor = load(self.factors, &scaled(self.line.0, 1));
        let product = two(BinaryFn::Mul, &load(cell, &Affine::default()), &factor);
        store(cell, Affine::default(), product)
    }

    /// What a sum of a row becomes at the end.
    pub fn weighted(&self, cell: BufferId) -> Stmt {
        let factor = load(self.factors, &scaled(self.line.0, 1));
        let product = Arc::new(two(BinaryFn::Mul, &load(cell, &Affine::default()), &factor));
        // Weights that are all 0 are so because what they would be is no number.
        let none = Arc::new(two(BinaryFn::Eq, &factor, &number(0.0)));
        store(cell, Affine::default(), Expr::Select(none, number(0.0), product))
    }

    /// A store of a row by its own block only.
    fn stored(&self, result: Stmt) -> Stmt {
        let (Some((_, start)), Some(own)) = (&self.query, &self.own) else { return result };
        let row = to_expr(&add(start, &Place::affine(scaled(self.line.0, 1))));
        let first = Arc::new(Expr::Index(own.clone()));
        let condition = Expr::Binary(BinaryFn::Le, first, Arc::new(row));
        Stmt::If { condition, then: vec![result], other: Vec::new() }
    }

    /// Statements for a row of the block.
    pub fn at(&self, body: &[Stmt], line: &Affine) -> Vec<Stmt> {
        substitute(&self.placed(body), self.line.0, line)
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

/// Sums of weighted values: each thread has some rows of some columns.
struct Columns {
    /// Loops over threads: groups of rows, and columns.
    threads: [(Var, usize); 2],
    /// Loops over the columns and over the rows of a thread.
    own: [(Var, usize); 2],
    /// The column, and the row in the block.
    column: Affine,
    line: Affine,
    /// How many columns there are.
    width: usize,
    /// The sums, and the place of one.
    buffer: BufferId,
    place: Affine,
}

impl Columns {
    fn new(lower: &mut Lower, block: &Block, mixed: &Tiles) -> Lowering<Columns> {
        let (width, rows) = (lower.extents[mixed.lanes as usize], block.line.1);
        let many = width.div_ceil(lower.row_threads);
        let columns = width.div_ceil(many);
        let groups = std::iter::successors(Some(rows), |n| Some(n / 2));
        let groups = groups.take_while(|n| *n > 1).find(|n| n * columns <= lower.row_threads);
        let groups = groups.unwrap_or(1);
        let threads = [(lower.var(groups)?, groups), (lower.var(columns)?, columns)];
        let lines = rows / groups;
        let own = [(lower.var(many)?, many), (lower.var(lines)?, lines)];
        let each = many * lines;
        let place = scaled(threads[0].0, columns * each).plus(threads[1].0.into(), each as i64);
        let place = place.plus(own[0].0.into(), lines as i64).plus(own[1].0.into(), 1);
        Ok(Columns {
            threads,
            own,
            column: scaled(own[0].0, columns).plus(threads[1].0.into(), 1),
            line: scaled(threads[0].0, lines).plus(own[1].0.into(), 1),
            width,
            buffer: lower.register(DType::F32, groups * columns * each),
            place,
        })
    }

    /// Statements for each row of a thread, in which a cell stands for its sum.
    fn lines(&self, (block, mixed): (&Block, &Tiles), body: &[Stmt]) -> Vec<Stmt> {
        let body = retarget(body, mixed.cell, self.buffer, &self.place);
        unroll(self.own[1], block.at(&body, &self.line))
    }

    /// Statements for each column of each thread.
    fn columns(&self, lower: &Lower, mixed: &Tiles, body: &[Stmt]) -> Vec<Stmt> {
        let body = substitute(body, mixed.lanes, &self.column);
        let body = below(lower, &self.column, self.width, body, Vec::new());
        threads(&self.threads, unroll(self.own[0], body))
    }

    /// Before the first block of keys. Sums of columns that are not there begin as well: what is
    /// set in a branch only is nothing after it.
    fn first(&self, (block, mixed): (&Block, &Tiles)) -> Vec<Stmt> {
        let first = store(mixed.cell, Affine::default(), zero(DType::F32));
        threads(&self.threads, unroll(self.own[0], self.lines((block, mixed), &[first])))
    }

    /// Adds the values of a block of keys, times their powers.
    fn add(
        &self,
        lower: &mut Lower,
        (block, mixed): (&Block, &Tiles),
        (key, start, count): (Var, &Affine, usize),
    ) -> Lowering<Vec<Stmt>> {
        let own = lower.var(count)?;
        let mut body = self.lines((block, mixed), &[block.rescaled(mixed.cell)]);
        let update = mixed.update(mixed.operands[0].clone());
        let update = self.lines((block, mixed), &[update]);
        let update = substitute(&update, key, &start.clone().plus(own.into(), 1));
        body.extend(in_fours(lower, own, count, update)?);
        Ok(self.columns(lower, mixed, &body))
    }

    /// Stores the results.
    fn end(&self, lower: &Lower, (block, mixed): (&Block, &Tiles)) -> Vec<Stmt> {
        let mut body = vec![block.weighted(mixed.cell)];
        let mut end = mixed.end.clone();
        let result = end.pop().map(|result| block.stored(result));
        body.extend(end.into_iter().chain(result));
        self.columns(lower, mixed, &self.lines((block, mixed), &body))
    }
}

/// Turns of a loop, some neighbours of which are written out.
fn in_fours(lower: &mut Lower, var: Var, extent: usize, body: Vec<Stmt>) -> Lowering<Vec<Stmt>> {
    let (whole, rest) = (extent / NEAR, extent % NEAR);
    let mut out = Vec::new();
    if whole > 0 {
        let (turn, near) = (lower.var(whole)?, (lower.var(NEAR)?, NEAR));
        let index = scaled(turn, NEAR).plus(near.0.into(), 1);
        let body = unroll(near, substitute(&body, var, &index));
        out.push(Stmt::For { var: turn, extent: whole, kind: Kind::Serial, body });
    }
    if rest > 0 {
        let near = (lower.var(rest)?, rest);
        let index = Affine { offset: (whole * NEAR) as i64, ..scaled(near.0, 1) };
        out.extend(unroll(near, substitute(&body, var, &index)));
    }
    Ok(out)
}
