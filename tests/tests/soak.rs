//! What a service does for days, in seconds: memory stays flat, threads share, nothing runs in
//! between. `KILN_SOAK` is how long threads share, in seconds (2).

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use kiln::onnx::proto::tensor_shape_proto::{Dimension, dimension::Value as Dim};
use kiln::onnx::proto::type_proto::{Tensor as TensorType, Value as TypeValue};
use kiln::onnx::proto::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto,
    ValueInfoProto,
};
use kiln::tensor::{DType, Tensor, TensorView};
use kiln::{Compiler, Limits, Model};
use kiln_tests::grown::{Diet, grow};
use kiln_tests::{Random, environment};
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

/// A model of these nodes, each an operator, its inputs and its output; its inputs and its output
/// `z` are f32 of two axes, of a number or a dim each.
fn model(nodes: &[(&str, [&str; 2], &str)], inputs: &[(&str, [&str; 2])], z: [&str; 2]) -> Model {
    let dim = |name: &&str| {
        let number = name.parse().map_or(Dim::DimParam(name.to_string()), Dim::DimValue);
        Dimension { value: Some(number), denotation: None }
    };
    let port = |(name, dims): &(&str, [&str; 2])| {
        let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
        let tensor = TensorType { elem_type: Some(1), shape: Some(shape) };
        let ty = TypeProto { value: Some(TypeValue::TensorType(tensor)), ..TypeProto::default() };
        let name = Some(name.to_string());
        ValueInfoProto { name, r#type: Some(ty), ..ValueInfoProto::default() }
    };
    let node = |(op, inputs, output): &(&str, [&str; 2], &str)| NodeProto {
        op_type: Some(op.to_string()),
        input: inputs.iter().filter(|n| !n.is_empty()).map(|n| n.to_string()).collect(),
        output: vec![output.to_string()],
        ..NodeProto::default()
    };
    let graph = GraphProto {
        node: nodes.iter().map(node).collect(),
        input: inputs.iter().map(port).collect(),
        output: vec![port(&("z", z))],
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
    let nodes = [("Add", ["x", "y"], "sum"), ("Relu", ["sum", ""], "z")];
    let model = model(&nodes, &[("x", ["n", "m"]), ("y", ["n", "m"])], ["n", "m"]);
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
    let seconds = environment("KILN_SOAK", 2);
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

/// Short runs of 63 threads come to their ends while a long one of the same executable goes on: no
/// lock is held in a run.
#[test]
fn threads_that_share_an_executable_do_not_wait_for_one_another() {
    const THREADS: usize = 64;
    const LONGEST: usize = 16_384;
    const RUNS: u64 = 20;
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let values: Vec<String> = (1..16).map(|i| format!("v{i}")).collect();
    let values: Vec<&str> =
        ["x"].into_iter().chain(values.iter().map(|v| v.as_str())).chain(["z"]).collect();
    let products: Vec<_> = values.windows(2).map(|v| ("MatMul", [v[0], "w"], v[1])).collect();
    let inputs = [("x", ["n", "256"]), ("w", ["256", "256"])];
    let model = model(&products, &inputs, ["n", "256"]);
    let executable =
        Compiler::new().dim_range("n", 1..=LONGEST).compile_ranges(&model).expect("it compiles");
    let w = Tensor::zeros(DType::F32, &[256, 256]);
    let (begin, over) = (Barrier::new(THREADS), AtomicBool::new(false));
    let work = |length: usize| {
        let shape = [length, 256];
        let (x, mut z) = (Tensor::zeros(DType::F32, &shape), Tensor::zeros(DType::F32, &shape));
        begin.wait();
        let mut run = || {
            let given = [x.view(), w.view()];
            executable.run_into(&given, &mut [z.view_mut()]).expect("a run");
        };
        if length == LONGEST {
            run();
            over.store(true, Ordering::Release);
            return false;
        }
        // The long run is the first one.
        std::thread::sleep(Duration::from_millis(20));
        (0..RUNS).for_each(|_| run());
        over.load(Ordering::Acquire)
    };
    let started = Instant::now();
    let late = std::thread::scope(|scope| {
        let lengths = (0..THREADS).map(|i| if i == 0 { LONGEST } else { 1 });
        let all: Vec<_> = lengths.map(|length| scope.spawn(move || work(length))).collect();
        all.into_iter().map(|thread| thread.join().expect("no panic")).filter(|&late| late).count()
    });
    println!("{RUNS} runs of each of {THREADS} threads beside one of {:?}", started.elapsed());
    assert_eq!(late, 0, "threads were not done before the long run was");
}
