//! `kiln verify`: the compiled model against the reference interpreter and stored outputs.

use kiln::Compiler;
use kiln::error::sanitize;
use kiln::graph::Graph;
use kiln::graph::eval::{Value as Meaning, eval, eval_nodes};
use kiln::graph::op::Op;
use kiln::tensor::Tensor;
use serde_json::{Value, json};

use crate::args::VerifyArgs;
use crate::commands::{compile, compiler, gather, model_name, open};
use crate::failure::{Exit, Failure};
use crate::input::Inputs;
use crate::stats::{Difference, compare};
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
    let (given, compiler) = gather(&model, &args.model.dim, &args.inputs, true, compiler)?;
    let (executable, _) = compile(&model, &compiler, term)?;
    let inputs = given.complete(executable.inputs())?;
    let found = executable.run(&inputs.named());
    let found = found.map_err(|error| Failure::usage(error.to_string()))?;
    let graph = compiler.graph(&model)?;
    let values: Vec<Meaning> =
        inputs.tensors.iter().map(|(_, t)| Meaning::from_tensor(t)).collect();
    let expected = term.during("interpret", None, || eval(&graph, &values));
    let mut rows = Vec::new();
    for ((name, found), expected) in found.iter().zip(&expected) {
        rows.push(row(name, "interpreter", found, &expected.to_tensor(), tolerance));
    }
    let wrong_code = rows.iter().any(|row| row.difference.outside > 0);
    rows.extend(stored(&found, &inputs, tolerance));
    let wrong = rows.iter().any(|row| row.difference.outside > 0);
    let place = if wrong_code {
        term.during("locate", None, || locate(&compiler, &graph, &values, tolerance))?
    } else if wrong {
        // Compiled code and interpreter agree with each other, not with the stored outputs.
        Some(("import".to_string(), None))
    } else {
        None
    };
    report(args, &rows, place.as_ref(), term)?;
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
    // Every kernel's result as an output of its own, so that each can be looked at.
    let mut probed = fused.clone();
    let kernels =
        probed.ids().filter(|id| !matches!(fused.node(*id).op, Op::Input(_) | Op::Const(_)));
    probed.outputs = kernels.map(|id| (format!("%{}", id.0), id)).collect();
    let names: Vec<String> = fused.inputs.iter().map(|(name, _)| name.clone()).collect();
    let tensors: Vec<Tensor> = inputs.iter().map(Meaning::to_tensor).collect();
    let named: Vec<_> = names.iter().zip(&tensors).map(|(n, t)| (n.as_str(), t.view())).collect();
    let first_wrong = |compiler: &Compiler| -> Result<Option<String>, Failure> {
        let executable = compiler.build(&probed)?;
        let found = executable.run(&named);
        let found = found.map_err(|error| Failure::usage(error.to_string()))?;
        let wrong = found.iter().zip(&probed.outputs).find(|((_, found), (_, id))| {
            tolerance.compare(found, &values[id.index()].to_tensor()).outside > 0
        });
        Ok(wrong.map(|(_, (_, id))| sanitize(&fused.node(*id).origin)))
    };
    let Some(node) = first_wrong(compiler)? else {
        // All kernels are right when nothing shares memory.
        return Ok(Some(("plan".into(), None)));
    };
    let narrow = compiler.clone().wide(false);
    let stage = if first_wrong(&narrow)?.is_none() { "wide code" } else { "code" };
    Ok(Some((stage.into(), Some(node))))
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
    place: Option<&(String, Option<String>)>,
    term: &Term,
) -> Result<(), Failure> {
    let wrong = rows.iter().any(|row| row.difference.outside > 0);
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
        "stage": stage, "node": node,
    });
    term.report(value, &text)
}
