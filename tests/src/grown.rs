//! Random graphs over every operation and dtype, with numbers for their inputs, for tests that
//! compare whatever computes them.
//!
//! A graph is interpreted while it grows. Operations whose results are not numbers, or too large,
//! are left out, and so are jumps (roundings, comparisons, casts to integers) of numbers that
//! were rounded before: there, a difference in the last place would be one in the first.

mod steps;

use kiln::graph::eval::{Data, Value, eval_op, int_range, round_float};
use kiln::graph::op::{Op, Type};
use kiln::graph::{Graph, NodeId, Origin};
use kiln::tensor::DType;
use kiln_cases::Random;

use crate::noise::is_exact;

/// A graph with numbers for its inputs.
#[derive(Clone, Debug)]
pub struct Grown {
    /// The graph.
    pub graph: Graph,
    /// A value for each of its inputs.
    pub inputs: Vec<Value>,
}

/// What a graph is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Diet {
    /// All operations, numbers of moderate size.
    Tame,
    /// Numbers that are infinite, not a number, very large or very small, in operations that give
    /// one result for these in whatever order they are computed.
    Wild,
}

/// Elements of a value at most: the interpreter is slow.
const ELEMENTS: usize = 3000;
/// Axes at most.
const RANK: usize = 6;
/// Dtypes as often as they stand here.
const DTYPES: [DType; 18] = [
    DType::F32,
    DType::F32,
    DType::F32,
    DType::F32,
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::F64,
    DType::I64,
    DType::I32,
    DType::I16,
    DType::I8,
    DType::U8,
    DType::U8,
    DType::U16,
    DType::U32,
    DType::U64,
    DType::Bool,
];
/// Numbers where functions break.
const EDGES: [f64; 13] = [
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    0.0,
    -0.0,
    1e-40,
    -1e-6,
    6.5e4,
    -3.4e38,
    1e30,
    88.8,
    -104.0,
    0.5,
];

type Step = fn(&mut Grower, NodeId) -> Option<NodeId>;
/// Operations as often as they are tried; the first [`WILD`] ones suit any numbers.
const STEPS: [(usize, Step); 22] = [
    (4, Grower::unary),
    (6, Grower::binary),
    (2, Grower::select),
    (3, Grower::cast),
    (4, Grower::permute),
    (5, Grower::reshape),
    (2, Grower::expand),
    (3, Grower::slice),
    (3, Grower::pad),
    (3, Grower::concat),
    (3, Grower::gather),
    (3, Grower::greatest),
    (2, Grower::scatter),
    (2, Grower::windows),
    (4, Grower::reduce),
    (2, Grower::scan),
    (4, Grower::product),
    (3, Grower::convolution),
    (2, Grower::einsum),
    (3, Grower::composite),
    (2, Grower::attention),
    (2, Grower::bits),
];
const WILD: usize = 12;

struct Grower {
    random: Random,
    diet: Diet,
    graph: Graph,
    inputs: Vec<Value>,
    /// Of every node: its value, whether it is one that no order of computing changes, and
    /// whether it may be used.
    values: Vec<Value>,
    exact: Vec<bool>,
    sound: Vec<bool>,
    /// What the next operation may take.
    open: Vec<NodeId>,
}

/// A graph of its own for every seed.
pub fn grow(seed: u64, diet: Diet) -> Grown {
    let mut grower = Grower {
        random: Random::new(seed),
        diet,
        graph: Graph::default(),
        inputs: Vec::new(),
        values: Vec::new(),
        exact: Vec::new(),
        sound: Vec::new(),
        open: Vec::new(),
    };
    for _ in 0..1 + grower.random.below(3) {
        let ty = grower.some_type();
        let input = grower.input(ty);
        grower.open.extend(input);
    }
    for _ in 0..3 + grower.random.below(12) {
        grower.step();
    }
    let count = 1 + grower.random.below(2);
    let outputs: Vec<NodeId> = grower.open.iter().rev().take(count).copied().collect();
    for (i, id) in outputs.into_iter().enumerate() {
        grower.graph.outputs.push((format!("y{i}"), id));
    }
    let (graph, kept) = kiln::graph::reduce::needed(&grower.graph);
    let inputs = kept.into_iter().map(|i| grower.inputs[i].clone()).collect();
    Grown { graph, inputs }
}

fn origin() -> Origin {
    "n".into()
}

impl Grower {
    fn chance(&mut self, one_in: usize) -> bool {
        self.random.below(one_in) == 0
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.random.below(list.len())]
    }

    fn step(&mut self) {
        let steps = if self.diet == Diet::Wild { &STEPS[..WILD] } else { &STEPS[..] };
        let mut at = self.random.below(steps.iter().map(|s| s.0).sum());
        let chosen = steps.iter().find(|step| {
            let here = at < step.0;
            at = at.saturating_sub(step.0);
            here
        });
        // Mostly the last value, so that graphs are deep.
        let count = self.open.len();
        let back = if self.chance(3) { self.random.below(count) } else { 0 };
        let x = self.open[count - 1 - back];
        if let Some((_, step)) = chosen
            && let Some(y) = step(self, x)
        {
            self.open.push(y);
        }
    }

    fn some_type(&mut self) -> Type {
        let dtype = self.pick(&DTYPES);
        let rank = self.random.below(5);
        let mut shape: Vec<usize> = (0..rank).map(|_| 1 + self.random.below(6)).collect();
        if let Some(last) = shape.last_mut()
            && self.chance(3)
        {
            *last = 7 + self.random.below(60);
        }
        if self.chance(60) && rank > 0 {
            shape[rank - 1] = 0;
        }
        let dtype = match self.diet {
            Diet::Wild if !dtype.is_float() => DType::F32,
            _ => dtype,
        };
        Type::new(dtype, &shape)
    }

    /// Numbers of a type: whole ones, fractions, or the edges of the dtype.
    fn numbers(&mut self, ty: Type) -> Value {
        let count = ty.numel();
        let kind = self.random.below(4);
        let data = match ty.dtype {
            DType::Bool => Data::Int((0..count).map(|_| self.random.below(2) as i128).collect()),
            dtype if dtype.is_float() => {
                let number = |_| {
                    let number = match (self.diet, kind) {
                        (Diet::Wild, _) if self.chance(4) => self.pick(&EDGES),
                        (_, 0) => self.random.below(9) as f64 - 4.0,
                        (_, 1) => self.random.below(33) as f64 / 8.0 - 2.0,
                        _ => f64::from(self.random.unit()),
                    };
                    round_float(dtype, number)
                };
                Data::Float((0..count).map(number).collect())
            }
            dtype => {
                let (least, most) = int_range(dtype);
                let number = |_| match kind {
                    0 if self.chance(3) => self.pick(&[least, most, least / 2, most / 3]),
                    _ => (self.random.below(12) as i128 - 5).clamp(least, most),
                };
                Data::Int((0..count).map(number).collect())
            }
        };
        Value { ty, data }
    }

    fn input(&mut self, ty: Type) -> Option<NodeId> {
        let value = self.numbers(ty);
        let id = self.graph.input(&format!("x{}", self.inputs.len()), value.ty.clone());
        self.inputs.push(value);
        self.settle(id)
    }

    fn constant(&mut self, dtype: DType, shape: &[usize]) -> Option<NodeId> {
        let value = self.numbers(Type::new(dtype, shape));
        let id = self.graph.tensor(&value.to_tensor(), &origin());
        self.settle(id)
    }

    fn number(&mut self, like: NodeId, value: f64) -> Option<NodeId> {
        let (dtype, rank) = (self.ty(like).dtype, self.ty(like).rank());
        let id = self.graph.scalar(dtype, rank, value, &origin());
        self.settle(id)
    }

    fn ty(&self, x: NodeId) -> &Type {
        self.graph.ty(x)
    }

    fn shape(&self, x: NodeId) -> Vec<usize> {
        self.ty(x).shape.to_vec()
    }

    fn is_exact(&self, x: NodeId) -> bool {
        self.exact[x.index()]
    }

    /// Adds an operation, if it fits and its value may be used.
    fn add(&mut self, op: Op, args: &[NodeId]) -> Option<NodeId> {
        let id = self.graph.add(op, args, &origin()).ok()?;
        self.settle(id)
    }

    /// Interprets the nodes that are new. Gives the node if its value may be used.
    fn settle(&mut self, id: NodeId) -> Option<NodeId> {
        for node in &self.graph.nodes[self.values.len()..] {
            let args: Vec<&Value> = node.args.iter().map(|a| &self.values[a.index()]).collect();
            let small = node.ty.numel() <= ELEMENTS && node.ty.rank() <= RANK;
            let value = match &node.op {
                Op::Input(i) => self.inputs[*i as usize].clone(),
                Op::Const(i) => Value::from_constant(&self.graph.constants[*i as usize]),
                op if small && cost(op) <= 50 * ELEMENTS => eval_op(op, &args, &node.ty),
                _ => Value::splat(DType::Bool, &[0], 0.0),
            };
            let known: Vec<(&Value, bool)> = node
                .args
                .iter()
                .map(|a| (&self.values[a.index()], self.exact[a.index()]))
                .collect();
            self.exact.push(is_exact(&node.op, &known, &value));
            let tame = self.diet == Diet::Wild || is_tame(&value);
            let sound = node.args.iter().all(|a| self.sound[a.index()]);
            self.sound.push(value.ty == node.ty && tame && sound);
            self.values.push(value);
        }
        self.sound[id.index()].then_some(id)
    }

    /// Another operand for x: a number, one that repeats along some axes, or an earlier value.
    fn partner(&mut self, x: NodeId) -> Option<NodeId> {
        let (dtype, shape) = (self.ty(x).dtype, self.shape(x));
        let fits = |&id: &NodeId| {
            let ty = self.graph.ty(id);
            ty.dtype == dtype && kiln::graph::infer::broadcast(&shape, &ty.shape).is_ok()
        };
        let earlier: Vec<NodeId> = self.open.iter().copied().filter(fits).collect();
        match self.random.below(4) {
            0 => {
                let value = self.random.below(9) as f64 / 2.0 - 2.0;
                self.number(x, value)
            }
            1 => {
                let repeats: Vec<usize> =
                    shape.iter().map(|&e| if self.chance(2) { 1 } else { e }).collect();
                self.constant(dtype, &repeats)
            }
            2 if self.inputs.len() < 4 => self.input(Type::new(dtype, &shape)),
            _ if earlier.is_empty() => self.constant(dtype, &shape),
            _ => Some(self.pick(&earlier)),
        }
    }
}

/// Steps of an operation that has more of them than results.
fn cost(op: &Op) -> usize {
    match op {
        Op::Contract(contract) => {
            contract.extents.iter().fold(1usize, |product, &e| product.saturating_mul(e))
        }
        _ => 0,
    }
}

/// Whether numbers are of a moderate size for their dtype.
fn is_tame(value: &Value) -> bool {
    let limit = match value.ty.dtype {
        DType::F16 | DType::BF16 => 500.0,
        _ => 1e5,
    };
    match &value.data {
        Data::Float(numbers) => numbers.iter().all(|v| v.abs() <= limit),
        Data::Int(_) => true,
    }
}
