//! Arithmetic on values. Scalars lie in lane 0 and are computed in 128 bits.

use iced_x86::{Code, OpKind};
use regalloc2::{RegClass, VReg};
use smallvec::{SmallVec, smallvec};

use super::Wide;
use super::address::Address;
use super::isa::{self, Level, Op, Width};
use super::ssa::{Arg, Ask};
use crate::backend::emit::{Emitted, Unsupported};
use crate::graph::op::{BinaryFn, UnaryFn};

/// A value.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Val {
    /// An f32 in lane 0, or a mask of a comparison of such.
    One(VReg),
    /// An f32 in every lane, or masks.
    Lanes(VReg),
    /// An i64 or, as 1 or 0, a bool. It is at least 0 and less than the limit, if that is not 0.
    Int(VReg, i64),
    /// An i64 or a bool that is known.
    Number(i64),
    /// The bits of an f32 that is known, and whether it is in every lane.
    Literal(u32, bool),
}

impl Val {
    /// Whether it is in every lane.
    pub fn is_wide(self) -> bool {
        match self {
            Val::One(_) | Val::Int(..) | Val::Number(_) => false,
            Val::Lanes(_) => true,
            Val::Literal(_, wide) => wide,
        }
    }

    /// A register that holds a value like this one.
    pub fn like(self, register: VReg) -> Val {
        match self {
            Val::Int(..) | Val::Number(_) => Val::Int(register, 0),
            Val::One(_) | Val::Lanes(_) | Val::Literal(..) => wide_or_one(self.is_wide(), register),
        }
    }
}

fn wide_or_one(wide: bool, register: VReg) -> Val {
    if wide { Val::Lanes(register) } else { Val::One(register) }
}

/// Predicates of vcmpps that are true where the operands are in order, and their mirrors.
const LT: (u8, u8) = (17, 30);
const LE: (u8, u8) = (18, 29);
const EQ: (u8, u8) = (0, 0);
const NE: (u8, u8) = (4, 4);
/// Either is NaN.
const UNORDERED: u8 = 3;
/// Neither is NaN, and they differ.
const APART: u8 = 12;

const ONE: u32 = 0x3f80_0000;
const SIGN: u32 = 0x8000_0000;
const MAGNITUDE: u32 = 0x7fff_ffff;

/// A byte within an instruction.
pub fn byte(value: u8) -> Arg {
    Arg::Imm(OpKind::Immediate8, i64::from(value))
}

impl Wide {
    /// The form of an instruction for lanes or for scalars.
    pub fn form(&self, op: Op, wide: bool) -> Code {
        op.code(self.level, self.width(wide))
    }

    fn width(&self, wide: bool) -> Width {
        if wide { self.level.width() } else { Width::Xmm }
    }

    /// The operand in a vector register, or in the part of it that scalars take.
    pub fn part(&self, place: u8, wide: bool) -> Arg {
        Arg::Vector(place, self.width(wide))
    }

    /// The result of an instruction, a vector or a scalar.
    pub fn value(&mut self, op: Op, wide: bool, args: &[Arg], uses: &[VReg]) -> Val {
        let code = self.form(op, wide);
        wide_or_one(wide, self.code.make(self.current, RegClass::Float, code, args, uses))
    }

    /// The register of any value; literals get one here.
    pub fn register(&mut self, x: &Val) -> VReg {
        let (op, args, width) = match *x {
            Val::One(r) | Val::Lanes(r) | Val::Int(r, _) => return r,
            Val::Number(value) => return self.int(self.current, value),
            // Clears the rest of the register as well.
            Val::Literal(0, _) => {
                (isa::XOR, SmallVec::from_elem(Arg::Vector(0, Width::Xmm), 3), Width::Xmm)
            }
            Val::Literal(bits, wide) => {
                let args = smallvec![self.part(0, wide), Arg::Element(bits)];
                (isa::SPREAD, args, self.width(wide))
            }
        };
        let args: SmallVec<[Arg; 4]> = args;
        self.code.make(self.current, RegClass::Float, op.code(self.level, width), &args, &[])
    }

    /// The register of a float.
    pub fn vector(&mut self, x: &Val) -> Emitted<VReg> {
        match x {
            Val::Int(..) | Val::Number(_) => Err(Unsupported("integers as floats".into())),
            Val::One(_) | Val::Lanes(_) | Val::Literal(..) => match self.register(x) {
                mask if mask.class() != RegClass::Float => {
                    Err(Unsupported("masks as floats".into()))
                }
                register => Ok(register),
            },
        }
    }

    /// The last operand of an instruction: from the pool where it is a literal.
    fn last(&mut self, x: &Val, place: (u8, bool), uses: &mut Vec<VReg>) -> Emitted<Arg> {
        match x {
            Val::Literal(bits, _) => Ok(Arg::Pool(*bits)),
            Val::One(_) | Val::Lanes(_) | Val::Int(..) | Val::Number(_) => {
                uses.push(self.vector(x)?);
                Ok(self.part(place.0, place.1))
            }
        }
    }

    /// `op result, x, y`
    pub fn two(&mut self, op: Op, x: &Val, y: &Val) -> Emitted<Val> {
        let wide = x.is_wide() || y.is_wide();
        let mut uses = vec![self.vector(x)?];
        let y = self.last(y, (2, wide), &mut uses)?;
        let args = [self.part(0, wide), self.part(1, wide), y];
        Ok(self.value(op, wide, &args, &uses))
    }

    /// `op result, x` and perhaps a byte.
    pub fn one(&mut self, op: Op, x: &Val, tail: Option<u8>) -> Emitted<Val> {
        let (register, wide) = (self.vector(x)?, x.is_wide());
        let mut args = vec![self.part(0, wide), self.part(1, wide)];
        args.extend(tail.map(byte));
        Ok(self.value(op, wide, &args, &[register]))
    }

    /// The mask of a comparison by a predicate of vcmpps.
    fn ordered(&mut self, predicate: u8, x: &Val, y: &Val) -> Emitted<Val> {
        let wide = x.is_wide() || y.is_wide();
        let mut uses = vec![self.vector(x)?];
        let y = self.last(y, (2, wide), &mut uses)?;
        let (class, result) = match self.level {
            Level::Avx2 => (RegClass::Float, self.part(0, wide)),
            Level::Avx512 => (RegClass::Vector, Arg::Mask(0)),
        };
        let args = [result, self.part(1, wide), y, byte(predicate)];
        let code = self.form(isa::COMPARE, wide);
        Ok(wide_or_one(wide, self.code.make(self.current, class, code, &args, &uses)))
    }

    /// The mask of what is NaN.
    pub fn unordered(&mut self, x: &Val) -> Emitted<Val> {
        self.ordered(UNORDERED, x, x)
    }

    fn compare(&mut self, (order, mirror): (u8, u8), x: &Val, y: &Val) -> Emitted<Val> {
        match x {
            Val::Literal(..) => self.ordered(mirror, y, x),
            Val::One(_) | Val::Lanes(_) | Val::Int(..) | Val::Number(_) => {
                self.ordered(order, x, y)
            }
        }
    }

    /// mask ? x : y
    pub fn blend(&mut self, mask: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let wide = x.is_wide() || y.is_wide();
        let mask = self.register(mask);
        let (class, under) = match self.level {
            Level::Avx2 => (RegClass::Float, self.part(2, wide)),
            Level::Avx512 => (RegClass::Vector, Arg::Under(2)),
        };
        if mask.class() != class {
            return Err(Unsupported("a choice by something else than a mask".into()));
        }
        let mut uses = vec![self.vector(y)?, mask];
        let x = self.last(x, (3, wide), &mut uses)?;
        let args = [self.part(0, wide), self.part(1, wide), x, under];
        Ok(self.value(isa::BLEND, wide, &args, &uses))
    }

    /// A bool as a mask, in every lane where `wide`.
    pub fn mask(&mut self, bool: VReg, wide: bool) -> Val {
        let block = self.current;
        let all = self.code.change(block, Code::Neg_rm64, &[Arg::Gpr(0)], &[bool], 1);
        let (class, code, to) = match self.level {
            Level::Avx2 => (RegClass::Float, Code::VEX_Vmovd_xmm_rm32, Arg::Vector(0, Width::Xmm)),
            Level::Avx512 => (RegClass::Vector, Code::VEX_Kmovd_kr_r32, Arg::Mask(0)),
        };
        let mask = self.code.make(block, class, code, &[to, Arg::Gpr32(1)], &[all]);
        match (wide, self.level) {
            (true, Level::Avx2) => self.broadcast(mask),
            (true, Level::Avx512) => Val::Lanes(mask),
            (false, _) => Val::One(mask),
        }
    }

    /// Lane 0 in every lane.
    pub fn broadcast(&mut self, x: VReg) -> Val {
        let args = [self.part(0, true), Arg::Vector(1, Width::Xmm)];
        self.value(isa::SPLAT, true, &args, &[x])
    }

    /// The larger or smaller, or NaN where either is; the first where they are equal.
    fn extreme(&mut self, op: Op, x: &Val, y: &Val) -> Emitted<Val> {
        // The instructions give the second operand where either is NaN or both are equal.
        let best = self.two(op, y, x)?;
        match y {
            Val::Literal(bits, _) if !f32::from_bits(*bits).is_nan() => Ok(best),
            _ => {
                let nan = self.ordered(UNORDERED, y, y)?;
                self.blend(&nan, y, &best)
            }
        }
    }

    /// f(x, y) of floats.
    pub fn float_binary(&mut self, f: BinaryFn, x: &Val, y: &Val) -> Emitted<Val> {
        let (x, y) = match (f, x) {
            // Literals go last, where they need no register.
            (BinaryFn::Add | BinaryFn::Mul, Val::Literal(..)) => (y, x),
            _ => (x, y),
        };
        match f {
            BinaryFn::Add => self.two(isa::ADD, x, y),
            BinaryFn::Sub => self.two(isa::SUB, x, y),
            BinaryFn::Mul => self.two(isa::MUL, x, y),
            BinaryFn::Div => self.two(isa::DIV, x, y),
            BinaryFn::Max => self.extreme(isa::MAX, x, y),
            BinaryFn::Min => self.extreme(isa::MIN, x, y),
            BinaryFn::Lt => self.compare(LT, x, y),
            BinaryFn::Le => self.compare(LE, x, y),
            BinaryFn::Eq => self.compare(EQ, x, y),
            BinaryFn::Ne => self.compare(NE, x, y),
            BinaryFn::Rem | BinaryFn::Pow | BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => {
                Err(Unsupported(format!("{} of floats in wide code", f.name())))
            }
        }
    }

    /// f(x, y) of indices, or of bools.
    pub fn int_binary(&mut self, f: BinaryFn, x: &Val, y: &Val) -> Emitted<Val> {
        let limit = |v: &Val| match *v {
            Val::Int(_, limit) => limit,
            Val::Number(value) if value >= 0 => value.saturating_add(1),
            Val::Number(_) | Val::One(_) | Val::Lanes(_) | Val::Literal(..) => 0,
        };
        if [x, y].iter().any(|v| !matches!(v, Val::Int(..) | Val::Number(_))) {
            return Err(Unsupported("logic on masks".into()));
        }
        if let &Val::Number(y) = y
            && matches!(f, BinaryFn::Mul | BinaryFn::Div | BinaryFn::Rem)
        {
            return self.by_constant(f, x, limit(x), y);
        }
        let block = match (*x, *y) {
            (Val::Int(a, _), Val::Int(b, _)) => self.block_of(a).max(self.block_of(b)),
            (Val::Int(a, _), _) | (_, Val::Int(a, _)) => self.block_of(a),
            _ => self.current,
        };
        let [a, b] = [x, y].map(|v| match *v {
            Val::Number(value) => self.int(block, value),
            _ => self.register(v),
        });
        let ask = match f {
            BinaryFn::Lt => Ask::Lt,
            BinaryFn::Le => Ask::Le,
            BinaryFn::Eq => Ask::Eq,
            BinaryFn::Ne => Ask::Ne,
            BinaryFn::And | BinaryFn::Or => {
                let code = match f {
                    BinaryFn::And => Code::And_r64_rm64,
                    _ => Code::Or_r64_rm64,
                };
                let args = [Arg::Gpr(0), Arg::Gpr(2)];
                return Ok(Val::Int(self.code.change(block, code, &args, &[a, b], 1), 0));
            }
            BinaryFn::Add => {
                let limit = match (limit(x), limit(y)) {
                    (0, _) | (_, 0) => 0,
                    (a, b) => a.saturating_add(b - 1),
                };
                let sum = self.sum(block, a, b);
                return Ok(self.homed(block, sum, limit));
            }
            BinaryFn::Sub
            | BinaryFn::Mul
            | BinaryFn::Div
            | BinaryFn::Rem
            | BinaryFn::Pow
            | BinaryFn::Max
            | BinaryFn::Min
            | BinaryFn::Xor => {
                return Err(Unsupported(format!("{} of integers in wide code", f.name())));
            }
        };
        Ok(Val::Int(self.code.ask(block, ask, a, b), 2))
    }

    /// A product with a number, or a quotient or remainder where x is known to be small.
    fn by_constant(&mut self, f: BinaryFn, x: &Val, limit: i64, y: i64) -> Emitted<Val> {
        if i32::try_from(y).is_err() || y <= 0 {
            return Err(Unsupported("integer arithmetic with a number that is not small".into()));
        }
        let register = self.register(x);
        let block = self.block_of(register);
        if f == BinaryFn::Mul {
            let limit =
                if limit == 0 { 0 } else { (limit - 1).saturating_mul(y).saturating_add(1) };
            let product = self.times(block, register, y);
            return Ok(self.homed(block, product, limit));
        }
        if limit == 0 {
            return Err(Unsupported("a division of an integer without a known limit".into()));
        }
        let quotient = self.quotient(block, register, y as usize, limit as usize)?;
        match f {
            BinaryFn::Div => Ok(self.homed(block, quotient, (limit - 1) / y + 1)),
            _ => {
                let rest = self.rest(block, register, quotient, y as usize)?;
                Ok(self.homed(block, rest, y.min(limit)))
            }
        }
    }

    /// An integer that is computed in a block.
    fn homed(&mut self, block: usize, register: VReg, limit: i64) -> Val {
        self.homes.insert(register, block);
        Val::Int(register, limit)
    }

    /// f(x) of floats.
    pub fn float_unary(&mut self, f: UnaryFn, x: &Val) -> Emitted<Val> {
        let bits = |bits| Val::Literal(bits, x.is_wide());
        match f {
            UnaryFn::Neg => self.two(isa::XOR, x, &bits(SIGN)),
            UnaryFn::Abs => self.two(isa::AND, x, &bits(MAGNITUDE)),
            UnaryFn::Sqrt => self.one(isa::SQRT, x, None),
            UnaryFn::Round => self.one(isa::ROUND, x, Some(8)),
            UnaryFn::Floor => self.one(isa::ROUND, x, Some(9)),
            UnaryFn::Ceil => self.one(isa::ROUND, x, Some(10)),
            UnaryFn::Recip => self.two(isa::DIV, &bits(ONE), x),
            UnaryFn::Sign => {
                // 1 with the sign of x, or x where that is NaN or 0.
                let sign = self.two(isa::AND, x, &bits(SIGN))?;
                let one = self.two(isa::OR, &sign, &bits(ONE))?;
                let apart = self.ordered(APART, x, &bits(0))?;
                self.blend(&apart, &one, x)
            }
            UnaryFn::Exp
            | UnaryFn::Log
            | UnaryFn::Sin
            | UnaryFn::Cos
            | UnaryFn::Tanh
            | UnaryFn::Erf
            | UnaryFn::Not => Err(Unsupported(format!("{} of floats", f.name()))),
        }
    }

    /// x * y + z. Sums keep their register; polynomials, whose addends are literals, take those
    /// from the pool.
    pub fn fused(&mut self, x: &Val, y: &Val, z: &Val) -> Emitted<Val> {
        // A literal factor goes last as well.
        let (x, y) = match x {
            Val::Literal(..) => (y, x),
            Val::One(_) | Val::Lanes(_) | Val::Int(..) | Val::Number(_) => (x, y),
        };
        let wide = x.is_wide() || y.is_wide() || z.is_wide();
        let (op, first, second, last) = match z {
            Val::Literal(..) => (isa::FMA213, x, y, z),
            Val::One(_) | Val::Lanes(_) | Val::Int(..) | Val::Number(_) => (isa::FMA231, z, x, y),
        };
        let mut uses = vec![self.vector(first)?, self.vector(second)?];
        let last = self.last(last, (3, wide), &mut uses)?;
        let args = [self.part(0, wide), self.part(2, wide), last];
        let code = self.form(op, wide);
        let result = self.code.change(self.current, code, &args, &uses, 1);
        Ok(wide_or_one(wide, result))
    }

    /// `op z, x, y`, which adds to z.
    pub fn added(&mut self, op: Op, z: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let wide = x.is_wide() || y.is_wide();
        self.added_by(self.form(op, wide), z, x, y)
    }

    /// The same of bf16, for which there are instructions in the encoding of AVX-512 only.
    pub fn halves(&mut self, z: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let code = match x.is_wide() || y.is_wide() {
            true => Code::EVEX_Vdpbf16ps_zmm_k1z_zmm_zmmm512b32,
            false => Code::EVEX_Vdpbf16ps_xmm_k1z_xmm_xmmm128b32,
        };
        self.added_by(code, z, x, y)
    }

    fn added_by(&mut self, code: Code, z: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let wide = x.is_wide() || y.is_wide();
        let uses = [self.vector(z)?, self.vector(x)?, self.vector(y)?];
        let args = [self.part(0, wide), self.part(2, wide), self.part(3, wide)];
        Ok(wide_or_one(wide, self.code.change(self.current, code, &args, &uses, 1)))
    }

    /// An element in each lane, so many elements apart: four by four, and then side by side.
    pub fn apart(&mut self, address: &Address, step: i64) -> Emitted<Val> {
        let (code, count) = match self.level {
            Level::Avx2 => (Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8, 8),
            Level::Avx512 => (Code::EVEX_Vinsertf32x4_zmm_k1z_zmm_xmmm128_imm8, 16),
        };
        let xmm = |place| Arg::Vector(place, Width::Xmm);
        let mut whole: Option<VReg> = None;
        for part in 0..count / 4 {
            let mut four: Option<VReg> = None;
            for lane in 0..4 {
                let at = address.after((4 * part + lane) * step * 4)?;
                let (op, mut args, mut uses) = match four {
                    None => (isa::LOAD_ONE, vec![xmm(0), at.operand(1)], vec![]),
                    Some(x) => (isa::INSERT, vec![xmm(0), xmm(1), at.operand(2)], vec![x]),
                };
                args.extend(four.map(|_| byte(lane as u8 * 16)));
                uses.extend(at.registers());
                let code = self.form(op, false);
                four = Some(self.code.make(self.current, RegClass::Float, code, &args, &uses));
            }
            whole = match (whole, four) {
                (Some(low), Some(high)) => {
                    let args = [self.part(0, true), self.part(1, true), xmm(2), byte(part as u8)];
                    let uses = [low, high];
                    Some(self.code.make(self.current, RegClass::Float, code, &args, &uses))
                }
                (_, four) => four,
            };
        }
        whole.map(Val::Lanes).ok_or_else(|| Unsupported("no lanes".into()))
    }

    /// Numbers of lanes, in a register.
    fn order(&mut self, order: [u8; 16]) -> VReg {
        let key = (self.current, order);
        if let Some(&known) = self.orders.get(&key) {
            return known;
        }
        let args = [self.part(0, true), Arg::Order(order)];
        let code = self.form(isa::MOVE, true);
        let register = self.code.make(self.current, RegClass::Float, code, &args, &[]);
        self.orders.insert(key, register);
        register
    }

    /// Lanes of two values, those of the second counted after those of the first.
    pub fn picked(&mut self, x: &Val, y: &Val, order: &[u8]) -> Emitted<Val> {
        let lanes = self.level.lanes() as u8;
        let numbers = |first: u8| -> [u8; 16] {
            std::array::from_fn(|lane| order.get(lane).map_or(0, |o| o.wrapping_sub(first)))
        };
        let [x, y] = [self.vector(x)?, self.vector(y)?];
        if self.level == Level::Avx512 {
            let order = self.order(numbers(0));
            let args = [self.part(0, true), self.part(2, true), self.part(3, true)];
            let code = Code::EVEX_Vpermt2ps_zmm_k1z_zmm_zmmm512b32;
            return Ok(Val::Lanes(self.code.change(self.current, code, &args, &[x, order, y], 1)));
        }
        let mask = order.iter().enumerate().filter(|o| *o.1 >= lanes).map(|o| 1 << o.0).sum();
        let [x, y] = [(x, 0), (y, lanes)].map(|(from, first)| {
            let order = self.order(numbers(first).map(|lane| lane % lanes));
            let args = [self.part(0, true), self.part(1, true), self.part(2, true)];
            let code = Code::VEX_Vpermps_ymm_ymm_ymmm256;
            self.code.make(self.current, RegClass::Float, code, &args, &[order, from])
        });
        let args = [self.part(0, true), self.part(1, true), self.part(2, true), byte(mask)];
        let code = Code::VEX_Vblendps_ymm_ymm_ymmm256_imm8;
        Ok(Val::Lanes(self.code.make(self.current, RegClass::Float, code, &args, &[x, y])))
    }

    /// All lanes of these, folded: lane i with lane i + n / 2, and so on.
    pub fn folded(&mut self, f: BinaryFn, values: &[Val]) -> Emitted<Val> {
        if values.is_empty() || values.iter().any(|v| !v.is_wide()) {
            return Err(Unsupported("a fold of scalars".into()));
        }
        let mut values = values.to_vec();
        while values.len() > 1 {
            let half = values.len() / 2;
            values = (0..half)
                .map(|i| self.float_binary(f, &values[i], &values[i + half]))
                .collect::<Emitted<_>>()?;
        }
        let value = values[0];
        // The larger or smaller of lanes may lose one that is NaN: that is asked once for all.
        let (step, nan) = match f {
            BinaryFn::Max => (Some(isa::MAX), Some(self.unordered(&value)?)),
            BinaryFn::Min => (Some(isa::MIN), Some(self.unordered(&value)?)),
            _ => (None, None),
        };
        let folded = self.folded_lanes(&value, &mut |wide, x, y| match step {
            Some(op) => wide.two(op, x, y),
            None => wide.float_binary(f, x, y),
        })?;
        let Some(nan) = nan else { return Ok(folded) };
        let any = self.any(&nan)?;
        let mask = self.mask(any, false);
        self.blend(&mask, &Val::Literal(f32::NAN.to_bits(), false), &folded)
    }

    /// Whether a mask holds for a lane, as 1 or 0.
    fn any(&mut self, mask: &Val) -> Emitted<VReg> {
        let code = match self.level {
            Level::Avx2 => Code::VEX_Vmovmskps_r32_ymm,
            Level::Avx512 => Code::VEX_Kmovw_r32_kr,
        };
        let from = match self.level {
            Level::Avx2 => self.part(1, true),
            Level::Avx512 => Arg::Mask(1),
        };
        let (mask, block) = (self.register(mask), self.current);
        let lanes = self.code.make(block, RegClass::Int, code, &[Arg::Gpr32(0), from], &[mask]);
        let none = self.int(block, 0);
        Ok(self.code.ask(block, Ask::Ne, lanes, none))
    }

    /// All lanes of a value in lane 0.
    fn folded_lanes(
        &mut self,
        value: &Val,
        step: &mut dyn FnMut(&mut Wide, &Val, &Val) -> Emitted<Val>,
    ) -> Emitted<Val> {
        let mut value = *value;
        if self.level == Level::Avx512 {
            let args = [Arg::Vector(0, Width::Ymm), self.part(1, true), byte(1)];
            let code = Code::EVEX_Vextractf32x8_ymmm256_k1z_zmm_imm8;
            let high = self.moved_lanes(code, &args, &value)?;
            // Lanes 8 and on do not matter any more.
            value = step(self, &value, &Val::Lanes(high))?;
        }
        let args = [Arg::Vector(0, Width::Xmm), self.part(1, true), byte(1)];
        let high = self.moved_lanes(self.form(isa::UPPER, false), &args, &value)?;
        let low = self.vector(&value)?;
        value = step(self, &Val::One(low), &Val::One(high))?;
        for order in [0x4e, 0xb1] {
            let moved = self.one(isa::PERMUTE, &value, Some(order))?;
            value = step(self, &value, &moved)?;
        }
        Ok(value)
    }

    fn moved_lanes(&mut self, code: Code, args: &[Arg], x: &Val) -> Emitted<VReg> {
        let x = self.vector(x)?;
        Ok(self.code.make(self.current, RegClass::Float, code, args, &[x]))
    }
}
