//! Whole numbers are computed once: what was computed before is used again, and what a loop does
//! not change is computed before it. Most of a kernel's integers are places in memory.

use std::collections::HashMap;

use super::isa::{Class, Inst, Op, Operand, Reg, Ty};
use super::kernel::Ptx;

/// What a whole number is computed by and of.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key(Option<Op>, [Ty; 2], Vec<(u8, i64)>);

/// Statements that may not run, or not once: those of a loop, or of a branch.
#[derive(Default)]
pub(super) struct Scope {
    /// What has been computed in it.
    known: HashMap<Key, Reg>,
    /// Of a loop: the instructions before it, and how many of these compute what it asks for.
    before: Option<Vec<Inst>>,
    moved: usize,
}

/// Numbers that are computed before a loop at most: each takes a register as long as the loop runs.
const MOVED: usize = 32;

/// An operand that is a whole number.
fn whole(x: &Operand) -> Option<(u8, i64)> {
    match x {
        Operand::Reg(Reg { class: class @ (Class::R | Class::D), number }) => {
            Some((*class as u8, i64::from(*number)))
        }
        Operand::Int(v) | Operand::Long(v) => Some((6, *v)),
        Operand::Thread => Some((7, 0)),
        Operand::Block => Some((8, 0)),
        Operand::Shared => Some((9, 0)),
        Operand::Reg(_) | Operand::F32(_) | Operand::F64(_) => None,
    }
}

/// The key of an operation that always gives the same for the same operands.
pub(super) fn operation(op: Op, ty: Ty, from: &[Operand]) -> Option<Key> {
    let pure = match op {
        Op::Mov => matches!(from, [Operand::Thread | Operand::Block | Operand::Shared]),
        // By zero it is not defined.
        Op::Div | Op::Rem => matches!(from[1], Operand::Int(v) | Operand::Long(v) if v > 0),
        Op::Neg | Op::Abs | Op::Sqrt | Op::Recip | Op::ToGlobal => false,
        _ => matches!(ty.class(), Class::R | Class::D),
    };
    let from: Option<Vec<(u8, i64)>> = from.iter().map(whole).collect();
    from.filter(|_| pure).map(|from| Key(Some(op), [ty; 2], from))
}

/// The key of a conversion between whole numbers.
pub(super) fn conversion(to: Ty, from: Ty, x: Reg) -> Option<Key> {
    let int = |t: Ty| matches!(t, Ty::S32 | Ty::U32 | Ty::S64 | Ty::U64);
    let x = whole(&Operand::Reg(x)).filter(|_| int(to) && int(from))?;
    Some(Key(None, [to, from], vec![x]))
}

/// Instructions of loops that are not written out further: the values of all copies would be in
/// registers at once.
const LONG: usize = 24;

impl Ptx {
    /// The number of the innermost scope.
    fn here(&self) -> usize {
        self.scopes.len() - 1
    }

    /// The scope that a register is defined in.
    pub(super) fn depth(&self, x: &Operand) -> usize {
        match x {
            Operand::Reg(reg) => self.depths[reg.class as usize][reg.number as usize],
            _ => 0,
        }
    }

    /// Says that a register changes in the innermost scope.
    pub(super) fn changes_here(&mut self, reg: Reg) {
        self.depths[reg.class as usize][reg.number as usize] = self.here();
    }

    /// A whole number: computed here, before a loop, or long ago.
    pub(super) fn once(
        &mut self,
        key: Key,
        class: Class,
        from: &[Operand],
        inst: impl FnOnce(Reg) -> Inst,
    ) -> Reg {
        if let Some(known) = self.scopes.iter().rev().find_map(|s| s.known.get(&key)) {
            return *known;
        }
        let to = self.reg(class);
        let needs = from.iter().map(|x| self.depth(x)).max().unwrap_or(0);
        let room = |n: &usize| self.scopes[*n].before.is_some() && self.scopes[*n].moved < MOVED;
        let outside = (needs + 1..self.scopes.len()).find(room);
        let scope = match outside {
            Some(inner) => {
                let of = &mut self.scopes[inner];
                of.before.as_mut().expect("a loop").push(inst(to));
                of.moved += 1;
                inner - 1
            }
            None => {
                self.code.push(inst(to));
                self.here()
            }
        };
        self.depths[to.class as usize][to.number as usize] = scope;
        self.scopes[scope].known.insert(key, to);
        to
    }

    /// Begins a loop.
    pub(super) fn loop_scope(&mut self) {
        let before = Some(std::mem::take(&mut self.code));
        self.fragments.clear();
        self.scopes.push(Scope { before, ..Scope::default() });
    }

    /// Begins what may not run.
    pub(super) fn branch_scope(&mut self) {
        self.fragments.clear();
        self.scopes.push(Scope::default());
    }

    /// Ends the innermost scope.
    pub(super) fn end_scope(&mut self) {
        let ended = self.scopes.pop().unwrap_or_default();
        self.fragments.clear();
        if let Some(before) = ended.before {
            let mut inside = std::mem::replace(&mut self.code, before);
            let label = inside.iter().position(|inst| matches!(inst, Inst::Label(_)));
            if let Some(label) = label.filter(|_| inside.len() > LONG) {
                inside.insert(label + 1, Inst::NoUnroll);
            }
            self.code.extend(inside);
        }
    }
}
