//! What loops need to know of a machine.

/// What a machine can do, as far as loops need to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Lanes of f32 in a vector register.
    pub lanes: usize,
    /// Vector registers.
    pub registers: usize,
    /// Whether a sum is that of the products that the model writes down, and not of fewer others.
    pub exact: bool,
    /// Whether products of bf16 are summed two at a time.
    pub halves: bool,
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
