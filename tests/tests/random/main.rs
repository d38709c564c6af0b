//! Random graphs in every form: the interpreter, machine code of both emitters, with and without
//! the e-graph, loops, files, PTX and other architectures, and libtorch.
//!
//! `KILN_GRAPHS` is how many graphs are tried (2,000), `KILN_SEED` the first one. A graph that
//! fails is made small before it is shown.

mod found;
mod guarded;
mod torch;

use kiln::Compiler;
use kiln::graph::eval::Value;
use kiln::graph::reduce::reduce;
use kiln::graph::{Graph, text};
use kiln::tensor::Tensor;
use kiln_tests::grown::{Diet, Grown, grow};
use kiln_tests::machines::machines;
use kiln_tests::noise::{Expected, difference, expected};
use kiln_tests::{
    Run, compilers, environment, old_compiler, ptx, run_compiled, run_library, run_loops,
};

/// Slow ways are tried on one graph of so many.
const RARE: u64 = 8;
/// The slowest ones, on one of so many.
const VERY_RARE: u64 = 64;

/// Failures that are shown at most.
const SHOWN: usize = 4;

type Results = Result<Vec<Value>, String>;
/// Computes the outputs of a graph.
type Way = dyn Fn(&Graph, &[Tensor]) -> Results;

fn values(tensors: Vec<Tensor>) -> Vec<Value> {
    tensors.iter().map(Value::from_tensor).collect()
}

/// Machine code in memory.
fn compiled(compiler: Compiler) -> Box<Way> {
    Box::new(move |graph, inputs| {
        run_compiled(graph, inputs, &compiler).map(values).map_err(|e| e.to_string())
    })
}

/// The ways that are tried on the graph of a number, with their names.
fn ways(seed: u64) -> Vec<(String, Box<Way>)> {
    let mut ways: Vec<(String, Box<Way>)> = compilers()
        .into_iter()
        .map(|(name, compiler)| (name.to_string(), compiled(compiler)))
        .collect();
    if seed.is_multiple_of(RARE) {
        ways.extend(old_compiler().map(|(name, compiler)| (name.to_string(), compiled(compiler))));
        let others: [(&str, Run); 3] = [
            ("as loops", run_loops),
            ("as a library", run_library),
            ("as PTX", |graph, inputs| ptx::run(graph, inputs, &Compiler::new())),
        ];
        for (name, run) in others {
            let way = move |graph: &Graph, inputs: &[Tensor]| run(graph, inputs).map(values);
            ways.push((name.into(), Box::new(way)));
        }
    }
    if seed.is_multiple_of(VERY_RARE) {
        for machine in machines() {
            let name = machine.lock().unwrap_or_else(|e| e.into_inner()).cpu().triple.name;
            ways.push((
                format!("on {name}"),
                Box::new(move |graph, inputs| {
                    let mut machine = machine.lock().unwrap_or_else(|e| e.into_inner());
                    machine.run(graph, inputs).map(values)
                }),
            ));
        }
    }
    ways
}

/// What is wrong with the results of a way.
fn wrong(way: &Way, graph: &Graph, inputs: &[Value], expected: &Expected) -> Option<String> {
    let tensors: Vec<Tensor> = inputs.iter().map(Value::to_tensor).collect();
    match way(graph, &tensors) {
        Ok(found) => difference(expected, &found),
        Err(why) => Some(why),
    }
}

/// The smallest graph that was found to be wrong in the same way, as text.
fn shown(way: &Way, grown: &Grown) -> String {
    let mut fails = |graph: &Graph, inputs: &[Value]| {
        wrong(way, graph, inputs, &expected(graph, inputs)).is_some()
    };
    let (graph, inputs) = reduce(&grown.graph, &grown.inputs, &mut fails);
    let why = wrong(way, &graph, &inputs, &expected(&graph, &inputs)).unwrap_or_default();
    // The first ones of many numbers.
    let first = |value: &Value| value.as_f64s().into_iter().take(40).collect();
    let inputs: Vec<Vec<f64>> = inputs.iter().map(first).collect();
    format!("{}inputs {inputs:?}\n{why}", text::print(&graph))
}

/// Compares all ways on so many graphs; gives how many nodes these had.
fn compare(seeds: std::ops::Range<u64>, diet: Diet) -> usize {
    let (mut nodes, mut failures) = (0, Vec::new());
    for seed in seeds {
        let grown = grow(seed, diet);
        let expected = expected(&grown.graph, &grown.inputs);
        nodes += grown.graph.nodes.len();
        for (name, way) in ways(seed) {
            if let Some(why) = wrong(&way, &grown.graph, &grown.inputs, &expected) {
                let smaller = shown(&way, &grown);
                failures.push(format!("{diet:?} graph {seed} {name}: {why}\nsmaller: {smaller}"));
                break;
            }
        }
        if failures.len() == SHOWN {
            break;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    nodes
}

fn graphs() -> (u64, u64) {
    (environment("KILN_SEED", 0), environment("KILN_GRAPHS", 2000))
}

#[test]
fn graphs_mean_the_same_in_every_form() {
    let (first, count) = graphs();
    let nodes = compare(first..first + count, Diet::Tame);
    println!("{count} graphs of {nodes} nodes");
    assert!(nodes as u64 > 4 * count, "{nodes} nodes");
}

#[test]
fn infinities_and_nans_mean_the_same_in_every_form() {
    let (first, count) = graphs();
    let nodes = compare(first..first + count / 4, Diet::Wild);
    println!("{} graphs of {nodes} nodes", count / 4);
}

#[test]
fn the_interpreter_says_what_libtorch_says() {
    let (first, count) = graphs();
    tch::set_num_threads(1);
    let (mut compared, mut seed) = (0, first);
    while compared < count / 4 {
        let grown = grow(seed, Diet::Tame);
        seed += 1;
        let Some(found) = torch::eval(&grown.graph, &grown.inputs) else { continue };
        compared += 1;
        let expected = expected(&grown.graph, &grown.inputs);
        if let Some(why) = difference(&expected, &found) {
            let torch = |graph: &Graph, inputs: &[Tensor]| {
                let inputs = values(inputs.to_vec());
                torch::eval(graph, &inputs).ok_or_else(|| "not in libtorch".to_string())
            };
            panic!("graph {}: {why}\nsmaller: {}", seed - 1, shown(&torch, &grown));
        }
    }
    println!("{compared} of {} graphs are ones that libtorch can compute", seed - first);
}
