//! What the driver does when it is called.

use std::collections::VecDeque;
use std::ffi::CStr;

use kiln_cuda::driver::{
    Answer, Device, Driver, Fault, FaultKind, Footprint, Function, Grid, Resource,
};
use kiln_ptx::{Memory, address, parse, piece};

use crate::work::{Event, Work};
use crate::{Double, State};

/// Kernels of a module at most.
const KERNELS: u64 = 1 << 20;

fn fault(kind: FaultKind, call: &'static str, text: impl Into<String>) -> Fault {
    Fault { kind, call, text: text.into() }
}

impl State {
    fn problem(&mut self, call: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("{call}: {what}"));
    }

    /// Whether something was given out and not taken back.
    fn is_live(&mut self, call: &'static str, what: Resource) -> Answer<()> {
        if self.live.contains(&what) {
            return Ok(());
        }
        self.problem(call, format!("{what:?} is not there"));
        Err(fault(FaultKind::Other, call, "an invalid handle"))
    }

    fn give(&mut self, make: impl FnOnce(u64) -> Resource) -> Resource {
        self.last += 1;
        let what = make(self.last);
        self.live.insert(what);
        what
    }

    /// Device memory in one piece that is given out.
    fn inside(&mut self, call: &'static str, at: u64, bytes: usize) -> Answer<()> {
        let size = piece(at).and_then(|(number, at)| {
            let live = self.live.contains(&Resource::Memory(address(number)));
            let size = self.memory.get(number).filter(|_| live)?.size();
            at.checked_add(bytes).filter(|end| *end <= size)
        });
        if size.is_some() {
            return Ok(());
        }
        self.problem(call, format!("{bytes} bytes at {at:#x} are not all given out"));
        Err(fault(FaultKind::Other, call, "an invalid address"))
    }

    fn pinned(&mut self, call: &'static str, at: u64, bytes: usize) -> Answer<()> {
        if self.host(at, bytes).is_some() {
            return Ok(());
        }
        self.problem(call, format!("{bytes} bytes at {at:#x} of this process are not pinned"));
        Err(fault(FaultKind::Other, call, "an invalid address"))
    }

    /// Puts work into a stream, or into what it remembers.
    fn push(&mut self, call: &'static str, on: Resource, work: Work) -> Answer<()> {
        self.is_live(call, on)?;
        let stream = on.number();
        match self.streams.captures.get_mut(&stream) {
            Some(capture) => capture.push(work),
            None => self.streams.queues.entry(stream).or_default().push_back(work),
        }
        Ok(())
    }

    /// Whether work that is not done, or a graph, names a resource.
    fn in_use(&self, what: Resource) -> bool {
        let number = what.number();
        let range = self.pinned.get(&number).map_or(0..0, |b| number..number + b.len() as u64);
        let uses = |work: &Work| match what {
            Resource::Memory(at) => {
                work.uses(|a| piece(a).map(|p| p.0) == piece(at).map(|p| p.0), |_| false)
            }
            Resource::Pinned(_) => work.uses(|_| false, |at| range.contains(&at)),
            Resource::Module(number) => {
                matches!(work, Work::Launch { module, .. } if *module == number)
            }
            Resource::Event(number) => {
                matches!(work, Work::Wait { event, .. } | Work::Record { event, .. }
                    if *event == number)
            }
            Resource::Stream(_) | Resource::Graph(_) => false,
        };
        let queued = self.streams.queues.values().flatten();
        let graphs = self.graphs.values().flatten();
        queued.chain(graphs).any(uses)
    }

    fn take_back(&mut self, what: Resource) {
        let number = what.number();
        if !self.live.remove(&what) {
            self.problem("release", format!("{what:?} is not there"));
            return;
        }
        if self.in_use(what) {
            self.problem("release", format!("{what:?} is in use"));
        }
        match what {
            Resource::Module(_) => {
                self.modules.remove(&number);
            }
            Resource::Memory(at) => {
                if let Some(memory) = piece(at).and_then(|(n, _)| self.memory.get_mut(n)) {
                    self.taken -= memory.size() as u64;
                    *memory = Memory::fresh(0);
                }
            }
            Resource::Pinned(_) => {
                self.pinned.remove(&number);
            }
            Resource::Stream(_) => {
                let left = self.streams.queues.remove(&number).is_some_and(|q| !q.is_empty());
                if left || self.streams.captures.remove(&number).is_some() {
                    self.problem("release", format!("{what:?} has work"));
                }
            }
            Resource::Event(_) => {
                self.streams.events.remove(&number);
            }
            Resource::Graph(_) => {
                self.graphs.remove(&number);
            }
        }
    }
}

impl Double {
    /// How many parameters a kernel has; none where there is no such kernel.
    pub fn parameters(&self, function: Function) -> Option<usize> {
        let state = self.state();
        let module = state.modules.get(&(function.0 / KERNELS))?;
        Some(module.kernels.get((function.0 % KERNELS) as usize)?.params)
    }

    /// A call: counted, and failing where it is to.
    fn call<T>(&self, name: &'static str, call: impl FnOnce(&mut State) -> Answer<T>) -> Answer<T> {
        let mut state = self.state();
        let number = state.calls.len();
        state.calls.push(name);
        if let Some((_, kind)) = self.behaviour.fails.filter(|(at, _)| *at == number) {
            // What was begun ends, also where that fails.
            match name {
                "end_capture" => {
                    let _ = call(&mut state);
                    let graph = Resource::Graph(state.last);
                    state.take_back(graph);
                }
                "synchronize" | "reach" => {
                    let _ = call(&mut state);
                }
                _ => {}
            }
            return Err(fault(kind, name, format!("call {number} was to fail")));
        }
        let done = call(&mut state);
        if self.behaviour.early {
            let streams: Vec<u64> = state.streams.queues.keys().copied().collect();
            streams.into_iter().for_each(|stream| state.drain(stream));
        }
        done
    }

    /// What comes out where somebody waits.
    fn outcome(state: &State, call: &'static str) -> Answer<()> {
        match state.broken {
            true => {
                let text = state.problems.last().cloned().unwrap_or_default();
                Err(fault(FaultKind::Broken, call, text))
            }
            false => Ok(()),
        }
    }
}

impl Driver for Double {
    fn device(&self) -> &Device {
        &self.device
    }

    fn memory(&self) -> Answer<(u64, u64)> {
        let all = self.behaviour.memory;
        self.call("memory", |state| Ok((all.saturating_sub(state.taken), all)))
    }

    fn load(&self, text: &CStr) -> Answer<Resource> {
        self.call("load", |state| {
            let text = text.to_str().map_err(|e| e.to_string());
            let module = text.and_then(parse);
            let module = module.map_err(|why| fault(FaultKind::Assembly, "load", why))?;
            let what = state.give(Resource::Module);
            state.modules.insert(what.number(), module);
            Ok(what)
        })
    }

    fn function(&self, module: Resource, name: &CStr) -> Answer<Function> {
        self.call("function", |state| {
            state.is_live("function", module)?;
            let kernels = state.modules.get(&module.number()).map(|module| &module.kernels);
            let found = kernels.and_then(|kernels| {
                kernels.iter().position(|kernel| kernel.name.as_bytes() == name.to_bytes())
            });
            let found = found
                .ok_or_else(|| fault(FaultKind::Other, "function", "named symbol not found"))?;
            Ok(Function(module.number() * KERNELS + found as u64))
        })
    }

    fn footprint(&self, function: Function) -> Answer<Footprint> {
        self.call("footprint", |state| {
            state.is_live("footprint", Resource::Module(function.0 / KERNELS))?;
            let kernel =
                &state.modules[&(function.0 / KERNELS)].kernels[(function.0 % KERNELS) as usize];
            let (registers, shared) = (kernel.registers as u32, kernel.shared as u32);
            Ok(Footprint { registers, spilled: 0, shared })
        })
    }

    fn allocate(&self, bytes: usize) -> Answer<Resource> {
        let all = self.behaviour.memory;
        self.call("allocate", |state| {
            if bytes == 0 {
                state.problem("allocate", "no bytes");
            }
            if state.taken + bytes as u64 > all {
                return Err(fault(FaultKind::Memory, "allocate", "out of memory"));
            }
            let what = Resource::Memory(address(state.memory.len()));
            state.memory.push(Memory::fresh(bytes));
            state.live.insert(what);
            state.taken += bytes as u64;
            state.most = state.most.max(state.taken);
            Ok(what)
        })
    }

    fn pin(&self, bytes: usize) -> Answer<Resource> {
        self.call("pin", |state| {
            let mut block = vec![0xa5; bytes].into_boxed_slice();
            let at = block.as_mut_ptr().expose_provenance() as u64;
            state.pinned.insert(at, block);
            state.live.insert(Resource::Pinned(at));
            Ok(Resource::Pinned(at))
        })
    }

    fn stream(&self) -> Answer<Resource> {
        self.call("stream", |state| {
            let what = state.give(Resource::Stream);
            state.streams.queues.insert(what.number(), VecDeque::new());
            Ok(what)
        })
    }

    fn event(&self, _timed: bool) -> Answer<Resource> {
        self.call("event", |state| {
            let what = state.give(Resource::Event);
            state.streams.events.insert(what.number(), Event::default());
            Ok(what)
        })
    }

    fn release(&self, what: Resource) {
        self.state().take_back(what);
    }

    unsafe fn upload_now(&self, to: u64, from: &[u8]) -> Answer<()> {
        self.call("upload_now", |state| {
            state.inside("upload_now", to, from.len())?;
            state.put(to, from).map_err(|why| fault(FaultKind::Other, "upload_now", why))
        })
    }

    unsafe fn download_now(&self, to: &mut [u8], from: u64) -> Answer<()> {
        self.call("download_now", |state| {
            state.inside("download_now", from, to.len())?;
            let bytes = state.get(from, to.len());
            to.copy_from_slice(&bytes.map_err(|w| fault(FaultKind::Other, "download_now", w))?);
            Ok(())
        })
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize, on: Resource) -> Answer<()> {
        self.call("upload", |state| {
            let from = from.addr() as u64;
            state.inside("upload", to, bytes)?;
            state.pinned("upload", from, bytes)?;
            state.push("upload", on, Work::Upload { to, from, bytes })
        })
    }

    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize, on: Resource) -> Answer<()> {
        self.call("download", |state| {
            let to = to.addr() as u64;
            state.inside("download", from, bytes)?;
            state.pinned("download", to, bytes)?;
            state.push("download", on, Work::Download { to, from, bytes })
        })
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, on: Resource) -> Answer<()> {
        self.call("copy", |state| {
            state.inside("copy", to, bytes)?;
            state.inside("copy", from, bytes)?;
            state.push("copy", on, Work::Copy { to, from, bytes })
        })
    }

    unsafe fn clear(&self, to: u64, bytes: usize, on: Resource) -> Answer<()> {
        self.call("clear", |state| {
            state.inside("clear", to, bytes)?;
            state.push("clear", on, Work::Clear { to, bytes })
        })
    }

    unsafe fn launch(
        &self,
        function: Function,
        grid: Grid,
        arguments: &[u64],
        on: Resource,
    ) -> Answer<()> {
        self.call("launch", |state| {
            let (module, kernel) = (function.0 / KERNELS, (function.0 % KERNELS) as usize);
            state.is_live("launch", Resource::Module(module))?;
            // Nothing is at 0: buffers of no bytes.
            let mut places = arguments.iter().filter(|at| **at != 0);
            places.try_for_each(|at| state.inside("launch", *at, 0))?;
            let arguments = arguments.to_vec();
            state.push("launch", on, Work::Launch { module, kernel, grid, arguments })
        })
    }

    unsafe fn record(&self, event: Resource, on: Resource) -> Answer<()> {
        self.call("record", |state| {
            state.is_live("record", event)?;
            let Some(known) = state.streams.events.get_mut(&event.number()) else { return Ok(()) };
            known.recorded += 1;
            let work = Work::Record { event: event.number(), time: known.recorded };
            state.push("record", on, work)
        })
    }

    unsafe fn wait(&self, event: Resource, on: Resource) -> Answer<()> {
        self.call("wait", |state| {
            state.is_live("wait", event)?;
            let time = state.streams.events[&event.number()].recorded;
            state.push("wait", on, Work::Wait { event: event.number(), time })
        })
    }

    unsafe fn reach(&self, event: Resource) -> Answer<()> {
        self.call("reach", |state| {
            state.is_live("reach", event)?;
            let time = state.streams.events[&event.number()].recorded;
            state.reach(event.number(), time);
            Double::outcome(state, "reach")
        })
    }

    unsafe fn elapsed(&self, begin: Resource, end: Resource) -> Answer<f32> {
        self.call("elapsed", |state| {
            state.is_live("elapsed", begin)?;
            state.is_live("elapsed", end)?;
            let at = |event: Resource| state.streams.events[&event.number()].at;
            Ok((at(end) - at(begin)) as f32)
        })
    }

    unsafe fn synchronize(&self, stream: Resource) -> Answer<()> {
        self.call("synchronize", |state| {
            state.is_live("synchronize", stream)?;
            state.drain(stream.number());
            Double::outcome(state, "synchronize")
        })
    }

    unsafe fn begin_capture(&self, stream: Resource) -> Answer<()> {
        self.call("begin_capture", |state| {
            state.is_live("begin_capture", stream)?;
            state.streams.captures.insert(stream.number(), Vec::new());
            Ok(())
        })
    }

    unsafe fn end_capture(&self, stream: Resource) -> Answer<Resource> {
        self.call("end_capture", |state| {
            let Some(work) = state.streams.captures.remove(&stream.number()) else {
                state.problem("end_capture", "nothing is captured");
                return Err(fault(FaultKind::Other, "end_capture", "nothing is captured"));
            };
            let what = state.give(Resource::Graph);
            state.graphs.insert(what.number(), work);
            Ok(what)
        })
    }

    unsafe fn replay(&self, graph: Resource, on: Resource) -> Answer<()> {
        self.call("replay", |state| {
            state.is_live("replay", graph)?;
            let work = state.graphs.get(&graph.number()).cloned().unwrap_or_default();
            work.into_iter().try_for_each(|work| state.push("replay", on, work))
        })
    }
}
