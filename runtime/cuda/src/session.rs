//! Runs of one user, one after another, with states that stay on the device.

use std::sync::Arc;

use kiln_runtime::given::check;
use kiln_runtime::gpu::Spot;
use kiln_runtime::memory::AlignedBytes;
use kiln_runtime::plan::{Dims, Plan, PlanState, Port};
use kiln_runtime::state::{self, State};
use kiln_runtime::tensor::{Tensor, TensorView, TensorViewMut};
use kiln_runtime::work::Profile;

use crate::driver::Fault;
use crate::error::CudaError;
use crate::lane::Lane;
use crate::model::{CudaModel, running};

/// A model with memory of its own, for one run after another.
pub struct CudaSession {
    /// None while it is dropped.
    lane: Option<Lane>,
    states: Vec<State>,
    /// The plan, with every state kept in place that stays on the device.
    plan: Arc<Plan>,
    model: CudaModel,
}

impl Drop for CudaSession {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            self.model.give_back(lane, 1);
        }
    }
}

/// States that stay on the device, though a run makes them anew: those that are always as long.
/// They are copied from output to input once a run is done.
pub(crate) fn resident(plan: &Plan) -> impl Iterator<Item = PlanState> {
    let long = |port: &Port| !port.lengths.is_empty();
    let states = plan.states.iter().copied();
    states.filter(move |state| {
        !state.in_place && !long(&plan.inputs[state.input]) && !long(&plan.outputs[state.output])
    })
}

/// The plan as sessions see it: what stays on the device is given to no run, and taken from none.
pub(crate) fn plan_of_sessions(plan: &Plan) -> Plan {
    let mut kept = plan.clone();
    for state in resident(plan) {
        let of = |s: &&mut PlanState| s.input == state.input;
        kept.states.iter_mut().filter(of).for_each(|s| s.in_place = true);
    }
    kept
}

fn kept(fault: Fault) -> CudaError {
    CudaError::Driver { what: "copying a state", fault }
}

impl CudaSession {
    pub(crate) fn new(model: CudaModel, lane: Lane) -> CudaSession {
        let plan = model.session_plan().clone();
        CudaSession { lane: Some(lane), states: State::of(&plan), plan, model }
    }

    /// The model.
    pub fn model(&self) -> &CudaModel {
        &self.model
    }

    fn lane(&mut self) -> &mut Lane {
        self.lane.as_mut().expect("a session has its lane until it is dropped")
    }

    /// As [`CudaModel::run`], without the inputs and outputs that are kept.
    ///
    /// # Errors
    /// As there, and when a state has no value.
    pub fn run(
        &mut self,
        inputs: &[(&str, TensorView<'_>)],
    ) -> Result<Vec<(String, Tensor)>, CudaError> {
        self.run_with(inputs, &mut |model, lane, dims, views, outputs| {
            model.once(lane, dims, views, outputs)
        })
    }

    /// The same, waiting after each kernel: the one that fails is named.
    ///
    /// # Errors
    /// As there.
    pub fn run_stepwise(
        &mut self,
        inputs: &[(&str, TensorView<'_>)],
    ) -> Result<Vec<(String, Tensor)>, CudaError> {
        self.run_with(inputs, &mut |model, lane, dims, views, outputs| {
            let program = model.program();
            lane.stepwise(&program, 0, views, dims)?;
            lane.take(&program, 0, outputs).map_err(running)
        })
    }

    /// The same; says how long each step took on the device. The outputs are left out.
    ///
    /// # Errors
    /// As there.
    pub fn profile(&mut self, inputs: &[(&str, TensorView<'_>)]) -> Result<Profile, CudaError> {
        let mut profile = Profile { dims: [0; kiln_runtime::plan::DIMS], ends: Vec::new() };
        self.run_with(inputs, &mut |model, lane, dims, views, outputs| {
            let program = model.program();
            profile = Profile { dims: *dims, ends: lane.timed(&program, 0, views, dims)? };
            lane.take(&program, 0, outputs).map_err(running)
        })?;
        Ok(profile)
    }

    /// How long all steps take on the device, in nanoseconds: the mean of so many times over the
    /// same inputs, which are copied once.
    ///
    /// # Errors
    /// As there.
    pub fn time(
        &mut self,
        inputs: &[(&str, TensorView<'_>)],
        count: u32,
    ) -> Result<u64, CudaError> {
        let mut time = 0;
        self.run_with(inputs, &mut |model, lane, dims, views, outputs| {
            let program = model.program();
            time = lane.repeated(&program, 0, (views, dims), count)?;
            lane.take(&program, 0, outputs).map_err(running)
        })?;
        Ok(time)
    }

    fn run_with(
        &mut self,
        inputs: &[(&str, TensorView<'_>)],
        launch: &mut Launch<'_>,
    ) -> Result<Vec<(String, Tensor)>, CudaError> {
        let (model, plan) = (self.model.clone(), self.plan.clone());
        let mut states = std::mem::take(&mut self.states);
        let lane = self.lane();
        let result = state::run(&plan, &mut states, inputs, |views, outputs| {
            let dims = check(&plan, views, outputs)?;
            launch(&model, lane, &dims, views, outputs)?;
            lane.carry(&model.program()).map_err(kept)?;
            Ok::<Dims, CudaError>(dims)
        });
        self.states = states;
        result
    }

    /// A copy of a state, by the name of its input; none where there is no such state.
    ///
    /// # Errors
    /// When the device fails.
    pub fn state(&self, input: &str) -> Result<Option<Tensor>, CudaError> {
        let plan = &*self.plan;
        let state = self.states.iter().find(|s| plan.inputs[s.input].name == input);
        let Some(state) = state else { return Ok(None) };
        let mut rooms = self.rooms();
        let lane = self.lane.as_ref().expect("a session has its lane until it is dropped");
        let kept_states = plan.states.iter().filter(|state| state.in_place);
        for (room, other) in rooms.iter_mut().zip(kept_states) {
            if other.input == state.input {
                lane.get(self.spot(other.input), room.bytes_mut()).map_err(kept)?;
            }
        }
        Ok(state.get(plan, &rooms))
    }

    /// Gives a state a value, by the name of its input.
    ///
    /// # Errors
    /// When there is no such state, the tensor is none for the input, or the device fails.
    pub fn set_state(&mut self, input: &str, value: Tensor) -> Result<(), CudaError> {
        let plan = self.plan.clone();
        let at = state::to_set(&self.states, &plan, input, &value)?;
        let mut rooms = self.rooms();
        self.states[at].set(&plan, &mut rooms, value);
        let kept_states = plan.states.iter().filter(|state| state.in_place);
        for (room, state) in rooms.iter().zip(kept_states) {
            if state.input == self.states[at].input && !room.is_empty() {
                let spot = self.spot(state.input);
                self.lane().set(spot, room.bytes()).map_err(kept)?;
            }
        }
        Ok(())
    }

    /// Forgets the last rows of states that grow, as
    /// [`Session::rewind`](kiln_runtime::session::Session::rewind) does.
    ///
    /// # Errors
    /// Where no state that is kept in place has that dim, or one is shorter already.
    pub fn rewind(&mut self, dim: &str, length: usize) -> Result<(), CudaError> {
        Ok(state::rewind(&mut self.states, &self.plan, dim, length)?)
    }

    /// Forgets all earlier runs: states are as they were before the first one.
    ///
    /// # Errors
    /// When the device fails.
    pub fn reset(&mut self) -> Result<(), CudaError> {
        let (model, plan) = (self.model.clone(), self.plan.clone());
        self.lane().clear(&model.program()).map_err(kept)?;
        self.states.iter_mut().for_each(|state| state.reset(&plan));
        Ok(())
    }

    /// A session that goes on from where this one is, independently of it.
    ///
    /// # Errors
    /// When there is no memory for it, or the device fails.
    pub fn fork(&self) -> Result<CudaSession, CudaError> {
        let mut fork = self.model.session()?;
        fork.states = self.states.clone();
        let lane = self.lane.as_ref().expect("a session has its lane until it is dropped");
        fork.lane().copy(lane, &self.model.program()).map_err(kept)?;
        Ok(fork)
    }

    /// Memory of this machine for the states that are kept in place; zeros.
    fn rooms(&self) -> Vec<AlignedBytes> {
        let plan = &*self.plan;
        let kept = plan.states.iter().filter(|state| state.in_place);
        let size = |input: usize| plan.inputs[input].size_bytes().unwrap_or(0);
        kept.map(|state| AlignedBytes::zeroed(size(state.input))).collect()
    }

    /// Where the memory of a state begins that stays on the device.
    fn spot(&self, input: usize) -> Spot {
        self.model.program().ports.inputs[input]
    }
}

/// One way to run on tensors that were checked.
type Launch<'a> = dyn FnMut(
        &CudaModel,
        &mut Lane,
        &Dims,
        &[TensorView<'_>],
        &mut [TensorViewMut<'_>],
    ) -> Result<(), CudaError>
    + 'a;
