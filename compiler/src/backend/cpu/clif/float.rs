//! Arithmetic of floats, scalars and vectors alike.

use cranelift_codegen::ir::condcodes::FloatCC;
use cranelift_codegen::ir::{InstBuilder, Type, Value, types};

use super::{Clif, LITTLE};
use crate::backend::emit::{Emitted, Unsupported};
use crate::graph::op::{BinaryFn, UnaryFn};

impl Clif<'_> {
    /// One piece of lanes that are read so many elements apart.
    pub(super) fn apart(&mut self, at: &(Value, i32), piece: i64, step: i64) -> Emitted<Value> {
        let count = i64::from(self.piece.lane_count());
        let element = |this: &mut Self, lane: i64| {
            let offset = i64::from(at.1) + (piece * count + lane) * step * 4;
            let far = |_| Unsupported("an offset of more than 31 bits".into());
            let offset = i32::try_from(offset).map_err(far)?;
            Ok(this.b.ins().load(types::F32, Self::memory(), at.0, offset))
        };
        let first = element(self, 0)?;
        if !self.piece.is_vector() {
            return Ok(first);
        }
        let mut whole = self.b.ins().scalar_to_vector(self.piece, first);
        for lane in 1..count {
            let x = element(self, lane)?;
            whole = self.b.ins().insertlane(whole, x, lane as u8);
        }
        Ok(whole)
    }

    /// c ? x : y, c a mask of the comparison of such values.
    pub(super) fn choose(&mut self, c: Value, x: Value, y: Value) -> Value {
        let ty = self.b.func.dfg.value_type(x);
        if ty.is_vector() {
            let mask = self.cast_bits(c, ty);
            self.b.ins().bitselect(mask, x, y)
        } else {
            self.b.ins().select(c, x, y)
        }
    }

    pub(super) fn float_minmax(&mut self, f: BinaryFn, x: Value, y: Value) -> Value {
        // x where it wins or is NaN: the form that becomes one vmaxps or vminps.
        let (a, b) = if f == BinaryFn::Max { (x, y) } else { (y, x) };
        let c = self.b.ins().fcmp(FloatCC::LessThan, a, b);
        let best = self.choose(c, y, x);
        let nan = self.b.ins().fcmp(FloatCC::Unordered, y, y);
        self.choose(nan, y, best)
    }

    pub(super) fn float_binary(&mut self, f: BinaryFn, x: Value, y: Value) -> Emitted<Value> {
        let compare = |this: &mut Self, cc| this.b.ins().fcmp(cc, x, y);
        Ok(match f {
            BinaryFn::Add => self.b.ins().fadd(x, y),
            BinaryFn::Sub => self.b.ins().fsub(x, y),
            BinaryFn::Mul => self.b.ins().fmul(x, y),
            BinaryFn::Div => self.b.ins().fdiv(x, y),
            BinaryFn::Max | BinaryFn::Min => self.float_minmax(f, x, y),
            BinaryFn::Eq => compare(self, FloatCC::Equal),
            BinaryFn::Ne => compare(self, FloatCC::NotEqual),
            BinaryFn::Lt => compare(self, FloatCC::LessThan),
            BinaryFn::Le => compare(self, FloatCC::LessThanOrEqual),
            BinaryFn::Rem => {
                // Exact while the quotient fits into the mantissa.
                let quotient = self.b.ins().fdiv(x, y);
                let whole = self.b.ins().trunc(quotient);
                let negative = self.b.ins().fneg(whole);
                let rest = self.float_fma(negative, y, x);
                let rest = self.other_side(rest, x, y);
                let ty = self.b.func.dfg.value_type(x);
                let infinite = self.float_const(ty, f64::INFINITY);
                let magnitude = self.b.ins().fabs(y);
                let c = self.b.ins().fcmp(FloatCC::Equal, magnitude, infinite);
                // x itself, NaN where that is infinite as well.
                let nothing = self.b.ins().fsub(x, x);
                let whole = self.b.ins().fadd(x, nothing);
                let rest = self.choose(c, whole, rest);
                self.b.ins().fcopysign(rest, x)
            }
            BinaryFn::Pow | BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => {
                return Err(Unsupported(format!("{} of floats", f.name())));
            }
        })
    }

    /// A rest whose sign is not that of x, because the quotient was rounded up to a whole number:
    /// it is one divisor further.
    pub(super) fn other_side(&mut self, rest: Value, x: Value, y: Value) -> Value {
        let ty = self.b.func.dfg.value_type(x);
        let zero = self.float_const(ty, 0.0);
        let one = self.float_const(ty, 1.0);
        let side = self.b.ins().fcopysign(one, x);
        let along = self.b.ins().fmul(rest, side);
        let wrong = self.b.ins().fcmp(FloatCC::LessThan, along, zero);
        let step = self.b.ins().fabs(y);
        let step = self.b.ins().fmul(step, side);
        let moved = self.b.ins().fadd(rest, step);
        self.choose(wrong, moved, rest)
    }

    pub(super) fn float_const(&mut self, ty: Type, v: f64) -> Value {
        match ty {
            types::F64 => self.b.ins().f64const(v),
            types::F32X4 => {
                let one = self.b.ins().f32const(v as f32);
                self.b.ins().splat(types::F32X4, one)
            }
            _ => self.b.ins().f32const(v as f32),
        }
    }

    pub(super) fn shuffle(&mut self, x: Value, order: [u8; 4]) -> Value {
        self.shuffle_both(x, x, order)
    }

    /// Lanes of two vectors, those of the second counted from 4 on.
    pub(super) fn shuffle_both(&mut self, x: Value, y: Value, order: [u8; 4]) -> Value {
        let ty = self.b.func.dfg.value_type(x);
        let [x, y] = [x, y].map(|v| self.b.ins().bitcast(types::I8X16, LITTLE(), v));
        let mask: Vec<u8> = order.iter().flat_map(|&l| (0..4).map(move |k| l * 4 + k)).collect();
        let mask = self.b.func.dfg.immediates.push(mask.as_slice().into());
        let moved = self.b.ins().shuffle(x, y, mask);
        self.b.ins().bitcast(ty, LITTLE(), moved)
    }

    pub(super) fn float_unary(&mut self, f: UnaryFn, x: Value) -> Emitted<Value> {
        let ty = self.b.func.dfg.value_type(x);
        Ok(match f {
            UnaryFn::Neg => self.b.ins().fneg(x),
            UnaryFn::Abs => self.b.ins().fabs(x),
            UnaryFn::Sqrt => self.b.ins().sqrt(x),
            UnaryFn::Floor => self.b.ins().floor(x),
            UnaryFn::Ceil => self.b.ins().ceil(x),
            UnaryFn::Round => self.b.ins().nearest(x),
            UnaryFn::Recip => {
                let one = self.float_const(ty, 1.0);
                self.b.ins().fdiv(one, x)
            }
            UnaryFn::Sign => {
                let (one, zero) = (self.float_const(ty, 1.0), self.float_const(ty, 0.0));
                let minus = self.float_const(ty, -1.0);
                let above = self.b.ins().fcmp(FloatCC::LessThan, zero, x);
                let below = self.b.ins().fcmp(FloatCC::LessThan, x, zero);
                let value = self.choose(below, minus, x);
                self.choose(above, one, value)
            }
            UnaryFn::Exp
            | UnaryFn::Log
            | UnaryFn::Sin
            | UnaryFn::Cos
            | UnaryFn::Tanh
            | UnaryFn::Erf
            | UnaryFn::Not => return Err(Unsupported(format!("{} of floats", f.name()))),
        })
    }

    /// x * y + z, rounded once.
    pub(super) fn float_fma(&mut self, x: Value, y: Value, z: Value) -> Value {
        match self.b.func.dfg.value_type(x) {
            _ if self.has_fma => self.b.ins().fma(x, y, z),
            types::F64 => self.fma_in_parts(x, y, z),
            types::F32X4 => {
                let [low, high] = [false, true].map(|high| {
                    let [x, y, z] = [x, y, z].map(|v| {
                        let v = if high { self.shuffle(v, [2, 3, 2, 3]) } else { v };
                        self.b.ins().fvpromote_low(v)
                    });
                    let product = self.b.ins().fmul(x, y);
                    let sum = self.b.ins().fadd(product, z);
                    self.b.ins().fvdemote(sum)
                });
                // The upper lanes of both are 0.
                let high = self.shuffle(high, [2, 3, 0, 1]);
                let [low, high] = [low, high].map(|v| self.cast_bits(v, types::I32X4));
                let lanes = self.b.ins().bor(low, high);
                self.cast_bits(lanes, types::F32X4)
            }
            _ => {
                // The product is exact in f64; the sum is rounded twice, which changes a result
                // only where the first rounding ends in a tie of f32.
                let [x, y, z] = [x, y, z].map(|v| self.b.ins().fpromote(types::F64, v));
                let product = self.b.ins().fmul(x, y);
                let sum = self.b.ins().fadd(product, z);
                self.b.ins().fdemote(types::F32, sum)
            }
        }
    }

    /// The same of f64, after Dekker: the product as two numbers, and what its sum rounds away.
    fn fma_in_parts(&mut self, x: Value, y: Value, z: Value) -> Value {
        let (product, low) = self.exact_product(x, y);
        let sum = self.b.ins().fadd(product, z);
        let part = self.b.ins().fsub(sum, product);
        let rest = self.b.ins().fsub(sum, part);
        let rest = self.b.ins().fsub(product, rest);
        let other = self.b.ins().fsub(z, part);
        let rest = self.b.ins().fadd(rest, other);
        let rest = self.b.ins().fadd(rest, low);
        let exact = self.b.ins().fadd(sum, rest);
        // Parts of numbers near the largest ones overflow.
        let nan = self.b.ins().fcmp(FloatCC::Unordered, exact, exact);
        self.b.ins().select(nan, sum, exact)
    }

    fn exact_product(&mut self, x: Value, y: Value) -> (Value, Value) {
        let product = self.b.ins().fmul(x, y);
        let [(a, b), (c, d)] = [x, y].map(|v| {
            // The upper half of the digits and the lower one.
            let splitter = self.b.ins().f64const(f64::from(1 << 27) + 1.0);
            let large = self.b.ins().fmul(splitter, v);
            let over = self.b.ins().fsub(large, v);
            let high = self.b.ins().fsub(large, over);
            let low = self.b.ins().fsub(v, high);
            (high, low)
        });
        let mut rest = self.b.ins().fneg(product);
        for (x, y) in [(a, c), (a, d), (b, c), (b, d)] {
            let part = self.b.ins().fmul(x, y);
            rest = self.b.ins().fadd(rest, part);
        }
        (product, rest)
    }
}
