//! Pieces of the operands of a contraction on a GPU: how threads bring them into shared memory,
//! where every element is read by many of them.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::zero;
use super::flat::{Flat, Group, sum, times};
use super::gpu;
use super::index::{Index, add};
use super::ir::{BufferId, Expr, Kind, Number, Place, Stmt, Var};
use super::lower::{Lower, Lowering};
use crate::graph::op::{Affine, BinaryFn};

/// An operand that is read as it lies.
pub struct Operand {
    /// Where it lies.
    pub buffer: BufferId,
    /// The element there.
    pub place: Affine,
}

/// `step * var`
pub fn scaled(var: Var, step: usize) -> Affine {
    Affine::scaled(var.into(), step as i64)
}

/// A loop that is written out.
pub fn unroll((var, extent): (Var, usize), body: Vec<Stmt>) -> Vec<Stmt> {
    vec![Stmt::For { var, extent, kind: Kind::Unroll, body }]
}

/// A loop in lanes.
pub fn vector((var, extent): (Var, usize), body: Vec<Stmt>) -> Vec<Stmt> {
    vec![Stmt::For { var, extent, kind: Kind::Vector, body }]
}

/// Loops over threads, one in another.
pub fn threads(nest: &[(Var, usize)], body: Vec<Stmt>) -> Vec<Stmt> {
    nest.iter().rev().fold(body, |body, &(var, extent)| {
        vec![Stmt::For { var, extent, kind: Kind::Thread, body }]
    })
}

/// A store without a part that data decides.
pub fn store(buffer: BufferId, place: Affine, value: Expr) -> Stmt {
    Stmt::Store { buffer, place: Place::affine(place), value }
}

/// Statements where an index is below a bound; others where it is not. No question where it
/// always is.
pub fn below(
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

/// A piece of an operand in shared memory.
pub struct Piece {
    /// Twice, so that one is filled while the other one is read.
    pub buffers: [BufferId; 2],
    /// Steps from line to line, and from product to product.
    pub steps: [usize; 2],
    /// Whether the products of a line are neighbours, or else the lines of a product.
    pub along: bool,
    /// Its products.
    depth: usize,
    /// Whether neighbours in memory are brought at once.
    vector: bool,
    /// Variables: of threads, of turns, and of neighbours.
    threads: [(Var, usize); 2],
    turn: (Var, usize),
    near: (Var, usize),
}

/// What pieces of operands are like.
#[derive(Clone, Copy)]
pub struct Pieces {
    /// Their products.
    pub depth: usize,
    /// Neighbours that a thread brings at once.
    pub near: usize,
    /// Whether warps multiply them.
    pub warp: bool,
    /// Threads that bring them.
    pub threads: usize,
}

impl Piece {
    /// A piece of so many lines.
    pub fn new(
        lower: &mut Lower,
        operand: &Operand,
        (group, sums): (&Group, &Group),
        lines: usize,
        pieces: Pieces,
    ) -> Lowering<Piece> {
        let Pieces { depth, near, warp, threads } = pieces;
        let dtype = lower.buffers[operand.buffer].dtype;
        let step = |g: &Group| {
            g.innermost().map_or((0, 0), |v| (operand.place.coefficient(v.0.into()), v.1))
        };
        let (line, product) = (step(group), step(sums));
        // Bytes cannot be turned while a warp loads them.
        let along =
            product.0 == 1 && (line.0 != 1 || product.1 > line.1) || warp && dtype.bytes() == 1;
        // Lines do not lie in the same banks, and are aligned to 16 bytes. A warp that reads words
        // one by one asks for four products of eight lines.
        let room = if warp && !along && dtype.bytes() == 4 { 8 } else { 16 / dtype.bytes() };
        let steps = if along { [depth + room, 1] } else { [1, lines + room] };
        let len = if along { lines * steps[0] } else { depth * steps[1] };
        let (minor, major) = if along { (depth, lines) } else { (lines, depth) };
        let fast = minor / near;
        let slow = (threads / fast).min(major);
        let vector = match along {
            true => product.0 == 1 && sums.holds(near),
            false => line.0 == 1 && group.holds(near),
        };
        Ok(Piece {
            buffers: [(); 2].map(|()| gpu::shared(lower, dtype, len)),
            steps,
            along,
            depth,
            vector,
            threads: [(lower.var(slow)?, slow), (lower.var(fast)?, fast)],
            turn: (lower.var(major / slow)?, major / slow),
            near: (lower.var(near)?, near),
        })
    }

    /// The place of an element.
    pub fn place(&self, line: &Affine, product: &Affine) -> Affine {
        sum(&times(line, self.steps[0]), &times(product, self.steps[1]))
    }

    /// Brings a piece of an operand, zeros beyond its ends: neighbours in memory by neighbouring
    /// threads.
    pub fn bring(
        &self,
        lower: &Lower,
        operand: &Operand,
        (group, start): (&Group, &Affine),
        (sums, piece): (&Group, &Affine),
        to: BufferId,
    ) -> Vec<Stmt> {
        let ([slow, fast], (near, count)) = (self.threads, self.near);
        let major = scaled(slow.0, 1).plus(self.turn.0.into(), slow.1 as i64);
        let minor = scaled(fast.0, count);
        let near = scaled(near, 1);
        let none = (Affine::default(), 1);
        // What stays within an innermost axis needs no division.
        let (line, product) = match self.along {
            true => (
                Flat { base: sum(start, &major), rest: none.clone() },
                match (sums.holds(self.depth), self.vector) {
                    (true, _) => {
                        Flat { base: piece.clone(), rest: (sum(&minor, &near), self.depth) }
                    }
                    (_, true) => Flat { base: sum(piece, &minor), rest: (near.clone(), count) },
                    _ => Flat { base: sum(piece, &sum(&minor, &near)), rest: none },
                },
            ),
            false => (
                match self.vector {
                    true => Flat { base: sum(start, &minor), rest: (near.clone(), count) },
                    false => Flat { base: sum(start, &sum(&minor, &near)), rest: none.clone() },
                },
                match sums.holds(self.depth) {
                    true => Flat { base: piece.clone(), rest: (major.clone(), self.depth) },
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
            true => (without(&flat.whole(), self.near.0), count - 1),
            false => (flat.whole(), 0),
        };
        let (lines, depth) = (group.extent(), sums.extent());
        let (index, more) = first(&line, !self.along);
        let (copy, nothing) = (each(copy), each(nothing));
        let copy = below(lower, &index, lines - more, copy, nothing.clone());
        // A piece that stays within the innermost axis is whole, or it is none.
        let (index, more) = match sums.holds(self.depth) {
            true => (product.base.clone(), self.depth - 1),
            false => first(&product, self.along),
        };
        let copy = below(lower, &index, depth - more, copy, nothing);
        let copy = if self.vector { copy } else { unroll(self.near, copy) };
        threads(&self.threads, unroll(self.turn, copy))
    }
}

/// The index without a variable.
pub fn without(index: &Affine, var: Var) -> Affine {
    let mut index = index.clone();
    index.terms.retain(|t| t.0 != var);
    index
}

/// A place with the axes of groups at indices.
pub fn in_groups(place: &Affine, groups: &[(&Group, &Flat)]) -> Index {
    groups.iter().fold(Place::affine(place.clone()), |at, (group, flat)| {
        let dynamic = Place { affine: Affine::default(), dynamic: at.dynamic };
        add(&group.place(&at.affine, flat), &dynamic)
    })
}
