//! Running a compiled model.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::artifact::Artifact;
use crate::given::{check, run_named};
use crate::plan::{Plan, PlanError, Port};
use crate::pool::Pool;
pub use crate::run_error::{Names, RunError};
use crate::scratch::{Scratch, room_bytes};
use crate::state::{self, State};
use crate::tensor::{Tensor, TensorView, TensorViewMut};
use crate::work::Profile;

/// A compiled model, ready to run from any thread; clones share everything.
#[derive(Clone)]
pub struct Executable(Arc<Shared>);

struct Shared {
    artifact: Artifact,
    pool: Arc<Pool>,
    /// Memory of runs that are over: as much as there were runs at once.
    scratch: Mutex<Vec<Scratch>>,
}

impl Executable {
    /// A model that runs on `pool`.
    ///
    /// # Safety
    /// The code does what the plan says: each kernel reads and writes only the buffers of its
    /// steps, inside the sizes of ports, arena and constants, does not write inputs and
    /// constants, and its chunks do not depend on one another. It was made for this processor.
    ///
    /// # Errors
    /// When the plan names what the code and the constants do not have.
    pub unsafe fn new(artifact: Artifact, pool: Arc<Pool>) -> Result<Executable, PlanError> {
        artifact.plan.check(artifact.code.entries(), artifact.constants.len())?;
        let scratch = Mutex::new(Vec::new());
        Ok(Executable(Arc::new(Shared { artifact, pool, scratch })))
    }

    /// What a run reads.
    pub fn inputs(&self) -> &[Port] {
        &self.plan().inputs
    }

    /// What a run writes.
    pub fn outputs(&self) -> &[Port] {
        &self.plan().outputs
    }

    /// The launches of a run, and its memory.
    pub fn plan(&self) -> &Plan {
        &self.0.artifact.plan
    }

    /// The compiled model.
    pub fn artifact(&self) -> &Artifact {
        &self.0.artifact
    }

    /// Bytes that the model takes: constants, code, the plan and the memory of one run. What is
    /// mapped from a file counts too, though others may share it.
    pub fn memory_bytes(&self) -> usize {
        let Artifact { plan, code, constants } = self.artifact();
        let rooms: usize = room_bytes(plan).sum();
        constants.len() + code.mapped_bytes() + plan.own_bytes() + plan.arena_bytes + rooms
    }

    /// The threads that runs share.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.0.pool
    }

    /// Runs the model on tensors given by name, in any order.
    ///
    /// # Errors
    /// When a tensor is missing, unknown, or of another type or shape than the input.
    pub fn run(
        &self,
        inputs: &[(&str, TensorView<'_>)],
    ) -> Result<Vec<(String, Tensor)>, RunError> {
        let plan = self.plan();
        let made = run_named(plan, inputs, |views, outputs| self.run_into(views, outputs))?;
        let name = |(port, tensor): (usize, Tensor)| (plan.outputs[port].name.clone(), tensor);
        Ok(made.into_iter().map(name).collect())
    }

    /// Runs the model on tensors in the order of [`inputs`](Self::inputs) and
    /// [`outputs`](Self::outputs). Does not allocate once there were as many runs at a time before.
    ///
    /// # Errors
    /// When their number, a type or a shape is not that of the model, and where the model was
    /// compiled to keep a state in place: sessions run it.
    pub fn run_into(
        &self,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
    ) -> Result<(), RunError> {
        self.keeps_nothing()?;
        let dims = check(self.plan(), inputs, outputs)?;
        let mut scratch = self.take_scratch();
        *scratch.dims = dims;
        self.0.launch(&mut scratch, inputs, outputs, None);
        self.put_scratch(scratch);
        Ok(())
    }

    /// Runs the model once and says how long each step took.
    ///
    /// # Errors
    /// As [`run_into`](Self::run_into).
    pub fn profile(
        &self,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
    ) -> Result<Profile, RunError> {
        self.keeps_nothing()?;
        let dims = check(self.plan(), inputs, outputs)?;
        let mut scratch = self.take_scratch();
        *scratch.dims = dims;
        let mut ends = Vec::with_capacity(self.plan().steps.len());
        self.0.launch(&mut scratch, inputs, outputs, Some(&mut ends));
        self.put_scratch(scratch);
        Ok(Profile { dims, ends })
    }

    /// A session: the same model with memory of its own. It keeps the states that the model was
    /// compiled with. Those that grow begin empty, where their dims may be 0 long.
    pub fn session(&self) -> Session {
        let (scratch, states) = (Scratch::new(&self.0.artifact), State::of(self.plan()));
        Session { scratch, states, executable: self.clone() }
    }

    /// Refuses a run without a session of a model that needs one.
    fn keeps_nothing(&self) -> Result<(), RunError> {
        let plan = self.plan();
        match plan.states.iter().find(|state| state.in_place) {
            None => Ok(()),
            Some(state) => Err(RunError::State {
                input: plan.inputs[state.input].name.clone(),
                output: plan.outputs[state.output].name.clone(),
                why: "it is kept where it lies, which takes a session: `session().run`".into(),
            }),
        }
    }

    fn take_scratch(&self) -> Scratch {
        let free = self.0.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| Scratch::new(&self.0.artifact))
    }

    fn put_scratch(&self, scratch: Scratch) {
        self.0.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Executable").field(self.plan()).finish()
    }
}

/// A compiled model with memory of its own, for one stream of runs. It may keep [states](State):
/// outputs that are not given out, but read by the next run as inputs.
pub struct Session {
    executable: Executable,
    scratch: Scratch,
    states: Vec<State>,
}

impl Session {
    /// The model.
    pub fn executable(&self) -> &Executable {
        &self.executable
    }

    /// Keeps an output as the next value of an input: neither is given any more. An input of fixed
    /// shape starts with zeros, one that has the length of a dim with what
    /// [`set_state`](Self::set_state) gives it. The value is a tensor that each run makes anew; a
    /// model that is compiled with the state appends to it where it lies.
    ///
    /// # Errors
    /// When there is no such input or output, they do not fit together, or one is kept already.
    pub fn keep(mut self, input: &str, output: &str) -> Result<Session, RunError> {
        let state = State::new(self.executable.plan(), input, output)?;
        if self.states.iter().any(|s| s.input == state.input || s.output == state.output) {
            let (input, output) = (input.into(), output.into());
            return Err(RunError::State {
                input,
                output,
                why: "one of them is kept already".into(),
            });
        }
        self.states.push(state);
        Ok(self)
    }

    /// A copy of a state, by the name of its input.
    pub fn state(&self, input: &str) -> Option<Tensor> {
        let plan = self.executable.plan();
        let state = self.states.iter().find(|s| plan.inputs[s.input].name == input)?;
        state.get(plan, &self.scratch.rooms)
    }

    /// Forgets the last rows of states that grow: those that are as long as the named dim become as
    /// long as when it was that long. Drafts of text are taken back so.
    ///
    /// # Errors
    /// Where no state that is kept in place has that dim, or one is shorter already.
    pub fn rewind(&mut self, dim: &str, length: usize) -> Result<(), RunError> {
        state::rewind(&mut self.states, self.executable.plan(), dim, length)
    }

    /// Gives a state a value, by the name of its input.
    ///
    /// # Errors
    /// When there is no such state, or the tensor is none for the input.
    pub fn set_state(&mut self, input: &str, value: Tensor) -> Result<(), RunError> {
        let plan = self.executable.plan();
        let at = state::to_set(&self.states, plan, input, &value)?;
        self.states[at].set(plan, &mut self.scratch.rooms, value);
        Ok(())
    }

    /// As [`Executable::run`], without the inputs and outputs that are kept.
    ///
    /// # Errors
    /// As there, and when a state has no value.
    pub fn run(
        &mut self,
        inputs: &[(&str, TensorView<'_>)],
    ) -> Result<Vec<(String, Tensor)>, RunError> {
        self.run_timed(inputs, None)
    }

    /// As [`run`](Self::run), and says how long each step took. The outputs are left out.
    ///
    /// # Errors
    /// As there.
    pub fn profile(&mut self, inputs: &[(&str, TensorView<'_>)]) -> Result<Profile, RunError> {
        let mut ends = Vec::with_capacity(self.executable.plan().steps.len());
        self.run_timed(inputs, Some(&mut ends))?;
        Ok(Profile { dims: *self.scratch.dims, ends })
    }

    fn run_timed(
        &mut self,
        inputs: &[(&str, TensorView<'_>)],
        ends: Option<&mut Vec<u64>>,
    ) -> Result<Vec<(String, Tensor)>, RunError> {
        let executable = self.executable.clone();
        let mut states = std::mem::take(&mut self.states);
        let plan = executable.plan();
        let result = state::run(plan, &mut states, inputs, |views, outputs| {
            self.launch(plan, views, outputs, ends)?;
            Ok(*self.scratch.dims)
        });
        self.states = states;
        result
    }

    /// As [`Executable::run_into`], but never allocates. For sessions that keep nothing.
    ///
    /// # Errors
    /// As there, and where the session keeps a state.
    pub fn run_into(
        &mut self,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
    ) -> Result<(), RunError> {
        if let Some(state) = self.states.first() {
            let plan = self.executable.plan();
            return Err(RunError::State {
                input: plan.inputs[state.input].name.clone(),
                output: plan.outputs[state.output].name.clone(),
                why: "a session that keeps it is run by `run`".into(),
            });
        }
        let executable = self.executable.clone();
        self.launch(executable.plan(), inputs, outputs, None)
    }

    fn launch(
        &mut self,
        plan: &Plan,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
        ends: Option<&mut Vec<u64>>,
    ) -> Result<(), RunError> {
        *self.scratch.dims = check(plan, inputs, outputs)?;
        self.executable.0.launch(&mut self.scratch, inputs, outputs, ends);
        Ok(())
    }

    /// Forgets all earlier runs: states are as they were before the first one.
    pub fn reset(&mut self) {
        self.scratch.arena.bytes_mut().fill(0);
        let plan = &self.executable.0.artifact.plan;
        self.states.iter_mut().for_each(|state| state.reset(plan));
    }

    /// A session that goes on from where this one is, independently of it.
    pub fn fork(&self) -> Session {
        let mut fork = self.executable.session();
        fork.states = self.states.clone();
        fork.scratch.arena.bytes_mut().copy_from_slice(self.scratch.arena.bytes());
        for (to, from) in fork.scratch.rooms.iter_mut().zip(&self.scratch.rooms) {
            to.bytes_mut().copy_from_slice(from.bytes());
        }
        fork
    }
}

/// The arguments of one step, for all threads that work on it.
struct Arguments(*const *mut u8);

// SAFETY: the array outlives the step and is only read; what it points to is shared by kernels
// whose chunks do not depend on one another (`Executable::new`).
unsafe impl Sync for Arguments {}

impl Arguments {
    fn get(&self) -> *const *mut u8 {
        self.0
    }
}

impl Shared {
    /// Runs all steps on tensors that were checked; `ends` gets the nanoseconds to the end of each.
    fn launch(
        &self,
        scratch: &mut Scratch,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
        mut ends: Option<&mut Vec<u64>>,
    ) {
        let plan = &self.artifact.plan;
        scratch.bind(inputs, outputs);
        let begin = ends.is_some().then(Instant::now);
        let mut first = 0;
        for step in &plan.steps {
            let arguments = Arguments(scratch.buffers[first..].as_ptr());
            first += step.buffers.len();
            let kernel = self.artifact.code.entry(step.kernel);
            if step.chunks <= 1 {
                // SAFETY: the caller of `Executable::new` vouches for the kernel; the buffers were
                // bound to tensors of the sizes that the plan gives, borrowed for this call.
                unsafe { kernel(arguments.get(), 0, step.extent) };
            } else {
                let chunks = step.chunks.unsigned_abs() as usize;
                self.pool.run(chunks, &|chunk| {
                    let (begin, end) = step.chunk(chunk as i64);
                    if begin < end {
                        // SAFETY: as above.
                        unsafe { kernel(arguments.get(), begin, end) };
                    }
                });
            }
            if let (Some(ends), Some(begin)) = (ends.as_deref_mut(), begin) {
                ends.push(begin.elapsed().as_nanos() as u64);
            }
        }
    }
}
