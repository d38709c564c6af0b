//! Moves that change which axis lies side by side in memory: blocks are read and written in whole
//! vectors, and change their order in registers. What is computed on the way stays in lanes.
//!
//! A register buffer is filled along one axis and read along the other: where lanes step through it
//! by more than one element, emitters exchange lanes between registers (`backend/weave.rs`).

use super::ir::{BufferId, Expr, Kind, Place, Scope, Stmt, Var, dtype};
use super::lanes::{is_vector, reads_what_it_stores};
use super::lower::{Lower, Lowering};
use super::rewrite::rewrite;
use crate::graph::op::Affine;
use crate::rules::kind::is_lane;

/// The longest axis that is woven with another one.
const NARROW: std::ops::RangeInclusive<usize> = 2..=8;
/// The fewest turns of the outer loops where blocks are not shared out to threads.
const PIECES: usize = 16;
/// Pieces of an axis at most.
const MOST: usize = 64;
/// Bytes of a way of the nearest cache, and of a line of it; and lines that a place keeps, with
/// some to spare.
const WAY: usize = 4096;
const LINE: usize = 64;
const WAYS: usize = 8;

/// How a block changes its order.
#[derive(Clone, Copy, PartialEq)]
enum How {
    /// As many rows as there are lanes change places with columns, computed before.
    Early,
    /// The same, and only one load changes its order: the rest is computed after.
    Late(BufferId),
    /// A few rows are read, and written element by element in turns.
    Weave,
    /// Vectors that lie side by side are taken apart into a few rows.
    Unweave(BufferId),
}

/// A statement that stores, and how its blocks change their order.
struct Turn<'a> {
    store: &'a [Stmt],
    how: How,
    /// The axis along which elements are stored side by side, and that along which they are read.
    inner: Var,
    near: Var,
}

/// Loads of a value, each once; none where it reads in another way.
fn loads(e: &Expr, found: &mut Vec<(BufferId, Place)>) -> Option<()> {
    match e {
        Expr::Load(buffer, place) => {
            let load = (*buffer, place.clone());
            if !found.contains(&load) {
                found.push(load);
            }
            Some(())
        }
        Expr::Const(..) => Some(()),
        Expr::Index(_) | Expr::Fold(..) | Expr::Word(..) => None,
        Expr::Unary(_, x) | Expr::Cast(_, x) => loads(x, found),
        Expr::Binary(_, x, y) => [x, y].into_iter().try_for_each(|e| loads(e, found)),
        Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
            [x, y, z].into_iter().try_for_each(|e| loads(e, found))
        }
    }
}

/// The loops over `inner` and over one of the outer axes, which is taken from `vars`, where a
/// statement reads along that one and stores along `inner`.
pub fn turned(
    lower: &mut Lower,
    vars: &mut Vec<Var>,
    inner: Var,
    body: &[Stmt],
) -> Option<Vec<Stmt>> {
    let turn = find(lower, vars, inner, body)?;
    let before = vars.clone();
    vars.retain(|&v| v != turn.near);
    let made = match turn.how {
        How::Early | How::Late(_) => blocks(lower, vars, &turn),
        How::Weave | How::Unweave(_) => strips(lower, vars, &turn),
    };
    if made.is_err() {
        *vars = before;
    }
    made.ok()
}

fn find<'a>(lower: &mut Lower, vars: &[Var], inner: Var, body: &'a [Stmt]) -> Option<Turn<'a>> {
    let [Stmt::Store { buffer, place, value }] = body else { return None };
    let ty = lower.buffers[*buffer].dtype;
    let memory = lower.buffers[*buffer].scope == Scope::Global && place.dynamic.is_none();
    let along = |v: Var| place.affine.coefficient(v as usize);
    if !memory || !is_lane(ty) || along(inner) != 1 || reads_what_it_stores(lower, body) {
        return None;
    }
    let mut read = Vec::new();
    loads(value, &mut read)?;
    let step = |l: &(BufferId, Place), v: Var| l.1.affine.coefficient(v as usize);
    let (lanes, extent) = (lower.target.lanes, lower.extents[inner as usize]);
    let whole = |lower: &Lower, v: Var| lower.span(v).is_none();
    let turn = |how, near| Some(Turn { store: body, how, inner, near });
    let close = |v: Var| read.iter().all(|l| matches!(step(l, v), 0 | 1));
    let width = |lower: &Lower, v: Var| lower.extents[v as usize];
    // A thread of a GPU has no lanes to exchange.
    if !whole(lower, inner) || lower.target.threads > 0 {
        return None;
    }
    if extent < lanes && NARROW.contains(&extent) {
        let fits =
            |&v: &Var| along(v) == extent as i64 && width(lower, v) >= lanes && whole(lower, v);
        let near = vars.iter().copied().find(fits).filter(|&v| close(v))?;
        return early(lower, value, near).then(|| turn(How::Weave, near))?;
    }
    let apart: Vec<_> = read.iter().filter(|l| !matches!(step(l, inner), 0 | 1)).collect();
    let (first, _) = apart.first()?;
    let near = vars.iter().copied().find(|&v| step(apart[0], v) == 1 && whole(lower, v))?;
    let one = apart.len() == 1 && read.iter().filter(|l| l.0 == *first).count() == 1;
    let rows = width(lower, near);
    if extent < lanes {
        None
    } else if rows >= lanes && close(near) && early(lower, value, near) {
        turn(How::Early, near)
    } else if rows >= lanes && one && late(lower, body, *first, inner) {
        turn(How::Late(*first), near)
    } else if NARROW.contains(&rows)
        && rows < lanes
        && one
        && step(apart[0], inner) == rows as i64
        && late(lower, body, *first, inner)
    {
        turn(How::Unweave(*first), near)
    } else {
        None
    }
}

/// Whether a value can be computed with a variable in lanes.
fn early(lower: &mut Lower, value: &Expr, var: Var) -> bool {
    let ty = dtype(&lower.buffers, value);
    let buffer = lower.register(ty, lower.target.lanes);
    let place = Place::affine(Affine::axis(var as usize));
    is_lane(ty)
        && is_vector(&lower.buffers, &[Stmt::Store { buffer, place, value: value.clone() }], var)
}

/// Whether a statement can run with a variable in lanes once loads of a buffer come from registers.
fn late(lower: &mut Lower, body: &[Stmt], from: BufferId, var: Var) -> bool {
    let ty = lower.buffers[from].dtype;
    let register = lower.register(ty, lower.target.lanes);
    let moved = rewrite(body, &Affine::clone, &[(from, register, Affine::axis(var as usize))]);
    is_lane(ty) && is_vector(&lower.buffers, &moved, var)
}

/// Statements for every `width` turns of `extent`, given the first one: the last ones end where
/// the axis does and store some elements a second time.
fn over(
    lower: &mut Lower,
    (extent, width): (usize, usize),
    each: &mut dyn FnMut(&mut Lower, Affine) -> Lowering<Vec<Stmt>>,
) -> Lowering<Vec<Stmt>> {
    let main = extent / width;
    let var = lower.var(main)?;
    let body = each(lower, Affine::scaled(var as usize, width as i64))?;
    let mut out = vec![Stmt::For { var, extent: main, kind: Kind::Serial, body }];
    if !extent.is_multiple_of(width) {
        out.extend(each(lower, Affine::constant((extent - width) as i64))?);
    }
    Ok(out)
}

/// Pieces of an axis become a loop of their own, where threads have little else to share: the
/// first element of a piece, and how many it has.
fn shared(
    lower: &mut Lower,
    vars: &mut Vec<Var>,
    axis: Var,
    width: usize,
) -> Lowering<Option<(Affine, usize)>> {
    let extent = lower.extents[axis as usize];
    let turns: usize = vars.iter().map(|&v| lower.extents[v as usize]).product();
    let fits = |n: &usize| extent.is_multiple_of(*n) && extent / n >= 2 * width;
    let pieces = match extent.is_multiple_of(width) {
        true => Some(extent / width),
        false => (2..=MOST).rev().find(fits),
    };
    let Some(pieces) = pieces.filter(|_| turns < PIECES) else { return Ok(None) };
    let var = lower.var(pieces)?;
    vars.push(var);
    let length = extent / pieces;
    Ok(Some((Affine::scaled(var as usize, length as i64), length)))
}

/// How many squares along `near` are done before the next ones along `inner`: the more, the more
/// neighbours of a row are read at once; but rows that are stored side by side take places in the
/// nearest cache that other rows, so many bytes apart, want as well.
fn beside(lower: &Lower, turn: &Turn) -> usize {
    let [Stmt::Store { buffer, place, .. }] = turn.store else { return 1 };
    let step = place.affine.coefficient(turn.near as usize).unsigned_abs() as usize;
    let bytes = step * lower.buffers[*buffer].dtype.bytes();
    // The places of a way of the cache that these rows begin at.
    let apart = (1..=WAY / LINE).find(|n| (n * bytes).is_multiple_of(WAY)).unwrap_or(WAY / LINE);
    let rows = |n: &usize| n * lower.target.lanes;
    let fits =
        |n: &usize| rows(n) <= lower.extents[turn.near as usize] && rows(n).div_ceil(apart) <= WAYS;
    [4, 2].into_iter().find(fits).unwrap_or(1)
}

/// Squares of as many rows and columns as there are lanes.
fn blocks(lower: &mut Lower, vars: &mut Vec<Var>, turn: &Turn) -> Lowering<Vec<Stmt>> {
    let lanes = lower.target.lanes;
    let [rows, columns] = [turn.near, turn.inner].map(|v| lower.extents[v as usize]);
    let square = |lower: &mut Lower, at: &Affine, from: &Affine| -> Lowering<Vec<Stmt>> {
        let (copy, lane) = (lower.var(lanes)?, lower.var(lanes)?);
        let along = |start: &Affine, v: Var| start.clone().plus(v as usize, 1);
        // First the rows as they are read, then as they are stored.
        let read = turn.index(along(from, copy), along(at, lane));
        let stored = turn.index(along(from, lane), along(at, copy));
        let across = Affine::scaled(lane as usize, lanes as i64).plus(copy as usize, 1);
        let back = Affine::scaled(copy as usize, lanes as i64).plus(lane as usize, 1);
        Ok(turn.stages(lower, (lanes, copy, lane), (&read, &stored), (across, back)))
    };
    let count = beside(lower, turn);
    let width = count * lanes;
    let piece = |lower: &mut Lower, at: Affine, from: &Affine| -> Lowering<Vec<Stmt>> {
        let var = lower.var(count)?;
        let body = square(lower, &at.plus(var as usize, lanes as i64), from)?;
        Ok(vec![Stmt::For { var, extent: count, kind: Kind::Serial, body }])
    };
    let [mut near, mut inner] = [rows, columns].map(|extent| (Affine::default(), extent));
    if let Some(part) = shared(lower, vars, turn.near, width)? {
        near = part;
    } else if let Some(part) = shared(lower, vars, turn.inner, lanes)? {
        inner = part;
    }
    over(lower, (near.1, width), &mut |lower, at| {
        let at = sum(&near.0, &at);
        over(lower, (inner.1, lanes), &mut |lower, from| {
            piece(lower, at.clone(), &sum(&inner.0, &from))
        })
    })
}

/// x + y
fn sum(x: &Affine, y: &Affine) -> Affine {
    let sum = y.terms.iter().fold(x.clone(), |sum, t| sum.plus(t.0 as usize, t.1));
    Affine { offset: x.offset + y.offset, ..sum }
}

/// A few rows of as many columns as there are lanes.
fn strips(lower: &mut Lower, vars: &mut Vec<Var>, turn: &Turn) -> Lowering<Vec<Stmt>> {
    let lanes = lower.target.lanes;
    let (long, few) = match turn.how {
        How::Weave => (turn.near, turn.inner),
        _ => (turn.inner, turn.near),
    };
    let (extent, count) = (lower.extents[long as usize], lower.extents[few as usize]);
    let strip = |lower: &mut Lower, at: Affine| -> Lowering<Vec<Stmt>> {
        let (copy, lane) = (lower.var(count)?, lower.var(lanes)?);
        let row = at.clone().plus(lane as usize, 1);
        let each = turn.along(long, row, few, Affine::axis(copy as usize));
        // Along both axes at once, elements lie side by side.
        let flat = Affine::scaled(copy as usize, lanes as i64).plus(lane as usize, 1);
        let both = turn.along(long, at.clone(), few, flat.clone());
        let apart = Affine::scaled(lane as usize, count as i64).plus(copy as usize, 1);
        let (first, second, places) = match turn.how {
            How::Weave => (each, both, (apart, flat)),
            _ => (both, each, (flat, apart)),
        };
        Ok(turn.stages(lower, (count, copy, lane), (&first, &second), places))
    };
    let part = shared(lower, vars, long, lanes)?;
    let (start, length) = part.unwrap_or((Affine::default(), extent));
    over(lower, (length, lanes), &mut |lower, at| strip(lower, sum(&start, &at)))
}

/// What an index becomes.
type Change<'a> = Box<dyn Fn(&Affine) -> Affine + 'a>;

impl Turn<'_> {
    fn index(&self, inner: Affine, near: Affine) -> Change<'static> {
        self.along(self.inner, inner, self.near, near)
    }

    /// Indices with two axes as others.
    fn along(&self, a: Var, to_a: Affine, b: Var, to_b: Affine) -> Change<'static> {
        Box::new(move |index: &Affine| {
            index.substitute(&|v| {
                if v == a as usize {
                    to_a.clone()
                } else if v == b as usize {
                    to_b.clone()
                } else {
                    Affine::axis(v)
                }
            })
        })
    }

    /// Vectors into registers, `count` of them, and from there to memory.
    fn stages(
        &self,
        lower: &mut Lower,
        (count, copy, lane): (usize, Var, Var),
        (read, stored): (&Change, &Change),
        (to, from): (Affine, Affine),
    ) -> Vec<Stmt> {
        let [Stmt::Store { buffer: out, place, value }] = self.store else { return Vec::new() };
        let lanes = lower.target.lanes;
        let mut found = Vec::new();
        let (value, late) = match self.how {
            How::Early | How::Weave => (value.clone(), None),
            How::Late(from) | How::Unweave(from) => {
                _ = loads(value, &mut found);
                found.retain(|l| l.0 == from);
                let load = found.into_iter().map(|(b, p)| Expr::Load(b, p)).next();
                (load.unwrap_or_else(|| value.clone()), Some(from))
            }
        };
        let register = lower.register(dtype(&lower.buffers, &value), count * lanes);
        let each = |store: Vec<Stmt>| {
            let body =
                vec![Stmt::For { var: lane, extent: lanes, kind: Kind::Vector, body: store }];
            Stmt::For { var: copy, extent: count, kind: Kind::Unroll, body }
        };
        let place_of = |buffer, place: Affine, value| {
            vec![Stmt::Store { buffer, place: Place::affine(place), value }]
        };
        // The places in registers are no indices of the statement.
        let first = match &rewrite(&place_of(*out, place.affine.clone(), value), read, &[])[..] {
            [Stmt::Store { value, .. }] => place_of(register, to, value.clone()),
            _ => Vec::new(),
        };
        let second = match late {
            Some(buffer) => rewrite(self.store, stored, &[(buffer, register, from)]),
            None => {
                let load = Expr::Load(register, Place::affine(from));
                place_of(*out, stored(&place.affine), load)
            }
        };
        vec![each(first), each(second)]
    }
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::{DType, TensorView};

    use crate::graph::eval::{Data, Value, eval};
    use crate::graph::op::{BinaryFn, Type};
    use crate::graph::{Graph, NodeId};
    use crate::loops::ir::Scope;

    fn numbers(ty: Type, seed: usize) -> Value {
        let at = |i: usize| ((i * 7919 + seed * 31) % 251) as i64 - if seed == 0 { 0 } else { 125 };
        let data = match ty.dtype {
            DType::F32 => Data::Float((0..ty.numel()).map(|i| at(i) as f64 / 4.0).collect()),
            _ => Data::Int((0..ty.numel()).map(|i| i128::from(at(i))).collect()),
        };
        Value { ty, data }
    }

    /// Emitters and the interpreter of loops give what a graph does, and a kernel turns blocks.
    fn check(dtype: DType, shape: &[usize], order: &[usize], add: bool) {
        let o = "moved".into();
        let mut graph = Graph::default();
        let x: NodeId = graph.input("x", Type::new(dtype, shape));
        let mut y = graph.permute(x, order, &o).unwrap();
        if add {
            let to = graph.ty(y).clone();
            let other = graph.input("z", to);
            y = graph.binary(BinaryFn::Sub, y, other, &o).unwrap();
        }
        graph.outputs.push(("y".into(), y));
        let seed = usize::from(dtype != DType::U8);
        let inputs: Vec<Value> =
            graph.inputs.iter().map(|(_, ty)| numbers(ty.clone(), seed)).collect();
        let expected = eval(&graph, &inputs);
        let tensors: Vec<_> = inputs.iter().map(Value::to_tensor).collect();
        let views: Vec<(&str, TensorView)> =
            graph.inputs.iter().zip(&tensors).map(|((n, _), t)| (n.as_str(), t.view())).collect();
        for wide in [false, true] {
            let compiler = crate::Compiler::new().wide(wide).verify_code(true);
            let kernels = compiler.optimise(&graph).unwrap();
            let program = compiler.lower(&kernels).unwrap();
            crate::tests::check_loops(&kernels, &program, &inputs, (&expected, 0.0));
            let registers =
                |k: &crate::loops::ir::Loops| k.buffers.iter().any(|b| b.scope == Scope::Register);
            assert!(program.kernels.iter().any(registers), "{dtype} {shape:?} {order:?}");
            let outputs = compiler.build(&kernels).unwrap().run(&views).unwrap();
            let got = Value::from_tensor(&outputs[0].1);
            assert_eq!(got, expected[0], "{dtype} {shape:?} {order:?}, wide {wide}");
        }
    }

    #[test]
    fn squares_and_strips_are_exact() {
        for dtype in [DType::F32, DType::I32, DType::I16, DType::I8, DType::U8] {
            check(dtype, &[64, 48], &[1, 0], false);
            check(dtype, &[131, 77], &[1, 0], false);
            check(dtype, &[3, 37, 5, 41], &[2, 3, 0, 1], false);
            check(dtype, &[64, 256], &[1, 0], dtype != DType::U8);
            for few in 2..=8 {
                check(dtype, &[5, few, 67], &[0, 2, 1], false);
                if few < 4 {
                    check(dtype, &[5, 67, few], &[0, 2, 1], few == 3 && dtype != DType::U8);
                }
            }
        }
        for few in 4..=8 {
            check(DType::F32, &[2, 83, few], &[0, 2, 1], true);
        }
    }
}
