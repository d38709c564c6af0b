//! Proves that a kernel stays within its buffers: every affine place is checked over the whole
//! range of its loops. Generated code carries no bounds checks, so nothing is emitted unproven.

use std::collections::HashMap;
use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::index::multiple_of;
use super::ir::{
    Expr, Kind, Loops, Multiply, Number, Param, Place, Range as Turns, Scope, Stmt, Var,
    WARP_BYTES, WARP_LINES, has_threads,
};
use crate::graph::eval::int_range;
use crate::graph::infer::infer;
use crate::graph::op::{Affine, BinaryFn, Op, Type};
use crate::graph::text::op_text;

/// What is wrong with a kernel: a bug of the compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unproven(pub String);

/// Checks a kernel.
pub fn verify(loops: &Loops) -> Result<(), Unproven> {
    typed(loops)?;
    let dims = loops.buffers.iter().find(|b| b.param == Param::Dims);
    let room = dims.map_or(0, |b| if b.dtype == DType::I64 { b.len } else { 0 });
    for Turns { var, from, to } in &loops.ranges {
        for bound in from.iter().chain([to]) {
            let fits = (bound.dim as usize) < room && bound.width > 0 && bound.times > 0;
            unless(fits, || format!("loop i{var} turns {bound:?} times, of {room} dims"))?;
        }
    }
    threads(loops, &loops.body, Around::Nothing)?;
    let mut check = Check { loops, ranges: HashMap::new(), sums: Vec::new() };
    check.block(&loops.body, true)
}

/// What is around statements.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Around {
    /// No block.
    Nothing,
    /// A block, whose threads all do the same.
    Block,
    /// The same of a group of its threads.
    Group,
    /// A loop over threads, and nothing in it.
    Threads,
    /// Something in such a loop.
    Thread,
}

/// Checks that loops over threads are in blocks, or in groups of their threads, that any other such
/// loop holds no other one but a single one, and that nothing else in a block stores to memory.
fn threads(loops: &Loops, body: &[Stmt], around: Around) -> Result<(), Unproven> {
    let inside = if around == Around::Threads { Around::Thread } else { around };
    body.iter().try_for_each(|stmt| match stmt {
        Stmt::For { var, kind: Kind::Thread, body: inner, .. } => {
            let nested = around == Around::Threads && body.len() == 1;
            let own = matches!(around, Around::Block | Around::Group) || nested;
            unless(own, || format!("thread loop i{var} is at no place of its own"))?;
            let group = around == Around::Block && inner.len() > 1 && has_threads(inner);
            threads(loops, inner, if group { Around::Group } else { Around::Threads })
        }
        Stmt::For { kind: Kind::Block, body: inner, .. } => threads(loops, inner, Around::Block),
        Stmt::For { body: inner, .. } => threads(loops, inner, inside),
        Stmt::Store { buffer, .. } => {
            let own = loops.buffers[*buffer].scope == Scope::Register;
            unless(own || !matches!(around, Around::Block | Around::Group), || {
                format!("b{buffer} is stored by all threads of a block")
            })
        }
        Stmt::If { then, other, .. } => {
            threads(loops, then, inside)?;
            threads(loops, other, inside)
        }
        Stmt::Multiply(m) => {
            let names = format!("a product over {:?} by a warp", m.lane);
            unless(matches!(around, Around::Threads | Around::Thread), || names)
        }
        Stmt::Prefetch { .. } => Ok(()),
    })
}

/// Checks that operands have the dtypes that their operations ask for, and values those of the
/// buffers that they go to.
pub fn typed(loops: &Loops) -> Result<(), Unproven> {
    fn block(loops: &Loops, body: &[Stmt]) -> Result<(), Unproven> {
        body.iter().try_for_each(|stmt| match stmt {
            Stmt::For { body, .. } => block(loops, body),
            Stmt::Store { buffer, place, value } => {
                let holds = dtype(loops, &Expr::Load(*buffer, place.clone()))?;
                let found = dtype(loops, value)?;
                unless(found == holds, || format!("b{buffer} holds {holds}, not {found}"))
            }
            Stmt::If { condition, then, other } => {
                let found = dtype(loops, condition)?;
                unless(found == DType::Bool, || format!("a condition of {found}"))?;
                block(loops, then)?;
                block(loops, other)
            }
            Stmt::Multiply(m) => {
                let [x, y] = m.sides.each_ref().map(|side| loops.buffers[side.buffer].dtype);
                let sums = loops.buffers[m.sums.0].dtype;
                let fits = match sums {
                    DType::F32 => x == y && x.is_rounded(),
                    _ => {
                        sums == DType::I32
                            && [x, y].iter().all(|t| matches!(t, DType::I8 | DType::U8))
                    }
                };
                unless(fits, || format!("{sums} sums of {x} and {y} by a warp"))
            }
            Stmt::Prefetch { .. } => Ok(()),
        })
    }
    block(loops, &loops.body)
}

fn unless(holds: bool, why: impl FnOnce() -> String) -> Result<(), Unproven> {
    if holds { Ok(()) } else { Err(Unproven(why())) }
}

/// The dtype of a value whose parts all fit.
fn dtype(loops: &Loops, e: &Expr) -> Result<DType, Unproven> {
    let buffer = |n: usize| {
        let buffer = loops.buffers.get(n);
        buffer.ok_or_else(|| Unproven(format!("b{n} of {} buffers", loops.buffers.len())))
    };
    let apply = |op: Op, args: &[&Arc<Expr>]| {
        let types = args.iter().map(|e| Ok(Type::new(dtype(loops, e)?, &[])));
        let types: Vec<Type> = types.collect::<Result<_, Unproven>>()?;
        let ty = infer(&op, &types.iter().collect::<Vec<_>>());
        let ty = ty.map_err(|misfit| {
            let names: Vec<String> = types.iter().map(|t| t.dtype.to_string()).collect();
            let (op, names) = (op_text(&op), names.join(" and "));
            Unproven(format!("{op} of {names} where {} is right", misfit.expected))
        });
        Ok(ty?.dtype)
    };
    Ok(match e {
        Expr::Load(n, place) => {
            if let Some(dynamic) = &place.dynamic {
                let found = dtype(loops, dynamic)?;
                unless(found == DType::I64, || format!("an index of {found}"))?;
            }
            buffer(*n)?.dtype
        }
        Expr::Index(_) => DType::I64,
        Expr::Const(dtype, number) => {
            let fits = matches!(number, Number::Float(_)) == dtype.is_float();
            unless(fits, || format!("{number:?} as {dtype}"))?;
            *dtype
        }
        Expr::Unary(f, x) => apply(Op::Unary(*f), &[x])?,
        Expr::Binary(f, x, y) => apply(Op::Binary(*f), &[x, y])?,
        Expr::Select(x, y, z) => apply(Op::Select, &[x, y, z])?,
        Expr::Cast(to, x) => apply(Op::Cast(*to), &[x])?,
        Expr::Fma(x, y, z) => {
            apply(Op::Binary(BinaryFn::Mul), &[x, y])?;
            apply(Op::Binary(BinaryFn::Add), &[x, z])?
        }
        Expr::Word(n, place) => {
            let found = dtype(loops, &Expr::Load(*n, place.clone()))?;
            let part = matches!(found, DType::I16 | DType::I8 | DType::U8 | DType::BF16);
            unless(part, || format!("a word of {found}"))?;
            DType::I32
        }
        Expr::Dot(parts, x, y, z) => {
            for (e, wanted) in [(x, DType::I32), (y, DType::I32), (z, parts.sum())] {
                let found = dtype(loops, e)?;
                unless(found == wanted, || format!("a dot product of {found}"))?;
            }
            parts.sum()
        }
        Expr::Fold(_, n) => {
            let lanes = buffer(*n)?.len;
            unless(lanes.is_power_of_two(), || format!("a fold of {lanes} lanes"))?;
            buffer(*n)?.dtype
        }
    })
}

struct Check<'a> {
    loops: &'a Loops,
    /// What each loop variable can be here.
    ranges: HashMap<Var, Range>,
    /// What sums of several of them can be here.
    sums: Vec<(Affine, Range)>,
}

/// Least and greatest value.
type Range = (i128, i128);

impl Check<'_> {
    fn block(&mut self, body: &[Stmt], outermost: bool) -> Result<(), Unproven> {
        let alone = body.len() == 1;
        for stmt in body {
            match stmt {
                Stmt::For { var, extent, kind, body } => {
                    if *extent == 0 {
                        return Err(Unproven(format!("loop i{var} has no turns")));
                    }
                    // Emitters are told of one number of lanes.
                    let lanes = *kind != Kind::Vector || self.loops.lanes() == Some(*extent);
                    unless(lanes, || format!("vector loop i{var} has lanes of its own"))?;
                    let pieces = matches!(kind, Kind::Parallel | Kind::Block);
                    if pieces && !(outermost && alone) {
                        return Err(Unproven(format!("{kind:?} loop i{var} is not outermost")));
                    }
                    if let Some(range) = self.loops.range(*var) {
                        // Emitters make all turns of these, or all from the first one.
                        let fits = match kind {
                            Kind::Serial => true,
                            Kind::Parallel => range.from.is_none(),
                            Kind::Vector | Kind::Unroll | Kind::Block | Kind::Thread => false,
                        };
                        unless(fits, || {
                            format!("a run cannot choose turns of {kind:?} loop i{var}")
                        })?;
                    }
                    self.ranges.insert(*var, (0, *extent as i128 - 1));
                    self.block(body, outermost && alone && pieces)?;
                }
                Stmt::Store { buffer, place, value } => {
                    self.place(*buffer, place, 0)?;
                    self.expr(value)?;
                }
                Stmt::If { condition, then, other } => {
                    self.expr(condition)?;
                    let before = (self.ranges.clone(), self.sums.len());
                    self.assume(condition);
                    self.block(then, false)?;
                    self.ranges = before.0;
                    self.sums.truncate(before.1);
                    self.block(other, false)?;
                }
                Stmt::Prefetch { buffer, place } => {
                    let memory = self.loops.buffers.get(*buffer).map(|b| b.scope);
                    unless(memory == Some(Scope::Global), || format!("a prefetch of b{buffer}"))?;
                    self.affine(place)?;
                }
                Stmt::Multiply(m) => self.multiply(m)?,
            }
        }
        Ok(())
    }

    /// A product by a warp: all that it reads and writes.
    fn multiply(&self, m: &Multiply) -> Result<(), Unproven> {
        let scope = |n: usize| self.loops.buffers.get(n).map(|b| b.scope);
        let scopes = m.sides.each_ref().map(|side| scope(side.buffer));
        let fits = scope(m.sums.0) == Some(Scope::Register)
            && scopes == [Some(Scope::Shared); 2]
            && m.lane.map(|v| self.ranges.get(&v)) == [Some(&(0, 7)), Some(&(0, 3))];
        unless(fits, || "a product by a warp of other memory or threads".into())?;
        self.place(m.sums.0, &Place::affine(m.sums.1.clone()), 3)?;
        for (side, lines) in m.sides.iter().zip(WARP_LINES) {
            let products = WARP_BYTES / self.loops.buffers[side.buffer].dtype.bytes();
            let steps = side.steps.map(i128::from);
            unless(steps.iter().all(|s| *s >= 0), || format!("steps of {:?}", side.steps))?;
            let more = (lines as i128 - 1) * steps[0] + (products as i128 - 1) * steps[1];
            self.place(side.buffer, &Place::affine(side.place.clone()), more)?;
        }
        Ok(())
    }

    /// Narrows the variables that a condition speaks of, where it bounds one alone, and the sums of
    /// several that it bounds from above.
    fn assume(&mut self, condition: &Expr) {
        let single = |e: &Expr| match e {
            Expr::Index(index) => match index.terms.as_slice() {
                [(var, 1)] => Some((*var, i128::from(index.offset))),
                _ => None,
            },
            _ => None,
        };
        let number = |e: &Expr| match e {
            Expr::Const(_, Number::Int(v)) => Some(*v),
            _ => None,
        };
        let Expr::Binary(f, x, y) = condition else { return };
        if let (BinaryFn::Lt, Expr::Index(sum), Some(high)) = (f, &**x, number(y))
            && !matches!(sum.terms[..], [] | [(_, 1)])
        {
            let terms = Affine { offset: 0, ..sum.clone() };
            if let Ok((low, _)) = self.affine(&terms) {
                self.sums.push((terms, (low, high - 1 - i128::from(sum.offset))));
            }
        }
        match (f, single(x), number(x), single(y), number(y)) {
            (BinaryFn::And, ..) => {
                self.assume(x);
                self.assume(y);
            }
            (BinaryFn::Le, _, Some(low), Some((var, offset)), _) => {
                self.ranges.entry(var).and_modify(|r| r.0 = r.0.max(low - offset));
            }
            (BinaryFn::Lt, Some((var, offset)), _, _, Some(high)) => {
                self.ranges.entry(var).and_modify(|r| r.1 = r.1.min(high - 1 - offset));
            }
            _ => {}
        }
    }

    /// The range of an index, with what is known of sums that are parts of it.
    fn affine(&self, index: &Affine) -> Result<Range, Unproven> {
        let whole = self.alone(index)?;
        let (mut rest, mut known) = (index.clone(), (0, 0));
        for (sum, (low, high)) in &self.sums {
            let (var, step) = sum.terms[0];
            let times = rest.coefficient(var.into()) / step;
            let part = |t: &(u8, i64)| t.1.checked_mul(times) == Some(rest.coefficient(t.0.into()));
            if times > 0 && sum.terms.iter().all(part) {
                let terms = sum.terms.iter();
                rest = terms.fold(rest, |rest, t| rest.plus(t.0.into(), -t.1 * times));
                known.0 += i128::from(times) * low;
                known.1 += i128::from(times) * high;
            }
        }
        let rest = self.alone(&rest)?;
        Ok((whole.0.max(known.0 + rest.0), whole.1.min(known.1 + rest.1)))
    }

    /// The range of an index by those of its variables.
    fn alone(&self, index: &Affine) -> Result<Range, Unproven> {
        let mut range = (i128::from(index.offset), i128::from(index.offset));
        for &(var, coefficient) in &index.terms {
            let Some(&(low, high)) = self.ranges.get(&var) else {
                return Err(Unproven(format!("i{var} is used outside of its loop")));
            };
            let (a, b) = (i128::from(coefficient) * low, i128::from(coefficient) * high);
            range = (range.0 + a.min(b), range.1 + a.max(b));
        }
        Ok(range)
    }

    fn place(&self, buffer: usize, place: &Place, more: i128) -> Result<(), Unproven> {
        let (low, high) = self.affine(&place.affine)?;
        let (more_low, more_high) = match &place.dynamic {
            Some(e) => {
                self.expr(e)?;
                self.range(e)?
            }
            None => (0, 0),
        };
        let len = self.loops.buffers[buffer].len as i128;
        let (low, high) = (low + more_low, high + more_high + more);
        match low >= 0 && high < len {
            true => Ok(()),
            false => {
                let name = &self.loops.name;
                Err(Unproven(format!("{name}: b{buffer}[{low}..={high}] of {len} elements")))
            }
        }
    }

    /// Range of an index that data decides: clamped somewhere, or it is refused.
    fn range(&self, e: &Expr) -> Result<Range, Unproven> {
        let dtype = self.loops.dtype(e);
        let widest = int_range(if dtype.is_float() { DType::I64 } else { dtype });
        let range = match e {
            Expr::Index(index) => self.affine(index)?,
            Expr::Const(_, Number::Int(v)) => (*v, *v),
            Expr::Cast(_, x) if !self.loops.dtype(x).is_float() => self.range(x)?,
            Expr::Binary(f, x, y) => {
                let (a, b) = (self.range(x)?, self.range(y)?);
                match f {
                    BinaryFn::Add => (a.0 + b.0, a.1 + b.1),
                    BinaryFn::Mul if b.0 == b.1 => {
                        let (low, high) = (a.0.saturating_mul(b.0), a.1.saturating_mul(b.0));
                        (low.min(high), low.max(high))
                    }
                    BinaryFn::Div if b.0 == b.1 && b.0 > 0 && a.0 >= 0 => (a.0 / b.0, a.1 / b.0),
                    BinaryFn::Rem if b.0 == b.1 && b.0 > 0 && a.0 >= 0 => {
                        // What is left of multiples of a number is one of them.
                        let step = i128::from(multiple_of(x).min(multiple_of(y)));
                        (0, a.1.min(b.0 - step))
                    }
                    BinaryFn::Min => (a.0.min(b.0), a.1.min(b.1)),
                    BinaryFn::Max => (a.0.max(b.0), a.1.max(b.1)),
                    _ => widest,
                }
            }
            _ => widest,
        };
        // What does not fit may be anything.
        let fits = range.0 >= widest.0 && range.1 <= widest.1;
        Ok(if fits { range } else { widest })
    }

    fn expr(&self, e: &Expr) -> Result<(), Unproven> {
        match e {
            Expr::Load(buffer, place) => self.place(*buffer, place, 0),
            Expr::Word(buffer, place) => {
                let global = self.loops.buffers[*buffer].scope == Scope::Global;
                unless(global, || format!("a word of registers b{buffer}"))?;
                let after = 4 / self.loops.buffers[*buffer].dtype.bytes() - 1;
                self.place(*buffer, place, after as i128)
            }
            Expr::Index(index) => self.affine(index).map(|_| ()),
            Expr::Const(..) | Expr::Fold(..) => Ok(()),
            Expr::Unary(_, x) | Expr::Cast(_, x) => self.expr(x),
            Expr::Binary(_, x, y) => [x, y].into_iter().try_for_each(|e| self.expr(e)),
            Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
                [x, y, z].into_iter().try_for_each(|e| self.expr(e))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loops::text::parse;

    /// What is wrong with statements in a block over `i0`, of 64 elements of memory and registers.
    fn wrong(body: &str) -> Option<String> {
        let text = format!(
            "kernel \"k\" {{
              b0 : f32[64] out
              b1 : f32[64] register
              block i0 in 2 {{ {body} }}
            }}"
        );
        verify(&parse(&text).expect("a kernel")[0]).err().map(|why| why.0)
    }

    #[test]
    fn groups_of_threads_do_what_blocks_do() {
        let write = "thread i2 in 8 { b0[32*i0 + 8*i1 + i2] = b1[i2] }";
        let set = "thread i3 in 8 { b1[i3] = 0.0:f32 }";
        assert_eq!(wrong(&format!("thread i1 in 4 {{ {set} {write} }}")), None);
        assert_eq!(wrong(&format!("thread i1 in 4 {{ b1[0] = 0.0:f32 {set} {write} }}")), None);
        // A group has no groups, its threads do not store together, and nothing is around it.
        let inner = format!("thread i4 in 1 {{ {set} {write} }}");
        for (body, why) in [
            (format!("thread i1 in 4 {{ {set} {inner} }}"), "no place of its own"),
            (format!("thread i1 in 4 {{ {set} b0[i1] = b1[0] {write} }}"), "stored by all threads"),
            (format!("thread i1 in 4 {{ for i5 in 2 {{ {set} {write} }} }}"), "no place"),
        ] {
            let found = wrong(&body).unwrap_or_default();
            assert!(found.contains(why), "{body}: {found}");
        }
    }
}
