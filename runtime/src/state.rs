//! What a session keeps from run to run: outputs that the next run reads as inputs, such as the
//! cache of a transformer or the state of a recurrent network.
//!
//! A state that the model was compiled with and that only grows lies in memory with room for the
//! longest: a run writes what is new behind what is there. Any other is a tensor that a run makes
//! anew.

use crate::given::run_named;
use crate::memory::AlignedBytes;
use crate::plan::{DIMS, Dims, Plan, PlanState, Port};
use crate::run_error::{Names, RunError};
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// An input and the output that it takes its next value from.
#[derive(Clone, Debug)]
pub struct State {
    /// Index of the input.
    pub input: usize,
    /// Index of the output.
    pub output: usize,
    value: Value,
}

#[derive(Clone, Debug)]
enum Value {
    /// A tensor of its own; none where it may be of any length and none was given.
    Tensor(Option<Tensor>),
    /// In the memory of that number; the extents in use, where they are known.
    Room(usize, Option<Vec<usize>>),
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
        if !fit(give, take) {
            return Err(wrong(format!("the output is {give}, the input {take}")));
        }
        Ok(State { input: to, output: from, value: Value::Tensor(initial(take)) })
    }

    /// The states that a model was compiled with.
    pub fn of(plan: &Plan) -> Vec<State> {
        let mut rooms = 0;
        let state = |&PlanState { input, output, in_place }: &PlanState| {
            let port = &plan.inputs[input];
            let value = match in_place {
                false => Value::Tensor(initial(port)),
                true => {
                    rooms += 1;
                    Value::Room(rooms - 1, empty(plan, port))
                }
            };
            State { input, output, value }
        };
        plan.states.iter().map(state).collect()
    }

    /// The value before the first run.
    pub fn reset(&mut self, plan: &Plan) {
        let port = &plan.inputs[self.input];
        match &mut self.value {
            Value::Tensor(value) => *value = initial(port),
            Value::Room(_, shape) => *shape = empty(plan, port),
        }
    }

    /// The value, to be read by a run; without bytes where a run knows the memory.
    ///
    /// # Errors
    /// When there is none yet.
    pub fn view(&self, plan: &Plan) -> Result<TensorView<'_>, RunError> {
        let dtype = plan.inputs[self.input].dtype;
        let view = match &self.value {
            Value::Tensor(value) => value.as_ref().map(Tensor::view),
            Value::Room(_, shape) => {
                shape.as_ref().map(|shape| TensorView { dtype, shape, bytes: &[] })
            }
        };
        view.ok_or_else(|| RunError::State {
            input: plan.inputs[self.input].name.clone(),
            output: plan.outputs[self.output].name.clone(),
            why: "it has no value yet; `set_state` gives it one".into(),
        })
    }

    /// A copy of the value.
    pub fn get(&self, plan: &Plan, rooms: &[AlignedBytes]) -> Option<Tensor> {
        let (room, shape) = match &self.value {
            Value::Tensor(value) => return value.clone(),
            Value::Room(room, shape) => (&rooms[*room], shape.as_ref()?),
        };
        let port = &plan.inputs[self.input];
        let mut tensor = Tensor::zeros(port.dtype, shape);
        let to = tensor.bytes_mut();
        for (dense, roomy, len) in runs(port, shape) {
            to[dense..dense + len].copy_from_slice(&room.bytes()[roomy..roomy + len]);
        }
        Some(tensor)
    }

    /// Takes a value that the port admits.
    pub fn set(&mut self, plan: &Plan, rooms: &mut [AlignedBytes], new: Tensor) {
        match &mut self.value {
            Value::Tensor(value) => *value = Some(new),
            Value::Room(room, shape) => {
                let to = rooms[*room].bytes_mut();
                for (dense, roomy, len) in runs(&plan.inputs[self.input], new.shape()) {
                    to[roomy..roomy + len].copy_from_slice(&new.bytes()[dense..dense + len]);
                }
                *shape = Some(new.shape().to_vec());
            }
        }
    }

    /// Takes what a run made of it: the tensor, or more of its memory, as much as dims say.
    pub fn advance(&mut self, plan: &Plan, dims: &Dims, made: Option<Tensor>) {
        match &mut self.value {
            Value::Tensor(value) => *value = made,
            Value::Room(_, shape) => *shape = Some(plan.outputs[self.output].shape_for(dims)),
        }
    }

    /// The shape that the state has had where a dim was that long; none where the state is not kept
    /// in place, has no axis of that dim, or never was so long.
    pub fn shape_at(&self, plan: &Plan, dim: usize, length: usize) -> Option<Vec<usize>> {
        let Value::Room(_, Some(now)) = &self.value else { return None };
        let mut shape = now.clone();
        let port = &plan.inputs[self.input];
        for at in port.lengths.iter().filter(|at| at.dim == dim) {
            let extent = i64::try_from(length).ok()?.checked_add(at.more)?;
            shape[at.axis] = usize::try_from(extent).ok().filter(|&e| e <= now[at.axis])?;
        }
        self.has(plan, dim).then_some(shape)
    }

    /// Whether the state is kept in place and as long as a dim.
    pub fn has(&self, plan: &Plan, dim: usize) -> bool {
        let axes = &plan.inputs[self.input].lengths;
        matches!(self.value, Value::Room(..)) && axes.iter().any(|at| at.dim == dim)
    }

    /// Takes a shape that the state has had: what was written after that is forgotten.
    pub fn go_back(&mut self, shape: Vec<usize>) {
        if let Value::Room(_, now) = &mut self.value {
            *now = Some(shape);
        }
    }
}

/// The state that takes a value, by the name of its input, when the input admits it.
///
/// # Errors
/// When there is no such state, or the tensor is none for the input.
pub fn to_set(
    states: &[State],
    plan: &Plan,
    input: &str,
    value: &Tensor,
) -> Result<usize, RunError> {
    let ports = &plan.inputs;
    let Some(at) = states.iter().position(|s| ports[s.input].name == input) else {
        let kept = states.iter().map(|s| ports[s.input].name.clone()).collect();
        return Err(RunError::UnknownInput { found: input.to_string(), expected: Names(kept) });
    };
    let port = &ports[states[at].input];
    if value.dtype() != port.dtype {
        return Err(RunError::DType { found: value.dtype(), expected: port.clone() });
    }
    if !port.admits(value.shape()) {
        let found = value.shape().to_vec();
        return Err(RunError::Shape { found, expected: port.clone() });
    }
    Ok(at)
}

/// Forgets the last rows of states that grow: those that are as long as the named dim become as
/// long as when it was that long.
///
/// # Errors
/// Where no state that is kept in place has that dim, or one is shorter already.
pub fn rewind(states: &mut [State], plan: &Plan, dim: &str, length: usize) -> Result<(), RunError> {
    let fail = || RunError::Rewind { dim: dim.into(), length };
    let number = plan.dims.iter().position(|d| d.name == dim).ok_or_else(fail)?;
    let mut states: Vec<&mut State> = states.iter_mut().filter(|s| s.has(plan, number)).collect();
    // All of them or none.
    let shapes = states.iter().map(|state| state.shape_at(plan, number, length));
    let shapes = shapes.collect::<Option<Vec<_>>>().filter(|s| !s.is_empty());
    for (state, shape) in states.iter_mut().zip(shapes.ok_or_else(fail)?) {
        state.go_back(shape);
    }
    Ok(())
}

/// A run with states: gives the outputs that are not kept, and takes what is kept into the states.
/// `launch` runs on tensors in the order of the ports, and gives the lengths of dims.
///
/// # Errors
/// When a state has no value, a tensor is missing, unknown, or does not fit, and those of `launch`.
pub fn run<E: From<RunError>>(
    plan: &Plan,
    states: &mut [State],
    inputs: &[(&str, TensorView<'_>)],
    launch: impl FnOnce(&[TensorView<'_>], &mut [TensorViewMut<'_>]) -> Result<Dims, E>,
) -> Result<Vec<(String, Tensor)>, E> {
    let mut all = inputs.to_vec();
    for state in states.iter() {
        let name = plan.inputs[state.input].name.as_str();
        if inputs.iter().any(|(given, _)| *given == name) {
            return Err(RunError::DuplicateInput(name.to_string()).into());
        }
        all.push((name, state.view(plan)?));
    }
    let mut dims = [0; DIMS];
    let made = run_named(plan, &all, |views, outputs| {
        dims = launch(views, outputs)?;
        Ok::<(), E>(())
    })?;
    let (mut given, mut kept) = (Vec::with_capacity(made.len()), Vec::new());
    for (port, tensor) in made {
        match states.iter().any(|state| state.output == port) {
            true => kept.push((port, tensor)),
            false => given.push((plan.outputs[port].name.clone(), tensor)),
        }
    }
    for state in states {
        let made = kept.iter().position(|(port, _)| *port == state.output);
        let made = made.map(|at| kept.swap_remove(at).1);
        state.advance(plan, &dims, made);
    }
    Ok(given)
}

/// Whether an output may be the next value of an input.
fn fit(give: &Port, take: &Port) -> bool {
    let dim = |port: &Port, axis| port.lengths.iter().find(|l| l.axis == axis).map(|l| l.dim);
    give.dtype == take.dtype
        && give.shape.len() == take.shape.len()
        && (0..take.shape.len()).all(|axis| match (dim(give, axis), dim(take, axis)) {
            (None, None) => give.shape[axis] == take.shape[axis],
            (give, take) => give == take,
        })
}

/// The value before the first run: zeros, where the model says how many.
fn initial(port: &Port) -> Option<Tensor> {
    port.lengths.is_empty().then(|| Tensor::zeros(port.dtype, &port.shape))
}

/// The extents of nothing, where all dims of a port may be 0 long.
fn empty(plan: &Plan, port: &Port) -> Option<Vec<usize>> {
    let least = |dim: usize| plan.dims[dim].least as i64;
    let none = port.lengths.iter().all(|l| least(l.dim) + l.more == 0);
    let extent = |(axis, &extent)| match port.lengths.iter().any(|l| l.axis == axis) {
        true => 0,
        false => extent,
    };
    none.then(|| port.shape.iter().enumerate().map(extent).collect())
}

/// Pieces of a tensor of a shape that lie one after another in the memory of a port, which has
/// room for the port's shape: byte offsets in the tensor and in the memory, and lengths.
fn runs(port: &Port, shape: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> {
    let split = (0..shape.len()).rev().find(|&axis| shape[axis] != port.shape[axis]).unwrap_or(0);
    let len = shape[split.min(shape.len())..].iter().product::<usize>() * port.dtype.bytes();
    let outer = shape[..split].to_vec();
    let room = port.shape.clone();
    let step = room[split.min(room.len())..].iter().product::<usize>() * port.dtype.bytes();
    let count: usize = if len == 0 { 0 } else { outer.iter().product() };
    (0..count).map(move |i| {
        let (mut rest, mut row, mut width) = (i, 0, 1);
        for axis in (0..outer.len()).rev() {
            row += rest % outer[axis] * width;
            rest /= outer[axis];
            width *= room[axis];
        }
        (i * len, row * step, len)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Length;
    use crate::tensor::DType;

    #[test]
    fn a_dense_tensor_spreads_over_its_room() {
        let length = |&axis: &usize| Length { axis, dim: axis, more: 0 };
        let port = |shape: &[usize], ranged: &[usize]| Port {
            lengths: ranged.iter().map(length).collect(),
            ..Port::new("x", DType::I32, shape)
        };
        let found = |port: &Port, shape: &[usize]| runs(port, shape).collect::<Vec<_>>();
        assert_eq!(found(&port(&[2, 5, 3], &[1]), &[2, 2, 3]), [(0, 0, 24), (24, 60, 24)]);
        assert_eq!(found(&port(&[2, 5, 3], &[1]), &[2, 5, 3]), [(0, 0, 120)]);
        assert_eq!(found(&port(&[2, 5, 3], &[1]), &[2, 0, 3]), []);
        let both = port(&[3, 2, 4], &[0, 2]);
        let expected = [(0, 0, 4), (4, 16, 4), (8, 32, 4), (12, 48, 4)];
        assert_eq!(found(&both, &[2, 2, 1]), expected);
        assert_eq!(found(&port(&[], &[]), &[]), [(0, 0, 4)]);
    }
}
