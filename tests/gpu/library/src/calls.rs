//! The functions.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use kiln_cuda::driver::{Driver, Footprint, Function, Grid, Resource};

use crate::{SUCCESS, devices, done, double, give, handle, report, text, write};

type Pointer = *mut c_void;

fn stream(pointer: Pointer) -> Resource {
    Resource::Stream(pointer.addr() as u64)
}

fn event(pointer: Pointer) -> Resource {
    Resource::Event(pointer.addr() as u64)
}

fn release(what: Resource) -> c_int {
    double().release(what);
    SUCCESS
}

/// Functions of the library: all are `unsafe extern "C"` and found by their names.
macro_rules! library {
    ($($name:ident($($arg:ident: $ty:ty),*) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($arg: $ty),*) -> c_int {
                // SAFETY: callers vouch for pointers and handles, as NVIDIA's documentation says.
                #[allow(unused_unsafe)]
                unsafe { $body }
            }
        )*
    };
}

library! {
    cuInit(_flags: c_uint) { if devices() == 0 { 100 } else { SUCCESS } }
    cuDriverGetVersion(to: *mut c_int) { to.write(12040); SUCCESS }
    cuGetErrorName(code: c_int, to: *mut *const c_char) { to.write(text(code).as_ptr()); SUCCESS }
    cuGetErrorString(code: c_int, to: *mut *const c_char) { to.write(text(code).as_ptr()); SUCCESS }
    cuDeviceGetCount(to: *mut c_int) { to.write(devices()); SUCCESS }
    cuDeviceGet(to: *mut c_int, ordinal: c_int) { to.write(ordinal); SUCCESS }
    cuDeviceGetName(to: *mut c_char, room: c_int, _device: c_int) {
        write(&double().device().name, to, room as usize);
        SUCCESS
    }
    cuDeviceTotalMem_v2(to: *mut usize, _device: c_int) {
        to.write(double().device().memory as usize);
        SUCCESS
    }
    cuDeviceGetAttribute(to: *mut c_int, which: c_int, _device: c_int) {
        let device = double().device();
        to.write(match which {
            75 => device.sm / 10,
            76 => device.sm % 10,
            16 => device.processors,
            // Clocks in kHz, and the bits of the bus.
            13 | 36 => 1_000_000,
            37 => 4096,
            _ => 0,
        } as c_int);
        SUCCESS
    }
    cuDevicePrimaryCtxRetain(to: *mut Pointer, _device: c_int) { to.write(handle(1)); SUCCESS }
    cuDevicePrimaryCtxRelease_v2(_device: c_int) { report(); SUCCESS }
    cuCtxSetCurrent(_context: Pointer) { SUCCESS }
    cuMemGetInfo_v2(free: *mut usize, all: *mut usize) {
        give(double().memory(), free, |memory| {
            all.write(memory.1 as usize);
            memory.0 as usize
        })
    }
    cuModuleLoadDataEx(
        to: *mut Pointer,
        image: *const c_char,
        count: c_uint,
        options: *const c_uint,
        values: *const Pointer
    ) {
        let loaded = double().load(CStr::from_ptr(image));
        if let Err(fault) = &loaded {
            // CU_JIT_ERROR_LOG_BUFFER and its size.
            let option = |wanted| (0..count as usize).find(|&i| options.add(i).read() == wanted);
            if let (Some(log), Some(size)) = (option(5), option(6)) {
                write(&fault.text, values.add(log).read().cast(), values.add(size).read().addr());
            }
        }
        give(loaded, to, |what| handle(what.number()))
    }
    cuModuleUnload(module: Pointer) { release(Resource::Module(module.addr() as u64)) }
    cuModuleGetFunction(to: *mut Pointer, module: Pointer, name: *const c_char) {
        let module = Resource::Module(module.addr() as u64);
        give(double().function(module, CStr::from_ptr(name)), to, |function| handle(function.0))
    }
    cuFuncGetAttribute(to: *mut c_int, which: c_int, function: Pointer) {
        give(double().footprint(Function(function.addr() as u64)), to, |footprint| {
            let Footprint { registers, spilled, shared } = footprint;
            (match which {
                4 => registers,
                3 => spilled,
                1 => shared,
                _ => 0,
            }) as c_int
        })
    }
    cuMemAlloc_v2(to: *mut u64, bytes: usize) {
        give(double().allocate(bytes), to, Resource::number)
    }
    cuMemFree_v2(at: u64) { release(Resource::Memory(at)) }
    cuMemHostAlloc(to: *mut Pointer, bytes: usize, _flags: c_uint) {
        give(double().pin(bytes), to, |what| {
            std::ptr::with_exposed_provenance_mut(what.number() as usize)
        })
    }
    cuMemFreeHost(at: Pointer) { release(Resource::Pinned(at.addr() as u64)) }
    cuStreamCreate(to: *mut Pointer, _flags: c_uint) {
        give(double().stream(), to, |what| handle(what.number()))
    }
    cuStreamDestroy_v2(which: Pointer) { release(stream(which)) }
    cuStreamSynchronize(which: Pointer) {
        // Nothing is put into the null stream but copies that are done at once.
        if which.is_null() { SUCCESS } else { done(double().synchronize(stream(which))) }
    }
    cuStreamWaitEvent(on: Pointer, which: Pointer, _flags: c_uint) {
        done(double().wait(event(which), stream(on)))
    }
    cuStreamBeginCapture_v2(which: Pointer, _mode: c_uint) {
        done(double().begin_capture(stream(which)))
    }
    cuStreamEndCapture(which: Pointer, to: *mut Pointer) {
        give(double().end_capture(stream(which)), to, |what| handle(what.number()))
    }
    // A graph is launched as it was captured, and taken back with what is launched.
    cuGraphInstantiateWithFlags(to: *mut Pointer, graph: Pointer, _flags: u64) {
        to.write(graph);
        SUCCESS
    }
    cuGraphDestroy(_graph: Pointer) { SUCCESS }
    cuGraphExecDestroy(graph: Pointer) { release(Resource::Graph(graph.addr() as u64)) }
    cuGraphLaunch(graph: Pointer, on: Pointer) {
        done(double().replay(Resource::Graph(graph.addr() as u64), stream(on)))
    }
    cuEventCreate(to: *mut Pointer, flags: c_uint) {
        // CU_EVENT_DISABLE_TIMING is 2.
        give(double().event(flags & 2 == 0), to, |what| handle(what.number()))
    }
    cuEventDestroy_v2(which: Pointer) { release(event(which)) }
    cuEventRecord(which: Pointer, on: Pointer) { done(double().record(event(which), stream(on))) }
    cuEventSynchronize(which: Pointer) { done(double().reach(event(which))) }
    cuEventElapsedTime(to: *mut f32, begin: Pointer, end: Pointer) {
        give(double().elapsed(event(begin), event(end)), to, |ms| ms)
    }
    cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) {
        done(double().upload_now(to, std::slice::from_raw_parts(from, bytes)))
    }
    cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) {
        done(double().download_now(std::slice::from_raw_parts_mut(to, bytes), from))
    }
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, on: Pointer) {
        done(double().upload(to, from, bytes, stream(on)))
    }
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, on: Pointer) {
        done(double().download(to, from, bytes, stream(on)))
    }
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, on: Pointer) {
        done(double().copy(to, from, bytes, stream(on)))
    }
    cuMemsetD8Async(to: u64, _byte: u8, bytes: usize, on: Pointer) {
        done(double().clear(to, bytes, stream(on)))
    }
    cuLaunchKernel(
        function: Pointer,
        blocks: c_uint, _blocks_y: c_uint, _blocks_z: c_uint,
        threads: c_uint, _threads_y: c_uint, _threads_z: c_uint,
        _shared: c_uint,
        on: Pointer,
        parameters: *const *const u64,
        _extra: Pointer
    ) {
        let function = Function(function.addr() as u64);
        let count = double().parameters(function).unwrap_or(0);
        let arguments: Vec<u64> = (0..count).map(|i| parameters.add(i).read().read()).collect();
        done(double().launch(function, Grid { blocks, threads }, &arguments, stream(on)))
    }
}
