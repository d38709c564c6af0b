//! Convolutions of 3 by 3 with fewer products: F(m, 3) of Winograd's minimal filtering, m * m
//! results at a time (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//!
//! A tile of n by n elements of the input, n = m + 2, becomes n * n numbers, and so do the weights,
//! when the model is compiled. Their products are summed over the channels, for each of the n * n
//! by itself as a matrix product, and m * m results are made of the sums. With m = 4 that is 36
//! products where there were 144, with m = 2 it is 16 of 36.
//!
//! Of integers (i16 that stand for bytes) all is exact: m is 2, the weights are those of 4 results,
//! products are summed over pairs of channels in i32, and results are divided by 4.
//!
//! Channels run in lanes. Tiles at the right and lower border have fewer results; what they read
//! beyond the input is its last row or column again, which no result depends on.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{Product, Roles, plain_load, tile};
use super::ir::{BufferId, Expr, Loops, Param, Parts, Place, Scope, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, origin_place};
use super::panels::{Panels, Strip, pack};
use super::straight::{Straight, inputs, results, weights};
use super::{nest, rewrite};
use crate::graph::op::Affine;
use crate::rules::cost::{LEAST_CHANNELS, results_of_tile};

/// Input channels for which sums of 4 times the products of two bytes stay within an i32.
const MOST_CHANNELS: usize = 900;
/// Bytes of transformed inputs and sums at most.
const MOST_BYTES: usize = 64 << 20;
/// Pieces of transforms at least, where channels can be cut.
const PIECES: usize = 8;
/// A convolution of 3 by 3 with a step of 1.
struct Conv {
    /// Axes of the result: the two of the image, and channels.
    image: [Var; 2],
    oc: Var,
    /// All others: images.
    batch: Vec<Var>,
    /// Axes of the sum: channels, and the two of the window.
    ic: Var,
    window: [Var; 2],
    /// The input, without its border, and the weights.
    input: (BufferId, Affine),
    weights: (BufferId, Affine),
    /// Results of a tile along an axis.
    m: usize,
    /// Of integers.
    whole: bool,
}

/// Extents of everything.
#[derive(Clone, Copy)]
struct Sizes {
    /// Elements of a tile along an axis.
    n: usize,
    m: usize,
    /// Tiles along each axis of the image, the last ones of which may have fewer results.
    tiles: [usize; 2],
    /// Tiles of all images.
    all: usize,
    ic: usize,
    oc: usize,
    /// From one of the n * n to the next, in the transformed input and in the sums.
    steps: [usize; 2],
    /// Channels of a panel of weights.
    width: usize,
    /// Of integers: i16, and i32 where they are added.
    whole: bool,
}

impl Sizes {
    /// What memory holds of inputs and weights, and of sums.
    fn dtypes(self) -> [DType; 2] {
        if self.whole { [DType::I16, DType::I32] } else { [DType::F32; 2] }
    }
}

/// Adds the kernels of a convolution of this kind. Says whether it is one.
pub fn lower(
    lower: &Lower,
    product: &Product,
    roles: Roles,
    lowered: &mut Lowered,
) -> Lowering<bool> {
    if lower.target.exact {
        return Ok(false);
    }
    let Some(conv) = find(lower, product, roles) else { return Ok(false) };
    let sizes = sizes(lower, &conv);
    let scratch = lowered.scratch.len();
    let weights = sizes.ic * sizes.oc;
    let points = sizes.n * sizes.n;
    let [given, panels, input, sums] = [0, 1, 2, 3].map(|i: usize| scratch + i);
    let lens = [9 * weights, points * weights, points * sizes.steps[0], points * sizes.steps[1]];
    if (lens[2] + lens[3]) * 4 > MOST_BYTES {
        return Ok(false);
    }
    let [short, sum] = sizes.dtypes();
    lowered.scratch.extend([short, short, short, sum].into_iter().zip(lens));
    lowered.scratch.extend(sizes.whole.then_some((short, lens[1])));
    let strip = Strip {
        start: 0,
        tiles: sizes.oc / sizes.width,
        width: sizes.width,
        vectors: sizes.width / lower.target.lanes,
        packed: 0,
    };
    let order = [conv.ic, conv.window[0], conv.window[1]];
    let (buffer, affine) = &conv.weights;
    let (kernel, _) =
        pack(lower, *buffer, affine, (&order, conv.oc), strip, (given, lens[0]), None)?;
    let mut add = |name: &str, kernel: Loops| {
        lowered.kernels.push(Loops { name: name.into(), ..kernel });
    };
    add("pack", kernel);
    let made = if sizes.whole { (scratch + 4, lens[1]) } else { (panels, lens[1]) };
    add("weights", of_weights(lower, sizes, strip, [(given, lens[0]), made])?);
    if sizes.whole {
        add("pairs", in_pairs(lower, sizes, [made, (panels, lens[1])])?);
    }
    for rows in regions(lower, &conv, sizes) {
        add("in", of_input(lower, &conv, sizes, rows, (input, lens[2]))?);
    }
    let places = [(input, lens[2]), (panels, lens[1]), (sums, lens[3])];
    add("products", products(lower, sizes, strip, places)?);
    for rows in regions(lower, &conv, sizes) {
        add("out", of_sums(lower, product, &conv, sizes, rows, (sums, lens[3]))?);
    }
    Ok(true)
}

fn find(lower: &Lower, product: &Product, roles: Roles) -> Option<Conv> {
    let (input, x) = plain_load(&product.operands[1 - roles.lanes])?;
    let (weights, w) = plain_load(&product.operands[roles.lanes])?;
    let (&oc, others) = product.vars.split_last()?;
    let extent = |v: Var| lower.extents[usize::from(v)];
    let step = |a: &Affine, v: Var| a.coefficient(usize::from(v));
    let [first, ..] = product.summed[..] else { return None };
    let ic = product.summed.iter().copied().find(|&v| step(x, v) == 1).unwrap_or(first);
    let taps: Vec<Var> = product.summed.iter().copied().filter(|&v| v != ic).collect();
    let &[ky, kx] = &taps[..] else { return None };
    // The axis of the image that a tap moves along: a step of 1, and no other reads what it does.
    let along = |tap: Var| {
        let mut same = others.iter().copied().filter(|&v| step(x, v) == step(x, tap));
        same.next().filter(|_| same.next().is_none())
    };
    let image = [along(ky)?, along(kx)?];
    let batch: Vec<Var> = others.iter().copied().filter(|v| !image.contains(v)).collect();
    let whole = lower.buffers[input].dtype == DType::I16;
    let m = results_of_tile(image.map(extent)).map(|m| if whole { 2 } else { m })?;
    let channels = [ic, oc]
        .iter()
        .all(|&v| extent(v) >= LEAST_CHANNELS && extent(v).is_multiple_of(lower.target.lanes));
    let all = product.vars.iter().chain(&product.summed);
    let fits = roles.packed
        && lower.is_constant(weights)
        && [ky, kx].iter().all(|&v| extent(v) == 3 && step(w, v) != 0)
        && (step(x, ic), step(x, oc)) == (1, 0)
        && step(w, ic) != 0
        && others.iter().all(|&v| step(w, v) == 0)
        && image[0] != image[1]
        && channels
        && !(whole && extent(ic) > MOST_CHANNELS)
        && all.copied().all(|v| lower.span(v).is_none());
    fits.then(|| Conv {
        image,
        oc,
        batch,
        ic,
        window: [ky, kx],
        input: (input, x.clone()),
        weights: (weights, w.clone()),
        m,
        whole,
    })
}

fn sizes(lower: &Lower, conv: &Conv) -> Sizes {
    let extent = |v: Var| lower.extents[usize::from(v)];
    let tiles = conv.image.map(|v| extent(v).div_ceil(conv.m));
    let all = tiles[0] * tiles[1] * conv.batch.iter().map(|&v| extent(v)).product::<usize>();
    let (ic, oc) = (extent(conv.ic), extent(conv.oc));
    // Steps of a multiple of 1 KB would put all n * n of a place into few sets of a cache.
    let apart = |len: usize| if len.is_multiple_of(256) { len + 80 } else { len };
    let (lanes, wide) = (lower.target.lanes, 2 * lower.target.lanes);
    Sizes {
        n: conv.m + 2,
        m: conv.m,
        tiles,
        all,
        ic,
        oc,
        steps: [apart(all * ic), apart(all * oc)],
        width: if oc.is_multiple_of(wide) { wide } else { lanes },
        whole: conv.whole,
    }
}

/// Tiles along one axis of the image that have as many results.
#[derive(Clone, Copy)]
struct Region {
    /// The first tile.
    first: usize,
    /// Number of tiles.
    count: usize,
    /// Results of each along the axis.
    results: usize,
}

/// The regions of an axis: tiles that are whole, and the last one where it is not.
fn along(extent: usize, m: usize) -> Vec<Region> {
    let whole = Region { first: 0, count: extent / m, results: m };
    let rest = Region { first: extent / m, count: 1, results: extent % m };
    [whole, rest].into_iter().filter(|r| r.count > 0 && r.results > 0).collect()
}

fn regions(lower: &Lower, conv: &Conv, sizes: Sizes) -> Vec<Region> {
    along(lower.extents[usize::from(conv.image[0])], sizes.m)
}

/// Scratch memory: its number and its length.
type Memory = (usize, usize);

fn memory(lower: &mut Lower, (number, len): Memory, dtype: DType) -> BufferId {
    lower.buffer(dtype, len, Scope::Global, Param::Scratch(number))
}

/// From packed weights `[panel][ic][3][3][width]` to `[n * n][panel][ic][width]`.
fn of_weights(
    parent: &Lower,
    sizes: Sizes,
    strip: Strip,
    [from, to]: [Memory; 2],
) -> Lowering<Loops> {
    let mut lower = parent.fresh();
    let [short, _] = sizes.dtypes();
    let (from, to) = (memory(&mut lower, from, short), memory(&mut lower, to, short));
    let lanes = lower.target.lanes;
    let pair = lower.var(strip.tiles * sizes.ic)?;
    let (vector, lane) = (lower.var(strip.vectors)?, lower.var(lanes)?);
    let at = |step: usize, offset: usize| {
        let place = Affine { offset: offset as i64, ..Affine::axis(lane.into()) };
        Place::affine(place.plus(vector.into(), lanes as i64).plus(pair.into(), step as i64))
    };
    let mut s = Straight::new(&mut lower, lane, sizes.whole);
    let place = |[i, j]: [usize; 2]| at(9 * sizes.width, (3 * i + j) * sizes.width);
    let tap = |s: &Straight, tap| s.load(from, place(tap));
    let made = s.both(3, tap, |s, g| weights(s, sizes.m, g));
    for (point, value) in made.concat().into_iter().enumerate() {
        s.store(to, at(sizes.width, point * sizes.ic * sizes.oc), value);
    }
    let body = s.finish(&mut lower);
    let body = nest::wrap(&lower.extents, &[pair, vector], body, 1);
    Ok(lower.finish(body))
}

/// Weights of two channels side by side: from `[point and panel][ic][width]` to
/// `[point and panel][ic / 2][width][2]`.
fn in_pairs(parent: &Lower, sizes: Sizes, [from, to]: [Memory; 2]) -> Lowering<Loops> {
    let mut lower = parent.fresh();
    let (width, len) = (sizes.width, to.1);
    let (from, to) = (memory(&mut lower, from, DType::I16), memory(&mut lower, to, DType::I16));
    let (pair, element) = (lower.var(len / (2 * width))?, lower.var(width)?);
    let half = lower.var(2)?;
    let at = |steps: [usize; 2]| {
        let place = Affine::scaled(pair.into(), 2 * width as i64);
        let place = place.plus(element.into(), steps[0] as i64);
        Place::affine(place.plus(half.into(), steps[1] as i64))
    };
    let value = Arc::new(Expr::Load(from, at([1, width])));
    Ok(nest::store_nest(lower, vec![pair, element, half], to, at([2, 1]), value))
}

/// How many blocks channels are cut into, so that few rows of tiles make enough pieces. A block has
/// whole cache lines.
fn channel_blocks(rows: usize, vectors: usize) -> usize {
    let wanted = PIECES.div_ceil(rows);
    let fits = |blocks: &usize| vectors.is_multiple_of(*blocks) && vectors / blocks >= 2;
    (1..=vectors).filter(fits).find(|&b| b >= wanted).or((1..=vectors).rfind(fits)).unwrap_or(1)
}

/// Loops over images and the tiles of some rows: what stands in them is made by `body` for each
/// region of columns.
fn over_tiles(
    lower: &mut Lower,
    conv: &Conv,
    sizes: Sizes,
    (rows, vectors): (Region, usize),
    mut body: impl FnMut(&mut Lower, &Tile) -> Lowering<Vec<Stmt>>,
) -> Lowering<Vec<Stmt>> {
    let down = lower.var(rows.count)?;
    let images: usize = conv.batch.iter().map(|&v| lower.extents[usize::from(v)]).product();
    let blocks = channel_blocks(images * rows.count, vectors);
    let block = lower.var(blocks)?;
    let vectors = vectors / blocks;
    let mut inside = Vec::new();
    for columns in along(lower.extents[usize::from(conv.image[1])], sizes.m) {
        let across = lower.var(columns.count)?;
        let (vector, lane) = (lower.var(vectors)?, lower.var(lower.target.lanes)?);
        let first = rows.first * sizes.tiles[1] + columns.first;
        let mut number = Affine { offset: first as i64, ..Affine::axis(across.into()) };
        let mut step = sizes.tiles[1];
        number = number.plus(down.into(), step as i64);
        step *= sizes.tiles[0];
        for &v in conv.batch.iter().rev() {
            number = number.plus(v.into(), step as i64);
            step *= lower.extents[usize::from(v)];
        }
        let corner = [(rows, down), (columns, across)].map(|(region, var)| Affine {
            offset: (region.first * sizes.m) as i64,
            ..Affine::scaled(var.into(), sizes.m as i64)
        });
        let results = [rows.results, columns.results];
        let lanes = lower.target.lanes as i64;
        let channel = Affine::scaled(vector.into(), lanes).plus(lane.into(), 1);
        let channel = channel.plus(block.into(), lanes * vectors as i64);
        let tile = Tile { number, corner, results, channel, lane };
        let statements = body(lower, &tile)?;
        inside.extend(nest::wrap(&lower.extents, &[across, vector], statements, 0));
    }
    let outer: Vec<Var> = conv.batch.iter().copied().chain([down, block]).collect();
    Ok(nest::wrap(&lower.extents, &outer, inside, outer.len()))
}

/// A tile, by the loops around it.
struct Tile {
    /// Its number among all tiles.
    number: Affine,
    /// Its first result, along both axes of the image.
    corner: [Affine; 2],
    /// How many results it has along each.
    results: [usize; 2],
    /// The channel of a lane, and the lane.
    channel: Affine,
    lane: Var,
}

impl Tile {
    /// Where one of its n * n numbers is, in memory of so many channels.
    fn point(&self, point: usize, step: usize, channels: usize) -> Place {
        let start = Affine { offset: (point * step) as i64, ..self.channel.clone() };
        let number = self.number.substitute(&|v| Affine::scaled(v, channels as i64));
        let offset = number.offset * channels as i64 + start.offset;
        let sum = number.terms.iter().fold(start, |sum, t| sum.plus(t.0.into(), t.1));
        Place::affine(Affine { offset, ..sum })
    }
}

/// From the input to `[n * n][tile][ic]`.
fn of_input(
    parent: &Lower,
    conv: &Conv,
    sizes: Sizes,
    rows: Region,
    to: Memory,
) -> Lowering<Loops> {
    let mut lower = parent.fresh();
    lower.extents = parent.extents.clone();
    let from = &parent.buffers[conv.input.0];
    let from = lower.buffer(from.dtype, from.len, from.scope, from.param);
    let to = memory(&mut lower, to, sizes.dtypes()[0]);
    let vectors = sizes.ic / lower.target.lanes;
    let body = over_tiles(&mut lower, conv, sizes, (rows, vectors), |lower, tile| {
        let mut s = Straight::new(lower, tile.lane, sizes.whole);
        let element = |s: &Straight, at: [usize; 2]| {
            // What no result depends on is the last that one does.
            let at = [0, 1].map(|k: usize| at[k].min(tile.results[k] + 1) as i64);
            let place = conv.input.1.substitute(&|v| {
                let inside = |k: usize| Affine {
                    offset: tile.corner[k].offset + at[k],
                    ..tile.corner[k].clone()
                };
                match conv.image.iter().position(|&i| usize::from(i) == v) {
                    Some(k) => inside(k),
                    None if v == usize::from(conv.ic) => tile.channel.clone(),
                    None if conv.window.iter().any(|&w| usize::from(w) == v) => Affine::constant(0),
                    None => Affine::axis(v),
                }
            });
            s.load(from, Place::affine(place))
        };
        let made = s.both(sizes.n, element, |s, d| inputs(s, sizes.m, d));
        for (point, value) in made.concat().into_iter().enumerate() {
            s.store(to, tile.point(point, sizes.steps[0], sizes.ic), value);
        }
        Ok(s.finish(lower))
    })?;
    Ok(lower.finish(body))
}

/// Sums over channels: for each of the n * n a product of matrices, tiles by channels.
fn products(
    parent: &Lower,
    sizes: Sizes,
    strip: Strip,
    [input, panels, sums]: [Memory; 3],
) -> Lowering<Loops> {
    let mut lower = parent.fresh();
    let [short, whole] = sizes.dtypes();
    let (x, w) = (memory(&mut lower, input, short), memory(&mut lower, panels, short));
    let out = memory(&mut lower, sums, whole);
    // Channels of the input go one by one, or in pairs.
    let each = if sizes.whole { 2 } else { 1 };
    let (point, row) = (lower.var(sizes.n * sizes.n)?, lower.var(sizes.all)?);
    let (oc, ic) = (lower.var(sizes.oc)?, lower.var(sizes.ic / each)?);
    let cell = lower.register(whole, 1);
    let at = |terms: [(Var, usize); 3]| {
        let sum = terms.iter().fold(Affine::default(), |a, t| a.plus(t.0.into(), t.1 as i64));
        Place::affine(sum)
    };
    let left = at([(point, sizes.steps[0]), (row, sizes.ic), (ic, each)]);
    let right = at([(point, sizes.ic * sizes.oc), (ic, each * sizes.oc), (oc, 1)]);
    let place = at([(point, sizes.steps[1]), (row, sizes.oc), (oc, 1)]);
    let panel = Affine::scaled(254, each as i64)
        .plus(ic.into(), (each * sizes.width) as i64)
        .plus(255, (sizes.ic * sizes.width) as i64)
        .plus(point.into(), (sizes.ic * sizes.oc) as i64);
    let operand = |buffer, place| match sizes.whole {
        true => Arc::new(Expr::Word(buffer, place)),
        false => Arc::new(Expr::Load(buffer, place)),
    };
    let product = Product {
        parts: sizes.whole.then_some((Parts::Pairs, sizes.oc as i64)),
        vars: vec![point, row, oc],
        summed: vec![ic],
        operands: [operand(x, left), operand(w, right)],
        cell,
        out,
        place,
        result: Arc::new(Expr::Load(cell, origin_place())),
    };
    let roles = Roles { both: false, lanes: 1, packed: true };
    let panels = Panels { scratch: panels, place: panel, kept: short };
    tile(lower, &product, roles, &[ic], strip, Some(panels))
}

/// From sums to results.
fn of_sums(
    parent: &Lower,
    product: &Product,
    conv: &Conv,
    sizes: Sizes,
    rows: Region,
    from: Memory,
) -> Lowering<Loops> {
    let mut lower = parent.fresh();
    lower.buffers = parent.buffers.clone();
    lower.extents = parent.extents.clone();
    let from = memory(&mut lower, from, sizes.dtypes()[1]);
    let vectors = sizes.oc / lower.target.lanes;
    let body = over_tiles(&mut lower, conv, sizes, (rows, vectors), |lower, tile| {
        let mut s = Straight::new(lower, tile.lane, sizes.whole);
        let sum = |_: &Straight, [i, j]: [usize; 2]| {
            Expr::Load(from, tile.point(i * sizes.n + j, sizes.steps[1], sizes.oc))
        };
        let made = s.both(sizes.n, sum, |s, x| results(s, sizes.m, x));
        for (i, row) in made.into_iter().enumerate().take(tile.results[0]) {
            for (j, value) in row.into_iter().enumerate().take(tile.results[1]) {
                let value = if sizes.whole { s.quarter(value) } else { value };
                let Expr::Load(registers, place) = &value else { continue };
                let (buffer, at, value) = (product.out, &product.place, (*product.result).clone());
                let store = [Stmt::Store { buffer, place: at.clone(), value }];
                let store = [(0, i), (1, j)].iter().fold(store.to_vec(), |store, &(k, at)| {
                    let corner = &tile.corner[k];
                    let index = Affine { offset: corner.offset + at as i64, ..corner.clone() };
                    rewrite::substitute(&store, conv.image[k], &index)
                });
                let store = rewrite::substitute(&store, conv.oc, &tile.channel);
                s.extend(rewrite::retarget(&store, product.cell, *registers, &place.affine));
            }
        }
        Ok(s.finish(lower))
    })?;
    lower.buffers[product.cell].len = 1;
    Ok(lower.finish(body))
}
