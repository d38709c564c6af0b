//! Compiled models for GPUs: text of kernels that the driver assembles, a plan and constants. This
//! is what it takes to run one; `kiln-cuda` does.

use std::ffi::CStr;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::artifact::Constants;
use crate::plan::{DIMS, Plan};

/// The target triple of compiled models for GPUs of NVIDIA's.
pub const TRIPLE: &str = "nvptx64-nvidia-cuda";

/// The number of the machine in the ELF header of such files: the one that NVIDIA's have.
pub const EM_CUDA: u16 = 190;

/// Alignment of ports in device memory: what the driver gives to whole pieces, too.
pub const ALIGN: usize = 256;

/// A kernel of a module. Its parameters are addresses, one for each buffer of a step.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// Its name in the text.
    pub name: String,
    /// Blocks of a launch.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
}

/// The kernels of a plan for one version of the instruction set.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Module {
    /// Version of the instruction set, such as 80: GPUs with this or a later one can run it.
    pub sm: u32,
    /// Where its text is, with the zero byte that ends it.
    pub text: Range<usize>,
    /// Its kernels, in the order of the plan's numbers.
    pub kernels: Vec<Kernel>,
}

/// A compiled model for GPUs.
pub struct GpuArtifact {
    /// Which kernel runs when, on which buffers.
    pub plan: Plan,
    /// The texts of all modules.
    pub text: Vec<u8>,
    /// Kernels for versions of the instruction set.
    pub modules: Vec<Module>,
    /// What the kernels read besides inputs.
    pub constants: Constants,
}

/// Whether a device of a version of the instruction set runs text that is made for one: later ones
/// do, but text for 90 uses what only that version has (`sm_90a`).
pub fn runs(text: u32, device: u32) -> bool {
    text == device || (text < device && text != 90)
}

impl GpuArtifact {
    /// The module that suits a GPU best: of those that it can run, the one for the latest version.
    pub fn module(&self, sm: u32) -> Option<&Module> {
        self.modules.iter().filter(|module| runs(module.sm, sm)).max_by_key(|module| module.sm)
    }

    /// The text of a module; none where it is not in the artifact.
    pub fn text(&self, module: &Module) -> Option<&CStr> {
        CStr::from_bytes_with_nul(self.text.get(module.text.clone())?).ok()
    }

    /// The device memory that it takes.
    pub fn memory(&self) -> DeviceMemory {
        DeviceMemory::of(&self.plan, self.constants.len())
    }
}

/// Bytes of device memory, all that Kiln asks for: the driver's own use comes on top of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DeviceMemory {
    /// Constants, once for all that run the model.
    pub weights: u64,
    /// Intermediate values, for each run at a time.
    pub arena: u64,
    /// Inputs, outputs and lengths of dims, for each run at a time; twice in a pipeline.
    pub ports: u64,
    /// States that are appended to where they lie, for each session.
    pub kept: u64,
}

impl DeviceMemory {
    /// That of a plan, with so many bytes of constants.
    pub fn of(plan: &Plan, constants: usize) -> DeviceMemory {
        let Ports { bytes, kept, .. } = Ports::of(plan);
        let [weights, arena, ports, kept] =
            [constants, plan.arena_bytes, bytes, kept].map(|bytes| bytes as u64);
        DeviceMemory { weights, arena, ports, kept }
    }

    /// What a run takes besides the weights, with so many sets of ports.
    pub fn lane(&self, sets: u64) -> u64 {
        self.arena.saturating_add(self.ports.saturating_mul(sets)).saturating_add(self.kept)
    }

    /// What one run at a time takes.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.lane(1))
    }
}

/// Where a port is in device memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spot {
    /// A byte offset in the memory of ports, which a run fills and reads back.
    Given(usize),
    /// A byte offset in the memory of states that are kept in place.
    Kept(usize),
}

/// Places of ports in device memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ports {
    /// The lengths of dims.
    pub dims: usize,
    /// Each input.
    pub inputs: Vec<Spot>,
    /// Each output.
    pub outputs: Vec<Spot>,
    /// Bytes of all but states that are kept in place.
    pub bytes: usize,
    /// Bytes of these.
    pub kept: usize,
}

impl Ports {
    /// Those of a plan, whose sizes were checked ([`Plan::check`]).
    pub fn of(plan: &Plan) -> Ports {
        let place = |end: &mut usize, bytes: usize| {
            let bytes = bytes.checked_next_multiple_of(ALIGN).unwrap_or(usize::MAX);
            std::mem::replace(end, end.saturating_add(bytes))
        };
        let size = |port: &crate::plan::Port| port.size_bytes().unwrap_or(0);
        let (mut end, mut kept) = (0, 0);
        let dims = place(&mut end, DIMS * 8);
        let input = |(number, port)| match plan.is_input_kept(number) {
            true => Spot::Kept(place(&mut kept, size(port))),
            false => Spot::Given(place(&mut end, size(port))),
        };
        let inputs: Vec<Spot> = plan.inputs.iter().enumerate().map(input).collect();
        let output = |(number, port)| {
            let state = plan.states.iter().find(|state| state.in_place && state.output == number);
            match state {
                Some(state) => inputs[state.input],
                None => Spot::Given(place(&mut end, size(port))),
            }
        };
        let outputs = plan.outputs.iter().enumerate().map(output).collect();
        Ports { dims, inputs, outputs, bytes: end, kept }
    }
}
