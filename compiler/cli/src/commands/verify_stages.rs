//! `kiln verify` of a model that runs in stages: each of them against the reference interpreter.

use kiln::graph::Graph;
use kiln::graph::eval::{Value as Meaning, eval};
use kiln::plan::Port;
use kiln::tensor::{Tensor, TensorView};
use kiln::{Compiler, Model};

use crate::args::VerifyArgs;
use crate::commands::cuda;
use crate::commands::locate::{Place, locate, smallest};
use crate::commands::ready::staged;
use crate::commands::verify::{Row, report, row, stored, write_reduced};
use crate::failure::{Exit, Failure};
use crate::input::Given;
use crate::stats::Tolerance;
use crate::term::Term;

/// What was seen of the stages so far.
struct Seen<'a> {
    args: &'a VerifyArgs,
    compiler: &'a Compiler,
    tolerance: Tolerance,
    stages: usize,
    rows: Vec<Row>,
    place: Option<Place>,
}

/// Compares and prints; fails with [`Exit::Mismatch`] when anything differs.
pub fn run(
    args: &VerifyArgs,
    (model, compiler): (&Model, &Compiler),
    given: Given,
    term: &Term,
) -> Result<(), Failure> {
    cuda::on_device(&args.device, &args.model, term, |_| Err::<(), _>(staged(&args.model)))?;
    if args.kernels {
        let text = "--kernels compares the kernels of one graph, and the model runs in stages";
        return Err(Failure::usage(text));
    }
    let first = compiler.first_stage(model)?;
    let port = |(name, ty): &(String, kiln::graph::op::Type)| Port::new(name, ty.dtype, &ty.shape);
    let ports: Vec<Port> = first.inputs.iter().map(port).collect();
    let inputs = given.complete(&ports)?;
    let tolerance = Tolerance::of(args.rtol, args.atol, args.build.precision);
    let mut seen = Seen { args, compiler, tolerance, stages: 0, rows: Vec::new(), place: None };
    let outputs = compiler
        .run_in_stages(model, &inputs.named(), |graph, tensors| seen.stage(graph, tensors, term))?;
    let names = model.outputs().iter().map(|port| port.name.clone());
    let found: Vec<(String, Tensor)> = names.zip(outputs).collect();
    let Seen { mut rows, mut place, .. } = seen;
    rows.extend(stored(&found, &inputs, tolerance));
    let wrong = rows.iter().any(|row| row.difference.outside > 0);
    if wrong && place.is_none() {
        place = Some(Place::stage("import"));
    }
    report(args, &rows, None, place.as_ref(), term)?;
    if wrong { Err(Failure::said(Exit::Mismatch)) } else { Ok(()) }
}

impl Seen<'_> {
    /// Runs a stage and compares what it gives.
    fn stage(
        &mut self,
        graph: &Graph,
        tensors: &[(&str, TensorView<'_>)],
        term: &Term,
    ) -> Result<Vec<Tensor>, Failure> {
        self.stages += 1;
        let build = |graph: &Graph| self.compiler.build(&self.compiler.optimise(graph)?);
        let own = |name: &str| graph.inputs.iter().any(|(port, _)| port == name);
        let named: Vec<_> = tensors.iter().filter(|(name, _)| own(name)).copied().collect();
        let found = term.during("compile", None, || build(graph))?.run(&named);
        let found = found.map_err(|error| Failure::usage(error.to_string()))?;
        let value = |(port, _): &(String, _)| {
            let (_, view) = named.iter().find(|(name, _)| name == port)?;
            let tensor = Tensor::from_bytes(view.dtype, view.shape, view.bytes)?;
            Some(Meaning::from_tensor(&tensor))
        };
        let values: Vec<Meaning> = graph.inputs.iter().filter_map(value).collect();
        let expected = term.during("interpret", None, || eval(graph, &values));
        let before = self.rows.len();
        for ((name, found), expected) in found.iter().zip(&expected) {
            let name = format!("stage {}, {name}", self.stages);
            self.rows.push(row(&name, "interpreter", found, &expected.to_tensor(), self.tolerance));
        }
        let wrong = self.rows[before..].iter().any(|row| row.difference.outside > 0);
        if wrong && self.place.is_none() {
            let (compiler, tolerance) = (self.compiler, self.tolerance);
            let place = term.during("locate", None, || locate(compiler, graph, &values, tolerance));
            self.place = Some(place?);
            if let Some(folder) = &self.args.reduce {
                let small =
                    term.during("reduce", None, || smallest(&build, graph, &values, tolerance));
                write_reduced(folder, &small, term)?;
            }
        }
        Ok(found.into_iter().map(|(_, tensor)| tensor).collect())
    }
}
