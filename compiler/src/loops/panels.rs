//! Operands of contractions in panels: pieces of the last axis, one after another, in the order in
//! which the loops of a tile read them.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::Product;
use super::ir::{BufferId, Expr, Loops, Param, Parts, Place, Scope, Var};
use super::lower::{Lower, Lowering};
use super::nest;
use crate::graph::op::Affine;

/// A piece of the last axis that is tiled in one way.
#[derive(Clone, Copy)]
pub struct Strip {
    /// First element.
    pub start: usize,
    /// Number of tiles.
    pub tiles: usize,
    /// Elements of a tile.
    pub width: usize,
    /// Vectors of a tile; 0 where elements go one by one.
    pub vectors: usize,
    /// Elements of panels before its own, for one step of the sum.
    pub packed: usize,
}

/// Rows that are packed into all panels together.
const ROWS: usize = 16;

/// An operand that is packed into panels.
pub struct Panels {
    /// The scratch memory that holds it, and its elements.
    pub scratch: (usize, usize),
    /// The place of an element in terms of the product's variables, with the tile as variable 255
    /// and the element within the tile as variable 254.
    pub place: Affine,
    /// The dtype of its elements.
    pub kept: DType,
}

/// The last axis in pieces: tiles of so many vectors, whole vectors that are left, and one more
/// that ends where the axis does, so that some elements are computed twice. Where there is no whole
/// vector, single elements.
pub fn strips(n: usize, lanes: usize, vectors: usize) -> Vec<Strip> {
    let mut strips: Vec<Strip> = Vec::new();
    let mut add = |start: usize, tiles: usize, vectors: usize| {
        let width = if vectors == 0 { n - start } else { vectors * lanes };
        let packed = strips.last().map_or(0, |s| s.packed + s.tiles * s.width);
        strips.push(Strip { start, tiles, width, vectors, packed });
        start + tiles * width
    };
    let mut start = 0;
    if n >= vectors * lanes {
        start = add(start, n / (vectors * lanes), vectors);
    }
    if n - start >= lanes {
        start = add(start, 1, (n - start) / lanes);
    }
    match n - start {
        0 => {}
        _ if n >= lanes => _ = add(n - lanes, 1, 1),
        _ => _ = add(start, 1, 0),
    }
    strips
}

/// Elements of all panels for one step of the sum.
pub fn panel_elements(strips: &[Strip]) -> usize {
    strips.iter().map(|s| s.tiles * s.width).sum()
}

/// An operand can be packed where every variable picks other elements, so that nothing repeats.
pub fn packable(lower: &Lower, (buffer, affine): (BufferId, &Affine)) -> bool {
    let picked = affine.terms.iter().map(|t| lower.extents[t.0 as usize]);
    picked.product::<usize>() <= lower.buffers[buffer].len
}

/// Elements that a place picks: as many at each as words have parts, where the sum runs over these.
pub fn packed_len(lower: &Lower, product: &Product, affine: &Affine) -> usize {
    let elements = product.parts.map_or(1, |p| p.0.count());
    elements * affine.terms.iter().map(|t| lower.extents[t.0 as usize]).product::<usize>()
}

/// Variables of the packed operand but the last axis, in the order of the loops.
pub fn panel_order(product: &Product, affine: &Affine, summed: &[Var], n: Var) -> Vec<Var> {
    product
        .vars
        .iter()
        .chain(summed)
        .copied()
        .filter(|&v| v != n && affine.coefficient(v as usize) != 0)
        .collect()
}

/// A kernel that copies a strip of an operand into panels `[tile][order..][width]`; and the place
/// of an element in terms of the product's variables, with the tile as variable 255 and the
/// element within the tile as variable 254.
/// The elements of a word, which lie apart as `parts` says, come side by side. Where they go has a
/// number and a length.
pub fn pack(
    lower: &Lower,
    source: BufferId,
    affine: &Affine,
    (order, n): (&[Var], Var),
    strip: Strip,
    (scratch, len): (usize, usize),
    parts: Option<(Parts, i64)>,
) -> Lowering<(Loops, Affine)> {
    let mut packer = lower.fresh();
    let from = &lower.buffers[source];
    let dtype = from.dtype;
    let source = packer.buffer(dtype, from.len, Scope::Global, from.param);
    let count = parts.map_or(1, |p| p.0.count());
    let to = packer.buffer(dtype, len, Scope::Global, Param::Scratch(scratch));
    // Outer axes of the result come before the tile in memory, as they do in the loops.
    let tile = packer.var(strip.tiles)?;
    let inner: Vec<Var> =
        order.iter().map(|&v| packer.var(lower.extents[v as usize])).collect::<Lowering<_>>()?;
    // A strip may be wider than the axis is long.
    let element = packer.var(strip.width.min(lower.extents[n as usize]))?;
    let part = parts.map(|_| packer.var(count)).transpose()?;
    let mut packed = Affine::scaled(254, count as i64);
    let mut step = (strip.width * count) as i64;
    for &v in order.iter().rev() {
        packed = packed.plus(v as usize, step);
        step *= lower.extents[v as usize] as i64;
    }
    packed.offset = strip.packed as i64 * step / strip.width as i64;
    packed = packed.plus(255, step);
    let place = packed.substitute(&|v| match v {
        255 => Affine::axis(tile as usize),
        254 => Affine::axis(element as usize),
        v => Affine::axis(inner[order.iter().position(|&o| o as usize == v).unwrap_or(0)] as usize),
    });
    let n_index = Affine {
        offset: strip.start as i64,
        ..Affine::scaled(tile as usize, strip.width as i64).plus(element as usize, 1)
    };
    let read = affine.substitute(&|v| match order.iter().position(|&o| o as usize == v) {
        Some(at) => Affine::axis(inner[at] as usize),
        None if v == n as usize => n_index.clone(),
        None => Affine::constant(0),
    });
    let (mut place, mut read) = (place, read);
    let mut vars = match inner.split_last() {
        Some((&last, outer)) if affine.coefficient(n as usize) == 1 => {
            rows_together(&mut packer, (tile, outer, last), [&mut place, &mut read])?
        }
        _ => [tile].into_iter().chain(inner).collect(),
    };
    vars.push(element);
    if let (Some(part), Some((_, step))) = (part, parts) {
        vars.push(part);
        place = place.plus(part as usize, 1);
        read = read.plus(part as usize, step);
    }
    let value = Arc::new(Expr::Load(source, Place::affine(read)));
    Ok((nest::store_nest(packer, vars, to, Place::affine(place), value), packed))
}

/// The loops of a copy whose rows run through all panels: some go into all of them before the next
/// ones, so that they are read from end to end.
fn rows_together(
    packer: &mut Lower,
    (tile, outer, last): (Var, &[Var], Var),
    places: [&mut Affine; 2],
) -> Lowering<Vec<Var>> {
    let extent = packer.extents[last as usize];
    if !extent.is_multiple_of(ROWS) {
        return Ok([tile].into_iter().chain(outer.iter().copied()).chain([last]).collect());
    }
    let (rows, row) = (packer.var(extent / ROWS)?, packer.var(ROWS)?);
    let index = Affine::scaled(rows as usize, ROWS as i64).plus(row as usize, 1);
    for affine in places {
        *affine = affine.substitute(&|v| match v == last as usize {
            true => index.clone(),
            false => Affine::axis(v),
        });
    }
    Ok(outer.iter().copied().chain([rows, tile, row]).collect())
}
