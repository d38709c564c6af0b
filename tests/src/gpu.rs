//! Models on a GPU that is not there: compiled, brought there by the runtime, and run by the
//! interpreter of PTX.

use std::sync::Arc;

use kiln::Compiler;
use kiln::backend::cuda::Gpu;
use kiln::gpu::GpuArtifact;
use kiln::graph::Graph;
use kiln_cuda::{CudaError, CudaModel, Options};
use kiln_gpu::{Behaviour, Double};

/// A graph compiled for the earliest GPU.
pub fn artifact(graph: &Graph, compiler: &Compiler) -> Result<GpuArtifact, String> {
    let gpu = Gpu::of(80).ok_or("the earliest GPU")?;
    compiler.compile_cuda_of(graph, &[gpu]).map_err(|e| e.to_string())
}

/// The model on a device that behaves like this.
pub fn model(
    artifact: &GpuArtifact,
    behaviour: Behaviour,
    options: Options,
) -> (Arc<Double>, Result<CudaModel, CudaError>) {
    let double = Double::new(behaviour);
    let gpu = kiln_cuda::Gpu::with(double.clone());
    // SAFETY: the text was emitted from loops that were checked against the plan.
    let model = unsafe { CudaModel::new(&gpu, artifact, options) };
    (double, model)
}
