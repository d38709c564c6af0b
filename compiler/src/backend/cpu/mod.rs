//! Code for CPUs: one walk over the loops, and emitters behind it. Cranelift can emit every
//! kernel; wide code takes those that it can on x86-64 with AVX2 or AVX-512.

pub mod clif;
pub mod emit;
pub mod math;
mod math64;
pub mod wide;

use self::wide::isa::Level;
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::loops::ir::Loops;
use crate::loops::lower::Target;

/// A CPU: what Cranelift may use, and how wide vectors are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Target triple.
    pub triple: String,
    /// Cranelift's names of the features in use.
    pub features: Vec<&'static str>,
    /// Lanes of f32 in the wide emitter: 16 with AVX-512 F, BW, DQ and VL, 8 with AVX2 and FMA,
    /// and 0 where only Cranelift emits.
    pub wide_lanes: usize,
}

impl Cpu {
    /// The CPU that this runs on. `wide` allows vectors of more than 128 bits.
    pub fn host(wide: bool) -> Cpu {
        let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let level = if wide { host_level() } else { None };
        Cpu { triple, features: host_features(), wide_lanes: level.map_or(0, Level::lanes) }
    }

    /// What loops need to know of it.
    pub fn target(&self) -> Target {
        match Level::of(self.wide_lanes) {
            None => Target { lanes: 4, registers: 11 },
            Some(level) => Target { lanes: level.lanes(), registers: level.registers() },
        }
    }

    /// What a processor must have to run code for this one, by the names of the runtime.
    pub fn required(&self) -> Vec<String> {
        let used = FEATURES.into_iter().filter(|(_, own)| self.features.contains(own));
        let mut required: Vec<&str> = used.map(|(name, _)| name).collect();
        let wide = Level::of(self.wide_lanes).map_or(&[][..], level_features);
        required.extend(wide.iter().filter(|name| !FEATURES.iter().any(|f| f.0 == **name)));
        required.into_iter().map(String::from).collect()
    }
}

/// The widest vectors that this CPU has and that the system saves.
fn host_level() -> Option<Level> {
    let host = kiln_runtime::cpu::host();
    let all = |names: &[&str]| names.iter().all(|name| host.contains(name));
    [Level::Avx512, Level::Avx2].into_iter().find(|&level| all(level_features(level)))
}

/// Features that wide code of that level uses.
fn level_features(level: Level) -> &'static [&'static str] {
    match level {
        Level::Avx512 => &["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"],
        Level::Avx2 => &["avx2", "fma"],
    }
}

/// Features that Cranelift makes use of: names of the runtime, and its own.
const FEATURES: [(&str, &str); 11] = [
    ("sse3", "has_sse3"),
    ("ssse3", "has_ssse3"),
    ("sse4.1", "has_sse41"),
    ("sse4.2", "has_sse42"),
    ("avx", "has_avx"),
    ("avx2", "has_avx2"),
    ("fma", "has_fma"),
    ("bmi1", "has_bmi1"),
    ("bmi2", "has_bmi2"),
    ("lzcnt", "has_lzcnt"),
    ("popcnt", "has_popcnt"),
];

fn host_features() -> Vec<&'static str> {
    let host = kiln_runtime::cpu::host();
    FEATURES.into_iter().filter(|(name, _)| host.contains(name)).map(|(_, own)| own).collect()
}

/// Code of all kernels, one after another, and what people may look at.
#[derive(Clone, Debug, Default)]
pub struct Emitted {
    /// Machine code; kernels start on 64 bytes.
    pub code: Vec<u8>,
    /// Where each kernel starts.
    pub entries: Vec<usize>,
    /// Size of each kernel in bytes.
    pub sizes: Vec<usize>,
    /// Cranelift's text of the kernels that it emitted, where asked for.
    pub clif: String,
    /// Disassembly, where asked for.
    pub asm: String,
}

/// Emits every kernel.
pub fn emit_all(kernels: &[Loops], cpu: &Cpu, verify: bool, texts: bool) -> Result<Emitted> {
    let refuse = |name: &str, why: &emit::Unsupported| {
        Diagnostic::new("K0701", "the CPU backend cannot emit a kernel")
            .node(name)
            .found(why.0.clone())
            .help("an operation or dtype that has no machine code yet; cast to f32 if you can")
    };
    let isa = clif::target_isa(&cpu.triple, &cpu.features, verify)
        .map_err(|why| Error::new(ErrorKind::Incompatible, refuse(&cpu.triple, &why)))?;
    let lanes = cpu.target().lanes;
    let mut out = Emitted::default();
    let mut problems = Vec::new();
    for kernel in kernels {
        let compiled = match cpu.wide_lanes {
            0 => clif::compile(kernel, &*isa, lanes, texts),
            wide => wide::compile(kernel, wide, texts)
                .or_else(|_| clif::compile(kernel, &*isa, lanes, texts)),
        };
        match compiled {
            Ok(compiled) => {
                out.code.resize(out.code.len().next_multiple_of(64), 0xcc);
                out.entries.push(out.code.len());
                out.sizes.push(compiled.code.len());
                out.code.extend(&compiled.code);
                if !compiled.clif.is_empty() {
                    out.clif.push_str(&format!("; {}\n{}\n", kernel.name, compiled.clif));
                }
                if texts {
                    out.asm.push_str(&format!("; {}\n{}\n", kernel.name, compiled.asm));
                }
            }
            Err(why) => problems.push(refuse(&kernel.name, &why)),
        }
    }
    match problems.is_empty() {
        true => Ok(out),
        false => Err(Error { kind: ErrorKind::Model, diagnostics: problems }),
    }
}
