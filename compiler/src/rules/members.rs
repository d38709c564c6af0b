//! The e-graph as a source of tests: whatever nodes are chosen of its classes make a graph that
//! means what the model does.
//!
//! `KILN_GRAPHS` is how many graphs are tried (200), `KILN_SEED` the first one.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use egg::Id;
use kiln_runtime::tensor::{DType, Tensor, TensorView};

use super::checks::{Random, close, inputs_of};
use super::constants::gather;
use super::extract::{cheapest_by, extract, users};
use super::fuse::{expand, fuse};
use super::lang::{ENode, build};
use super::table::saturate;
use super::{Budget, Fired};
use crate::Compiler;
use crate::error::Error;
use crate::graph::eval::{Value, eval};
use crate::graph::{Graph, text};

/// Members of a graph that are tried at most, and how often one is looked for.
const MEMBERS: usize = 20;
const TRIES: u64 = 60;
/// How often every rule has to fire over so many graphs.
const LONG: (u64, usize) = (40_000, 1_000);

/// Different graphs of the e-graph of one, and how often rules fired.
fn members(graph: &Graph, compiler: &Compiler, seed: u64) -> (Vec<Graph>, Fired) {
    let plain = expand(graph).expect("definitions fit their operands");
    // What gathers constants leaves some rules nothing to do.
    let plain = if seed.is_multiple_of(2) { gather(&plain) } else { plain };
    let mut saturated = build(&plain);
    saturated.egraph.analysis.dots = compiler.cpu().wanted_dots();
    let fired = saturate(&mut saturated.egraph, Budget { rounds: 8, nodes: 3000 });
    let users = users(&saturated, &plain);
    let mut members: BTreeMap<String, Graph> = BTreeMap::new();
    for member in 0..TRIES {
        let cost = |class: Id, node: &ENode| {
            let mut hash = DefaultHasher::new();
            (member, class, node).hash(&mut hash);
            // From 1/16 to 16.
            f64::exp2((hash.finish() % 4096) as f64 / 512.0 - 4.0)
        };
        let chosen = cheapest_by(&cost, &saturated, &users);
        let (graph, _) = extract(&saturated, &chosen, &plain);
        members.insert(text::print(&graph), graph);
        if members.len() == MEMBERS {
            break;
        }
    }
    (members.into_values().collect(), fired)
}

fn run(compiler: &Compiler, graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Value>, Error> {
    let executable = compiler.build(&fuse(graph))?;
    let named: Vec<(&str, TensorView)> =
        graph.inputs.iter().zip(inputs).map(|((name, _), t)| (&name[..], t.view())).collect();
    let outputs = executable.run(&named).expect("the inputs are those of the graph");
    Ok(outputs.iter().map(|(_, tensor)| Value::from_tensor(tensor)).collect())
}

fn environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn every_member_of_an_e_graph_is_right() {
    let compiler = Compiler::new().verify_code(true);
    let (first, count) = (environment("KILN_SEED", 1), environment("KILN_GRAPHS", 200));
    let mut fired: BTreeMap<&str, usize> = BTreeMap::new();
    let mut tried = 0;
    for seed in first..first + count {
        let graph = Random::new(seed, DType::F32).finish();
        let inputs = inputs_of(&graph);
        let expected = eval(&graph, &inputs);
        let inputs: Vec<Tensor> = inputs.iter().map(Value::to_tensor).collect();
        let (members, counts) = members(&graph, &compiler, seed);
        for (rule, places) in counts {
            *fired.entry(rule).or_default() += places.values().sum::<usize>();
        }
        for member in members {
            tried += 1;
            let text = || format!("{}member:\n{}", text::print(&graph), text::print(&member));
            let found = run(&compiler, &member, &inputs);
            let found = found.unwrap_or_else(|e| panic!("graph {seed}: {e}\n{}", text()));
            let right = found.iter().zip(&expected).all(|(a, b)| close(a, b, 1e-3));
            assert!(right, "graph {seed}: {}", text());
        }
    }
    println!("{tried} members of {count} graphs; rules fired {fired:#?}");
    assert!(tried as u64 > 5 * count, "{tried} members");
    let rare = fired.iter().find(|rule| *rule.1 < LONG.1);
    assert!(count < LONG.0 || rare.is_none(), "{rare:?}");
}
