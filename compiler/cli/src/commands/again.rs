//! A model that is run again and again, with states that are each time as they were.

use std::time::{Duration, Instant};

use kiln::plan::Plan;
use kiln::tensor::{Tensor, TensorView, TensorViewMut};
use kiln::work::Profile;
use kiln::{Executable, RunError, Session};

use crate::failure::Failure;
use crate::input::Inputs;

/// A model with what it is run on.
pub struct Again<'a> {
    executable: &'a Executable,
    inputs: &'a Inputs,
    way: Way<'a>,
}

enum Way<'a> {
    /// Tensors go in, and out into the same memory in every run.
    Into(Vec<Tensor>),
    /// A session keeps states; after a run they go back to these lengths of dims.
    Session(Box<Session>, Vec<(&'a str, TensorView<'a>)>, Vec<(String, usize)>),
}

fn failure(error: RunError) -> Failure {
    Failure::usage(error.to_string())
}

impl<'a> Again<'a> {
    /// Runs it once where it keeps nothing, to have memory for its outputs.
    pub fn new(executable: &'a Executable, inputs: &'a Inputs) -> Result<Again<'a>, Failure> {
        let plan = executable.plan();
        if plan.states.iter().all(|state| !state.in_place) {
            let outputs = executable.run(&inputs.named()).map_err(failure)?;
            let outputs = outputs.into_iter().map(|(_, tensor)| tensor).collect();
            return Ok(Again { executable, inputs, way: Way::Into(outputs) });
        }
        let mut session = executable.session();
        let Split { states, others, lengths } = split(plan, inputs);
        for (name, value) in states {
            session.set_state(name, value).map_err(failure)?;
        }
        Ok(Again { executable, inputs, way: Way::Session(Box::new(session), others, lengths) })
    }

    /// A run.
    pub fn once(&mut self) -> Result<(), Failure> {
        let ran = match &mut self.way {
            Way::Into(outputs) => {
                let mut targets: Vec<TensorViewMut> =
                    outputs.iter_mut().map(Tensor::view_mut).collect();
                self.executable.run_into(&self.inputs.views(), &mut targets)
            }
            Way::Session(session, inputs, lengths) => {
                session.run(inputs).and_then(|_| go_back(session, lengths))
            }
        };
        ran.map_err(failure)
    }

    /// A run whose steps are timed.
    pub fn profile(&mut self) -> Result<Profile, Failure> {
        let ran = match &mut self.way {
            Way::Into(outputs) => {
                let mut targets: Vec<TensorViewMut> =
                    outputs.iter_mut().map(Tensor::view_mut).collect();
                self.executable.profile(&self.inputs.views(), &mut targets)
            }
            Way::Session(session, inputs, lengths) => session
                .profile(inputs)
                .and_then(|profile| go_back(session, lengths).map(|()| profile)),
        };
        ran.map_err(failure)
    }

    /// Runs for as long as `length` says, at least once and at most so many times, and gives the
    /// time of each run.
    pub fn measure(&mut self, length: Duration, most: usize) -> Result<Vec<Duration>, Failure> {
        let mut times = Vec::with_capacity(most.min(1 << 16));
        let begin = Instant::now();
        let mut now = begin;
        while times.is_empty() || now - begin < length && times.len() < most {
            self.once()?;
            let end = Instant::now();
            times.push(end - now);
            now = end;
        }
        Ok(times)
    }
}

/// Inputs of a model that keeps states.
pub struct Split<'a> {
    /// Values of states that are given.
    pub states: Vec<(&'a str, Tensor)>,
    /// The other inputs.
    pub others: Vec<(&'a str, TensorView<'a>)>,
    /// How long dims are before a run, of states that are appended to where they lie.
    pub lengths: Vec<(String, usize)>,
}

/// Sets the states apart.
pub fn split<'a>(plan: &Plan, inputs: &'a Inputs) -> Split<'a> {
    let mut split = Split { states: Vec::new(), others: Vec::new(), lengths: Vec::new() };
    for (name, view) in inputs.named() {
        let state = plan.states.iter().find(|s| plan.inputs[s.input].name == name);
        let Some(state) = state else {
            split.others.push((name, view));
            continue;
        };
        let value = Tensor::from_bytes(view.dtype, view.shape, view.bytes);
        split.states.push((name, value.expect("a view has the bytes of its shape")));
        let port = &plan.inputs[state.input];
        for length in port.lengths.iter().filter(|_| state.in_place) {
            let dim = plan.dims[length.dim].name.clone();
            let long = usize::try_from(view.shape[length.axis] as i64 - length.more);
            split.lengths.extend(long.ok().map(|long| (dim, long)));
        }
    }
    split.lengths.sort();
    split.lengths.dedup();
    split
}

fn go_back(session: &mut Session, lengths: &[(String, usize)]) -> Result<(), RunError> {
    lengths.iter().try_for_each(|(dim, length)| session.rewind(dim, *length))
}
