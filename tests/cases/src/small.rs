//! Three small models, whose every stage is in `golden/`.

use kiln::error::Diagnostic;
use kiln::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use kiln::graph::{Graph, NodeId};
use kiln::tensor::DType;

use crate::Random;

type Added = Result<NodeId, Diagnostic>;

/// A graph in the making, with weights that are the same in every run.
pub struct Model {
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

/// Makes a model.
pub type Make = fn(&mut Model) -> Added;

/// The models, by name.
pub const MODELS: [(&str, Make); 3] = [("cnn", cnn), ("attention", attention), ("mlp", mlp)];

/// The graph of one.
pub fn graph(make: Make) -> Graph {
    let mut model = Model { graph: Graph::default(), random: Random::new(1) };
    let y = make(&mut model).expect("a sound model");
    model.graph.outputs.push(("y".into(), y));
    model.graph
}
