//! The runtime for GPUs, on a driver without a device: whole models are right, nothing is used that
//! is gone or not ready, and whatever fails, everything is given back.

mod failures;
mod memory;
mod runs;

use kiln::Compiler;
use kiln::gpu::GpuArtifact;
use kiln::graph::Graph;
use kiln::tensor::{Tensor, TensorView};
use kiln_cuda::{CudaModel, Options};
use kiln_gpu::{Behaviour, Double};
use kiln_tests::{Random, Tolerance, difference, gpu, interpret, small};

/// How far sums may be from those of the interpreter, which are f64.
const CLOSE: Tolerance = Tolerance { rtol: 1e-5, atol: 1e-5 };

/// A small model by name.
fn small(name: &str) -> Graph {
    let (_, make) = small::MODELS.into_iter().find(|m| m.0 == name).expect("a small model");
    small::graph(make)
}

fn artifact(graph: &Graph) -> GpuArtifact {
    gpu::artifact(graph, &Compiler::new()).expect("PTX")
}

/// A model on a device that works.
fn model(
    artifact: &GpuArtifact,
    behaviour: Behaviour,
    options: Options,
) -> (std::sync::Arc<Double>, CudaModel) {
    let (double, model) = gpu::model(artifact, behaviour, options);
    (double, model.unwrap_or_else(|why| panic!("{why}")))
}

/// Tensors for the inputs of a graph, other ones for each seed.
fn inputs(graph: &Graph, seed: u64) -> Vec<Tensor> {
    let mut random = Random::new(seed);
    graph.inputs.iter().map(|(_, ty)| random.tensor(&ty.shape)).collect()
}

fn named<'a>(graph: &'a Graph, inputs: &'a [Tensor]) -> Vec<(&'a str, TensorView<'a>)> {
    graph.inputs.iter().zip(inputs).map(|((name, _), t)| (name.as_str(), t.view())).collect()
}

/// Whether outputs are what the graph means.
fn is_right(graph: &Graph, inputs: &[Tensor], outputs: &[(String, Tensor)]) -> Result<(), String> {
    for ((name, got), want) in outputs.iter().zip(&interpret(graph, inputs)) {
        if let Some(why) = difference(got, want, CLOSE) {
            return Err(format!("{name}: {why}"));
        }
    }
    Ok(())
}
