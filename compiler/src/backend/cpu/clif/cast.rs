//! From one type to another, one element at a time.

use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, Value, types};
use kiln_runtime::tensor::DType;

use super::{Clif, LITTLE, Val, scalar_type};
use crate::backend::emit::Emitted;
use crate::backend::rounded;

/// Whether numbers of a dtype are the upper halves of words once they are read.
pub(super) fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

impl Clif<'_> {
    /// What was read of a dtype as its number. Lanes have it in the upper halves of words.
    pub(super) fn as_read(&mut self, dtype: DType, x: Val) -> Emitted<Val> {
        if !is_half(dtype) {
            return Ok(x);
        }
        let Val::One(short) = x else { return rounded::widened(self, dtype, x, true) };
        let bits = self.b.ins().uextend(types::I32, short);
        let bits = self.b.ins().ishl_imm_u(bits, 16);
        let upper = self.b.ins().bitcast(types::F32, LITTLE(), bits);
        rounded::widened(self, dtype, Val::One(upper), false)
    }

    /// The other way round. Lanes have numbers that are rounded.
    pub(super) fn as_stored(&mut self, dtype: DType, x: &Val) -> Emitted<Val> {
        if !is_half(dtype) {
            return Ok(x.clone());
        }
        let Val::One(_) = x else { return rounded::packed(self, dtype, x, true) };
        let x = rounded::rounded(self, dtype, x, false)?;
        let upper = rounded::packed(self, dtype, &x, false)?;
        let bits = self.one(&upper)?;
        let bits = self.b.ins().bitcast(types::I32, LITTLE(), bits);
        let bits = self.b.ins().ushr_imm_u(bits, 16);
        Ok(Val::One(self.b.ins().ireduce(types::I16, bits)))
    }

    pub(super) fn as_int(&mut self, dtype: DType, x: Value) -> Value {
        let ty = scalar_type(dtype);
        if dtype == DType::Bool {
            let from = self.b.func.dfg.value_type(x);
            let zero = self.float_const(from, 0.0);
            return self.b.ins().fcmp(FloatCC::NotEqual, x, zero);
        }
        // Narrow types saturate through a wider one.
        let wide = if ty.bits() < 64 { types::I64 } else { ty };
        let value = match dtype {
            DType::U64 => self.b.ins().fcvt_to_uint_sat(wide, x),
            _ => self.b.ins().fcvt_to_sint_sat(wide, x),
        };
        if wide == ty {
            return value;
        }
        let (low, high) = crate::graph::eval::int_range(dtype);
        let low = self.b.ins().iconst(wide, low as i64);
        let high = self.b.ins().iconst(wide, high as i64);
        let value = self.b.ins().smax(value, low);
        let value = self.b.ins().smin(value, high);
        self.b.ins().ireduce(ty, value)
    }

    pub(super) fn int_to_float(&mut self, from: DType, to: DType, x: Value) -> Value {
        let ty = scalar_type(to);
        let narrow = scalar_type(from).bits() < 64;
        let x = match (narrow, from.is_signed()) {
            (true, true) => self.b.ins().sextend(types::I64, x),
            (true, false) => self.b.ins().uextend(types::I64, x),
            (false, _) => x,
        };
        match from {
            DType::U64 => self.b.ins().fcvt_from_uint(ty, x),
            _ => self.b.ins().fcvt_from_sint(ty, x),
        }
    }

    pub(super) fn cast_one(&mut self, from: DType, to: DType, x: Value) -> Value {
        let (from_ty, to_ty) = (scalar_type(from), scalar_type(to));
        match (from.is_float(), to.is_float()) {
            (true, true) => match (from_ty, to_ty) {
                (types::F32, types::F64) => self.b.ins().fpromote(types::F64, x),
                (types::F64, types::F32) => self.b.ins().fdemote(types::F32, x),
                _ => x,
            },
            (true, false) => self.as_int(to, x),
            (false, true) => self.int_to_float(from, to, x),
            (false, false) if to == DType::Bool => {
                let zero = self.b.ins().iconst(from_ty, 0);
                self.b.ins().icmp(IntCC::NotEqual, x, zero)
            }
            (false, false) if from_ty.bits() < to_ty.bits() => match from.is_signed() {
                true => self.b.ins().sextend(to_ty, x),
                false => self.b.ins().uextend(to_ty, x),
            },
            (false, false) if from_ty.bits() > to_ty.bits() => self.b.ins().ireduce(to_ty, x),
            (false, false) => x,
        }
    }
}

/// The low bits of an integer, as an immediate of its type.
pub(super) fn mask(dtype: DType, v: i128) -> i64 {
    match scalar_type(dtype) {
        types::I8 => i64::from(v as u8),
        types::I16 => i64::from(v as u16),
        types::I32 => i64::from(v as u32),
        _ => v as i64,
    }
}
