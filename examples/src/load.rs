//! Loads a compiled model and runs it. This part needs `kiln-runtime` only, which is small and has
//! no compiler in it: `cargo run --release -p kiln-examples --example load -- model.so`.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use kiln_runtime::pool::Pool;
use kiln_runtime::session::Executable;
use kiln_runtime::tensor::{Tensor, TensorView};

fn main() -> Result<(), Box<dyn Error>> {
    let path = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => compile()?,
    };
    let begin = Instant::now();
    let pool = Arc::new(Pool::new(1)?);
    // SAFETY: a compiled model is code. The person who gave it, or `compile` below, made it.
    let executable = unsafe { Executable::load(&path, pool) }?;
    println!("loaded {} in {:.2} ms", path.display(), begin.elapsed().as_secs_f64() * 1e3);
    let zeros = executable.inputs().iter().map(|port| Tensor::zeros(port.dtype, &port.shape));
    let inputs: Vec<Tensor> = zeros.collect();
    let ports = executable.inputs().iter();
    let named: Vec<(&str, TensorView<'_>)> =
        ports.zip(&inputs).map(|(port, tensor)| (port.name.as_str(), tensor.view())).collect();
    for (name, tensor) in executable.run(&named)? {
        println!("{name}: {}{:?}", tensor.dtype(), tensor.shape());
    }
    Ok(())
}

/// What `kiln compile digits.onnx -o digits.so --dim batch=1` does.
fn compile() -> Result<PathBuf, Box<dyn Error>> {
    let model = kiln::Model::open(kiln_examples::shipped("digits.onnx"), &kiln::Limits::default())?;
    let form =
        kiln::Form { kind: kiln::Kind::Shared, name: "digits".into(), file: None, weights: None };
    let package = kiln::Compiler::new().dim("batch", 1).package(&model, &form)?;
    // Not in the folder for temporary files: anybody may write there.
    let program = std::env::current_exe()?;
    let path = program.with_file_name("digits.so");
    std::fs::write(&path, package.file)?;
    Ok(path)
}
