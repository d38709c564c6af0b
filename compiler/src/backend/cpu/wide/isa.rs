//! Vector instructions by what they do, for both instruction sets and in every width.

use iced_x86::Code;

/// An instruction set, with its width of vectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// AVX2, FMA and F16C (x86-64-v3): 16 registers of 256 bits, masks lie in vectors.
    Avx2,
    /// AVX-512 F, BW, DQ and VL (x86-64-v4): 32 registers of 512 bits, masks have registers.
    Avx512,
}

impl Level {
    /// The one whose vectors hold as many f32.
    pub fn of(lanes: usize) -> Option<Level> {
        [Level::Avx2, Level::Avx512].into_iter().find(|l| l.lanes() == lanes)
    }

    /// How many f32 a vector holds.
    pub fn lanes(self) -> usize {
        self.bytes() / 4
    }

    /// Bytes of a vector.
    pub fn bytes(self) -> usize {
        match self {
            Level::Avx2 => 32,
            Level::Avx512 => 64,
        }
    }

    /// How many vector registers there are.
    pub fn registers(self) -> usize {
        match self {
            Level::Avx2 => 16,
            Level::Avx512 => 32,
        }
    }

    /// The width of its vectors.
    pub fn width(self) -> Width {
        match self {
            Level::Avx2 => Width::Ymm,
            Level::Avx512 => Width::Zmm,
        }
    }
}

/// How many bits of a register an instruction works on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    /// 128: scalars, in lane 0.
    Xmm,
    /// 256
    Ymm,
    /// 512
    Zmm,
}

/// A vector instruction: its forms of 128 bits, in VEX and in EVEX encoding.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Op {
    vex: Code,
    evex: Code,
}

impl Op {
    /// The form of a width.
    pub fn code(self, level: Level, width: Width) -> Code {
        let first = match level {
            Level::Avx2 => self.vex,
            Level::Avx512 => self.evex,
        };
        // iced numbers the widths of an instruction in a row; a test holds it to that.
        Code::try_from(first as usize + width as usize).expect("wider forms follow")
    }
}

macro_rules! table {
    ($all:ident $doc:literal: $($(#[$about:meta])* $name:ident: $vex:ident, $evex:ident;)*) => {
        $($(#[$about])* pub const $name: Op = Op { vex: Code::$vex, evex: Code::$evex };)*
        #[doc = $doc]
        #[cfg(test)]
        pub const $all: &[(&str, Op)] = &[$((stringify!($name), $name)),*];
    };
}

table! { WIDE "Instructions of every width.":
    /// x + y
    ADD: VEX_Vaddps_xmm_xmm_xmmm128, EVEX_Vaddps_xmm_k1z_xmm_xmmm128b32;
    /// x - y
    SUB: VEX_Vsubps_xmm_xmm_xmmm128, EVEX_Vsubps_xmm_k1z_xmm_xmmm128b32;
    /// x * y
    MUL: VEX_Vmulps_xmm_xmm_xmmm128, EVEX_Vmulps_xmm_k1z_xmm_xmmm128b32;
    /// x / y
    DIV: VEX_Vdivps_xmm_xmm_xmmm128, EVEX_Vdivps_xmm_k1z_xmm_xmmm128b32;
    /// x > y ? x : y
    MAX: VEX_Vmaxps_xmm_xmm_xmmm128, EVEX_Vmaxps_xmm_k1z_xmm_xmmm128b32;
    /// x < y ? x : y
    MIN: VEX_Vminps_xmm_xmm_xmmm128, EVEX_Vminps_xmm_k1z_xmm_xmmm128b32;
    /// The square root.
    SQRT: VEX_Vsqrtps_xmm_xmmm128, EVEX_Vsqrtps_xmm_k1z_xmmm128b32;
    /// An integral number near x.
    ROUND: VEX_Vroundps_xmm_xmmm128_imm8, EVEX_Vrndscaleps_xmm_k1z_xmmm128b32_imm8;
    /// result * x + y
    FMA213: VEX_Vfmadd213ps_xmm_xmm_xmmm128, EVEX_Vfmadd213ps_xmm_k1z_xmm_xmmm128b32;
    /// x * y + result
    FMA231: VEX_Vfmadd231ps_xmm_xmm_xmmm128, EVEX_Vfmadd231ps_xmm_k1z_xmm_xmmm128b32;
    /// Bits of both.
    AND: VEX_Vandps_xmm_xmm_xmmm128, EVEX_Vandps_xmm_k1z_xmm_xmmm128b32;
    /// Bits of either.
    OR: VEX_Vorps_xmm_xmm_xmmm128, EVEX_Vorps_xmm_k1z_xmm_xmmm128b32;
    /// Bits of one.
    XOR: VEX_Vxorps_xmm_xmm_xmmm128, EVEX_Vxorps_xmm_k1z_xmm_xmmm128b32;
    /// x + y of 32-bit integers.
    ADD_INT: VEX_Vpaddd_xmm_xmm_xmmm128, EVEX_Vpaddd_xmm_k1z_xmm_xmmm128b32;
    /// Bits moved up.
    SHIFT_LEFT: VEX_Vpslld_xmm_xmm_imm8, EVEX_Vpslld_xmm_k1z_xmmm128b32_imm8;
    /// Bits moved down.
    SHIFT_RIGHT: VEX_Vpsrld_xmm_xmm_imm8, EVEX_Vpsrld_xmm_k1z_xmmm128b32_imm8;
    /// i32 as f32.
    FROM_INT: VEX_Vcvtdq2ps_xmm_xmmm128, EVEX_Vcvtdq2ps_xmm_k1z_xmmm128b32;
    /// A mask of a comparison: a vector, or with AVX-512 a mask register.
    COMPARE: VEX_Vcmpps_xmm_xmm_xmmm128_imm8, EVEX_Vcmpps_kr_k1_xmm_xmmm128b32_imm8;
    /// mask ? y : x. The mask is the last operand, or with AVX-512 the mask of the instruction.
    BLEND: VEX_Vblendvps_xmm_xmm_xmmm128_xmm, EVEX_Vblendmps_xmm_k1z_xmm_xmmm128b32;
    /// A vector from memory.
    LOAD: VEX_Vmovups_xmm_xmmm128, EVEX_Vmovups_xmm_k1z_xmmm128;
    /// A vector to memory.
    STORE: VEX_Vmovups_xmmm128_xmm, EVEX_Vmovups_xmmm128_k1z_xmm;
    /// A vector from a register or from aligned memory.
    MOVE: VEX_Vmovaps_xmm_xmmm128, EVEX_Vmovaps_xmm_k1z_xmmm128;
    /// A vector to aligned memory.
    SPILL: VEX_Vmovaps_xmmm128_xmm, EVEX_Vmovaps_xmmm128_k1z_xmm;
    /// An f32 of memory, in every lane.
    SPREAD: VEX_Vbroadcastss_xmm_m32, EVEX_Vbroadcastss_xmm_k1z_xmmm32;
    /// Lane 0, in every lane.
    SPLAT: VEX_Vbroadcastss_xmm_xmm, EVEX_Vbroadcastss_xmm_k1z_xmmm32;
}

table! { NARROW "Instructions that are used in their form of 128 bits alone.":
    /// An f32 from memory.
    LOAD_ONE: VEX_Vmovss_xmm_m32, EVEX_Vmovss_xmm_k1z_m32;
    /// An f32 to memory.
    STORE_ONE: VEX_Vmovss_m32_xmm, EVEX_Vmovss_m32_k1_xmm;
    /// An f32 from memory in place of a lane.
    INSERT: VEX_Vinsertps_xmm_xmm_xmmm32_imm8, EVEX_Vinsertps_xmm_xmm_xmmm32_imm8;
    /// Lanes in another order.
    PERMUTE: VEX_Vpermilps_xmm_xmmm128_imm8, EVEX_Vpermilps_xmm_k1z_xmmm128b32_imm8;
    /// Lanes 4 to 7.
    UPPER: VEX_Vextractf128_xmmm128_ymm_imm8, EVEX_Vextractf32x4_xmmm128_k1z_zmm_imm8;
}

table! { WHOLE "Instructions of integers, of every width.":
    /// x - y of 32-bit integers.
    SUB_INT: VEX_Vpsubd_xmm_xmm_xmmm128, EVEX_Vpsubd_xmm_k1z_xmm_xmmm128b32;
    /// x * y of 32-bit integers.
    MUL_INT: VEX_Vpmulld_xmm_xmm_xmmm128, EVEX_Vpmulld_xmm_k1z_xmm_xmmm128b32;
    /// The larger of 32-bit integers with signs.
    MAX_INT: VEX_Vpmaxsd_xmm_xmm_xmmm128, EVEX_Vpmaxsd_xmm_k1z_xmm_xmmm128b32;
    /// The smaller of 32-bit integers with signs.
    MIN_INT: VEX_Vpminsd_xmm_xmm_xmmm128, EVEX_Vpminsd_xmm_k1z_xmm_xmmm128b32;
    /// Products of 16-bit integers, those of both halves of 32 bits added.
    PAIRS: VEX_Vpmaddwd_xmm_xmm_xmmm128, EVEX_Vpmaddwd_xmm_k1z_xmm_xmmm128;
    /// result + the products of 16-bit integers in 32 bits.
    DOT_PAIRS: VEX_Vpdpwssd_xmm_xmm_xmmm128, EVEX_Vpdpwssd_xmm_k1z_xmm_xmmm128b32;
    /// result + the products of the four bytes in 32 bits, those of x without and those of y with
    /// a sign.
    DOT_QUADS: VEX_Vpdpbusd_xmm_xmm_xmmm128, EVEX_Vpdpbusd_xmm_k1z_xmm_xmmm128b32;
    /// 16-bit integers as 32-bit ones.
    WIDEN_I16: VEX_Vpmovsxwd_xmm_xmmm64, EVEX_Vpmovsxwd_xmm_k1z_xmmm64;
    /// 16-bit numbers without sign as 32-bit ones.
    WIDEN_U16: VEX_Vpmovzxwd_xmm_xmmm64, EVEX_Vpmovzxwd_xmm_k1z_xmmm64;
    /// f16 as f32.
    WIDEN_F16: VEX_Vcvtph2ps_xmm_xmmm64, EVEX_Vcvtph2ps_xmm_k1z_xmmm64;
    /// 8-bit integers as 32-bit ones.
    WIDEN_I8: VEX_Vpmovsxbd_xmm_xmmm32, EVEX_Vpmovsxbd_xmm_k1z_xmmm32;
    /// 8-bit integers without sign as 32-bit ones.
    WIDEN_U8: VEX_Vpmovzxbd_xmm_xmmm32, EVEX_Vpmovzxbd_xmm_k1z_xmmm32;
    /// f32 as i32, without its fraction.
    TO_INT: VEX_Vcvttps2dq_xmm_xmmm128, EVEX_Vcvttps2dq_xmm_k1z_xmmm128b32;
    /// Bits moved down, the sign stays.
    SHIFT_SIGNED: VEX_Vpsrad_xmm_xmm_imm8, EVEX_Vpsrad_xmm_k1z_xmmm128b32_imm8;
}

table! { WHOLE_NARROW "Instructions of integers that are used in their form of 128 bits alone.":
    /// A general register as lane 0.
    FROM_GENERAL: VEX_Vmovd_xmm_rm32, EVEX_Vmovd_xmm_rm32;
    /// The low byte of lane 0 to memory.
    STORE_BYTE: VEX_Vpextrb_r32m8_xmm_imm8, EVEX_Vpextrb_r32m8_xmm_imm8;
    /// The low 16 bits of lane 0 to memory.
    STORE_SHORT: VEX_Vpextrw_r32m16_xmm_imm8, EVEX_Vpextrw_r32m16_xmm_imm8;
}

#[cfg(test)]
mod tests {
    use iced_x86::{Encoder, Instruction, Register};

    use super::*;

    /// What is not the same in the name of a form: register, memory, features of EVEX.
    fn stem(code: Code) -> (String, String) {
        let name = format!("{code:?}");
        let (encoding, rest) = name.split_once('_').unwrap();
        let mnemonic = rest.split_once('_').unwrap().0;
        (encoding.to_string(), mnemonic.to_string())
    }

    #[test]
    fn wider_forms_follow() {
        let forms = [
            (Level::Avx2, "VEX", &[Width::Xmm, Width::Ymm][..]),
            (Level::Avx512, "EVEX", &[Width::Xmm, Width::Ymm, Width::Zmm][..]),
        ];
        for &(name, op) in WIDE.iter().chain(WHOLE) {
            for (level, encoding, widths) in &forms {
                let first = op.code(*level, Width::Xmm);
                for &width in *widths {
                    let code = op.code(*level, width);
                    let (found, mnemonic) = stem(code);
                    assert_eq!((found.as_str(), &mnemonic), (*encoding, &stem(first).1), "{name}");
                    let register = ["xmm", "ymm", "zmm"][width as usize];
                    assert!(format!("{code:?}").contains(register), "{name}: {code:?}");
                }
            }
        }
        for &(name, op) in NARROW.iter().chain(WHOLE_NARROW) {
            for (level, encoding, _) in &forms {
                let code = op.code(*level, Width::Xmm);
                assert_eq!(stem(code).0, *encoding, "{name}");
            }
        }
    }

    #[test]
    fn all_registers_of_avx512_encode() {
        let code = ADD.code(Level::Avx512, Width::Zmm);
        let [x, y, z] = [Register::ZMM31, Register::ZMM17, Register::ZMM8];
        let instruction = Instruction::with3(code, x, y, z).unwrap();
        let size = Encoder::new(64).encode(&instruction, 0).unwrap();
        assert_eq!(size, 6);
    }
}
