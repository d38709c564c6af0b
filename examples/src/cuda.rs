//! The digits on a GPU of NVIDIA's, or why not:
//! `cargo run --release -p kiln-examples --example cuda`.

use kiln::backend::cuda::Gpu as Isa;
use kiln::{Compiler, Limits, Model};
use kiln_cuda::{CudaModel, Gpu, Options};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = Model::open(kiln_examples::shipped("digits.onnx"), &Limits::default())?;
    // Compiling needs no GPU: the kernels are text, which the driver assembles.
    let isa = Isa::of(80).ok_or("the earliest version")?;
    let artifact = Compiler::new().dim("batch", 1).compile_cuda(&model, &[isa])?;
    let memory = artifact.memory();
    println!("{} kernels, {} bytes of the device", artifact.plan.steps.len(), memory.total());
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("{error}\n{}", error.help());
            return Ok(());
        }
    };
    // SAFETY: the text comes from the compiler above.
    let model = unsafe { CudaModel::new(&gpu, &artifact, Options::default()) }?;
    let image = kiln::tensor::Tensor::zeros(kiln::tensor::DType::F32, &[1, 1, 8, 8]);
    let outputs = model.run(&[("image", image.view())])?;
    println!("on {}: {:?}", gpu.device().name, outputs[0].1.as_slice::<f32>());
    Ok(())
}
