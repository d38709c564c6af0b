//! Runs that overlap: while one computes, the inputs of the next are copied to the device, and the
//! outputs of the one before from it.

use kiln_runtime::given::{by_port, check_inputs};
use kiln_runtime::plan::Dims;
use kiln_runtime::tensor::{Tensor, TensorView, TensorViewMut};

use crate::error::CudaError;
use crate::lane::Lane;
use crate::model::{CudaModel, running};

/// A pipeline of runs. [`push`](Self::push) begins a run and gives the outputs of an earlier one,
/// in the order of the runs; [`finish`](Self::finish) gives the rest.
pub struct CudaStream {
    /// None while it is dropped.
    lane: Option<Lane>,
    /// Lengths of dims of runs that were begun, the earliest first, each with its slot.
    under_way: Vec<(usize, Dims)>,
    next: usize,
    model: CudaModel,
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            self.model.give_back(lane, CudaStream::SLOTS);
        }
    }
}

impl CudaStream {
    /// Runs that may be under way at once.
    pub const SLOTS: usize = 2;

    pub(crate) fn new(model: CudaModel, lane: Lane) -> CudaStream {
        CudaStream { lane: Some(lane), under_way: Vec::new(), next: 0, model }
    }

    /// Begins a run on tensors given by name, and waits for the outputs of the earliest one where
    /// all slots are taken.
    ///
    /// # Errors
    /// When a tensor is missing, unknown or does not fit, or the device fails.
    pub fn push(
        &mut self,
        inputs: &[(&str, TensorView<'_>)],
    ) -> Result<Option<Vec<(String, Tensor)>>, CudaError> {
        let model = self.model.clone();
        let views = by_port(model.plan(), inputs)?;
        let dims = check_inputs(model.plan(), &views)?;
        let done = match self.under_way.len() {
            CudaStream::SLOTS => self.earliest()?,
            _ => None,
        };
        let (slot, program) = (self.next, model.program());
        self.lane().begin(&program, slot, &views, &dims)?;
        self.under_way.push((slot, dims));
        self.next = (slot + 1) % CudaStream::SLOTS;
        Ok(done)
    }

    /// The outputs of the earliest run that is under way; none where there is none.
    ///
    /// # Errors
    /// When the device fails.
    pub fn finish(&mut self) -> Result<Option<Vec<(String, Tensor)>>, CudaError> {
        self.earliest()
    }

    fn lane(&mut self) -> &mut Lane {
        self.lane.as_mut().expect("a stream has its lane until it is dropped")
    }

    fn earliest(&mut self) -> Result<Option<Vec<(String, Tensor)>>, CudaError> {
        if self.under_way.is_empty() {
            return Ok(None);
        }
        let model = self.model.clone();
        let (slot, dims) = self.under_way.remove(0);
        let mut outputs = outputs(&model, &dims);
        let mut targets: Vec<TensorViewMut> =
            outputs.iter_mut().map(|(_, t)| t.view_mut()).collect();
        let program = model.program();
        self.lane().take(&program, slot, &mut targets).map_err(running)?;
        drop(targets);
        Ok(Some(outputs))
    }
}

/// Tensors for the outputs of a run.
fn outputs(model: &CudaModel, dims: &Dims) -> Vec<(String, Tensor)> {
    let output = |port: &kiln_runtime::plan::Port| {
        (port.name.clone(), Tensor::zeros(port.dtype, &port.shape_for(dims)))
    };
    model.outputs().iter().map(output).collect()
}
