//! Lanes: folds of them, and integers in them. Each integer takes 32 bits and has its value there,
//! whatever its dtype, so that the lanes are those of f32.

use cranelift_codegen::ir::{InstBuilder, Type, Value, types};
use kiln_runtime::tensor::DType;

use super::cast::is_half;
use super::{Clif, LITTLE, Val};
use crate::backend::emit::{Emitted, Unsupported};
use crate::graph::eval::int_range;
use crate::graph::op::BinaryFn;

impl Clif<'_> {
    /// What one SSA value of several lanes of integers is.
    fn int_piece(&self) -> Type {
        if self.piece.is_vector() { types::I32X4 } else { types::I32 }
    }

    /// A scalar in all lanes.
    pub(super) fn spread(&mut self, dtype: DType, x: &Val) -> Emitted<Val> {
        let Val::One(v) = *x else { return Ok(x.clone()) };
        if dtype.is_float() {
            return self.splatted(x);
        }
        let bits = self.b.func.dfg.value_type(v).bits();
        let v = match bits {
            32 => v,
            8 | 16 if dtype.is_signed() => self.b.ins().sextend(types::I32, v),
            8 | 16 => self.b.ins().uextend(types::I32, v),
            _ => return Err(Unsupported(format!("lanes of {dtype}"))),
        };
        let lanes = match self.piece.is_vector() {
            true => self.b.ins().splat(types::I32X4, v),
            false => v,
        };
        Ok(Val::Lanes(std::iter::repeat_n(lanes, self.pieces()).collect()))
    }

    /// Piece number `k` of lanes that lie in memory side by side.
    pub(super) fn load_lanes(
        &mut self,
        dtype: DType,
        base: Value,
        at: i32,
        k: usize,
    ) -> Emitted<Value> {
        let vector = self.piece.is_vector();
        if is_half(dtype) {
            // The upper halves of words.
            let value = self.load_lanes(DType::U16, base, at, k)?;
            let value = self.b.ins().ishl_imm_u(value, 16);
            let ty = if vector { types::F32X4 } else { types::F32 };
            return Ok(self.b.ins().bitcast(ty, LITTLE(), value));
        }
        let lanes = self.piece.lane_count() as usize;
        let offset = at + (dtype.bytes() * lanes * k) as i32;
        let mut load = |ty| self.b.ins().load(ty, Self::memory(), base, offset);
        let (from, signed) = match dtype {
            DType::I32 => return Ok(load(if vector { types::I32X4 } else { types::I32 })),
            DType::TF32 => return Ok(load(self.piece)),
            DType::I16 | DType::I8 => (dtype, true),
            DType::U8 | DType::U16 => (dtype, false),
            _ => return Err(Unsupported(format!("lanes of {dtype}"))),
        };
        if !vector {
            let value = load(super::scalar_type(from));
            return Ok(match signed {
                true => self.b.ins().sextend(types::I32, value),
                false => self.b.ins().uextend(types::I32, value),
            });
        }
        if from.bytes() == 2 {
            let value = load(types::I64);
            let value = self.b.ins().scalar_to_vector(types::I64X2, value);
            let value = self.b.ins().bitcast(types::I16X8, LITTLE(), value);
            return Ok(match signed {
                true => self.b.ins().swiden_low(value),
                false => self.b.ins().uwiden_low(value),
            });
        }
        let value = load(types::I32);
        let value = self.b.ins().scalar_to_vector(types::I32X4, value);
        let value = self.b.ins().bitcast(types::I8X16, LITTLE(), value);
        Ok(match signed {
            true => {
                let value = self.b.ins().swiden_low(value);
                self.b.ins().swiden_low(value)
            }
            false => {
                let value = self.b.ins().uwiden_low(value);
                self.b.ins().uwiden_low(value)
            }
        })
    }

    /// Lanes as they lie in memory.
    pub(super) fn packed(&mut self, dtype: DType, x: Value) -> Value {
        if is_half(dtype) {
            // The upper halves of words.
            let piece = self.int_piece();
            let x = self.b.ins().bitcast(piece, LITTLE(), x);
            let upper = self.b.ins().sshr_imm_u(x, 16);
            return self.packed(DType::I16, upper);
        }
        let bytes = dtype.bytes();
        if bytes == 4 {
            return x;
        }
        if !self.piece.is_vector() {
            return self.b.ins().ireduce(super::scalar_type(dtype), x);
        }
        // Values fit, so nothing saturates.
        let short = self.b.ins().snarrow(x, x);
        if bytes == 2 {
            let value = self.b.ins().bitcast(types::I64X2, LITTLE(), short);
            return self.b.ins().extractlane(value, 0);
        }
        let value = match dtype.is_signed() {
            true => self.b.ins().snarrow(short, short),
            false => self.b.ins().unarrow(short, short),
        };
        let value = self.b.ins().bitcast(types::I32X4, LITTLE(), value);
        self.b.ins().extractlane(value, 0)
    }

    /// The low bits of a dtype, as its value.
    fn wrapped(&mut self, dtype: DType, x: Value) -> Value {
        let unused = 32 - 8 * dtype.bytes() as i64;
        match dtype.is_signed() {
            _ if unused == 0 => x,
            true => {
                let high = self.b.ins().ishl_imm_u(x, unused);
                self.b.ins().sshr_imm_u(high, unused)
            }
            false => {
                let piece = self.int_piece();
                let mask = self.number_of(piece, 0xff);
                self.b.ins().band(x, mask)
            }
        }
    }

    fn number_of(&mut self, piece: Type, value: i64) -> Value {
        let value = self.b.ins().iconst(types::I32, i64::from(value as u32));
        if piece.is_vector() { self.b.ins().splat(piece, value) } else { value }
    }

    pub(super) fn lanes_binary(
        &mut self,
        f: BinaryFn,
        dtype: DType,
        x: Value,
        y: Value,
    ) -> Emitted<Value> {
        let value = match f {
            BinaryFn::Add => self.b.ins().iadd(x, y),
            BinaryFn::Sub => self.b.ins().isub(x, y),
            BinaryFn::Mul => self.b.ins().imul(x, y),
            BinaryFn::Max => return Ok(self.b.ins().smax(x, y)),
            BinaryFn::Min => return Ok(self.b.ins().smin(x, y)),
            BinaryFn::Div if !self.piece.is_vector() => self.int_divide(f, true, x, y),
            BinaryFn::Div => (0..4).fold(x, |sum, lane| {
                let [a, b] = [x, y].map(|v| self.b.ins().extractlane(v, lane));
                let quotient = self.int_divide(f, true, a, b);
                self.b.ins().insertlane(sum, quotient, lane)
            }),
            BinaryFn::Rem
            | BinaryFn::Pow
            | BinaryFn::Eq
            | BinaryFn::Ne
            | BinaryFn::Lt
            | BinaryFn::Le
            | BinaryFn::And
            | BinaryFn::Or
            | BinaryFn::Xor => {
                return Err(Unsupported(format!("{} of {dtype} in lanes", f.name())));
            }
        };
        Ok(self.wrapped(dtype, value))
    }

    pub(super) fn lanes_cast(&mut self, from: DType, to: DType, x: Value) -> Emitted<Value> {
        Ok(match (from.is_float(), to.is_float()) {
            // Short floats are f32 since they were read.
            (true, true) if from == to || from.is_rounded() && to == DType::F32 => x,
            (false, true) if to == DType::F32 => self.b.ins().fcvt_from_sint(self.piece, x),
            (false, false) => self.wrapped(to, x),
            (true, false) if to.bytes() < 4 => {
                let piece = self.int_piece();
                let value = self.b.ins().fcvt_to_sint_sat(piece, x);
                let (low, high) = int_range(to);
                let low = self.number_of(piece, low as i64);
                let high = self.number_of(piece, high as i64);
                let value = self.b.ins().smax(value, low);
                self.b.ins().smin(value, high)
            }
            _ => return Err(Unsupported(format!("{from} as {to} in lanes"))),
        })
    }

    /// The products of the low and of the high halves of x and y, added.
    pub(super) fn pairs(&mut self, x: Value, y: Value) -> Value {
        if self.b.func.dfg.value_type(x) != types::I32X4 {
            let low = |this: &mut Self, v| {
                let half = this.b.ins().ireduce(types::I16, v);
                this.b.ins().sextend(types::I32, half)
            };
            let (a, b) = (low(self, x), low(self, y));
            let low = self.b.ins().imul(a, b);
            let (a, b) = (self.b.ins().sshr_imm_u(x, 16), self.b.ins().sshr_imm_u(y, 16));
            let high = self.b.ins().imul(a, b);
            return self.b.ins().iadd(low, high);
        }
        // One instruction on x86-64, which Cranelift knows by this pattern.
        let [x, y] = [x, y].map(|v| self.b.ins().bitcast(types::I16X8, LITTLE(), v));
        let [a, b] = [x, y].map(|v| self.b.ins().swiden_low(v));
        let low = self.b.ins().imul(a, b);
        let [a, b] = [x, y].map(|v| self.b.ins().swiden_high(v));
        let high = self.b.ins().imul(a, b);
        self.b.ins().iadd_pairwise(low, high)
    }

    /// All lanes of these, folded: lane i with lane i + n / 2, and so on.
    pub(super) fn folded(&mut self, f: BinaryFn, mut values: Vec<Value>) -> Emitted<Val> {
        while values.len() > 1 {
            let half = values.len() / 2;
            values = (0..half)
                .map(|i| self.float_binary(f, values[i], values[i + half]))
                .collect::<Emitted<_>>()?;
        }
        let mut value = values.pop().ok_or_else(|| Unsupported("an empty fold".into()))?;
        if !self.piece.is_vector() {
            return Ok(Val::One(value));
        }
        for order in [[2, 3, 0, 1], [1, 0, 3, 2]] {
            let other = self.shuffle(value, order);
            value = self.float_binary(f, value, other)?;
        }
        Ok(Val::One(self.b.ins().extractlane(value, 0)))
    }

    /// A scalar of f32 in all lanes.
    fn splatted(&mut self, x: &Val) -> Emitted<Val> {
        match x {
            Val::Lanes(_) => Ok(x.clone()),
            Val::One(v) if self.b.func.dfg.value_type(*v) == types::F32 => {
                let lanes = match self.piece.is_vector() {
                    true => self.b.ins().splat(self.piece, *v),
                    false => *v,
                };
                Ok(Val::Lanes(std::iter::repeat_n(lanes, self.pieces()).collect()))
            }
            Val::One(_) => Err(Unsupported("lanes of another type than f32".into())),
        }
    }

    /// Lanes of two values, those of the second counted after those of the first.
    pub(super) fn picked(&mut self, x: &Val, y: &Val, order: &[u8]) -> Emitted<Val> {
        let (Val::Lanes(x), Val::Lanes(y)) = (x, y) else {
            return Err(Unsupported("lanes of scalars".into()));
        };
        let from: Vec<Value> = x.iter().chain(y).copied().collect();
        let count = self.piece.lane_count() as usize;
        let pieces = order.chunks_exact(count).map(|order| match order {
            &[a, b, c, d] => self.picked_piece(&from, [a, b, c, d]),
            order => from[order[0] as usize],
        });
        Ok(Val::Lanes(pieces.collect()))
    }

    /// Four lanes of several vectors.
    fn picked_piece(&mut self, from: &[Value], order: [u8; 4]) -> Value {
        let first = order[0] / 4;
        let mut whole = from[first as usize];
        // Where each lane is in what there is so far.
        let mut at = order.map(|o| o % 4);
        let is = |lane: usize, piece: u8| order[lane] / 4 == piece;
        let mut done: [bool; 4] = std::array::from_fn(|lane| is(lane, first));
        let same = [0, 1, 2, 3];
        while let Some(next) = (0..4).find(|&lane| !done[lane]) {
            let piece = order[next] / 4;
            let mix = std::array::from_fn(|lane| match done[lane] {
                true => at[lane],
                false if is(lane, piece) => 4 + order[lane] % 4,
                false => 0,
            });
            whole = self.shuffle_both(whole, from[piece as usize], mix);
            (0..4).for_each(|lane| done[lane] |= is(lane, piece));
            at = same;
        }
        if at == same { whole } else { self.shuffle(whole, at) }
    }
}
