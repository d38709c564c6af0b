//! Models that run in stages, as their shapes hang on data that they compute: what a stage gives is
//! known to the next one (`onnx/asks.rs`).

use std::sync::Arc;

use kiln_runtime::tensor::{Tensor, TensorView};

use crate::error::{Diagnostic, Error, ErrorKind};
use crate::graph::Graph;
use crate::model::Model;
use crate::onnx::{Known, Later};
use crate::{Compiler, onnx};

/// Stages of a run at most: each is compiled.
const MOST: usize = 1000;

impl Compiler {
    /// Whether [`for_inputs`](Self::for_inputs) has found that the model runs in stages: its shapes
    /// hang on data that it computes. [`on_demand`](Self::on_demand) compiles such models, and
    /// [`run_in_stages`](Self::run_in_stages).
    pub fn needs_stages(&self) -> bool {
        self.staged
    }

    /// The graph of what can be compiled before data are known that the model computes: all of it,
    /// unless it [needs stages](Self::needs_stages). Inputs have the types that the model's have.
    pub fn first_stage(&self, model: &Model) -> Result<Graph, Error> {
        Ok(self.after(Known::default()).stage(model)?.0)
    }

    /// The compiler of a stage after what is known.
    pub(crate) fn after(&self, known: Known) -> Compiler {
        Compiler { known: Some(Arc::new(known)), ..self.clone() }
    }

    /// Runs a model stage by stage; most models have one. `run` gives the outputs of a stage, in
    /// order: of its graph, on tensors by name, among which are all inputs of the graph.
    ///
    /// # Errors
    /// Those of `run`, and where the model cannot be imported.
    pub fn run_in_stages<E: From<Error>>(
        &self,
        model: &Model,
        inputs: &[(&str, TensorView<'_>)],
        mut run: impl FnMut(&Graph, &[(&str, TensorView<'_>)]) -> Result<Vec<Tensor>, E>,
    ) -> Result<Vec<Tensor>, E> {
        let stage = |compiler: Compiler| {
            let (graph, later) = compiler.stage(model)?;
            Ok((graph, later.map(Arc::new)))
        };
        through((self, true), inputs, stage, |graph, tensors| run(&graph, tensors))
    }
}

/// Runs stages, each of which `stage` makes ready, until nothing follows; gives what the last one
/// gives. `run` gets all inputs and what earlier stages have made. Unless stages are to be for the
/// exact numbers of earlier results, they are for a range of them where that can be.
pub fn through<T, E: From<Error>>(
    (compiler, exact): (&Compiler, bool),
    inputs: &[(&str, TensorView<'_>)],
    stage: impl Fn(Compiler) -> Result<(T, Option<Arc<Later>>), E>,
    mut run: impl FnMut(T, &[(&str, TensorView<'_>)]) -> Result<Vec<Tensor>, E>,
) -> Result<Vec<Tensor>, E> {
    let (mut known, mut made) = (Known::default(), Vec::<(String, Tensor)>::new());
    for _ in 0..MOST {
        if exact {
            known = known.exactly(&made);
        }
        let attempt = stage(compiler.after(known.clone()));
        let (ready, later) = match attempt {
            // Something needs to know how many results there are.
            Err(_) if !known.dims().is_empty() => {
                known = known.exactly(&made);
                stage(compiler.after(known.clone()))?
            }
            attempt => attempt?,
        };
        let views = made.iter().map(|(name, tensor)| (name.as_str(), tensor.view()));
        let tensors: Vec<(&str, TensorView<'_>)> = inputs.iter().copied().chain(views).collect();
        let outputs = run(ready, &tensors)?;
        let Some(later) = later else { return Ok(outputs) };
        let (next, new) =
            later.after(&known, outputs).map_err(|d| Error::new(ErrorKind::Model, d))?;
        known = next;
        made.extend(new);
    }
    let problem = Diagnostic::new(onnx::NEEDS_VALUE, "the model asks for too many values");
    let problem = problem.expected(format!("at most {MOST} stages"));
    let help = "a loop whose turns hang on what it computes asks in every turn";
    Err(Error::new(ErrorKind::Limit, problem.help(help)).into())
}
