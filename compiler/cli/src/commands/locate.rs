//! The first stage of the pipeline whose result means something else, and the node there. The
//! graph, the graph of kernels and the loops have interpreters; code is run.

use kiln::error::sanitize;
use kiln::graph::eval::{Value, eval, eval_nodes};
use kiln::graph::op::Op;
use kiln::graph::reduce::reduce;
use kiln::graph::{Graph, NodeId};
use kiln::plan::eval::eval_node;
use kiln::plan::kernels::Program;
use kiln::tensor::Tensor;
use kiln::{Compiler, Executable};

use crate::failure::Failure;
use crate::stats::{Tolerance, values};

/// A stage and a node of the model, where one can be named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The stage: import, optimise, lower, code, wide code or plan.
    pub stage: &'static str,
    /// The node.
    pub node: Option<String>,
}

impl Place {
    /// A stage as a whole.
    pub fn stage(stage: &'static str) -> Place {
        Place { stage, node: None }
    }
}

/// Where a compiled graph goes astray, known that it does.
pub fn locate(
    compiler: &Compiler,
    graph: &Graph,
    inputs: &[Value],
    tolerance: Tolerance,
) -> Result<Place, Failure> {
    let fused = compiler.optimise(graph)?;
    let (before, after) = (eval_nodes(graph, inputs), eval_nodes(&fused, inputs));
    if let Some(id) = optimiser(graph, &before, &fused, &after, tolerance) {
        return Ok(place("optimise", &fused, id));
    }
    let wrong = probe(compiler, &fused, &after, inputs, tolerance)?.wrong;
    // Where all kernels are right when nothing shares memory, the plan is left.
    Ok(wrong.unwrap_or(Place::stage("plan")))
}

/// Compiles a graph.
pub type Build<'a> = dyn Fn(&Graph) -> kiln::error::Result<Executable> + 'a;

/// The smallest graph that was found whose code gives something else than its interpreter, with
/// values for its inputs; `graph` is one.
pub fn smallest(
    build: &Build,
    graph: &Graph,
    inputs: &[Value],
    tolerance: Tolerance,
) -> (Graph, Vec<Value>) {
    reduce(graph, inputs, &mut |graph, inputs| {
        // One that does not compile has another fault.
        let found = build(graph).map_err(drop).and_then(|e| results(&e, inputs).map_err(drop));
        let Ok(found) = found else { return false };
        let expected = eval(graph, inputs);
        found
            .iter()
            .zip(&expected)
            .any(|(found, expected)| tolerance.compare(found, &expected.to_tensor()).outside > 0)
    })
}

/// A stage and the node that a kernel comes from.
pub fn place(stage: &'static str, graph: &Graph, id: NodeId) -> Place {
    Place { stage, node: Some(sanitize(&graph.node(id).origin)) }
}

/// What a look at every kernel says.
pub struct Probe {
    /// How many there are.
    pub kernels: usize,
    /// Largest difference, in units of the largest element of the kernel's result.
    pub worst: f64,
    /// The first kernel whose result is wrong, and whether its loops or its code are.
    pub wrong: Option<Place>,
}

/// Compiles kernels so that each result is an output of its own, runs them, and compares with
/// `values`, those of the graph's interpreter.
pub fn probe(
    compiler: &Compiler,
    fused: &Graph,
    values: &[Value],
    inputs: &[Value],
    tolerance: Tolerance,
) -> Result<Probe, Failure> {
    let graph = probed(fused);
    let program = compiler.lower(&graph)?;
    let found = results(&compiler.emit(&graph, &program)?, inputs)?;
    let seen = look(&graph, values, &found, tolerance);
    let Some(id) = seen.wrong else {
        return Ok(Probe { kernels: found.len(), worst: seen.worst, wrong: None });
    };
    let stage = match loops_differ(&graph, &program, id, values, tolerance) {
        true => "lower",
        false => {
            let found = results(&compiler.clone().wide(false).build(&graph)?, inputs)?;
            let narrow = look(&graph, values, &found, tolerance);
            if narrow.wrong.is_some() { "code" } else { "wide code" }
        }
    };
    let wrong = Some(place(stage, &graph, id));
    Ok(Probe { kernels: found.len(), worst: seen.worst, wrong })
}

/// The graph with every computed value as an output.
pub fn probed(fused: &Graph) -> Graph {
    let mut probed = fused.clone();
    let computed = |id: &NodeId| !matches!(fused.node(*id).op, Op::Input(_) | Op::Const(_));
    let kernels = fused.ids().filter(computed);
    probed.outputs = kernels.map(|id| (format!("%{}", id.0), id)).collect();
    probed
}

fn results(executable: &Executable, inputs: &[Value]) -> Result<Vec<Tensor>, Failure> {
    let tensors: Vec<Tensor> = inputs.iter().map(Value::to_tensor).collect();
    let names = executable.inputs().iter().map(|port| port.name.as_str());
    let named: Vec<_> = names.zip(&tensors).map(|(name, t)| (name, t.view())).collect();
    let found = executable.run(&named).map_err(|error| Failure::usage(error.to_string()))?;
    Ok(found.into_iter().map(|(_, tensor)| tensor).collect())
}

/// What a comparison of all results shows.
pub struct Seen {
    /// Largest difference, in units of the largest element of a result.
    pub worst: f64,
    /// The first node whose result is wrong.
    pub wrong: Option<NodeId>,
}

/// Compares what code gave for all outputs of a graph.
pub fn look(graph: &Graph, values: &[Value], found: &[Tensor], tolerance: Tolerance) -> Seen {
    let mut seen = Seen { worst: 0.0, wrong: None };
    for (found, (_, id)) in found.iter().zip(&graph.outputs) {
        let expected = values[id.index()].to_tensor();
        let inside = tolerance.inside(&expected);
        let difference = inside.compare(found, &expected);
        let scale = inside.atol / tolerance.atol.max(f64::MIN_POSITIVE);
        seen.worst = seen.worst.max(difference.max_abs / scale.max(1.0));
        if difference.outside > 0 && seen.wrong.is_none() {
            seen.wrong = Some(*id);
        }
    }
    seen
}

/// Whether the loops of a node, run by their interpreter, give another value than the node.
fn loops_differ(
    graph: &Graph,
    program: &Program,
    id: NodeId,
    values: &[Value],
    tolerance: Tolerance,
) -> bool {
    let operand = |id: NodeId| values[id.index()].clone();
    let expected = values[id.index()].to_tensor();
    match eval_node(graph, program, id, &operand) {
        Ok(found) => tolerance.inside(&expected).compare(&found.to_tensor(), &expected).outside > 0,
        // They leave their buffers.
        Err(_) => true,
    }
}

/// Where the optimised graph has other outputs: the node that a wrong output comes from and none
/// of whose operands are wrong. An inner value counts as right where some node of the graph
/// before has the same elements, in any order, for layouts change.
fn optimiser(
    graph: &Graph,
    before: &[Value],
    fused: &Graph,
    after: &[Value],
    tolerance: Tolerance,
) -> Option<NodeId> {
    let mut outputs = graph.outputs.iter().zip(&fused.outputs);
    let (_, output) = outputs.find(|((_, old), (_, new))| {
        let (old, new) = (&before[old.index()], &after[new.index()]);
        tolerance.compare(&new.to_tensor(), &old.to_tensor()).outside > 0
    })?;
    let mut id = output.1;
    let known: Vec<Tensor> = before.iter().map(sorted).collect();
    let constant = constants(fused);
    let unlike = |id: &&NodeId| {
        let found = sorted(&after[id.index()]);
        let like = |old: &Tensor| tolerance.inside(old).compare(&found, old).outside == 0;
        !constant[id.index()] && !known.iter().any(like)
    };
    while let Some(&earlier) = fused.node(id).args.iter().find(unlike) {
        id = earlier;
    }
    Some(id)
}

/// The elements of a value in ascending order, whatever its shape.
fn sorted(value: &Value) -> Tensor {
    let mut numbers = values(&value.to_tensor());
    numbers.sort_unstable_by(f64::total_cmp);
    Tensor::from_slice(&[numbers.len()], &numbers)
}

/// Which values hang on constants only.
fn constants(graph: &Graph) -> Vec<bool> {
    let mut constant: Vec<bool> = Vec::new();
    for node in &graph.nodes {
        let made = node.args.iter().all(|a| constant[a.index()]);
        constant.push(made && !matches!(node.op, Op::Input(_)));
    }
    constant
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln::graph::Origin;
    use kiln::graph::op::{BinaryFn, Type, UnaryFn};
    use kiln::loops::text;
    use kiln::tensor::DType;

    const TOLERANCE: Tolerance = Tolerance { rtol: 1e-3, atol: 1e-5, of_largest: false };

    /// A matrix product, a sum of squares, and a root, which cannot become one kernel.
    fn model(f: UnaryFn) -> Graph {
        let mut graph = Graph::default();
        let origin = |name: &str| Origin::from(name);
        let x = graph.input("x", Type::new(DType::F32, &[4, 8]));
        let w: Vec<f32> = (0..48).map(|i| i as f32 / 16.0 - 1.0).collect();
        let w = graph.tensor(&Tensor::from_slice(&[8, 6], &w), &origin("w"));
        let y = graph.matmul(x, w, &origin("product")).expect("a node");
        let y = graph.permute(y, &[1, 0], &origin("turn")).expect("a node");
        let y = graph.unary(f, y, &origin("function")).expect("a node");
        let z = graph.matmul(y, x, &origin("second")).expect("a node");
        let z = graph.binary_number(BinaryFn::Max, z, 0.5, &origin("bound")).expect("a node");
        graph.outputs.push(("z".into(), z));
        graph
    }

    fn inputs() -> Vec<Value> {
        let x: Vec<f32> = (0..32).map(|i| (i * 7 % 13) as f32 / 8.0 - 0.5).collect();
        vec![Value::from_tensor(&Tensor::from_slice(&[4, 8], &x))]
    }

    #[test]
    fn all_is_well_down_to_the_plan() {
        let found = locate(&Compiler::new(), &model(UnaryFn::Tanh), &inputs(), TOLERANCE);
        assert_eq!(found.expect("it compiles"), Place::stage("plan"));
    }

    #[test]
    fn a_wrong_rule_is_named() {
        let (right, wrong) = (model(UnaryFn::Tanh), model(UnaryFn::Exp));
        let before = eval_nodes(&right, &inputs());
        let compiler = Compiler::new();
        for (graph, expected) in [(&right, None), (&wrong, Some("function"))] {
            let fused = compiler.optimise(graph).expect("it compiles");
            let after = eval_nodes(&fused, &inputs());
            let found = optimiser(&right, &before, &fused, &after, TOLERANCE);
            let origin = found.map(|id| fused.node(id).origin.to_string());
            assert_eq!(origin.is_some(), expected.is_some());
            assert!(origin.iter().all(|o| o.contains("function")), "{origin:?}");
        }
    }

    #[test]
    fn wrong_loops_and_wrong_code_are_told_apart() {
        let compiler = Compiler::new();
        let graph = probed(&compiler.optimise(&model(UnaryFn::Tanh)).expect("it compiles"));
        let values = eval_nodes(&graph, &inputs());
        let right = compiler.lower(&graph).expect("it lowers");
        // Planted: one kernel has another function.
        let mut wrong = right.clone();
        let is_tanh = |k: &&mut kiln::loops::ir::Loops| text::print(k).contains("tanh(");
        let kernel = wrong.kernels.iter_mut().find(is_tanh).expect("a kernel with the function");
        let planted = text::parse(&text::print(kernel).replace("tanh(", "sin(")).expect("loops");
        *kernel = planted.into_iter().next().expect("one kernel");
        let run = |program: &Program| {
            results(&compiler.emit(&graph, program).expect("code"), &inputs()).expect("results")
        };
        assert_eq!(look(&graph, &values, &run(&right), TOLERANCE).wrong, None);
        let id = look(&graph, &values, &run(&wrong), TOLERANCE).wrong.expect("it differs");
        assert!(graph.node(id).origin.contains("function"), "{}", graph.node(id).origin);
        // The loops mean what the code does, so lowering is to blame; with the right loops, code.
        assert!(loops_differ(&graph, &wrong, id, &values, TOLERANCE));
        assert!(!loops_differ(&graph, &right, id, &values, TOLERANCE));
    }
    #[test]
    fn a_planted_fault_is_made_small() {
        let compiler = Compiler::new();
        // Whatever is compiled has another function in its code.
        let build = |graph: &Graph| {
            let kernels = compiler.optimise(graph)?;
            let mut program = compiler.lower(&kernels)?;
            for kernel in &mut program.kernels {
                let planted = text::print(kernel).replace("tanh(", "sin(");
                *kernel = text::parse(&planted)?.swap_remove(0);
            }
            compiler.emit(&kernels, &program)
        };
        let (small, values) = smallest(&build, &model(UnaryFn::Tanh), &inputs(), TOLERANCE);
        let ops: Vec<&Op> = small.nodes.iter().map(|node| &node.op).collect();
        assert_eq!(ops, [&Op::Input(0), &Op::Unary(UnaryFn::Tanh)]);
        assert_eq!(values.len(), 1);
        assert_eq!(small.node(small.outputs[0].1).origin.as_ref(), "function");
    }
}
