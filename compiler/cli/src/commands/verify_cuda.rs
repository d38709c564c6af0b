//! `kiln verify` on a GPU: a model against the reference interpreter and stored outputs.

use kiln::graph::Graph;
use kiln::graph::eval::{Value as Meaning, eval, eval_nodes};
use kiln::{Compiler, Model};
use kiln_cuda::Gpu;

use crate::args::VerifyArgs;
use crate::commands::cuda;
use crate::commands::locate::{Place, Probe};
use crate::commands::verify::{Row, report, row, stored};
use crate::failure::{Exit, Failure};
use crate::input::Given;
use crate::stats::Tolerance;
use crate::term::Term;

/// Compares and prints; fails with [`Exit::Mismatch`] when anything differs. Where results are
/// wrong, or `--kernels` asks for it, the kernels are looked at one by one.
pub fn verify(
    args: &VerifyArgs,
    gpu: &Gpu,
    (compiler, onnx, graph): (&Compiler, &Model, &Graph),
    given: Given,
    term: &Term,
) -> Result<(), Failure> {
    if args.reduce.is_some() {
        return Err(Failure::usage("--reduce looks at code for the CPU; leave --device out"));
    }
    let tolerance = Tolerance::of(args.rtol, args.atol, args.build.precision);
    cuda::refuse_for_gpus(&args.build)?;
    let isa = cuda::isa(gpu)?;
    let artifact = cuda::compiled(compiler, (onnx, graph), isa, term)?;
    let inputs = given.complete(&artifact.plan.inputs)?;
    let (model, _) = cuda::load(gpu, &args.device, &artifact, term)?;
    let found = cuda::steps(&model, &inputs, (1, args.kernels), term);
    let found = found.map_err(|error| cuda::failure(&error))?;
    let values: Vec<Meaning> =
        inputs.tensors.iter().map(|(_, t)| Meaning::from_tensor(t)).collect();
    let expected = term.during("interpret", None, || eval(graph, &values));
    let mut rows: Vec<Row> = Vec::new();
    for ((name, found), expected) in found.iter().zip(&expected) {
        rows.push(row(name, "interpreter", found, &expected.to_tensor(), tolerance));
    }
    let is_wrong = |rows: &[Row]| rows.iter().any(|row| row.difference.outside > 0);
    let wrong_code = is_wrong(&rows);
    rows.extend(stored(&found, &inputs, tolerance));
    let wrong = is_wrong(&rows);
    let looks = wrong_code || args.kernels && !wrong;
    let kernels =
        match looks {
            true => {
                let fused = compiler.optimise_cuda(graph)?;
                let meanings = eval_nodes(&fused, &values);
                let given = (&meanings[..], &values[..]);
                Some(term.during("probe", None, || {
                    cuda::probe(gpu, compiler, &fused, given, tolerance)
                })?)
            }
            false => None,
        };
    // Kernels that are right one by one leave the plan, and what differs from stored outputs only
    // the import.
    let place = match (&kernels, wrong_code) {
        (Some(Probe { wrong: Some(place), .. }), _) => Some(place.clone()),
        (_, true) => Some(Place::stage("plan")),
        (_, false) => wrong.then_some(Place::stage("import")),
    };
    report(args, &rows, kernels.as_ref(), place.as_ref(), term)?;
    if place.is_some() { Err(Failure::said(Exit::Mismatch)) } else { Ok(()) }
}
