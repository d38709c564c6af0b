//! Functions of numbers and casts, with the results that `graph/scalar.rs` says.

use kiln_runtime::tensor::DType;

use super::isa::{Class, Cmp, Op, Operand, Round, Ty};
use super::kernel::{Ptx, ty};
use crate::backend::emit::{Emitted, Unsupported};
use crate::graph::eval::int_range;
use crate::graph::op::{BinaryFn, UnaryFn};

fn refuse<T>(f: &str, dtype: DType) -> Emitted<T> {
    Err(Unsupported(format!("{f} of {dtype}")))
}

impl Ptx {
    /// A float number of a type.
    fn float(t: Ty, v: f64) -> Operand {
        if t == Ty::F32 { Operand::F32(v as f32) } else { Operand::F64(v) }
    }

    /// The bits of an f32 as an integer.
    pub fn bits_of(&mut self, x: Operand) -> Operand {
        match x {
            Operand::F32(v) => Operand::Int(v.to_bits().into()),
            x => self.same_bits(Ty::F32, Class::R, x),
        }
    }

    /// A short integer in its range again.
    pub fn wrapped(&mut self, dtype: DType, x: Operand) -> Operand {
        let left = match dtype {
            DType::I8 => 24,
            DType::I16 => 16,
            DType::U8 | DType::U16 => {
                let mask = Operand::Int(int_range(dtype).1 as i64);
                return self.calc(Op::And, Ty::B32, &[x, mask]);
            }
            _ => return x,
        };
        let high = self.calc(Op::Shl, Ty::B32, &[x, Operand::Int(left)]);
        self.calc(Op::Shr, Ty::S32, &[high, Operand::Int(left)])
    }

    /// f(x) of one instruction or few.
    pub fn function(&mut self, f: UnaryFn, dtype: DType, x: Operand) -> Emitted<Operand> {
        let t = ty(dtype);
        Ok(match (f, t) {
            (UnaryFn::Not, _) => {
                let not = self.calc(Op::Not, t.bits(), &[x]);
                self.wrapped(dtype, not)
            }
            (UnaryFn::Neg, Ty::F32 | Ty::F64) => self.calc(Op::Neg, t, &[x]),
            (UnaryFn::Abs, Ty::F32 | Ty::F64 | Ty::S32 | Ty::S64) => {
                let magnitude = self.calc(Op::Abs, t, &[x]);
                self.wrapped(dtype, magnitude)
            }
            (UnaryFn::Abs, _) => x,
            (UnaryFn::Neg, _) => {
                let negated = self.calc(Op::Sub, t, &[Operand::Int(0), x]);
                self.wrapped(dtype, negated)
            }
            (UnaryFn::Sign, _) => self.sign(t, x),
            (UnaryFn::Sqrt, _) => self.calc(Op::Sqrt, t, &[x]),
            (UnaryFn::Recip, _) => self.calc(Op::Recip, t, &[x]),
            (UnaryFn::Floor, _) => self.convert(Round::Down, t, t, x),
            (UnaryFn::Ceil, _) => self.convert(Round::Up, t, t, x),
            (UnaryFn::Round, _) => self.convert(Round::Whole, t, t, x),
            _ => return refuse(f.name(), dtype),
        })
    }

    /// -1, 0 or 1; of floats zeros and NaN as they are.
    fn sign(&mut self, t: Ty, x: Operand) -> Operand {
        let [zero, one, minus] = match t.is_float() {
            true => [0.0, 1.0, -1.0].map(|v| Self::float(t, v)),
            false => [0, 1, -1].map(Operand::Int),
        };
        let above = self.set(Cmp::Lt, t, zero, x);
        let below = self.set(Cmp::Lt, t, x, zero);
        let rest = self.choose(t, below, minus, x);
        self.choose(t, above, one, rest)
    }

    /// f(x, y); `dtype` is that of the operands.
    pub fn arithmetic(
        &mut self,
        f: BinaryFn,
        dtype: DType,
        x: Operand,
        y: Operand,
    ) -> Emitted<Operand> {
        let t = ty(dtype);
        let op = match f {
            BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le => {
                return Ok(self.compare(f, t, x, y));
            }
            BinaryFn::Pow => return refuse(f.name(), dtype),
            // Of bools as of numbers that are 0 or 1, of which all but 0 is true.
            BinaryFn::Max | BinaryFn::Add if t == Ty::Pred => Op::Or,
            BinaryFn::Min | BinaryFn::Mul | BinaryFn::Div if t == Ty::Pred => Op::And,
            BinaryFn::Sub if t == Ty::Pred => Op::Xor,
            BinaryFn::Rem if t == Ty::Pred => return refuse(f.name(), dtype),
            BinaryFn::Rem if t.is_float() => return Ok(self.float_rem(t, x, y)),
            BinaryFn::Div | BinaryFn::Rem if !t.is_float() => {
                let result = self.divide(f, t, x, y);
                return Ok(self.wrapped(dtype, result));
            }
            BinaryFn::Max | BinaryFn::Min if t == Ty::F64 => return Ok(self.extreme(f, x, y)),
            BinaryFn::Add => Op::Add,
            BinaryFn::Sub => Op::Sub,
            BinaryFn::Mul => Op::Mul,
            BinaryFn::Div => Op::Div,
            BinaryFn::Rem => Op::Rem,
            BinaryFn::Max => Op::Max,
            BinaryFn::Min => Op::Min,
            BinaryFn::And => Op::And,
            BinaryFn::Or => Op::Or,
            BinaryFn::Xor => Op::Xor,
        };
        let t = if matches!(op, Op::And | Op::Or | Op::Xor) { t.bits() } else { t };
        let result = self.calc(op, t, &[x, y]);
        Ok(match f {
            BinaryFn::Add | BinaryFn::Sub | BinaryFn::Mul => self.wrapped(dtype, result),
            _ => result,
        })
    }

    fn compare(&mut self, f: BinaryFn, t: Ty, x: Operand, y: Operand) -> Operand {
        if t == Ty::Pred {
            let differ = self.calc(Op::Xor, t, &[x, y]);
            return match f {
                BinaryFn::Ne => differ,
                BinaryFn::Eq => self.calc(Op::Not, t, &[differ]),
                _ => {
                    let not = self.calc(Op::Not, t, &[x]);
                    let op = if f == BinaryFn::Lt { Op::And } else { Op::Or };
                    self.calc(op, t, &[not, y])
                }
            };
        }
        let cmp = match f {
            BinaryFn::Eq => Cmp::Eq,
            BinaryFn::Ne => Cmp::Ne,
            BinaryFn::Lt => Cmp::Lt,
            _ => Cmp::Le,
        };
        Operand::Reg(self.set(cmp, t, x, y))
    }

    /// The greater or the less of two f64, NaN where one is.
    fn extreme(&mut self, f: BinaryFn, x: Operand, y: Operand) -> Operand {
        let (a, b) = if f == BinaryFn::Max { (x, y) } else { (y, x) };
        let less = self.set(Cmp::Lt, Ty::F64, a, b);
        let best = self.choose(Ty::F64, less, y, x);
        let nan = self.set(Cmp::Nan, Ty::F64, y, y);
        self.choose(Ty::F64, nan, y, best)
    }

    /// Division that never traps: by 0 gives 0, by -1 negates.
    fn divide(&mut self, f: BinaryFn, t: Ty, x: Operand, y: Operand) -> Operand {
        let op = if f == BinaryFn::Div { Op::Div } else { Op::Rem };
        if matches!(y, Operand::Int(v) | Operand::Long(v) if v > 0) {
            return self.calc(op, t, &[x, y]);
        }
        let (zero, one) = (Operand::Int(0), Operand::Int(1));
        let is_zero = self.set(Cmp::Eq, t, y, zero);
        let mut safe = self.choose(t, is_zero, one, y);
        let mut minus = None;
        if matches!(t, Ty::S32 | Ty::S64) {
            let is_minus = self.set(Cmp::Eq, t, y, Operand::Int(-1));
            safe = self.choose(t, is_minus, one, safe);
            minus = Some(is_minus);
        }
        let mut result = self.calc(op, t, &[x, safe]);
        if let Some(is_minus) = minus {
            let special = match op {
                Op::Div => self.calc(Op::Sub, t, &[zero, x]),
                _ => zero,
            };
            result = self.choose(t, is_minus, special, result);
        }
        self.choose(t, is_zero, zero, result)
    }

    /// The rest of a division, exact while the quotient fits into the mantissa.
    fn float_rem(&mut self, t: Ty, x: Operand, y: Operand) -> Operand {
        let quotient = self.calc(Op::Div, t, &[x, y]);
        let whole = self.convert(Round::Zero, t, t, quotient);
        let negative = self.calc(Op::Neg, t, &[whole]);
        let rest = self.calc(Op::Mad, t, &[negative, y, x]);
        // A rest whose sign is not that of x, because the quotient was rounded up to a whole
        // number: it is one divisor further.
        let zero = Self::float(t, 0.0);
        let side = self.with_sign(t, Self::float(t, 1.0), x);
        let along = self.calc(Op::Mul, t, &[rest, side]);
        let wrong = self.set(Cmp::Lt, t, along, zero);
        let magnitude = self.calc(Op::Abs, t, &[y]);
        let step = self.calc(Op::Mul, t, &[magnitude, side]);
        let moved = self.calc(Op::Add, t, &[rest, step]);
        let rest = self.choose(t, wrong, moved, rest);
        // Of an infinite divisor x itself, NaN where that is infinite as well.
        let infinite = self.set(Cmp::Eq, t, magnitude, Self::float(t, f64::INFINITY));
        let nothing = self.calc(Op::Sub, t, &[x, x]);
        let all = self.calc(Op::Add, t, &[x, nothing]);
        let rest = self.choose(t, infinite, all, rest);
        self.with_sign(t, rest, x)
    }

    /// A number with the sign bit of another.
    fn with_sign(&mut self, t: Ty, x: Operand, sign: Operand) -> Operand {
        let (bits, class, back, top) = match t {
            Ty::F32 => (Ty::B32, Class::R, Class::F, 1i64 << 31),
            _ => (Ty::B64, Class::D, Class::G, i64::MIN),
        };
        let sign = self.same_bits(t, class, sign);
        let sign = self.calc(Op::And, bits, &[sign, Operand::Int(top)]);
        let x = self.calc(Op::Abs, t, &[x]);
        let x = self.same_bits(t, class, x);
        let both = self.calc(Op::Or, bits, &[x, sign]);
        self.same_bits(bits, back, both)
    }

    /// x as another dtype.
    pub fn cast_one(&mut self, from: DType, to: DType, x: Operand) -> Operand {
        let (a, b) = (ty(from), ty(to));
        match (from.is_float(), to.is_float()) {
            (true, true) => {
                let same = match (a, b) {
                    (Ty::F32, Ty::F64) => self.convert(Round::Exact, b, a, x),
                    (Ty::F64, Ty::F32) if to == DType::F16 => x,
                    (Ty::F64, Ty::F32) => self.convert(Round::Nearest, b, a, x),
                    _ => x,
                };
                if from == to { same } else { self.shortened(to, a, same) }
            }
            (true, false) => self.float_to_int(a, to, x),
            (false, true) if a == Ty::Pred => {
                let c = self.held(a, x);
                self.choose(b, c, Self::float(b, 1.0), Self::float(b, 0.0))
            }
            (false, true) => {
                let value = self.convert(Round::Nearest, b, a, x);
                self.shortened(to, b, value)
            }
            (false, false) => self.int_to_int(a, to, x),
        }
    }

    /// A float rounded to a short one, if that is what the dtype is.
    fn shortened(&mut self, to: DType, from: Ty, x: Operand) -> Operand {
        match to {
            DType::F16 => {
                let short = self.convert(Round::Nearest, Ty::F16, from, x);
                self.convert(Round::Exact, Ty::F32, Ty::F16, short)
            }
            DType::BF16 => {
                let short = self.convert(Round::Nearest, Ty::BF16, Ty::F32, x);
                let short = self.convert(Round::Exact, Ty::U32, Ty::U16, short);
                let high = self.calc(Op::Shl, Ty::B32, &[short, Operand::Int(16)]);
                self.same_bits(Ty::B32, Class::F, high)
            }
            DType::TF32 => {
                let short = self.convert(Round::Away, Ty::TF32, Ty::F32, x);
                self.same_bits(Ty::B32, Class::F, short)
            }
            _ => x,
        }
    }

    /// Truncated and saturated, NaN is 0.
    fn float_to_int(&mut self, from: Ty, to: DType, x: Operand) -> Operand {
        let t = ty(to);
        if t == Ty::Pred {
            return Operand::Reg(self.set(Cmp::Ne, from, x, Self::float(from, 0.0)));
        }
        let short = to.bytes() < 4;
        let wide = if short { Ty::S32 } else { t };
        let mut value = self.convert(Round::Zero, wide, from, x);
        if short {
            let (low, high) = int_range(to);
            value = self.calc(Op::Max, wide, &[value, Operand::Int(low as i64)]);
            value = self.calc(Op::Min, wide, &[value, Operand::Int(high as i64)]);
        }
        let nan = self.set(Cmp::Nan, from, x, x);
        self.choose(t, nan, Operand::Int(0), value)
    }

    fn int_to_int(&mut self, from: Ty, to: DType, x: Operand) -> Operand {
        let t = ty(to);
        if t == Ty::Pred {
            return match from {
                Ty::Pred => x,
                _ => Operand::Reg(self.set(Cmp::Ne, from, x, Operand::Int(0))),
            };
        }
        let value = match (from, from.bytes(), t.bytes()) {
            (Ty::Pred, ..) => {
                let c = self.held(from, x);
                return self.choose(t, c, Operand::Int(1), Operand::Int(0));
            }
            (_, 4, 8) | (_, 8, 4) => self.convert(Round::Exact, t, from, x),
            _ => x,
        };
        self.wrapped(to, value)
    }
}
