//! The wide emitter: kernels of f32 and of integers up to 32 bits on x86-64 in vectors of 256 bits
//! (AVX2, FMA and F16C) or 512 (AVX-512 F, BW, DQ and VL), which Cranelift has no instructions for.
//! Kernels that need other types are left to Cranelift.
//!
//! The walk over loops becomes SSA (`ssa`), which regalloc2 gives registers and `encode` turns
//! into bytes. Indices are not computed: every loop carries a counter for each distinct step in
//! bytes, and what does not change in a loop is added to the base before it.

mod address;
#[cfg(test)]
mod emulate;
mod encode;
#[cfg(test)]
mod graphs;
mod interleave;
pub mod isa;
mod lanes;
mod literals;
mod ssa;
#[cfg(test)]
mod tests;
mod whole;

use std::collections::HashMap;

use iced_x86::Code;
use kiln_runtime::tensor::DType;
use regalloc2::{RegClass, VReg};

use self::address::{Address, Counted, Int, Span};
use self::isa::Level;
use self::lanes::Val;
use self::ssa::{Arg, Ask, Builder, Test};
use super::clif::Compiled;
use crate::backend::emit::{Access, Bits, Dynamic, Emitted, Machine, Unsupported, emit};
use crate::backend::{dot, rounded};
use crate::graph::op::{BinaryFn, ReduceFn, UnaryFn};
use crate::graph::scalar::Dots;
use crate::loops::ir::{BufferId, Count, Loops, Number, Parts, Scope, compute_dtype};

/// Compiles a kernel for AVX2 (8 lanes) or AVX-512 (16).
/// `dots`: the dot products of words that there are instructions for (VNNI, BF16).
pub fn compile(loops: &Loops, lanes: usize, dots: Dots, texts: bool) -> Emitted<Compiled> {
    let level = Level::of(lanes).ok_or_else(|| Unsupported(format!("vectors of {lanes} lanes")))?;
    let mut wide = Wide { dots, ..Wide::new(loops, level) };
    emit(loops, &mut wide)?;
    wide.code.ret(wide.current);
    let flat = wide.code.finish(level);
    let allocated = flat.allocate()?;
    let (code, size) = encode::encode(&flat, &allocated)?;
    let asm = if texts { encode::disassemble(&code[..size]) } else { String::new() };
    Ok(Compiled { code, clif: String::new(), asm })
}

/// Something that has begun and not ended.
enum Open {
    /// A loop by its number, and the values before it.
    Loop(usize, Vec<VReg>),
    /// The first block of a branch: what comes before, the condition, and where it starts.
    Then(usize, VReg, usize),
    /// The second one: where the first one ends.
    Else(usize),
}

/// An index by block, terms and offset.
type IndexKey = (usize, Vec<(Int, i64)>, i64);
/// Base plus terms, and the block that computes the sum.
type SumKey = (BufferId, Vec<(Int, i64)>, usize);

/// Code in the making.
struct Wide {
    level: Level,
    /// The dot products of words that there are instructions for.
    dots: Dots,
    code: Builder,
    /// Where instructions go.
    current: usize,
    /// Where what hangs on the parallel loop alone goes: its first block.
    head: usize,
    /// Where its body starts.
    body: usize,
    /// Buffers, begin, end.
    arguments: [VReg; 3],
    bases: Vec<Option<VReg>>,
    loops: Vec<Counted>,
    open: Vec<Open>,
    /// Sums of a buffer's base and of terms, by the block that they are computed in.
    sums: HashMap<SumKey, VReg>,
    /// Quotients and remainders times numbers.
    products: HashMap<(VReg, i64), VReg>,
    /// Quotients by block, dividend and divisor.
    quotients: HashMap<(usize, VReg, usize), VReg>,
    /// Registers that hold numbers of lanes, by block.
    orders: HashMap<(usize, [u8; 16]), VReg>,
    /// Indices by block, terms and offset.
    indices: HashMap<IndexKey, Val>,
    /// Blocks in which indices are computed.
    homes: HashMap<VReg, usize>,
    /// What quotients and remainders are less than.
    limits: HashMap<VReg, i64>,
    /// Turns of the parallel loop.
    turns: i64,
    /// Copies that may be done in turns: their block, and where each begins in it.
    copies: Option<(usize, Vec<usize>)>,
}

impl Wide {
    fn new(loops: &Loops, level: Level) -> Wide {
        let mut code = Builder::default();
        let entry = code.block();
        let arguments = code.arguments(entry);
        let mut slot = 0;
        let mut bases = Vec::new();
        for buffer in &loops.buffers {
            bases.push((buffer.scope == Scope::Global).then(|| {
                let args = [Arg::Gpr(0), Arg::Memory(1, None, slot)];
                slot += 8;
                code.make(entry, RegClass::Int, Code::Mov_r64_rm64, &args, &arguments[..1])
            }));
        }
        Wide {
            level,
            dots: Dots::default(),
            code,
            current: entry,
            head: entry,
            body: entry,
            arguments,
            bases,
            loops: Vec::new(),
            open: Vec::new(),
            sums: HashMap::new(),
            products: HashMap::new(),
            quotients: HashMap::new(),
            orders: HashMap::new(),
            indices: HashMap::new(),
            homes: HashMap::new(),
            limits: HashMap::new(),
            turns: i64::try_from(loops.parallel_extent()).unwrap_or(i64::MAX),
            copies: None,
        }
    }

    /// Starts a loop; returns its number and the carried values in it.
    fn begin(&mut self, span: Span, carried: Vec<VReg>) -> (usize, Vec<VReg>) {
        let before = self.current;
        let header = self.code.block();
        let inside = carried.iter().map(|r| self.code.param(header, r.class())).collect();
        let id = self.loops.len();
        self.loops.push(Counted { before, header, span, counters: Vec::new() });
        self.open.push(Open::Loop(id, carried));
        self.current = header;
        (id, inside)
    }

    /// A vector in a register of its own from here on. The allocator weighs a register over all
    /// of its life: without this, an epilogue that is short of registers spills sums in the loop.
    fn parted(&mut self, x: VReg) -> VReg {
        if x.class() != RegClass::Float {
            return x;
        }
        let (code, args) = (self.form(isa::MOVE, true), [self.part(0, true), self.part(1, true)]);
        self.code.make(self.current, RegClass::Float, code, &args, &[x])
    }

    /// Ends the innermost loop: its counters step, and one of them decides.
    /// Returns what it carried, as it is after the loop.
    fn end(&mut self, next: Vec<VReg>) -> Vec<VReg> {
        let Some(Open::Loop(id, mut first)) = self.open.pop() else {
            unreachable!("loops end in the order in which they begin")
        };
        let (driving_step, driver) = self.driver(id);
        let Counted { before, header, span, ref counters } = self.loops[id];
        let counters = counters.clone();
        let latch = self.current;
        let mut again = next.clone();
        let entered = first.clone();
        let mut decisive = driver;
        // The deciding counter steps last, next to its test.
        for &(step, counter) in counters.iter().rev() {
            decisive = self.stepped(latch, counter, step);
            again.push(decisive);
        }
        for &(step, _) in counters.iter() {
            first.push(match span {
                Span::Extent(_) => self.int(before, 0),
                Span::Range(begin, _) | Span::Perhaps(begin, ..) => self.times(before, begin, step),
            });
        }
        let at = again.len() - counters.len();
        again[at..].reverse();
        let (test, uses) = match span {
            Span::Extent(extent) => {
                let last = extent as i64 * driving_step;
                match i32::try_from(last) {
                    Ok(last) => (Test::NotImm(last), vec![decisive]),
                    Err(_) => (Test::Differ, vec![decisive, self.int(before, last)]),
                }
            }
            Span::Range(_, end) | Span::Perhaps(_, end, _) => {
                (Test::Differ, vec![decisive, self.times(before, end, driving_step)])
            }
        };
        // Only jumps carry values: ways in and back are blocks of their own.
        let Span::Perhaps(begin, end, _) = span else {
            self.code.jump(before, header, &first);
            let (back, exit) = (self.code.block(), self.code.block());
            self.code.branch(latch, test, &uses, back, exit);
            self.code.jump(back, header, &again);
            self.current = exit;
            return next;
        };
        let some = self.code.ask(before, Ask::Lt, begin, end);
        let (enter, skip) = (self.code.block(), self.code.block());
        self.code.branch(before, Test::NonZero, &[some], enter, skip);
        self.code.jump(enter, header, &first);
        let (back, exit, after) = (self.code.block(), self.code.block(), self.code.block());
        let carried = next.iter().map(|r| self.code.param(after, r.class())).collect();
        self.code.branch(latch, test, &uses, back, exit);
        self.code.jump(back, header, &again);
        self.code.jump(exit, after, &next);
        self.code.jump(skip, after, &entered);
        self.current = after;
        carried
    }
}

/// The dtype of arithmetic with fractions.
fn f32_only(dtype: DType) -> Emitted<()> {
    match dtype {
        DType::F32 => Ok(()),
        other => Err(Unsupported(format!("{other} in wide code"))),
    }
}

/// The dtypes of 32 bits that lanes hold.
fn lanes_of(dtype: DType) -> Emitted<()> {
    match dtype {
        DType::I32 | DType::TF32 => Ok(()),
        other => f32_only(other),
    }
}

impl Machine for Wide {
    type Value = Val;
    type Int = Int;
    type Address = Address;

    fn loop_begin(&mut self, extent: usize, carried: &[Val]) -> (Int, Vec<Val>) {
        let before = carried.iter().map(|v| self.register(v)).collect();
        let (id, inside) = self.begin(Span::Extent(extent), before);
        let inside = carried.iter().zip(inside).map(|(v, r)| v.like(r)).collect();
        (Int::Loop(id), inside)
    }

    fn copy_begins(&mut self) {
        let (block, at) = (self.current, self.code.len(self.current));
        self.copies.get_or_insert_with(|| (block, Vec::new())).1.push(at);
    }

    fn copies_end(&mut self) {
        self.copy_begins();
        if let Some((block, starts)) = self.copies.take()
            && block == self.current
        {
            self.code.interleave(block, &starts, self.level);
        }
    }

    fn count(&mut self, dims: BufferId, count: Count, extent: usize) -> Emitted<Val> {
        self.turns_of(dims, count, extent)
    }

    fn range_begin(
        &mut self,
        from: Option<&Val>,
        to: &Val,
        carried: &[Val],
    ) -> Emitted<(Int, Vec<Val>)> {
        let before = carried.iter().map(|v| self.register(v)).collect();
        let from = match from {
            Some(from) => self.register(from),
            None => self.int(self.current, 0),
        };
        let Val::Int(to, limit) = *to else {
            return Err(Unsupported("a loop to what is no count".into()));
        };
        let (id, inside) = self.begin(Span::Perhaps(from, to, limit), before);
        let inside = carried.iter().zip(inside).map(|(v, r)| v.like(r)).collect();
        Ok((Int::Loop(id), inside))
    }

    fn loop_end(&mut self, next: &[Val]) -> Vec<Val> {
        let registers: Vec<VReg> = next.iter().map(|v| self.register(v)).collect();
        let registers = self.end(registers);
        let carries = |open: &Open| matches!(open, Open::Loop(_, carried) if !carried.is_empty());
        let last = !self.open.iter().any(carries);
        let after = registers.into_iter().map(|r| if last { self.parted(r) } else { r });
        next.iter().zip(after.collect::<Vec<_>>()).map(|(v, r)| v.like(r)).collect()
    }

    fn parallel_begin(&mut self) -> Int {
        let (id, _) = self.begin(Span::Range(self.arguments[1], self.arguments[2]), Vec::new());
        self.head = self.current;
        self.body = self.code.block();
        self.current = self.body;
        Int::Loop(id)
    }

    fn parallel_end(&mut self) {
        self.code.jump(self.head, self.body, &[]);
        self.end(Vec::new());
    }

    fn div_rem(&mut self, x: &Int, divisor: usize, limit: usize) -> Emitted<(Int, Int)> {
        self.divided(*x, divisor, limit)
    }

    fn branch_begin(&mut self, condition: &Val) -> Emitted<()> {
        let condition = match condition {
            Val::Int(..) | Val::Number(_) => self.register(condition),
            Val::One(_) | Val::Lanes(_) | Val::Literal(..) => {
                return Err(Unsupported("a branch on floats".into()));
            }
        };
        let then = self.code.block();
        self.open.push(Open::Then(self.current, condition, then));
        self.current = then;
        Ok(())
    }

    fn branch_else(&mut self) {
        let Some(Open::Then(from, condition, then)) = self.open.pop() else {
            unreachable!("a branch is open")
        };
        let other = self.code.block();
        self.code.branch(from, Test::NonZero, &[condition], then, other);
        self.open.push(Open::Else(self.current));
        self.current = other;
    }

    fn branch_end(&mut self) {
        let Some(Open::Else(then_end)) = self.open.pop() else { unreachable!("a branch is open") };
        let exit = self.code.block();
        self.code.jump(then_end, exit, &[]);
        self.code.jump(self.current, exit, &[]);
        self.current = exit;
    }

    fn address(
        &mut self,
        buffer: BufferId,
        terms: &[(Int, i64)],
        offset: i64,
        dynamic: Option<Dynamic<Val>>,
    ) -> Emitted<Address> {
        let address = self.place(buffer, terms, offset)?;
        match dynamic {
            None => Ok(address),
            Some(Dynamic { value: value @ (Val::Int(..) | Val::Number(_)), bytes, .. }) => {
                let register = self.register(value);
                Ok(self.moved(address, register, bytes))
            }
            Some(_) => Err(Unsupported("a place that is a float".into())),
        }
    }

    fn prefetch(&mut self, address: &Address) -> Emitted<()> {
        let (code, args) = (Code::Prefetcht1_m8, [address.operand(0)]);
        self.code.effect(self.current, code, &args, &address.registers());
        Ok(())
    }

    fn load(&mut self, dtype: DType, address: &Address, access: Access) -> Emitted<Val> {
        if dtype.bytes() < 4 {
            return self.load_whole(dtype, address, access);
        }
        lanes_of(dtype)?;
        let (op, wide) = match access {
            Access::One => (isa::LOAD_ONE, false),
            Access::Lanes(1) => (isa::LOAD, true),
            Access::Lanes(step) => return self.apart(address, step),
            Access::Splat => (isa::SPREAD, true),
        };
        let args = [self.part(0, wide), address.operand(1)];
        Ok(self.value(op, wide, &args, &address.registers()))
    }

    fn store(&mut self, dtype: DType, address: &Address, value: &Val) -> Emitted<()> {
        if dtype.bytes() < 4 {
            return self.store_whole(dtype, address, value);
        }
        lanes_of(dtype)?;
        let mut uses = vec![self.vector(value)?];
        uses.extend(address.registers());
        let wide = value.is_wide();
        let code = self.form(if wide { isa::STORE } else { isa::STORE_ONE }, wide);
        let args = [address.operand(1), self.part(0, wide)];
        self.code.effect(self.current, code, &args, &uses);
        Ok(())
    }

    fn number(&mut self, dtype: DType, number: Number, wide: bool) -> Emitted<Val> {
        match (dtype, number) {
            (DType::F32, Number::Float(v)) => Ok(Val::Literal((v as f32).to_bits(), wide)),
            (DType::I32 | DType::I16 | DType::I8 | DType::U8, Number::Int(v)) => {
                Ok(Val::Literal(v as i32 as u32, wide))
            }
            (DType::I64 | DType::Bool, Number::Int(v)) if !wide => {
                let value = i64::try_from(v).map_err(|_| Unsupported(format!("number {v}")))?;
                Ok(Val::Number(value))
            }
            _ => Err(Unsupported(format!("{dtype} in wide code"))),
        }
    }

    fn index(&mut self, terms: &[(Int, i64)], offset: i64) -> Emitted<Val> {
        let block = self.home(terms);
        let key = (block, terms.to_vec(), offset);
        if let Some(&known) = self.indices.get(&key) {
            return Ok(known);
        }
        let mut sum = match offset {
            0 => None,
            _ => Some(self.int(block, offset)),
        };
        let (mut least, mut most) = (offset, Some(offset));
        for &(int, factor) in terms {
            let step = self.scaled(int, factor)?;
            sum = Some(sum.map_or(step, |sum| self.sum(block, sum, step)));
            let reach = self.limit(int).and_then(|limit| factor.checked_mul(limit - 1));
            least = reach.map_or(i64::MIN, |r| least.saturating_add(r.min(0)));
            most = most.zip(reach).and_then(|(most, reach)| most.checked_add(reach.max(0)));
        }
        let limit = match most {
            Some(most) if least >= 0 => most.saturating_add(1),
            _ => 0,
        };
        let index = sum.map_or(Val::Number(offset), |sum| Val::Int(sum, limit));
        self.indices.insert(key, index);
        if let Val::Int(register, _) = index {
            self.homes.insert(register, block);
        }
        Ok(index)
    }

    fn unary(&mut self, f: UnaryFn, dtype: DType, x: &Val) -> Emitted<Val> {
        f32_only(dtype)?;
        self.float_unary(f, x)
    }

    fn binary(&mut self, f: BinaryFn, dtype: DType, x: &Val, y: &Val) -> Emitted<Val> {
        match dtype {
            DType::I64 | DType::Bool => self.int_binary(f, x, y),
            DType::I32 | DType::I16 | DType::I8 | DType::U8 => self.whole_binary(f, dtype, x, y),
            _ => {
                f32_only(dtype)?;
                self.float_binary(f, x, y)
            }
        }
    }

    fn select(&mut self, dtype: DType, c: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        lanes_of(dtype)?;
        let mask = match *c {
            Val::Int(..) | Val::Number(_) => {
                let bool = self.register(c);
                self.mask(bool, x.is_wide() || y.is_wide())
            }
            Val::One(_) | Val::Lanes(_) | Val::Literal(..) => *c,
        };
        self.blend(&mask, x, y)
    }

    fn cast(&mut self, from: DType, to: DType, x: &Val) -> Emitted<Val> {
        // Short floats are f32 since they were read.
        let from = compute_dtype(from);
        match (from, to) {
            _ if from == to => Ok(*x),
            (DType::F32, to) if to.is_rounded() => rounded::rounded(self, to, x, x.is_wide()),
            _ => self.whole_cast(from, to, x),
        }
    }

    fn dot(&mut self, parts: Parts, [x, y, z]: [&Val; 3], wide: bool) -> Emitted<Val> {
        match parts {
            Parts::Pairs if self.dots.whole => return self.added(isa::DOT_PAIRS, z, x, y),
            Parts::Quads if self.dots.whole => return self.added(isa::DOT_QUADS, z, x, y),
            Parts::Halves if self.dots.rounded == Some(DType::BF16) => return self.halves(z, x, y),
            Parts::Quads => return dot::of_bytes(self, [x, y, z], wide),
            Parts::Halves => return rounded::dot(self, [x, y, z], wide),
            Parts::Pairs => {}
        }
        // There is no form of this with a literal in memory.
        let wide = x.is_wide() || y.is_wide();
        let uses = [self.vector(x)?, self.vector(y)?];
        let args = [self.part(0, wide), self.part(1, wide), self.part(2, wide)];
        let products = self.value(isa::PAIRS, wide, &args, &uses);
        self.two(isa::ADD_INT, z, &products)
    }

    fn fma(&mut self, dtype: DType, x: &Val, y: &Val, z: &Val) -> Emitted<Val> {
        f32_only(dtype)?;
        self.fused(x, y, z)
    }

    fn bits(&mut self, op: Bits, x: &Val, y: &Val) -> Emitted<Val> {
        let op = match op {
            Bits::Add => isa::ADD_INT,
            Bits::Sub => isa::SUB_INT,
            Bits::And => isa::AND,
            Bits::Or => isa::OR,
            Bits::Xor => isa::XOR,
        };
        self.two(op, x, y)
    }

    fn shift(&mut self, x: &Val, left: i32) -> Emitted<Val> {
        let op = if left < 0 { isa::SHIFT_RIGHT } else { isa::SHIFT_LEFT };
        self.one(op, x, Some(left.unsigned_abs() as u8))
    }

    fn int_to_float(&mut self, x: &Val) -> Emitted<Val> {
        self.one(isa::FROM_INT, x, None)
    }

    fn scaled(&mut self, x: &Val, n: &Val) -> Emitted<Option<Val>> {
        let code = match (self.level, x.is_wide()) {
            (Level::Avx2, _) => return Ok(None),
            (Level::Avx512, true) => Code::EVEX_Vscalefps_zmm_k1z_zmm_zmmm512b32_er,
            (Level::Avx512, false) => Code::EVEX_Vscalefps_xmm_k1z_xmm_xmmm128b32,
        };
        let uses = [self.vector(x)?, self.vector(n)?];
        let args = [0, 1, 2].map(|place| self.part(place, x.is_wide()));
        Ok(Some(x.like(self.code.make(self.current, RegClass::Float, code, &args, &uses))))
    }

    fn splat(&mut self, _dtype: DType, x: &Val) -> Emitted<Val> {
        match *x {
            Val::One(_) => {
                let lane = self.vector(x)?;
                Ok(self.broadcast(lane))
            }
            Val::Lanes(_) => Ok(*x),
            Val::Literal(bits, _) => Ok(Val::Literal(bits, true)),
            Val::Int(..) | Val::Number(_) => {
                Err(Unsupported("lanes of another type than f32".into()))
            }
        }
    }

    fn pick(&mut self, x: &Val, y: &Val, order: &[u8]) -> Emitted<Val> {
        self.picked(x, y, order)
    }

    fn fold(&mut self, f: ReduceFn, x: &[Val]) -> Emitted<Val> {
        self.folded(f.binary(DType::F32), x)
    }
}
