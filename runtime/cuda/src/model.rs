//! A compiled model on a device: its kernels and weights, once for all that run it, and the memory
//! that runs take.

use std::ffi::CString;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kiln_runtime::given::{check, run_named};
use kiln_runtime::gpu::{DeviceMemory, GpuArtifact, Module, Ports};
use kiln_runtime::plan::{Plan, Port};
use kiln_runtime::session::RunError;
use kiln_runtime::tensor::{Tensor, TensorView, TensorViewMut};

use crate::driver::{Fault, FaultKind, Footprint, Grid};
use crate::error::CudaError;
use crate::lane::{Kernel, Lane, Program};
use crate::owned::{Gpu, Owned, Piece};
use crate::session::{CudaSession, plan_of_sessions, resident};
use crate::stream::CudaStream;

/// When device memory is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MemoryPolicy {
    /// All that one run takes, when the model is loaded, and no more.
    Preallocate,
    /// What a run takes, when there are more runs at once than before.
    #[default]
    Grow,
    /// The same up to so many bytes: runs wait for one another, and what never fits is refused
    /// before anything is asked for.
    Limit(u64),
}

/// How a model is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// When device memory is asked for.
    pub memory: MemoryPolicy,
    /// Whether the launches of a run are remembered as a graph, which the device takes at once.
    pub graphs: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { memory: MemoryPolicy::default(), graphs: true }
    }
}

/// A compiled model on a device; clones share it. Everything is given back to the driver when the
/// last clone, session and stream is dropped.
#[derive(Clone)]
pub struct CudaModel(Arc<Shared>);

struct Shared {
    lanes: Mutex<Lanes>,
    /// A lane came back.
    back: Condvar,
    plan: Plan,
    session_plan: Arc<Plan>,
    ports: Ports,
    memory: DeviceMemory,
    options: Options,
    kernels: Vec<Kernel>,
    weights: Piece,
    /// Kept for as long as its kernels are launched.
    _module: Owned,
    sm: u32,
    gpu: Gpu,
}

/// Lanes and what they take.
#[derive(Default)]
struct Lanes {
    /// Those that nobody uses; all have one slot.
    free: Vec<Lane>,
    /// Bytes of all lanes.
    bytes: u64,
    /// How many are lent to runs, which come back soon.
    running: usize,
}

impl CudaModel {
    /// Brings a model to a device.
    ///
    /// # Safety
    /// The text does what the plan says: each kernel reads and writes only the buffers of its
    /// steps, inside the sizes of ports, arena and constants.
    ///
    /// # Errors
    /// When the device cannot run the model's kernels, or has no memory for it.
    pub unsafe fn new(
        gpu: &Gpu,
        artifact: &GpuArtifact,
        options: Options,
    ) -> Result<CudaModel, CudaError> {
        let module = suited(gpu, artifact)?;
        let plan = &artifact.plan;
        let checked = plan.check(module.kernels.len(), artifact.constants.len());
        checked.map_err(|error| CudaError::Artifact(error.to_string()))?;
        let memory = artifact.memory();
        within(options.memory, memory)?;
        let (owned, kernels) = load(gpu, artifact, module)?;
        let weights = gpu.allocate(artifact.constants.len());
        let weights =
            weights.map_err(|fault| missing(gpu, "weights", memory.weights, memory, fault))?;
        if !artifact.constants.is_empty() {
            // SAFETY: the memory is as long as the constants.
            unsafe { gpu.driver().upload_now(weights.address(), artifact.constants.bytes()) }
                .map_err(|fault| CudaError::Driver { what: "copying the weights", fault })?;
        }
        let model = CudaModel(Arc::new(Shared {
            lanes: Mutex::default(),
            back: Condvar::new(),
            ports: Ports::of(plan),
            plan: plan.clone(),
            session_plan: Arc::new(plan_of_sessions(plan)),
            memory,
            options,
            kernels,
            weights,
            _module: owned,
            sm: module.sm,
            gpu: gpu.clone(),
        }));
        if options.memory == MemoryPolicy::Preallocate {
            let lane = model.make(&mut model.lanes(), 1)?;
            model.lanes().free.push(lane);
        }
        Ok(model)
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
        &self.0.plan
    }

    /// The plan as sessions see it.
    pub(crate) fn session_plan(&self) -> &Arc<Plan> {
        &self.0.session_plan
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// The version of the instruction set that the kernels are for.
    pub fn sm(&self) -> u32 {
        self.0.sm
    }

    /// The device memory that it takes.
    pub fn memory(&self) -> DeviceMemory {
        self.0.memory
    }

    /// The device memory that is taken now.
    pub fn taken(&self) -> u64 {
        self.0.memory.weights + self.lanes().bytes
    }

    /// The names of the kernels, and what the driver made of them.
    ///
    /// # Errors
    /// What the driver says.
    pub fn footprints<'a>(&'a self) -> Result<Vec<(&'a str, Footprint)>, CudaError> {
        let what = "asking what became of a kernel";
        let of = |kernel: &'a Kernel| {
            let footprint = self.0.gpu.driver().footprint(kernel.function);
            let footprint = footprint.map_err(|fault| CudaError::Driver { what, fault })?;
            Ok((kernel.name.as_str(), footprint))
        };
        self.0.kernels.iter().map(of).collect()
    }

    /// Runs the model on tensors given by name, in any order.
    ///
    /// # Errors
    /// When a tensor is missing, unknown or does not fit, there is no memory, or the device fails.
    pub fn run(
        &self,
        inputs: &[(&str, TensorView<'_>)],
    ) -> Result<Vec<(String, Tensor)>, CudaError> {
        let plan = self.plan();
        let made = run_named(plan, inputs, |views, outputs| self.run_into(views, outputs))?;
        let name = |(port, tensor): (usize, Tensor)| (plan.outputs[port].name.clone(), tensor);
        Ok(made.into_iter().map(name).collect())
    }

    /// Runs the model on tensors in the order of [`inputs`](Self::inputs) and
    /// [`outputs`](Self::outputs).
    ///
    /// # Errors
    /// As [`run`](Self::run), and where the model was compiled to keep a state in place: sessions
    /// run it.
    pub fn run_into(
        &self,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
    ) -> Result<(), CudaError> {
        let plan = self.plan();
        if let Some(state) = plan.states.iter().find(|state| state.in_place) {
            let (input, output) =
                (&plan.inputs[state.input].name, &plan.outputs[state.output].name);
            let why = "it is kept where it lies, which takes a session".into();
            return Err(
                RunError::State { input: input.clone(), output: output.clone(), why }.into()
            );
        }
        let dims = check(plan, inputs, outputs)?;
        let mut lane = self.borrow()?;
        let ran = self.once(&mut lane, &dims, inputs, outputs);
        let mut lanes = self.lanes();
        lanes.running -= 1;
        match ran.is_ok() {
            true => lanes.free.push(lane),
            // What is under way in a lane that failed is not known.
            false => lanes.bytes -= self.0.memory.lane(1),
        }
        self.0.back.notify_one();
        ran
    }

    /// One run in the first slot of a lane.
    pub(crate) fn once(
        &self,
        lane: &mut Lane,
        dims: &kiln_runtime::plan::Dims,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
    ) -> Result<(), CudaError> {
        let program = self.program();
        lane.begin(&program, 0, inputs, dims)?;
        lane.take(&program, 0, outputs).map_err(running)
    }

    /// A session: the same model with memory of its own. It keeps the states that the model was
    /// compiled with.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn session(&self) -> Result<CudaSession, CudaError> {
        let mut lanes = self.lanes();
        let free = lanes.free.pop();
        let mut lane = match free {
            Some(lane) => lane,
            None => self.make(&mut lanes, 1)?,
        };
        drop(lanes);
        lane.keep(resident(self.plan()).collect());
        if let Err(fault) = lane.clear(&self.program()) {
            self.give_back(lane, 1);
            return Err(CudaError::Driver { what: "clearing states", fault });
        }
        Ok(CudaSession::new(self.clone(), lane))
    }

    /// A pipeline: while one run computes, the inputs of the next one and the outputs of the one
    /// before are copied.
    ///
    /// # Errors
    /// When there is no memory for it, or the model keeps states.
    pub fn stream(&self) -> Result<CudaStream, CudaError> {
        if let Some(state) = self.plan().states.first() {
            let input = self.plan().inputs[state.input].name.clone();
            let output = self.plan().outputs[state.output].name.clone();
            let why = "a run waits for the one before, so nothing overlaps: use a session".into();
            return Err(RunError::State { input, output, why }.into());
        }
        let lane = self.make(&mut self.lanes(), CudaStream::SLOTS)?;
        Ok(CudaStream::new(self.clone(), lane))
    }

    /// What lanes need to know.
    pub(crate) fn program(&self) -> Program<'_> {
        let Shared { plan, ports, kernels, weights, options, .. } = &*self.0;
        let (weights, graphs) = (weights.address(), options.graphs);
        Program { plan, ports, kernels, weights, graphs }
    }

    /// Takes a lane back that a session or stream had.
    pub(crate) fn give_back(&self, mut lane: Lane, slots: usize) {
        lane.keep(Vec::new());
        let mut lanes = self.lanes();
        match self.0.options.memory {
            MemoryPolicy::Preallocate if slots == 1 => lanes.free.push(lane),
            MemoryPolicy::Preallocate | MemoryPolicy::Grow | MemoryPolicy::Limit(_) => {
                lanes.bytes -= self.0.memory.lane(slots as u64);
                drop(lane);
            }
        }
        self.0.back.notify_one();
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.0.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A lane for a run; waits for one where there may be no more.
    fn borrow(&self) -> Result<Lane, CudaError> {
        let mut lanes = self.lanes();
        loop {
            let lane = match lanes.free.pop() {
                Some(lane) => Ok(lane),
                None => self.make(&mut lanes, 1),
            };
            match lane {
                Ok(lane) => {
                    lanes.running += 1;
                    return Ok(lane);
                }
                Err(CudaError::Limit { .. } | CudaError::Memory { .. }) if lanes.running > 0 => {
                    lanes = self.0.back.wait(lanes).unwrap_or_else(PoisonError::into_inner);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A new lane, where the policy allows one more.
    fn make(&self, lanes: &mut Lanes, slots: usize) -> Result<Lane, CudaError> {
        let Shared { gpu, memory, options, .. } = &*self.0;
        let bytes = memory.lane(slots as u64);
        let needed = memory.weights.saturating_add(lanes.bytes).saturating_add(bytes);
        let limit = match options.memory {
            MemoryPolicy::Preallocate => memory.total(),
            MemoryPolicy::Grow => u64::MAX,
            MemoryPolicy::Limit(limit) => limit,
        };
        if needed > limit {
            return Err(CudaError::Limit { needed, limit, memory: *memory });
        }
        let lane = Lane::new(gpu, &self.program(), slots)
            .map_err(|fault| missing(gpu, "a run", bytes, *memory, fault))?;
        lanes.bytes += bytes;
        Ok(lane)
    }
}

/// What the driver makes of the kernels of a model on a device, in the order of its plan; nothing
/// is run.
///
/// # Errors
/// When the device cannot run the kernels, or the driver does not take them.
pub fn footprints(gpu: &Gpu, artifact: &GpuArtifact) -> Result<Vec<Footprint>, CudaError> {
    let (_module, kernels) = load(gpu, artifact, suited(gpu, artifact)?)?;
    let what = "asking what became of a kernel";
    let ask = |kernel: &Kernel| gpu.driver().footprint(kernel.function);
    let footprints = kernels.iter().map(ask).collect::<Result<Vec<Footprint>, Fault>>();
    footprints.map_err(|fault| CudaError::Driver { what, fault })
}

/// The kernels that suit a device best.
fn suited<'a>(gpu: &Gpu, artifact: &'a GpuArtifact) -> Result<&'a Module, CudaError> {
    let device = gpu.device();
    artifact.module(device.sm).ok_or_else(|| CudaError::Architecture {
        device: device.clone(),
        made_for: artifact.modules.iter().map(|module| module.sm).collect(),
    })
}

pub(crate) fn running(fault: Fault) -> CudaError {
    CudaError::Driver { what: "running the model", fault }
}

/// Whether a policy allows a run at all.
fn within(policy: MemoryPolicy, memory: DeviceMemory) -> Result<(), CudaError> {
    let needed = memory.total();
    match policy {
        MemoryPolicy::Limit(limit) if needed > limit => {
            Err(CudaError::Limit { needed, limit, memory })
        }
        MemoryPolicy::Limit(_) | MemoryPolicy::Preallocate | MemoryPolicy::Grow => Ok(()),
    }
}

/// Why memory is missing, or another failure of asking for it.
fn missing(
    gpu: &Gpu,
    what: &'static str,
    needed: u64,
    memory: DeviceMemory,
    fault: Fault,
) -> CudaError {
    if fault.kind != FaultKind::Memory {
        return CudaError::Driver { what: "asking for device memory", fault };
    }
    let (free, all) = gpu.driver().memory().unwrap_or((0, gpu.device().memory));
    CudaError::Memory { what, needed, free, all, memory, fault }
}

/// Assembles a module and finds its kernels.
fn load(
    gpu: &Gpu,
    artifact: &GpuArtifact,
    module: &Module,
) -> Result<(Owned, Vec<Kernel>), CudaError> {
    let (sm, driver) = (module.sm, gpu.driver());
    let text = artifact.text(module);
    let text = text.ok_or_else(|| CudaError::Artifact("its text is not there".into()))?;
    let failed = |fault: Fault| match fault.kind {
        FaultKind::Memory => {
            missing(gpu, "kernels", text.count_bytes() as u64, artifact.memory(), fault)
        }
        FaultKind::Assembly | FaultKind::Broken | FaultKind::Other => {
            CudaError::Assembly { sm, fault }
        }
    };
    let owned = gpu.own(driver.load(text)).map_err(failed)?;
    let kernel = |kernel: &kiln_runtime::gpu::Kernel| {
        let name = CString::new(kernel.name.as_str());
        let name = name.map_err(|_| CudaError::Artifact("the name of a kernel".into()))?;
        let function = driver.function(owned.get(), &name);
        let function = function.map_err(|fault| CudaError::Assembly { sm, fault })?;
        let grid = Grid { blocks: kernel.blocks, threads: kernel.threads };
        Ok(Kernel { name: kernel.name.clone(), function, grid })
    };
    let kernels = module.kernels.iter().map(kernel).collect::<Result<Vec<Kernel>, CudaError>>()?;
    Ok((owned, kernels))
}
