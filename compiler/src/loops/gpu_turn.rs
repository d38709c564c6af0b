//! Moves that change which axis lies side by side in memory, on a GPU: a block brings a square of
//! what is read along one axis into shared memory, and computes from there along the other one, so
//! that neighbouring threads read and write neighbours.

use super::flat::{sum, times};
use super::gpu::{self, VECTOR};
use super::gpu_pieces::{below, scaled, store, threads, unroll, vector};
use super::ir::{BufferId, Expr, Place, Scope, Stmt, Var};
use super::lanes::reads_what_it_stores;
use super::lower::{Lower, Lowering};
use super::rewrite::{each_load, rewrite};
use crate::graph::op::Affine;

/// Rows and columns of a square.
const SIDE: usize = 32;
/// Threads of a block.
const THREADS: usize = 256;
/// Shorter axes are read and written as they lie: a warp meets most of what its sectors hold.
const LEAST: usize = 8;
/// Bytes of a sector, the least that memory reads.
const SECTOR: usize = 32;
/// Values at most that a square is brought of.
const SQUARES: usize = 4;
/// Bytes of a bank of shared memory: lines begin in different ones.
const BANK: usize = 4;

/// An axis of a result in tiles.
#[derive(Clone, Copy)]
struct Axis {
    var: Var,
    extent: usize,
    /// The variable of a tile.
    tile: Var,
}

/// How threads go over a square: some neighbours each along one axis, line after line.
struct Sweep {
    /// Loops over threads.
    threads: [(Var, usize); 2],
    /// Turns of each thread, and its neighbours.
    turn: (Var, usize),
    near: (Var, usize),
    /// The line, and the place along it of the first neighbour.
    line: Affine,
    along: Affine,
}

impl Sweep {
    fn new(lower: &mut Lower, near: usize) -> Lowering<Sweep> {
        let across = SIDE / near;
        let down = THREADS / across;
        let threads = [(lower.var(down)?, down), (lower.var(across)?, across)];
        let turn = (lower.var(SIDE / down)?, SIDE / down);
        let line = scaled(threads[0].0, 1).plus(turn.0.into(), down as i64);
        let along = scaled(threads[1].0, near);
        Ok(Sweep { threads, turn, near: (lower.var(near)?, near), line, along })
    }

    /// The place of a neighbour.
    fn neighbour(&self) -> Affine {
        self.along.clone().plus(self.near.0.into(), 1)
    }

    /// Statements for all neighbours, by all threads, where line and neighbours are those of axes.
    fn each(&self, lower: &Lower, [line, along]: [Axis; 2], body: Vec<Stmt>) -> Vec<Stmt> {
        // The first neighbour tells of all: as many divide the axis.
        let bound = along.extent - (self.near.1 - 1);
        let body = below(lower, &along.at(&self.along), bound, body, Vec::new());
        let body = below(lower, &line.at(&self.line), line.extent, body, Vec::new());
        threads(&self.threads, unroll(self.turn, body))
    }
}

impl Axis {
    fn new(lower: &mut Lower, var: Var) -> Lowering<Axis> {
        let extent = lower.extents[var as usize];
        Ok(Axis { var, extent, tile: lower.var(extent.div_ceil(SIDE))? })
    }

    /// The index along it of a place in a tile.
    fn at(&self, inside: &Affine) -> Affine {
        inside.clone().plus(self.tile.into(), SIDE as i64)
    }

    /// Neighbours that a thread may take at once.
    fn near(&self) -> usize {
        if self.extent.is_multiple_of(VECTOR) { VECTOR } else { 1 }
    }
}

/// What is brought in squares: loads along `near` that lie apart along `inner`, each of a buffer
/// that is read at no other place.
struct Found {
    inner: Var,
    near: Var,
    loads: Vec<(BufferId, Affine)>,
}

fn find(lower: &Lower, vars: &[Var], value: &Expr) -> Option<Found> {
    let inner = *vars.last()?;
    let mut all: Vec<(BufferId, &Place)> = Vec::new();
    each_load(value, &mut |buffer, place| {
        if !all.contains(&(buffer, place)) {
            all.push((buffer, place));
        }
    });
    let mut near = None;
    let mut loads = Vec::new();
    for (buffer, place) in &all {
        let b = &lower.buffers[*buffer];
        let step = place.affine.coefficient(inner.into()).unsigned_abs() as usize;
        let once = all.iter().filter(|l| l.0 == *buffer).count() == 1;
        let apart = step * b.dtype.bytes() >= SECTOR && place.dynamic.is_none();
        if b.scope != Scope::Global || !once || !apart {
            continue;
        }
        let along = |v: &Var| *v != inner && place.affine.coefficient((*v).into()) == 1;
        let found = vars.iter().copied().find(along);
        if found.is_some() && *near.get_or_insert(found) == found {
            loads.push((*buffer, place.affine.clone()));
        }
    }
    loads.truncate(SQUARES);
    Some(Found { inner, near: near.flatten()?, loads })
}

/// The loops of a store over the axes of a result, where it reads values that lie apart.
pub fn turned(lower: &mut Lower, vars: &[Var], body: &[Stmt]) -> Option<Vec<Stmt>> {
    let [Stmt::Store { buffer, place, value }] = body else { return None };
    let found = find(lower, vars, value)?;
    let long = |v: Var| lower.extents[v as usize] >= LEAST;
    let whole = vars.iter().all(|&v| lower.span(v).is_none());
    let memory = lower.buffers[*buffer].scope == Scope::Global && place.dynamic.is_none();
    let beside = place.affine.coefficient(found.inner.into()) == 1;
    let apart = memory && beside && !reads_what_it_stores(lower, body);
    if !apart || !whole || !long(found.inner) || !long(found.near) {
        return None;
    }
    squares(lower, vars, &found, body).ok()
}

fn squares(lower: &mut Lower, vars: &[Var], found: &Found, body: &[Stmt]) -> Lowering<Vec<Stmt>> {
    let [near, inner] = [Axis::new(lower, found.near)?, Axis::new(lower, found.inner)?];
    let index = |a: &Affine, at: [&Affine; 2]| {
        a.substitute(&|v| match v {
            v if v == usize::from(near.var) => near.at(at[0]),
            v if v == usize::from(inner.var) => inner.at(at[1]),
            v => Affine::axis(v),
        })
    };
    let read = Sweep::new(lower, near.near())?;
    let (mut first, mut then) = (Vec::new(), Vec::new());
    let mut squares = Vec::new();
    for (from, place) in &found.loads {
        let dtype = lower.buffers[*from].dtype;
        let pitch = SIDE + BANK.div_ceil(dtype.bytes());
        let square = gpu::shared(lower, dtype, SIDE * pitch);
        // What is read at once goes to lines of its own: first all is read, then all is stored.
        let kept = lower.register(dtype, read.near.1);
        let load = Expr::Load(*from, Place::affine(index(place, [&read.neighbour(), &read.line])));
        let own = scaled(read.near.0, 1);
        first.push(store(kept, own.clone(), load));
        let value = Expr::Load(kept, Place::affine(own));
        then.push(store(square, sum(&times(&read.neighbour(), pitch), &read.line), value));
        squares.push((*from, square, pitch));
    }
    let brought = [unroll(read.near, first), unroll(read.near, then)].concat();
    let mut out = read.each(lower, [inner, near], brought);
    let from_squares = |lower: &mut Lower, width: usize| -> Lowering<(Sweep, Vec<Stmt>)> {
        let sweep = Sweep::new(lower, width)?;
        let moved: Vec<(BufferId, BufferId, Affine)> = squares
            .iter()
            .map(|&(from, square, pitch)| {
                let place = sum(&times(&sweep.line, pitch), &sweep.neighbour());
                (from, square, place)
            })
            .collect();
        let at = |a: &Affine| index(a, [&sweep.line, &sweep.neighbour()]);
        let body = rewrite(body, &at, &moved);
        Ok((sweep, body))
    };
    let (mut sweep, mut moved) = from_squares(lower, inner.near())?;
    let wide = sweep.near.1 > 1;
    if wide && gpu::is_vector(lower, &moved, sweep.near.0) {
        moved = vector(sweep.near, moved);
    } else if wide {
        (sweep, moved) = from_squares(lower, 1)?;
    }
    if sweep.near.1 == 1 {
        moved = unroll(sweep.near, moved);
    }
    out.extend(sweep.each(lower, [near, inner], moved));
    let outer = vars.iter().copied().filter(|v| ![near.var, inner.var].contains(v));
    let blocks: Vec<Var> = outer.chain([near.tile, inner.tile]).collect();
    gpu::blocks(lower, &blocks, out)
}
