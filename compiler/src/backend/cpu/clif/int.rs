//! Arithmetic of integers, which never traps.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, Value, types};
use kiln_runtime::tensor::DType;

use super::Clif;
use crate::backend::emit::{Emitted, Unsupported};
use crate::graph::op::{BinaryFn, UnaryFn};

impl Clif<'_> {
    pub(super) fn int_binary(
        &mut self,
        f: BinaryFn,
        dtype: DType,
        x: Value,
        y: Value,
    ) -> Emitted<Value> {
        let signed = dtype.is_signed();
        let pick = |s, u| if signed { s } else { u };
        Ok(match f {
            BinaryFn::Add => self.b.ins().iadd(x, y),
            BinaryFn::Sub => self.b.ins().isub(x, y),
            BinaryFn::Mul => self.b.ins().imul(x, y),
            BinaryFn::Div | BinaryFn::Rem => self.int_divide(f, signed, x, y),
            BinaryFn::Max => match signed {
                true => self.b.ins().smax(x, y),
                false => self.b.ins().umax(x, y),
            },
            BinaryFn::Min => match signed {
                true => self.b.ins().smin(x, y),
                false => self.b.ins().umin(x, y),
            },
            BinaryFn::Eq => self.b.ins().icmp(IntCC::Equal, x, y),
            BinaryFn::Ne => self.b.ins().icmp(IntCC::NotEqual, x, y),
            BinaryFn::Lt => {
                self.b.ins().icmp(pick(IntCC::SignedLessThan, IntCC::UnsignedLessThan), x, y)
            }
            BinaryFn::Le => {
                let (s, u) = (IntCC::SignedLessThanOrEqual, IntCC::UnsignedLessThanOrEqual);
                self.b.ins().icmp(pick(s, u), x, y)
            }
            BinaryFn::And => self.b.ins().band(x, y),
            BinaryFn::Or => self.b.ins().bor(x, y),
            BinaryFn::Xor => self.b.ins().bxor(x, y),
            BinaryFn::Pow => return Err(Unsupported(format!("pow of {dtype}"))),
        })
    }

    /// Division that never traps: by 0 gives 0, by -1 negates.
    pub(super) fn int_divide(&mut self, f: BinaryFn, signed: bool, x: Value, y: Value) -> Value {
        let ty = self.b.func.dfg.value_type(x);
        // Narrow divisions are the least tried part of the code generator.
        let (x, y) = match (ty.bits() < 32, signed) {
            (false, _) => (x, y),
            (true, true) => {
                (self.b.ins().sextend(types::I32, x), self.b.ins().sextend(types::I32, y))
            }
            (true, false) => {
                (self.b.ins().uextend(types::I32, x), self.b.ins().uextend(types::I32, y))
            }
        };
        let wide = self.b.func.dfg.value_type(x);
        let zero = self.b.ins().iconst(wide, 0);
        let one = self.b.ins().iconst(wide, 1);
        let is_zero = self.b.ins().icmp(IntCC::Equal, y, zero);
        let safe = self.b.ins().select(is_zero, one, y);
        let result = match (f, signed) {
            (BinaryFn::Div, false) => self.b.ins().udiv(x, safe),
            (_, false) => self.b.ins().urem(x, safe),
            (_, true) => {
                let minus = self.b.ins().iconst(wide, -1);
                let is_minus = self.b.ins().icmp(IntCC::Equal, y, minus);
                let safe = self.b.ins().select(is_minus, one, safe);
                let (regular, special) = match f {
                    BinaryFn::Div => (self.b.ins().sdiv(x, safe), self.b.ins().ineg(x)),
                    _ => (self.b.ins().srem(x, safe), zero),
                };
                self.b.ins().select(is_minus, special, regular)
            }
        };
        let result = self.b.ins().select(is_zero, zero, result);
        match wide == ty {
            true => result,
            false => self.b.ins().ireduce(ty, result),
        }
    }

    pub(super) fn int_unary(&mut self, f: UnaryFn, dtype: DType, x: Value) -> Emitted<Value> {
        let ty = self.b.func.dfg.value_type(x);
        Ok(match f {
            UnaryFn::Neg => self.b.ins().ineg(x),
            UnaryFn::Abs if dtype.is_signed() => self.b.ins().iabs(x),
            UnaryFn::Abs => x,
            UnaryFn::Not if dtype == DType::Bool => self.b.ins().bxor_imm_u(x, 1),
            UnaryFn::Not => self.b.ins().bnot(x),
            UnaryFn::Sign => {
                let (one, zero) = (self.b.ins().iconst(ty, 1), self.b.ins().iconst(ty, 0));
                let positive = self.b.ins().icmp(IntCC::NotEqual, x, zero);
                let value = self.b.ins().select(positive, one, zero);
                if !dtype.is_signed() {
                    return Ok(value);
                }
                let minus = self.b.ins().ineg(one);
                let negative = self.b.ins().icmp(IntCC::SignedLessThan, x, zero);
                self.b.ins().select(negative, minus, value)
            }
            UnaryFn::Recip
            | UnaryFn::Sqrt
            | UnaryFn::Exp
            | UnaryFn::Log
            | UnaryFn::Sin
            | UnaryFn::Cos
            | UnaryFn::Tanh
            | UnaryFn::Erf
            | UnaryFn::Floor
            | UnaryFn::Ceil
            | UnaryFn::Round => return Err(Unsupported(format!("{} of {dtype}", f.name()))),
        })
    }
}
