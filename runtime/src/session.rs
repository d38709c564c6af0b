//! Running a compiled model.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::artifact::Artifact;
use crate::plan::{DIMS, Dims, Length, Plan, PlanError, Port};
use crate::pool::Pool;
pub use crate::run_error::{Names, RunError};
use crate::scratch::{Scratch, room_bytes};
use crate::state::State;
use crate::tensor::{DType, Tensor, TensorView, TensorViewMut, size_bytes};
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

    /// Bytes that the model takes: constants, code and the memory of one run. What is mapped from a
    /// file counts too, though others may share it.
    pub fn memory_bytes(&self) -> usize {
        let Artifact { plan, code, constants } = self.artifact();
        let rooms: usize = room_bytes(plan).sum();
        constants.len() + code.bytes().len() + plan.arena_bytes + rooms
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
        let plan = &self.executable.0.artifact.plan;
        let fail = || RunError::Rewind { dim: dim.into(), length };
        let number = plan.dims.iter().position(|d| d.name == dim).ok_or_else(fail)?;
        let mut states: Vec<&mut State> =
            self.states.iter_mut().filter(|state| state.has(plan, number)).collect();
        // All of them or none.
        let shapes = states.iter().map(|state| state.shape_at(plan, number, length));
        let shapes = shapes.collect::<Option<Vec<_>>>().filter(|s| !s.is_empty());
        for (state, shape) in states.iter_mut().zip(shapes.ok_or_else(fail)?) {
            state.go_back(shape);
        }
        Ok(())
    }

    /// Gives a state a value, by the name of its input.
    ///
    /// # Errors
    /// When there is no such state, or the tensor is none for the input.
    pub fn set_state(&mut self, input: &str, value: Tensor) -> Result<(), RunError> {
        let inputs = self.executable.inputs();
        let kept = || self.states.iter().map(|s| inputs[s.input].name.clone()).collect();
        let found = self.states.iter().position(|s| inputs[s.input].name == input);
        let Some(at) = found else {
            let (found, expected) = (input.to_string(), Names(kept()));
            return Err(RunError::UnknownInput { found, expected });
        };
        let port = &inputs[self.states[at].input];
        if value.dtype() != port.dtype {
            return Err(RunError::DType { found: value.dtype(), expected: port.clone() });
        }
        if !port.admits(value.shape()) {
            let found = value.shape().to_vec();
            return Err(RunError::Shape { found, expected: port.clone() });
        }
        self.states[at].set(self.executable.plan(), &mut self.scratch.rooms, value);
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
        let result = self.run_with(executable.plan(), inputs, &mut states, ends);
        self.states = states;
        result
    }

    fn run_with(
        &mut self,
        plan: &Plan,
        inputs: &[(&str, TensorView<'_>)],
        states: &mut [State],
        ends: Option<&mut Vec<u64>>,
    ) -> Result<Vec<(String, Tensor)>, RunError> {
        let mut all = inputs.to_vec();
        for state in states.iter() {
            let name = plan.inputs[state.input].name.as_str();
            if inputs.iter().any(|(given, _)| *given == name) {
                return Err(RunError::DuplicateInput(name.to_string()));
            }
            all.push((name, state.view(plan)?));
        }
        let made = run_named(plan, &all, |views, outputs| self.launch(plan, views, outputs, ends))?;
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
            state.advance(plan, &self.scratch.dims, made);
        }
        Ok(given)
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

/// Runs on tensors given by name; gives the outputs that are not kept in place, by number.
fn run_named(
    plan: &Plan,
    inputs: &[(&str, TensorView<'_>)],
    run_into: impl FnOnce(&[TensorView<'_>], &mut [TensorViewMut<'_>]) -> Result<(), RunError>,
) -> Result<Vec<(usize, Tensor)>, RunError> {
    let views = by_port(plan, inputs)?;
    let dims = lengths(plan, &views)?;
    let shapes: Vec<Vec<usize>> = plan.outputs.iter().map(|port| port.shape_for(&dims)).collect();
    let mut outputs: Vec<(usize, Tensor)> = (0..shapes.len())
        .filter(|&port| !plan.is_output_kept(port))
        .map(|port| (port, Tensor::zeros(plan.outputs[port].dtype, &shapes[port])))
        .collect();
    let mut made = outputs.iter_mut();
    let target = |(port, shape)| match plan.is_output_kept(port) {
        true => TensorViewMut { dtype: plan.outputs[port].dtype, shape, bytes: &mut [] },
        false => made.next().expect("a tensor for each output that is not kept").1.view_mut(),
    };
    let mut targets: Vec<TensorViewMut> =
        shapes.iter().map(Vec::as_slice).enumerate().map(target).collect();
    run_into(&views, &mut targets)?;
    Ok(outputs)
}

/// Puts tensors given by name into the order of the ports.
fn by_port<'a>(
    plan: &Plan,
    inputs: &[(&str, TensorView<'a>)],
) -> Result<Vec<TensorView<'a>>, RunError> {
    for (index, (name, _)) in inputs.iter().enumerate() {
        if !plan.inputs.iter().any(|port| port.name == *name) {
            let expected = Names(plan.inputs.iter().map(|port| port.name.clone()).collect());
            return Err(RunError::UnknownInput { found: name.to_string(), expected });
        }
        if inputs[..index].iter().any(|(earlier, _)| earlier == name) {
            return Err(RunError::DuplicateInput(name.to_string()));
        }
    }
    let find = |port: &Port| {
        let given = inputs.iter().find(|(name, _)| port.name == *name);
        given
            .map(|(_, view)| *view)
            .ok_or_else(|| RunError::MissingInput { expected: port.clone() })
    };
    plan.inputs.iter().map(find).collect()
}

fn check(
    plan: &Plan,
    inputs: &[TensorView<'_>],
    outputs: &[TensorViewMut<'_>],
) -> Result<Dims, RunError> {
    check_count("inputs", inputs.len(), plan.inputs.len())?;
    check_count("outputs", outputs.len(), plan.outputs.len())?;
    let dims = lengths(plan, inputs)?;
    // What is kept in place comes without bytes: the run knows its memory.
    let bytes = |kept: bool, len: usize| (!kept).then_some(len);
    for (i, (port, view)) in plan.inputs.iter().zip(inputs).enumerate() {
        let bytes = bytes(plan.is_input_kept(i), view.bytes.len());
        check_port(port, &dims, (view.dtype, view.shape, bytes))?;
    }
    for (i, (port, view)) in plan.outputs.iter().zip(outputs).enumerate() {
        let bytes = bytes(plan.is_output_kept(i), view.bytes.len());
        check_port(port, &dims, (view.dtype, view.shape, bytes))?;
    }
    Ok(dims)
}

/// The lengths of dims that the shapes of inputs give. Does not allocate where they fit.
fn lengths(plan: &Plan, inputs: &[TensorView<'_>]) -> Result<Dims, RunError> {
    let mut dims = [0; DIMS];
    let mut known = [false; DIMS];
    for (port, view) in plan.inputs.iter().zip(inputs) {
        for &Length { axis, dim, more } in &port.lengths {
            let extent = *view.shape.get(axis).ok_or_else(|| RunError::Shape {
                found: view.shape.to_vec(),
                expected: port.clone(),
            })?;
            let found = i64::try_from(extent).unwrap_or(i64::MAX).saturating_sub(more);
            let range = &plan.dims[dim];
            if !usize::try_from(found).is_ok_and(|n| (range.least..=range.most).contains(&n)) {
                let (dim, port) = (range.clone(), port.name.clone());
                return Err(RunError::Range { axis, found, dim, port });
            }
            if known[dim] && dims[dim] != found {
                let (before, dim) = (dims[dim], range.name.clone());
                let port = port.name.clone();
                return Err(RunError::Differ { axis, found, before, dim, port });
            }
            (known[dim], dims[dim]) = (true, found);
        }
    }
    Ok(dims)
}

fn check_count(what: &'static str, found: usize, expected: usize) -> Result<(), RunError> {
    if found == expected { Ok(()) } else { Err(RunError::Count { what, found, expected }) }
}

fn check_port(
    port: &Port,
    dims: &Dims,
    (dtype, shape, bytes): (DType, &[usize], Option<usize>),
) -> Result<(), RunError> {
    if dtype != port.dtype {
        return Err(RunError::DType { found: dtype, expected: port.clone() });
    }
    let expected = |(axis, &most): (usize, &usize)| {
        let length = port.lengths.iter().find(|l| l.axis == axis);
        length.map_or(most as i64, |l| dims[l.dim] + l.more)
    };
    let fits = shape.len() == port.shape.len()
        && port.shape.iter().enumerate().map(expected).eq(shape.iter().map(|&e| e as i64));
    if !fits {
        return Err(RunError::Shape { found: shape.to_vec(), expected: port.clone() });
    }
    // `Plan::check` made sure that the size exists.
    let expected_bytes = size_bytes(dtype, shape).unwrap_or(usize::MAX);
    match bytes {
        Some(found) if found != expected_bytes => {
            Err(RunError::Bytes { found, expected_bytes, expected: port.clone() })
        }
        Some(_) | None => Ok(()),
    }
}
