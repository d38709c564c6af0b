//! What runs in vector lanes: which statements can, and the loops over vectors that they become.

use kiln_runtime::tensor::DType;

use super::ir::{Buffer, BufferId, Expr, Kind, Place, Scope, Stmt, Var, dtype};
use super::lower::Lower;
use super::rewrite::{each_affine, rewrite, substitute};
use crate::graph::op::{Affine, UnaryFn};
use crate::rules::kind::{is_lane, is_lane_binary, is_lane_cast};

/// Whether statements can run with a variable in vector lanes: stores have unit steps.
pub fn is_vector(buffers: &[Buffer], body: &[Stmt], var: Var) -> bool {
    is_vector_of(buffers, body, var, |dtype| dtype)
}

/// The same where lanes hold values of a dtype as another one.
pub fn is_vector_of(buffers: &[Buffer], body: &[Stmt], var: Var, held: fn(DType) -> DType) -> bool {
    let var = var as usize;
    fn depends(e: &Expr, var: usize) -> bool {
        let store =
            Stmt::Store { buffer: 0, place: Place::affine(Affine::default()), value: e.clone() };
        let mut found = false;
        each_affine(&[store], &mut |a| found |= a.coefficient(var) != 0);
        found
    }
    fn place(p: &Place, var: usize, steps: &[i64]) -> bool {
        steps.contains(&p.affine.coefficient(var))
            && p.dynamic.as_ref().is_none_or(|d| !depends(d, var))
    }
    type Held = fn(DType) -> DType;
    fn value(buffers: &[Buffer], e: &Expr, var: usize, held: Held) -> bool {
        let dtype = |e: &Expr| held(dtype(buffers, e));
        let float = |e: &Expr| dtype(e) == DType::F32;
        let all = |all: &[&Expr]| all.iter().all(|e| value(buffers, e, var, held));
        match e {
            Expr::Load(b, p) => {
                let b = &buffers[*b];
                // Numbers may be read from memory lane by lane.
                let apart = b.scope == Scope::Global && b.dtype == DType::F32;
                let steps = [0, 1, p.affine.coefficient(var)];
                is_lane(held(b.dtype)) && place(p, var, if apart { &steps } else { &steps[..2] })
            }
            Expr::Word(b, p) => place(p, var, &[0, 4 / buffers[*b].dtype.bytes() as i64]),
            Expr::Index(_) | Expr::Fold(..) => false,
            Expr::Cast(to, x) => is_lane_cast(dtype(x), held(*to)) && all(&[x]),
            Expr::Const(dtype, _) => is_lane(held(*dtype)),
            Expr::Unary(f, x) => *f != UnaryFn::Not && float(x) && all(&[x]),
            Expr::Binary(f, x, y) => is_lane_binary(*f, dtype(x)) && all(&[x, y]),
            Expr::Fma(x, y, z) => float(x) && all(&[x, y, z]),
            Expr::Dot(_, x, y, z) => all(&[x, y, z]),
            Expr::Select(c, x, y) => {
                let compared = matches!(&**c, Expr::Binary(f, ..) if f.is_comparison());
                compared && all(&[c, x, y])
            }
        }
    }
    body.iter().all(|stmt| match stmt {
        Stmt::For { body, .. } => is_vector_of(buffers, body, var as Var, held),
        Stmt::Store { buffer, place: p, value: v } => {
            let b = &buffers[*buffer];
            let compared = matches!(v, Expr::Binary(f, ..) if f.is_comparison());
            is_lane(held(b.dtype))
                && !compared
                && (b.scope == Scope::Register || place(p, var, &[1]))
                && value(buffers, v, var, held)
        }
        Stmt::If { condition, then, other } => {
            !depends(condition, var)
                && is_vector_of(buffers, then, var as Var, held)
                && is_vector_of(buffers, other, var as Var, held)
        }
        Stmt::Prefetch { .. } => true,
        Stmt::Multiply(_) => false,
    })
}

/// The loops around what runs in lanes: those, and of copies that stand side by side.
#[derive(Clone, Copy)]
struct Around {
    lane: Var,
    lanes: usize,
    copies: Option<(Var, usize)>,
}

impl Around {
    fn stores(self, body: Vec<Stmt>) -> Stmt {
        let vector = Stmt::For { var: self.lane, extent: self.lanes, kind: Kind::Vector, body };
        match self.copies {
            Some((var, extent)) => {
                Stmt::For { var, extent, kind: Kind::Unroll, body: vec![vector] }
            }
            None => vector,
        }
    }

    /// Puts runs of stores into vector loops; loops and branches stay outside of them.
    fn inside(self, body: Vec<Stmt>) -> Vec<Stmt> {
        let mut out: Vec<Stmt> = Vec::new();
        let mut run: Vec<Stmt> = Vec::new();
        for stmt in body {
            if !matches!(stmt, Stmt::Store { .. }) && !run.is_empty() {
                out.push(self.stores(std::mem::take(&mut run)));
            }
            match stmt {
                Stmt::Store { .. } => run.push(stmt),
                Stmt::For { var, extent, kind, body } => {
                    out.push(Stmt::For { var, extent, kind, body: self.inside(body) })
                }
                Stmt::If { condition, then, other } => out.push(Stmt::If {
                    condition,
                    then: self.inside(then),
                    other: self.inside(other),
                }),
                Stmt::Prefetch { .. } | Stmt::Multiply(_) => out.push(stmt),
            }
        }
        out.extend((!run.is_empty()).then(|| self.stores(run)));
        out
    }
}

/// One lane-wide copy of statements, or several: `var` becomes `index`, one-element register
/// buffers get lanes.
fn in_lanes(
    lower: &mut Lower,
    body: &[Stmt],
    var: Var,
    (lane, copies): (Var, Option<(Var, usize)>),
    index: &Affine,
) -> Vec<Stmt> {
    let lanes = lower.target.lanes;
    let registers: Vec<BufferId> = (0..lower.buffers.len())
        .filter(|&b| lower.buffers[b].scope == Scope::Register && lower.buffers[b].len == 1)
        .filter(|&b| writes(body, b))
        .collect();
    let (place, count) = match copies {
        Some((copy, n)) => (Affine::axis(lane as usize).plus(copy as usize, lanes as i64), n),
        None => (Affine::axis(lane as usize), 1),
    };
    let wide: Vec<(BufferId, BufferId, Affine)> = registers
        .into_iter()
        .map(|b| {
            let dtype = lower.buffers[b].dtype;
            (b, lower.register(dtype, count * lanes), place.clone())
        })
        .collect();
    let index = |a: &Affine| {
        a.substitute(&|v| if v == var as usize { index.clone() } else { Affine::axis(v) })
    };
    let body = rewrite(body, &index, &wide);
    Around { lane, lanes, copies }.inside(body)
}

/// Whether statements store to a buffer.
pub fn writes(body: &[Stmt], buffer: BufferId) -> bool {
    body.iter().any(|s| match s {
        Stmt::For { body, .. } => writes(body, buffer),
        Stmt::Store { buffer: b, .. } => *b == buffer,
        Stmt::If { then, other, .. } => writes(then, buffer) || writes(other, buffer),
        Stmt::Multiply(m) => m.sums.0 == buffer,
        Stmt::Prefetch { .. } => false,
    })
}

/// Whether statements load from memory that they store to.
pub fn reads_what_it_stores(lower: &Lower, body: &[Stmt]) -> bool {
    fn loads(e: &Expr, buffer: BufferId) -> bool {
        match e {
            Expr::Load(b, p) | Expr::Word(b, p) => {
                *b == buffer || p.dynamic.as_ref().is_some_and(|d| loads(d, buffer))
            }
            Expr::Index(_) | Expr::Const(..) => false,
            Expr::Fold(_, b) => *b == buffer,
            Expr::Unary(_, x) | Expr::Cast(_, x) => loads(x, buffer),
            Expr::Binary(_, x, y) => loads(x, buffer) || loads(y, buffer),
            Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) | Expr::Select(x, y, z) => {
                [x, y, z].into_iter().any(|e| loads(e, buffer))
            }
        }
    }
    fn reads(body: &[Stmt], buffer: BufferId) -> bool {
        body.iter().any(|s| match s {
            Stmt::For { body, .. } => reads(body, buffer),
            Stmt::Store { value, .. } => loads(value, buffer),
            Stmt::If { condition, then, other } => {
                loads(condition, buffer) || reads(then, buffer) || reads(other, buffer)
            }
            Stmt::Multiply(m) => m.sides.iter().any(|side| side.buffer == buffer),
            Stmt::Prefetch { .. } => false,
        })
    }
    let memory = |b: &BufferId| lower.buffers[*b].scope == Scope::Global;
    (0..lower.buffers.len()).filter(memory).any(|b| writes(body, b) && reads(body, b))
}

/// A loop over `var` around statements: vector steps and a scalar rest where lanes can hold it.
pub fn vectorize(lower: &mut Lower, var: Var, body: Vec<Stmt>) -> Vec<Stmt> {
    let (extent, lanes) = (lower.extents[var as usize], lower.target.lanes);
    let scalar = |body: Vec<Stmt>| vec![Stmt::For { var, extent, kind: Kind::Serial, body }];
    // A thread of a GPU takes one element after another.
    if lower.target.threads > 0 || extent < lanes || !is_vector(&lower.buffers, &body, var) {
        return scalar(body);
    }
    let (steps, rest) = (extent / lanes, extent % lanes);
    // Lanes beyond what is in use compute what nobody reads.
    let (Ok(lane), Ok(step), Ok(tail)) = (
        lower.var(lanes),
        lower.piece(var, steps, 0, lanes),
        lower.piece(var, rest.max(1), steps * lanes, 1),
    ) else {
        return scalar(body);
    };
    let index = Affine::scaled(step as usize, lanes as i64).plus(lane as usize, 1);
    let count =
        if lower.span(var).is_some() { 1 } else { copies(&body, steps, lower.target.registers) };
    let many = (count > 1).then(|| several(lower, &body, var, (steps, lane, count))).flatten();
    let mut out = match many {
        Some(out) => out,
        None => {
            let body = in_lanes(lower, &body, var, (lane, None), &index);
            vec![Stmt::For { var: step, extent: steps, kind: Kind::Serial, body }]
        }
    };
    let again = lower.span(var).is_none() && !reads_what_it_stores(lower, &body);
    if rest > 0 && again {
        // The last vector ends where the axis does and stores some elements a second time.
        let index = Affine { offset: (extent - lanes) as i64, ..Affine::axis(lane as usize) };
        out.extend(in_lanes(lower, &body, var, (lane, None), &index));
    } else if rest > 0 {
        let index = Affine { offset: (steps * lanes) as i64, ..Affine::axis(tail as usize) };
        let body = substitute(&body, var, &index);
        out.push(Stmt::For { var: tail, extent: rest, kind: Kind::Serial, body });
    }
    out
}

/// Vectors that are computed side by side where each takes a long chain of instructions.
const CHAINS: usize = 4;

/// How many of these `steps` are done side by side: of long chains, and of sums that run through
/// memory row after row, of which each vector is a small part.
fn copies(body: &[Stmt], steps: usize, registers: usize) -> usize {
    let stores = body.iter().all(|s| matches!(s, Stmt::Store { .. }));
    let long = |s: &Stmt| matches!(s, Stmt::Store { value, .. } if is_long(value));
    let sums = body.iter().any(|s| matches!(s, Stmt::For { .. }));
    let most = match (stores, sums) {
        (true, _) if body.iter().all(long) => CHAINS,
        (false, true) => registers / 2,
        _ => 1,
    };
    [16, 8, CHAINS, 2].into_iter().find(|&n| n <= most && 2 * n <= steps).unwrap_or(1)
}

/// Loops over vectors, `count` of which stand side by side, and over what is left.
fn several(
    lower: &mut Lower,
    body: &[Stmt],
    var: Var,
    (steps, lane, count): (usize, Var, usize),
) -> Option<Vec<Stmt>> {
    let (main, left) = (steps / count, steps % count);
    let lanes = lower.target.lanes as i64;
    let (turn, copy, last) =
        (lower.var(main).ok()?, lower.var(count).ok()?, lower.var(left.max(1)).ok()?);
    let index = Affine::scaled(turn as usize, count as i64 * lanes)
        .plus(copy as usize, lanes)
        .plus(lane as usize, 1);
    let inside = in_lanes(lower, body, var, (lane, Some((copy, count))), &index);
    let mut out = vec![Stmt::For { var: turn, extent: main, kind: Kind::Serial, body: inside }];
    if left > 0 {
        let offset = (main * count) as i64 * lanes;
        let index = Affine { offset, ..Affine::scaled(last as usize, lanes) };
        let index = index.plus(lane as usize, 1);
        let body = in_lanes(lower, body, var, (lane, None), &index);
        out.push(Stmt::For { var: last, extent: left, kind: Kind::Serial, body });
    }
    Some(out)
}

/// Whether a value takes a function that is computed by a polynomial.
fn is_long(e: &Expr) -> bool {
    match e {
        Expr::Unary(
            UnaryFn::Exp
            | UnaryFn::Log
            | UnaryFn::Tanh
            | UnaryFn::Erf
            | UnaryFn::Sin
            | UnaryFn::Cos,
            _,
        ) => true,
        Expr::Unary(_, x) | Expr::Cast(_, x) => is_long(x),
        Expr::Binary(_, x, y) => is_long(x) || is_long(y),
        Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
            [x, y, z].into_iter().any(|e| is_long(e))
        }
        Expr::Load(..) | Expr::Index(_) | Expr::Const(..) | Expr::Fold(..) | Expr::Word(..) => {
            false
        }
    }
}

/// Elements that lie side by side in memory and are read in turns, at most and at least.
const BESIDE: std::ops::RangeInclusive<usize> = 4..=32;

/// Where the innermost axis steps through memory by far and an outer one by one element, some of
/// the outer one's turns are made within each vector: their elements share lines of the cache.
pub fn beside(lower: &mut Lower, vars: &mut [Var], inner: Var, body: Vec<Stmt>) -> Vec<Stmt> {
    let mut near: Option<Var> = None;
    each_affine(&body, &mut |a| {
        let apart = a.coefficient(inner as usize).abs() > 1;
        let outer = vars.iter().copied().find(|&v| a.coefficient(v as usize) == 1);
        near = near.or(outer.filter(|_| apart));
    });
    let Some(near) = near.filter(|&v| lower.span(v).is_none()) else { return body };
    let vectors = lower.extents[inner as usize] >= lower.target.lanes
        && is_vector(&lower.buffers, &body, inner);
    let extent = lower.extents[near as usize];
    let part = BESIDE.rev().find(|&n| extent.is_multiple_of(n));
    let Some(part) = part.filter(|_| vectors) else { return body };
    let (Ok(outer), Ok(turn)) = (lower.var(extent / part), lower.var(part)) else { return body };
    let index = Affine::scaled(outer as usize, part as i64).plus(turn as usize, 1);
    vars.iter_mut().filter(|v| **v == near).for_each(|v| *v = outer);
    let body = substitute(&body, near, &index);
    vec![Stmt::For { var: turn, extent: part, kind: Kind::Serial, body }]
}
