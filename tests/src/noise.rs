//! How far results may be from the interpreter's, by rounding at random: each inexact operation
//! is disturbed by about what one rounding changes, several times, and the spread of the results
//! says what their last places are worth (stochastic arithmetic; Vignes 1993, "A stochastic
//! arithmetic for reliable scientific computation").

use kiln::graph::Graph;
use kiln::graph::eval::{Data, Value, eval_op};
use kiln::graph::op::{BinaryFn, Op, ReduceFn, UnaryFn};
use kiln::rules::fuse::expand;
use kiln::tensor::DType;
use kiln_cases::Random;

/// How often a graph is disturbed.
const TRIALS: u64 = 6;
/// Results may be this many times as far away as any trial was.
const SAFETY: f64 = 32.0;
/// And this many last places, as functions are right to some of them.
const PLACES: f64 = 8.0;

/// Bits of the mantissa of a dtype, and its least number above 0.
fn precision(dtype: DType) -> (i32, f64) {
    match dtype {
        DType::F16 => (11, 6e-8),
        DType::BF16 => (8, 9.2e-41),
        DType::F64 => (53, 4.9e-324),
        _ => (24, 1.4e-45),
    }
}

/// Whether every order of computing an operation gives this value in every bit: integers, moves,
/// and sums and products of whole numbers that fit into the mantissa. `args`: values, and whether
/// they are exact.
pub fn is_exact(op: &Op, args: &[(&Value, bool)], value: &Value) -> bool {
    if args.iter().any(|a| !a.1) {
        return false;
    }
    let dtype = value.ty.dtype;
    if !dtype.is_float() {
        return true;
    }
    let whole = |v: &Value| v.as_f64s().iter().all(|x| x.fract() == 0.0);
    let largest = |v: &Value| v.as_f64s().iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let all_whole = whole(value) && args.iter().all(|a| whole(a.0));
    // Rules compute scales and shifts of sums apart: these fit as well with some bits to spare.
    let fits = |sum: f64| all_whole && sum <= f64::exp2(f64::from(precision(dtype).0 - 4));
    let size: f64 = args.iter().map(|a| largest(a.0)).product();
    match op {
        Op::Input(_) | Op::Const(_) | Op::Select | Op::Reshape(_) | Op::Permute(_) => true,
        Op::Expand(_) | Op::Slice(_) | Op::Pad(_) | Op::Window(_) | Op::Concat(_) => true,
        Op::Gather(_) | Op::Scatter(None | Some(ReduceFn::Max | ReduceFn::Min)) => true,
        Op::Unary(UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Sign) => true,
        Op::Unary(UnaryFn::Floor | UnaryFn::Ceil | UnaryFn::Round) => true,
        Op::Binary(BinaryFn::Max | BinaryFn::Min) => true,
        Op::Reduce(ReduceFn::Max | ReduceFn::Min, _) => true,
        Op::Scan(ReduceFn::Max | ReduceFn::Min, _) => true,
        Op::Cast(_) => args[0].0.as_f64s() == value.as_f64s(),
        Op::Binary(BinaryFn::Add | BinaryFn::Sub) => fits(largest(value)),
        Op::Binary(BinaryFn::Mul) => fits(size),
        Op::Binary(BinaryFn::Rem) => all_whole,
        Op::Reduce(ReduceFn::Sum, _) | Op::Scan(ReduceFn::Sum, _) => {
            fits(size * args[0].0.ty.numel() as f64)
        }
        Op::Contract(contract) => {
            // Convolutions by fewer products have fractions in between.
            let windows = contract.maps.iter().flatten().any(|index| index.terms.len() > 1);
            let sums: usize = contract.extents[contract.n_out..].iter().product();
            !windows && fits(size * sums as f64)
        }
        _ => false,
    }
}

/// What the outputs of a graph are, and how far from that each element may be.
pub struct Expected {
    /// The values of the outputs.
    pub values: Vec<Value>,
    /// For each element of each output, the distance that is allowed.
    pub bounds: Vec<Vec<f64>>,
}

/// Interprets a graph, and says what its results are worth. Named functions are disturbed inside
/// too: code does not round there.
pub fn expected(graph: &Graph, inputs: &[Value]) -> Expected {
    let graph = &expand(graph).expect("definitions fit their operands");
    let values = run(graph, inputs, None, &[]);
    let mut exact: Vec<bool> = Vec::new();
    for (node, value) in graph.nodes.iter().zip(&values) {
        let args: Vec<(&Value, bool)> =
            node.args.iter().map(|a| (&values[a.index()], exact[a.index()])).collect();
        exact.push(is_exact(&node.op, &args, value));
    }
    let mut trials: Vec<Vec<Value>> =
        (0..TRIALS).map(|seed| run(graph, inputs, Some(&mut Random::new(seed)), &exact)).collect();
    // Code may keep what the interpreter rounds, even to an infinity.
    trials.push(run(&unrounded(graph), inputs, None, &[]));
    let bounds = graph.outputs.iter().map(|(_, id)| {
        let value = &values[id.index()];
        let (bits, least) = precision(value.ty.dtype);
        let tried: Vec<Vec<f64>> = trials.iter().map(|t| t[id.index()].as_f64s()).collect();
        let bound = |(i, v): (usize, &f64)| {
            let apart = |t: &Vec<f64>| match (t[i].is_nan(), v.is_nan()) {
                (true, true) => 0.0,
                (false, false) if t[i] == *v => 0.0,
                (false, false) => (t[i] - v).abs(),
                // Whether there is a result at all hangs on rounding.
                _ => f64::INFINITY,
            };
            let spread = tried.iter().map(apart).fold(0.0, f64::max);
            let places = PLACES * (f64::exp2(f64::from(-bits)) * v.abs() + least);
            if value.ty.dtype.is_float() { SAFETY * spread + places } else { 0.0 }
        };
        value.as_f64s().iter().enumerate().map(bound).collect()
    });
    let bounds = bounds.collect();
    let outputs = graph.outputs.iter().map(|(_, id)| values[id.index()].clone()).collect();
    Expected { values: outputs, bounds }
}

/// The graph with all floats as f64.
fn unrounded(graph: &Graph) -> Graph {
    let mut graph = graph.clone();
    let wide = |dtype: DType| if dtype.is_float() { DType::F64 } else { dtype };
    for node in &mut graph.nodes {
        node.ty.dtype = wide(node.ty.dtype);
        if let Op::Cast(to) = &mut node.op {
            *to = wide(*to);
        }
    }
    graph
}

/// The first element that is further away than it may be.
pub fn difference(expected: &Expected, found: &[Value]) -> Option<String> {
    for (output, (value, bounds)) in expected.values.iter().zip(&expected.bounds).enumerate() {
        let got = &found[output];
        if got.ty.dtype != value.ty.dtype || got.ty.shape != value.ty.shape {
            return Some(format!("output {output} is {:?}, expected {:?}", got.ty, value.ty));
        }
        let (got, want) = (&got.data, &value.data);
        for (i, bound) in bounds.iter().enumerate() {
            let close = match (got, want) {
                (Data::Float(a), Data::Float(b)) => near(a[i], b[i], *bound),
                (a, b) => a.get(i) == b.get(i),
            };
            if !close {
                let (a, b) = (got.get(i), want.get(i));
                return Some(format!(
                    "output {output}, element {i} is {a:?}, expected {b:?} within {bound:e}"
                ));
            }
        }
    }
    None
}

fn near(a: f64, b: f64, bound: f64) -> bool {
    a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= bound || bound == f64::INFINITY
}

/// The value of every node, disturbed where there is something to disturb with.
fn run(graph: &Graph, inputs: &[Value], random: Option<&mut Random>, exact: &[bool]) -> Vec<Value> {
    let mut random = random;
    let mut values: Vec<Value> = Vec::with_capacity(graph.nodes.len());
    for (i, node) in graph.nodes.iter().enumerate() {
        let rough = random.is_some() && !exact[i];
        let mut args: Vec<Value> = node.args.iter().map(|a| values[a.index()].clone()).collect();
        if let Some(random) = random.as_mut().filter(|_| rough) {
            // Sums lose places of what they sum, not only of what comes out. Roundings of like
            // numbers are alike: so many of them lose a part of the worst case, which is as many
            // roundings of the sum.
            let times = 1.0 + (summed(&node.op, &args) as f64).powf(1.5) / 128.0;
            args.iter_mut().for_each(|value| disturb(value, times, random));
        }
        let mut value = match &node.op {
            Op::Input(i) => inputs[*i as usize].clone(),
            Op::Const(i) => Value::from_constant(&graph.constants[*i as usize]),
            op => eval_op(op, &args.iter().collect::<Vec<_>>(), &node.ty),
        };
        value.ty.dtype = node.ty.dtype;
        if let Some(random) = random.as_mut().filter(|_| rough) {
            disturb(&mut value, 1.0, random);
        }
        values.push(value);
    }
    values
}

/// Numbers that an element of the result is a sum of.
fn summed(op: &Op, args: &[Value]) -> usize {
    match op {
        Op::Contract(contract) => contract.extents[contract.n_out..].iter().product(),
        Op::Reduce(_, axes) => axes.iter().map(|&a| args[0].ty.shape[a as usize]).product(),
        Op::Scan(_, axis) => args[0].ty.shape[*axis as usize],
        _ => 1,
    }
}

/// Changes every number by up to so many times what one rounding does.
fn disturb(value: &mut Value, times: f64, random: &mut Random) {
    let (bits, least) = precision(value.ty.dtype);
    let unit = f64::exp2(f64::from(-bits));
    if let Data::Float(numbers) = &mut value.data {
        for v in numbers.iter_mut().filter(|v| v.is_finite()) {
            *v += times * f64::from(random.unit()) * (unit * v.abs() + least);
        }
    }
}
