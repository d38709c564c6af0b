//! Models that are damaged at random: always an error that says something, never a panic.
//!
//! One half of the damages is to bytes, which mostly tests the reading of messages; the other is
//! to fields of a model that still reads, which reaches the operators.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kiln::Compiler;
use kiln::error::{Diagnostic, Error, ErrorKind};
use kiln::graph::Graph;
use kiln::graph::op::Type;
use kiln::onnx::proto::tensor_shape_proto::{Dimension, dimension::Value as Dim};
use kiln::onnx::proto::type_proto::Value::TensorType;
use kiln::onnx::proto::{GraphProto, ModelProto, ValueInfoProto};
use kiln::onnx::tensor_type;
use kiln::onnx::{Body, ImportOptions, Known, Limits, import, import_stage};
use kiln::tensor::{DType, Tensor};
use kiln_tests::cases::{folders, read};
use kiln_tests::mutate::mutate;
use kiln_tests::{Random, environment, interpret, oracle};
use prost::Message;

use crate::memory_of;

const MUTATIONS: u64 = 50_000;
/// Stages of a model that are tried.
const STAGES: usize = 4;
/// The limit on the tensors of a model, and what its import and compilation may take in all: the
/// compiler's own tables, and constants as the interpreter has them, with 16 bytes an element.
const LIMIT: usize = 64 << 20;
const MEMORY: usize = 4 * LIMIT;
/// Files above this size are mostly weights, where damage does nothing.
const LARGEST: u64 = 8 << 10;
/// Lengths, tags and extents at which code breaks.
const NUMBERS: [i64; 14] =
    [-2, -1, 0, 1, 2, 3, 4, 7, 100, 1 << 20, 1 << 31, 1 << 40, i64::MAX, i64::MIN];
/// A number at which code breaks.
fn number(random: &mut Random) -> i64 {
    NUMBERS[random.below(NUMBERS.len())]
}

/// One of a list, if it has any.
fn pick<'a, T>(list: &'a mut [T], random: &mut Random) -> Option<&'a mut T> {
    let count = list.len();
    (count > 0).then(|| &mut list[random.below(count)])
}

fn mutate_node(graph: &mut GraphProto, other: &GraphProto, random: &mut Random) -> Option<()> {
    let n_nodes = graph.node.len();
    let node = pick(&mut graph.node, random)?;
    match random.below(8) {
        0 => node.op_type = other.node.get(random.below(other.node.len().max(1)))?.op_type.clone(),
        1 => drop(node.attribute.pop()),
        2 => node.attribute.extend(other.node.first()?.attribute.iter().cloned()),
        3 => *pick(&mut node.input, random)? = String::new(),
        4 => node.input.reverse(),
        5 => {
            let attribute = pick(&mut node.attribute, random)?;
            attribute.i = Some(number(random));
            attribute.f = Some(number(random) as f32);
        }
        6 => {
            let attribute = pick(&mut node.attribute, random)?;
            match pick(&mut attribute.ints, random) {
                Some(value) => *value = number(random),
                None => attribute.ints.push(number(random)),
            }
        }
        _ => graph.node.swap(random.below(n_nodes), random.below(n_nodes)),
    }
    Some(())
}

fn mutate_input(input: &mut ValueInfoProto, random: &mut Random) -> Option<()> {
    let TensorType(tensor) = input.r#type.as_mut()?.value.as_mut()? else { return None };
    let dims = &mut tensor.shape.as_mut()?.dim;
    let dim = Dimension { value: Some(Dim::DimValue(number(random))), denotation: None };
    match random.below(4) {
        0 => tensor.elem_type = Some(random.below(24) as i32),
        1 => drop(dims.pop()),
        2 => dims.push(dim),
        _ => *pick(dims, random)? = dim,
    }
    Some(())
}

/// One to three damages to fields of a model.
fn mutate_fields(file: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut model = ModelProto::decode(file).expect("a seed is a model");
    let other = ModelProto::decode(other).expect("a seed is a model").graph.unwrap_or_default();
    for _ in 0..1 + random.below(3) {
        let graph = model.graph.get_or_insert_default();
        // A damage that finds nothing to damage is none.
        let _ = match random.below(10) {
            0..5 => mutate_node(graph, &other, random),
            5..8 => pick(&mut graph.input, random).and_then(|i| mutate_input(i, random)),
            8 => pick(&mut graph.initializer, random).map(|t| t.dims.push(number(random))),
            _ => pick(&mut model.opset_import, random)
                .map(|o| o.version = Some(random.below(30) as i64)),
        };
    }
    model.encode_to_vec()
}

/// Values for inputs that may decide shapes, so that their operators are reached.
fn values(file: &[u8], random: &mut Random) -> Vec<(String, Tensor)> {
    let graph = ModelProto::decode(file).ok().and_then(|m| m.graph).unwrap_or_default();
    let mut values = Vec::new();
    for input in &graph.input {
        let ty = tensor_type(input);
        let dims = ty.and_then(|t| t.shape.as_ref()).map_or(&[][..], |s| &s.dim);
        let [Dimension { value: Some(Dim::DimValue(n @ 1..=8)), .. }] = dims else {
            continue;
        };
        if ty.and_then(|t| t.elem_type) == Some(7) {
            let list: Vec<i64> = (0..*n)
                .map(|_| if random.below(4) == 0 { number(random) } else { random.below(4) as i64 })
                .collect();
            values.push((
                input.name.clone().unwrap_or_default(),
                Tensor::from_slice(&[list.len()], &list),
            ));
        }
    }
    values
}

fn seeds(data: &Path) -> Vec<Bytes> {
    let mut files = Vec::new();
    for kind in ["node", "pytorch-operator", "pytorch-converted", "simple"] {
        files.extend(folders(&data.join(kind)).iter().map(|f| f.join("model.onnx")));
    }
    if let Some(data) = oracle("microsoft") {
        files.extend(folders(&data).iter().map(|f| f.join("model.onnx")));
    }
    let small = |f: &std::path::PathBuf| f.metadata().is_ok_and(|m| m.len() <= LARGEST);
    files.iter().filter(|f| small(f)).map(|f| read(f)).filter(|b| !b.is_empty()).collect()
}

/// Whether a model that is accepted is compiled as well: small ones, as it takes time.
fn compiles(graph: &Graph) -> bool {
    let bytes: usize = graph.nodes.iter().map(|n| n.ty.size_bytes()).sum();
    graph.nodes.len() < 60 && bytes < 1 << 20
}

/// The damaged model of a number, and how it is imported.
fn damage(seed: u64, seeds: &[Bytes]) -> (Bytes, ImportOptions) {
    let mut random = Random::new(seed);
    let file = &seeds[random.below(seeds.len())];
    let other = &seeds[random.below(seeds.len())];
    let damaged = match seed % 2 {
        0 => mutate(file, other, &mut random),
        _ => mutate_fields(file, other, &mut random),
    };
    let values = values(&damaged, &mut random);
    let limits = Limits { nodes: 10_000, bytes: LIMIT, ..Limits::default() };
    (Bytes::from(damaged), ImportOptions { limits, values, ..ImportOptions::default() })
}

/// Imports a model, and what follows of it where its shapes hang on data that it computes. `check`
/// says whether a stage is small enough to be interpreted.
fn stages(
    model: Bytes,
    mut options: ImportOptions,
    mut check: impl FnMut(&Graph) -> Result<bool, Error>,
) -> Result<(), Error> {
    let mut known = Known::default();
    for _ in 0..STAGES {
        options.known = Some(Arc::new(known.clone()));
        let (graph, later) = import_stage(model.clone(), &options)?;
        let (true, Some(later)) = (check(&graph)?, later) else { break };
        let mut random = Random::new(model.len() as u64);
        let mut input = |ty: &Type| {
            let floats = random.tensor(&ty.shape);
            match ty.dtype {
                DType::F32 => floats,
                dtype => Tensor::zeros(dtype, &ty.shape),
            }
        };
        let inputs: Vec<Tensor> = graph.inputs.iter().map(|(_, ty)| input(ty)).collect();
        let outputs = interpret(&graph, &inputs);
        // What a loop repeats is a model: it is imported, and not run.
        let turns = |body: &Arc<Body>, _| {
            import(body.model.clone(), &ImportOptions { known: None, ..options.clone() })?;
            Err(Error::new(ErrorKind::Model, Diagnostic::new("", "a loop")))
        };
        known = later.after(&known, outputs, turns)?.0;
    }
    Ok(())
}

/// The graph of a damaged model as text, for whoever looks for the reason of a panic.
fn shown(seed: u64, seeds: &[Bytes]) -> String {
    let (damaged, options) = damage(seed, seeds);
    let graph = catch_unwind(AssertUnwindSafe(|| import(damaged, &options)));
    match graph {
        Ok(Ok(graph)) => kiln::graph::text::print(&graph),
        _ => "the import panics".to_string(),
    }
}

#[test]
fn damaged_models_are_refused_and_never_panic() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let seeds = seeds(&data);
    let places = Arc::new(Mutex::new(BTreeMap::new()));
    let (noted, hook) = (places.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map(|l| format!("{}:{} {panic}", l.file(), l.line()));
        let mut noted = noted.lock().expect("only this thread panics");
        *noted.entry(place).or_insert(0) += 1;
    }));
    let (mut accepted, mut most, mut slowest) = (0, 0, Duration::ZERO);
    let mut panicked = Vec::new();
    let compiler = Compiler::new();
    let count = environment("KILN_CASES", MUTATIONS);
    for seed in 0..count {
        let (damaged, options) = damage(seed, &seeds);
        let start = Instant::now();
        let (result, memory) = memory_of(|| {
            catch_unwind(AssertUnwindSafe(|| {
                stages(damaged, options, |graph| {
                    slowest = slowest.max(start.elapsed());
                    match compiles(graph) {
                        true => compiler.build(&compiler.optimise(graph)?).map(|_| true),
                        false => Ok(false),
                    }
                })
            }))
        });
        most = most.max(memory);
        match result {
            Ok(Ok(_)) => accepted += 1,
            Ok(Err(error)) => {
                let text = error.to_string();
                assert!(!error.diagnostics.is_empty(), "mutation {seed}: no diagnostic");
                let said = error.diagnostics.iter().all(|d| !d.message.is_empty());
                assert!(said && !text.is_empty(), "mutation {seed}: nothing said");
                let clean = text.chars().all(|c| c == '\n' || !c.is_control());
                assert!(clean, "mutation {seed}: control characters in {text:?}");
            }
            Err(_) => panicked.push(seed),
        }
    }
    std::panic::set_hook(hook);
    let first = panicked.first().map(|&seed| shown(seed, &seeds)).unwrap_or_default();
    assert!(panicked.is_empty(), "{panicked:?} panic: {places:#?}\nthe first one: {first}");
    println!("{accepted} of {count} damaged models are still models");
    println!("the slowest took {slowest:?}, the largest {most} bytes");
    assert!(most <= MEMORY, "a damaged model took {most} bytes");
    assert!(slowest < Duration::from_secs(5), "a damaged model took {slowest:?}");
}
