//! The driver without a device behind the functions of NVIDIA's library, so that the command runs
//! whole on a machine without a GPU: found, opened, called by the same bindings as the real one.
//!
//! `KILN_FAKE_CUDA` says how it behaves: words such as `devices=0 sm=75 memory=1000`. What was not
//! allowed, or is not taken back when the device is closed, goes to the file
//! `KILN_FAKE_CUDA_REPORT`.

// The signatures are NVIDIA's; callers vouch for pointers as they do there.
#![allow(non_snake_case)]

mod calls;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, OnceLock};

use kiln_cuda::driver::{Answer, Fault, FaultKind};
use kiln_gpu::{Behaviour, Double};

/// `CUDA_SUCCESS`.
pub(crate) const SUCCESS: c_int = 0;

/// What the environment asks for.
struct Asked {
    devices: c_int,
    double: Arc<Double>,
}

fn asked() -> &'static Asked {
    static ASKED: OnceLock<Asked> = OnceLock::new();
    ASKED.get_or_init(|| {
        let (mut devices, mut behaviour) = (1, Behaviour::default());
        let text = std::env::var("KILN_FAKE_CUDA").unwrap_or_default();
        for (name, value) in text.split_whitespace().filter_map(|word| word.split_once('=')) {
            let value: u64 = value.parse().expect("a number");
            match name {
                "devices" => devices = value as c_int,
                "sm" => behaviour.sm = value as u32,
                "memory" => behaviour.memory = value,
                _ => panic!("KILN_FAKE_CUDA: {name}"),
            }
        }
        Asked { devices, double: Double::new(behaviour) }
    })
}

pub(crate) fn double() -> &'static Double {
    &asked().double
}

/// The number of an error.
fn code(fault: &Fault) -> c_int {
    match fault.kind {
        FaultKind::Memory => 2,
        FaultKind::Assembly => 218,
        FaultKind::Broken => 700,
        FaultKind::Other => 1,
    }
}

/// Hands an answer to the caller.
///
/// # Safety
/// The pointer is one to write to.
pub(crate) unsafe fn give<T, U>(answer: Answer<T>, to: *mut U, of: impl FnOnce(T) -> U) -> c_int {
    match answer {
        Ok(value) => {
            // SAFETY: the caller vouches for it.
            unsafe { to.write(of(value)) };
            SUCCESS
        }
        Err(fault) => code(&fault),
    }
}

pub(crate) fn done(answer: Answer<()>) -> c_int {
    answer.map_or_else(|fault| code(&fault), |()| SUCCESS)
}

/// A handle of the driver without a device as a pointer.
pub(crate) fn handle(number: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(number as usize)
}

/// Writes a text and the zero that ends it, cut to what there is room for.
///
/// # Safety
/// The pointer is one to write so many bytes to.
pub(crate) unsafe fn write(text: &str, to: *mut c_char, room: usize) {
    let bytes = &text.as_bytes()[..text.len().min(room.saturating_sub(1))];
    // SAFETY: the caller vouches for it.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), bytes.len());
        to.add(bytes.len()).write(0);
    }
}

/// A name or description of an error.
pub(crate) fn text(code: c_int) -> &'static CStr {
    match code {
        2 => c"out of memory",
        100 => c"no device",
        218 => c"a PTX JIT compilation failed",
        700 => c"an illegal memory access was encountered",
        _ => c"another error",
    }
}

pub(crate) fn devices() -> c_int {
    asked().devices
}

/// Writes down what was not allowed, now that the device is closed.
pub(crate) fn report() {
    if let Ok(path) = std::env::var("KILN_FAKE_CUDA_REPORT") {
        std::fs::write(path, double().problems().join("\n")).expect("a report");
    }
}
