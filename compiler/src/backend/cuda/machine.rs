//! The steps of the walk over loops as instructions of PTX.

use kiln_runtime::tensor::DType;

use super::isa::{self, Class, Cmp, Inst, Op, Operand, Reg, Round, Space, Ty};
use super::kernel::{Address, Open, Ptx, Val, align, stored, ty};
use crate::backend::emit::{Access, Bits, Dynamic, Emitted, Machine, Unsupported};
use crate::backend::{dot, rounded};
use crate::graph::op::{BinaryFn, ReduceFn, UnaryFn};
use crate::loops::ir::{BufferId, Count, Number, Parts};

/// Threads of a warp.
const WARP: usize = 32;

impl Machine for Ptx {
    type Value = Val;
    type Int = Reg;
    type Address = Address;

    fn loop_begin(&mut self, extent: usize, carried: &[Val]) -> (Reg, Vec<Val>) {
        self.begin(Operand::Int(0), Operand::Int(extent as i64), carried, false)
    }

    fn count(&mut self, dims: BufferId, count: Count, extent: usize) -> Emitted<Val> {
        let (space, base) =
            self.bases[dims].ok_or_else(|| Unsupported("dims in registers".into()))?;
        let length = self.reg(Class::D);
        let at = isa::Address { base, offset: i64::from(count.dim) * 8, align: 8 };
        self.code.push(Inst::Load(space, Ty::S64, vec![length], at));
        let steps = [
            (Op::Add, Ty::S64, count.add),
            (Op::Max, Ty::S64, 0),
            (Op::Div, Ty::U64, count.width),
            (Op::Mul, Ty::S64, count.times),
            (Op::Min, Ty::S64, extent as i64),
        ];
        let number = steps
            .into_iter()
            .fold(Operand::Reg(length), |x, (op, ty, y)| self.calc(op, ty, &[x, Operand::Int(y)]));
        Ok(Val::One(number))
    }

    fn range_begin(
        &mut self,
        from: Option<&Val>,
        to: &Val,
        carried: &[Val],
    ) -> Emitted<(Reg, Vec<Val>)> {
        let mut short = |x: Operand| self.convert(Round::Exact, Ty::U32, Ty::U64, x);
        let from = from.map(Val::one).transpose()?.map(&mut short).unwrap_or(Operand::Int(0));
        let to = short(to.one()?);
        Ok(self.begin(from, to, carried, true))
    }

    fn loop_end(&mut self, next: &[Val]) -> Vec<Val> {
        let Some(Open::Loop { label, exit, turn, end, carried }) = self.open.pop() else {
            unreachable!("loops end in the order in which they begin")
        };
        self.assign(&carried, next);
        self.op_to(Op::Add, Ty::U32, turn, &[Operand::Reg(turn), Operand::Int(1)]);
        let more = self.set(Cmp::Lt, Ty::U32, Operand::Reg(turn), end);
        self.branch(label, Some((more, true)));
        self.code.push(Inst::Label(exit));
        self.end_scope();
        carried
    }

    fn parallel_begin(&mut self) -> Reg {
        self.open.push(Open::Parallel);
        let block = self.op(Op::Mov, Ty::U32, &[Operand::Block]);
        if self.layout.blocks {
            return block;
        }
        let thread = self.op(Op::Mov, Ty::U32, &[Operand::Thread]);
        let width = Operand::Int(self.layout.threads as i64);
        let turn = self.op(Op::Mad, Ty::U32, &[Operand::Reg(block), width, Operand::Reg(thread)]);
        if !self.layout.turns.is_multiple_of(self.layout.threads) {
            let turns = Operand::Int(self.layout.turns as i64);
            let beyond = self.set(Cmp::Ge, Ty::U32, Operand::Reg(turn), turns);
            let inside = self.label();
            self.branch(inside, Some((beyond, false)));
            self.code.extend([Inst::Return, Inst::Label(inside)]);
        }
        turn
    }

    fn parallel_end(&mut self) {
        let ended = self.open.pop();
        debug_assert!(matches!(ended, Some(Open::Parallel)));
    }

    fn div_rem(&mut self, x: &Reg, divisor: usize, _limit: usize) -> Emitted<(Reg, Reg)> {
        let x = Operand::Reg(*x);
        if divisor.is_power_of_two() {
            let (bits, mask) = (i64::from(divisor.trailing_zeros()), divisor as i64 - 1);
            let quotient = self.op(Op::Shr, Ty::U32, &[x, Operand::Int(bits)]);
            return Ok((quotient, self.op(Op::And, Ty::B32, &[x, Operand::Int(mask)])));
        }
        let divisor = Operand::Int(divisor as i64);
        let quotient = self.op(Op::Div, Ty::U32, &[x, divisor]);
        let product = self.calc(Op::Mul, Ty::U32, &[Operand::Reg(quotient), divisor]);
        Ok((quotient, self.op(Op::Sub, Ty::U32, &[x, product])))
    }

    fn merged(&mut self, before: &[Val]) -> Option<Vec<Val>> {
        Some(self.carry(before))
    }

    fn merge(&mut self, merged: &[Val], next: &[Val]) {
        self.assign(merged, next);
    }

    fn branch_begin(&mut self, condition: &Val) -> Emitted<()> {
        let condition = condition.one()?;
        let condition = self.held(Ty::Pred, condition);
        let (other, exit) = (self.label(), self.label());
        self.branch(other, Some((condition, false)));
        self.open.push(Open::Branch { other, exit });
        self.branch_scope();
        Ok(())
    }

    fn branch_else(&mut self) {
        let Some(Open::Branch { other, exit }) = self.open.last() else {
            unreachable!("a branch is open")
        };
        let (other, exit) = (*other, *exit);
        self.branch(exit, None);
        self.code.push(Inst::Label(other));
        self.end_scope();
        self.branch_scope();
    }

    fn branch_end(&mut self) {
        let Some(Open::Branch { exit, .. }) = self.open.pop() else {
            unreachable!("a branch is open")
        };
        self.code.push(Inst::Label(exit));
        self.end_scope();
    }

    fn address(
        &mut self,
        buffer: BufferId,
        terms: &[(Reg, i64)],
        offset: i64,
        dynamic: Option<Dynamic<Val>>,
    ) -> Emitted<Address> {
        let place = self.bases[buffer];
        let (space, mut base) = place.ok_or_else(|| Unsupported("a register place".into()))?;
        let mut terms: Vec<(Operand, i64, i64)> =
            terms.iter().map(|t| (Operand::Reg(t.0), t.1, align(t.1))).collect();
        if let Some(Dynamic { value, bytes, multiple }) = dynamic {
            let short = if space == Space::Global { Ty::S64 } else { Ty::S32 };
            let mut index = value.one()?;
            if space == Space::Shared {
                index = self.convert(Round::Exact, short, Ty::S64, index);
            }
            let index = Operand::Reg(self.held(short, index));
            terms.push((index, bytes, align(bytes.saturating_mul(multiple))));
        }
        // What changes least comes first: it is the same for more places.
        terms.sort_by_key(|t| self.depth(&t.0));
        let mut alignment = 16;
        for (index, bytes, multiple) in terms {
            alignment = alignment.min(multiple);
            i32::try_from(bytes).map_err(|_| Unsupported("a step of 2^31 bytes".into()))?;
            let long = matches!(index, Operand::Reg(Reg { class: Class::D, .. }));
            let (op, ty) = match space {
                Space::Global if long => (Op::Mad, Ty::S64),
                Space::Global => (Op::MadWide, Ty::S32),
                Space::Shared => (Op::Mad, Ty::S32),
            };
            base = self.op(op, ty, &[index, Operand::Int(bytes), Operand::Reg(base)]);
        }
        let mut at = isa::Address { base, offset, align: alignment };
        if i32::try_from(offset).is_err() {
            let base = self.op(Op::Add, Ty::S64, &[Operand::Reg(base), Operand::Int(offset)]);
            at = isa::Address { base, offset: 0, align: alignment.min(align(offset)) };
        }
        Ok(Address { space, at })
    }

    fn copy(&mut self, dtype: DType, to: &Address, from: &Address, count: usize) -> Emitted<bool> {
        let all = count as i64 * dtype.bytes() as i64;
        let most = to.align().min(from.align()).min(all);
        if (to.space, from.space) != (Space::Shared, Space::Global) || most < 4 {
            return Ok(false);
        }
        for start in (0..all).step_by(most as usize) {
            self.code.push(Inst::Copy(to.plus(start), from.plus(start), most));
        }
        Ok(true)
    }

    fn load(&mut self, dtype: DType, at: &Address, access: Access) -> Emitted<Val> {
        let memory = Self::memory_ty(dtype);
        let (count, step) = match access {
            Access::One | Access::Splat => (1, 1),
            Access::Lanes(step) => (self.lanes, step),
        };
        let many = if step == 1 { self.neighbours(at, memory.bytes(), count) } else { 1 };
        let mut all = Vec::new();
        for k in 0..count / many {
            let regs: Vec<Reg> = (0..many).map(|_| self.reg(memory.class())).collect();
            let place = at.plus((k * many) as i64 * step * memory.bytes());
            self.code.push(Inst::Load(at.space, memory, regs.clone(), place));
            all.extend(regs.into_iter().map(|reg| self.loaded(dtype, reg)));
        }
        Ok(match access {
            Access::One => Val::One(all[0]),
            Access::Splat => Val::Lanes(vec![all[0]; self.lanes]),
            Access::Lanes(_) => Val::Lanes(all),
        })
    }

    fn store(&mut self, dtype: DType, at: &Address, value: &Val) -> Emitted<()> {
        let memory = stored(dtype);
        let all: Vec<Reg> = value.all().iter().map(|x| self.storable(dtype, *x)).collect();
        let many = self.neighbours(at, memory.bytes(), all.len());
        for (k, regs) in all.chunks(many).enumerate() {
            let place = at.plus((k * many) as i64 * memory.bytes());
            self.code.push(Inst::Store(at.space, memory, place, regs.to_vec()));
        }
        Ok(())
    }

    fn number(&mut self, dtype: DType, number: Number, wide: bool) -> Emitted<Val> {
        let one = match (ty(dtype), number) {
            (Ty::F32, Number::Float(v)) => Operand::F32(v as f32),
            (_, Number::Float(v)) => Operand::F64(v),
            (Ty::Pred, Number::Int(v)) => {
                let bit = self.calc(Op::Mov, Ty::U32, &[Operand::Int((v != 0).into())]);
                Operand::Reg(self.set(Cmp::Ne, Ty::U32, bit, Operand::Int(0)))
            }
            (Ty::S64 | Ty::U64, Number::Int(v)) => Operand::Long(v as i64),
            (_, Number::Int(v)) => Operand::Int(v as i64),
        };
        Ok(if wide { Val::Lanes(vec![one; self.lanes]) } else { Val::One(one) })
    }

    fn index(&mut self, terms: &[(Reg, i64)], offset: i64) -> Emitted<Val> {
        let mut sum = Operand::Int(offset);
        for &(int, coefficient) in terms {
            i32::try_from(coefficient).map_err(|_| Unsupported("a step of 2^31".into()))?;
            let from = [Operand::Reg(int), Operand::Int(coefficient), sum];
            sum = self.calc(Op::MadWide, Ty::S32, &from);
        }
        Ok(Val::One(Operand::Reg(self.held(Ty::S64, sum))))
    }

    fn unary(&mut self, f: UnaryFn, dtype: DType, x: &Val) -> Emitted<Val> {
        self.lift(x, |this, x| this.function(f, dtype, x))
    }

    fn binary(&mut self, f: BinaryFn, dtype: DType, x: &Val, y: &Val) -> Emitted<Val> {
        self.lift2(x, y, |this, x, y| this.arithmetic(f, dtype, x, y))
    }

    fn select(&mut self, dtype: DType, c: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let lanes = c.all().iter().zip(x.all()).zip(y.all());
        let all = lanes.map(|((c, x), y)| {
            let c = self.held(Ty::Pred, *c);
            self.choose(ty(dtype), c, *x, *y)
        });
        let all = all.collect();
        Ok(x.like(all))
    }

    fn cast(&mut self, from: DType, to: DType, x: &Val) -> Emitted<Val> {
        self.lift(x, |this, x| Ok(this.cast_one(from, to, x)))
    }

    fn fma(&mut self, dtype: DType, x: &Val, y: &Val, z: &Val) -> Emitted<Val> {
        let lanes = x.all().iter().zip(y.all()).zip(z.all());
        let all = lanes.map(|((x, y), z)| {
            let sum = self.calc(Op::Mad, ty(dtype), &[*x, *y, *z]);
            self.wrapped(dtype, sum)
        });
        let all = all.collect();
        Ok(x.like(all))
    }

    fn dot(&mut self, parts: Parts, [x, y, z]: [&Val; 3], wide: bool) -> Emitted<Val> {
        match parts {
            Parts::Quads => return dot::of_bytes(self, [x, y, z], wide),
            Parts::Halves => return rounded::dot(self, [x, y, z], wide),
            Parts::Pairs => {}
        }
        let half = |this: &mut Self, x: Operand, left: i64| {
            let x = match left {
                0 => x,
                left => this.calc(Op::Shl, Ty::B32, &[x, Operand::Int(left)]),
            };
            this.calc(Op::Shr, Ty::S32, &[x, Operand::Int(16)])
        };
        let mut sum = z.clone();
        for left in [16, 0] {
            let product = self.lift2(x, y, |this, x, y| {
                let (x, y) = (half(this, x, left), half(this, y, left));
                Ok(this.calc(Op::Mul, Ty::S32, &[x, y]))
            })?;
            let add = |this: &mut Self, x, y| Ok(this.calc(Op::Add, Ty::S32, &[x, y]));
            sum = self.lift2(&product, &sum, add)?;
        }
        Ok(sum)
    }

    fn bits(&mut self, op: Bits, x: &Val, y: &Val) -> Emitted<Val> {
        let (op, ty) = match op {
            Bits::Add => (Op::Add, Ty::U32),
            Bits::Sub => (Op::Sub, Ty::U32),
            Bits::And => (Op::And, Ty::B32),
            Bits::Or => (Op::Or, Ty::B32),
            Bits::Xor => (Op::Xor, Ty::B32),
        };
        self.lift2(x, y, |this, x, y| {
            let [x, y] = [x, y].map(|v| this.bits_of(v));
            let result = this.calc(op, ty, &[x, y]);
            Ok(this.same_bits(Ty::B32, Class::F, result))
        })
    }

    fn shift(&mut self, x: &Val, left: i32) -> Emitted<Val> {
        let (op, ty) = if left < 0 { (Op::Shr, Ty::U32) } else { (Op::Shl, Ty::B32) };
        self.lift(x, |this, x| {
            let x = this.bits_of(x);
            let result = this.calc(op, ty, &[x, Operand::Int(left.abs().into())]);
            Ok(this.same_bits(Ty::B32, Class::F, result))
        })
    }

    fn int_to_float(&mut self, x: &Val) -> Emitted<Val> {
        self.lift(x, |this, x| {
            let x = this.bits_of(x);
            Ok(this.convert(Round::Nearest, Ty::F32, Ty::S32, x))
        })
    }

    fn splat(&mut self, _dtype: DType, x: &Val) -> Emitted<Val> {
        Ok(match x {
            Val::One(one) => Val::Lanes(vec![*one; self.lanes]),
            Val::Lanes(_) => x.clone(),
        })
    }

    fn fold(&mut self, f: ReduceFn, x: &[Val]) -> Emitted<Val> {
        let mut all: Vec<Operand> = x.iter().flat_map(|v| v.all().to_vec()).collect();
        while all.len() > 1 {
            let half = all.len() / 2;
            let pairs: Vec<(Operand, Operand)> =
                (0..half).map(|i| (all[i], all[i + half])).collect();
            let next = pairs
                .into_iter()
                .map(|(x, y)| self.arithmetic(f.binary(DType::F32), DType::F32, x, y));
            all = next.collect::<Emitted<_>>()?;
        }
        Ok(Val::One(all[0]))
    }

    fn threads_begin(&mut self, extent: usize, carried: &[Val]) -> Emitted<(Reg, Vec<Val>)> {
        if extent > self.layout.threads {
            return Err(Unsupported(format!("a block of {extent} threads")));
        }
        let thread = self.thread.ok_or_else(|| Unsupported("threads without blocks".into()))?;
        if extent == self.layout.threads {
            self.open.push(Open::Threads { exit: None, carried: Vec::new() });
            return Ok((thread, carried.to_vec()));
        }
        let carried = self.carry(carried);
        let exit = self.label();
        let beyond = self.set(Cmp::Ge, Ty::U32, Operand::Reg(thread), Operand::Int(extent as i64));
        self.branch(exit, Some((beyond, true)));
        self.branch_scope();
        self.change_here(&carried);
        self.open.push(Open::Threads { exit: Some(exit), carried: carried.clone() });
        Ok((thread, carried))
    }

    fn threads_end(&mut self, next: &[Val]) -> Vec<Val> {
        let Some(Open::Threads { exit, carried }) = self.open.pop() else {
            unreachable!("loops end in the order in which they begin")
        };
        let Some(exit) = exit else { return next.to_vec() };
        self.assign(&carried, next);
        self.code.push(Inst::Label(exit));
        self.end_scope();
        carried
    }

    fn groups_begin(&mut self, count: usize) -> Emitted<Reg> {
        let (threads, width) = (self.layout.threads, self.layout.threads / count);
        let thread = self.thread.ok_or_else(|| Unsupported("threads without blocks".into()))?;
        if width * count != threads || !threads.is_multiple_of(WARP) || !WARP.is_multiple_of(width)
        {
            return Err(Unsupported(format!("{count} groups of {threads} threads")));
        }
        let (group, own) = self.div_rem(&thread, width, threads)?;
        self.open.push(Open::Groups { thread, threads });
        (self.thread, self.layout.threads) = (Some(own), width);
        Ok(group)
    }

    fn groups_end(&mut self) {
        let Some(Open::Groups { thread, threads }) = self.open.pop() else {
            unreachable!("groups end in the order in which they begin")
        };
        (self.thread, self.layout.threads) = (Some(thread), threads);
    }

    fn multiply(
        &mut self,
        sides: &[(DType, Address, [i64; 2]); 2],
        sums: &[Val],
    ) -> Emitted<Vec<Val>> {
        self.multiply_by_warp(sides, sums)
    }

    fn barrier(&mut self) -> Emitted<()> {
        self.fragments.clear();
        self.code.push(Inst::Barrier);
        Ok(())
    }

    fn fold_threads(
        &mut self,
        f: ReduceFn,
        dtype: DType,
        value: &Val,
        extent: usize,
    ) -> Emitted<Val> {
        let fits = matches!(ty(dtype), Ty::F32 | Ty::S32 | Ty::U32);
        let thread = self.thread.filter(|_| extent == self.layout.threads && fits);
        let refuse = || Unsupported(format!("{extent} threads that fold {dtype}"));
        let thread = thread.ok_or_else(refuse)?;
        let (f, mut x) = (f.binary(dtype), value.one()?);
        if extent > WARP {
            // What lies a whole number of warps apart is folded first, by every warp.
            let start = match self.folds {
                Some(start) => start,
                None => self.room(extent * 4),
            };
            self.folds = Some(start);
            let base = self.shared_at(start);
            let at = |this: &mut Self, thread: Operand| {
                this.op(Op::Mad, Ty::U32, &[thread, Operand::Int(4), Operand::Reg(base)])
            };
            let own = at(self, Operand::Reg(thread));
            let kept = self.held(ty(dtype), x);
            // What was folded before may still be read.
            self.code.push(Inst::Barrier);
            let place = |base, offset| isa::Address { base, offset, align: 4 };
            self.code.push(Inst::Store(Space::Shared, ty(dtype), place(own, 0), vec![kept]));
            self.code.push(Inst::Barrier);
            let lane = [Operand::Reg(thread), Operand::Int(WARP as i64 - 1)];
            let lane = self.calc(Op::And, Ty::B32, &lane);
            let first = at(self, lane);
            let mut all = Vec::new();
            for warp in 0..extent / WARP {
                let reg = self.reg(ty(dtype).class());
                let place = place(first, (warp * WARP * 4) as i64);
                self.code.push(Inst::Load(Space::Shared, ty(dtype), vec![reg], place));
                all.push(Operand::Reg(reg));
            }
            while all.len() > 1 {
                let half = all.len() / 2;
                for i in 0..half {
                    all[i] = self.arithmetic(f, dtype, all[i], all[i + half])?;
                }
                all.truncate(half);
            }
            x = all[0];
        }
        Ok(Val::One(self.fold_warp(f, dtype, x, extent.min(WARP))?))
    }
}
