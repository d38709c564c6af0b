//! Attention as one kernel. A block of query rows gets its scores for all keys, their softmax, and
//! the sums of weighted values, before the next block: scores stay in the cache. Threads share the
//! blocks; those of one piece use the same scratch memory, one after another.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{self, Product, Shape, plain_load};
use super::index::{Index, add};
use super::ir::{BufferId, Expr, Kind, Loops, Number, Param, Place, Scope, Stmt, Var, dtype};
use super::lower::{Lower, Lowered, Lowering, Refused, origin_place};
use super::panels::{self, Strip};
use super::{nest, rewrite, turn};
use crate::graph::op::{Affine, BinaryFn, Op, ReduceFn, UnaryFn};
use crate::rules::attention::{Attention, FEW, MANY};

/// Rows of a block at most.
const ROWS: usize = 24;
/// Scores of a block at most, where it has more than a few rows: they share a cache of the second
/// level with keys and values.
const SCORES: usize = 1 << 16;
const LEAST: usize = 4;
/// Pieces for threads, where there are so many blocks: each packs keys and values for itself.
const PIECES: usize = 16;
/// Rows of values that are read as they lie: more of them drive each other out of the cache.
const CLOSE: usize = 512;
/// How rows are shared out: `pieces` times `blocks` blocks of `rows` rows, and the rows left over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shares {
    rows: usize,
    blocks: usize,
    pieces: usize,
    left: usize,
}

/// The blocks of so many rows, where other axes make `outer` pieces.
fn shares(total: usize, keys: usize, outer: usize) -> Shares {
    let most = ROWS.min((SCORES / keys).max(LEAST)).min(total);
    let whole = (most / 2 + 1..=most).rev().find(|&rows| total.is_multiple_of(rows));
    let rows = whole.unwrap_or(most);
    let blocks = total / rows;
    let most = (total / MANY).clamp(1, 2 * PIECES.div_ceil(outer));
    let wanted = PIECES.div_ceil(outer).min(most);
    let pieces = (wanted..=most).chain((1..wanted).rev()).find(|p| blocks.is_multiple_of(*p));
    let pieces = pieces.unwrap_or(1);
    Shares { rows, blocks: blocks / pieces, pieces, left: total % rows }
}

/// A contraction over the rows of a block.
pub struct Tiles {
    /// The cell that is summed into.
    pub cell: BufferId,
    /// The variable that goes into lanes.
    pub lanes: Var,
    /// Those of the sum.
    pub summed: Vec<Var>,
    /// The operand that goes into lanes, and the other one.
    pub operands: [Arc<Expr>; 2],
    /// What is done at the end: the result is stored.
    pub end: Vec<Stmt>,
    /// How the lanes are filled.
    way: Way,
}

/// How the axis of a contraction that is meant for lanes gets there.
#[derive(Clone, PartialEq, Debug)]
enum Way {
    /// As it lies.
    Lanes,
    /// Packed into panels in a buffer, for each piece from a place on.
    Panels(BufferId, Affine),
    /// One element after another, each a sum across lanes.
    Across,
    /// One element after another.
    Single,
}

/// What is done for a block of rows.
struct Block {
    /// The variable of all rows, which blocks share.
    query: Option<Var>,
    /// The variable of a row within its block.
    line: Var,
    scores: Tiles,
    /// What is done for each row between the two contractions, for all rows one after another.
    passes: [Vec<Stmt>; 2],
    mixed: Tiles,
}

/// The kernel of an attention.
pub fn lower(mut lower: Lower, root: usize, parts: &Attention, name: &str) -> Lowering<Lowered> {
    if lower.target.threads > 0 {
        return super::gpu_attention::lower(lower, root, parts, name);
    }
    let weight = lower.register(DType::F32, 1);
    lower.bind_cell(parts.weights, Expr::Load(weight, origin_place()), None);
    let product = contract::product(&mut lower, root, parts.mixed)?;
    let asked = lower.asked(parts.weights);
    lower.unbind(parts.weights);
    let (key, row) = row_of(&product, asked.as_deref())?;
    let (query, outer) = query_of(&product, parts, &row)?;
    let keys = lower.extents[key as usize];
    let count: usize = outer.iter().map(|&v| lower.extents[v as usize]).product();
    let shares = shares(query.map_or(1, |q| lower.extents[q as usize]), keys, count);
    let mut pieces = Pieces { number: Affine::default(), count: 1, scratch: Vec::new() };
    let (piece, turn) = (lower.var(shares.pieces)?, lower.var(shares.blocks)?);
    for &v in outer.iter().chain([&piece]).rev() {
        pieces.number = pieces.number.plus(v as usize, pieces.count as i64);
        pieces.count *= lower.extents[v as usize];
    }
    // Rows are not a power of two apart, so that they do not fight for the same lines of a cache.
    // Behind its scores a row has places for what all its weights are multiplied with, and for its
    // maximum.
    let step = (keys + 2).next_multiple_of(16);
    let step = if step.is_multiple_of(512) { step + 16 } else { step };
    let (scratch, start) = pieces.buffer(&mut lower, shares.rows * step);
    let line = lower.var(shares.rows)?;
    let line_of = (scratch, Place::affine(start.plus(line as usize, step as i64)));
    let mut scores = scores(&mut lower, parts, (&row, keys), &line_of)?;
    let rows = shares.blocks * shares.rows;
    scores.way = way(&mut lower, &scores, (rows, query), &mut pieces);
    let most = most(&mut lower, parts, (&row, keys), &line_of)?;
    let (softmax, scale) = softmax(&mut lower, parts, (&row, keys), &line_of)?;
    let mut mixed = mixed(&mut lower, product, parts.side, (key, scale), &line_of)?;
    mixed.way = way(&mut lower, &mixed, (rows, query), &mut pieces);
    let mut inside = scores.pack(&mut lower)?;
    inside.extend(mixed.pack(&mut lower)?);
    let block = Block { query, line, scores, passes: [most, softmax], mixed };
    inside.extend(block.all(&mut lower, shares, (piece, turn))?);
    let loops = outer.into_iter().chain([piece]);
    let (loops, single): (Vec<Var>, Vec<Var>) = loops.partition(|&v| lower.extents[v as usize] > 1);
    let zero = Affine::constant(0);
    let inside = single.iter().fold(inside, |body, &v| rewrite::substitute(&body, v, &zero));
    let body = nest::wrap(&lower.extents, &loops, inside, loops.len());
    let kernels = vec![Loops { name: name.to_string(), ..lower.finish(body) }];
    Ok(Lowered { kernels, scratch: pieces.scratch })
}

/// The pieces that threads share, and the scratch memory of them all.
struct Pieces {
    /// Number of a piece.
    number: Affine,
    count: usize,
    scratch: Vec<(DType, usize)>,
}

impl Pieces {
    /// A buffer with so many elements for each piece, and where those of a piece begin.
    fn buffer(&mut self, lower: &mut Lower, each: usize) -> (BufferId, Affine) {
        let (number, len) = (self.scratch.len(), self.count * each);
        self.scratch.push((DType::F32, len));
        let buffer = lower.buffer(DType::F32, len, Scope::Global, Param::Scratch(number));
        let terms = self.number.terms.iter();
        let start = terms.fold(Affine::default(), |a, t| a.plus(t.0 as usize, t.1 * each as i64));
        (buffer, start)
    }
}

/// The variable of keys, and the index of a row of weights, from the index that is asked for.
pub fn row_of(product: &Product, asked: Option<&[Index]>) -> Lowering<(Var, Vec<Index>)> {
    let strange = || Refused("weights of another order".into());
    let (last, row) = asked.and_then(|a| a.split_last()).ok_or_else(strange)?;
    let (&[key], Some(&value)) = (product.summed.as_slice(), product.vars.last()) else {
        return Err(strange());
    };
    let fits = row.iter().all(|i| !moves(i, key) && !moves(i, value));
    let is_key = *last == Place::affine(Affine::axis(key as usize));
    if fits && is_key { Ok((key, row.to_vec())) } else { Err(strange()) }
}

fn moves(index: &Index, v: Var) -> bool {
    index.dynamic.is_some() || index.affine.coefficient(v as usize) != 0
}

/// The variable along which rows of a block differ, the innermost that weights have and values
/// have not; and the others of the result, but for the last.
pub fn query_of(
    product: &Product,
    parts: &Attention,
    row: &[Index],
) -> Lowering<(Option<Var>, Vec<Var>)> {
    let (_, outer) =
        product.vars.split_last().ok_or_else(|| Refused("a result without axes".into()))?;
    let values = plain_load(&product.operands[1 - parts.side]);
    let stays = |v: Var| values.is_some_and(|l| l.1.coefficient(v as usize) == 0);
    let is_row = |v: &Var| stays(*v) && row.iter().any(|i| moves(i, *v));
    let query = outer.iter().rev().copied().find(is_row);
    Ok((query, outer.iter().copied().filter(|&v| Some(v) != query).collect()))
}

/// The place of an element of a line of scratch memory.
fn place((_, start): &(BufferId, Index), key: Var) -> Place {
    add(start, &Place::affine(Affine::axis(key as usize)))
}

/// The scores of a row, from products of queries and keys.
pub fn scores(
    lower: &mut Lower,
    parts: &Attention,
    (row, keys): (&[Index], usize),
    line: &(BufferId, Index),
) -> Lowering<Tiles> {
    let (cell, dtype) = (lower.register(DType::F32, 1), lower.ty(parts.products).dtype);
    let sum = as_dtype(lower, dtype, Arc::new(Expr::Load(cell, origin_place())));
    lower.bind_cell(parts.products, (*sum).clone(), None);
    let key = lower.var(keys)?;
    let mut index = row.to_vec();
    index.push(Place::affine(Affine::axis(key as usize)));
    let value = lower.value(parts.scores, &index)?;
    let (operands, summed) = contract::operands(lower, parts.products)?;
    let [x, y] = operands;
    let has_key = |e: &Arc<Expr>| plain_load(e).is_some_and(|l| l.1.coefficient(key as usize) != 0);
    let operands = if has_key(&x) { [x, y] } else { [y, x] };
    let operands = operands.map(|e| as_dtype(lower, DType::F32, e));
    let value = (*as_dtype(lower, DType::F32, value)).clone();
    let store = Stmt::Store { buffer: line.0, place: place(line, key), value };
    lower.bind_row(parts.scores, (line.0, &line.1), row.len());
    Ok(Tiles { cell, lanes: key, summed, operands, end: vec![store], way: Way::Single })
}

/// The maximum of a row, which is kept at a place behind its scores: rows follow one another
/// without waiting for what comes of it.
fn most(
    lower: &mut Lower,
    parts: &Attention,
    (row, keys): (&[Index], usize),
    (buffer, start): &(BufferId, Index),
) -> Lowering<Vec<Stmt>> {
    let mut body = nest::reduce_pass(lower, parts.most, row, (&[keys], &[None]), None)?;
    let mut index = row.to_vec();
    index.push(origin_place());
    let value = (*lower.value(parts.most, &index)?).clone();
    let place = add(start, &Place::affine(Affine::constant(keys as i64 + 1)));
    body.push(Stmt::Store { buffer: *buffer, place: place.clone(), value });
    lower.bind_cell(parts.most, Expr::Load(*buffer, place), None);
    Ok(body)
}

/// The softmax of a row in place, given its maximum: powers and their sum; weights. Where these are
/// powers times one number of the row, the powers stay and the number is stored behind them: its
/// place is returned, since sums of fewer elements can be multiplied with it later.
pub fn softmax(
    lower: &mut Lower,
    parts: &Attention,
    (row, keys): (&[Index], usize),
    (buffer, start): &(BufferId, Index),
) -> Lowering<(Vec<Stmt>, Option<Place>)> {
    let keep = Some((parts.powers, *buffer, start.clone()));
    let mut body = nest::reduce_pass(lower, parts.sum, row, (&[keys], &[None]), keep)?;
    let store = |place, value| Stmt::Store { buffer: *buffer, place, value };
    let mut index = row.to_vec();
    if let Some((node, divides)) = scale_of(lower, parts) {
        index.push(origin_place());
        let value = lower.value(node, &index)?;
        let value = match divides {
            true => Expr::Unary(UnaryFn::Recip, value),
            false => (*value).clone(),
        };
        let place = add(start, &Place::affine(Affine::constant(keys as i64)));
        let scale = vec![store(place.clone(), value)];
        body.extend(nest::pass(lower, Vec::new(), scale)?);
        return Ok((body, Some(place)));
    }
    let key = lower.var(keys)?;
    index.push(Place::affine(Affine::axis(key as usize)));
    let value = lower.value(parts.weights, &index)?;
    let place = place(&(*buffer, start.clone()), key);
    body.extend(nest::pass(lower, vec![key], vec![store(place, (*value).clone())])?);
    Ok((body, None))
}

/// The node with one value for a row which makes weights of powers, and whether it divides them.
fn scale_of(lower: &Lower, parts: &Attention) -> Option<(usize, bool)> {
    let node = &lower.body.nodes[parts.weights];
    let divides = match node.op {
        Op::Binary(BinaryFn::Mul) => false,
        Op::Binary(BinaryFn::Div) => true,
        _ => return None,
    };
    let [x, y] = [0, 1].map(|k: usize| node.args[k].index());
    let other = match (x == parts.powers, y == parts.powers) {
        (true, false) => y,
        (false, true) if !divides => x,
        _ => return None,
    };
    let single = lower.ty(other).shape.last() == Some(&1);
    single.then_some((other, divides))
}

/// A value as one of a dtype.
pub fn as_dtype(lower: &Lower, to: DType, e: Arc<Expr>) -> Arc<Expr> {
    if dtype(&lower.buffers, &e) == to { e } else { Arc::new(Expr::Cast(to, e)) }
}

/// The sums of weighted values.
pub fn mixed(
    lower: &mut Lower,
    product: Product,
    side: usize,
    (key, scale): (Var, Option<Place>),
    line: &(BufferId, Index),
) -> Lowering<Tiles> {
    let lanes = product.vars.last().copied();
    let lanes = lanes.ok_or_else(|| Refused("a result without axes".into()))?;
    let weights = Arc::new(Expr::Load(line.0, place(line, key)));
    let values = product.operands[1 - side].clone();
    let operands = [as_dtype(lower, DType::F32, values), weights];
    // Sums of short floats are f32, and rounded once.
    let short = lower.buffers[product.cell].dtype;
    let cell = if short == DType::F32 { product.cell } else { lower.register(DType::F32, 1) };
    let summed = product.summed;
    let store = |buffer, place, value| Stmt::Store { buffer, place, value };
    let scaled = scale.map(|place| {
        let sum = Arc::new(Expr::Load(cell, origin_place()));
        let scale = Arc::new(Expr::Load(line.0, place));
        store(cell, origin_place(), Expr::Binary(BinaryFn::Mul, sum, scale))
    });
    let result = store(product.out, product.place, (*product.result).clone());
    let rounded = (short != DType::F32).then(|| {
        let sum = Arc::new(Expr::Load(cell, origin_place()));
        store(product.cell, origin_place(), Expr::Cast(short, sum))
    });
    let end = scaled.into_iter().chain(rounded).chain([result]).collect();
    Ok(Tiles { cell, lanes, summed, operands, end, way: Way::Single })
}

/// How a contraction gets into lanes, for so many rows of a piece.
fn way(
    lower: &mut Lower,
    tiles: &Tiles,
    (rows, query): (usize, Option<Var>),
    pieces: &mut Pieces,
) -> Way {
    let n = tiles.lanes;
    let [Some(load), Some(other)] = [0, 1].map(|k: usize| plain_load(&tiles.operands[k])) else {
        return Way::Single;
    };
    let step = load.1.coefficient(n as usize);
    let vector = nest::is_vector(&lower.buffers, &tiles.end, n);
    let alone = other.1.coefficient(n as usize) == 0;
    if let [v] = tiles.summed[..] {
        let along = |a: &Affine| a.coefficient(v as usize) == 1;
        let wide = lower.extents[v as usize] >= lower.target.lanes;
        if rows <= FEW && wide && step != 1 && along(load.1) && along(other.1) {
            return Way::Across;
        }
    }
    let sums: usize = tiles.summed.iter().map(|&v| lower.extents[v as usize]).product();
    let shared = query.is_none_or(|q| load.1.coefficient(q as usize) == 0);
    match (vector && alone, step) {
        (false, _) | (true, 0) => Way::Single,
        (true, 1) if rows < MANY || !shared || sums <= CLOSE => Way::Lanes,
        (true, _) if shared => {
            let strips = panels::strips(lower.extents[n as usize], lower.target.lanes, 2);
            let each = sums * panels::panel_elements(&strips);
            let (buffer, start) = pieces.buffer(lower, each);
            Way::Panels(buffer, start)
        }
        (true, _) => Way::Single,
    }
}

/// Statements that only the last piece runs.
fn in_last(piece: Var, pieces: usize, body: Vec<Stmt>) -> Vec<Stmt> {
    if pieces == 1 {
        return body;
    }
    let last = Arc::new(Expr::Const(DType::I64, Number::Int(pieces as i128 - 1)));
    let own = Arc::new(Expr::Index(Affine::axis(piece as usize)));
    let condition = Expr::Binary(BinaryFn::Le, last, own);
    vec![Stmt::If { condition, then: body, other: Vec::new() }]
}

impl Block {
    /// The statements for all rows of a piece.
    fn all(
        &self,
        lower: &mut Lower,
        shares: Shares,
        (piece, turn): (Var, Var),
    ) -> Lowering<Vec<Stmt>> {
        let height = shares.rows as i64;
        let first = Affine::scaled(piece as usize, shares.blocks as i64 * height);
        let body = self.lower(lower, &first.plus(turn as usize, height), shares.rows)?;
        let mut out = match shares.blocks {
            1 => rewrite::substitute(&body, turn, &Affine::constant(0)),
            extent => vec![Stmt::For { var: turn, extent, kind: Kind::Serial, body }],
        };
        if shares.left > 0 {
            let done = shares.pieces as i64 * shares.blocks as i64 * height;
            let rest = self.lower(lower, &Affine::constant(done), shares.left)?;
            out.extend(in_last(piece, shares.pieces, rest));
        }
        Ok(out)
    }

    /// The statements of a block of `height` rows, the first of which is number `first`.
    fn lower(&self, lower: &mut Lower, first: &Affine, height: usize) -> Lowering<Vec<Stmt>> {
        let row = lower.var(height)?;
        let local = if height == 1 { Affine::constant(0) } else { Affine::axis(row as usize) };
        let global = local.terms.iter().fold(first.clone(), |a, t| a.plus(t.0 as usize, t.1));
        let here = |body: &[Stmt]| {
            let body = rewrite::substitute(body, self.line, &local);
            match self.query {
                Some(query) => rewrite::substitute(&body, query, &global),
                None => body,
            }
        };
        let rows = (height > 1).then_some(row);
        let mut out = self.scores.lower(lower, rows, &here)?;
        for pass in &self.passes {
            let body = here(pass);
            match rows {
                Some(var) => out.push(Stmt::For { var, extent: height, kind: Kind::Serial, body }),
                None => out.extend(body),
            }
        }
        out.extend(self.mixed.lower(lower, rows, &here)?);
        Ok(out)
    }
}

impl Tiles {
    /// The strips of the axis in lanes.
    fn strips(&self, lower: &Lower) -> Vec<Strip> {
        let extent = lower.extents[self.lanes as usize];
        match self.way {
            Way::Single | Way::Across => {
                vec![Strip { start: 0, tiles: 1, width: extent, vectors: 0, packed: 0 }]
            }
            Way::Lanes | Way::Panels(..) => panels::strips(extent, lower.target.lanes, 2),
        }
    }

    /// Where an element of a panel stands: of a tile of a strip, one of its width.
    fn panel(
        &self,
        lower: &Lower,
        start: &Affine,
        strip: Strip,
        [tile, at]: [&Affine; 2],
    ) -> Affine {
        let mut stride = strip.width as i64;
        let mut place = start.clone();
        place.offset += at.offset;
        place = at.terms.iter().fold(place, |a, t| a.plus(t.0 as usize, t.1));
        for &v in self.summed.iter().rev() {
            place = place.plus(v as usize, stride);
            stride *= lower.extents[v as usize] as i64;
        }
        place.offset += strip.packed as i64 * stride / strip.width as i64;
        tile.terms.iter().fold(place, |a, t| a.plus(t.0 as usize, t.1 * stride))
    }

    /// Statements that bring the operand in lanes into panels.
    fn pack(&self, lower: &mut Lower) -> Lowering<Vec<Stmt>> {
        let (Way::Panels(buffer, start), Some((from, affine))) =
            (&self.way, plain_load(&self.operands[0]))
        else {
            return Ok(Vec::new());
        };
        let mut out = Vec::new();
        for strip in self.strips(lower) {
            let (tile, lanes) = (lower.var(strip.tiles)?, lower.target.lanes);
            let whole = affine.coefficient(self.lanes as usize) == 1 && strip.vectors > 0;
            let width = if whole { lanes } else { strip.width };
            let (step, at) = (lower.var(strip.width / width)?, lower.var(width)?);
            let at_index = Affine::scaled(step as usize, width as i64).plus(at as usize, 1);
            let tile_index = Affine::axis(tile as usize);
            let place = self.panel(lower, start, strip, [&tile_index, &at_index]);
            let index = at_index.plus(tile as usize, strip.width as i64);
            let index = Affine { offset: strip.start as i64, ..index };
            let lanes = self.lanes as usize;
            let read =
                affine.substitute(&|v| if v == lanes { index.clone() } else { Affine::axis(v) });
            let value = Expr::Load(from, Place::affine(read));
            let store = vec![Stmt::Store { buffer: *buffer, place: Place::affine(place), value }];
            let loops = [tile].into_iter().chain(self.summed.iter().copied());
            let mut loops: Vec<Var> = loops.chain([step]).collect();
            let body = turn::turned(lower, &mut loops, at, &store).unwrap_or_else(|| {
                let kind = if whole { Kind::Vector } else { Kind::Unroll };
                vec![Stmt::For { var: at, extent: width, kind, body: store }]
            });
            out.extend(nest::wrap(&lower.extents, &loops, body, 0));
        }
        Ok(out)
    }

    /// The statements for the rows of a block; `here` says where these are.
    fn lower(
        &self,
        lower: &mut Lower,
        rows: Option<Var>,
        here: &dyn Fn(&[Stmt]) -> Vec<Stmt>,
    ) -> Lowering<Vec<Stmt>> {
        if self.way == Way::Across {
            return self.across(lower, rows, here);
        }
        let mut out = Vec::new();
        for strip in self.strips(lower) {
            out.extend(self.strip(lower, rows, strip, here)?);
        }
        Ok(out)
    }

    /// The statements of one strip of the axis in lanes.
    fn strip(
        &self,
        lower: &mut Lower,
        rows: Option<Var>,
        strip: Strip,
        here: &dyn Fn(&[Stmt]) -> Vec<Stmt>,
    ) -> Lowering<Vec<Stmt>> {
        let tile = lower.var(strip.tiles)?;
        let (vector, lane) = match strip.vectors {
            0 => (lower.var(strip.width)?, lower.var(1)?),
            vectors => (lower.var(vectors)?, lower.var(lower.target.lanes)?),
        };
        let step = if strip.vectors == 0 { 1 } else { lower.target.lanes as i64 };
        let element = Affine::scaled(vector as usize, step).plus(lane as usize, 1);
        let load = match &self.way {
            Way::Panels(buffer, start) => {
                let tile = Affine::axis(tile as usize);
                let place = self.panel(lower, start, strip, [&tile, &element]);
                Arc::new(Expr::Load(*buffer, Place::affine(place)))
            }
            Way::Lanes | Way::Across | Way::Single => self.operands[0].clone(),
        };
        let index = element.plus(tile as usize, strip.width as i64);
        let index = Affine { offset: strip.start as i64, ..index };
        let body: Vec<Stmt> =
            [self.update(load)].into_iter().chain(self.end.iter().cloned()).collect();
        let body = here(&rewrite::substitute(&body, self.lanes, &index));
        let shape = Shape { vector, lane, scalar: strip.vectors == 0, rows };
        let inner =
            contract::row_tiles(lower, self.cell, shape, (strip, None), &self.summed, body)?;
        Ok(match strip.tiles {
            1 => rewrite::substitute(&inner, tile, &Affine::constant(0)),
            extent => vec![Stmt::For { var: tile, extent, kind: Kind::Serial, body: inner }],
        })
    }

    /// The next product is added to the cell.
    pub fn update(&self, load: Arc<Expr>) -> Stmt {
        let cell = Arc::new(Expr::Load(self.cell, origin_place()));
        let value = Expr::Fma(load, self.operands[1].clone(), cell);
        Stmt::Store { buffer: self.cell, place: origin_place(), value }
    }

    /// Element by element, each a sum across lanes.
    fn across(
        &self,
        lower: &mut Lower,
        rows: Option<Var>,
        here: &dyn Fn(&[Stmt]) -> Vec<Stmt>,
    ) -> Lowering<Vec<Stmt>> {
        let (&last, outer) =
            self.summed.split_last().ok_or_else(|| Refused("a sum without axes".into()))?;
        let zero = Expr::Const(DType::F32, Number::Float(0.0));
        let start = Stmt::Store { buffer: self.cell, place: origin_place(), value: zero.clone() };
        let step = here(&[self.update(self.operands[0].clone())]);
        let mut body = vec![start];
        let sum = (last, outer);
        body.extend(nest::reduce_lanes(lower, ReduceFn::Sum, self.cell, sum, zero, step)?);
        body.extend(here(&self.end));
        let loops: Vec<Var> = rows.into_iter().chain([self.lanes]).collect();
        Ok(nest::wrap(&lower.extents, &loops, body, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shared_out() {
        for (total, keys, outer) in
            [(1, 7, 8), (128, 128, 12), (197, 197, 12), (1500, 1500, 8), (5, 1 << 20, 1)]
        {
            let s = shares(total, keys, outer);
            assert_eq!(s.pieces * s.blocks * s.rows + s.left, total, "{s:?}");
            let fits = s.rows * keys <= SCORES || s.rows <= LEAST;
            assert!(s.rows <= ROWS && s.left < s.rows.max(1) && fits, "{s:?}");
        }
        let even = Shares { rows: 20, blocks: 25, pieces: 3, left: 0 };
        assert_eq!(shares(1500, 1500, 8), even);
    }
}
