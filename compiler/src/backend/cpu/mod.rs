//! Code for CPUs: one walk over the loops, and emitters behind it. Cranelift can emit every
//! kernel; wide code takes those that it can on x86-64 with AVX2 or AVX-512.

pub mod clif;
pub mod cpuid;
pub mod dot;
pub mod emit;
pub mod features;
mod invariant;
pub mod machine;
pub mod math;
mod math64;
pub mod target;
mod weave;
pub mod wide;

use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::loops::ir::Loops;

pub use self::target::Cpu;

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
    let isa = clif::target_isa(cpu.triple.name, &cpu.flags(), verify)
        .map_err(|why| Error::new(ErrorKind::Incompatible, refuse(cpu.triple.name, &why)))?;
    let mut out = Emitted::default();
    let mut problems = Vec::new();
    for kernel in kernels {
        // A kernel of short rows may have half the lanes.
        let lanes = kernel.lanes().unwrap_or(cpu.lanes);
        let compiled = match cpu.wide_lanes {
            0 => clif::compile(kernel, &*isa, lanes, texts),
            wide => wide::compile(kernel, lanes.min(wide), cpu.dots(), texts)
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
