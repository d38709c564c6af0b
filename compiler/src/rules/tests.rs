//! Rules are sound: in saturated random graphs, every node of every class has the class's value.

use std::collections::{BTreeMap, HashMap};

use egg::Id;
use kiln_runtime::tensor::{DType, Tensor};
use smallvec::SmallVec;

use super::choices::ChoiceGraph;
use super::lang::{ENode, Egg, Saturated, build};
use super::table::{RULES, saturate};
use super::{Budget, cuts, extract, optimise};
use crate::graph::eval::{Value, eval, eval_body, eval_op};
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use crate::graph::scalar::Dots;
use crate::graph::{Graph, NodeId, Origin};

/// A small deterministic generator (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let n = shape.iter().product();
        let values: Vec<f64> = (0..n).map(|_| self.below(9) as f64 - 4.0).collect();
        Tensor::from_slice(shape, &values)
    }
}

fn constant(graph: &mut Graph, random: &mut Random, shape: &[usize]) -> NodeId {
    let tensor = random.tensor(shape);
    graph.tensor(&tensor, &"c".into())
}

/// One more operation over the values so far; `None` where the choice does not fit.
fn grow(graph: &mut Graph, random: &mut Random, values: &[NodeId]) -> Option<NodeId> {
    let o: Origin = "n".into();
    let x = values[random.below(values.len())];
    let shape = graph.ty(x).shape.to_vec();
    let rank = shape.len();
    match random.below(19) {
        0 if random.below(3) == 0 => {
            let power = 2.0 + random.below(3) as f64;
            graph.binary_number(BinaryFn::Pow, x, power, &o).ok()
        }
        0 => graph.unary(UnaryFn::Neg, x, &o).ok(),
        1 => graph.binary_number(BinaryFn::Max, x, 0.0, &o).ok(),
        2 | 3 => {
            let mut to = vec![1; rank];
            let axis = random.below(rank);
            to[axis] = shape[axis];
            let c = constant(graph, random, &to);
            let f = if random.below(2) == 0 { BinaryFn::Mul } else { BinaryFn::Add };
            graph.binary(f, x, c, &o).ok()
        }
        4 => {
            let mut axes: Vec<usize> = (0..rank).collect();
            (1..rank).for_each(|i| axes.swap(i, random.below(i + 1)));
            graph.permute(x, &axes, &o).ok()
        }
        5 => {
            // Split or join two neighbouring axes.
            let axis = random.below(rank);
            let mut to = shape.clone();
            if shape[axis].is_multiple_of(2) && rank < 5 && random.below(2) == 0 {
                to[axis] = 2;
                to.insert(axis + 1, shape[axis] / 2);
            } else if axis + 1 < rank && rank > 2 {
                to[axis] *= to.remove(axis + 1);
            }
            graph.reshape(x, &to, &o).ok()
        }
        6 if rank == 4 => {
            let zero = graph.scalar(DType::F64, 0, 0.0, &o);
            let borders = [(0, 0), (0, 0), (1, 0), (1, 1)].into_iter().collect();
            graph.add(Op::Pad(borders), &[x, zero], &o).ok()
        }
        7 => {
            let ranges: SmallVec<[(i64, i64, usize); 6]> =
                shape.iter().map(|&e| if e > 2 { (1, 1, e - 1) } else { (0, 1, e) }).collect();
            graph.add(Op::Slice(ranges), &[x], &o).ok()
        }
        8 => graph.reduce(ReduceFn::Sum, x, &[random.below(rank)], &o).ok(),
        9 => {
            let y = values[random.below(values.len())];
            graph.add(Op::Concat(random.below(rank) as u8), &[x, y], &o).ok()
        }
        10 if rank == 4 && shape[2] > 1 && shape[3] > 1 => {
            let sizes = if random.below(2) == 0 { [shape[2], shape[3]] } else { [2, 2] };
            let windows = Op::Window(sizes.into_iter().map(|size| (size, 1, 1)).collect());
            let windows = graph.add(windows, &[x], &o).ok()?;
            let y = graph.reduce(ReduceFn::Max, windows, &[4, 5], &o).ok()?;
            let to = graph.ty(y).shape[..4].to_vec();
            graph.reshape(y, &to, &o).ok()
        }
        11 | 12 if rank == 4 => {
            let w = constant(graph, random, &[3, shape[1], 1, 1]);
            graph.conv([x, w], (&[1, 1], &[1, 1]), 1, &o).ok()
        }
        13 => {
            let w = constant(graph, random, &[shape[rank - 1], 2]);
            let w = graph.with_rank(w, rank, &o).ok()?;
            graph.matmul(x, w, &o).ok()
        }
        17 | 18 => super::integers::tests::grow(graph, &mut |n| random.below(n), x).ok(),
        14 => siblings(graph, random, x),
        15 => grouped(graph, x, random.below(2) == 0),
        16 if random.below(2) == 0 => {
            super::shuffle::tests::grow(graph, &mut |n| random.below(n), x).ok()
        }
        _ => {
            let y = values[random.below(values.len())];
            graph.binary(BinaryFn::Add, x, y, &o).ok()
        }
    }
}

/// Products of queries with keys that two heads share.
fn grouped(graph: &mut Graph, x: NodeId, one_row: bool) -> Option<NodeId> {
    let o: Origin = "n".into();
    let shape = graph.ty(x).shape.to_vec();
    let [m, n] = *shape.last_chunk::<2>()?;
    let (own, m, n) = match one_row {
        true => (1, 1, shape.iter().product()),
        false => (shape[..shape.len() - 2].iter().product(), m, n),
    };
    let apart = graph.reshape(x, &[own, 1, m, n], &o).ok()?;
    let spread = graph.expand(apart, &[own, 2, m, n], &o).ok()?;
    let keys = graph.reshape(spread, &[2 * own, m, n], &o).ok()?;
    let queries = graph.unary(UnaryFn::Tanh, keys, &o).ok()?;
    let queries = graph.binary_number(BinaryFn::Mul, queries, 0.5, &o).ok()?;
    let keys = graph.permute(keys, &[0, 2, 1], &o).ok()?;
    graph.matmul(queries, keys, &o).ok()
}

/// Products of one value with several weights, each shifted and bounded, side by side.
fn siblings(graph: &mut Graph, random: &mut Random, x: NodeId) -> Option<NodeId> {
    let o: Origin = "n".into();
    let shape = graph.ty(x).shape.to_vec();
    let rank = shape.len();
    let mut parts = Vec::new();
    let shifted = random.below(4) > 0;
    for extent in [2, 3] {
        let w = constant(graph, random, &[shape[rank - 1], extent]);
        let w = graph.with_rank(w, rank, &o).ok()?;
        let mut y = graph.matmul(x, w, &o).ok()?;
        if shifted {
            let mut to = vec![1; rank];
            to[rank - 1] = extent;
            let c = constant(graph, random, &to);
            y = graph.binary(BinaryFn::Add, y, c, &o).ok()?;
        }
        parts.push(graph.binary_number(BinaryFn::Max, y, 0.0, &o).ok()?);
    }
    graph.add(Op::Concat(rank as u8 - 1), &parts, &o).ok()
}

fn random_graph(seed: u64) -> (Graph, Value) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut graph = Graph::default();
    let shape = [1, 2, 4, 3];
    let mut values = vec![graph.input("x", Type::new(DType::F64, &shape))];
    for _ in 0..9 {
        if let Some(id) = grow(&mut graph, &mut random, &values)
            && graph.ty(id).numel() <= 2000
            && graph.ty(id).rank() > 0
        {
            values.push(id);
        }
    }
    let last = values[values.len() - 1];
    graph.outputs.push(("y".into(), last));
    let input = Value::from_tensor(&random.tensor(&shape));
    (graph, input)
}

fn close(a: &Value, b: &Value) -> bool {
    let same = |(x, y): (&f64, &f64)| (x - y).abs() <= 1e-9 * (1.0 + x.abs().max(y.abs()));
    a.ty == b.ty && a.as_f64s().iter().zip(&b.as_f64s()).all(same)
}

/// Evaluates every node of every class from the values of its operands' classes.
fn check_sound(egraph: &Egg, input: &Value, seed: u64) {
    let mut values: HashMap<Id, Value> = HashMap::new();
    let mut classes: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    classes.sort_unstable();
    let compute = |values: &HashMap<Id, Value>, class: Id, op: &Op, args: &[Id]| {
        let operands: Option<Vec<&Value>> =
            args.iter().map(|a| values.get(&egraph.find(*a))).collect();
        let operands = operands?;
        Some(match op {
            Op::Input(_) => input.clone(),
            Op::Const(i) => Value::from_constant(&egraph.analysis.constants[*i as usize]),
            Op::Fused(i) => {
                let body = &egraph.analysis.bodies[*i as usize];
                eval_body(body, &operands, &egraph.analysis.constants)
            }
            op => eval_op(op, &operands, &egraph[class].data.ty),
        })
    };
    loop {
        let before = values.len();
        for &class in &classes {
            if values.contains_key(&class) {
                continue;
            }
            let found =
                egraph[class].nodes.iter().find_map(|n| compute(&values, class, &n.op, &n.args));
            if let Some(value) = found {
                values.insert(class, value);
            }
        }
        if values.len() == before {
            break;
        }
    }
    assert_eq!(values.len(), classes.len(), "every class has a value, seed {seed}");
    for &class in &classes {
        for node in &egraph[class].nodes {
            let value = compute(&values, class, &node.op, &node.args).expect("all have values");
            assert!(
                close(&value, &values[&class]),
                "seed {seed}: {node:?} is not equal to its class {:?}",
                egraph[class].nodes
            );
        }
    }
}

/// Adds the kernels that fusion keeps, each as a node of its value's class.
fn add_kernels(saturated: &mut Saturated, graph: &Graph) -> usize {
    let cheapest = extract::cheapest(saturated, &extract::users(saturated, graph));
    let mut choices = ChoiceGraph::new(saturated, &cheapest, graph);
    let kernels = cuts::cuts(&mut choices);
    let egraph = &mut saturated.egraph;
    egraph.analysis.bodies = choices.bodies.list().to_vec();
    let mut count = 0;
    for (value, kernels) in choices.values.iter().zip(&kernels) {
        for kernel in kernels.iter().filter(|k| k.inside.len() > 1) {
            let args: Vec<Id> =
                kernel.args.iter().map(|&a| choices.values[a as usize].class).collect();
            let id = egraph.add(ENode::new(Op::Fused(kernel.body), &args));
            egraph.union(value.class, id);
            count += 1;
        }
    }
    egraph.rebuild();
    count
}

#[test]
fn every_node_of_every_class_agrees() {
    let mut fired: BTreeMap<&str, usize> = BTreeMap::new();
    let mut kernels = 0;
    for seed in 0..2000 {
        let (graph, input) = random_graph(seed);
        let mut saturated = build(&graph);
        saturated.egraph.analysis.dots.whole = seed % 2 == 1;
        let budget = Budget { rounds: 8, nodes: 2_000 };
        for (name, count) in saturate(&mut saturated.egraph, budget) {
            *fired.entry(name).or_insert(0) += count.values().sum::<usize>();
        }
        kernels += add_kernels(&mut saturated, &graph);
        check_sound(&saturated.egraph, &input, seed);
    }
    println!("{fired:#?}, {kernels} kernels");
    assert!(kernels > 2000);
    for rule in RULES {
        let count = fired[rule.name];
        assert!(count >= 5, "{} ({:?}) fired {count} times", rule.name, rule.rounding);
    }
}

#[test]
fn optimised_graphs_mean_the_same() {
    for seed in 1000..1200 {
        let (graph, input) = random_graph(seed);
        let expected = eval(&graph, std::slice::from_ref(&input));
        for egraph in [false, true] {
            let optimised = optimise(
                &graph,
                egraph.then(Budget::default),
                Dots { whole: seed % 2 == 1, ..Dots::default() },
            )
            .unwrap();
            let got = eval(&optimised.graph, std::slice::from_ref(&input));
            assert!(close(&got[0], &expected[0]), "seed {seed}, e-graph {egraph}");
            assert!(optimised.report.chosen_us <= optimised.report.greedy_us);
        }
    }
}

#[test]
fn a_wrong_rule_is_caught() {
    let (graph, input) = random_graph(3);
    let saturated = build(&graph);
    let mut egraph = saturated.egraph;
    // Two values of one type that differ are joined, as a wrong rule would do.
    let root = saturated.classes[graph.outputs[0].1.index()];
    let wrong = egraph.add(ENode::new(Op::Unary(UnaryFn::Neg), &[root]));
    egraph.union(root, wrong);
    egraph.rebuild();
    let caught = std::panic::catch_unwind(|| check_sound(&egraph, &input, 3));
    assert!(caught.is_err());
}

#[test]
fn softmax_and_layer_norm_are_one_kernel_each() {
    for f in [Composite::Softmax(1), Composite::LayerNorm(1, 1e-5f32.to_bits())] {
        let mut graph = Graph::default();
        let x = graph.input("x", Type::new(DType::F32, &[16, 96]));
        let y = graph.composite(f, x, &"norm".into()).unwrap();
        graph.outputs.push(("y".into(), y));
        let optimised = optimise(&graph, Some(Budget::default()), Dots::default()).unwrap();
        let fused = |n: &&crate::graph::Node| matches!(n.op, Op::Fused(_));
        assert_eq!(optimised.graph.nodes.iter().filter(fused).count(), 1, "{f:?}");
    }
}

#[test]
fn equal_input_gives_equal_text() {
    let (graph, _) = random_graph(7);
    let texts: Vec<String> = (0..2)
        .map(|_| {
            crate::graph::text::print(
                &optimise(&graph, Some(Budget::default()), Dots::default()).unwrap().graph,
            )
        })
        .collect();
    assert_eq!(texts[0], texts[1]);
}
