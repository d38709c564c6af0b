//! Changes of statements: other indices, other buffers. Shared values stay shared.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::index::{Index, add, to_expr};
use super::ir::{Buffer, BufferId, Expr, Multiply, Param, Place, Side, Stmt, Var};
use crate::graph::op::Affine;

/// Calls a function with every affine index of statements.
pub fn each_affine(body: &[Stmt], visit: &mut dyn FnMut(&Affine)) {
    fn place(p: &Place, visit: &mut dyn FnMut(&Affine)) {
        visit(&p.affine);
        if let Some(dynamic) = &p.dynamic {
            expr(dynamic, visit);
        }
    }
    fn expr(e: &Expr, visit: &mut dyn FnMut(&Affine)) {
        match e {
            Expr::Load(_, p) | Expr::Word(_, p) => place(p, visit),
            Expr::Index(affine) => visit(affine),
            Expr::Const(..) | Expr::Fold(..) => {}
            Expr::Unary(_, x) | Expr::Cast(_, x) => expr(x, visit),
            Expr::Binary(_, x, y) => [x, y].into_iter().for_each(|e| expr(e, visit)),
            Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
                [x, y, z].into_iter().for_each(|e| expr(e, visit))
            }
        }
    }
    for stmt in body {
        match stmt {
            Stmt::For { body, .. } => each_affine(body, visit),
            Stmt::Store { place: p, value, .. } => {
                place(p, visit);
                expr(value, visit);
            }
            Stmt::If { condition, then, other } => {
                expr(condition, visit);
                each_affine(then, visit);
                each_affine(other, visit);
            }
            Stmt::Prefetch { place, .. } => visit(place),
            Stmt::Multiply(m) => {
                visit(&m.sums.1);
                m.sides.iter().for_each(|side| visit(&side.place));
            }
        }
    }
}

/// Calls a function with every load of a value.
pub fn each_load<'a>(e: &'a Expr, visit: &mut dyn FnMut(BufferId, &'a Place)) {
    match e {
        Expr::Load(buffer, place) | Expr::Word(buffer, place) => {
            visit(*buffer, place);
            place.dynamic.iter().for_each(|e| each_load(e, visit));
        }
        Expr::Index(_) | Expr::Const(..) | Expr::Fold(..) => {}
        Expr::Unary(_, x) | Expr::Cast(_, x) => each_load(x, visit),
        Expr::Binary(_, x, y) => [x, y].into_iter().for_each(|e| each_load(e, visit)),
        Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
            [x, y, z].into_iter().for_each(|e| each_load(e, visit));
        }
    }
}

/// A change of indices and of buffers; shared values stay shared.
struct Rewrite<'a> {
    index: &'a dyn Fn(&Affine) -> Index,
    /// Register buffers that become others, with the place of their one element.
    registers: &'a [(BufferId, BufferId, Affine)],
    /// New number of each buffer; without any, all keep theirs.
    numbers: &'a [BufferId],
    /// Buffers that were met.
    met: BTreeSet<BufferId>,
    memo: HashMap<*const Expr, Arc<Expr>>,
}

impl<'a> Rewrite<'a> {
    fn new(index: &'a dyn Fn(&Affine) -> Index) -> Rewrite<'a> {
        let (met, memo) = (BTreeSet::new(), HashMap::new());
        Rewrite { index, registers: &[], numbers: &[], met, memo }
    }

    fn buffer(&mut self, buffer: BufferId) -> BufferId {
        self.met.insert(buffer);
        self.numbers.get(buffer).copied().unwrap_or(buffer)
    }

    fn place(&mut self, buffer: BufferId, p: &Place) -> (BufferId, Place) {
        match self.registers.iter().find(|r| r.0 == buffer) {
            Some((_, to, at)) => (*to, Place::affine(at.clone())),
            None => {
                let dynamic = p.dynamic.as_ref().map(|d| self.shared(d));
                let more = Place { affine: Affine::default(), dynamic };
                (self.buffer(buffer), add(&(self.index)(&p.affine), &more))
            }
        }
    }

    fn shared(&mut self, e: &Arc<Expr>) -> Arc<Expr> {
        if let Some(known) = self.memo.get(&Arc::as_ptr(e)) {
            return known.clone();
        }
        let new = Arc::new(self.expr(e));
        self.memo.insert(Arc::as_ptr(e), new.clone());
        new
    }

    fn expr(&mut self, e: &Expr) -> Expr {
        match e {
            Expr::Load(buffer, p) => {
                let (buffer, place) = self.place(*buffer, p);
                Expr::Load(buffer, place)
            }
            Expr::Word(buffer, p) => {
                let (buffer, place) = self.place(*buffer, p);
                Expr::Word(buffer, place)
            }
            Expr::Index(affine) => to_expr(&(self.index)(affine)),
            Expr::Const(..) => e.clone(),
            Expr::Fold(f, buffer) => Expr::Fold(*f, self.buffer(*buffer)),
            Expr::Unary(f, x) => Expr::Unary(*f, self.shared(x)),
            Expr::Cast(dtype, x) => Expr::Cast(*dtype, self.shared(x)),
            Expr::Binary(f, x, y) => {
                let x = self.shared(x);
                Expr::Binary(*f, x, self.shared(y))
            }
            Expr::Select(x, y, z) => {
                let (x, y) = (self.shared(x), self.shared(y));
                Expr::Select(x, y, self.shared(z))
            }
            Expr::Fma(x, y, z) => {
                let (x, y) = (self.shared(x), self.shared(y));
                Expr::Fma(x, y, self.shared(z))
            }
            Expr::Dot(parts, x, y, z) => {
                let (x, y) = (self.shared(x), self.shared(y));
                Expr::Dot(*parts, x, y, self.shared(z))
            }
        }
    }

    fn block(&mut self, body: &[Stmt]) -> Vec<Stmt> {
        body.iter().map(|s| self.stmt(s)).collect()
    }

    fn multiply(&mut self, m: &Multiply) -> Multiply {
        let mut moved = |(buffer, place): (BufferId, &Affine)| {
            (self.buffer(buffer), (self.index)(place).affine)
        };
        let sums = moved((m.sums.0, &m.sums.1));
        let sides = m.sides.each_ref().map(|side| {
            let (buffer, place) = moved((side.buffer, &side.place));
            Side { buffer, place, steps: side.steps }
        });
        Multiply { sums, sides, lane: m.lane }
    }

    fn stmt(&mut self, stmt: &Stmt) -> Stmt {
        match stmt {
            Stmt::For { var, extent, kind, body } => {
                Stmt::For { var: *var, extent: *extent, kind: *kind, body: self.block(body) }
            }
            Stmt::Store { buffer, place, value } => {
                let (buffer, place) = self.place(*buffer, place);
                Stmt::Store { buffer, place, value: self.expr(value) }
            }
            Stmt::If { condition, then, other } => Stmt::If {
                condition: self.expr(condition),
                then: self.block(then),
                other: self.block(other),
            },
            Stmt::Prefetch { buffer, place } => {
                let place = (self.index)(place).affine;
                Stmt::Prefetch { buffer: self.buffer(*buffer), place }
            }
            Stmt::Multiply(m) => Stmt::Multiply(Box::new(self.multiply(m))),
        }
    }
}

/// Statements with every affine index changed, and one-element register buffers replaced by
/// places in others.
pub fn rewrite(
    body: &[Stmt],
    index: &dyn Fn(&Affine) -> Affine,
    registers: &[(BufferId, BufferId, Affine)],
) -> Vec<Stmt> {
    let index = |a: &Affine| Place::affine(index(a));
    Rewrite { registers, ..Rewrite::new(&index) }.block(body)
}

/// Statements with every affine index changed into one that may be computed.
pub fn computed(body: &[Stmt], index: &dyn Fn(&Affine) -> Index) -> Vec<Stmt> {
    Rewrite::new(index).block(body)
}

/// Statements with a one-element register buffer replaced by a place in another.
pub fn retarget(body: &[Stmt], from: BufferId, to: BufferId, at: &Affine) -> Vec<Stmt> {
    rewrite(body, &Affine::clone, &[(from, to, at.clone())])
}

/// Statements with a variable replaced by an index.
pub fn substitute(body: &[Stmt], var: Var, by: &Affine) -> Vec<Stmt> {
    rewrite(
        body,
        &|a| a.substitute(&|v| if v == var as usize { by.clone() } else { Affine::axis(v) }),
        &[],
    )
}

/// Whether statements have a loop over a variable.
pub fn runs(body: &[Stmt], var: Var) -> bool {
    body.iter().any(|stmt| match stmt {
        Stmt::For { var: v, body, .. } => *v == var || runs(body, var),
        Stmt::If { then, other, .. } => runs(then, var) || runs(other, var),
        Stmt::Store { .. } | Stmt::Prefetch { .. } | Stmt::Multiply(_) => false,
    })
}

/// A kernel's buffers and statements without the buffers that no statement names: memory would
/// be kept for them.
pub fn prune(buffers: Vec<Buffer>, body: Vec<Stmt>) -> (Vec<Buffer>, Vec<Stmt>) {
    let same = |a: &Affine| Place::affine(a.clone());
    let mut look = Rewrite::new(&same);
    look.block(&body);
    let mut met = look.met;
    // Loops ask for it without a load.
    met.extend(buffers.iter().position(|b| b.param == Param::Dims));
    if met.len() == buffers.len() {
        return (buffers, body);
    }
    let numbers: Vec<BufferId> = (0..buffers.len()).map(|b| met.range(..b).count()).collect();
    let body = Rewrite { numbers: &numbers, ..Rewrite::new(&same) }.block(&body);
    let kept = buffers.into_iter().enumerate().filter(|(b, _)| met.contains(b));
    (kept.map(|(_, buffer)| buffer).collect(), body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loops::text::{parse, print};

    #[test]
    fn buffers_without_use_go() {
        let text = r#"kernel "k" {
  b0 : f32[8] arg 0
  b1 : f32[8] arg 1
  b2 : f32[4] register
  b3 : f32[1] out
  vector i0 in 4 {
    b2[i0] = b1[i0]
  }
  b3[0] = fold_sum(b2)
}
"#;
        let kernel = parse(text).unwrap().remove(0);
        let (buffers, body) = prune(kernel.buffers.clone(), kernel.body.clone());
        let pruned = print(&crate::loops::ir::Loops { buffers, body, ..kernel });
        let without = text.replace("  b0 : f32[8] arg 0\n", "");
        let renamed = without.replace("b1", "b0").replace("b2", "b1").replace("b3", "b2");
        assert_eq!(pruned, renamed);
    }
}
