//! The Cranelift emitter: complete by itself, 128-bit vectors, every target that Cranelift has.

use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::immediates::Offset32;
use cranelift_codegen::ir::{
    AbiParam, Block, BlockArg, Endianness, Function, InstBuilder, MemFlagsData, Signature, Type,
    Value, types,
};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa, TargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{Context, isa};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::emit::{Access, Bits, Emitted, Machine, Unsupported, emit};
use crate::graph::op::{BinaryFn, ReduceFn, UnaryFn};
use crate::loops::ir::{BufferId, Loops, Number};

/// Bytes and texts of one function.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Machine code, position independent.
    pub code: Vec<u8>,
    /// Cranelift's text of the function.
    pub clif: String,
    /// Disassembly, where it was asked for.
    pub asm: String,
}

/// The instruction set of a target triple with the named features.
pub fn target_isa(triple: &str, features: &[&str], verify: bool) -> Emitted<OwnedTargetIsa> {
    let fail = |e: &dyn std::fmt::Display| Unsupported(format!("target {triple}: {e}"));
    let mut flags = settings::builder();
    let verify = if verify { "true" } else { "false" };
    // What functions refer to is in the same file, at a distance known when they are linked; `pic`
    // would go through a table of addresses instead.
    for (name, value) in [("opt_level", "speed"), ("enable_verifier", verify), ("is_pic", "false")]
    {
        flags.set(name, value).map_err(|e| fail(&e))?;
    }
    let mut builder = isa::lookup_by_name(triple).map_err(|e| fail(&e))?;
    for feature in features {
        builder.enable(feature).map_err(|e| fail(&e))?;
    }
    builder.finish(settings::Flags::new(flags)).map_err(|e| fail(&e))
}

/// Compiles a kernel.
pub fn compile(loops: &Loops, isa: &dyn TargetIsa, lanes: usize, texts: bool) -> Emitted<Compiled> {
    let mut context = Context::new();
    context.func = Function::with_name_signature(Default::default(), signature());
    let mut scratch = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut context.func, &mut scratch);
    let entry = builder.create_block();
    builder.append_block_params_for_function_params(entry);
    builder.switch_to_block(entry);
    let params = builder.block_params(entry).to_vec();
    let mut bases = Vec::new();
    let mut slot = 0i32;
    for buffer in &loops.buffers {
        bases.push((buffer.scope == crate::loops::ir::Scope::Global).then(|| {
            slot += 8;
            builder.ins().load(types::I64, MemFlagsData::trusted(), params[0], slot - 8)
        }));
    }
    let mut machine = Clif { b: builder, bases, params, lanes, open: Vec::new() };
    emit(loops, &mut machine)?;
    machine.b.ins().return_(&[]);
    machine.b.seal_all_blocks();
    machine.b.finalize(isa.frontend_config());
    let clif = if texts { context.func.display().to_string() } else { String::new() };
    context.set_disasm(texts);
    let compiled = context
        .compile(isa, &mut ControlPlane::default())
        .map_err(|e| Unsupported(format!("Cranelift: {:?}", e.inner)))?;
    if !compiled.buffer.relocs().is_empty() {
        return Err(Unsupported("an operation that this CPU needs a library for".into()));
    }
    let asm = compiled.vcode.clone().unwrap_or_default();
    Ok(Compiled { code: compiled.code_buffer().to_vec(), clif, asm })
}

fn signature() -> Signature {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params = vec![AbiParam::new(types::I64); 3];
    signature
}

/// A value: one SSA value, or several that make up the lanes.
#[derive(Clone)]
enum Val {
    One(Value),
    Lanes(SmallVec<[Value; 4]>),
}

enum Open {
    Loop { header: Block, exit: Block, turn: Value, extent: usize, carried: Vec<Val> },
    Parallel { header: Block, exit: Block, turn: Value },
    Branch { other: Block, exit: Block },
}

struct Clif<'a> {
    b: FunctionBuilder<'a>,
    bases: Vec<Option<Value>>,
    params: Vec<Value>,
    lanes: usize,
    open: Vec<Open>,
}

const LITTLE: fn() -> MemFlagsData = || MemFlagsData::new().with_endianness(Endianness::Little);

fn scalar_type(dtype: DType) -> Type {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => types::F32,
        DType::F64 => types::F64,
        DType::I8 | DType::U8 | DType::Bool => types::I8,
        DType::I16 | DType::U16 => types::I16,
        DType::I32 | DType::U32 => types::I32,
        DType::I64 | DType::U64 => types::I64,
    }
}

fn flat(values: &[Val]) -> Vec<Value> {
    values
        .iter()
        .flat_map(|v| match v {
            Val::One(v) => vec![*v],
            Val::Lanes(v) => v.to_vec(),
        })
        .collect()
}

fn like(shape: &[Val], flat: &[Value]) -> Vec<Val> {
    let mut at = 0;
    shape
        .iter()
        .map(|v| match v {
            Val::One(_) => {
                at += 1;
                Val::One(flat[at - 1])
            }
            Val::Lanes(v) => {
                at += v.len();
                Val::Lanes(flat[at - v.len()..at].iter().copied().collect())
            }
        })
        .collect()
}

fn args(values: &[Value]) -> Vec<BlockArg> {
    values.iter().copied().map(BlockArg::Value).collect()
}

impl Clif<'_> {
    fn memory() -> MemFlagsData {
        MemFlagsData::new().with_notrap()
    }

    fn lift1(&mut self, x: &Val, f: impl Fn(&mut Self, Value) -> Value) -> Val {
        match x {
            Val::One(x) => Val::One(f(self, *x)),
            Val::Lanes(x) => Val::Lanes(x.iter().map(|&x| f(self, x)).collect()),
        }
    }

    fn lift2(&mut self, x: &Val, y: &Val, f: impl Fn(&mut Self, Value, Value) -> Value) -> Val {
        match (x, y) {
            (Val::One(x), Val::One(y)) => Val::One(f(self, *x, *y)),
            (Val::Lanes(x), Val::Lanes(y)) => {
                Val::Lanes(x.iter().zip(y).map(|(&x, &y)| f(self, x, y)).collect())
            }
            _ => unreachable!("operands are as wide as each other"),
        }
    }

    fn one(&self, x: &Val) -> Emitted<Value> {
        match x {
            Val::One(x) => Ok(*x),
            Val::Lanes(_) => Err(Unsupported("a scalar operation in lanes".into())),
        }
    }

    fn cast_bits(&mut self, x: Value, ty: Type) -> Value {
        match self.b.func.dfg.value_type(x) == ty {
            true => x,
            false => self.b.ins().bitcast(ty, LITTLE(), x),
        }
    }

    /// Integer vector type beside a float type.
    fn int_type(&self, x: Value) -> Type {
        match self.b.func.dfg.value_type(x) {
            types::F32X4 => types::I32X4,
            types::F64 => types::I64,
            types::F32 => types::I32,
            other => other,
        }
    }

    /// c ? x : y, c a mask of the comparison of such values.
    fn choose(&mut self, c: Value, x: Value, y: Value) -> Value {
        let ty = self.b.func.dfg.value_type(x);
        if ty.is_vector() {
            let mask = self.cast_bits(c, ty);
            self.b.ins().bitselect(mask, x, y)
        } else {
            self.b.ins().select(c, x, y)
        }
    }

    fn float_minmax(&mut self, f: BinaryFn, x: Value, y: Value) -> Value {
        // x where it wins or is NaN: the form that becomes one vmaxps or vminps.
        let (a, b) = if f == BinaryFn::Max { (x, y) } else { (y, x) };
        let c = self.b.ins().fcmp(FloatCC::LessThan, a, b);
        let best = self.choose(c, y, x);
        let nan = self.b.ins().fcmp(FloatCC::Unordered, y, y);
        self.choose(nan, y, best)
    }

    fn float_binary(&mut self, f: BinaryFn, x: Value, y: Value) -> Emitted<Value> {
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
                let rest = self.b.ins().fma(negative, y, x);
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
    fn other_side(&mut self, rest: Value, x: Value, y: Value) -> Value {
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

    fn float_const(&mut self, ty: Type, v: f64) -> Value {
        match ty {
            types::F64 => self.b.ins().f64const(v),
            types::F32X4 => {
                let one = self.b.ins().f32const(v as f32);
                self.b.ins().splat(types::F32X4, one)
            }
            _ => self.b.ins().f32const(v as f32),
        }
    }

    fn int_binary(&mut self, f: BinaryFn, dtype: DType, x: Value, y: Value) -> Emitted<Value> {
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
    fn int_divide(&mut self, f: BinaryFn, signed: bool, x: Value, y: Value) -> Value {
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

    fn short_to_f32(&mut self, dtype: DType, x: Value) -> Value {
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
    fn f32_to_short(&mut self, dtype: DType, x: Value) -> Value {
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
    fn f32_to_f16(&mut self, bits: Value, x: Value, nan: Value) -> Value {
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

    fn as_int(&mut self, dtype: DType, x: Value) -> Value {
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

    fn int_to_float(&mut self, from: DType, to: DType, x: Value) -> Value {
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

    fn cast_one(&mut self, from: DType, to: DType, x: Value) -> Value {
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

    fn shuffle(&mut self, x: Value, order: [u8; 4]) -> Value {
        let bytes = self.b.ins().bitcast(types::I8X16, LITTLE(), x);
        let mask: Vec<u8> = order.iter().flat_map(|&l| (0..4).map(move |k| l * 4 + k)).collect();
        let mask = self.b.func.dfg.immediates.push(mask.as_slice().into());
        let moved = self.b.ins().shuffle(bytes, bytes, mask);
        self.b.ins().bitcast(types::F32X4, LITTLE(), moved)
    }

    fn float_unary(&mut self, f: UnaryFn, x: Value) -> Emitted<Value> {
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

    fn int_unary(&mut self, f: UnaryFn, dtype: DType, x: Value) -> Emitted<Value> {
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

impl Machine for Clif<'_> {
    type Value = Val;
    type Int = Value;
    type Address = (Value, i32);

    fn loop_begin(&mut self, extent: usize, carried: &[Val]) -> (Value, Vec<Val>) {
        let (header, exit) = (self.b.create_block(), self.b.create_block());
        let zero = self.b.ins().iconst(types::I64, 0);
        let before = flat(carried);
        let turn = self.b.append_block_param(header, types::I64);
        for &v in &before {
            let ty = self.b.func.dfg.value_type(v);
            self.b.append_block_param(header, ty);
            self.b.append_block_param(exit, ty);
        }
        let mut all = vec![zero];
        all.extend(before);
        self.b.ins().jump(header, &args(&all));
        self.b.switch_to_block(header);
        let inside = like(carried, &self.b.block_params(header)[1..]);
        self.open.push(Open::Loop { header, exit, turn, extent, carried: carried.to_vec() });
        (turn, inside)
    }

    fn loop_end(&mut self, next: &[Val]) -> Vec<Val> {
        let Some(Open::Loop { header, exit, turn, extent, carried }) = self.open.pop() else {
            unreachable!("loops end in the order in which they begin")
        };
        let after = self.b.ins().iadd_imm_s(turn, 1);
        let more = self.b.ins().icmp_imm_s(IntCC::SignedLessThan, after, extent as i64);
        let values = flat(next);
        let mut all = vec![after];
        all.extend(&values);
        self.b.ins().brif(more, header, &args(&all), exit, &args(&values));
        self.b.switch_to_block(exit);
        like(&carried, self.b.block_params(exit))
    }

    fn parallel_begin(&mut self) -> Value {
        let (header, exit) = (self.b.create_block(), self.b.create_block());
        let turn = self.b.append_block_param(header, types::I64);
        let begin = self.params[1];
        self.b.ins().jump(header, &args(&[begin]));
        self.b.switch_to_block(header);
        self.open.push(Open::Parallel { header, exit, turn });
        turn
    }

    fn parallel_end(&mut self) {
        let Some(Open::Parallel { header, exit, turn }) = self.open.pop() else {
            unreachable!("loops end in the order in which they begin")
        };
        let after = self.b.ins().iadd_imm_s(turn, 1);
        let more = self.b.ins().icmp(IntCC::SignedLessThan, after, self.params[2]);
        self.b.ins().brif(more, header, &args(&[after]), exit, &[]);
        self.b.switch_to_block(exit);
    }

    fn div_rem(&mut self, x: &Value, divisor: usize, _limit: usize) -> Emitted<(Value, Value)> {
        let d = self.b.ins().iconst(types::I64, divisor as i64);
        let quotient = self.b.ins().udiv(*x, d);
        let product = self.b.ins().imul(quotient, d);
        Ok((quotient, self.b.ins().isub(*x, product)))
    }

    fn branch_begin(&mut self, condition: &Val) -> Emitted<()> {
        let condition = self.one(condition)?;
        let then = self.b.create_block();
        let (other, exit) = (self.b.create_block(), self.b.create_block());
        self.b.ins().brif(condition, then, &[], other, &[]);
        self.b.switch_to_block(then);
        self.open.push(Open::Branch { other, exit });
        Ok(())
    }

    fn branch_else(&mut self) {
        let Some(Open::Branch { other, exit }) = self.open.last() else {
            unreachable!("a branch is open")
        };
        let (other, exit) = (*other, *exit);
        self.b.ins().jump(exit, &[]);
        self.b.switch_to_block(other);
    }

    fn branch_end(&mut self) {
        let Some(Open::Branch { exit, .. }) = self.open.pop() else {
            unreachable!("a branch is open")
        };
        self.b.ins().jump(exit, &[]);
        self.b.switch_to_block(exit);
    }

    fn address(
        &mut self,
        buffer: BufferId,
        terms: &[(Value, i64)],
        offset: i64,
        dynamic: Option<(&Val, i64)>,
    ) -> Emitted<(Value, i32)> {
        let mut base = self.bases[buffer].ok_or_else(|| Unsupported("a register place".into()))?;
        for &(int, bytes) in terms {
            let step = self.b.ins().imul_imm_s(int, bytes);
            base = self.b.ins().iadd(base, step);
        }
        if let Some((dynamic, bytes)) = dynamic {
            let dynamic = self.one(dynamic)?;
            let step = self.b.ins().imul_imm_s(dynamic, bytes);
            base = self.b.ins().iadd(base, step);
        }
        match i32::try_from(offset) {
            Ok(offset) => Ok((base, offset)),
            Err(_) => Ok((self.b.ins().iadd_imm_s(base, offset), 0)),
        }
    }

    fn load(&mut self, dtype: DType, at: &(Value, i32), access: Access) -> Emitted<Val> {
        let (base, offset) = (at.0, Offset32::new(at.1));
        Ok(match (access, dtype) {
            (Access::Lanes, DType::F32) => Val::Lanes(
                (0..self.lanes as i32 / 4)
                    .map(|k| {
                        let offset = at.1 + 16 * k;
                        self.b.ins().load(types::F32X4, Self::memory(), base, offset)
                    })
                    .collect(),
            ),
            (Access::Lanes, _) => return Err(Unsupported(format!("lanes of {dtype}"))),
            (_, DType::F16 | DType::BF16) => {
                let short = self.b.ins().load(types::I16, Self::memory(), base, offset);
                Val::One(self.short_to_f32(dtype, short))
            }
            (_, _) => {
                let ty = scalar_type(dtype);
                let value = Val::One(self.b.ins().load(ty, Self::memory(), base, offset));
                match access {
                    Access::Splat => self.splat(&value)?,
                    Access::One | Access::Lanes => value,
                }
            }
        })
    }

    fn store(&mut self, dtype: DType, at: &(Value, i32), value: &Val) -> Emitted<()> {
        match value {
            Val::One(v) => {
                let v = match dtype {
                    DType::F16 | DType::BF16 => self.f32_to_short(dtype, *v),
                    _ => *v,
                };
                self.b.ins().store(Self::memory(), v, at.0, at.1);
            }
            Val::Lanes(v) => {
                for (k, v) in v.iter().enumerate() {
                    self.b.ins().store(Self::memory(), *v, at.0, at.1 + 16 * k as i32);
                }
            }
        }
        Ok(())
    }

    fn number(&mut self, dtype: DType, number: Number, wide: bool) -> Emitted<Val> {
        let value = match number {
            Number::Float(v) => self.float_const(scalar_type(dtype), v),
            Number::Int(v) => self.b.ins().iconst(scalar_type(dtype), mask(dtype, v)),
        };
        match wide {
            true => self.splat(&Val::One(value)),
            false => Ok(Val::One(value)),
        }
    }

    fn index(&mut self, terms: &[(Value, i64)], offset: i64) -> Emitted<Val> {
        let mut sum = self.b.ins().iconst(types::I64, offset);
        for &(int, coefficient) in terms {
            let step = self.b.ins().imul_imm_s(int, coefficient);
            sum = self.b.ins().iadd(sum, step);
        }
        Ok(Val::One(sum))
    }

    fn unary(&mut self, f: UnaryFn, dtype: DType, x: &Val) -> Emitted<Val> {
        let values = flat(std::slice::from_ref(x));
        let results: Vec<Value> = values
            .into_iter()
            .map(|v| match dtype.is_float() {
                true => self.float_unary(f, v),
                false => self.int_unary(f, dtype, v),
            })
            .collect::<Emitted<_>>()?;
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn binary(&mut self, f: BinaryFn, dtype: DType, x: &Val, y: &Val) -> Emitted<Val> {
        let (a, b) = (flat(std::slice::from_ref(x)), flat(std::slice::from_ref(y)));
        let results: Vec<Value> = a
            .into_iter()
            .zip(b)
            .map(|(x, y)| match dtype.is_float() {
                true => self.float_binary(f, x, y),
                false => self.int_binary(f, dtype, x, y),
            })
            .collect::<Emitted<_>>()?;
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn select(&mut self, _dtype: DType, c: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let [c, a, b] = [c, x, y].map(|v| flat(std::slice::from_ref(v)));
        let results: Vec<Value> =
            c.into_iter().zip(a).zip(b).map(|((c, x), y)| self.choose(c, x, y)).collect();
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn cast(&mut self, from: DType, to: DType, x: &Val) -> Emitted<Val> {
        let x = self.one(x)?;
        Ok(Val::One(self.cast_one(from, to, x)))
    }

    fn fma(&mut self, dtype: DType, x: &Val, y: &Val, z: &Val) -> Emitted<Val> {
        if !dtype.is_float() {
            let product = self.binary(BinaryFn::Mul, dtype, x, y)?;
            return self.binary(BinaryFn::Add, dtype, &product, z);
        }
        let [a, b, c] = [x, y, z].map(|v| flat(std::slice::from_ref(v)));
        let results: Vec<Value> =
            a.into_iter().zip(b).zip(c).map(|((x, y), z)| self.b.ins().fma(x, y, z)).collect();
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn bits(&mut self, op: Bits, x: &Val, y: &Val) -> Emitted<Val> {
        Ok(self.lift2(x, y, |this, x, y| {
            let (float, int) = (this.b.func.dfg.value_type(x), this.int_type(x));
            let (x, y) = (this.cast_bits(x, int), this.cast_bits(y, int));
            let result = match op {
                Bits::Add => this.b.ins().iadd(x, y),
                Bits::And => this.b.ins().band(x, y),
                Bits::Or => this.b.ins().bor(x, y),
                Bits::Xor => this.b.ins().bxor(x, y),
            };
            this.cast_bits(result, float)
        }))
    }

    fn shift(&mut self, x: &Val, left: i32) -> Emitted<Val> {
        Ok(self.lift1(x, |this, x| {
            let (float, int) = (this.b.func.dfg.value_type(x), this.int_type(x));
            let x = this.cast_bits(x, int);
            let result = match left {
                0.. => this.b.ins().ishl_imm_u(x, i64::from(left)),
                _ => this.b.ins().ushr_imm_u(x, i64::from(-left)),
            };
            this.cast_bits(result, float)
        }))
    }

    fn int_to_float(&mut self, x: &Val) -> Emitted<Val> {
        Ok(self.lift1(x, |this, x| {
            let (float, int) = (this.b.func.dfg.value_type(x), this.int_type(x));
            let x = this.cast_bits(x, int);
            this.b.ins().fcvt_from_sint(float, x)
        }))
    }

    fn splat(&mut self, x: &Val) -> Emitted<Val> {
        match x {
            Val::Lanes(_) => Ok(x.clone()),
            Val::One(v) if self.b.func.dfg.value_type(*v) == types::F32 => {
                let lanes = self.b.ins().splat(types::F32X4, *v);
                Ok(Val::Lanes(std::iter::repeat_n(lanes, self.lanes / 4).collect()))
            }
            Val::One(_) => Err(Unsupported("lanes of another type than f32".into())),
        }
    }

    fn fold(&mut self, f: ReduceFn, x: &[Val]) -> Emitted<Val> {
        let mut values = flat(x);
        while values.len() > 1 {
            let half = values.len() / 2;
            values = (0..half)
                .map(|i| self.float_binary(f.binary(DType::F32), values[i], values[i + half]))
                .collect::<Emitted<_>>()?;
        }
        let mut value = values.pop().ok_or_else(|| Unsupported("an empty fold".into()))?;
        for order in [[2, 3, 0, 1], [1, 0, 3, 2]] {
            let other = self.shuffle(value, order);
            value = self.float_binary(f.binary(DType::F32), value, other)?;
        }
        Ok(Val::One(self.b.ins().extractlane(value, 0)))
    }
}

/// The low bits of an integer, as an immediate of its type.
fn mask(dtype: DType, v: i128) -> i64 {
    match scalar_type(dtype) {
        types::I8 => i64::from(v as u8),
        types::I16 => i64::from(v as u16),
        types::I32 => i64::from(v as u32),
        _ => v as i64,
    }
}
