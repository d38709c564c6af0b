//! `kiln verify`: the compiled model against the reference interpreter and stored outputs.

use kiln::Compiler;
use kiln::error::sanitize;
use kiln::graph::eval::{Value as Meaning, eval, eval_nodes};
use kiln::graph::op::Op;
use kiln::graph::{Graph, NodeId};
use kiln::tensor::Tensor;
use serde_json::{Value, json};

use crate::args::VerifyArgs;
use crate::commands::{compile, compiler, gather, model_name, open};
use crate::failure::{Exit, Failure};
use crate::input::Inputs;
use crate::stats::{Difference, compare, values};
use crate::term::Term;

/// How far results may be apart.
#[derive(Clone, Copy)]
struct Tolerance {
    rtol: f64,
    atol: f64,
}

impl Tolerance {
    /// The difference of two tensors; those of another type or shape differ everywhere.
    fn compare(self, found: &Tensor, expected: &Tensor) -> Difference {
        if found.dtype() == expected.dtype() && found.shape() == expected.shape() {
            return compare(found, expected, self.rtol, self.atol);
        }
        let outside = expected.numel().max(1);
        Difference { max_abs: f64::INFINITY, max_rel: f64::INFINITY, outside, first: None }
    }

    /// For a value inside the model, whose elements may be sums of much larger ones: the absolute
    /// tolerance counts in units of the largest element.
    fn inside(self, expected: &Tensor) -> Tolerance {
        let finite = values(expected).into_iter().filter(|value| value.is_finite());
        let largest = finite.fold(0.0f64, |largest, value| largest.max(value.abs()));
        Tolerance { atol: self.atol * largest.max(1.0), ..self }
    }
}

/// One comparison of one output.
struct Row {
    name: String,
    against: &'static str,
    elements: usize,
    difference: Difference,
}

/// Compares and prints; fails with [`Exit::Mismatch`] when anything differs.
pub fn run(args: &VerifyArgs, term: &Term) -> Result<(), Failure> {
    let tolerance = Tolerance { rtol: args.rtol, atol: args.atol };
    let (model, _) = open(&args.model, term)?;
    let compiler = compiler(&args.model, &args.build);
    let (given, compiler) = gather(&model, &args.inputs, true, &compiler)?;
    let (executable, _) = compile(&model, &compiler, term)?;
    let inputs = given.complete(executable.inputs())?;
    let found = executable.run(&inputs.named());
    let found = found.map_err(|error| Failure::usage(error.to_string()))?;
    let graph = compiler.graph(&model)?;
    let values: Vec<Meaning> =
        inputs.tensors.iter().map(|(_, t)| Meaning::from_tensor(t)).collect();
    let expected = term.during("interpret", None, || eval(&graph, &values));
    let mut kernels = None;
    let mut rows = Vec::new();
    for ((name, found), expected) in found.iter().zip(&expected) {
        rows.push(row(name, "interpreter", found, &expected.to_tensor(), tolerance));
    }
    let wrong_code = rows.iter().any(|row| row.difference.outside > 0);
    rows.extend(stored(&found, &inputs, tolerance));
    let mut wrong = rows.iter().any(|row| row.difference.outside > 0);
    let mut place = if wrong_code {
        term.during("locate", None, || locate(&compiler, &graph, &values, tolerance))?
    } else if wrong {
        // Compiled code and interpreter agree with each other, not with the stored outputs.
        Some(("import".to_string(), None))
    } else {
        None
    };
    if args.kernels && !wrong {
        let fused = compiler.optimise(&graph)?;
        let probe = term.during("probe", None, || {
            probe(&compiler, &fused, &eval_nodes(&fused, &values), &values, tolerance)
        })?;
        wrong = probe.wrong.is_some();
        place = probe.wrong.clone().map(|node| ("code".to_string(), Some(node)));
        kernels = Some(probe);
    }
    report(args, &rows, kernels.as_ref(), place.as_ref(), term)?;
    if wrong { Err(Failure::said(Exit::Mismatch)) } else { Ok(()) }
}

fn row(
    name: &str,
    against: &'static str,
    found: &Tensor,
    expected: &Tensor,
    tolerance: Tolerance,
) -> Row {
    let difference = tolerance.compare(found, expected);
    Row { name: sanitize(name), against, elements: expected.numel(), difference }
}

/// Comparisons with the files `output_K.pb`: by name where they have one, else by number.
fn stored(found: &[(String, Tensor)], inputs: &Inputs, tolerance: Tolerance) -> Vec<Row> {
    let mut rows = Vec::new();
    for (index, (name, expected)) in inputs.expected.iter().enumerate() {
        let named = found.iter().find(|(output, _)| output == name).or_else(|| found.get(index));
        if let Some((name, tensor)) = named {
            rows.push(row(name, "stored", tensor, expected, tolerance));
        }
    }
    rows
}

/// The first stage after which results differ, and a node there, where one can be named.
type Found = Option<(String, Option<String>)>;

fn locate(
    compiler: &Compiler,
    graph: &Graph,
    inputs: &[Meaning],
    tolerance: Tolerance,
) -> Result<Found, Failure> {
    let fused = compiler.optimise(graph)?;
    let reference = eval_nodes(graph, inputs);
    let values = eval_nodes(&fused, inputs);
    let outputs = graph.outputs.iter().zip(&fused.outputs);
    let optimiser_differs = outputs.into_iter().any(|((_, old), (_, new))| {
        let (old, new) = (&reference[old.index()], &values[new.index()]);
        tolerance.compare(&new.to_tensor(), &old.to_tensor()).outside > 0
    });
    if optimiser_differs {
        let node = first_unlike(graph, &reference, &fused, &values, tolerance);
        return Ok(Some(("optimise".into(), node)));
    }
    let Some(node) = probe(compiler, &fused, &values, inputs, tolerance)?.wrong else {
        // All kernels are right when nothing shares memory.
        return Ok(Some(("plan".into(), None)));
    };
    let narrow = probe(&compiler.clone().wide(false), &fused, &values, inputs, tolerance)?;
    let stage = if narrow.wrong.is_none() { "wide code" } else { "code" };
    Ok(Some((stage.into(), Some(node))))
}

/// What a look at every kernel says.
struct Probe {
    kernels: usize,
    /// Largest difference, in units of the largest element of the kernel's result.
    worst: f64,
    /// The first kernel whose result is wrong.
    wrong: Option<String>,
}

/// Compiles kernels so that each result is an output of its own, runs them, and compares with
/// `values`, those of the interpreter.
fn probe(
    compiler: &Compiler,
    fused: &Graph,
    values: &[Meaning],
    inputs: &[Meaning],
    tolerance: Tolerance,
) -> Result<Probe, Failure> {
    let mut probed = fused.clone();
    let computed = |id: &NodeId| !matches!(fused.node(*id).op, Op::Input(_) | Op::Const(_));
    let kernels = fused.ids().filter(computed);
    probed.outputs = kernels.map(|id| (format!("%{}", id.0), id)).collect();
    let tensors: Vec<Tensor> = inputs.iter().map(Meaning::to_tensor).collect();
    let names = fused.inputs.iter().map(|(name, _)| name.as_str());
    let named: Vec<_> = names.zip(&tensors).map(|(name, t)| (name, t.view())).collect();
    let found = compiler.build(&probed)?.run(&named);
    let found = found.map_err(|error| Failure::usage(error.to_string()))?;
    let mut result = Probe { kernels: found.len(), worst: 0.0, wrong: None };
    for ((_, found), (_, id)) in found.iter().zip(&probed.outputs) {
        let expected = values[id.index()].to_tensor();
        let inside = tolerance.inside(&expected);
        let difference = inside.compare(found, &expected);
        let scale = inside.atol / tolerance.atol.max(f64::MIN_POSITIVE);
        result.worst = result.worst.max(difference.max_abs / scale.max(1.0));
        if difference.outside > 0 && result.wrong.is_none() {
            result.wrong = Some(sanitize(&fused.node(*id).origin));
        }
    }
    Ok(result)
}

/// The first node of the optimised graph that has the value of no node of the same origin and
/// type in the graph before.
fn first_unlike(
    graph: &Graph,
    reference: &[Meaning],
    fused: &Graph,
    values: &[Meaning],
    tolerance: Tolerance,
) -> Option<String> {
    let unlike = fused.ids().find(|id| {
        let node = fused.node(*id);
        let found = values[id.index()].to_tensor();
        let mut same = graph.ids().filter(|old| {
            let old = graph.node(*old);
            old.origin == node.origin && old.ty == node.ty
        });
        let mut any = false;
        let like = same.any(|old| {
            any = true;
            tolerance.compare(&found, &reference[old.index()].to_tensor()).outside == 0
        });
        any && !like
    })?;
    Some(sanitize(&fused.node(unlike).origin))
}

fn report(
    args: &VerifyArgs,
    rows: &[Row],
    kernels: Option<&Probe>,
    place: Option<&(String, Option<String>)>,
    term: &Term,
) -> Result<(), Failure> {
    let wrong = place.is_some() || rows.iter().any(|row| row.difference.outside > 0);
    let mut text = String::new();
    for row in rows {
        let Difference { max_abs, max_rel, outside, first } = &row.difference;
        let verdict = if *outside == 0 { "ok" } else { "DIFFERS" };
        let (name, against) = (&row.name, row.against);
        text += &format!("{verdict:<8} {name} against {against}: ");
        text += &format!("largest difference {max_abs:.3e}, relative {max_rel:.3e}\n");
        if *outside > 0 {
            text += &format!("         {outside} of {} elements", row.elements);
            if let Some((index, found, expected)) = first {
                text += &format!("; the first is {index}: {found} instead of {expected}");
            }
            text.push('\n');
        }
    }
    if let Some(Probe { kernels, worst, wrong }) = kernels {
        let verdict = if wrong.is_none() { "ok" } else { "DIFFERS" };
        text += &format!("{verdict:<8} {kernels} kernels against interpreter: ");
        text += &format!("largest difference {worst:.3e} of the largest element\n");
    }
    if let Some((stage, node)) = place {
        let node = node.as_ref().map_or(String::new(), |node| format!(", node `{node}`"));
        text += &format!("first difference: stage {stage}{node}\n");
    }
    let json_row = |row: &Row| {
        json!({
            "output": row.name, "against": row.against, "elements": row.elements,
            "max_abs": row.difference.max_abs, "max_rel": row.difference.max_rel,
            "outside": row.difference.outside,
        })
    };
    let stage = place.map(|(stage, _)| stage);
    let node = place.and_then(|(_, node)| node.as_ref());
    let value = json!({
        "ok": !wrong, "model": model_name(&args.model.model),
        "outputs": rows.iter().map(json_row).collect::<Vec<Value>>(),
        "kernels": kernels.map(|probe| json!({ "count": probe.kernels, "worst": probe.worst })),
        "stage": stage, "node": node,
    });
    term.report(value, &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln::graph::Origin;
    use kiln::graph::op::{Type, UnaryFn};
    use kiln::tensor::DType;

    const TOLERANCE: Tolerance = Tolerance { rtol: 1e-3, atol: 1e-5 };

    /// Two functions in a row of four numbers.
    fn chain(first: UnaryFn, second: UnaryFn) -> Graph {
        let mut graph = Graph::default();
        let x = graph.input("x", Type::new(DType::F32, &[4]));
        let first = graph.unary(first, x, &Origin::from("first")).expect("a node");
        let second = graph.unary(second, first, &Origin::from("second")).expect("a node");
        graph.outputs.push(("y".into(), second));
        graph
    }

    #[test]
    fn the_first_node_with_another_value_is_named() {
        let x = [Meaning::from_tensor(&Tensor::from_slice(&[4], &[0.5f32, -2.0, 3.0, 0.0]))];
        let right = chain(UnaryFn::Neg, UnaryFn::Abs);
        let reference = eval_nodes(&right, &x);
        for (first, second, expected) in [
            (UnaryFn::Neg, UnaryFn::Abs, None),
            (UnaryFn::Exp, UnaryFn::Abs, Some("first".to_string())),
            (UnaryFn::Neg, UnaryFn::Exp, Some("second".to_string())),
        ] {
            let other = chain(first, second);
            let values = eval_nodes(&other, &x);
            let found = first_unlike(&right, &reference, &other, &values, TOLERANCE);
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn all_is_well_down_to_the_plan() {
        let graph = chain(UnaryFn::Exp, UnaryFn::Neg);
        let x = [Meaning::from_tensor(&Tensor::from_slice(&[4], &[0.5f32, -2.0, 3.0, 0.0]))];
        // Nothing differs stage by stage, so only what is between the kernels is left.
        let found = locate(&Compiler::new(), &graph, &x, TOLERANCE).expect("it compiles");
        assert_eq!(found, Some(("plan".to_string(), None)));
    }

    #[test]
    fn another_shape_differs_everywhere() {
        let (a, b) = (Tensor::zeros(DType::F32, &[4]), Tensor::zeros(DType::F32, &[2, 2]));
        assert_eq!(TOLERANCE.compare(&a, &b).outside, 4);
        assert_eq!(TOLERANCE.compare(&a, &a).outside, 0);
    }
}
