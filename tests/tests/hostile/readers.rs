//! Readers of everything but models: tensors in four formats, texts of graphs and loops, compiled
//! models. (Models are in `importer.rs`.)

use bytes::Bytes;
use kiln::backend::cuda::Gpu;
use kiln::graph::Graph;
use kiln::graph::op::{Type, UnaryFn};
use kiln::onnx::proto::TensorProto;
use kiln::tensor::{DType, Tensor};
use kiln::{Compiler, Form, Kind, npz};
use kiln_cases::readers::{self, Reader};
use kiln_tests::grown::{Diet, grow};
use kiln_tests::mutate::mutate;
use kiln_tests::{Random, environment};
use prost::Message;

use crate::{calmly, memory_of};

/// Damaged files that each reader is given.
const CASES: u64 = 25_000;
/// What a reader may take for a file: so many times its size, and so much more. Elements take up
/// to 16 bytes where they are written with one.
const TIMES: usize = 64;
const MORE: usize = 8 << 20;

/// Makes sound files.
type Seeds = fn() -> Vec<Vec<u8>>;

const READERS: [(&str, Reader, Seeds); 7] = [
    ("npy", readers::npy, npy_files),
    ("npz", readers::npz, npz_files),
    ("pb", readers::pb, pb_files),
    ("text of graphs", readers::graph_text, graph_texts),
    ("text of loops", readers::loops_text, loops_texts),
    ("compiled models", readers::artifact, artifacts),
    ("compiled models whose hash fits", readers::sealed_artifact, artifacts),
];

fn tensors() -> [Tensor; 4] {
    [
        Tensor::from_slice(&[2, 3], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]),
        Tensor::from_slice(&[4], &[1i64, -1, 1 << 40, 0]),
        Tensor::from_slice(&[2, 1, 2], &[1u8, 2, 3, 4]),
        Tensor::zeros(DType::F16, &[3]),
    ]
}

fn npy_files() -> Vec<Vec<u8>> {
    let file = |tensor: Tensor| {
        let mut bytes = Vec::new();
        npz::write_npy(&mut bytes, tensor.view()).expect("memory takes all");
        bytes
    };
    tensors().into_iter().map(file).collect()
}

fn npz_files() -> Vec<Vec<u8>> {
    let tensors = tensors();
    let named: Vec<_> = ["a", "b", "c", "d"].into_iter().zip(&tensors).collect();
    let file = |count: usize| {
        let arrays: Vec<_> = named[..count].iter().map(|(n, t)| (*n, t.view())).collect();
        let mut bytes = Vec::new();
        npz::write_npz(&mut bytes, &arrays).expect("memory takes all");
        bytes
    };
    vec![file(1), file(4)]
}

fn pb_files() -> Vec<Vec<u8>> {
    let raw = TensorProto {
        dims: vec![2, 3],
        data_type: Some(1),
        raw_data: Some(Bytes::from(vec![0; 24])),
        name: Some("x".into()),
        ..TensorProto::default()
    };
    let ints = TensorProto {
        dims: vec![3],
        data_type: Some(3),
        int32_data: vec![1, -1, 2],
        ..TensorProto::default()
    };
    vec![raw.encode_to_vec(), ints.encode_to_vec()]
}

fn graph_texts() -> Vec<Vec<u8>> {
    let texts = (0..30).map(|seed| grow(seed, Diet::Tame).graph).flat_map(|graph| {
        let kernels = Compiler::new().optimise(&graph).expect("it compiles");
        [kiln::graph::text::print(&graph), kiln::graph::text::print(&kernels)]
    });
    texts.map(String::into_bytes).collect()
}

fn loops_texts() -> Vec<Vec<u8>> {
    let text = |seed| {
        let stages = Compiler::new().stages_of(&grow(seed, Diet::Tame).graph);
        stages.expect("it compiles").loops.into_bytes()
    };
    (0..30).map(text).collect()
}

/// The least of models.
fn tiny() -> Graph {
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::F32, &[4]));
    let y = graph.unary(UnaryFn::Neg, x, &"neg".into()).expect("a node");
    let c = Tensor::from_slice(&[4], &[1.0f32, 2.0, 3.0, 4.0]);
    let c = graph.tensor(&c, &"c".into());
    let y = graph.binary(kiln::graph::op::BinaryFn::Add, y, c, &"add".into()).expect("a node");
    graph.outputs.push(("y".into(), y));
    graph
}

fn artifacts() -> Vec<Vec<u8>> {
    let file = |kind| {
        let form = Form::new(kind, "net");
        Compiler::new().package_of(&tiny(), [7; 32], &form).expect("it compiles").file
    };
    let gpu = [Gpu::of(80).expect("the least of GPUs")];
    let form = Form::new(Kind::Shared, "net");
    let cuda = Compiler::new().package_cuda_of(&tiny(), [7; 32], &gpu, &form);
    vec![file(Kind::Shared), file(Kind::Object), cuda.expect("it compiles").file]
}

#[test]
fn damaged_files_are_refused_and_take_little_memory() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut problems = Vec::new();
    for (name, reader, seeds) in READERS {
        let seeds = seeds();
        let sound = seeds.iter().all(|seed| reader(seed).is_ok());
        let count = environment("KILN_CASES", CASES);
        let (mut refused, mut most) = (0, 0);
        for case in 0..count {
            let mut random = Random::new(case);
            let [file, other] = [0; 2].map(|_| &seeds[random.below(seeds.len())]);
            let bytes = mutate(file, other, &mut random);
            let (result, memory) = memory_of(|| calmly(|| reader(&bytes)));
            most = most.max(memory);
            match result {
                Ok(Err(why)) if why.is_empty() => problems.push(format!("{name} {case}: silent")),
                Ok(result) => refused += u64::from(result.is_err()),
                Err(panic) => problems.push(format!("{name} {case}: panics: {panic}")),
            }
            if memory > MORE + TIMES * bytes.len() {
                problems.push(format!("{name} {case}: {memory} bytes for {}", bytes.len()));
            }
        }
        if !sound || refused == 0 {
            problems.push(format!("{name}: seeds are sound: {sound}, {refused} refused"));
        }
        println!("{name}: {refused} of {count} are refused; {most} bytes at the most");
    }
    std::panic::set_hook(hook);
    problems.truncate(10);
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn every_flipped_bit_of_a_compiled_model_is_noticed() {
    for mut file in artifacts() {
        let bits = file.len() * 8;
        for bit in 0..bits {
            file[bit / 8] ^= 1 << (bit % 8);
            assert!(readers::artifact(&file).is_err(), "bit {bit} of {bits} may be flipped");
            file[bit / 8] ^= 1 << (bit % 8);
        }
        println!("{bits} bits");
        readers::artifact(&file).expect("the file is as it was");
    }
}
