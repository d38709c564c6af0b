//! What a program waits for before a compiled model runs: the pass over the file that finds
//! damage, all of loading, and compilation where a cache has the model already.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kiln::{Compiler, Form, Kind, Limits, Model};

/// Models below the root; those of the tests are there once `tests/run` has made them.
const MODELS: [&str; 3] = [
    "examples/digits.onnx",
    "tests/.oracle/models/light_squeezenet_random/model.onnx",
    "tests/.oracle/models/light_resnet50_random/model.onnx",
];

fn compiler(path: &Path) -> Compiler {
    match path.ends_with("digits.onnx") {
        true => Compiler::new().dim("batch", 1),
        false => Compiler::new(),
    }
}

fn load(criterion: &mut Criterion) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = std::env::temp_dir().join(format!("kiln-load-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let cache = folder.join("cache");
    for path in MODELS.map(|path| root.join(path)) {
        if !path.is_file() {
            eprintln!("skipped: {} is not there; tests/run makes it", path.display());
            continue;
        }
        let model = Model::open(&path, &Limits::default()).expect("a model that the tests read");
        let compiler = compiler(&path);
        let form = Form::new(Kind::Shared, "model");
        let file = compiler.package(&model, &form).expect("a sound model").file;
        let name = path.iter().rev().nth(1).expect("a folder").to_string_lossy().into_owned();
        let artifact: PathBuf = folder.join(format!("{name}.so"));
        std::fs::write(&artifact, &file).expect("a file");
        let mut group = criterion.benchmark_group("load");
        group.throughput(criterion::Throughput::Bytes(file.len() as u64));
        group.bench_function(BenchmarkId::new("hash", &name), |b| {
            b.iter(|| black_box(kiln::manifest::find(&file).is_ok()));
        });
        group.bench_function(BenchmarkId::new("file", &name), |b| {
            // SAFETY: the file was written above.
            b.iter(|| unsafe { kiln::load(&artifact, 1) }.expect("a sound file"));
        });
        let opened = || kiln::open_artifact(&artifact).expect("a sound file");
        group.bench_function(BenchmarkId::new("without hash", &name), |b| {
            let load = |file| unsafe { kiln::load_opened(file, &artifact, 1) }.expect("a file");
            b.iter_batched(opened, load, criterion::BatchSize::PerIteration);
        });
        let cached = compiler.clone().cache(&cache);
        cached.compile(&model).expect("a sound model");
        group.bench_function(BenchmarkId::new("cached", &name), |b| {
            b.iter(|| cached.compile(&model).expect("a sound model"));
        });
        group.finish();
    }
    std::fs::remove_dir_all(&folder).expect("the folder");
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = load
}
criterion_main!(benches);
