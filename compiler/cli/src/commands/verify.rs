//! `kiln verify`: the compiled model against the reference interpreter and stored outputs.

use std::fs;
use std::path::Path;

use kiln::error::sanitize;
use kiln::graph::eval::{Value as Meaning, eval, eval_nodes};
use kiln::graph::op::Op;
use kiln::graph::{Graph, text};
use kiln::tensor::Tensor;
use kiln::{Compiler, Model, Precision};
use serde_json::{Value, json};

use crate::args::VerifyArgs;
use crate::commands::locate::{Place, Probe, locate, probe, smallest};
use crate::commands::{
    compile, compiler, cuda, gather, model_name, open, verify_artifact, verify_cuda, verify_stages,
    with_cache,
};
use crate::failure::{Exit, Failure};
use crate::files;
use crate::input::Inputs;
use crate::stats::{Difference, Tolerance};
use crate::term::Term;

/// What results of another precision are compared with to say what that changes.
const ROUNDING: &str = "f32";

/// One comparison of one output.
pub struct Row {
    /// The output.
    pub name: String,
    /// What it is compared with.
    pub against: &'static str,
    /// Number of its elements.
    pub elements: usize,
    /// What came out.
    pub difference: Difference,
}

/// Compares and prints; fails with [`Exit::Mismatch`] when anything differs.
pub fn run(args: &VerifyArgs, term: &Term) -> Result<(), Failure> {
    let precision = args.build.precision;
    let tolerance = Tolerance::of(args.rtol, args.atol, precision);
    if kiln::is_artifact(&args.model.model) {
        return verify_artifact::run(args, term);
    }
    if args.reference.is_some() {
        let text = "--model is what a compiled model is compared with, and this is no compiled one";
        return Err(Failure::usage(text));
    }
    let (model, _) = open(&args.model, term)?;
    let compiler = with_cache(compiler(&args.model, &args.build), &args.cache);
    let (given, compiler) = gather(&model, &args.inputs, true, &compiler)?;
    if compiler.needs_stages() {
        return verify_stages::run(args, (&model, &compiler), given, term);
    }
    let graph = compiler.graph(&model)?;
    let on_device = cuda::on_device(&args.device, &args.model, term, |gpu| {
        verify_cuda::verify(args, gpu, (&compiler, &model, &graph), given.clone(), term)
    })?;
    if on_device.is_some() {
        return Ok(());
    }
    let (executable, _) = compile(&model, &compiler, term)?;
    let inputs = given.complete(executable.inputs())?;
    let found = executable.run(&inputs.named());
    let found = found.map_err(|error| Failure::usage(error.to_string()))?;
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
    if precision != Precision::F32 {
        rows.extend(rounding(&model, &compiler, &found, &inputs, term)?);
    }
    let mut wrong = rows.iter().any(|row| row.difference.outside > 0);
    let mut place = if wrong_code {
        let found = term.during("locate", None, || locate(&compiler, &graph, &values, tolerance));
        Some(found?)
    } else {
        // Compiled code and interpreter agree with each other, not with the stored outputs.
        wrong.then_some(Place::stage("import"))
    };
    match &args.reduce {
        Some(folder) if wrong_code => {
            let build = |graph: &Graph| compiler.build(&compiler.optimise(graph)?);
            let small =
                term.during("reduce", None, || smallest(&build, &graph, &values, tolerance));
            write_reduced(folder, &small, term)?;
        }
        Some(_) => term.note("code gives what the interpreter gives: there is nothing to reduce"),
        None => {}
    }
    if args.kernels && !wrong {
        let fused = compiler.optimise(&graph)?;
        let probe = term.during("probe", None, || {
            probe(&compiler, &fused, &eval_nodes(&fused, &values), &values, tolerance)
        })?;
        wrong = probe.wrong.is_some();
        place = probe.wrong.clone();
        kernels = Some(probe);
    }
    report(args, &rows, kernels.as_ref(), place.as_ref(), term)?;
    if wrong { Err(Failure::said(Exit::Mismatch)) } else { Ok(()) }
}

/// Writes the smallest graph with a fault: its text, and the values of its inputs and of constants
/// that the text names by hash only.
pub fn write_reduced(
    folder: &Path,
    (graph, inputs): &(Graph, Vec<Meaning>),
    term: &Term,
) -> Result<(), Failure> {
    fs::create_dir_all(folder).map_err(|error| Failure::io(folder.display(), error))?;
    let text = text::print(graph);
    files::write(&folder.join("graph.txt"), |out| out.write_all(text.as_bytes()))?;
    let named = graph.inputs.iter().zip(inputs).map(|((name, _), v)| (name.clone(), v.to_tensor()));
    let constants = graph.nodes.iter().filter_map(|node| match node.op {
        Op::Const(index) => {
            let value = Meaning::from_constant(&graph.constants[index as usize]);
            Some((format!("constant {index}"), value.to_tensor()))
        }
        _ => None,
    });
    let tensors: Vec<(String, Tensor)> = named.chain(constants).collect();
    let views: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t.view())).collect();
    let file = folder.join("inputs.npz");
    files::write(&file, |mut out| kiln::npz::write_npz(&mut out, &views))?;
    let (count, folder) = (graph.nodes.len(), folder.display());
    term.note(format!("the smallest graph with the fault, {count} nodes: {folder}/graph.txt"));
    Ok(())
}

/// What rounding changes: comparisons with the model as it is compiled without.
fn rounding(
    model: &Model,
    compiler: &Compiler,
    found: &[(String, Tensor)],
    inputs: &Inputs,
    term: &Term,
) -> Result<Vec<Row>, Failure> {
    let (exact, _) = compile(model, &compiler.clone().precision(Precision::F32), term)?;
    let exact = exact.run(&inputs.named()).map_err(|error| Failure::usage(error.to_string()))?;
    let any = Tolerance { rtol: f64::INFINITY, atol: f64::INFINITY, of_largest: false };
    let pairs = found.iter().zip(&exact);
    Ok(pairs.map(|((name, found), (_, exact))| row(name, ROUNDING, found, exact, any)).collect())
}

/// Compares an output.
pub fn row(
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
pub fn stored(found: &[(String, Tensor)], inputs: &Inputs, tolerance: Tolerance) -> Vec<Row> {
    let mut rows = Vec::new();
    for (index, (name, expected)) in inputs.expected.iter().enumerate() {
        let named = found.iter().find(|(output, _)| output == name).or_else(|| found.get(index));
        if let Some((name, tensor)) = named {
            rows.push(row(name, "stored", tensor, expected, tolerance));
        }
    }
    rows
}

/// Prints all comparisons.
pub fn report(
    args: &VerifyArgs,
    rows: &[Row],
    kernels: Option<&Probe>,
    place: Option<&Place>,
    term: &Term,
) -> Result<(), Failure> {
    let wrong = place.is_some() || rows.iter().any(|row| row.difference.outside > 0);
    let mut text = String::new();
    for row in rows {
        let Difference { max_abs, max_rel, outside, first } = &row.difference;
        let verdict = match (*outside, row.against) {
            (0, ROUNDING) => "rounded",
            (0, _) => "ok",
            _ => "DIFFERS",
        };
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
    if let Some(Place { stage, node }) = place {
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
    let stage = place.map(|place| place.stage);
    let node = place.and_then(|place| place.node.as_ref());
    let value = json!({
        "ok": !wrong, "model": model_name(&args.model.model),
        "outputs": rows.iter().map(json_row).collect::<Vec<Value>>(),
        "kernels": kernels.map(|probe| json!({ "count": probe.kernels, "worst": probe.worst })),
        "stage": stage, "node": node,
    });
    term.report(value, &text)
}
