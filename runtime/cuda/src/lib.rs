//! Runs compiled Kiln models on GPUs of NVIDIA's.
//!
//! This is a crate of its own so that who runs models on CPUs has no part of it: `kiln-runtime`
//! neither depends on it nor looks for a driver. Nothing of CUDA is needed to build it.
//!
//! A [`Gpu`] is a device whose driver was found ([`Gpu::open`]); a [`CudaModel`] is a compiled
//! model on it, with its weights; a [`CudaSession`] runs it. All device memory is asked for in few
//! pieces, whose sizes are known before ([`CudaModel::memory`]). Everything of the driver goes
//! through one trait, [`driver::Driver`].

pub mod driver;
mod error;
mod lane;
mod model;
mod nvidia;
mod owned;
mod session;
mod stream;

pub use error::CudaError;
pub use model::{CudaModel, MemoryPolicy, Options, footprints};
pub use nvidia::{devices, driver_version};
pub use owned::Gpu;
pub use session::CudaSession;
pub use stream::CudaStream;
