//! Why a model does not run on a GPU.

use kiln_runtime::gpu::DeviceMemory;
use kiln_runtime::session::RunError;

use crate::driver::{Device, Fault};

/// Why a model does not run on a GPU.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// This machine has no driver.
    #[error("no driver of NVIDIA's was found on this machine")]
    NoDriver,
    /// The driver lacks functions.
    #[error("the driver of NVIDIA's is too old: it has no `{symbol}`")]
    OldDriver {
        /// The first one that is missing.
        symbol: &'static str,
    },
    /// The driver does not start.
    #[error("the driver of NVIDIA's does not start: {0}")]
    Start(Fault),
    /// There is no device of that number.
    #[error("there is no CUDA device {ordinal}: this machine has {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The kernels are for later devices.
    #[error("device {} ({}) has sm_{}, the model was compiled for sm_{}",
        device.ordinal, device.name, device.sm, list(made_for))]
    Architecture {
        /// The device.
        device: Device,
        /// What the model has kernels for.
        made_for: Vec<u32>,
    },
    /// The driver does not take the kernels.
    #[error("the driver does not assemble the kernels for sm_{sm}: {fault}")]
    Assembly {
        /// The version that they are for.
        sm: u32,
        /// What it says.
        fault: Fault,
    },
    /// The device has no memory for the model.
    #[error(
        "device memory for {what} is missing: {needed} bytes, {free} of {all} are free; {fault}"
    )]
    Memory {
        /// What it is for.
        what: &'static str,
        /// How much is asked for.
        needed: u64,
        /// How much is free.
        free: u64,
        /// How much the device has.
        all: u64,
        /// All that the model takes.
        memory: DeviceMemory,
        /// What the driver says.
        fault: Fault,
    },
    /// The model takes more than it may.
    #[error("the model takes {needed} bytes of device memory, {limit} are allowed")]
    Limit {
        /// How much one run takes, with the weights.
        needed: u64,
        /// What is allowed.
        limit: u64,
        /// All that the model takes.
        memory: DeviceMemory,
    },
    /// A step of the model fails.
    #[error("`{step}` fails on the device: {fault}")]
    Step {
        /// What it computes, made of names of the model.
        step: String,
        /// The name of its kernel.
        kernel: String,
        /// What the driver says.
        fault: Fault,
    },
    /// Another call fails.
    #[error("{what}: {fault}")]
    Driver {
        /// What was done.
        what: &'static str,
        /// What the driver says.
        fault: Fault,
    },
    /// An artifact whose parts do not fit together.
    #[error("the compiled model cannot run on a GPU: {0}")]
    Artifact(String),
    /// The tensors of a run do not fit.
    #[error(transparent)]
    Run(#[from] RunError),
}

fn list(versions: &[u32]) -> String {
    versions.iter().map(u32::to_string).collect::<Vec<_>>().join(", sm_")
}

impl CudaError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            CudaError::NoDriver => {
                "install the driver (libcuda.so.1 must be where libraries are looked for); an .onnx \
                 file runs on the CPU as well: --device cpu, or --fallback cpu"
            }
            CudaError::OldDriver { .. } => "install a driver of version 525 (CUDA 12.0) or later",
            CudaError::Start(_) => "`nvidia-smi` shows whether the driver works",
            CudaError::NoDevice { .. } => {
                "`kiln doctor` lists devices; CUDA_VISIBLE_DEVICES may hide them"
            }
            CudaError::Architecture { .. } => "compile it with --sm for an earlier version",
            CudaError::Assembly { .. } => {
                "a later driver may know this version of PTX; otherwise please report the model"
            }
            CudaError::Memory { .. } => {
                "other programs may hold memory of the device (`nvidia-smi`); a smaller batch \
                 takes less"
            }
            CudaError::Limit { .. } => "allow more with --device-memory limit=SIZE",
            CudaError::Step { .. } => "this may be a bug of Kiln; please report the model",
            CudaError::Driver { .. } => {
                "`kiln verify --device cuda --kernels` waits after each kernel and names the one \
                 that fails"
            }
            CudaError::Artifact(_) => "compile the model anew",
            CudaError::Run(_) => "`kiln inspect` lists inputs and outputs",
        }
    }
}
