//! The threads of a block: what they exchange through memory, when they wait for each other, and
//! what they copy into shared memory meanwhile.

use super::{Bound, Emit, Emitted, Hangs, Machine, bit, unwritten};
use crate::loops::ir::{
    BufferId, Expr, Kind, Multiply, Place, Scope, Side, Stmt, Var, has_threads,
};
use crate::loops::share::uses;

/// What threads of a block exchange through memory, as bits of buffers.
#[derive(Clone, Copy, Default)]
pub(super) struct Touched {
    pub(super) read: Hangs,
    pub(super) written: Hangs,
}

impl Touched {
    pub(super) fn add(&mut self, other: &Touched) {
        self.read |= other.read;
        self.written |= other.written;
    }

    /// Whether one of the two writes what the other one touches.
    pub(super) fn meets(&self, other: &Touched) -> bool {
        self.written & (other.read | other.written) | self.read & other.written != 0
    }
}

impl<M: Machine> Emit<'_, M> {
    /// What statements exchange through memory.
    pub(super) fn exchanges(&self, body: &[Stmt]) -> Touched {
        let mut touched = Touched::default();
        if self.exchanged == 0 {
            return touched;
        }
        for (buffer, used) in uses(self.loops.buffers.len(), body).into_iter().enumerate() {
            let memory = self.loops.buffers[buffer].scope != Scope::Register;
            if memory && self.exchanged & bit(buffer) != 0 {
                touched.read |= if used.read { bit(buffer) } else { 0 };
                touched.written |= if used.written { bit(buffer) } else { 0 };
            }
        }
        touched
    }

    /// Loops over the threads of a block, one in another. Threads wait for each other before they
    /// touch what others may have written, or write what others may still read.
    pub(super) fn threads(&mut self, mut body: &[Stmt]) -> Emitted<()> {
        let mut nest = Vec::new();
        while let [Stmt::For { var, extent, kind: Kind::Thread, body: inner }] = body {
            nest.push((*var, *extent));
            body = inner;
        }
        if has_threads(body) {
            return self.groups(&nest, body);
        }
        let exchanges = self.exchanges(body);
        if self.touched.meets(&exchanges) {
            self.machine.barrier()?;
            self.touched = Touched::default();
        }
        self.touched.add(&exchanges);
        self.reading = exchanges.read;
        let (_, carried) = self.carried(body);
        let before: Vec<M::Value> = carried.iter().map(|k| self.cells[k].0.clone()).collect();
        let limit: usize = nest.iter().map(|n| n.1).product();
        let (turn, inside) = self.machine.threads_begin(limit, &before)?;
        self.set_cells(&carried, inside);
        self.number(&nest, turn)?;
        self.forget();
        self.block(body)?;
        let next: Vec<M::Value> = carried.iter().map(|k| self.cells[k].0.clone()).collect();
        let after = self.machine.threads_end(&next);
        self.set_cells(&carried, after);
        self.forget();
        Ok(())
    }

    /// Variables of loops one in another, whose turns have that number.
    fn number(&mut self, nest: &[(Var, usize)], mut turn: M::Int) -> Emitted<()> {
        let mut limit: usize = nest.iter().map(|n| n.1).product();
        for (i, &(var, extent)) in nest.iter().enumerate().rev() {
            let (rest, own) = match i {
                0 => (turn.clone(), turn),
                _ => self.machine.div_rem(&turn, extent, limit)?,
            };
            self.vars.insert(var, Bound::Int(own));
            turn = rest;
            limit /= extent;
        }
        Ok(())
    }

    /// Loops over groups of threads, each of which does what a block would.
    fn groups(&mut self, nest: &[(Var, usize)], body: &[Stmt]) -> Emitted<()> {
        let group = self.machine.groups_begin(nest.iter().map(|n| n.1).product())?;
        self.number(nest, group)?;
        self.forget();
        self.block(body)?;
        self.machine.groups_end();
        self.forget();
        Ok(())
    }

    /// A product by all threads of a warp.
    pub(super) fn multiply(&mut self, m: &Multiply) -> Emitted<()> {
        let (at, _) = self.resolve(&m.sums.1);
        let keys = [0, 1, 2, 3].map(|e| (m.sums.0, at.offset + e));
        let sums = keys.iter().map(|key| self.cells.get(key).map(|cell| cell.0.clone()));
        let sums: Vec<M::Value> = sums.collect::<Option<_>>().ok_or_else(unwritten)?;
        let mut side = |side: &Side| -> Emitted<_> {
            let dtype = self.loops.buffers[side.buffer].dtype;
            let place = Place::affine(side.place.clone());
            let steps = side.steps.map(|step| step * dtype.bytes() as i64);
            Ok((dtype, self.address(side.buffer, &place)?, steps))
        };
        let sides = [side(&m.sides[0])?, side(&m.sides[1])?];
        let next = self.machine.multiply(&sides, &sums)?;
        self.cells.extend(keys.into_iter().zip(next.into_iter().map(|sum| (sum, false))));
        self.known.retain(|_, v| v.1 & bit(m.sums.0) == 0);
        Ok(())
    }

    /// Copies from memory to shared memory, where the machine can do that beside other work: no
    /// thread looks at what it has copied before it waits for the others. Whether it did.
    pub(super) fn copy(&mut self, buffer: BufferId, place: &Place, value: &Expr) -> Emitted<bool> {
        let Expr::Load(from, source) = value else { return Ok(false) };
        let [to, of] = [buffer, *from].map(|b| &self.loops.buffers[b]);
        let spaces = (to.scope, of.scope) == (Scope::Shared, Scope::Global);
        let steps = [&place.affine, &source.affine].map(|a| self.resolve(a).1);
        let apart = self.lane.is_some() && steps != [1, 1];
        let read = self.reading & bit(buffer) != 0 || self.written[*from];
        if !spaces || to.dtype != of.dtype || apart || read {
            return Ok(false);
        }
        let (dtype, count) = (to.dtype, if self.lane.is_some() { self.lanes } else { 1 });
        let (to, at) = (self.address(buffer, place)?, self.address(*from, source)?);
        let copied = self.machine.copy(dtype, &to, &at, count)?;
        if copied {
            self.forget_stored(buffer);
        }
        Ok(copied)
    }

    /// Forgets what was read of a buffer.
    pub(super) fn forget_stored(&mut self, buffer: BufferId) {
        self.loads.retain(|k, _| k.0 != buffer);
        self.known.retain(|_, v| v.1 & bit(buffer) == 0);
    }
}
