//! What is used of a driver: one device, whose calls may come from any thread.
//!
//! Work is put into streams and done later, in the order of each stream; events order streams among
//! each other. Nothing that a piece of work uses may be released or touched before the work is
//! known to be done.

use std::ffi::CStr;
use std::fmt;

/// A device, as the driver describes it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Device {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Version of its instruction set, such as 80.
    pub sm: u32,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its multiprocessors.
    pub processors: u32,
    /// Operations on f32 in a nanosecond, and bytes to and from memory, that its clocks allow; 0
    /// where the driver does not say.
    pub most: [u32; 2],
}

/// What a driver gives out and takes back. The numbers are the driver's own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Resource {
    /// An assembled module.
    Module(u64),
    /// Device memory, by its address.
    Memory(u64),
    /// Memory of this machine that the device reads and writes, by its address.
    Pinned(u64),
    /// A stream.
    Stream(u64),
    /// An event.
    Event(u64),
    /// A graph that can be launched.
    Graph(u64),
}

impl Resource {
    /// The driver's number.
    pub fn number(self) -> u64 {
        match self {
            Resource::Module(number)
            | Resource::Memory(number)
            | Resource::Pinned(number)
            | Resource::Stream(number)
            | Resource::Event(number)
            | Resource::Graph(number) => number,
        }
    }
}

/// A kernel of a module, by the driver's number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Function(pub u64);

/// How many threads run a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grid {
    /// Blocks.
    pub blocks: u32,
    /// Threads of each.
    pub threads: u32,
}

/// What the driver made of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Footprint {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread that did not fit into registers.
    pub spilled: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
}

/// What kind of failure a driver reports, as far as it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// There is no memory for it.
    Memory,
    /// The text could not be assembled for this device.
    Assembly,
    /// A kernel touched memory that is not there, or the like: the device is unusable until the
    /// process ends.
    Broken,
    /// Anything else.
    Other,
}

/// A call that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// What kind of failure.
    pub kind: FaultKind,
    /// The function of the driver.
    pub call: &'static str,
    /// What the driver says.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.text)
    }
}

/// What a call gives.
pub type Answer<T> = Result<T, Fault>;

/// The driver of one open device. What it gives out is taken back by [`release`](Self::release).
///
/// # Safety
/// Of all unsafe functions: what they name was given out by this driver and not taken back, and
/// lies inside of the memory that it names. It stays, and pinned memory is not touched, until a
/// [`synchronize`](Self::synchronize) of the stream, or of one that waits for it, says that the
/// work is done. Kernels do what the text says.
pub trait Driver: Send + Sync {
    /// The device.
    fn device(&self) -> &Device;
    /// Bytes of device memory that are free, and all.
    fn memory(&self) -> Answer<(u64, u64)>;
    /// Assembles a module. A failure has the assembler's log as its text.
    fn load(&self, text: &CStr) -> Answer<Resource>;
    /// A kernel of a module.
    fn function(&self, module: Resource, name: &CStr) -> Answer<Function>;
    /// What the driver made of a kernel.
    fn footprint(&self, function: Function) -> Answer<Footprint>;
    /// Device memory, aligned to [`ALIGN`](kiln_runtime::gpu::ALIGN); at least one byte.
    fn allocate(&self, bytes: usize) -> Answer<Resource>;
    /// Pinned memory, at least one byte, that this process reads and writes as well.
    fn pin(&self, bytes: usize) -> Answer<Resource>;
    /// A stream.
    fn stream(&self) -> Answer<Resource>;
    /// An event; one that is `timed` knows when it was reached.
    fn event(&self, timed: bool) -> Answer<Resource>;
    /// Takes something back. Memory may be taken back at once: nothing uses it any more.
    fn release(&self, what: Resource);

    /// Copies to the device at once, from any memory.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn upload_now(&self, to: u64, from: &[u8]) -> Answer<()>;
    /// Copies from the device at once, to any memory.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn download_now(&self, to: &mut [u8], from: u64) -> Answer<()>;
    /// Copies from pinned memory to the device.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize, on: Resource) -> Answer<()>;
    /// Copies from the device to pinned memory.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize, on: Resource) -> Answer<()>;
    /// Copies on the device.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, on: Resource) -> Answer<()>;
    /// Fills device memory with zeros.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn clear(&self, to: u64, bytes: usize, on: Resource) -> Answer<()>;
    /// Runs a kernel whose parameters are these addresses.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn launch(
        &self,
        function: Function,
        grid: Grid,
        arguments: &[u64],
        on: Resource,
    ) -> Answer<()>;
    /// An event is reached when all that was put into the stream before is done.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn record(&self, event: Resource, on: Resource) -> Answer<()>;
    /// What is put into a stream after this waits for an event as it was last recorded.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn wait(&self, event: Resource, on: Resource) -> Answer<()>;
    /// Waits until an event is reached.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn reach(&self, event: Resource) -> Answer<()>;
    /// Milliseconds between two timed events that were reached.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn elapsed(&self, begin: Resource, end: Resource) -> Answer<f32>;
    /// Waits until all that was put into a stream is done. Failures of earlier work come out here.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn synchronize(&self, stream: Resource) -> Answer<()>;
    /// What is put into a stream from now on is not done, but remembered.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn begin_capture(&self, stream: Resource) -> Answer<()>;
    /// Ends that, and gives what was remembered as a graph.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn end_capture(&self, stream: Resource) -> Answer<Resource>;
    /// Puts all of a graph into a stream.
    ///
    /// # Safety
    /// See [`Driver`].
    unsafe fn replay(&self, graph: Resource, on: Resource) -> Answer<()>;
}
