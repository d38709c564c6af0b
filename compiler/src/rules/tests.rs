//! Rules are sound: in saturated random graphs, every node of every class has the class's value,
//! and so has every kernel that fusion keeps.

use std::collections::BTreeMap;

use egg::Id;
use kiln_runtime::tensor::DType;

use super::checks::{Random, check_classes, inputs_of};
use super::choices::ChoiceGraph;
use super::lang::{ENode, Saturated, build};
use super::table::{RULES, saturate};
use super::{Budget, cuts, extract, fuse, optimise};
use crate::graph::op::{Composite, Op, Type, UnaryFn};
use crate::graph::scalar::Dots;
use crate::graph::{Graph, text};

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
    let (mut checked, mut kernels) = (0, 0);
    for seed in 1..=1500 {
        let graph = Random::new(seed, DType::F64).finish();
        let plain = fuse::expand(&graph).expect("definitions are typed");
        let mut saturated = build(&plain);
        saturated.egraph.analysis.dots.whole = seed % 2 == 1;
        let budget = Budget { rounds: 8, nodes: 1500 };
        for (rule, count) in saturate(&mut saturated.egraph, budget) {
            *fired.entry(rule).or_insert(0) += count.values().sum::<usize>();
        }
        kernels += add_kernels(&mut saturated, &plain);
        checked += check_classes(&saturated, &inputs_of(&plain))
            .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}", text::print(&plain)));
    }
    println!("{checked} nodes, {kernels} kernels, fired {fired:?}");
    assert!(kernels > 50_000, "{kernels} kernels");
    for rule in RULES {
        let count = fired[rule.name];
        assert!(count >= 20, "{} ({:?}) fired {count} times", rule.name, rule.rounding);
    }
}

#[test]
fn a_wrong_rule_is_caught() {
    let graph = fuse::expand(&Random::new(3, DType::F64).finish()).expect("definitions are typed");
    let mut saturated = build(&graph);
    assert!(check_classes(&saturated, &inputs_of(&graph)).is_ok());
    // Two values of one type that differ are joined, as a wrong rule would do.
    let root = saturated.classes[graph.outputs[0].1.index()];
    let wrong = saturated.egraph.add(ENode::new(Op::Unary(UnaryFn::Neg), &[root]));
    saturated.egraph.union(root, wrong);
    saturated.egraph.rebuild();
    assert!(check_classes(&saturated, &inputs_of(&graph)).is_err());
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
    let graph = Random::new(7, DType::F64).finish();
    let optimised = || optimise(&graph, Some(Budget::default()), Dots::default()).unwrap().graph;
    assert_eq!(text::print(&optimised()), text::print(&optimised()));
}
