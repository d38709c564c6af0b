//! The part of `benches/cuda` that is Kiln's: a program that can be carried to a machine with a
//! GPU.
//!
//! ```text
//! kiln-gpu cases [--suite FOLDER]   the interpreter's cases on the device: what differs
//! kiln-gpu serve                    times what it is asked for, line by line
//! --device N                        the GPU of that number
//! --double                          a driver without a device, to try this without a GPU
//! ```
//! It prints one JSON object a line, the first one on the device. Without a device it says why, and
//! ends with code 5.

mod cases;
mod graphs;
mod serve;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use kiln::backend::cuda::Gpu as Isa;
use kiln_cuda::{CudaError, Gpu};
use kiln_gpu::{Behaviour, Double};
use serde_json::{Value, json};

/// Results that differ from what they should be, as of `kiln verify`.
const MISMATCH: u8 = 4;
/// No device that can run it.
const INCOMPATIBLE: u8 = 5;

/// What the arguments ask for.
#[derive(Default)]
struct Asked {
    command: String,
    suite: Option<PathBuf>,
    device: usize,
    double: bool,
}

fn asked() -> Result<Asked, String> {
    let mut asked = Asked::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--suite" => asked.suite = Some(value()?.into()),
            "--device" => asked.device = value()?.parse().map_err(|_| "--device N".to_string())?,
            "--double" => asked.double = true,
            "cases" | "serve" => asked.command = arg,
            other => return Err(format!("`{other}` is neither cases, serve nor a flag")),
        }
    }
    match asked.command.is_empty() {
        true => Err("say cases or serve".into()),
        false => Ok(asked),
    }
}

/// Prints an object, at once: somebody waits for it.
fn say(value: &Value) {
    let mut out = std::io::stdout().lock();
    // Whoever has gone needs no answer.
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// The device, and the instruction set of its kernels.
fn open(asked: &Asked) -> Result<(Gpu, Isa), CudaError> {
    let gpu = match asked.double {
        true => Gpu::with(Double::new(Behaviour { early: true, ..Behaviour::default() })),
        false => Gpu::open(asked.device)?,
    };
    let device = gpu.device().clone();
    match Isa::for_device(device.sm) {
        Some(isa) => Ok((gpu, isa)),
        None => Err(CudaError::Architecture { device, made_for: Isa::known() }),
    }
}

fn main() -> ExitCode {
    let asked = match asked() {
        Ok(asked) => asked,
        Err(why) => {
            say(&json!({ "error": why }));
            return ExitCode::from(2);
        }
    };
    let (gpu, isa) = match open(&asked) {
        Ok(opened) => opened,
        Err(error) => {
            say(&json!({ "error": error.to_string(), "help": error.help() }));
            return ExitCode::from(INCOMPATIBLE);
        }
    };
    let device = gpu.device();
    let driver =
        if asked.double { "none".into() } else { kiln_cuda::driver_version().unwrap_or_default() };
    say(&json!({
        "device": device.name, "sm": device.sm, "memory_bytes": device.memory, "driver": driver,
        "kernels_for": isa.sm, "version": env!("CARGO_PKG_VERSION"),
    }));
    match asked.command.as_str() {
        "cases" => match cases::all(&gpu, isa, asked.suite.as_deref()) {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(MISMATCH),
        },
        _ => {
            serve::serve(&gpu, isa);
            ExitCode::SUCCESS
        }
    }
}
