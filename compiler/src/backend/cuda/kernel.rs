//! A kernel in the making: its registers, memory and instructions. Values are registers or numbers,
//! one for each lane; short integers are in 32 bits, bools are conditions, short floats are f32.

use kiln_runtime::tensor::DType;

use super::isa::{self, Class, Cmp, Inst, Op, Operand, Reg, Round, Space, Ty};
use super::reuse::{self, Scope as Level};
use super::warp::Fragments;
use crate::backend::emit::{Emitted, Unsupported};
use crate::graph::op::BinaryFn;
use crate::loops::ir::{Loops, Scope};

/// A value.
#[derive(Clone, Debug)]
pub enum Val {
    /// One.
    One(Operand),
    /// One for each lane.
    Lanes(Vec<Operand>),
}

impl Val {
    pub(super) fn all(&self) -> &[Operand] {
        match self {
            Val::One(one) => std::slice::from_ref(one),
            Val::Lanes(lanes) => lanes,
        }
    }

    pub(super) fn like(&self, all: Vec<Operand>) -> Val {
        match (self, &all[..]) {
            (Val::One(_), [one]) => Val::One(*one),
            _ => Val::Lanes(all),
        }
    }

    pub(super) fn one(&self) -> Emitted<Operand> {
        match self {
            Val::One(one) => Ok(*one),
            Val::Lanes(_) => Err(Unsupported("a scalar operation in lanes".into())),
        }
    }
}

/// Where an element is.
pub struct Address {
    pub(super) space: Space,
    pub(super) at: isa::Address,
}

impl Address {
    /// So many bytes further.
    pub(super) fn plus(&self, bytes: i64) -> isa::Address {
        isa::Address { offset: self.at.offset + bytes, ..self.at }
    }

    /// What it is a multiple of, 16 at most.
    pub(super) fn align(&self) -> i64 {
        self.at.align.min(align(self.at.offset))
    }
}

/// What has begun and not ended.
pub(super) enum Open {
    Loop { label: u32, exit: u32, turn: Reg, end: Operand, carried: Vec<Val> },
    Parallel,
    Threads { exit: Option<u32>, carried: Vec<Val> },
    Groups { thread: Reg, threads: usize },
    Branch { other: u32, exit: u32 },
}

/// How a kernel is laid out over blocks and threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Whether each turn of the parallel loops has a block; else each has a thread.
    pub blocks: bool,
    /// Turns of the parallel loops.
    pub turns: usize,
    /// Threads of a block.
    pub threads: usize,
}

/// A kernel in the making.
pub struct Ptx {
    /// Its instructions.
    pub code: Vec<Inst>,
    /// Registers of each class.
    pub counts: [u32; 6],
    /// Bytes of shared memory.
    pub shared: usize,
    /// Where the threads of a block fold.
    pub(super) folds: Option<usize>,
    pub(super) layout: Layout,
    pub(super) lanes: usize,
    pub(super) bases: Vec<Option<(Space, Reg)>>,
    /// The number of the thread, in kernels whose blocks share something.
    pub(super) thread: Option<Reg>,
    pub(super) labels: u32,
    pub(super) open: Vec<Open>,
    /// What is around the next instruction, and by class the scope that each register is set in.
    pub(super) scopes: Vec<Level>,
    pub(super) depths: [Vec<usize>; 6],
    /// Rows and columns that are in registers of a warp.
    pub(super) fragments: Fragments,
}

/// The type that a dtype is computed in.
pub fn ty(dtype: DType) -> Ty {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::TF32 => Ty::F32,
        DType::F64 => Ty::F64,
        DType::I8 | DType::I16 | DType::I32 => Ty::S32,
        DType::U8 | DType::U16 | DType::U32 => Ty::U32,
        DType::I64 => Ty::S64,
        DType::U64 => Ty::U64,
        DType::Bool => Ty::Pred,
        DType::Small(_) => ty(dtype.stored()),
    }
}

/// The type that a dtype has in memory.
pub(super) fn stored(dtype: DType) -> Ty {
    match dtype {
        DType::F32 | DType::TF32 => Ty::F32,
        DType::F64 => Ty::F64,
        DType::F16 | DType::BF16 => Ty::B16,
        DType::I8 => Ty::S8,
        DType::I16 => Ty::S16,
        DType::I32 => Ty::S32,
        DType::I64 => Ty::S64,
        DType::U8 | DType::Bool => Ty::U8,
        DType::U16 => Ty::U16,
        DType::U32 => Ty::U32,
        DType::U64 => Ty::U64,
        DType::Small(_) => stored(dtype.stored()),
    }
}

/// The greatest power of two, of 16 at most, that divides a number.
pub(super) fn align(number: i64) -> i64 {
    1 << number.trailing_zeros().min(4)
}

impl Ptx {
    /// A kernel without instructions but those that find its buffers.
    pub fn new(loops: &Loops, layout: Layout, lanes: usize) -> Ptx {
        let mut ptx = Ptx {
            code: Vec::new(),
            counts: [0; 6],
            shared: 0,
            folds: None,
            layout,
            lanes,
            bases: Vec::new(),
            thread: None,
            labels: 0,
            open: Vec::new(),
            scopes: vec![Level::default()],
            depths: Default::default(),
            fragments: Fragments::new(),
        };
        let mut number = 0;
        for buffer in &loops.buffers {
            let base = match buffer.scope {
                Scope::Global => {
                    let (given, base) = (ptx.reg(Class::D), ptx.reg(Class::D));
                    ptx.code.push(Inst::Param(given, number));
                    ptx.op_to(Op::ToGlobal, Ty::U64, base, &[Operand::Reg(given)]);
                    number += 1;
                    Some((Space::Global, base))
                }
                Scope::Shared => {
                    let start = ptx.room(buffer.len * buffer.dtype.bytes());
                    Some((Space::Shared, ptx.shared_at(start)))
                }
                Scope::Register => None,
            };
            ptx.bases.push(base);
        }
        if layout.blocks {
            ptx.thread = Some(ptx.op(Op::Mov, Ty::U32, &[Operand::Thread]));
        }
        ptx
    }

    /// So many more bytes of shared memory.
    pub(super) fn room(&mut self, bytes: usize) -> usize {
        let start = self.shared.next_multiple_of(16);
        self.shared = start + bytes;
        start
    }

    /// The address of a byte of shared memory.
    pub(super) fn shared_at(&mut self, start: usize) -> Reg {
        let whole = self.op(Op::Mov, Ty::U32, &[Operand::Shared]);
        self.op(Op::Add, Ty::U32, &[Operand::Reg(whole), Operand::Int(start as i64)])
    }

    /// A new register.
    pub fn reg(&mut self, class: Class) -> Reg {
        let here = self.scopes.len() - 1;
        self.depths[class as usize].push(here);
        let count = &mut self.counts[class as usize];
        *count += 1;
        Reg { class, number: *count - 1 }
    }

    pub(super) fn label(&mut self) -> u32 {
        self.labels += 1;
        self.labels - 1
    }

    /// An operation into a register.
    pub(super) fn op_to(&mut self, op: Op, ty: Ty, to: Reg, from: &[Operand]) {
        self.code.push(Inst::Op(op, ty, to, from.to_vec()));
    }

    /// An operation into a new register.
    pub fn op(&mut self, op: Op, ty: Ty, from: &[Operand]) -> Reg {
        let wide = matches!(op, Op::MulWide | Op::MadWide);
        let class = if wide { Class::D } else { ty.class() };
        if let Some(key) = reuse::operation(op, ty, from) {
            return self.once(key, class, from, |to| Inst::Op(op, ty, to, from.to_vec()));
        }
        let to = self.reg(class);
        self.op_to(op, ty, to, from);
        to
    }

    /// The same as an operand.
    pub fn calc(&mut self, op: Op, ty: Ty, from: &[Operand]) -> Operand {
        Operand::Reg(self.op(op, ty, from))
    }

    /// A comparison.
    pub fn set(&mut self, cmp: Cmp, ty: Ty, x: Operand, y: Operand) -> Reg {
        let to = self.reg(Class::P);
        self.code.push(Inst::Set(cmp, ty, to, [x, y]));
        to
    }

    /// c ? x : y
    pub fn choose(&mut self, ty: Ty, c: Reg, x: Operand, y: Operand) -> Operand {
        if ty == Ty::Pred {
            let both = self.calc(Op::And, ty, &[Operand::Reg(c), x]);
            let not = self.calc(Op::Not, ty, &[Operand::Reg(c)]);
            let other = self.calc(Op::And, ty, &[not, y]);
            return self.calc(Op::Or, ty, &[both, other]);
        }
        let to = self.reg(ty.class());
        self.code.push(Inst::Select(ty, to, [x, y], c));
        Operand::Reg(to)
    }

    /// From one type to another.
    pub fn convert(&mut self, round: Round, to: Ty, from: Ty, x: Operand) -> Operand {
        let x = self.held(from, x);
        let inst = |reg| Inst::Convert(round, [to, from], reg, x);
        if let Some(key) = reuse::conversion(to, from, x) {
            return Operand::Reg(self.once(key, to.class(), &[Operand::Reg(x)], inst));
        }
        let reg = self.reg(to.class());
        self.code.push(inst(reg));
        Operand::Reg(reg)
    }

    /// The bits of a register as those of another class of the same width.
    pub fn same_bits(&mut self, ty: Ty, class: Class, x: Operand) -> Operand {
        let x = self.held(ty, x);
        let to = self.reg(class);
        let bits = if ty.bytes() == 8 { Ty::B64 } else { Ty::B32 };
        self.op_to(Op::Mov, bits, to, &[Operand::Reg(x)]);
        Operand::Reg(to)
    }

    /// A value in a register.
    pub fn held(&mut self, ty: Ty, x: Operand) -> Reg {
        match x {
            Operand::Reg(reg) => reg,
            other => self.op(Op::Mov, ty, &[other]),
        }
    }

    pub(super) fn branch(&mut self, label: u32, when: Option<(Reg, bool)>) {
        self.code.push(Inst::Branch(label, when));
    }

    /// Registers for values that change, with these values in them.
    pub(super) fn carry(&mut self, values: &[Val]) -> Vec<Val> {
        let mut carried = Vec::new();
        for value in values {
            let all = value.all().iter().map(|from| self.copy(*from)).collect();
            carried.push(value.like(all));
        }
        carried
    }

    /// Says that values change in the innermost scope.
    pub(super) fn change_here(&mut self, values: &[Val]) {
        for x in values.iter().flat_map(Val::all) {
            if let Operand::Reg(reg) = *x {
                self.changes_here(reg);
            }
        }
    }

    /// A value in a register of its own.
    pub(super) fn copy(&mut self, from: Operand) -> Operand {
        let ty = operand_ty(from);
        self.calc(Op::Mov, ty, &[from])
    }

    /// Gives registers that change their next values, all at once.
    pub(super) fn assign(&mut self, carried: &[Val], next: &[Val]) {
        let to: Vec<Operand> = carried.iter().flat_map(|v| v.all().to_vec()).collect();
        let mut from: Vec<Operand> = next.iter().flat_map(|v| v.all().to_vec()).collect();
        for i in 0..from.len() {
            // What another one is given before must not be overwritten.
            if to[..i].contains(&from[i]) {
                from[i] = self.copy(from[i]);
            }
        }
        for (to, from) in to.into_iter().zip(from) {
            if let Operand::Reg(reg) = to
                && to != from
            {
                self.op_to(Op::Mov, operand_ty(to), reg, &[from]);
            }
        }
    }

    /// Starts a loop from one number to another; `perhaps` there is no turn.
    pub(super) fn begin(
        &mut self,
        from: Operand,
        end: Operand,
        carried: &[Val],
        perhaps: bool,
    ) -> (Reg, Vec<Val>) {
        let carried = self.carry(carried);
        let turn = self.op(Op::Mov, Ty::U32, &[from]);
        let (label, exit) = (self.label(), self.label());
        self.loop_scope();
        self.changes_here(turn);
        self.change_here(&carried);
        if perhaps {
            let none = self.set(Cmp::Ge, Ty::U32, Operand::Reg(turn), end);
            self.branch(exit, Some((none, true)));
        }
        self.code.push(Inst::Label(label));
        self.open.push(Open::Loop { label, exit, turn, end, carried: carried.clone() });
        (turn, carried)
    }

    /// A function of one value, lane by lane.
    pub(super) fn lift(
        &mut self,
        x: &Val,
        mut f: impl FnMut(&mut Self, Operand) -> Emitted<Operand>,
    ) -> Emitted<Val> {
        let all: Vec<Operand> = x.all().iter().map(|x| f(self, *x)).collect::<Emitted<_>>()?;
        Ok(x.like(all))
    }

    /// A function of two values, lane by lane.
    pub(super) fn lift2(
        &mut self,
        x: &Val,
        y: &Val,
        mut f: impl FnMut(&mut Self, Operand, Operand) -> Emitted<Operand>,
    ) -> Emitted<Val> {
        let pairs = x.all().iter().zip(y.all());
        let all: Vec<Operand> = pairs.map(|(x, y)| f(self, *x, *y)).collect::<Emitted<_>>()?;
        Ok(x.like(all))
    }

    /// What is read as a value of a dtype.
    pub(super) fn loaded(&mut self, dtype: DType, x: Reg) -> Operand {
        let x = Operand::Reg(x);
        match dtype {
            DType::Bool => Operand::Reg(self.set(Cmp::Ne, Ty::U32, x, Operand::Int(0))),
            DType::F16 => self.convert(Round::Exact, Ty::F32, Ty::F16, x),
            DType::BF16 => {
                let high = self.calc(Op::Shl, Ty::B32, &[x, Operand::Int(16)]);
                self.same_bits(Ty::B32, Class::F, high)
            }
            _ => x,
        }
    }

    /// A value of a dtype as it is written.
    pub(super) fn storable(&mut self, dtype: DType, x: Operand) -> Reg {
        match dtype {
            DType::Bool => {
                let c = self.held(Ty::Pred, x);
                let bits = self.choose(Ty::U32, c, Operand::Int(1), Operand::Int(0));
                self.held(Ty::U32, bits)
            }
            DType::F16 | DType::BF16 => {
                let to = if dtype == DType::F16 { Ty::F16 } else { Ty::BF16 };
                let short = self.convert(Round::Nearest, to, Ty::F32, x);
                self.held(Ty::B16, short)
            }
            _ => self.held(ty(dtype), x),
        }
    }

    /// What a short float is read into: bf16 are the upper halves of f32.
    pub(super) fn memory_ty(dtype: DType) -> Ty {
        match dtype {
            DType::BF16 => Ty::U16,
            other => stored(other),
        }
    }

    /// Elements beside each other: as many at once as the address allows.
    pub(super) fn neighbours(&self, at: &Address, size: i64, count: usize) -> usize {
        [4, 2]
            .into_iter()
            .find(|&n| count.is_multiple_of(n) && at.align() >= n as i64 * size)
            .unwrap_or(1)
    }

    /// The values of all threads of a warp, folded pair by pair.
    pub(super) fn fold_warp(
        &mut self,
        f: BinaryFn,
        dtype: DType,
        x: Operand,
        width: usize,
    ) -> Emitted<Operand> {
        let mut sum = x;
        let mut apart = width / 2;
        while apart > 0 {
            let bits = self.held(ty(dtype), sum);
            let other = self.reg(ty(dtype).class());
            self.code.push(Inst::Shuffle(other, bits, apart as u32));
            sum = self.arithmetic(f, dtype, sum, Operand::Reg(other))?;
            apart /= 2;
        }
        Ok(sum)
    }
}

/// The type that moves an operand.
fn operand_ty(x: Operand) -> Ty {
    match x {
        Operand::Reg(reg) => match reg.class {
            Class::P => Ty::Pred,
            Class::H => Ty::B16,
            Class::R => Ty::U32,
            Class::D => Ty::U64,
            Class::F => Ty::F32,
            Class::G => Ty::F64,
        },
        Operand::F32(_) => Ty::F32,
        Operand::F64(_) => Ty::F64,
        Operand::Long(_) => Ty::U64,
        Operand::Int(_) | Operand::Thread | Operand::Block | Operand::Shared => Ty::U32,
    }
}
