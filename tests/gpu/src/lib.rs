//! A driver of a GPU that is not there. It checks that all that is asked of it is allowed, can fail
//! at any call, and runs kernels by the interpreter of PTX.
//!
//! Work in streams is done as late as a GPU may do it: when somebody waits for it. Who forgets to
//! wait, or touches what is still in use, gets wrong results here each time. Every call that is not
//! allowed is kept as a [problem](Double::problems).

mod driver;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_cuda::driver::{Device, FaultKind, Resource};
use kiln_ptx::{Memory, Module};

use work::{Streams, Work};

/// How a driver behaves.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// Version of the instruction set of the device.
    pub sm: u32,
    /// Bytes of device memory.
    pub memory: u64,
    /// Whether work is done at once, and not as late as can be.
    pub early: bool,
    /// The call that fails, counted from 0, and how.
    pub fails: Option<(usize, FaultKind)>,
}

impl Default for Behaviour {
    fn default() -> Behaviour {
        Behaviour { sm: 80, memory: 1 << 30, early: false, fails: None }
    }
}

/// A driver without a device.
pub struct Double {
    device: Device,
    behaviour: Behaviour,
    state: Mutex<State>,
}

/// All that a driver knows.
#[derive(Default)]
struct State {
    /// What was called.
    calls: Vec<&'static str>,
    /// What is not allowed, or went wrong in a kernel.
    problems: Vec<String>,
    /// What was given out and not taken back.
    live: BTreeSet<Resource>,
    /// The number given out last.
    last: u64,
    /// Device memory, by piece; what was taken back is empty.
    memory: Vec<Memory>,
    /// Bytes of it that are given out, and the most that were.
    taken: u64,
    most: u64,
    pinned: BTreeMap<u64, Box<[u8]>>,
    modules: BTreeMap<u64, Module>,
    graphs: BTreeMap<u64, Vec<Work>>,
    streams: Streams,
    /// Whether a kernel went wrong: nothing works after that.
    broken: bool,
    /// Whether work is done at once.
    early: bool,
}

impl Double {
    /// A driver that behaves like this.
    pub fn new(behaviour: Behaviour) -> Arc<Double> {
        let (sm, memory) = (behaviour.sm, behaviour.memory);
        let name = "a device that is not there".to_string();
        let device = Device { ordinal: 0, name, sm, memory, processors: 1, most: [1, 1] };
        let state = State { early: behaviour.early, ..State::default() };
        Arc::new(Double { device, behaviour, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of all calls so far but those that take back.
    pub fn calls(&self) -> Vec<&'static str> {
        self.state().calls.clone()
    }

    /// All that is not allowed, and what is not taken back. For when all users are gone.
    pub fn problems(&self) -> Vec<String> {
        let state = self.state();
        let left = state.live.iter().map(|what| format!("{what:?} is not taken back"));
        state.problems.iter().cloned().chain(left).collect()
    }

    /// What kernels did wrong, and calls that are not allowed, so far.
    pub fn faults(&self) -> Vec<String> {
        self.state().problems.clone()
    }

    /// Bytes of device memory that are given out now.
    pub fn taken(&self) -> u64 {
        self.state().taken
    }

    /// Bytes of device memory that were given out at most.
    pub fn most(&self) -> u64 {
        self.state().most
    }
}
