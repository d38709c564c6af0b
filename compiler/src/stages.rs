//! Models that run in stages, as their shapes hang on data that they compute: what a stage gives is
//! known to the next one (`onnx/asks.rs`).

use std::sync::Arc;

use kiln_runtime::tensor::{DType, Tensor, TensorView};

use crate::error::{Diagnostic, Error, ErrorKind};
use crate::graph::Graph;
use crate::graph::eval::Value;
use crate::graph::op::Type;
use crate::model::Model;
use crate::onnx::call::not_supported;
use crate::onnx::{Body, Known, Later};
use crate::{Compiler, onnx};

/// Stages of a run at most: each is compiled.
const MOST: usize = 1000;
/// Turns of a loop at most.
const MOST_TURNS: i64 = 1 << 24;

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

    /// The compiler of a model that is part of the one that this is for.
    pub(crate) fn of_part(&self) -> Compiler {
        let (dims, shapes, values, states) = Default::default();
        Compiler { dims, shapes, values, states, known: None, staged: false, ..self.clone() }
    }

    /// Runs a model stage by stage; most models have one. `run` gives the outputs of a stage, in
    /// order: of its graph, on tensors by name, among which are all inputs of the graph. The
    /// bodies of loops whose turns data decide are models that run so as well.
    ///
    /// # Errors
    /// Those of `run`, and where the model cannot be imported.
    pub fn run_in_stages<E: From<Error>>(
        &self,
        model: &Model,
        inputs: &[(&str, TensorView<'_>)],
        mut run: impl FnMut(&Graph, &[(&str, TensorView<'_>)]) -> Result<Vec<Tensor>, E>,
    ) -> Result<Vec<Tensor>, E> {
        self.run_part(model, inputs, &mut run)
    }

    fn run_part<E: From<Error>>(
        &self,
        model: &Model,
        inputs: &[(&str, TensorView<'_>)],
        run: &mut Run<E>,
    ) -> Result<Vec<Tensor>, E> {
        let stage = |compiler: Compiler| {
            let (graph, later) = compiler.stage(model)?;
            Ok((graph, later.map(Arc::new)))
        };
        through((self, true), inputs, stage, |work| match work {
            Step::Stage(graph, tensors) => run(&graph, tensors),
            Step::Turn(body, tensors) => {
                let part = model.part(body.model.clone(), &self.limits)?;
                let compiler = tensors
                    .iter()
                    .fold(self.of_part(), |compiler, (name, x)| compiler.shape(name, x.shape));
                compiler.run_part(&part, tensors, run)
            }
        })
    }
}

/// Runs a graph on tensors given by name.
type Run<'r, E> = dyn FnMut(&Graph, &[(&str, TensorView<'_>)]) -> Result<Vec<Tensor>, E> + 'r;

/// What there is to run, on tensors given by name.
pub enum Step<'s, T> {
    /// A stage of the model, on all inputs and what earlier stages have made.
    Stage(T, &'s [(&'s str, TensorView<'s>)]),
    /// A turn of a loop, on all inputs of its body.
    Turn(&'s Arc<Body>, &'s [(&'s str, TensorView<'s>)]),
}

/// Runs stages, each of which `stage` makes ready, until nothing follows; gives what the last one
/// gives. Unless stages are to be for the exact numbers of earlier results, they are for a range of
/// them where that can be.
pub fn through<T, E: From<Error>>(
    (compiler, exact): (&Compiler, bool),
    inputs: &[(&str, TensorView<'_>)],
    stage: impl Fn(Compiler) -> Result<(T, Option<Arc<Later>>), E>,
    mut run: impl FnMut(Step<T>) -> Result<Vec<Tensor>, E>,
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
        let outputs = run(Step::Stage(ready, &tensors))?;
        let Some(later) = later else { return Ok(outputs) };
        let (next, new) = later.after(&known, outputs, |body, given| {
            turns(body, given, |tensors| run(Step::Turn(body, tensors)))
        })?;
        known = next;
        made.extend(new);
    }
    let problem = Diagnostic::new(onnx::NEEDS_VALUE, "the model asks for too many values");
    let problem = problem.expected(format!("at most {MOST} stages"));
    Err(Error::new(ErrorKind::Limit, problem).into())
}

/// The results of a loop: what it carries, and the rows that its turns have made.
fn turns<E: From<Error>>(
    body: &Body,
    given: Vec<Tensor>,
    mut run: impl FnMut(&[(&str, TensorView<'_>)]) -> Result<Vec<Tensor>, E>,
) -> Result<Vec<Tensor>, E> {
    let (node, opset) = &body.node;
    let wrong = |what: String| {
        let problem = not_supported(what).node(node.as_ref()).op("Loop", *opset);
        E::from(Error::new(ErrorKind::Model, problem))
    };
    let mut given = given.into_iter();
    let mut told = |index: usize| {
        let tensor = if body.told[index] { given.next() } else { None };
        tensor.and_then(|tensor| Value::from_tensor(&tensor).as_i64s()?.first().copied())
    };
    let (most, mut going) = (told(0).unwrap_or(i64::MAX), told(1).is_none_or(|first| first != 0));
    let mut carried: Vec<Tensor> = given.by_ref().take(body.carried).collect();
    let read: Vec<Tensor> = given.collect();
    let mut rows: Vec<Vec<Tensor>> = vec![Vec::new(); body.rows.len()];
    let mut turn = 0;
    while going && turn < most {
        if turn == MOST_TURNS {
            return Err(wrong(format!("a loop of more than {MOST_TURNS} turns")));
        }
        let number = Tensor::from_slice(&[], &[turn]);
        let yes = [1];
        let going_on = TensorView { dtype: DType::Bool, shape: &[], bytes: &yes };
        let views = carried.iter().chain(&read).map(Tensor::view);
        let views = [number.view(), going_on].into_iter().chain(views);
        let tensors: Vec<(&str, TensorView<'_>)> =
            body.inputs.iter().map(String::as_str).zip(views).collect();
        let mut outputs = run(&tensors)?.into_iter();
        going = outputs.next().is_some_and(|next| next.bytes() != [0]);
        carried = outputs.by_ref().take(body.carried).collect();
        rows.iter_mut().zip(outputs).for_each(|(rows, row)| rows.push(row));
        turn += 1;
    }
    for (rows, ty) in rows.iter().zip(&body.rows) {
        carried.push(stacked(rows, ty.as_ref()).map_err(wrong)?);
    }
    Ok(carried)
}

/// Rows as one tensor; without any the type of one says the shape.
fn stacked(rows: &[Tensor], ty: Option<&Type>) -> Result<Tensor, String> {
    let one = match (rows.first(), ty) {
        (Some(row), _) => Type::new(row.dtype(), row.shape()),
        (None, Some(ty)) => ty.clone(),
        (None, None) => return Err("a loop of no turns that collects values".to_string()),
    };
    if let Some(other) = rows.iter().find(|row| row.shape() != &one.shape[..]) {
        let (one, other) = (&one.shape, other.shape());
        return Err(format!("a loop that collects values of {one:?} and of {other:?}"));
    }
    let shape: Vec<usize> = std::iter::once(rows.len()).chain(one.shape).collect();
    let bytes: Vec<u8> = rows.iter().flat_map(|row| row.bytes()).copied().collect();
    let tensor = Tensor::from_bytes(one.dtype, &shape, &bytes);
    tensor.ok_or_else(|| "a loop that collects values of several types".to_string())
}
