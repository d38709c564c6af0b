//! From one type to another, one element at a time.

use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, Value, types};
use kiln_runtime::tensor::DType;

use super::{Clif, LITTLE, scalar_type};

impl Clif<'_> {
    pub(super) fn short_to_f32(&mut self, dtype: DType, x: Value) -> Value {
        let bits = self.b.ins().uextend(types::I32, x);
        if dtype == DType::BF16 {
            let bits = self.b.ins().ishl_imm_u(bits, 16);
            return self.b.ins().bitcast(types::F32, LITTLE(), bits);
        }
        // The exponent is moved by a product, which normalises subnormal numbers as well.
        let magnitude = self.b.ins().band_imm_u(bits, 0x7fff);
        let shifted = self.b.ins().ishl_imm_u(magnitude, 13);
        let small = self.b.ins().bitcast(types::F32, LITTLE(), shifted);
        let scale = self.b.ins().f32const(f32::from_bits(0x7780_0000));
        let value = self.b.ins().fmul(small, scale);
        let value = self.b.ins().bitcast(types::I32, LITTLE(), value);
        let top = self.b.ins().bor_imm_u(shifted, 0x7f80_0000);
        let limit = self.b.ins().iconst(types::I32, 0x7c00);
        let special = self.b.ins().icmp(IntCC::UnsignedGreaterThanOrEqual, magnitude, limit);
        let value = self.b.ins().select(special, top, value);
        let sign = self.b.ins().band_imm_u(bits, 0x8000);
        let sign = self.b.ins().ishl_imm_u(sign, 16);
        let value = self.b.ins().bor(value, sign);
        self.b.ins().bitcast(types::F32, LITTLE(), value)
    }

    /// Rounded to nearest, ties to even.
    pub(super) fn f32_to_short(&mut self, dtype: DType, x: Value) -> Value {
        let bits = self.b.ins().bitcast(types::I32, LITTLE(), x);
        let nan = self.b.ins().fcmp(FloatCC::Unordered, x, x);
        let short = if dtype == DType::BF16 {
            let odd = self.b.ins().ushr_imm_u(bits, 16);
            let odd = self.b.ins().band_imm_u(odd, 1);
            let bias = self.b.ins().iadd_imm_u(odd, 0x7fff);
            let rounded = self.b.ins().iadd(bits, bias);
            let rounded = self.b.ins().ushr_imm_u(rounded, 16);
            let quiet = self.b.ins().iconst(types::I32, 0x7fc0);
            self.b.ins().select(nan, quiet, rounded)
        } else {
            self.f32_to_f16(bits, x, nan)
        };
        self.b.ins().ireduce(types::I16, short)
    }

    /// After Maratyszcza's FP16: rounding falls out of adding a number of the right magnitude.
    pub(super) fn f32_to_f16(&mut self, bits: Value, x: Value, nan: Value) -> Value {
        let magnitude = self.b.ins().fabs(x);
        let up = self.b.ins().f32const(f32::from_bits(0x7780_0000));
        let down = self.b.ins().f32const(f32::from_bits(0x0880_0000));
        let base = self.b.ins().fmul(magnitude, up);
        let base = self.b.ins().fmul(base, down);
        let twice = self.b.ins().iadd(bits, bits);
        let bias = self.b.ins().band_imm_u(twice, 0xff00_0000);
        let least = self.b.ins().iconst(types::I32, 0x7100_0000);
        let bias = self.b.ins().umax(bias, least);
        let bias = self.b.ins().ushr_imm_u(bias, 1);
        let bias = self.b.ins().iadd_imm_u(bias, 0x0780_0000);
        let bias = self.b.ins().bitcast(types::F32, LITTLE(), bias);
        let base = self.b.ins().fadd(base, bias);
        let rounded = self.b.ins().bitcast(types::I32, LITTLE(), base);
        let exponent = self.b.ins().ushr_imm_u(rounded, 13);
        let exponent = self.b.ins().band_imm_u(exponent, 0x7c00);
        let mantissa = self.b.ins().band_imm_u(rounded, 0x0fff);
        let value = self.b.ins().iadd(exponent, mantissa);
        let quiet = self.b.ins().iconst(types::I32, 0x7e00);
        let value = self.b.ins().select(nan, quiet, value);
        let sign = self.b.ins().ushr_imm_u(bits, 16);
        let sign = self.b.ins().band_imm_u(sign, 0x8000);
        self.b.ins().bor(value, sign)
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
            (true, true) => {
                let value = match (from_ty, to_ty) {
                    (types::F32, types::F64) => self.b.ins().fpromote(types::F64, x),
                    (types::F64, types::F32) => self.b.ins().fdemote(types::F32, x),
                    _ => x,
                };
                match to {
                    DType::F16 | DType::BF16 if from != to => {
                        let short = self.f32_to_short(to, value);
                        self.short_to_f32(to, short)
                    }
                    _ => value,
                }
            }
            (true, false) => self.as_int(to, x),
            (false, true) => {
                let value = self.int_to_float(from, to, x);
                match to {
                    DType::F16 | DType::BF16 => {
                        let short = self.f32_to_short(to, value);
                        self.short_to_f32(to, short)
                    }
                    _ => value,
                }
            }
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
