//! One walk over loops for every emitter: it unrolls, keeps register buffers in values, and
//! reuses what it has loaded; a [`Machine`] turns each step into instructions.
//!
//! A kernel is `fn(buffers: *const *mut u8, begin: i64, end: i64)`: the collapsed parallel loops
//! run from `begin` to `end`, which is at least one turn.

mod threads;

use std::collections::HashMap;
use std::sync::Arc;

use kiln_runtime::tensor::DType;

use self::threads::Touched;
use super::invariant::{self, mark_written};
use super::math;
use super::weave::{unwoven, woven};
use crate::graph::op::{Affine, BinaryFn};
use crate::loops::index::multiple_of;
use crate::loops::ir::{
    Buffer, BufferId, Count, Expr, Kind, Loops, Param, Place, Scope, Stmt, Var,
};

pub use super::machine::{Access, Bits, Dynamic, Emitted, Machine, Unsupported};

#[derive(Clone)]
enum Bound<I> {
    Int(I),
    Number(i64),
}

type LoadKey = (BufferId, Affine, Access, DType);

struct Emit<'a, M: Machine> {
    machine: &'a mut M,
    loops: &'a Loops,
    vars: HashMap<Var, Bound<M::Int>>,
    lane: Option<Var>,
    lanes: usize,
    /// Values of register buffers: by buffer and first element, with whether they are wide.
    cells: HashMap<(BufferId, i64), (M::Value, bool)>,
    /// The same where lanes step through a buffer by as many elements as it has vectors.
    across: HashMap<(BufferId, i64), M::Value>,
    loads: HashMap<LoadKey, M::Value>,
    /// Values of shared expressions, and what they hang on.
    known: HashMap<*const Expr, (M::Value, Hangs)>,
    /// Values that were computed before a loop for all of its turns, by whether they are wide.
    fixed: HashMap<(*const Expr, bool), (M::Value, Hangs)>,
    written: Vec<bool>,
    /// Memory that the kernel both reads and writes: through it threads of a block hand on values.
    exchanged: Hangs,
    /// What they have read and written there since they last waited for each other.
    touched: Touched,
    /// What the threads read of it in the statements at hand.
    reading: Hangs,
}

/// The buffers that a value hangs on and that the kernel writes, a bit for each; the last bit is
/// for all that have none of their own.
type Hangs = u64;

fn bit(buffer: BufferId) -> Hangs {
    1 << buffer.min(63)
}

/// Emits a kernel.
pub fn emit<M: Machine>(loops: &Loops, machine: &mut M) -> Emitted<()> {
    let mut written = vec![false; loops.buffers.len()];
    mark_written(&loops.body, &mut written);
    let mut emit = Emit {
        machine,
        loops,
        vars: HashMap::new(),
        lane: None,
        lanes: 1,
        cells: HashMap::new(),
        across: HashMap::new(),
        loads: HashMap::new(),
        known: HashMap::new(),
        fixed: HashMap::new(),
        written,
        exchanged: Hangs::MAX,
        touched: Touched::default(),
        reading: 0,
    };
    let all = emit.exchanges(&loops.body);
    emit.exchanged = all.read & all.written;
    let mut outer = Vec::new();
    let mut body = &loops.body;
    while let [Stmt::For { var, extent, kind: Kind::Parallel | Kind::Block, body: inner }] =
        body.as_slice()
    {
        outer.push((*var, *extent));
        body = inner;
    }
    if outer.is_empty() {
        return emit.block(body);
    }
    let mut turn = emit.machine.parallel_begin();
    let mut limit: usize = outer.iter().map(|o| o.1).product();
    for (i, &(var, extent)) in outer.iter().enumerate().rev() {
        if i == 0 {
            emit.vars.insert(var, Bound::Int(turn.clone()));
            break;
        }
        let (quotient, rest) = emit.machine.div_rem(&turn, extent, limit)?;
        emit.vars.insert(var, Bound::Int(rest));
        turn = quotient;
        limit /= extent;
    }
    // Threads share out all turns; those that this run does not make are passed over.
    let mut guards = 0;
    for &(var, extent) in &outer {
        if let Some(range) = loops.range(var) {
            let (index, _) = emit.resolve(&Affine::axis(var.into()));
            let terms = emit.terms(&index, 1);
            let index = emit.machine.index(&terms, index.offset)?;
            let to = emit.count(range.to, extent)?;
            let made = emit.machine.binary(BinaryFn::Lt, DType::I64, &index, &to)?;
            emit.machine.branch_begin(&made)?;
            guards += 1;
        }
    }
    emit.forget();
    emit.block(body)?;
    for _ in 0..guards {
        emit.machine.branch_else();
        emit.machine.branch_end();
    }
    emit.machine.parallel_end();
    Ok(())
}

impl<M: Machine> Emit<'_, M> {
    fn forget(&mut self) {
        self.loads.clear();
        self.known.clear();
    }

    fn block(&mut self, body: &[Stmt]) -> Emitted<()> {
        body.iter().try_for_each(|stmt| self.stmt(stmt))
    }

    fn stmt(&mut self, stmt: &Stmt) -> Emitted<()> {
        match stmt {
            Stmt::For { var, extent, kind, body } => match kind {
                Kind::Vector => {
                    (self.lane, self.lanes) = (Some(*var), *extent);
                    self.known.clear();
                    self.block(body)?;
                    self.known.clear();
                    self.lane = None;
                    Ok(())
                }
                Kind::Unroll => {
                    let apart = *extent > 1 && invariant::copies_are_apart(self.loops, body);
                    for turn in 0..*extent {
                        self.known.clear();
                        if apart {
                            self.machine.copy_begins();
                        }
                        self.vars.insert(*var, Bound::Number(turn as i64));
                        self.block(body)?;
                    }
                    if apart {
                        self.machine.copies_end();
                    }
                    self.known.clear();
                    Ok(())
                }
                Kind::Serial | Kind::Parallel
                    if *extent == 1 && self.loops.range(*var).is_none() =>
                {
                    self.known.clear();
                    self.vars.insert(*var, Bound::Number(0));
                    self.block(body)
                }
                Kind::Serial | Kind::Parallel => self.serial(*var, *extent, body),
                Kind::Block => Err(Unsupported("blocks inside of other loops".into())),
                Kind::Thread => self.threads(std::slice::from_ref(stmt)),
            },
            Stmt::Store { buffer, place, value } => self.store(*buffer, place, value),
            Stmt::If { condition, then, other } => self.branch(condition, [then, other]),
            Stmt::Prefetch { buffer, place } => {
                let address = self.address(*buffer, &Place::affine(place.clone()))?;
                self.machine.prefetch(&address)
            }
            Stmt::Multiply(m) => self.multiply(m),
        }
    }

    fn branch(&mut self, condition: &Expr, arms: [&[Stmt]; 2]) -> Emitted<()> {
        let condition = self.expr(condition)?.0;
        let (_, carried) = self.carried(&arms.concat());
        let before: Vec<M::Value> = carried.iter().map(|k| self.cells[k].0.clone()).collect();
        let merged = self.machine.merged(&before);
        let all: Vec<(BufferId, i64)> = self.cells.keys().copied().collect();
        let arm = |this: &mut Self, body: &[Stmt]| -> Emitted<()> {
            if let Some(merged) = &merged {
                this.set_cells(&carried, merged.clone());
            }
            this.forget();
            this.block(body)?;
            if let Some(merged) = &merged {
                let next: Vec<M::Value> = carried.iter().map(|k| this.cells[k].0.clone()).collect();
                this.machine.merge(merged, &next);
                this.set_cells(&carried, merged.clone());
                // What was set in one block only is nothing after it.
                this.cells.retain(|key, _| all.contains(key));
            }
            Ok(())
        };
        self.machine.branch_begin(&condition)?;
        arm(self, arms[0])?;
        self.machine.branch_else();
        arm(self, arms[1])?;
        self.machine.branch_end();
        self.forget();
        Ok(())
    }

    fn serial(&mut self, var: Var, extent: usize, body: &[Stmt]) -> Emitted<()> {
        let (assigned, carried) = self.carried(body);
        let fixed = self.fix(body, &assigned)?;
        let before: Vec<M::Value> = carried.iter().map(|k| self.cells[k].0.clone()).collect();
        // Before a turn there may be another one.
        self.touched.add(&self.exchanges(body));
        let (int, inside) = match self.loops.range(var) {
            None => self.machine.loop_begin(extent, &before),
            Some(range) => {
                let from = range.from.map(|from| self.count(from, extent)).transpose()?;
                let to = self.count(range.to, extent)?;
                self.machine.range_begin(from.as_ref(), &to, &before)?
            }
        };
        self.set_cells(&carried, inside);
        self.vars.insert(var, Bound::Int(int));
        self.forget();
        self.block(body)?;
        let next: Vec<M::Value> = carried.iter().map(|k| self.cells[k].0.clone()).collect();
        let after = self.machine.loop_end(&next);
        self.set_cells(&carried, after);
        self.forget();
        fixed.iter().for_each(|key| {
            self.fixed.remove(key);
        });
        Ok(())
    }

    /// The buffers that a loop assigns to, and the cells of them that it hands from turn to turn.
    fn carried(&self, body: &[Stmt]) -> (Vec<bool>, Vec<(BufferId, i64)>) {
        let mut assigned = vec![false; self.loops.buffers.len()];
        mark_written(body, &mut assigned);
        let cells = self.cells.keys().copied().filter(|k| assigned[k.0]);
        let mut carried: Vec<(BufferId, i64)> = cells.collect();
        carried.sort_unstable();
        (assigned, carried)
    }

    /// Computes what does not change in a loop that assigns to some buffers, before it begins.
    fn fix(&mut self, body: &[Stmt], assigned: &[bool]) -> Emitted<Vec<(*const Expr, bool)>> {
        let settled = |buffer: BufferId, at: i64| {
            !assigned[buffer] && self.cells.get(&(buffer, at)).is_some_and(|cell| !cell.1)
        };
        let mut keys = Vec::new();
        for (e, wide) in invariant::find(self.loops, body, &settled) {
            let key = (Arc::as_ptr(&e), wide);
            if self.fixed.contains_key(&key) {
                continue;
            }
            let (mut value, hangs) = self.shared(&e)?;
            if wide {
                value = self.machine.splat(&value)?;
            }
            self.fixed.insert(key, (value, hangs));
            keys.push(key);
        }
        Ok(keys)
    }

    /// A number of turns that the run decides, at most `extent`.
    fn count(&mut self, count: Count, extent: usize) -> Emitted<M::Value> {
        let dims = self.loops.buffers.iter().position(|b| b.param == Param::Dims);
        let dims = dims.ok_or_else(|| Unsupported("turns of dims that are not there".into()))?;
        self.machine.count(dims, count, extent)
    }

    fn set_cells(&mut self, keys: &[(BufferId, i64)], values: Vec<M::Value>) {
        for (key, value) in keys.iter().zip(values) {
            self.cells.entry(*key).and_modify(|cell| cell.0 = value);
        }
    }

    /// The index with unrolled variables as numbers, and how far it steps along the lanes.
    fn resolve(&self, index: &Affine) -> (Affine, i64) {
        let mut resolved = Affine::constant(index.offset);
        let mut along = 0;
        for &(var, coefficient) in &index.terms {
            if Some(var) == self.lane {
                along = coefficient;
                continue;
            }
            match &self.vars[&var] {
                Bound::Number(n) => resolved.offset += n * coefficient,
                Bound::Int(_) => resolved = resolved.plus(var as usize, coefficient),
            }
        }
        (resolved, along)
    }

    fn terms(&self, index: &Affine, scale: i64) -> Vec<(M::Int, i64)> {
        index
            .terms
            .iter()
            .map(|&(var, coefficient)| match &self.vars[&var] {
                Bound::Int(int) => (int.clone(), coefficient * scale),
                Bound::Number(_) => unreachable!("resolved indices have no unrolled variables"),
            })
            .collect()
    }

    fn address(&mut self, buffer: BufferId, place: &Place) -> Emitted<M::Address> {
        let (index, _) = self.resolve(&place.affine);
        let dynamic = match &place.dynamic {
            Some(e) => {
                // Places from data are scalars, whatever runs in lanes around them.
                let lane = self.lane.take();
                let value = self.expr(e);
                self.lane = lane;
                Some(value?.0)
            }
            None => None,
        };
        let bytes = self.loops.buffers[buffer].dtype.bytes() as i64;
        let terms = self.terms(&index, bytes);
        let multiple = place.dynamic.as_ref().map_or(1, |e| multiple_of(e));
        let dynamic = dynamic.as_ref().map(|value| Dynamic { value, bytes, multiple });
        self.machine.address(buffer, &terms, index.offset * bytes, dynamic)
    }

    fn store(&mut self, buffer: BufferId, place: &Place, value: &Expr) -> Emitted<()> {
        if self.copy(buffer, place, value)? {
            return Ok(());
        }
        let (result, _) = self.expr(value)?;
        let b = &self.loops.buffers[buffer];
        if b.scope == Scope::Register {
            let (index, along) = self.resolve(&place.affine);
            let key = (buffer, index.offset);
            if self.lane.is_some() && !matches!(along, 0 | 1) {
                self.cells.retain(|k, _| k.0 != buffer);
                self.across.insert(key, result);
            } else {
                self.across.retain(|k, _| k.0 != buffer);
                self.cells.insert(key, (result, self.lane.is_some()));
            }
            self.known.retain(|_, v| v.1 & bit(buffer) == 0);
            return Ok(());
        }
        let dtype = b.dtype;
        let address = self.address(buffer, place)?;
        self.machine.store(dtype, &address, &result)?;
        self.forget_stored(buffer);
        // What is read there next is what was stored, as these lose nothing.
        let (index, along) = self.resolve(&place.affine);
        let access = if self.lane.is_some() { Access::Lanes(along) } else { Access::One };
        if dtype == DType::F32 && place.dynamic.is_none() && self.lane.is_some() == (along == 1) {
            self.loads.insert((buffer, index, access, dtype), result);
        }
        Ok(())
    }

    fn shared(&mut self, e: &Arc<Expr>) -> Emitted<(M::Value, Hangs)> {
        let known = self.known.get(&Arc::as_ptr(e));
        let fixed = || self.fixed.get(&(Arc::as_ptr(e), self.lane.is_some()));
        if let Some(known) = known.or_else(fixed) {
            return Ok(known.clone());
        }
        let value = self.expr(e)?;
        self.known.insert(Arc::as_ptr(e), value.clone());
        Ok(value)
    }

    /// Three values, and what they hang on.
    fn three(&mut self, e: [&Arc<Expr>; 3]) -> Emitted<([M::Value; 3], Hangs)> {
        let [(x, a), (y, b), (z, c)] = [self.shared(e[0])?, self.shared(e[1])?, self.shared(e[2])?];
        Ok(([x, y, z], a | b | c))
    }

    /// What a value that is read from a buffer hangs on.
    fn hangs(&self, buffer: BufferId) -> Hangs {
        if self.written[buffer] { bit(buffer) } else { 0 }
    }

    /// The value and what it hangs on.
    fn expr(&mut self, e: &Expr) -> Emitted<(M::Value, Hangs)> {
        let wide = self.lane.is_some();
        let dtype = |x: &Expr| compute_dtype(self.loops.dtype(x));
        Ok(match e {
            Expr::Load(buffer, place) => {
                let dtype = self.loops.buffers[*buffer].dtype;
                (self.load(*buffer, place, dtype)?, self.hangs(*buffer))
            }
            // Elements side by side are the bytes of an i32.
            Expr::Word(buffer, place) => {
                (self.load(*buffer, place, DType::I32)?, self.hangs(*buffer))
            }
            Expr::Dot(parts, x, y, z) => {
                let ([x, y, z], hangs) = self.three([x, y, z])?;
                (self.machine.dot(*parts, [&x, &y, &z], wide)?, hangs)
            }
            Expr::Index(index) => {
                let (index, _) = self.resolve(index);
                let terms = self.terms(&index, 1);
                (self.machine.index(&terms, index.offset)?, 0)
            }
            Expr::Const(dtype, number) => {
                (self.machine.number(compute_dtype(*dtype), *number, wide)?, 0)
            }
            Expr::Unary(f, x) => {
                let t = dtype(x);
                let (x, hangs) = self.shared(x)?;
                (math::unary(self.machine, *f, t, &x, wide)?, hangs)
            }
            Expr::Binary(f, x, y) => self.binary(*f, x, y)?,
            Expr::Select(c, x, y) => {
                let t = dtype(x);
                let ([c, x, y], hangs) = self.three([c, x, y])?;
                (self.machine.select(t, &c, &x, &y)?, hangs)
            }
            Expr::Cast(to, x) => {
                let from = self.loops.dtype(x);
                let (x, hangs) = self.shared(x)?;
                (self.machine.cast(from, *to, &x)?, hangs)
            }
            Expr::Fma(x, y, z) => {
                let t = dtype(x);
                let ([x, y, z], hangs) = self.three([x, y, z])?;
                (self.machine.accumulate(t, &x, &y, &z)?, hangs)
            }
            Expr::Fold(f, buffer) => {
                let mut keys: Vec<(BufferId, i64)> =
                    self.cells.keys().copied().filter(|k| k.0 == *buffer).collect();
                keys.sort_unstable();
                let values: Vec<M::Value> = keys.iter().map(|k| self.cells[k].0.clone()).collect();
                let Buffer { dtype, len, .. } = self.loops.buffers[*buffer];
                let in_blocks =
                    matches!(self.loops.body[..], [Stmt::For { kind: Kind::Block, .. }]);
                let folded = match keys[..] {
                    // Each thread has one of its elements.
                    [only] if len > 1 && !self.cells[&only].1 => {
                        self.machine.fold_threads(*f, compute_dtype(dtype), &values[0], len)?
                    }
                    // Or as many of them as there are lanes.
                    [_] if in_blocks && self.loops.lanes().is_some_and(|lanes| len > lanes) => {
                        let lanes = self.loops.lanes().unwrap_or(len);
                        let own = self.machine.fold(*f, &values)?;
                        self.machine.fold_threads(*f, compute_dtype(dtype), &own, len / lanes)?
                    }
                    _ => self.machine.fold(*f, &values)?,
                };
                (folded, bit(*buffer))
            }
        })
    }

    /// f(x, y), where a few are computed otherwise than their operands would say.
    fn binary(&mut self, f: BinaryFn, x: &Arc<Expr>, y: &Arc<Expr>) -> Emitted<(M::Value, Hangs)> {
        let dtype = compute_dtype(self.loops.dtype(x));
        if let (BinaryFn::Add, DType::F32, Some((f, of))) = (f, dtype, math::beside_one(x, y)) {
            let (of, hangs) = self.shared(of)?;
            let wide = self.lane.is_some();
            return Ok((math::one_and(self.machine, f, &of, wide)?, hangs));
        }
        let ((a, b), (c, d)) = (self.shared(x)?, self.shared(y)?);
        let value = match (f, &**y) {
            (BinaryFn::Pow, Expr::Const(_, n)) => math::pow(self.machine, dtype, &a, &c, Some(*n)),
            (BinaryFn::Pow, _) => math::pow(self.machine, dtype, &a, &c, None),
            _ => self.machine.binary(f, dtype, &a, &c),
        };
        Ok((value?, b | d))
    }

    /// Lanes that step through a register buffer by as many elements as it has vectors.
    fn load_across(&mut self, key: (BufferId, i64)) -> Emitted<M::Value> {
        if !self.across.contains_key(&key) {
            let vectors = self.loops.buffers[key.0].len / self.lanes;
            let at = |k: usize| (key.0, (k * self.lanes) as i64);
            let rows: Option<Vec<M::Value>> =
                (0..vectors).map(|k| self.cells.get(&at(k)).map(|cell| cell.0.clone())).collect();
            for (k, row) in unwoven(self.machine, &rows.ok_or_else(unwritten)?, self.lanes)?
                .into_iter()
                .enumerate()
            {
                self.across.insert((key.0, k as i64), row);
            }
        }
        self.across.get(&key).cloned().ok_or_else(unwritten)
    }

    /// Vectors of a register buffer that was written across them.
    fn weave(&mut self, buffer: BufferId) -> Emitted<()> {
        let vectors = self.loops.buffers[buffer].len / self.lanes;
        let rows: Option<Vec<M::Value>> =
            (0..vectors).map(|k| self.across.get(&(buffer, k as i64)).cloned()).collect();
        for (k, row) in
            woven(self.machine, &rows.ok_or_else(unwritten)?, self.lanes)?.into_iter().enumerate()
        {
            self.cells.insert((buffer, (k * self.lanes) as i64), (row, true));
        }
        Ok(())
    }

    /// A value of this dtype at an element of a buffer.
    fn load(&mut self, buffer: BufferId, place: &Place, dtype: DType) -> Emitted<M::Value> {
        let b = &self.loops.buffers[buffer];
        let wide = self.lane.is_some();
        if b.scope == Scope::Register {
            let (index, along) = self.resolve(&place.affine);
            let key = (buffer, index.offset);
            if wide && !matches!(along, 0 | 1) {
                return self.load_across(key);
            }
            if wide && !self.cells.contains_key(&key) {
                self.weave(buffer)?;
            }
            let (value, is_wide) = self.cells.get(&key).cloned().ok_or_else(unwritten)?;
            return if wide && !is_wide { self.machine.splat(&value) } else { Ok(value) };
        }
        let (index, along) = self.resolve(&place.affine);
        let access = match (wide, along) {
            (false, _) => Access::One,
            (true, 0) => Access::Splat,
            // The elements of a word are one that is read.
            (true, step) => Access::Lanes(step * b.dtype.bytes() as i64 / dtype.bytes() as i64),
        };
        if dtype != DType::F32 && matches!(access, Access::Lanes(step) if step != 1) {
            return Err(Unsupported(format!("lanes of {dtype} that lie apart")));
        }
        let key = (buffer, index, access, dtype);
        if place.dynamic.is_none()
            && let Some(known) = self.loads.get(&key)
        {
            return Ok(known.clone());
        }
        let address = self.address(buffer, place)?;
        let value = self.machine.load(dtype, &address, access)?;
        if place.dynamic.is_none() {
            self.loads.insert(key, value.clone());
        }
        Ok(value)
    }
}

fn unwritten() -> Unsupported {
    Unsupported("a register is read before it is written".into())
}

/// Short floats are computed as f32 and rounded when they are stored or cast.
pub fn compute_dtype(dtype: DType) -> DType {
    if dtype.is_rounded() { DType::F32 } else { dtype }
}
