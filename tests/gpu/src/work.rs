//! Streams of work, done when somebody waits for it.

use std::collections::{BTreeMap, VecDeque};

use kiln_cuda::driver::Grid;
use kiln_ptx::{Copies, launch_at, piece};

use crate::State;

/// A piece of work.
#[derive(Clone, Debug)]
pub enum Work {
    /// A copy to the device from an address of this process.
    Upload { to: u64, from: u64, bytes: usize },
    /// A copy from the device.
    Download { to: u64, from: u64, bytes: usize },
    /// A copy on the device.
    Copy { to: u64, from: u64, bytes: usize },
    /// Zeros.
    Clear { to: u64, bytes: usize },
    /// A kernel: module, number in it, threads and arguments.
    Launch { module: u64, kernel: usize, grid: Grid, arguments: Vec<u64> },
    /// An event is reached for that time.
    Record { event: u64, time: u64 },
    /// An event must have been reached that often.
    Wait { event: u64, time: u64 },
}

/// How often an event was recorded, and reached.
#[derive(Default)]
pub struct Event {
    pub recorded: u64,
    pub reached: u64,
    /// When it was reached, by the count of all work.
    pub at: u64,
}

/// Streams and events.
#[derive(Default)]
pub struct Streams {
    pub queues: BTreeMap<u64, VecDeque<Work>>,
    /// Streams that remember work.
    pub captures: BTreeMap<u64, Vec<Work>>,
    pub events: BTreeMap<u64, Event>,
    /// How much work was done.
    pub done: u64,
}

impl Work {
    /// Whether it names device memory of a piece, or pinned memory in a range, or a module, or an
    /// event.
    pub fn uses(&self, memory: impl Fn(u64) -> bool, host: impl Fn(u64) -> bool) -> bool {
        match self {
            Work::Upload { to, from, .. } => memory(*to) || host(*from),
            Work::Download { to, from, .. } => host(*to) || memory(*from),
            Work::Copy { to, from, .. } => memory(*to) || memory(*from),
            Work::Clear { to, .. } => memory(*to),
            Work::Launch { arguments, .. } => arguments.iter().any(|at| memory(*at)),
            Work::Record { .. } | Work::Wait { .. } => false,
        }
    }
}

impl State {
    /// Does all work of a stream.
    pub fn drain(&mut self, stream: u64) {
        self.until(stream, |_| false);
    }

    /// Does what an event waits for.
    pub fn reach(&mut self, event: u64, time: u64) {
        let reached = |state: &State| {
            state.streams.events.get(&event).is_none_or(|event| event.reached >= time)
        };
        if reached(self) {
            return;
        }
        let records = |work: &Work| match work {
            Work::Record { event: e, time: t } => (*e, *t) == (event, time),
            _ => false,
        };
        let found =
            self.streams.queues.iter().find(|(_, queue)| queue.iter().any(records)).map(|q| *q.0);
        match found {
            Some(stream) => self.until(stream, reached),
            None => self.problems.push(format!("event {event} is waited for and never reached")),
        }
    }

    fn until(&mut self, stream: u64, enough: impl Fn(&State) -> bool) {
        while !enough(self) {
            let queue = self.streams.queues.get_mut(&stream);
            let Some(work) = queue.and_then(VecDeque::pop_front) else { return };
            self.streams.done += 1;
            // A device that is broken does nothing any more.
            if self.broken && !matches!(work, Work::Record { .. }) {
                continue;
            }
            if let Err(problem) = self.work(work) {
                self.problems.push(problem);
                self.broken = true;
            }
        }
    }

    /// A pinned byte range of this process.
    pub fn host(&mut self, at: u64, bytes: usize) -> Option<&mut [u8]> {
        let (start, block) = self.pinned.range_mut(..=at).next_back()?;
        let from = usize::try_from(at - start).ok()?;
        block.get_mut(from..from.checked_add(bytes)?)
    }

    fn work(&mut self, work: Work) -> Result<(), String> {
        let lost = || "memory is gone".to_string();
        match work {
            Work::Upload { to, from, bytes } => {
                let bytes = self.host(from, bytes).ok_or_else(lost)?.to_vec();
                self.put(to, &bytes)?;
            }
            Work::Download { to, from, bytes } => {
                let bytes = self.get(from, bytes)?;
                self.host(to, bytes.len()).ok_or_else(lost)?.copy_from_slice(&bytes);
            }
            Work::Copy { to, from, bytes } => {
                let bytes = self.get(from, bytes)?;
                self.put(to, &bytes)?;
            }
            Work::Clear { to, bytes } => self.put(to, &vec![0; bytes])?,
            Work::Launch { module, kernel, grid, arguments } => {
                let module = self.modules.get(&module).ok_or("a module is gone")?;
                let (blocks, threads) = (grid.blocks as usize, grid.threads as usize);
                let kernel = &module.kernels[kernel];
                let copies = if self.early { Copies::Early } else { Copies::Late };
                launch_at(kernel, (blocks, threads), copies, &mut self.memory, &arguments)
                    .map_err(|fault| fault.to_string())?;
            }
            Work::Record { event, time } => {
                let at = self.streams.done;
                if let Some(event) = self.streams.events.get_mut(&event) {
                    (event.reached, event.at) = (event.reached.max(time), at);
                }
            }
            Work::Wait { event, time } => self.reach(event, time),
        }
        Ok(())
    }

    /// Bytes of device memory.
    pub fn get(&self, at: u64, len: usize) -> Result<Vec<u8>, String> {
        let (number, at) = piece(at).ok_or("no address")?;
        let memory = self.memory.get(number).ok_or("no memory")?;
        Ok(memory.get(at, len)?.to_vec())
    }

    /// Writes device memory.
    pub fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), String> {
        let (number, at) = piece(at).ok_or("no address")?;
        let memory = self.memory.get_mut(number).ok_or("no memory")?;
        if memory.put(at, bytes) { Ok(()) } else { Err("bytes outside of memory".into()) }
    }
}
