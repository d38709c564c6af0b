//! The text of every stage of three small models, as it is in `golden/`.
//!
//! `KILN_BLESS=1 cargo test -p kiln-tests --test golden` writes the files anew. Portable stages are
//! those of 128 bit vectors, which every machine can emit; `asm` is the wide code of AVX2. Of
//! machine code there is the shortest kernel of each model.

use std::fmt::Write;
use std::path::PathBuf;

use kiln::Compiler;
use kiln::backend::cpu::Cpu;
use kiln::error::Diagnostic;
use kiln::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use kiln::graph::{Graph, NodeId};
use kiln::tensor::{DType, Tensor};
use kiln_tests::{
    Random, Tolerance, compilers, difference, interpret, old_compiler, run_compiled, skip,
};

type Added = Result<NodeId, Diagnostic>;

/// A graph in the making, with weights that are the same in every run.
struct Model {
    graph: Graph,
    random: Random,
}

impl Model {
    fn input(&mut self, shape: &[usize]) -> NodeId {
        self.graph.input("x", Type::new(DType::F32, shape))
    }

    fn weight(&mut self, name: &str, shape: &[usize]) -> NodeId {
        let weight = self.random.tensor(shape);
        self.graph.tensor(&weight, &name.into())
    }

    fn dense(&mut self, x: NodeId, name: &str, [inputs, outputs]: [usize; 2]) -> Added {
        let origin = name.into();
        let weight = self.weight(name, &[inputs, outputs]);
        let bias = self.weight(name, &[1, outputs]);
        let product = self.graph.matmul(x, weight, &origin)?;
        self.graph.binary(BinaryFn::Add, product, bias, &origin)
    }
}

/// Convolution, bias, relu, pooling, a dense layer, softmax.
fn cnn(m: &mut Model) -> Added {
    let x = m.input(&[1, 2, 6, 6]);
    let (weight, bias) = (m.weight("conv", &[4, 2, 3, 3]), m.weight("conv", &[1, 4, 1, 1]));
    let zero = m.graph.scalar(DType::F32, 0, 0.0, &"conv".into());
    let borders = Op::Pad([(0, 0), (0, 0), (1, 1), (1, 1)].into_iter().collect());
    let padded = m.graph.add(borders, &[x, zero], &"conv".into())?;
    let y = m.graph.conv([padded, weight], (&[1, 1], &[1, 1]), 1, &"conv".into())?;
    let y = m.graph.binary(BinaryFn::Add, y, bias, &"conv".into())?;
    let y = m.graph.binary_number(BinaryFn::Max, y, 0.0, &"relu".into())?;
    let windows = Op::Window([(2, 2, 1), (2, 2, 1)].into_iter().collect());
    let y = m.graph.add(windows, &[y], &"pool".into())?;
    let y = m.graph.reduce(ReduceFn::Max, y, &[4, 5], &"pool".into())?;
    let y = m.graph.reshape(y, &[1, 36], &"flatten".into())?;
    let y = m.dense(y, "dense", [36, 8])?;
    m.graph.composite(Composite::Softmax(1), y, &"softmax".into())
}

/// Queries, keys and values of 8 tokens, their softmax attention, a residual.
fn attention(m: &mut Model) -> Added {
    let x = m.input(&[8, 8]);
    let parts = ["query", "key", "value"].map(|name| m.dense(x, name, [8, 8]));
    let [query, key, value] = parts;
    let key = m.graph.permute(key?, &[1, 0], &"scores".into())?;
    let scores = m.graph.matmul(query?, key, &"scores".into())?;
    let scores =
        m.graph.binary_number(BinaryFn::Mul, scores, f64::sqrt(0.125), &"scores".into())?;
    let shares = m.graph.composite(Composite::Softmax(1), scores, &"softmax".into())?;
    let y = m.graph.matmul(shares, value?, &"attend".into())?;
    m.graph.binary(BinaryFn::Add, x, y, &"residual".into())
}

/// Layer norm, and two dense layers with a tanh between.
fn mlp(m: &mut Model) -> Added {
    let x = m.input(&[4, 8]);
    let (scale, shift) = (m.weight("norm", &[1, 8]), m.weight("norm", &[1, 8]));
    let norm = Composite::LayerNorm(1, 1e-5f32.to_bits());
    let y = m.graph.composite(norm, x, &"norm".into())?;
    let y = m.graph.binary(BinaryFn::Mul, y, scale, &"norm".into())?;
    let y = m.graph.binary(BinaryFn::Add, y, shift, &"norm".into())?;
    let y = m.dense(y, "up", [8, 16])?;
    let y = m.graph.unary(UnaryFn::Tanh, y, &"tanh".into())?;
    m.dense(y, "down", [16, 4])
}

type Make = fn(&mut Model) -> Added;

const MODELS: [(&str, Make); 3] = [("cnn", cnn), ("attention", attention), ("mlp", mlp)];

fn graph(make: Make) -> Graph {
    let mut model = Model { graph: Graph::default(), random: Random::new(1) };
    let y = make(&mut model).expect("a sound model");
    model.graph.outputs.push(("y".into(), y));
    model.graph
}

/// The shortest kernel of a text in which each one begins with a line `; name`: code is long.
fn shortest(text: &str) -> String {
    let kernels = text.split("\n; ").map(|k| k.strip_prefix("; ").unwrap_or(k).trim_end());
    let one = kernels.min_by_key(|k| k.lines().count()).unwrap_or_default();
    format!("; {one}\n")
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// The first lines that differ, with a few around them.
fn first_difference(name: &str, want: &str, got: &str) -> Option<String> {
    if want == got {
        return None;
    }
    let (want, got): (Vec<&str>, Vec<&str>) = (want.lines().collect(), got.lines().collect());
    let at = (0..want.len().max(got.len())).find(|&i| want.get(i) != got.get(i))?;
    let mut text = format!("{name} differs at line {}:\n", at + 1);
    let lines = |all: &[&str], range: std::ops::Range<usize>| -> Vec<String> {
        all.iter().skip(range.start).take(range.len()).map(|l| l.to_string()).collect()
    };
    for (mark, part) in [
        (' ', lines(&want, at.saturating_sub(3)..at)),
        ('-', lines(&want, at..at + 6)),
        ('+', lines(&got, at..at + 6)),
    ] {
        part.iter().for_each(|line| {
            let _ = writeln!(text, "{mark} {line}");
        });
    }
    let _ = writeln!(text, "({} lines, now {})", want.len(), got.len());
    Some(text)
}

#[test]
fn stages_are_as_they_were() {
    let bless = std::env::var_os("KILN_BLESS").is_some();
    // Whatever this machine can run: these texts are never run.
    let avx2 = Cpu::named(None, Some("x86-64-v3"));
    if let Err(why) = &avx2 {
        skip(&format!("asm of the golden models: {why}"));
    }
    let mut problems = Vec::new();
    for (name, make) in MODELS {
        let graph = graph(make);
        let stages = Compiler::new().wide(false).stages_of(&graph).expect("a sound model");
        let mut files = vec![
            ("graph", stages.graph),
            ("fused", stages.fused),
            ("loops", stages.loops),
            ("clif", shortest(&stages.clif)),
            ("plan", stages.plan),
        ];
        if let Ok(avx2) = &avx2 {
            let compiler = Compiler::new().target(avx2.clone());
            let stages = compiler.stages_of(&graph).expect("a sound model");
            files.push(("asm", shortest(&stages.asm)));
        }
        for (stage, got) in files {
            let name = format!("{name}.{stage}.txt");
            if bless {
                std::fs::write(golden(&name), &got).expect("a file beside the tests");
            }
            let want = std::fs::read_to_string(golden(&name)).unwrap_or_default();
            problems.extend(first_difference(&name, &want, &got));
        }
    }
    assert!(problems.is_empty(), "{}\nKILN_BLESS=1 writes them anew.", problems.join("\n"));
}

/// What is written down is right.
#[test]
fn the_models_compute_what_they_mean() {
    for (name, make) in MODELS {
        let graph = graph(make);
        let x = Random::new(2).tensor(&graph.inputs[0].1.shape);
        let want: Tensor = interpret(&graph, std::slice::from_ref(&x)).remove(0);
        for (way, compiler) in compilers().into_iter().chain(old_compiler()) {
            let got = run_compiled(&graph, std::slice::from_ref(&x), &compiler).expect(name);
            let found = difference(&got[0], &want, Tolerance { rtol: 1e-5, atol: 1e-5 });
            assert_eq!(found, None, "{name} {way}");
        }
    }
}
