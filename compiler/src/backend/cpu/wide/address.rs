//! Loop counters and addresses.

use iced_x86::{Code, OpKind};
use regalloc2::{RegClass, VReg};

use super::lanes::Val;
use super::ssa::{Arg, Ask};
use super::{Open, Wide};
use crate::backend::emit::{Emitted, Unsupported};
use crate::loops::ir::{BufferId, Count};

/// A loop variable, by the number of its loop, or what is computed of the parallel one.
///
/// The order is that in which they come to be: the parallel loop is number 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Int {
    /// The variable of a loop.
    Loop(usize),
    /// A quotient or a remainder.
    Value(VReg),
}

impl Int {
    fn depth(self) -> usize {
        match self {
            Int::Loop(0) => 0,
            Int::Value(_) => 1,
            Int::Loop(id) => id + 1,
        }
    }
}

/// How far a loop runs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Span {
    /// From 0 to a number.
    Extent(usize),
    /// From one register to another.
    Range(VReg, VReg),
    /// The same, perhaps without a turn; the second is less than the number.
    Perhaps(VReg, VReg, i64),
}

/// A loop with its counters.
pub struct Counted {
    /// The block before it, which stays open while the body is made.
    pub before: usize,
    /// Its first block.
    pub header: usize,
    /// How far it runs.
    pub span: Span,
    /// Counters by what they step by.
    pub counters: Vec<(i64, VReg)>,
}

/// Where an element is: base, perhaps an index, and displacement.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Address {
    base: VReg,
    index: Option<VReg>,
    displacement: i32,
}

impl Address {
    /// The operand, its registers being numbered from `first`.
    pub fn operand(&self, first: u8) -> Arg {
        Arg::Memory(first, self.index.map(|_| first + 1), self.displacement)
    }

    /// So many bytes further.
    pub fn after(&self, bytes: i64) -> Emitted<Address> {
        Ok(Address { displacement: small(i64::from(self.displacement) + bytes)?, ..*self })
    }

    /// Its registers.
    pub fn registers(&self) -> Vec<VReg> {
        std::iter::once(self.base).chain(self.index).collect()
    }
}

fn small(value: i64) -> Emitted<i32> {
    i32::try_from(value).map_err(|_| Unsupported("an offset of more than 31 bits".into()))
}

impl Wide {
    /// A number in a general register.
    pub fn int(&mut self, block: usize, value: i64) -> VReg {
        let (code, to, kind) = match u32::try_from(value) {
            Ok(_) => (Code::Mov_r32_imm32, Arg::Gpr32(0), OpKind::Immediate32),
            Err(_) => (Code::Mov_r64_imm64, Arg::Gpr(0), OpKind::Immediate64),
        };
        self.code.make(block, RegClass::Int, code, &[to, Arg::Imm(kind, value)], &[])
    }

    /// x + y
    pub fn sum(&mut self, block: usize, x: VReg, y: VReg) -> VReg {
        let args = [Arg::Gpr(0), Arg::Memory(1, Some(2), 0)];
        self.code.make(block, RegClass::Int, Code::Lea_r64_m, &args, &[x, y])
    }

    /// An instruction that changes a general register by a number that has up to 32 bits.
    fn by_number(&mut self, block: usize, codes: [Code; 2], x: VReg, value: i64) -> VReg {
        let (code, kind) = match i8::try_from(value) {
            Ok(_) => (codes[0], OpKind::Immediate8to64),
            Err(_) => (codes[1], OpKind::Immediate32to64),
        };
        self.code.change(block, code, &[Arg::Gpr(0), Arg::Imm(kind, value)], &[x], 1)
    }

    /// x + step, in the register of x.
    pub fn stepped(&mut self, block: usize, x: VReg, step: i64) -> VReg {
        self.by_number(block, [Code::Add_rm64_imm8, Code::Add_rm64_imm32], x, step)
    }

    /// x * factor, where the factor has up to 32 bits.
    pub fn times(&mut self, block: usize, x: VReg, factor: i64) -> VReg {
        if factor == 1 {
            return x;
        }
        if factor.count_ones() == 1 && factor > 0 {
            let args = [Arg::Gpr(0), Arg::Imm(OpKind::Immediate8, factor.trailing_zeros().into())];
            return self.code.change(block, Code::Shl_rm64_imm8, &args, &[x], 1);
        }
        let kind = OpKind::Immediate32to64;
        let args = [Arg::Gpr(0), Arg::Gpr(1), Arg::Imm(kind, factor)];
        self.code.make(block, RegClass::Int, Code::Imul_r64_rm64_imm32, &args, &[x])
    }

    /// The variable of an open loop times a factor: a counter of that step.
    fn counter(&mut self, id: usize, step: i64) -> VReg {
        let counted = &self.loops[id];
        if let Some(known) = counted.counters.iter().find(|c| c.0 == step) {
            return known.1;
        }
        let counter = self.code.param(counted.header, RegClass::Int);
        self.loops[id].counters.push((step, counter));
        counter
    }

    /// The step and the register of the counter that decides when a loop ends.
    pub fn driver(&mut self, id: usize) -> (i64, VReg) {
        match self.loops[id].counters.first() {
            Some(&known) => known,
            None => (1, self.counter(id, 1)),
        }
    }

    /// A variable times a factor.
    pub fn scaled(&mut self, int: Int, factor: i64) -> Emitted<VReg> {
        small(factor)?;
        Ok(match int {
            Int::Loop(id) => self.counter(id, factor),
            Int::Value(x) => match self.products.get(&(x, factor)) {
                Some(&known) => known,
                None => {
                    let product = self.times(self.head, x, factor);
                    self.products.insert((x, factor), product);
                    product
                }
            },
        })
    }

    /// The outermost block after which all that this variable is added to is known.
    fn before(&self, int: Int) -> usize {
        match int {
            Int::Loop(id) => self.loops[id].before,
            Int::Value(_) => self.head,
        }
    }

    /// A buffer's base plus terms, outermost first, computed in a block.
    fn base(&mut self, buffer: BufferId, terms: &[(Int, i64)], block: usize) -> Emitted<VReg> {
        let Some((&(int, factor), outer)) = terms.split_last() else {
            return self.bases[buffer].ok_or_else(|| Unsupported("a register place".into()));
        };
        let key = (buffer, terms.to_vec(), block);
        if let Some(&known) = self.sums.get(&key) {
            return Ok(known);
        }
        let base = self.base(buffer, outer, self.before(int))?;
        let step = self.scaled(int, factor)?;
        let sum = self.sum(block, base, step);
        self.sums.insert(key, sum);
        Ok(sum)
    }

    /// A number of turns that the run decides.
    pub fn turns_of(&mut self, dims: BufferId, count: Count, extent: usize) -> Emitted<Val> {
        // Within the parallel loop it hangs on nothing inside.
        let block = if self.head != self.body { self.head } else { self.current };
        let Count { dim, add, width, times } = count;
        let address = self.place(dims, &[], i64::from(dim) * 8)?;
        let args = [Arg::Gpr(0), address.operand(1)];
        let registers = address.registers();
        let length = self.code.make(block, RegClass::Int, Code::Mov_r64_rm64, &args, &registers);
        let add = self.int(block, add);
        let sum = self.sum(block, length, add);
        let zero = self.int(block, 0);
        let sum = self.greater(block, sum, zero);
        // The most that still gives `extent`: it bounds what is divided.
        let most = (extent as i64 / times + 1).saturating_mul(width) - 1;
        let number = self.int(block, most);
        let sum = self.less(block, sum, number);
        let whole = self.quotient(block, sum, width as usize, most as usize + 1)?;
        let turns = self.times(block, whole, times);
        let number = self.int(block, extent as i64);
        let turns = self.less(block, turns, number);
        self.homes.insert(turns, block);
        Ok(Val::Int(turns, extent as i64 + 1))
    }

    /// The less of two integers.
    fn less(&mut self, block: usize, x: VReg, y: VReg) -> VReg {
        let first = self.code.ask(block, Ask::Lt, x, y);
        self.chosen(block, first, x, y)
    }

    /// The greater of two integers.
    fn greater(&mut self, block: usize, x: VReg, y: VReg) -> VReg {
        let first = self.code.ask(block, Ask::Lt, y, x);
        self.chosen(block, first, x, y)
    }

    /// x where `first` is 1, y where it is 0: y + (x - y) * first
    fn chosen(&mut self, block: usize, first: VReg, x: VReg, y: VReg) -> VReg {
        let args = [Arg::Gpr(0), Arg::Gpr(2)];
        let ahead = self.code.change(block, Code::Sub_r64_rm64, &args, &[x, y], 1);
        let ahead = self.code.change(block, Code::Imul_r64_rm64, &args, &[ahead, first], 1);
        self.sum(block, y, ahead)
    }

    /// The address of `sum of int * factor + offset` in a buffer.
    pub fn place(
        &mut self,
        buffer: BufferId,
        terms: &[(Int, i64)],
        offset: i64,
    ) -> Emitted<Address> {
        let displacement = small(offset)?;
        let mut terms = terms.to_vec();
        terms.sort_by_key(|t| t.0.depth());
        let (base, index) = match terms.split_last() {
            Some((&(int @ Int::Loop(_), factor), outer)) => {
                let base = self.base(buffer, outer, self.before(int))?;
                (base, Some(self.scaled(int, factor)?))
            }
            Some(_) | None => (self.base(buffer, &terms, self.head)?, None),
        };
        Ok(Address { base, index, displacement })
    }

    /// x / divisor of an x that is at least 0 and less than `limit`.
    pub fn quotient(
        &mut self,
        block: usize,
        x: VReg,
        divisor: usize,
        limit: usize,
    ) -> Emitted<VReg> {
        if let Some(&known) = self.quotients.get(&(block, x, divisor)) {
            return Ok(known);
        }
        let shift = match limit.checked_mul(divisor) {
            Some(product) if limit < 1 << 29 => usize::BITS - product.leading_zeros(),
            _ => return Err(Unsupported("a division of large numbers".into())),
        };
        // With m = ceil(2^s / d), x * m / 2^s exceeds x / d by less than 1 / d while
        // x * d < 2^s; m is at most 2 * limit + 1.
        let factor = (1u128 << shift).div_ceil(divisor as u128);
        let factor = i64::from(small(i64::try_from(factor).unwrap_or(i64::MAX))?);
        let (product, shift) = match divisor.is_power_of_two() {
            true => (x, divisor.trailing_zeros()),
            false => (self.times(block, x, factor), shift),
        };
        let args = [Arg::Gpr(0), Arg::Imm(OpKind::Immediate8, i64::from(shift))];
        let quotient = self.code.change(block, Code::Shr_rm64_imm8, &args, &[product], 1);
        self.quotients.insert((block, x, divisor), quotient);
        Ok(quotient)
    }

    /// x - quotient * divisor
    pub fn rest(&mut self, block: usize, x: VReg, quotient: VReg, divisor: usize) -> Emitted<VReg> {
        let whole = self.times(block, quotient, i64::from(small(divisor as i64)?));
        let args = [Arg::Gpr(0), Arg::Gpr(2)];
        Ok(self.code.change(block, Code::Sub_r64_rm64, &args, &[x, whole], 1))
    }

    /// Quotient and remainder of a parallel variable that is less than `limit`.
    pub fn divided(&mut self, x: Int, divisor: usize, limit: usize) -> Emitted<(Int, Int)> {
        let x = self.scaled(x, 1)?;
        let quotient = self.quotient(self.head, x, divisor, limit)?;
        let rest = self.rest(self.head, x, quotient, divisor)?;
        self.limits.insert(quotient, limit.div_ceil(divisor) as i64);
        self.limits.insert(rest, divisor as i64);
        Ok((Int::Value(quotient), Int::Value(rest)))
    }

    /// A number that the variable is less than, if there is one. None is negative.
    pub fn limit(&self, int: Int) -> Option<i64> {
        match int {
            Int::Loop(id) => match self.loops[id].span {
                Span::Extent(extent) => i64::try_from(extent).ok(),
                Span::Range(..) => Some(self.turns),
                Span::Perhaps(_, _, limit) => Some(limit - 1),
            },
            Int::Value(x) => self.limits.get(&x).copied(),
        }
    }

    /// The outermost block, still open, in which an index of these terms is known.
    pub fn home(&self, terms: &[(Int, i64)]) -> usize {
        let depth = terms.iter().map(|t| t.0.depth()).max().unwrap_or(0);
        let deeper = self.open_loops().find(|&id| Int::Loop(id).depth() > depth);
        deeper.map_or(self.current, |id| self.loops[id].before)
    }

    fn open_loops(&self) -> impl Iterator<Item = usize> + '_ {
        self.open.iter().filter_map(|open| match open {
            Open::Loop(id, _) => Some(*id),
            Open::Then(..) | Open::Else(_) => None,
        })
    }

    /// The block to go on with an integer: where it is computed, unless that block has ended.
    /// Of blocks that are open, later ones know what earlier ones do.
    pub fn block_of(&self, x: VReg) -> usize {
        let home = self.homes.get(&x).copied();
        home.filter(|&home| self.open_loops().any(|id| self.loops[id].before == home))
            .unwrap_or(self.current)
    }

    /// The address moved by a value times a number of bytes.
    pub fn moved(&mut self, address: Address, value: VReg, bytes: i64) -> Address {
        let block = self.block_of(value);
        let step = self.times(block, value, bytes);
        let base = match address.index {
            Some(index) => self.sum(self.current, address.base, index),
            None => address.base,
        };
        Address { base, index: Some(step), ..address }
    }
}
