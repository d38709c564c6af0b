//! What loops need to know of a machine.

use kiln_runtime::tensor::DType;

/// What a machine can do, as far as loops need to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Lanes of f32 in a vector register.
    pub lanes: usize,
    /// Vector registers.
    pub registers: usize,
    /// Whether a sum is that of the products that the model writes down, and not of fewer others.
    pub exact: bool,
    /// What weights that are packed are kept as, F32 or BF16.
    pub weights: DType,
    /// Threads of a block of a GPU; 0 for a CPU.
    pub threads: usize,
}

impl Target {
    /// The same with vectors of half the lanes, where an axis fills these and no whole ones: code
    /// of 256 bits on a machine of 512.
    pub fn for_axis(self, extent: usize) -> Target {
        let (lanes, registers) = (self.lanes / 2, self.registers / 2);
        let halves = self.lanes > 8 && (lanes..self.lanes).contains(&extent);
        if halves { Target { lanes, registers, ..self } } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Compiler;
    use crate::backend::cpu::Cpu;
    use crate::graph::op::Type;
    use crate::tests::{check, graph_of};
    use kiln_runtime::tensor::Tensor;

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
            let program = Compiler::new()
                .target(v4)
                .lower(&crate::rules::optimise(&graph, true, false).expect("a sound graph").graph);
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
