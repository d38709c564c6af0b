//! The memory of a run, and the pointers that kernels are given.

use crate::artifact::Artifact;
use crate::memory::AlignedBytes;
use crate::plan::{DIMS, Dims, Place, Plan};
use crate::tensor::{TensorView, TensorViewMut};

/// The memory of one run at a time.
pub struct Scratch {
    /// Intermediate values.
    pub arena: AlignedBytes,
    /// The memory of each state that is kept in place.
    pub rooms: Vec<AlignedBytes>,
    /// Lengths of dims in this run.
    pub dims: Box<Dims>,
    /// The arguments of all steps, one after the other.
    pub buffers: Vec<*mut u8>,
    /// Those that each run sets: tensors that it is given.
    given: Vec<(usize, Place)>,
}

// SAFETY: the pointers go to the arena and the states, which move along with them, to the
// constants, which are only read, and to tensors of a run, which sets them before it uses them.
unsafe impl Send for Scratch {}
// SAFETY: a shared scratch gives access to the bytes of arena and states, and to pointers that only
// launches follow, which borrow it mutably.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// Zeroed memory, with all pointers set that stay the same from run to run.
    pub fn new(artifact: &Artifact) -> Scratch {
        let mut arena = AlignedBytes::zeroed(artifact.plan.arena_bytes);
        let plan = &artifact.plan;
        let base = arena.bytes_mut().as_mut_ptr();
        let mut rooms: Vec<AlignedBytes> = room_bytes(plan).map(AlignedBytes::zeroed).collect();
        let kept = plan.states.iter().filter(|state| state.in_place);
        let kept: Vec<(usize, usize, *mut u8)> = kept
            .zip(&mut rooms)
            .map(|(state, room)| (state.input, state.output, room.bytes_mut().as_mut_ptr()))
            .collect();
        let room = |found: Option<&(usize, usize, *mut u8)>| {
            found.map_or(std::ptr::null_mut(), |(_, _, room)| *room)
        };
        let constants = artifact.constants.bytes().as_ptr().cast_mut();
        let mut dims = Box::new([0; DIMS]);
        let lengths: *mut u8 = dims.as_mut_ptr().cast();
        let places = || plan.steps.iter().flat_map(|step| &step.buffers).copied();
        let buffers = places().map(|place| match place {
            Place::Input(port) => room(kept.iter().find(|k| k.0 == port)),
            Place::Output(port) => room(kept.iter().find(|k| k.1 == port)),
            Place::Arena(offset) => base.wrapping_add(offset),
            Place::Const(offset) => constants.wrapping_add(offset),
            Place::Dims => lengths,
        });
        let buffers = buffers.collect();
        let is_given = |place: &Place| match *place {
            Place::Input(port) => !plan.is_input_kept(port),
            Place::Output(port) => !plan.is_output_kept(port),
            Place::Arena(_) | Place::Const(_) | Place::Dims => false,
        };
        let given = places().enumerate().filter(|(_, place)| is_given(place)).collect();
        Scratch { buffers, arena, rooms, dims, given }
    }

    /// Sets the pointers to the tensors of a run, which were checked.
    pub fn bind(&mut self, inputs: &[TensorView<'_>], outputs: &mut [TensorViewMut<'_>]) {
        for &(buffer, place) in &self.given {
            match place {
                Place::Input(port) => {
                    self.buffers[buffer] = inputs[port].bytes.as_ptr().cast_mut();
                }
                Place::Output(port) => self.buffers[buffer] = outputs[port].bytes.as_mut_ptr(),
                Place::Arena(_) | Place::Const(_) | Place::Dims => {}
            }
        }
    }
}

/// Bytes of the memory of each state that is kept in place.
pub fn room_bytes(plan: &Plan) -> impl Iterator<Item = usize> {
    let kept = plan.states.iter().filter(|state| state.in_place);
    // `Plan::check` made sure that the size exists.
    kept.map(|state| plan.inputs[state.input].size_bytes().unwrap_or(0))
}
