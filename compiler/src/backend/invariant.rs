//! What a loop computes anew in each turn though it never changes: functions of numbers that were
//! folded before it, such as the mean of a row. And which copies of a body do not meet in memory.

use std::collections::HashMap;
use std::sync::Arc;

use kiln_runtime::tensor::DType;

use crate::loops::ir::{BufferId, Expr, Kind, Loops, Place, Scope, Stmt};

/// A value of a loop, and whether it is wanted in all lanes.
pub type Wanted = (Arc<Expr>, bool);

/// A search in the body of a loop.
struct Search<'a> {
    loops: &'a Loops,
    /// Whether the element of a register buffer is a scalar that the loop does not change.
    settled: &'a dyn Fn(BufferId, i64) -> bool,
    /// Whether an expression hangs on such elements and numbers only, and on one at least.
    fixed: HashMap<*const Expr, Option<bool>>,
    seen: HashMap<(*const Expr, bool), ()>,
    found: Vec<Wanted>,
}

/// The largest values of f32 in the body of a loop that each of its turns computes alike.
pub fn find(loops: &Loops, body: &[Stmt], settled: &dyn Fn(BufferId, i64) -> bool) -> Vec<Wanted> {
    let (fixed, seen) = (HashMap::new(), HashMap::new());
    let mut search = Search { loops, settled, fixed, seen, found: Vec::new() };
    search.block(body, false);
    search.found
}

impl Search<'_> {
    fn block(&mut self, body: &[Stmt], wide: bool) {
        for stmt in body {
            match stmt {
                Stmt::For { kind, body, .. } => self.block(body, wide || *kind == Kind::Vector),
                Stmt::Store { value, .. } => self.operands(value, wide),
                Stmt::If { then, other, .. } => {
                    self.block(then, wide);
                    self.block(other, wide);
                }
                Stmt::Prefetch { .. } | Stmt::Multiply(_) => {}
            }
        }
    }

    fn operands(&mut self, e: &Expr, wide: bool) {
        match e {
            Expr::Load(..) | Expr::Index(_) | Expr::Const(..) | Expr::Fold(..) => {}
            Expr::Word(..) => {}
            Expr::Unary(_, x) | Expr::Cast(_, x) => self.visit(x, wide),
            Expr::Binary(_, x, y) => [x, y].into_iter().for_each(|e| self.visit(e, wide)),
            Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
                [x, y, z].into_iter().for_each(|e| self.visit(e, wide));
            }
        }
    }

    fn visit(&mut self, e: &Arc<Expr>, wide: bool) {
        if self.seen.insert((Arc::as_ptr(e), wide), ()).is_some() {
            return;
        }
        // A scalar that is wanted as it is needs no place of its own.
        let computed = wide || !matches!(**e, Expr::Load(..));
        match self.fixed(e) {
            Some(true) if computed && self.loops.dtype(e) == DType::F32 => {
                self.found.push((e.clone(), wide));
            }
            _ => self.operands(e, wide),
        }
    }

    /// None where it may change; else whether it hangs on an element.
    fn fixed(&mut self, e: &Arc<Expr>) -> Option<bool> {
        if let Some(&known) = self.fixed.get(&Arc::as_ptr(e)) {
            return known;
        }
        let all = |search: &mut Self, of: &[&Arc<Expr>]| {
            of.iter().try_fold(false, |any, e| search.fixed(e).map(|one| any || one))
        };
        let fixed = match &**e {
            Expr::Const(..) => Some(false),
            Expr::Load(buffer, Place { affine, dynamic: None }) => {
                let scalar = self.loops.buffers[*buffer].scope == Scope::Register
                    && affine.terms.is_empty()
                    && (self.settled)(*buffer, affine.offset);
                scalar.then_some(true)
            }
            Expr::Unary(_, x) => all(self, &[x]),
            Expr::Binary(_, x, y) => all(self, &[x, y]),
            Expr::Select(x, y, z) | Expr::Fma(x, y, z) => all(self, &[x, y, z]),
            Expr::Load(..) | Expr::Index(_) | Expr::Fold(..) => None,
            Expr::Word(..) | Expr::Dot(..) | Expr::Cast(..) => None,
        };
        self.fixed.insert(Arc::as_ptr(e), fixed);
        fixed
    }
}

/// Whether copies of a body are stores in lanes that share no memory: what they read of a buffer
/// that they write is the element that they write.
pub fn copies_are_apart(loops: &Loops, body: &[Stmt]) -> bool {
    let [Stmt::For { kind: Kind::Vector, body, .. }] = body else { return false };
    let mut stores: Vec<(BufferId, &Place)> = Vec::new();
    for stmt in body {
        let Stmt::Store { buffer, place, .. } = stmt else { return false };
        if loops.buffers[*buffer].scope == Scope::Global {
            if place.dynamic.is_some() || stores.iter().any(|s| s.0 == *buffer) {
                return false;
            }
            stores.push((*buffer, place));
        }
    }
    let mut seen = HashMap::new();
    body.iter().all(|stmt| match stmt {
        Stmt::Store { value, .. } => reads_apart(value, &stores, &mut seen),
        Stmt::For { .. } | Stmt::If { .. } => false,
        Stmt::Prefetch { .. } | Stmt::Multiply(_) => false,
    })
}

fn reads_apart(
    e: &Expr,
    stores: &[(BufferId, &Place)],
    seen: &mut HashMap<*const Expr, ()>,
) -> bool {
    let mut all = |of: &[&Arc<Expr>]| {
        of.iter().all(|e| seen.insert(Arc::as_ptr(e), ()).is_some() || reads_apart(e, stores, seen))
    };
    match e {
        Expr::Load(buffer, place) | Expr::Word(buffer, place) => {
            place.dynamic.is_none() && stores.iter().all(|s| s.0 != *buffer || s.1 == place)
        }
        Expr::Index(_) | Expr::Const(..) | Expr::Fold(..) => true,
        Expr::Unary(_, x) | Expr::Cast(_, x) => all(&[x]),
        Expr::Binary(_, x, y) => all(&[x, y]),
        Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => all(&[x, y, z]),
    }
}

/// Marks the buffers that statements store to.
pub fn mark_written(body: &[Stmt], written: &mut [bool]) {
    for stmt in body {
        match stmt {
            Stmt::For { body, .. } => mark_written(body, written),
            Stmt::Store { buffer, .. } => written[*buffer] = true,
            Stmt::If { then, other, .. } => {
                mark_written(then, written);
                mark_written(other, written);
            }
            Stmt::Multiply(m) => written[m.sums.0] = true,
            Stmt::Prefetch { .. } => {}
        }
    }
}
