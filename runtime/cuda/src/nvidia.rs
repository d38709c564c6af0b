//! NVIDIA's driver, through cudarc's bindings. These look for the library when the first function
//! is called, and panic where it or the function is missing: so both are looked for before.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::result::{self, DriverError, event, function, graph, module, stream};
use cudarc::driver::sys::{self, CUresult};

use crate::driver::{
    Answer, Device, Driver, Fault, FaultKind, Footprint, Function, Grid, Resource,
};
use crate::error::CudaError;

/// Functions of the driver that are called.
const SYMBOLS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyHtoD_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// A device and its primary context.
pub struct Nvidia {
    device: Device,
    raw: sys::CUdevice,
    /// The context, as a number: threads share it.
    context: usize,
}

/// Looks for the driver and starts it.
fn start() -> Result<(), CudaError> {
    // SAFETY: this loads the driver's library, which runs what it runs when it is loaded.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // SAFETY: as above; the library is there.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the address is not used.
        if unsafe { library.get::<*const c_void>(symbol.as_bytes()) }.is_err() {
            return Err(CudaError::OldDriver { symbol });
        }
    }
    match result::init() {
        Ok(()) => Ok(()),
        // Without a device the driver does not start, and says so.
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => {
            Err(CudaError::NoDevice { ordinal: 0, count: 0 })
        }
        Err(error) => Err(CudaError::Start(fault("cuInit", error))),
    }
}

/// All devices of this machine.
///
/// # Errors
/// When there is no driver, or it does not start.
pub fn devices() -> Result<Vec<Device>, CudaError> {
    match start() {
        Err(CudaError::NoDevice { .. }) => return Ok(Vec::new()),
        started => started?,
    }
    (0..count()?).map(|ordinal| Ok(describe(ordinal)?.1)).collect()
}

/// The version of CUDA that the driver is for, such as 12.4.
///
/// # Errors
/// When there is no driver, or it does not start.
pub fn driver_version() -> Result<String, CudaError> {
    start()?;
    let mut version = 0;
    // SAFETY: the driver writes a number.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    asked.map_err(|error| CudaError::Start(fault("cuDriverGetVersion", error)))?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

fn count() -> Result<usize, CudaError> {
    let count = result::device::get_count();
    let count = count.map_err(|error| CudaError::Start(fault("cuDeviceGetCount", error)))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn describe(ordinal: usize) -> Result<(sys::CUdevice, Device), CudaError> {
    use sys::CUdevice_attribute as Attribute;
    let started = |call| move |error| CudaError::Start(fault(call, error));
    let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
    let raw = result::device::get(number).map_err(started("cuDeviceGet"))?;
    let attribute = |which| {
        // SAFETY: the device is one that the driver named.
        let value = unsafe { result::device::get_attribute(raw, which) };
        value.map(|value| u32::try_from(value).unwrap_or(0))
    };
    let attribute = |which| attribute(which).map_err(started("cuDeviceGetAttribute"));
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: the device is one that the driver named.
    let memory = unsafe { result::device::total_mem(raw) }.map_err(started("cuDeviceTotalMem"))?;
    // Clocks are in kHz; memory moves twice in a turn, and a fused operation is two.
    let clock = u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?);
    let memory_clock = u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?);
    let bus = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let flops = u64::from(processors) * lanes(major * 10 + minor) * 2 * clock / 1_000_000;
    let bytes = 2 * memory_clock * u64::from(bus) / 8 / 1_000_000;
    let device = Device {
        ordinal,
        name: result::device::get_name(raw).map_err(started("cuDeviceGetName"))?,
        sm: major * 10 + minor,
        memory: memory as u64,
        processors,
        most: [flops, bytes].map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
    };
    Ok((raw, device))
}

/// Operations on f32 that a multiprocessor begins in a turn.
fn lanes(sm: u32) -> u64 {
    match sm {
        60 | 70 | 75 | 80 => 64,
        _ => 128,
    }
}

/// What the driver says of a failure.
fn fault(call: &'static str, error: DriverError) -> Fault {
    let text = |asked: Result<&CStr, DriverError>| {
        asked.map_or_else(|_| "unknown".into(), |text| text.to_string_lossy().into_owned())
    };
    let kind = match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => FaultKind::Memory,
        CUresult::CUDA_ERROR_INVALID_PTX
        | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUresult::CUDA_ERROR_INVALID_IMAGE => FaultKind::Assembly,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_INVALID_PC
        | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
        | CUresult::CUDA_ERROR_LAUNCH_FAILED => FaultKind::Broken,
        _ => FaultKind::Other,
    };
    let text = format!("{} ({})", text(error.error_string()), text(error.error_name()));
    Fault { kind, call, text }
}

/// The driver's pointer of a number.
fn raw<T>(what: Resource) -> *mut T {
    ptr::with_exposed_provenance_mut(what.number() as usize)
}

fn number<T>(pointer: *mut T) -> u64 {
    pointer.expose_provenance() as u64
}

impl Nvidia {
    /// Opens a device.
    pub fn open(ordinal: usize) -> Result<Nvidia, CudaError> {
        start()?;
        let count = count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let (raw, device) = describe(ordinal)?;
        // SAFETY: the device is one that the driver named.
        let context = unsafe { result::primary_ctx::retain(raw) };
        let context =
            context.map_err(|e| CudaError::Start(fault("cuDevicePrimaryCtxRetain", e)))?;
        Ok(Nvidia { device, raw, context: number(context) as usize })
    }

    /// A call with the context of the device on this thread.
    fn call<T>(
        &self,
        name: &'static str,
        call: impl FnOnce() -> Result<T, DriverError>,
    ) -> Answer<T> {
        let context = ptr::with_exposed_provenance_mut(self.context);
        // SAFETY: the context is kept until this is dropped.
        unsafe { result::ctx::set_current(context) }.map_err(|e| fault("cuCtxSetCurrent", e))?;
        call().map_err(|error| fault(name, error))
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        // SAFETY: it was retained once, when this was opened.
        let _ = unsafe { result::primary_ctx::release(self.raw) };
    }
}

/// Bytes of the assembler's log that are kept.
const LOG_BYTES: usize = 8192;

/// Assembles a module; the log says what is wrong with it.
fn assemble(text: &CStr, log: &mut [u8; LOG_BYTES]) -> Result<u64, DriverError> {
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    let mut values = [log.as_mut_ptr().cast(), ptr::without_provenance_mut(LOG_BYTES - 1)];
    let (mut loaded, count) = (ptr::null_mut(), options.len() as u32);
    // SAFETY: the text ends with a zero, the log is as long as is said, and the driver reads and
    // writes these during the call only.
    let done = unsafe {
        let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
        sys::cuModuleLoadDataEx(&mut loaded, text.as_ptr().cast(), count, options, values)
    };
    done.result().map(|()| number(loaded))
}

// SAFETY of the blocks below: the caller vouches for what it hands in (`Driver`), and resources
// were given out by the functions that `release` and the calls name.
impl Driver for Nvidia {
    fn device(&self) -> &Device {
        &self.device
    }

    fn memory(&self) -> Answer<(u64, u64)> {
        let (free, all) = self.call("cuMemGetInfo", result::mem_get_info)?;
        Ok((free as u64, all as u64))
    }

    fn load(&self, text: &CStr) -> Answer<Resource> {
        let mut log = [0; LOG_BYTES];
        let loaded = self.call("cuModuleLoadDataEx", || assemble(text, &mut log));
        let said = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy());
        loaded.map(Resource::Module).map_err(|fault| match said {
            Ok(said) if !said.trim().is_empty() => {
                Fault { text: format!("{}: {}", fault.text, said.trim()), ..fault }
            }
            Ok(_) | Err(_) => fault,
        })
    }

    fn function(&self, module: Resource, name: &CStr) -> Answer<Function> {
        let name = name.to_owned();
        let found = self
            .call("cuModuleGetFunction", || unsafe { module::get_function(raw(module), name) })?;
        Ok(Function(number(found)))
    }

    fn footprint(&self, function: Function) -> Answer<Footprint> {
        use sys::CUfunction_attribute as Attribute;
        let ask = |which| {
            let function = ptr::with_exposed_provenance_mut(function.0 as usize);
            let asked = || unsafe { function::get_function_attribute(function, which) };
            let value = self.call("cuFuncGetAttribute", asked)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        Ok(Footprint {
            registers: ask(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            spilled: ask(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            shared: ask(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
        })
    }

    fn allocate(&self, bytes: usize) -> Answer<Resource> {
        let at = self.call("cuMemAlloc", || unsafe { result::malloc_sync(bytes) })?;
        Ok(Resource::Memory(at))
    }

    fn pin(&self, bytes: usize) -> Answer<Resource> {
        // Without flags: written and read by the processor, so not write-combined.
        let at = self.call("cuMemHostAlloc", || unsafe { result::malloc_host(bytes, 0) })?;
        Ok(Resource::Pinned(number(at)))
    }

    fn stream(&self) -> Answer<Resource> {
        let kind = stream::StreamKind::NonBlocking;
        let made = self.call("cuStreamCreate", || stream::create(kind))?;
        Ok(Resource::Stream(number(made)))
    }

    fn event(&self, timed: bool) -> Answer<Resource> {
        let flags = match timed {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let made = self.call("cuEventCreate", || event::create(flags))?;
        Ok(Resource::Event(number(made)))
    }

    fn release(&self, what: Resource) {
        // What cannot be taken back is of a device that is unusable, or of a process that ends.
        let _ = self.call("release", || unsafe {
            match what {
                Resource::Module(_) => module::unload(raw(what)),
                Resource::Memory(at) => result::free_sync(at),
                Resource::Pinned(_) => result::free_host(raw(what)),
                Resource::Stream(_) => stream::destroy(raw(what)),
                Resource::Event(_) => event::destroy(raw(what)),
                Resource::Graph(_) => graph::exec_destroy(raw(what)),
            }
        });
    }

    unsafe fn upload_now(&self, to: u64, from: &[u8]) -> Answer<()> {
        // A copy from memory that is not pinned may end before the bytes are there; streams that
        // do not block would not wait for it.
        self.call("cuMemcpyHtoD", || unsafe {
            result::memcpy_htod_sync(to, from)?;
            stream::synchronize(stream::null())
        })
    }

    unsafe fn download_now(&self, to: &mut [u8], from: u64) -> Answer<()> {
        self.call("cuMemcpyDtoH", || unsafe { result::memcpy_dtoh_sync(to, from) })
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize, on: Resource) -> Answer<()> {
        self.call("cuMemcpyHtoDAsync", || unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, raw(on)).result()
        })
    }

    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize, on: Resource) -> Answer<()> {
        self.call("cuMemcpyDtoHAsync", || unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, raw(on)).result()
        })
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, on: Resource) -> Answer<()> {
        self.call("cuMemcpyDtoDAsync", || unsafe {
            result::memcpy_dtod_async(to, from, bytes, raw(on))
        })
    }

    unsafe fn clear(&self, to: u64, bytes: usize, on: Resource) -> Answer<()> {
        self.call("cuMemsetD8Async", || unsafe { result::memset_d8_async(to, 0, bytes, raw(on)) })
    }

    unsafe fn launch(
        &self,
        function: Function,
        Grid { blocks, threads }: Grid,
        arguments: &[u64],
        on: Resource,
    ) -> Answer<()> {
        let mut pointers: Vec<*mut c_void> =
            arguments.iter().map(|at| ptr::from_ref(at).cast_mut().cast()).collect();
        let function = ptr::with_exposed_provenance_mut(function.0 as usize);
        let (blocks, threads) = ((blocks, 1, 1), (threads, 1, 1));
        // The driver copies the arguments before it returns.
        self.call("cuLaunchKernel", || unsafe {
            result::launch_kernel(function, blocks, threads, 0, raw(on), &mut pointers)
        })
    }

    unsafe fn record(&self, event: Resource, on: Resource) -> Answer<()> {
        self.call("cuEventRecord", || unsafe { event::record(raw(event), raw(on)) })
    }

    unsafe fn wait(&self, event: Resource, on: Resource) -> Answer<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        self.call("cuStreamWaitEvent", || unsafe { stream::wait_event(raw(on), raw(event), flags) })
    }

    unsafe fn reach(&self, event: Resource) -> Answer<()> {
        self.call("cuEventSynchronize", || unsafe { event::synchronize(raw(event)) })
    }

    unsafe fn elapsed(&self, begin: Resource, end: Resource) -> Answer<f32> {
        self.call("cuEventElapsedTime", || unsafe { event::elapsed(raw(begin), raw(end)) })
    }

    unsafe fn synchronize(&self, stream: Resource) -> Answer<()> {
        self.call("cuStreamSynchronize", || unsafe { stream::synchronize(raw(stream)) })
    }

    unsafe fn begin_capture(&self, stream: Resource) -> Answer<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.call("cuStreamBeginCapture", || unsafe { stream::begin_capture(raw(stream), mode) })
    }

    unsafe fn end_capture(&self, stream: Resource) -> Answer<Resource> {
        let captured =
            self.call("cuStreamEndCapture", || unsafe { stream::end_capture(raw(stream)) })?;
        let mut made = ptr::null_mut();
        let made = self.call("cuGraphInstantiate", || unsafe {
            sys::cuGraphInstantiateWithFlags(&mut made, captured, 0).result().map(|()| made)
        });
        let _ = self.call("cuGraphDestroy", || unsafe { graph::destroy(captured) });
        Ok(Resource::Graph(number(made?)))
    }

    unsafe fn replay(&self, graph: Resource, on: Resource) -> Answer<()> {
        self.call("cuGraphLaunch", || unsafe { graph::launch(raw(graph), raw(on)) })
    }
}
