//! Shares one compiled model between the threads of a service: `run` takes `&self`, the code and
//! the weights exist once, and each thread that is running has its own memory.

use std::error::Error;
use std::time::Instant;

use kiln::tensor::Tensor;
use kiln::{Compiler, Limits, Model};
use kiln_examples::shipped;

/// Requests that each thread serves.
const REQUESTS: usize = 2000;

fn main() -> Result<(), Box<dyn Error>> {
    let model = Model::open(shipped("digits.onnx"), &Limits::default())?;
    // One thread a request: many small requests are served best side by side.
    let executable = Compiler::new().threads(1).dim("batch", 1).compile(&model)?;
    let port = executable.inputs()[0].clone();
    for threads in [1, 2, 4] {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (executable, port) = (executable.clone(), &port);
                scope.spawn(move || {
                    // A session keeps its memory from request to request.
                    let mut session = executable.session();
                    let image = Tensor::zeros(port.dtype, &port.shape);
                    for _ in 0..REQUESTS {
                        session.run(&[(&port.name, image.view())]).expect("the model's input");
                    }
                });
            }
        });
        let requests = (threads * REQUESTS) as f64 / begin.elapsed().as_secs_f64();
        println!("{threads} threads: {requests:.0} requests a second");
    }
    Ok(())
}
