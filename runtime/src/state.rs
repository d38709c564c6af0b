//! What a session keeps from run to run: outputs that the next run reads as inputs, such as the
//! cache of a transformer or the state of a recurrent network.

use crate::plan::{Plan, Port};
use crate::session::RunError;
use crate::tensor::{Tensor, TensorView};

/// An input and the output that it takes its next value from.
#[derive(Clone, Debug)]
pub struct State {
    /// Index of the input.
    pub input: usize,
    /// Index of the output.
    pub output: usize,
    /// Its value; none where it may be of any length and none was given.
    pub value: Option<Tensor>,
}

impl State {
    /// Pairs an input with an output of the same type, each axis of which is as long, or as long
    /// as the same dim and some more.
    ///
    /// # Errors
    /// When there is no such input or output, or they do not fit together.
    pub fn new(plan: &Plan, input: &str, output: &str) -> Result<State, RunError> {
        let wrong =
            |why: String| RunError::State { input: input.into(), output: output.into(), why };
        let find = |ports: &[Port], name: &str, side: &str| {
            let at = ports.iter().position(|port| port.name == name);
            at.ok_or_else(|| {
                let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
                wrong(format!("the model has no {side} `{name}`, but {}", names.join(", ")))
            })
        };
        let from = find(&plan.outputs, output, "output")?;
        let to = find(&plan.inputs, input, "input")?;
        let (give, take) = (&plan.outputs[from], &plan.inputs[to]);
        let dim = |port: &Port, axis| port.lengths.iter().find(|l| l.axis == axis).map(|l| l.dim);
        let fits = give.dtype == take.dtype
            && give.shape.len() == take.shape.len()
            && (0..take.shape.len()).all(|axis| match (dim(give, axis), dim(take, axis)) {
                (None, None) => give.shape[axis] == take.shape[axis],
                (give, take) => give == take,
            });
        if !fits {
            return Err(wrong(format!("the output is {give}, the input {take}")));
        }
        Ok(State { input: to, output: from, value: State::initial(take) })
    }

    /// The value before the first run: zeros, where the model says how many.
    pub fn initial(port: &Port) -> Option<Tensor> {
        port.lengths.is_empty().then(|| Tensor::zeros(port.dtype, &port.shape))
    }

    /// The value, to be read by a run.
    ///
    /// # Errors
    /// When there is none yet.
    pub fn view(&self, plan: &Plan) -> Result<TensorView<'_>, RunError> {
        self.value.as_ref().map(Tensor::view).ok_or_else(|| RunError::State {
            input: plan.inputs[self.input].name.clone(),
            output: plan.outputs[self.output].name.clone(),
            why: "it has no value yet; `set_state` gives it one".into(),
        })
    }
}
