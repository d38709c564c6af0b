//! `kiln check`: every problem of a model at once.

use kiln::Compiler;
use serde_json::json;

use crate::args::CheckArgs;
use crate::commands::{limits, model_name, open};
use crate::failure::Failure;
use crate::term::Term;

/// Reads the model, checks all shapes and operators, and says that all is well.
pub fn run(args: &CheckArgs, term: &Term) -> Result<(), Failure> {
    let (model, _) = open(&args.model, term)?;
    let compiler = Compiler::new().limits(limits(&args.model));
    let dims = args.model.dim.iter();
    let mut compiler =
        dims.fold(compiler, |compiler, (name, range)| compiler.dim_range(name, *range));
    for dim in model.symbols() {
        if !args.model.dim.iter().any(|(name, _)| name == dim) {
            compiler = compiler.dim(dim, 1);
            term.note(format_args!("note: dim {dim} is taken as 1; --dim {dim}=N checks another"));
        }
    }
    let whole = term.during("check", None, || compiler.graph(&model));
    // Where shapes hang on data, the model runs in stages, of which there is only the first yet.
    let (graph, staged) = match whole {
        Ok(graph) => (graph, false),
        Err(error) => (compiler.first_stage(&model).map_err(|_| error)?, true),
    };
    let name = model_name(&args.model.model);
    let (nodes, operations) = (model.nodes().len(), graph.nodes.len());
    let said = match staged {
        false => "all supported",
        true => "which run in stages, as shapes hang on data; the first stage is supported",
    };
    let text =
        format!("{} {name}: {nodes} nodes, {said}; {operations} operations\n", term.green("ok"));
    let value = json!({
        "ok": true, "model": name, "nodes": nodes, "operations": operations, "staged": staged,
    });
    term.report(value, &text)
}
