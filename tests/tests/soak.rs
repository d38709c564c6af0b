//! What a service does for days, in seconds: memory stays flat, threads share, nothing runs in
//! between. `KILN_SOAK` is how long threads share, in seconds (2).

use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kiln::onnx::proto::tensor_shape_proto::{Dimension, dimension::Value as Dim};
use kiln::onnx::proto::type_proto::{Tensor as TensorType, Value as TypeValue};
use kiln::onnx::proto::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto,
    ValueInfoProto,
};
use kiln::tensor::{Tensor, TensorView};
use kiln::{Compiler, Limits, Model};
use kiln_tests::Random;
use kiln_tests::grown::{Diet, grow};
use prost::Message;

/// One at a time: memory is that of the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// Bytes that memory may grow by, once it is warm.
const GROWTH: usize = 4 << 20;

/// Bytes of this process in memory.
fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/statm").expect("sizes of this process");
    let pages: usize = text.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    pages * rustix::param::page_size()
}

/// Does something again and again; after a fifth of all, memory stays as it is.
fn stays_flat(times: usize, mut work: impl FnMut(usize)) {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    (0..times / 5).for_each(&mut work);
    let warm = resident();
    (times / 5..times).for_each(&mut work);
    let (end, mib) = (resident(), 1 << 20);
    println!("{times} times: {} MiB, then {} MiB", warm / mib, end / mib);
    assert!(end <= warm + GROWTH, "{times} times: {warm} bytes, then {end}");
}

#[test]
fn memory_is_flat_over_compilations() {
    let graphs: Vec<_> = (0..50).map(|seed| grow(seed, Diet::Tame).graph).collect();
    let compiler = Compiler::new();
    stays_flat(1000, |i| {
        let kernels = compiler.optimise(&graphs[i % graphs.len()]).expect("it compiles");
        compiler.build(&kernels).expect("it compiles");
    });
}

/// relu(x + y) of two dims.
fn model() -> Model {
    let dim = |name: &str| Dimension { value: Some(Dim::DimParam(name.into())), denotation: None };
    let port = |name: &str| {
        let shape = TensorShapeProto { dim: vec![dim("n"), dim("m")] };
        let tensor = TensorType { elem_type: Some(1), shape: Some(shape) };
        let ty = TypeProto { value: Some(TypeValue::TensorType(tensor)), ..TypeProto::default() };
        ValueInfoProto { name: Some(name.into()), r#type: Some(ty), ..ValueInfoProto::default() }
    };
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto {
        op_type: Some(op.into()),
        input: inputs.iter().map(|name| name.to_string()).collect(),
        output: vec![output.into()],
        ..NodeProto::default()
    };
    let graph = GraphProto {
        node: vec![node("Add", &["x", "y"], "sum"), node("Relu", &["sum"], "z")],
        input: vec![port("x"), port("y")],
        output: vec![port("z")],
        ..GraphProto::default()
    };
    let opset = OperatorSetIdProto { version: Some(20), ..OperatorSetIdProto::default() };
    let file = ModelProto {
        ir_version: Some(9),
        opset_import: vec![opset],
        graph: Some(graph),
        ..ModelProto::default()
    };
    Model::from_bytes(file.encode_to_vec().into(), &Limits::default()).expect("a model")
}

#[test]
fn memory_is_flat_over_shapes() {
    let model = model();
    let compiler = Compiler::new().kept_bytes(1 << 20);
    let on_demand = compiler.dim_range("n", 1..=64).dim_range("m", 1..=64).on_demand(&model);
    let mut random = Random::new(7);
    stays_flat(10_000, |_| {
        let shape = [1 + random.below(64), 1 + random.below(64)];
        let (x, y) = (random.tensor(&shape), random.tensor(&shape));
        let outputs = on_demand.run(&[("x", x.view()), ("y", y.view())]).expect("a run");
        assert_eq!(outputs[0].1.shape(), shape);
    });
    assert!(on_demand.kept_bytes() <= 1 << 20, "{} bytes are kept", on_demand.kept_bytes());
}

/// Processor time of this process so far.
fn processor() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").expect("times of this process");
    // Fields 14 and 15 of the line, in ticks of 10 ms; the second, in brackets, is the name.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks: u64 = fields[11..13].iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(10 * ticks)
}

#[test]
fn threads_share_an_executable_and_leave_nothing_running() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let grown = grow(4, Diet::Tame);
    let compiler = Compiler::new().threads(2);
    let kernels = compiler.optimise(&grown.graph).expect("it compiles");
    let executable = compiler.build(&kernels).expect("it compiles");
    let tensors: Vec<Tensor> = grown.inputs.iter().map(|value| value.to_tensor()).collect();
    let names = grown.graph.inputs.iter().map(|port| port.0.as_str());
    let named: Vec<(&str, TensorView)> = names.zip(tensors.iter().map(Tensor::view)).collect();
    let expected = executable.run(&named).expect("a run");
    let seconds = std::env::var("KILN_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(seconds);
    let runs: usize = std::thread::scope(|scope| {
        let work = || {
            let mut runs = 0;
            while Instant::now() < end {
                let found = executable.run(&named).expect("a run");
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(found.1.bytes() == expected.1.bytes(), "another result");
                }
                runs += 1;
            }
            runs
        };
        let threads: Vec<_> = (0..64).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    println!("{runs} runs by 64 threads in {seconds} s, all equal");
    std::thread::sleep(Duration::from_millis(50));
    let before = processor();
    std::thread::sleep(Duration::from_millis(500));
    let idle = processor() - before;
    // A thread that spins would show half a second.
    assert!(idle <= Duration::from_millis(20), "{idle:?} of work while nothing runs");
}
