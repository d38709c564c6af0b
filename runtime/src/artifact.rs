//! A compiled model: its plan, its machine code and its constants.

use crate::code::Code;
use crate::memory::AlignedBytes;
use crate::plan::Plan;

/// Constants in the layout that the kernels read, shared by all runs.
pub type Constants = AlignedBytes;

/// A compiled model.
pub struct Artifact {
    /// Which kernel runs when, on which buffers.
    pub plan: Plan,
    /// The kernels.
    pub code: Code,
    /// What the kernels read besides inputs.
    pub constants: Constants,
}
