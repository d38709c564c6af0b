//! The order in which kernels run and the places that they read and write.

use crate::tensor::{DType, size_bytes};
use crate::work::{Term, Work};
use serde::{Deserialize, Serialize};
use std::fmt;

/// An input or output of a model.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Port {
    /// The name in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first; the most that they may be where `lengths` has the axis.
    pub shape: Vec<usize>,
    /// Axes whose extents a run decides.
    pub lengths: Vec<Length>,
}

/// An axis that is as long as a dim of the model and some more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Length {
    /// The axis.
    pub axis: usize,
    /// Index of the dim in [`Plan::dims`].
    pub dim: usize,
    /// How many more elements.
    pub more: i64,
}

/// A dim of the model whose extent a run decides.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlanDim {
    /// Its name in the model.
    pub name: String,
    /// The least that it may be.
    pub least: usize,
    /// The most that it may be.
    pub most: usize,
}

/// An output that the next run reads as an input.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlanState {
    /// Index of the input.
    pub input: usize,
    /// Index of the output.
    pub output: usize,
    /// Whether both are the same memory, which a run appends to. It has room for the whole shape of
    /// the port, with strides of that shape, however long its dims are.
    pub in_place: bool,
}

/// Dims that a plan may have.
pub const DIMS: usize = 16;

/// Lengths of all dims of a plan, in order; 0 where there are fewer.
pub type Dims = [i64; DIMS];

impl Port {
    /// A port whose extents are numbers.
    pub fn new(name: impl Into<String>, dtype: DType, shape: &[usize]) -> Port {
        Port { name: name.into(), dtype, shape: shape.to_vec(), lengths: Vec::new() }
    }

    /// Whether a tensor of that shape may do, as far as can be told without the lengths of dims.
    pub fn admits(&self, shape: &[usize]) -> bool {
        let admits = |(axis, (&found, &most)): (usize, (&usize, &usize))| {
            found == most || found < most && self.lengths.iter().any(|l| l.axis == axis)
        };
        shape.len() == self.shape.len() && shape.iter().zip(&self.shape).enumerate().all(admits)
    }

    /// The extents in a run, where the dims have these lengths.
    pub fn shape_for(&self, dims: &Dims) -> Vec<usize> {
        let mut shape = self.shape.clone();
        for Length { axis, dim, more } in &self.lengths {
            shape[*axis] = usize::try_from(dims[*dim] + more).unwrap_or(0);
        }
        shape
    }

    /// Bytes of the tensor, or `None` where the product overflows.
    pub fn size_bytes(&self) -> Option<usize> {
        size_bytes(self.dtype, &self.shape)
    }
}

/// Where a buffer of a kernel lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Place {
    /// The tensor given for the input of that index; at any address.
    Input(usize),
    /// The tensor given for the output of that index; at any address.
    Output(usize),
    /// A byte offset in the arena, which starts on a cache line.
    Arena(usize),
    /// A byte offset in the constants, which start on a cache line.
    Const(usize),
    /// The lengths of the dims in this run.
    Dims,
}

/// One launch of one kernel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Step {
    /// What the kernel computes, made of names of the model.
    pub name: String,
    /// Index of the kernel's entry in the code.
    pub kernel: usize,
    /// Index of what it does, alone or with other steps, in [`Plan::work`].
    pub work: usize,
    /// What the kernel's first argument points to, in its order.
    pub buffers: Vec<Place>,
    /// Number of independent iterations of the outermost loop.
    pub extent: i64,
    /// How many pieces these are cut into; with one or less they run on the caller's thread.
    pub chunks: i64,
}

impl Step {
    /// The iterations of one chunk: they cover `0..extent` in order and differ by one at most.
    pub fn chunk(&self, index: i64) -> (i64, i64) {
        (self.extent * index / self.chunks, self.extent * (index + 1) / self.chunks)
    }
}

/// Everything about a compiled model but its code and its constants.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, Default)]
pub struct Plan {
    /// Dims whose lengths a run decides, at most [`DIMS`].
    pub dims: Vec<PlanDim>,
    /// What a run reads.
    pub inputs: Vec<Port>,
    /// What a run writes.
    pub outputs: Vec<Port>,
    /// Outputs that the next run reads as inputs.
    pub states: Vec<PlanState>,
    /// Launches in order.
    pub steps: Vec<Step>,
    /// What steps do, in the order of the first step of each.
    pub work: Vec<Work>,
    /// Bytes of memory for intermediate values.
    pub arena_bytes: usize,
}

impl Plan {
    /// Bytes that the plan itself takes, about.
    pub fn own_bytes(&self) -> usize {
        let port = |port: &Port| size_of::<Port>() + port.name.len() + 8 * port.shape.len();
        let step = |step: &Step| {
            size_of::<Step>() + step.name.len() + size_of::<Place>() * step.buffers.len()
        };
        let work = |work: &Work| {
            let terms = work.flops.iter().chain(&work.bytes);
            let terms = terms.map(|term| size_of::<Term>() + 16 * term.lengths.len());
            size_of::<Work>() + work.name.len() + terms.sum::<usize>()
        };
        let ports = self.inputs.iter().chain(&self.outputs).map(port);
        let steps = self.steps.iter().map(step).chain(self.work.iter().map(work));
        ports.chain(steps).sum()
    }
}

/// A plan that does not fit the code and the constants beside it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// A step names a kernel that the code does not have.
    #[error("step {step} runs kernel {kernel}, but the code has {entries} entries")]
    Kernel {
        /// Index of the step.
        step: usize,
        /// Index of the kernel.
        kernel: usize,
        /// Number of entries.
        entries: usize,
    },
    /// A step does what is not there.
    #[error("step {step} does work {work}, but the plan has {works}")]
    Work {
        /// Index of the step.
        step: usize,
        /// Index of the work.
        work: usize,
        /// How much there is.
        works: usize,
    },
    /// A step names a place that does not exist.
    #[error("step {step} uses {place}, which lies outside (there are {limit})")]
    Place {
        /// Index of the step.
        step: usize,
        /// The place.
        place: Place,
        /// How many ports or bytes there are.
        limit: usize,
    },
    /// A step's number of iterations is negative, or too large to be cut.
    #[error("step {step} cannot cut {extent} iterations in {chunks} chunks")]
    Extent {
        /// Index of the step.
        step: usize,
        /// Iterations.
        extent: i64,
        /// Chunks.
        chunks: i64,
    },
    /// The size of an input or output overflows.
    #[error("the size of `{0}` overflows")]
    Size(String),
    /// A state of ports that are not there, or that cannot share memory.
    #[error("state {0} pairs ports that do not fit together")]
    State(usize),
    /// An axis is as long as a dim that is not there, or the axis is not.
    #[error("the extents of `{0}` depend on what is not there")]
    Length(String),
}

impl Plan {
    /// Whether an input is memory of a state that is appended to where it lies.
    pub fn is_input_kept(&self, input: usize) -> bool {
        self.states.iter().any(|state| state.in_place && state.input == input)
    }

    /// The same for an output.
    pub fn is_output_kept(&self, output: usize) -> bool {
        self.states.iter().any(|state| state.in_place && state.output == output)
    }

    /// The inputs as a run with the longest dims takes them: room that states have beyond is left.
    pub fn longest_inputs(&self) -> Vec<Port> {
        let mut dims = [0; DIMS];
        for (length, dim) in dims.iter_mut().zip(&self.dims) {
            *length = i64::try_from(dim.most).unwrap_or(i64::MAX);
        }
        let longest = |port: &Port| Port { shape: port.shape_for(&dims), ..port.clone() };
        self.inputs.iter().map(longest).collect()
    }

    /// Checks every index and size of the plan against the code and the constants beside it.
    pub fn check(&self, entries: usize, constant_bytes: usize) -> Result<(), PlanError> {
        for port in self.inputs.iter().chain(&self.outputs) {
            port.size_bytes().ok_or_else(|| PlanError::Size(port.name.clone()))?;
            let fits = |l: &Length| {
                let most = |dim: &PlanDim| i128::try_from(dim.most).unwrap_or(i128::MAX);
                let dim = self.dims.get(l.dim).map(|d| most(d) + i128::from(l.more));
                let room = port.shape.get(l.axis).map(|&extent| extent as i128);
                dim.zip(room).is_some_and(|(most, room)| most <= room)
            };
            if self.dims.len() > DIMS || !port.lengths.iter().all(fits) {
                return Err(PlanError::Length(port.name.clone()));
            }
        }
        for (index, state) in self.states.iter().enumerate() {
            let ports = self.inputs.get(state.input).zip(self.outputs.get(state.output));
            let fit = |(take, give): (&Port, &Port)| {
                take.dtype == give.dtype && (!state.in_place || take.shape == give.shape)
            };
            let again =
                |other: &PlanState| other.input == state.input || other.output == state.output;
            if !ports.is_some_and(fit) || self.states[..index].iter().any(again) {
                return Err(PlanError::State(index));
            }
        }
        for (index, step) in self.steps.iter().enumerate() {
            self.check_step(index, step, entries, constant_bytes)?;
        }
        Ok(())
    }

    fn check_step(
        &self,
        index: usize,
        step: &Step,
        entries: usize,
        constant_bytes: usize,
    ) -> Result<(), PlanError> {
        if step.kernel >= entries {
            return Err(PlanError::Kernel { step: index, kernel: step.kernel, entries });
        }
        if step.work >= self.work.len() {
            let (work, works) = (step.work, self.work.len());
            return Err(PlanError::Work { step: index, work, works });
        }
        let (extent, chunks) = (step.extent, step.chunks);
        if extent < 0 || chunks < 0 || extent.checked_mul(chunks).is_none() {
            return Err(PlanError::Extent { step: index, extent, chunks });
        }
        for &place in &step.buffers {
            // An empty buffer may sit at the very end of its memory, a port may not.
            let (inside, limit) = match place {
                Place::Input(port) => (port < self.inputs.len(), self.inputs.len()),
                Place::Output(port) => (port < self.outputs.len(), self.outputs.len()),
                Place::Arena(offset) => (offset <= self.arena_bytes, self.arena_bytes),
                Place::Const(offset) => (offset <= constant_bytes, constant_bytes),
                Place::Dims => (true, DIMS),
            };
            if !inside {
                return Err(PlanError::Place { step: index, place, limit });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}[", self.name, self.dtype)?;
        for (axis, extent) in self.shape.iter().enumerate() {
            let up_to = if self.lengths.iter().any(|l| l.axis == axis) { "<=" } else { "" };
            write!(f, "{}{up_to}{extent}", if axis == 0 { "" } else { "," })?;
        }
        f.write_str("]")
    }
}

impl fmt::Display for PlanDim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} to {}", self.name, self.least, self.most)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Input(port) => write!(f, "input {port}"),
            Place::Output(port) => write!(f, "output {port}"),
            Place::Arena(offset) => write!(f, "arena+{offset}"),
            Place::Const(offset) => write!(f, "const+{offset}"),
            Place::Dims => f.write_str("dims"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = kernel {}(", self.name, self.kernel)?;
        for (argument, place) in self.buffers.iter().enumerate() {
            write!(f, "{}{place}", if argument == 0 { "" } else { ", " })?;
        }
        write!(f, ") over {} in {}", self.extent, self.chunks)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, dim) in self.dims.iter().enumerate() {
            writeln!(f, "dim {index} {dim}")?;
        }
        for (index, port) in self.inputs.iter().enumerate() {
            writeln!(f, "input {index} {port}")?;
        }
        for (index, port) in self.outputs.iter().enumerate() {
            writeln!(f, "output {index} {port}")?;
        }
        for PlanState { input, output, in_place } in &self.states {
            let how = if *in_place { "is appended to input" } else { "is the next input" };
            writeln!(f, "state: output {output} {how} {input}")?;
        }
        writeln!(f, "arena {} bytes", self.arena_bytes)?;
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f, "step {index} {step}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let port = |name: &str| Port {
            name: name.into(),
            dtype: DType::F32,
            shape: vec![2, 3],
            lengths: Vec::new(),
        };
        Plan {
            dims: Vec::new(),
            inputs: vec![port("x")],
            outputs: vec![port("y")],
            states: Vec::new(),
            steps: vec![Step {
                name: "relu".into(),
                kernel: 0,
                work: 0,
                buffers: vec![Place::Input(0), Place::Arena(64), Place::Const(0), Place::Output(0)],
                extent: 6,
                chunks: 4,
            }],
            work: vec![Work::default()],
            arena_bytes: 128,
        }
    }

    #[test]
    fn prints_one_line_for_each_part() {
        let text = "input 0 x: f32[2,3]\noutput 0 y: f32[2,3]\narena 128 bytes\n\
            step 0 relu = kernel 0(input 0, arena+64, const+0, output 0) over 6 in 4\n";
        assert_eq!(plan().to_string(), text);
    }

    #[test]
    fn chunks_cover_the_extent_in_order() {
        let mut step = plan().steps.remove(0);
        for (extent, chunks) in [(6, 4), (0, 3), (1, 8), (1000, 7), (64, 64)] {
            (step.extent, step.chunks) = (extent, chunks);
            let mut at = 0;
            for index in 0..chunks {
                let (begin, end) = step.chunk(index);
                assert_eq!(begin, at);
                assert!((end - begin - extent / chunks).abs() <= 1);
                at = end;
            }
            assert_eq!(at, extent);
        }
    }

    #[test]
    fn indices_outside_are_refused() {
        assert_eq!(plan().check(1, 0), Ok(()));
        assert!(matches!(plan().check(0, 0), Err(PlanError::Kernel { .. })));
        for place in [Place::Input(1), Place::Output(1), Place::Arena(129), Place::Const(1)] {
            let mut wrong = plan();
            wrong.steps[0].buffers.push(place);
            let found = wrong.check(1, 0);
            assert!(matches!(found, Err(PlanError::Place { step: 0, .. })), "{place}: {found:?}");
        }
        let wrong = Plan { work: Vec::new(), ..plan() };
        assert!(matches!(wrong.check(1, 0), Err(PlanError::Work { .. })));
        for (extent, chunks) in [(-1, 1), (1, -1), (i64::MAX, 2)] {
            let mut wrong = plan();
            (wrong.steps[0].extent, wrong.steps[0].chunks) = (extent, chunks);
            assert!(matches!(wrong.check(1, 0), Err(PlanError::Extent { .. })));
        }
        let pair = |input, output| PlanState { input, output, in_place: false };
        for states in [vec![pair(1, 0)], vec![pair(0, 1)], vec![pair(0, 0), pair(0, 0)]] {
            let wrong = Plan { states, ..plan() };
            assert!(matches!(wrong.check(1, 0), Err(PlanError::State(_))));
        }
        let mut huge = plan();
        huge.outputs[0].shape = vec![usize::MAX, 2];
        assert_eq!(huge.check(1, 0), Err(PlanError::Size("y".into())));
    }
}
