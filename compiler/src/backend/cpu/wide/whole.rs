//! Integers of up to 32 bits. In a lane each takes 32 bits and has its value there, whatever its
//! dtype: what is computed is wrapped, and stores take the low bits. Short floats are read and
//! written here as well; in between they are f32.

use iced_x86::Code;
use kiln_runtime::tensor::DType;
use regalloc2::{RegClass, VReg};

use super::address::Address;
use super::isa::{self, Level, Op, Width};
use super::lanes::{Val, byte};
use super::ssa::Arg;
use super::{Wide, f32_only};
use crate::backend::emit::{Access, Emitted, Machine, Unsupported};
use crate::backend::rounded;
use crate::graph::eval::int_range;
use crate::graph::op::BinaryFn;

/// How a short dtype is read: into lanes, and into a general register.
fn loads(dtype: DType) -> Emitted<(Op, Code)> {
    match dtype {
        DType::I16 => Ok((isa::WIDEN_I16, Code::Movsx_r32_rm16)),
        DType::I8 => Ok((isa::WIDEN_I8, Code::Movsx_r32_rm8)),
        DType::U8 => Ok((isa::WIDEN_U8, Code::Movzx_r32_rm8)),
        other => Err(Unsupported(format!("{other} in wide code"))),
    }
}

impl Wide {
    pub(super) fn load_whole(
        &mut self,
        dtype: DType,
        address: &Address,
        access: Access,
    ) -> Emitted<Val> {
        let (widen, one) = match dtype {
            DType::F16 => (isa::WIDEN_F16, Code::Movzx_r32_rm16),
            DType::BF16 => (isa::WIDEN_U16, Code::Movzx_r32_rm16),
            dtype => loads(dtype)?,
        };
        if matches!(access, Access::Lanes(_)) {
            let args = [self.part(0, true), address.operand(1)];
            let value = self.value(widen, true, &args, &address.registers());
            return if dtype == DType::BF16 { self.shift(&value, 16) } else { Ok(value) };
        }
        let (block, args) = (self.current, [Arg::Gpr32(0), address.operand(1)]);
        let low = self.code.make(block, RegClass::Int, one, &args, &address.registers());
        let args = [self.part(0, false), Arg::Gpr32(1)];
        let value = self.value(isa::FROM_GENERAL, false, &args, &[low]);
        let value = match dtype {
            DType::BF16 => self.shift(&value, 16)?,
            DType::F16 => self.one(isa::WIDEN_F16, &value, None)?,
            _ => value,
        };
        match access {
            Access::Splat => {
                let lane = self.vector(&value)?;
                Ok(self.broadcast(lane))
            }
            Access::One | Access::Lanes(_) => Ok(value),
        }
    }

    pub(super) fn store_whole(
        &mut self,
        dtype: DType,
        address: &Address,
        value: &Val,
    ) -> Emitted<()> {
        let value = &match dtype {
            DType::F16 | DType::BF16 => {
                // Lanes have numbers that are rounded.
                let wide = value.is_wide();
                let short =
                    if wide { *value } else { rounded::rounded(self, dtype, value, false)? };
                let upper = rounded::packed(self, dtype, &short, wide)?;
                self.one(isa::SHIFT_SIGNED, &upper, Some(16))?
            }
            dtype => {
                loads(dtype)?;
                *value
            }
        };
        let short = dtype.bytes() == 2;
        if !value.is_wide() {
            let op = if short { isa::STORE_SHORT } else { isa::STORE_BYTE };
            let code = self.form(op, false);
            return self.put(code, address, value, &[self.part(0, false), byte(0)]);
        }
        if self.level == Level::Avx512 {
            let code = match short {
                true => Code::EVEX_Vpmovdw_ymmm256_k1z_zmm,
                false => Code::EVEX_Vpmovdb_xmmm128_k1z_zmm,
            };
            return self.put(code, address, value, &[self.part(0, true)]);
        }
        // Values fit, so nothing saturates.
        let x = self.vector(value)?;
        let args = [self.part(0, true), self.part(1, true), self.part(2, true)];
        let shorts = self.lanes_of(Code::VEX_Vpackssdw_ymm_ymm_ymmm256, &args, &[x, x]);
        let args = [self.part(0, true), self.part(1, true), byte(0x08)];
        let shorts = self.lanes_of(Code::VEX_Vpermq_ymm_ymmm256_imm8, &args, &[shorts]);
        if short {
            let code = Code::VEX_Vmovups_xmmm128_xmm;
            return self.put(code, address, &Val::One(shorts), &[self.part(0, false)]);
        }
        let code = match dtype.is_signed() {
            true => Code::VEX_Vpacksswb_xmm_xmm_xmmm128,
            false => Code::VEX_Vpackuswb_xmm_xmm_xmmm128,
        };
        let args = [0, 1, 2].map(|place| Arg::Vector(place, Width::Xmm));
        let bytes = self.lanes_of(code, &args, &[shorts, shorts]);
        let code = Code::VEX_Vmovq_xmmm64_xmm;
        self.put(code, address, &Val::One(bytes), &[self.part(0, false)])
    }

    fn lanes_of(&mut self, code: Code, args: &[Arg], uses: &[VReg]) -> VReg {
        self.code.make(self.current, RegClass::Float, code, args, uses)
    }

    /// A store of a register and perhaps a byte.
    fn put(&mut self, code: Code, to: &Address, value: &Val, tail: &[Arg]) -> Emitted<()> {
        let mut uses = vec![self.vector(value)?];
        uses.extend(to.registers());
        let args: Vec<Arg> = std::iter::once(to.operand(1)).chain(tail.iter().copied()).collect();
        self.code.effect(self.current, code, &args, &uses);
        Ok(())
    }

    /// The low bits of a dtype, as its value.
    fn wrapped(&mut self, dtype: DType, x: &Val) -> Emitted<Val> {
        let unused = 32 - 8 * dtype.bytes() as u8;
        if unused == 0 {
            return Ok(*x);
        }
        if !dtype.is_signed() {
            return self.two(isa::AND, x, &Val::Literal(u32::MAX >> unused, x.is_wide()));
        }
        let high = self.one(isa::SHIFT_LEFT, x, Some(unused))?;
        self.one(isa::SHIFT_SIGNED, &high, Some(unused))
    }

    /// x / 2^times, towards 0.
    fn halved(&mut self, x: &Val, times: u8) -> Emitted<Val> {
        let sign = self.one(isa::SHIFT_SIGNED, x, Some(31))?;
        let rest = self.one(isa::SHIFT_RIGHT, &sign, Some(32 - times))?;
        let sum = self.two(isa::ADD_INT, x, &rest)?;
        self.one(isa::SHIFT_SIGNED, &sum, Some(times))
    }

    pub(super) fn whole_binary(
        &mut self,
        f: BinaryFn,
        dtype: DType,
        x: &Val,
        y: &Val,
    ) -> Emitted<Val> {
        if let (BinaryFn::Div, DType::I32, &Val::Literal(by, _)) = (f, dtype, y)
            && by.is_power_of_two()
            && (2..1 << 31).contains(&by)
        {
            return self.halved(x, by.trailing_zeros() as u8);
        }
        let (op, wraps) = match f {
            BinaryFn::Add => (isa::ADD_INT, true),
            BinaryFn::Sub => (isa::SUB_INT, true),
            BinaryFn::Mul => (isa::MUL_INT, true),
            BinaryFn::Max => (isa::MAX_INT, false),
            BinaryFn::Min => (isa::MIN_INT, false),
            BinaryFn::Div
            | BinaryFn::Rem
            | BinaryFn::Pow
            | BinaryFn::Eq
            | BinaryFn::Ne
            | BinaryFn::Lt
            | BinaryFn::Le
            | BinaryFn::And
            | BinaryFn::Or
            | BinaryFn::Xor => {
                return Err(Unsupported(format!("{} of {dtype} in wide code", f.name())));
            }
        };
        let value = self.two(op, x, y)?;
        if wraps { self.wrapped(dtype, &value) } else { Ok(value) }
    }

    pub(super) fn whole_cast(&mut self, from: DType, to: DType, x: &Val) -> Emitted<Val> {
        let whole = |dtype: DType| dtype == DType::I32 || loads(dtype).is_ok();
        if whole(from) && to == DType::F32 {
            return self.one(isa::FROM_INT, x, None);
        }
        if whole(from) && whole(to) {
            let ((low, high), (least, most)) = (int_range(from), int_range(to));
            return if least <= low && high <= most { Ok(*x) } else { self.wrapped(to, x) };
        }
        loads(to)?;
        f32_only(from)?;
        let (low, high) = int_range(to);
        let wide = x.is_wide();
        let number = |v: i128| Val::Literal((v as f32).to_bits(), wide);
        // The second operand where the first one is NaN.
        let mut value = self.two(isa::MAX, x, &number(low))?;
        if low != 0 {
            let nan = self.unordered(x)?;
            let zero = self.register(&number(0));
            value = self.blend(&nan, &number(0).like(zero), &value)?;
        }
        let value = self.two(isa::MIN, &value, &number(high))?;
        self.one(isa::TO_INT, &value, None)
    }
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::{DType, Tensor};

    use crate::backend::cpu::wide::tests::{LEVELS, try_agree};
    use crate::graph::eval::{Data, Value};
    use crate::graph::op::Type;
    use crate::loops::eval::eval;
    use crate::loops::ir::Parts;
    use crate::loops::ir::{Buffer, Loops, Scope};
    use crate::loops::text::{dot_name, parse};

    /// Elements of each buffer.
    const COUNT: usize = 96;

    /// Bytes that look random, as the words that tests lend to kernels.
    fn words(buffer: &Buffer, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let words = (buffer.len * buffer.dtype.bytes()).div_ceil(4);
        let next = |_| {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            let bits = state ^ state >> 15;
            match buffer.dtype {
                // Both halves are near 1, so that sums of products are neither too large nor too
                // small for a number.
                DType::BF16 => f32::from_bits(bits & 0x83ff_83ff | 0x3e00_3e00),
                // Near what short integers hold, with halves, and some that are none.
                DType::F32 if bits.is_multiple_of(61) => f32::NAN,
                DType::F32 => (bits >> 16) as f32 * 1.5 - 49_000.0,
                // What was rounded when it was stored.
                DType::TF32 => f32::from_bits(bits & 0xbfff_e000),
                // No bits of a word are those of a NaN.
                _ => f32::from_bits(bits & 0xbfff_ffff),
            }
        };
        (0..words).map(next).collect()
    }

    fn data(buffer: &Buffer, words: &[f32]) -> Data {
        let bytes = &bytemuck::cast_slice(words)[..buffer.len * buffer.dtype.bytes()];
        let tensor = Tensor::from_bytes(buffer.dtype, &[buffer.len], bytes);
        Value::from_tensor(&tensor.expect("as many bytes")).data
    }

    /// Runs a kernel by both emitters and as its loops stand.
    fn check(kernel: &Loops, lanes: usize) {
        let global: Vec<&Buffer> =
            kernel.buffers.iter().filter(|b| b.scope == Scope::Global).collect();
        let before: Vec<Vec<f32>> =
            global.iter().enumerate().map(|(i, b)| words(b, i as u32 + 1)).collect();
        let mut expected: Vec<Data> =
            global.iter().zip(&before).map(|(b, words)| data(b, words)).collect();
        eval(kernel, &mut expected).unwrap();
        let agreed = try_agree(kernel, lanes, &before, 1).expect("wide code takes it");
        for (i, ((buffer, words), want)) in
            global.iter().zip(&agreed.buffers).zip(&expected).enumerate()
        {
            let got =
                Value { ty: Type::new(buffer.dtype, &[buffer.len]), data: data(buffer, words) };
            let want = Value { ty: got.ty.clone(), data: want.clone() };
            if buffer.dtype != DType::F32 || kernel.name == "dot" {
                // As text: a NaN is not equal to itself.
                assert_eq!(format!("{got:?}"), format!("{want:?}"), "b{i} of {}", kernel.name);
            }
        }
    }

    fn each_way(buffers: &str, value: &str, to: DType) {
        for lanes in LEVELS {
            for kind in ["vector", "for"] {
                let text = format!(
                    "kernel \"{value}\" {{ {buffers} b3 : {to}[{COUNT}] out \
                     for i0 in {} {{ {kind} i1 in {lanes} {{ b3[{lanes}*i0 + i1] = {} }} }} }}",
                    COUNT / lanes,
                    value.replace('@', &format!("{lanes}*i0 + i1")),
                );
                let kernel = parse(&text).unwrap_or_else(|e| panic!("{text}: {e}")).remove(0);
                check(&kernel, lanes);
            }
        }
    }

    #[test]
    fn short_integers() {
        let short = [DType::I8, DType::U8, DType::I16, DType::I32];
        for from in short {
            let buffers = format!(
                "b0 : {from}[{COUNT}] arg 0 b1 : {from}[{COUNT}] arg 1 b2 : f32[{COUNT}] arg 2"
            );
            for f in ["add", "sub", "mul", "max", "min"] {
                each_way(&buffers, &format!("{f}(b0[@], b1[@])"), from);
                each_way(&buffers, &format!("{f}(b0[@], b1[7])"), from);
                each_way(&buffers, &format!("{f}(b0[@], 3:{from})"), from);
            }
            if from == DType::I32 {
                each_way(&buffers, "div(b0[@], 4:i32)", from);
                each_way(&buffers, "div(b0[@], 2:i32)", from);
            }
            for to in short {
                each_way(&buffers, &format!("{to}(b0[@])"), to);
                if to != DType::I32 {
                    each_way(&buffers, &format!("{to}(b2[@])"), to);
                    let scaled = "round(div(add(f32(b0[@]), b2[@]), 3.0:f32))";
                    each_way(&buffers, &format!("{to}(add({scaled}, 7.0:f32))"), to);
                }
            }
        }
    }

    #[test]
    fn halves_of_floats() {
        let buffers =
            format!("b0 : bf16[{COUNT}] arg 0 b1 : f32[{COUNT}] arg 1 b2 : f32[{COUNT}] arg 2");
        for index in ["@", "7"] {
            each_way(&buffers, &format!("mul(f32(b0[{index}]), 0.5:f32)"), DType::F32);
            for to in [DType::I8, DType::U8, DType::I16] {
                each_way(&buffers, &format!("{to}(b0[{index}])"), to);
            }
        }
    }

    #[test]
    fn short_floats_are_rounded_to_and_moved() {
        for t in [DType::BF16, DType::F16, DType::TF32] {
            let buffers =
                format!("b0 : {t}[{COUNT}] arg 0 b1 : f32[{COUNT}] arg 1 b2 : {t}[{COUNT}] arg 2");
            each_way(&buffers, &format!("{t}(b1[@])"), t);
            each_way(&buffers, &format!("{t}(mul(f32(b0[@]), b1[@]))"), t);
            each_way(&buffers, &format!("{t}(f32(b0[3]))"), t);
            each_way(&buffers, "b2[@]", t);
            each_way(&buffers, &format!("-1.5:{t}"), t);
            each_way(&buffers, &format!("f32({t}(b1[@]))"), DType::F32);
        }
    }

    #[test]
    fn dot_products_of_words() {
        for parts in Parts::ALL {
            let (dot, count, sum) = (dot_name(parts), parts.count(), parts.sum());
            let ([first, second], len) = (parts.dtypes(), count * COUNT);
            let buffers = format!(
                "b0 : {first}[{len}] arg 0 b1 : {second}[{len}] arg 1 b2 : {sum}[{COUNT}] arg 2"
            );
            for (x, y) in [("#", "#"), ("6", "#"), ("#", "7")] {
                let value = format!("{dot}(word(b0[{x}]), word(b1[{y}]), b2[@])");
                for (lanes, kind) in LEVELS.into_iter().flat_map(|l| [(l, "vector"), (l, "for")]) {
                    let value = value
                        .replace('#', &format!("{}*i0 + {count}*i1", count * lanes))
                        .replace('@', &format!("{lanes}*i0 + i1"));
                    let text = format!(
                        "kernel \"dot\" {{ {buffers} b3 : {sum}[{COUNT}] out \
                         for i0 in {} {{ {kind} i1 in {lanes} {{ \
                         b3[{lanes}*i0 + i1] = {value} }} }} }}",
                        COUNT / lanes,
                    );
                    let kernel = parse(&text).unwrap_or_else(|e| panic!("{text}: {e}")).remove(0);
                    check(&kernel, lanes);
                }
            }
        }
    }
}
