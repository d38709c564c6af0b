//! Random graphs for tests of the rules, and the reference interpreter on all that an e-graph
//! holds; the kernels of such graphs compute what the graphs do.

use std::collections::HashMap;

use egg::Id;
use kiln_runtime::tensor::{DType, Tensor, TensorView};

use super::lang::{ENode, Saturated};
use super::{Budget, optimise};
use crate::graph::build::Added;
use crate::graph::eval::{Data, Value, eval, eval_body, eval_op};
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use crate::graph::scalar::Dots;
use crate::graph::{Graph, NodeId, text};

/// A small generator of random numbers (xorshift), the same on every machine.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % n.max(1)
    }

    fn numbers(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| (self.below(17) as f64 - 8.0) / 4.0).collect()
    }

    fn order(&mut self, rank: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..rank).collect();
        (1..rank).rev().for_each(|i| order.swap(i, self.below(i + 1)));
        order
    }
}

/// Sizes that keep the interpreter fast.
const MAX_ELEMENTS: usize = 600;

pub(super) struct Random {
    graph: Graph,
    rng: Rng,
    values: Vec<NodeId>,
    dtype: DType,
}

impl Random {
    pub(super) fn new(seed: u64, dtype: DType) -> Random {
        let mut random = Random {
            graph: Graph::default(),
            rng: Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            values: Vec::new(),
            dtype,
        };
        for name in ["x", "y"] {
            let rank = 2 + random.rng.below(3);
            let shape: Vec<usize> = (0..rank).map(|_| 1 + random.rng.below(4)).collect();
            let x = random.graph.input(name, Type::new(dtype, &shape));
            random.values.push(x);
        }
        random
    }

    fn constant(&mut self, shape: &[usize]) -> NodeId {
        let values = self.rng.numbers(shape.iter().product());
        let value = Value { ty: Type::new(self.dtype, shape), data: Data::Float(values) };
        self.graph.tensor(&value.to_tensor(), &"c".into())
    }

    fn shape(&self, x: NodeId) -> Vec<usize> {
        self.graph.ty(x).shape.to_vec()
    }

    /// One more node over the earlier ones, mostly over the last.
    fn step(&mut self) {
        let count = self.values.len();
        let back = if self.rng.below(3) == 0 { self.rng.below(count) } else { 0 };
        let x = self.values[count - 1 - back];
        let made = match self.rng.below(19) {
            0 => self.unary(x),
            1 | 2 => self.with_constant(x),
            3 => self.with_value(x),
            4..=6 => {
                let order = self.rng.order(self.shape(x).len());
                self.graph.permute(x, &order, &"permute".into())
            }
            7..=9 => self.reshape(x),
            10 => self.move_ends(x),
            11 => self.reduce(x),
            12 => self.concat(x),
            13 => self.pool(x),
            14 => self.conv(x),
            15 | 16 => {
                let rng = &mut self.rng;
                super::integers::tests::grow(&mut self.graph, &mut |n| rng.below(n), x)
            }
            17 => {
                let rng = &mut self.rng;
                super::shuffle::tests::grow(&mut self.graph, &mut |n| rng.below(n), x)
            }
            _ => self.matmul(x),
        };
        if let Ok(id) = made
            && self.graph.ty(id).numel() <= MAX_ELEMENTS
        {
            self.values.push(id);
        }
    }

    fn unary(&mut self, x: NodeId) -> Added {
        let f = [UnaryFn::Neg, UnaryFn::Abs, UnaryFn::Tanh][self.rng.below(3)];
        match self.rng.below(4) {
            0 => {
                // At times two bounds, one after the other.
                let origin = "bound".into();
                let lower = self.graph.binary_number(BinaryFn::Max, x, 0.0, &origin)?;
                match self.rng.below(2) {
                    0 => self.graph.binary_number(BinaryFn::Max, lower, 0.5, &origin),
                    _ => Ok(lower),
                }
            }
            1 => self.graph.composite(Composite::Gelu, x, &"gelu".into()),
            _ => self.graph.unary(f, x, &"unary".into()),
        }
    }

    /// A constant along one axis, or of one number.
    fn with_constant(&mut self, x: NodeId) -> Added {
        let shape = self.shape(x);
        let f = [BinaryFn::Mul, BinaryFn::Mul, BinaryFn::Add, BinaryFn::Sub][self.rng.below(4)];
        if self.rng.below(3) == 0 {
            let number = self.rng.below(4) as f64;
            let f = if number >= 2.0 { BinaryFn::Pow } else { f };
            return self.graph.binary_number(f, x, number, &"number".into());
        }
        let mut along = vec![1; shape.len()];
        let axis = self.rng.below(shape.len());
        // Repeating a unit axis over the constant is right as well.
        along[axis] = if shape[axis] == 1 { 1 + self.rng.below(3) } else { shape[axis] };
        let c = self.constant(&along);
        self.graph.binary(f, x, c, &"scale".into())
    }

    fn with_value(&mut self, x: NodeId) -> Added {
        let f = [BinaryFn::Add, BinaryFn::Mul, BinaryFn::Max][self.rng.below(3)];
        let other = self.values[self.rng.below(self.values.len())];
        self.graph.binary(f, x, other, &"binary".into())
    }

    fn reshape(&mut self, x: NodeId) -> Added {
        let mut shape = self.shape(x);
        let axis = self.rng.below(shape.len());
        match self.rng.below(4) {
            0 if shape.len() < 5 => shape.insert(axis, 1),
            1 if shape[axis] == 1 && shape.len() > 1 => {
                shape.remove(axis);
            }
            2 if shape[axis].is_multiple_of(2) => {
                shape[axis] /= 2;
                shape.insert(axis, 2);
            }
            _ if axis + 1 < shape.len() => {
                let next = shape.remove(axis + 1);
                shape[axis] *= next;
            }
            _ => return Ok(x),
        }
        self.graph.reshape(x, &shape, &"reshape".into())
    }

    fn move_ends(&mut self, x: NodeId) -> Added {
        let shape = self.shape(x);
        if self.rng.below(2) == 0 {
            let fill = self.graph.scalar(self.dtype, 0, 0.0, &"fill".into());
            let borders = shape.iter().map(|_| (self.rng.below(2), self.rng.below(2))).collect();
            return self.graph.add(Op::Pad(borders), &[x, fill], &"pad".into());
        }
        let range = |(&extent, start): (&usize, usize)| (start as i64, 1, extent - start);
        let starts: Vec<usize> = shape.iter().map(|&e| self.rng.below(e.min(2))).collect();
        let ranges = shape.iter().zip(starts).map(range).collect();
        self.graph.add(Op::Slice(ranges), &[x], &"slice".into())
    }

    fn reduce(&mut self, x: NodeId) -> Added {
        let rank = self.shape(x).len();
        let f = [ReduceFn::Sum, ReduceFn::Max][self.rng.below(2)];
        let axes = [self.rng.below(rank), self.rng.below(rank)];
        match self.rng.below(3) {
            0 => self.graph.composite(Composite::Softmax(axes[0] as u8), x, &"softmax".into()),
            _ => self.graph.reduce(f, x, &axes, &"reduce".into()),
        }
    }

    fn concat(&mut self, x: NodeId) -> Added {
        let axis = self.rng.below(self.shape(x).len());
        let other = match self.rng.below(2) {
            0 => self.graph.unary(UnaryFn::Neg, x, &"neg".into())?,
            _ => self.values[self.rng.below(self.values.len())],
        };
        self.graph.add(Op::Concat(axis as u8), &[x, other], &"concat".into())
    }

    fn pool(&mut self, x: NodeId) -> Added {
        let mut shape = self.shape(x);
        let rank = shape.len();
        if rank < 3 {
            return Ok(x);
        }
        let (stride, all) = (1 + self.rng.below(2), self.rng.below(4) == 0);
        let size = |&extent: &usize| if all { extent } else { 2 };
        let windows = shape[rank - 2..].iter().map(|e| (size(e), stride, 1)).collect();
        let y = self.graph.add(Op::Window(windows), &[x], &"window".into())?;
        shape = self.shape(y)[..rank].to_vec();
        let y = self.graph.reduce(ReduceFn::Max, y, &[rank, rank + 1], &"pool".into())?;
        self.graph.reshape(y, &shape, &"pool".into())
    }

    fn conv(&mut self, x: NodeId) -> Added {
        let shape = self.shape(x);
        if shape.len() < 3 {
            return Ok(x);
        }
        let channels = shape[1];
        let groups = if self.rng.below(2) == 0 { 1 } else { channels };
        let mut weight = vec![groups * (1 + self.rng.below(3)), channels / groups];
        weight.extend(shape[2..].iter().map(|&e| e.min(1 + self.rng.below(2))));
        let w = self.constant(&weight);
        let ones = vec![1; shape.len() - 2];
        self.graph.conv([x, w], (&ones, &ones), groups, &"conv".into())
    }

    /// Two products of one value, each with what follows it, one after the other.
    fn siblings(&mut self, x: NodeId) -> Added {
        let shape = self.shape(x);
        let rank = shape.len();
        let mut parts = Vec::new();
        for extent in [2, 3] {
            let mut weight = vec![1; rank];
            weight[rank - 2] = shape[rank - 1];
            weight[rank - 1] = extent;
            let mut along = vec![1; rank];
            along[rank - 1] = extent;
            let (w, c) = (self.constant(&weight), self.constant(&along));
            let y = self.graph.matmul(x, w, &"matmul".into())?;
            let y = self.graph.binary(BinaryFn::Add, y, c, &"shift".into())?;
            parts.push(self.graph.unary(UnaryFn::Abs, y, &"abs".into())?);
        }
        self.graph.add(Op::Concat(rank as u8 - 1), &parts, &"both".into())
    }

    /// Scores of queries with keys that two heads share.
    fn grouped(&mut self, x: NodeId) -> Added {
        let shape = self.shape(x);
        let (outer, inner) = shape.split_at(shape.len() - 2);
        let own: usize = outer.iter().product();
        let (own, m, n) = match self.rng.below(2) {
            0 => (own, inner[0], inner[1]),
            _ => (1, 1, shape.iter().product()),
        };
        let origin = "grouped".into();
        let apart = self.graph.reshape(x, &[own, 1, m, n], &origin)?;
        let spread = self.graph.expand(apart, &[own, 2, m, n], &origin)?;
        let keys = self.graph.reshape(spread, &[2 * own, m, n], &origin)?;
        let queries = self.graph.unary(UnaryFn::Tanh, keys, &origin)?;
        let queries = self.graph.binary_number(BinaryFn::Mul, queries, 2.0, &origin)?;
        let keys = self.graph.permute(keys, &[0, 2, 1], &origin)?;
        self.graph.matmul(queries, keys, &origin)
    }

    fn matmul(&mut self, x: NodeId) -> Added {
        let shape = self.shape(x);
        let rank = shape.len();
        if rank < 2 {
            return Ok(x);
        }
        if self.rng.below(3) == 0 {
            let mut order: Vec<usize> = (0..rank).collect();
            order.swap(rank - 1, rank - 2);
            let turned = self.graph.permute(x, &order, &"turn".into())?;
            return self.graph.matmul(x, turned, &"matmul".into());
        }
        if self.rng.below(4) == 0 {
            return self.siblings(x);
        }
        if self.rng.below(4) == 0 {
            return self.grouped(x);
        }
        let mut weight = vec![1; rank];
        weight[rank - 2] = shape[rank - 1];
        weight[rank - 1] = 1 + self.rng.below(4);
        let w = self.constant(&weight);
        let y = self.graph.matmul(x, w, &"matmul".into())?;
        if self.rng.below(3) > 0 {
            return Ok(y);
        }
        // A bias, then a scale.
        let mut along = vec![1; rank];
        along[rank - 1] = weight[rank - 1];
        let (shift, scale) = (self.constant(&along), self.constant(&along));
        let y = self.graph.binary(BinaryFn::Add, y, shift, &"bias".into())?;
        self.graph.binary(BinaryFn::Mul, y, scale, &"scale".into())
    }

    pub(super) fn finish(mut self) -> Graph {
        (0..12).for_each(|_| self.step());
        let last = self.values.len() - 1;
        for (i, &id) in self.values[last.saturating_sub(1)..].iter().enumerate() {
            self.graph.outputs.push((format!("out{i}"), id));
        }
        self.graph
    }
}

pub(super) fn inputs_of(graph: &Graph) -> Vec<Value> {
    let mut rng = Rng(0x1234_5678_9abc_def1);
    let random = |(_, ty): &(String, Type)| {
        let numbers = rng.numbers(ty.numel());
        let data = numbers.iter().map(|&v| crate::graph::eval::round_float(ty.dtype, v)).collect();
        Value { ty: ty.clone(), data: Data::Float(data) }
    };
    graph.inputs.iter().map(random).collect()
}

pub(super) fn close(a: &Value, b: &Value, tolerance: f64) -> bool {
    let near = |(x, y): (f64, f64)| {
        x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= tolerance * (1.0 + x.abs())
    };
    a.ty == b.ty && a.as_f64s().into_iter().zip(b.as_f64s()).all(near)
}

fn value_of(
    saturated: &Saturated,
    node: &ENode,
    ty: &Type,
    inputs: &[Value],
    known: &HashMap<Id, Value>,
) -> Option<Value> {
    let egraph = &saturated.egraph;
    let args: Option<Vec<&Value>> = node.args.iter().map(|a| known.get(&egraph.find(*a))).collect();
    let args = args?;
    Some(match &node.op {
        Op::Input(i) => inputs[*i as usize].clone(),
        Op::Const(i) => Value::from_constant(&egraph.analysis.constants[*i as usize]),
        Op::Fused(i) => {
            let body = &egraph.analysis.bodies[*i as usize];
            eval_body(body, &args, &egraph.analysis.constants)
        }
        op => eval_op(op, &args, ty),
    })
}

/// Evaluates every e-node; all of one class must agree. Gives the number of e-nodes.
pub(super) fn check_classes(saturated: &Saturated, inputs: &[Value]) -> Result<usize, String> {
    let egraph = &saturated.egraph;
    let mut ids: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    ids.sort_unstable();
    let mut known: HashMap<Id, Value> = HashMap::new();
    loop {
        let before = known.len();
        for &id in &ids {
            if known.contains_key(&id) {
                continue;
            }
            let class = &egraph[id];
            let ty = &class.data.ty;
            let value = class.nodes.iter().find_map(|n| value_of(saturated, n, ty, inputs, &known));
            if let Some(value) = value {
                known.insert(id, value);
            }
        }
        if known.len() == before {
            break;
        }
    }
    let mut checked = 0;
    for &id in &ids {
        let class = &egraph[id];
        for node in &class.nodes {
            let value = value_of(saturated, node, &class.data.ty, inputs, &known)
                .ok_or_else(|| format!("class {id} has no value"))?;
            if !close(&known[&id], &value, 1e-9) {
                return Err(format!("class {id}: {node:?} differs from {:?}", class.nodes));
            }
            checked += 1;
        }
    }
    Ok(checked)
}

/// Only inputs, constants, reshapes and bodies remain.
fn check_shape_of(graph: &Graph) {
    for node in &graph.nodes {
        let outside = matches!(node.op, Op::Input(_) | Op::Const(_) | Op::Fused(_));
        assert!(outside || node.op.is_alias(), "{:?} is outside of a body", node.op);
    }
}

fn check_optimised(graph: &Graph, tolerance: f64, what: &str) -> Graph {
    let inputs = inputs_of(graph);
    let expected = eval(graph, &inputs);
    let mut result = None;
    for (egraph, whole) in [(false, false), (true, false), (true, true)] {
        let dots = Dots { whole, ..Dots::default() };
        let optimised = optimise(graph, egraph.then(Budget::default), dots)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        check_shape_of(&optimised.graph);
        assert!(optimised.report.chosen_us <= optimised.report.greedy_us, "{what}");
        for (a, b) in expected.iter().zip(&eval(&optimised.graph, &inputs)) {
            let text = || format!("{}{}", text::print(graph), text::print(&optimised.graph));
            assert!(close(a, b, tolerance), "{what}, e-graph {egraph}\n{}", text());
        }
        result = Some((*optimised.graph).clone());
    }
    result.expect("two runs")
}

/// Compiled kernels give what the graph does.
fn check_compiled(graph: &Graph, tolerance: f64, what: &str) {
    let inputs = inputs_of(graph);
    let expected = eval(graph, &inputs);
    let tensors: Vec<Tensor> = inputs.iter().map(Value::to_tensor).collect();
    for wide in [false, true] {
        let compiler = crate::Compiler::new().wide(wide);
        let kernels = compiler.optimise(graph).unwrap_or_else(|e| panic!("{what}: {e}"));
        let program = compiler.lower(&kernels).unwrap_or_else(|e| panic!("{what}: {e}"));
        crate::tests::check_loops(&kernels, &program, &inputs, (&expected, tolerance));
        let executable = compiler.build(&kernels).unwrap_or_else(|e| panic!("{what}: {e}"));
        let named: Vec<(&str, TensorView)> =
            graph.inputs.iter().zip(&tensors).map(|((n, _), t)| (n.as_str(), t.view())).collect();
        let outputs = executable.run(&named).unwrap_or_else(|e| panic!("{what}: {e}"));
        for ((name, tensor), want) in outputs.iter().zip(&expected) {
            let got = Value::from_tensor(tensor);
            let text = || text::print(&kernels);
            assert!(close(want, &got, tolerance), "{what}: {name}, wide {wide}\n{}", text());
        }
    }
}

fn kernels(graph: &Graph) -> usize {
    let mut constant: Vec<bool> = Vec::new();
    for node in &graph.nodes {
        let moves = !matches!(node.op, Op::Input(_));
        constant.push(moves && node.args.iter().all(|a| constant[a.index()]));
    }
    let is_kernel = |i: &usize| matches!(graph.nodes[*i].op, Op::Fused(_)) && !constant[*i];
    (0..graph.nodes.len()).filter(is_kernel).count()
}

#[test]
fn random_graphs_keep_their_values() {
    for seed in 1000..1200 {
        let graph = Random::new(seed, DType::F64).finish();
        check_optimised(&graph, 1e-9, &format!("seed {seed}"));
    }
}

#[test]
fn random_graphs_compile() {
    for seed in 2000..2400 {
        let graph = Random::new(seed, DType::F32).finish();
        check_compiled(&graph, 1e-3, &format!("seed {seed}"));
    }
}

#[path = "models.rs"]
mod models;
