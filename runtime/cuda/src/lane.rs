//! What one run at a time takes: memory for intermediate values and ports, streams, and the
//! launches of all steps, as a graph once they were launched.

use kiln_runtime::gpu::{Ports, Spot};
use kiln_runtime::plan::{Dims, Place, Plan, PlanState};
use kiln_runtime::tensor::{TensorView, TensorViewMut};

use crate::driver::{Answer, Driver, Function, Grid};
use crate::error::CudaError;
use crate::owned::{Gpu, Owned, Piece, Pinned};

/// A kernel of the module, ready to be launched.
pub struct Kernel {
    /// Its name in the text.
    pub name: String,
    /// The driver's number.
    pub function: Function,
    /// Its threads.
    pub grid: Grid,
}

/// What lanes need to know of a model.
pub struct Program<'a> {
    /// Its plan.
    pub plan: &'a Plan,
    /// Where ports are.
    pub ports: &'a Ports,
    /// Its kernels.
    pub kernels: &'a [Kernel],
    /// The address of its constants.
    pub weights: u64,
    /// Whether launches are remembered as a graph.
    pub graphs: bool,
}

/// Ports of one run, and its launches.
struct Slot {
    /// A graph of all launches, once they were launched.
    graph: Option<Owned>,
    /// The arguments of all steps, one after the other.
    arguments: Vec<u64>,
    /// Inputs and outputs on the device.
    ports: Piece,
    bytes: usize,
    /// The same on this machine.
    pinned: Pinned,
    /// Inputs are on the device.
    given: Owned,
    /// All steps are done.
    made: Owned,
    /// Outputs are on this machine.
    fetched: Owned,
}

/// Memory and streams for one run at a time; with two slots, for one whose neighbours are copied
/// while it computes.
pub struct Lane {
    slots: Vec<Slot>,
    /// States that are kept in place.
    kept: Piece,
    kept_bytes: usize,
    /// States that stay where ports are: a run's output is the next one's input.
    resident: Vec<PlanState>,
    /// Kept for as long as launches know its address.
    _arena: Piece,
    /// Streams of copies to the device, of launches, and of copies from the device.
    streams: [Owned; 3],
    /// Last, so that all of the above is taken back before the device is closed.
    gpu: Gpu,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.settle();
    }
}

/// The address of a buffer.
fn address(place: Place, program: &Program, [ports, kept, arena]: [u64; 3]) -> u64 {
    let spot = |spot: Spot| match spot {
        Spot::Given(offset) => ports + offset as u64,
        Spot::Kept(offset) => kept + offset as u64,
    };
    match place {
        Place::Input(port) => spot(program.ports.inputs[port]),
        Place::Output(port) => spot(program.ports.outputs[port]),
        Place::Arena(offset) => arena + offset as u64,
        Place::Const(offset) => program.weights + offset as u64,
        Place::Dims => ports + program.ports.dims as u64,
    }
}

impl Lane {
    /// A lane with so many slots. States are zeros.
    pub fn new(gpu: &Gpu, program: &Program, slots: usize) -> Answer<Lane> {
        let driver = gpu.driver();
        let stream = || gpu.own(driver.stream());
        let event = || gpu.own(driver.event(false));
        let streams = [stream()?, stream()?, stream()?];
        let arena = gpu.allocate(program.plan.arena_bytes)?;
        let kept_bytes = program.ports.kept;
        let kept = gpu.allocate(kept_bytes)?;
        let mut made = Vec::with_capacity(slots);
        for _ in 0..slots {
            let ports = gpu.allocate(program.ports.bytes)?;
            let pinned = gpu.pin(program.ports.bytes)?;
            let bases = [ports.address(), kept.address(), arena.address()];
            let places = program.plan.steps.iter().flat_map(|step| &step.buffers);
            let arguments = places.map(|place| address(*place, program, bases)).collect();
            let (graph, given, made_event, fetched) = (None, event()?, event()?, event()?);
            let bytes = program.ports.bytes;
            made.push(Slot {
                graph,
                arguments,
                ports,
                bytes,
                pinned,
                given,
                made: made_event,
                fetched,
            });
        }
        let gpu = gpu.clone();
        let resident = Vec::new();
        let mut lane =
            Lane { slots: made, kept, kept_bytes, resident, _arena: arena, streams, gpu };
        lane.clear(program)?;
        Ok(lane)
    }

    fn driver(&self) -> &dyn Driver {
        &**self.gpu.driver()
    }

    /// Says which states stay where ports are.
    pub fn keep(&mut self, resident: Vec<PlanState>) {
        self.resident = resident;
    }

    /// Memory of the first slot, and where it is.
    fn piece(&self, spot: Spot, bytes: usize) -> u64 {
        let (base, at, size) = match spot {
            Spot::Kept(at) => (self.kept.address(), at, self.kept_bytes),
            Spot::Given(at) => (self.slots[0].ports.address(), at, self.slots[0].bytes),
        };
        assert!(at.checked_add(bytes).is_some_and(|end| end <= size), "inside");
        base + at as u64
    }

    /// All memory of states: addresses and bytes.
    fn states(&self, program: &Program) -> Vec<(u64, usize)> {
        let port = |state: &PlanState| {
            let bytes = program.plan.inputs[state.input].size_bytes().unwrap_or(0);
            (self.piece(program.ports.inputs[state.input], bytes), bytes)
        };
        let all = self.resident.iter().map(port);
        all.chain([(self.kept.address(), self.kept_bytes)]).filter(|piece| piece.1 > 0).collect()
    }

    /// Fills states with zeros.
    pub fn clear(&mut self, program: &Program) -> Answer<()> {
        let (stream, states) = (self.streams[1].get(), self.states(program));
        for &(address, bytes) in &states {
            // SAFETY: the memory is of the lane, and it is waited for.
            unsafe { self.driver().clear(address, bytes, stream)? };
        }
        if states.is_empty() { Ok(()) } else { self.computed() }
    }

    /// Waits for launches, and copies between them.
    fn computed(&self) -> Answer<()> {
        // SAFETY: the stream is of the lane.
        unsafe { self.driver().synchronize(self.streams[1].get()) }
    }

    /// Copies bytes of a state from this machine.
    pub fn set(&mut self, spot: Spot, bytes: &[u8]) -> Answer<()> {
        self.computed()?;
        // SAFETY: the bytes are inside, and nothing is under way.
        unsafe { self.driver().upload_now(self.piece(spot, bytes.len()), bytes) }
    }

    /// Copies bytes of a state to this machine.
    pub fn get(&self, spot: Spot, bytes: &mut [u8]) -> Answer<()> {
        self.computed()?;
        // SAFETY: the bytes are inside, and nothing is under way.
        unsafe { self.driver().download_now(bytes, self.piece(spot, bytes.len())) }
    }

    /// Makes the states those of another lane of the same model.
    pub fn copy(&mut self, other: &Lane, program: &Program) -> Answer<()> {
        let stream = self.streams[1].get();
        let pairs: Vec<_> = self.states(program).into_iter().zip(other.states(program)).collect();
        if pairs.is_empty() {
            return Ok(());
        }
        other.computed()?;
        for ((to, bytes), (from, _)) in pairs {
            // SAFETY: both memories are as long, and runs of both lanes are waited for.
            unsafe { self.driver().copy(to, from, bytes, stream)? };
        }
        self.computed()
    }

    /// Makes outputs of a run that was taken the inputs of the next one, where these are states
    /// that stay where ports are.
    pub fn carry(&mut self, program: &Program) -> Answer<()> {
        for state in &self.resident {
            let bytes = program.plan.inputs[state.input].size_bytes().unwrap_or(0);
            let [to, from] =
                [program.ports.inputs[state.input], program.ports.outputs[state.output]]
                    .map(|spot| self.piece(spot, bytes));
            if bytes > 0 {
                // SAFETY: input and output are of the lane, as long, and apart. What is launched
                // next waits for the copy.
                unsafe { self.driver().copy(to, from, bytes, self.streams[1].get())? };
            }
        }
        Ok(())
    }

    /// Waits for all that is under way. Nothing of a lane is taken back or written while it is in
    /// use; a stream that fails does nothing any more.
    fn settle(&self) {
        for stream in &self.streams {
            // SAFETY: the stream is one of the lane.
            let _ = unsafe { self.driver().synchronize(stream.get()) };
        }
    }

    /// Begins a run in a slot, whose run before was taken: inputs, which were checked, launches,
    /// and outputs as long as dims say.
    pub fn begin(
        &mut self,
        program: &Program,
        slot: usize,
        inputs: &[TensorView<'_>],
        dims: &Dims,
    ) -> Result<(), CudaError> {
        self.around(program, slot, (inputs, dims), |lane| lane.compute(program, slot))
    }

    /// Copies inputs, does what computes, and copies outputs.
    fn around<T>(
        &mut self,
        program: &Program,
        slot: usize,
        (inputs, dims): (&[TensorView<'_>], &Dims),
        compute: impl FnOnce(&mut Lane) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        let copying = |fault| CudaError::Driver { what: "copying tensors", fault };
        let given = self.give(program, slot, inputs, dims).map_err(copying);
        let done = given.and_then(|()| compute(self)).and_then(|done| {
            self.fetch(program, slot, dims).map_err(copying)?;
            Ok(done)
        });
        if done.is_err() {
            self.settle();
        }
        done
    }

    /// Puts inputs into a slot.
    fn give(
        &mut self,
        program: &Program,
        slot: usize,
        inputs: &[TensorView<'_>],
        dims: &Dims,
    ) -> Answer<()> {
        let stream = self.streams[0].get();
        let Slot { ports, pinned, given, .. } = &mut self.slots[slot];
        let driver = self.gpu.driver();
        let base = ports.address();
        let lengths: Vec<u8> = dims.iter().flat_map(|length| length.to_le_bytes()).collect();
        let places =
            program.ports.inputs.iter().zip(inputs).filter_map(|(spot, view)| match spot {
                Spot::Given(at) => Some((*at, view.bytes)),
                Spot::Kept(_) => None,
            });
        let lengths = (!program.plan.dims.is_empty()).then_some((program.ports.dims, &lengths[..]));
        for (at, bytes) in places.chain(lengths).filter(|(_, bytes)| !bytes.is_empty()) {
            // SAFETY: the plan gives the port that many bytes there, on both sides. The run before
            // in this slot was fetched, so nothing reads them.
            unsafe {
                pinned.write(at, bytes);
                let from = pinned.pointer().wrapping_add(at);
                driver.upload(base + at as u64, from, bytes.len(), stream)?;
            }
        }
        // SAFETY: event and stream are of the lane.
        unsafe { driver.record(given.get(), stream) }
    }

    /// Launches all steps on a slot's inputs.
    fn compute(&mut self, program: &Program, slot: usize) -> Result<(), CudaError> {
        self.capture(program, slot)?;
        self.bracket(slot, || self.go(program, slot))
    }

    /// Launches all steps of a slot, at once where they are remembered.
    fn go(&self, program: &Program, slot: usize) -> Result<(), CudaError> {
        match &self.slots[slot].graph {
            // SAFETY: the graph's launches name memory of the lane and of the model.
            Some(graph) => unsafe { self.driver().replay(graph.get(), self.streams[1].get()) }
                .map_err(|fault| CudaError::Driver { what: "running the model", fault }),
            None => self.launch(program, slot, &mut |_| Ok(())),
        }
    }

    /// Remembers the launches of a slot, where they are to be and are not.
    fn capture(&mut self, program: &Program, slot: usize) -> Result<(), CudaError> {
        if !program.graphs || self.slots[slot].graph.is_some() || program.plan.steps.is_empty() {
            return Ok(());
        }
        let stream = self.streams[1].get();
        let failed = |fault| CudaError::Driver { what: "making a graph of launches", fault };
        // SAFETY: the stream is of the lane; a capture that begins is ended.
        let (launched, graph) = unsafe {
            self.driver().begin_capture(stream).map_err(failed)?;
            let launched = self.launch(program, slot, &mut |_| Ok(()));
            (launched, self.gpu.own(self.driver().end_capture(stream)))
        };
        launched?;
        self.slots[slot].graph = Some(graph.map_err(failed)?);
        Ok(())
    }

    /// Launches the steps, one by one; `after` is called after each.
    fn launch(
        &self,
        program: &Program,
        slot: usize,
        after: &mut dyn FnMut(usize) -> Answer<()>,
    ) -> Result<(), CudaError> {
        let stream = self.streams[1].get();
        let mut rest = &self.slots[slot].arguments[..];
        for (number, step) in program.plan.steps.iter().enumerate() {
            let kernel = &program.kernels[step.kernel];
            let (arguments, others) = rest.split_at(step.buffers.len());
            rest = others;
            // SAFETY: the plan gives each buffer the bytes that the kernel's loops were checked
            // for; all memory lives as long as the lane and the model.
            let launched =
                unsafe { self.driver().launch(kernel.function, kernel.grid, arguments, stream) };
            launched.and_then(|()| after(number)).map_err(|fault| CudaError::Step {
                step: step.name.clone(),
                kernel: kernel.name.clone(),
                fault,
            })?;
        }
        Ok(())
    }

    /// As [`begin`](Self::begin), but waits after each step, so that the one that fails is known.
    pub fn stepwise(
        &mut self,
        program: &Program,
        slot: usize,
        inputs: &[TensorView<'_>],
        dims: &Dims,
    ) -> Result<(), CudaError> {
        self.around(program, slot, (inputs, dims), |lane| {
            let stream = lane.streams[1].get();
            // SAFETY: the stream is of the lane.
            let wait = &mut |_| unsafe { lane.driver().synchronize(stream) };
            lane.bracket(slot, || lane.launch(program, slot, wait))
        })
    }

    /// As [`begin`](Self::begin), step by step; gives the nanoseconds from the begin of the first
    /// step to the end of each.
    pub fn timed(
        &mut self,
        program: &Program,
        slot: usize,
        inputs: &[TensorView<'_>],
        dims: &Dims,
    ) -> Result<Vec<u64>, CudaError> {
        let timing = |fault| CudaError::Driver { what: "timing the model", fault };
        let count = program.plan.steps.len() + 1;
        let events = (0..count).map(|_| self.gpu.own(self.driver().event(true)));
        let events = events.collect::<Answer<Vec<Owned>>>().map_err(timing)?;
        self.around(program, slot, (inputs, dims), |lane| {
            let stream = lane.streams[1].get();
            // SAFETY: events and streams are of the lane, and of this function.
            let record =
                |number: usize| unsafe { lane.driver().record(events[number].get(), stream) };
            lane.bracket(slot, || {
                record(0).map_err(timing)?;
                lane.launch(program, slot, &mut |number| record(number + 1))
            })?;
            // SAFETY: as above.
            unsafe { lane.driver().synchronize(stream) }.map_err(timing)
        })?;
        // SAFETY: the events were reached, as the stream was waited for.
        let end = |event: &Owned| unsafe {
            let ms = self.driver().elapsed(events[0].get(), event.get()).map_err(timing)?;
            Ok((f64::from(ms) * 1e6) as u64)
        };
        events[1..].iter().map(end).collect()
    }

    /// As [`begin`](Self::begin), with all steps so many times over; gives the nanoseconds of one
    /// time, from the begin of the first.
    pub fn repeated(
        &mut self,
        program: &Program,
        slot: usize,
        (inputs, dims): (&[TensorView<'_>], &Dims),
        count: u32,
    ) -> Result<u64, CudaError> {
        let timing = |fault| CudaError::Driver { what: "timing the model", fault };
        let event = || self.gpu.own(self.driver().event(true)).map_err(timing);
        let (begin, end) = (event()?, event()?);
        self.around(program, slot, (inputs, dims), |lane| {
            lane.capture(program, slot)?;
            let stream = lane.streams[1].get();
            // SAFETY: events and streams are of the lane, and of this function.
            let record = |event: &Owned| {
                unsafe { lane.driver().record(event.get(), stream) }.map_err(timing)
            };
            lane.bracket(slot, || {
                record(&begin)?;
                (0..count).try_for_each(|_| lane.go(program, slot))?;
                record(&end)
            })?;
            // SAFETY: as above.
            unsafe { lane.driver().synchronize(stream) }.map_err(timing)
        })?;
        // SAFETY: the events were reached, as the stream was waited for.
        let ms = unsafe { self.driver().elapsed(begin.get(), end.get()) }.map_err(timing)?;
        Ok((f64::from(ms) * 1e6 / f64::from(count.max(1))) as u64)
    }

    /// Has launches wait for inputs, and says when they are done.
    fn bracket(
        &self,
        slot: usize,
        launches: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let failed = |fault| CudaError::Driver { what: "running the model", fault };
        let (slot, stream) = (&self.slots[slot], self.streams[1].get());
        // SAFETY: events and streams are of the lane.
        unsafe { self.driver().wait(slot.given.get(), stream) }.map_err(failed)?;
        launches()?;
        // SAFETY: as above.
        unsafe { self.driver().record(slot.made.get(), stream) }.map_err(failed)
    }

    /// Copies the outputs of a slot once they are made.
    fn fetch(&mut self, program: &Program, slot: usize, dims: &Dims) -> Answer<()> {
        let stream = self.streams[2].get();
        let Slot { ports, pinned, made, fetched, .. } = &self.slots[slot];
        let driver = self.driver();
        // SAFETY: the plan gives the port that many bytes there, on both sides; nobody reads them
        // before the event is reached.
        unsafe {
            driver.wait(made.get(), stream)?;
            let outputs = program.ports.outputs.iter().zip(&program.plan.outputs).enumerate();
            for (number, (spot, port)) in outputs {
                let Spot::Given(at) = *spot else { continue };
                if self.resident.iter().any(|state| state.output == number) {
                    continue;
                }
                let shape = port.shape_for(dims);
                let bytes = kiln_runtime::tensor::size_bytes(port.dtype, &shape).unwrap_or(0);
                if bytes > 0 {
                    let to = pinned.pointer().wrapping_add(at);
                    driver.download(to, ports.address() + at as u64, bytes, stream)?;
                }
            }
            driver.record(fetched.get(), stream)
        }
    }

    /// Waits for the outputs of a slot, and copies them to tensors, which were checked.
    pub fn take(
        &mut self,
        program: &Program,
        slot: usize,
        outputs: &mut [TensorViewMut<'_>],
    ) -> Answer<()> {
        let Slot { pinned, fetched, .. } = &self.slots[slot];
        // SAFETY: the event is of the lane.
        unsafe { self.driver().reach(fetched.get()) }?;
        for (spot, output) in program.ports.outputs.iter().zip(outputs) {
            if let Spot::Given(at) = *spot {
                // SAFETY: the copy that wrote them is done.
                let bytes = unsafe { pinned.read(at, output.bytes.len()) };
                output.bytes.copy_from_slice(bytes);
            }
        }
        Ok(())
    }
}
