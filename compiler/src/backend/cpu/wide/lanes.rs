//! Arithmetic on values. Scalars lie in lane 0 and are computed as wide as all else.

use iced_x86::{Code, OpKind};
use regalloc2::{RegClass, VReg};

use super::Wide;
use super::ssa::{Arg, Ask};
use crate::backend::cpu::emit::{Emitted, Unsupported};
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

fn byte(value: u8) -> Arg {
    Arg::Imm(OpKind::Immediate8, i64::from(value))
}

impl Wide {
    /// The register of any value; literals get one here.
    pub fn register(&mut self, x: &Val) -> VReg {
        match *x {
            Val::One(r) | Val::Lanes(r) | Val::Int(r, _) => r,
            Val::Number(value) => self.int(self.current, value),
            Val::Literal(0, _) => {
                let args = [Arg::Xmm(0), Arg::Xmm(0), Arg::Xmm(0)];
                self.float(Code::VEX_Vxorps_xmm_xmm_xmmm128, &args, &[])
            }
            Val::Literal(bits, _) => {
                let args = [Arg::Ymm(0), Arg::Pool(bits)];
                self.float(Code::VEX_Vmovups_ymm_ymmm256, &args, &[])
            }
        }
    }

    /// The register of a float.
    pub fn vector(&mut self, x: &Val) -> Emitted<VReg> {
        match x {
            Val::Int(..) | Val::Number(_) => Err(Unsupported("integers as floats".into())),
            Val::One(_) | Val::Lanes(_) | Val::Literal(..) => Ok(self.register(x)),
        }
    }

    fn float(&mut self, code: Code, args: &[Arg], uses: &[VReg]) -> VReg {
        self.code.make(self.current, RegClass::Float, code, args, uses)
    }

    /// The last operand of an instruction: from the pool where it is a literal.
    fn last(&mut self, x: &Val, place: u8, uses: &mut Vec<VReg>) -> Emitted<Arg> {
        match x {
            Val::Literal(bits, _) => Ok(Arg::Pool(*bits)),
            Val::One(_) | Val::Lanes(_) | Val::Int(..) | Val::Number(_) => {
                uses.push(self.vector(x)?);
                Ok(Arg::Ymm(place))
            }
        }
    }

    /// `code result, x, y` and perhaps a byte.
    pub fn two(&mut self, code: Code, x: &Val, y: &Val, tail: Option<u8>) -> Emitted<Val> {
        let mut uses = vec![self.vector(x)?];
        let y_arg = self.last(y, 2, &mut uses)?;
        let mut args = vec![Arg::Ymm(0), Arg::Ymm(1), y_arg];
        args.extend(tail.map(byte));
        let result = self.float(code, &args, &uses);
        Ok(wide_or_one(x.is_wide() || y.is_wide(), result))
    }

    /// `code result, x` and perhaps a byte.
    pub fn one(&mut self, code: Code, x: &Val, tail: Option<u8>) -> Emitted<Val> {
        let register = self.vector(x)?;
        let mut args = vec![Arg::Ymm(0), Arg::Ymm(1)];
        args.extend(tail.map(byte));
        let result = self.float(code, &args, &[register]);
        Ok(wide_or_one(x.is_wide(), result))
    }

    fn compare(&mut self, (order, mirror): (u8, u8), x: &Val, y: &Val) -> Emitted<Val> {
        let code = Code::VEX_Vcmpps_ymm_ymm_ymmm256_imm8;
        match x {
            Val::Literal(..) => self.two(code, y, x, Some(mirror)),
            Val::One(_) | Val::Lanes(_) | Val::Int(..) | Val::Number(_) => {
                self.two(code, x, y, Some(order))
            }
        }
    }

    /// mask ? x : y
    pub fn blend(&mut self, mask: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let mut uses = vec![self.vector(y)?, self.vector(mask)?];
        let x_arg = self.last(x, 3, &mut uses)?;
        let args = [Arg::Ymm(0), Arg::Ymm(1), x_arg, Arg::Ymm(2)];
        let result = self.float(Code::VEX_Vblendvps_ymm_ymm_ymmm256_ymm, &args, &uses);
        Ok(wide_or_one(x.is_wide() || y.is_wide(), result))
    }

    /// A bool as a mask, in every lane where `wide`.
    pub fn mask(&mut self, bool: VReg, wide: bool) -> Val {
        let block = self.current;
        let all = self.code.change(block, Code::Neg_rm64, &[Arg::Gpr(0)], &[bool], 1);
        let args = [Arg::Xmm(0), Arg::Gpr32(1)];
        let one = self.float(Code::VEX_Vmovd_xmm_rm32, &args, &[all]);
        match wide {
            true => self.broadcast(one),
            false => Val::One(one),
        }
    }

    /// Lane 0 in every lane.
    pub fn broadcast(&mut self, x: VReg) -> Val {
        let args = [Arg::Ymm(0), Arg::Xmm(1)];
        Val::Lanes(self.float(Code::VEX_Vbroadcastss_ymm_xmm, &args, &[x]))
    }

    /// The larger or smaller, or NaN where either is; the first where they are equal.
    fn extreme(&mut self, code: Code, x: &Val, y: &Val) -> Emitted<Val> {
        // The instructions give the second operand where either is NaN or both are equal.
        let best = self.two(code, y, x, None)?;
        match y {
            Val::Literal(bits, _) if !f32::from_bits(*bits).is_nan() => Ok(best),
            _ => {
                let code = Code::VEX_Vcmpps_ymm_ymm_ymmm256_imm8;
                let nan = self.two(code, y, y, Some(UNORDERED))?;
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
            BinaryFn::Add => self.two(Code::VEX_Vaddps_ymm_ymm_ymmm256, x, y, None),
            BinaryFn::Sub => self.two(Code::VEX_Vsubps_ymm_ymm_ymmm256, x, y, None),
            BinaryFn::Mul => self.two(Code::VEX_Vmulps_ymm_ymm_ymmm256, x, y, None),
            BinaryFn::Div => self.two(Code::VEX_Vdivps_ymm_ymm_ymmm256, x, y, None),
            BinaryFn::Max => self.extreme(Code::VEX_Vmaxps_ymm_ymm_ymmm256, x, y),
            BinaryFn::Min => self.extreme(Code::VEX_Vminps_ymm_ymm_ymmm256, x, y),
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
        let round = Code::VEX_Vroundps_ymm_ymmm256_imm8;
        match f {
            UnaryFn::Neg => self.two(Code::VEX_Vxorps_ymm_ymm_ymmm256, x, &bits(SIGN), None),
            UnaryFn::Abs => self.two(Code::VEX_Vandps_ymm_ymm_ymmm256, x, &bits(MAGNITUDE), None),
            UnaryFn::Sqrt => self.one(Code::VEX_Vsqrtps_ymm_ymmm256, x, None),
            UnaryFn::Round => self.one(round, x, Some(8)),
            UnaryFn::Floor => self.one(round, x, Some(9)),
            UnaryFn::Ceil => self.one(round, x, Some(10)),
            UnaryFn::Recip => self.two(Code::VEX_Vdivps_ymm_ymm_ymmm256, &bits(ONE), x, None),
            UnaryFn::Sign => {
                // 1 with the sign of x, or x where that is NaN or 0.
                let sign = self.two(Code::VEX_Vandps_ymm_ymm_ymmm256, x, &bits(SIGN), None)?;
                let one = self.two(Code::VEX_Vorps_ymm_ymm_ymmm256, &sign, &bits(ONE), None)?;
                let code = Code::VEX_Vcmpps_ymm_ymm_ymmm256_imm8;
                let apart = self.two(code, x, &bits(0), Some(APART))?;
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
        let (code, first, second, last) = match z {
            Val::Literal(..) => (Code::VEX_Vfmadd213ps_ymm_ymm_ymmm256, x, y, z),
            Val::One(_) | Val::Lanes(_) | Val::Int(..) | Val::Number(_) => {
                (Code::VEX_Vfmadd231ps_ymm_ymm_ymmm256, z, x, y)
            }
        };
        let mut uses = vec![self.vector(first)?, self.vector(second)?];
        let last = self.last(last, 3, &mut uses)?;
        let args = [Arg::Ymm(0), Arg::Ymm(2), last];
        let result = self.code.change(self.current, code, &args, &uses, 1);
        Ok(wide_or_one(wide, result))
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
        let whole = self.register(&values[0]);
        let args = [Arg::Xmm(0), Arg::Ymm(1), byte(1)];
        let high = self.float(Code::VEX_Vextractf128_xmmm128_ymm_imm8, &args, &[whole]);
        let mut value = self.float_binary(f, &Val::One(whole), &Val::One(high))?;
        for order in [0x4e, 0xb1] {
            let register = self.register(&value);
            let args = [Arg::Xmm(0), Arg::Xmm(1), byte(order)];
            let moved = self.float(Code::VEX_Vpermilps_xmm_xmmm128_imm8, &args, &[register]);
            value = self.float_binary(f, &value, &Val::One(moved))?;
        }
        Ok(value)
    }
}
