//! Code for CPUs, by two emitters behind the walk over the loops (`backend/emit.rs`). Cranelift can
//! emit every kernel; wide code takes those that it can on x86-64 with AVX2 or AVX-512.

pub mod clif;
pub mod cpuid;
pub mod features;
pub mod target;
pub mod wide;

use crate::backend::emit;
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::scalar::Dots;
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
            wide if wide < lanes => clif::compile(kernel, &*isa, lanes, texts),
            // Instructions for dot products are those of the whole width.
            wide => {
                let dots = if lanes == wide { cpu.dots() } else { Dots::default() };
                wide::compile(kernel, lanes, dots, texts)
                    .or_else(|_| clif::compile(kernel, &*isa, lanes, texts))
            }
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

#[cfg(test)]
mod tests {
    use super::Cpu;
    use crate::Compiler;
    use crate::graph::op::Type;
    use crate::graph::scalar::Dots;
    use crate::rules::{Budget, optimise};
    use crate::tests::{check, graph_of};
    use kiln_runtime::tensor::{DType, Tensor};

    #[test]
    fn rows_of_half_a_vector_are_no_single_elements() {
        for width in [7, 8, 11, 14, 15, 16] {
            // A depthwise convolution that nothing moves: rows of the image are in lanes.
            let graph = graph_of(&[&[1, 3, 9, width + 2]], |g, x| {
                let w = Tensor::from_slice(&[3, 1, 3, 3], &[0.25f32; 27]);
                let w = g.tensor(&w, &"w".into());
                g.conv([x[0], w], (&[1, 1], &[1, 1]), 3, &"conv".into()).expect("fits");
            });
            assert_eq!(graph.ty(graph.outputs[0].1), &Type::new(DType::F32, &[1, 3, 7, width]));
            check(&graph, 2e-6);
            let v4 = Cpu::named(None, Some("x86-64-v4")).expect("a level of x86-64");
            let program = Compiler::new().target(v4).lower(
                &optimise(&graph, Some(Budget::default()), Dots::default())
                    .expect("a sound graph")
                    .graph,
            );
            let program = program.expect("kernels");
            let lanes = program.kernels.last().and_then(|k| k.lanes());
            let want = match width {
                ..8 => None,
                8..16 => Some(8),
                _ => Some(16),
            };
            assert_eq!(lanes, want, "{width} columns");
        }
    }
}
