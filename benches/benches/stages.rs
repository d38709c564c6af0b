//! Time of each stage of the compiler, and latency of what it makes, on a few models.

use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kiln::tensor::{Tensor, TensorView};
use kiln::{Compiler, Limits, Model};

/// Models below the root; those of the tests are there once `tests/run` has made them.
const MODELS: [&str; 5] = [
    "examples/digits.onnx",
    "tests/.oracle/models/mlp_b64/model.onnx",
    "tests/.oracle/models/cnn_b1/model.onnx",
    "tests/.oracle/models/encoder/model.onnx",
    "tests/.oracle/models/light_squeezenet_random/model.onnx",
];

/// The models that are there, by name. Others are skipped aloud.
fn models() -> Vec<(String, Model)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let open = |path: PathBuf| {
        if !path.is_file() {
            eprintln!("skipped: {} is not there; tests/run makes it", path.display());
            return None;
        }
        let name = match path.file_stem()?.to_str()? {
            "model" => path.parent()?.file_name()?.to_str()?.to_string(),
            stem => stem.to_string(),
        };
        Some((name, Model::open(&path, &Limits::default()).expect("a model that the tests read")))
    };
    MODELS.into_iter().filter_map(|path| open(root.join(path))).collect()
}

/// The model that ships with Kiln names an extent.
fn compiler(name: &str) -> Compiler {
    match name {
        "digits" => Compiler::new().dim("batch", 1),
        _ => Compiler::new(),
    }
}

fn stages(criterion: &mut Criterion) {
    let models = models();
    let mut group = criterion.benchmark_group("import");
    for (name, model) in &models {
        let compiler = compiler(name);
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| compiler.graph(model).expect("a sound model"))
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("optimise");
    for (name, model) in &models {
        let compiler = compiler(name);
        let graph = compiler.graph(model).expect("a sound model");
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| compiler.optimise(&graph).expect("a sound model"))
        });
    }
    group.finish();
    // Lowering, code, folded constants, memory.
    let mut group = criterion.benchmark_group("build");
    for (name, model) in &models {
        let compiler = compiler(name);
        let graph = compiler.graph(model).expect("a sound model");
        let kernels = compiler.optimise(&graph).expect("a sound model");
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| compiler.build(&kernels).expect("a sound model"))
        });
    }
    group.finish();
}

fn latency(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("run");
    for (name, model) in models() {
        let executable = compiler(&name).compile(&model).expect("a sound model");
        let zeros = |port: &kiln::plan::Port| Tensor::zeros(port.dtype, &port.shape);
        let inputs: Vec<Tensor> = executable.plan().inputs.iter().map(zeros).collect();
        let mut outputs: Vec<Tensor> = executable.plan().outputs.iter().map(zeros).collect();
        let views: Vec<TensorView> = inputs.iter().map(Tensor::view).collect();
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| {
                let mut outputs: Vec<_> = outputs.iter_mut().map(Tensor::view_mut).collect();
                executable.run_into(&views, &mut outputs).expect("tensors of the plan")
            })
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    // Two seconds for each figure: all of them in about a minute.
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = stages, latency
}
criterion_main!(benches);
