//! `kiln doctor`: what this machine offers, and whether compiled models can run here.

use kiln::backend::cuda::Gpu;
use kiln::error::sanitize;
use kiln_cuda::CudaError;
use kiln_cuda::driver::Device;
use serde_json::{Value, json};

use crate::args::DoctorArgs;
use crate::failure::{Exit, Failure};
use crate::peak::{self, Peak};
use crate::term::{Term, bytes};

/// Finds out and prints; fails when compiled models cannot run here.
pub fn run(args: &DoctorArgs, term: &Term) -> Result<(), Failure> {
    let folder = args.calibration.calibration.as_deref();
    if folder.is_some() && !args.calibrate {
        return Err(Failure::usage("--calibration is for --calibrate").help("give both"));
    }
    let features = features();
    let lanes = kiln::backend::cpu::Cpu::host(true).target().lanes;
    let vectors = format!("{} bits, {lanes} lanes of f32", 32 * lanes);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = total_memory();
    let limits = kiln::Limits::default();
    let code = kiln::code::Code::load(&[0xc3], vec![0]);
    let code_text = code.as_ref().map_or_else(ToString::to_string, |_| "works".to_string());
    let listed: Vec<&str> = features.iter().filter(|f| f.1).map(|f| f.0).collect();
    let peaks = if args.calibrate { calibrate(threads, term)? } else { Vec::new() };
    let mut rows = vec![
        ("version", env!("CARGO_PKG_VERSION").to_string()),
        ("target", target()),
        ("processor", processor().unwrap_or_else(|| "unknown".into())),
        ("features", if listed.is_empty() { "none".into() } else { listed.join(" ") }),
        ("vectors", vectors.clone()),
        ("threads", threads.to_string()),
        ("memory", memory.map_or("unknown".into(), bytes)),
        ("machine code", code_text.clone()),
        ("node limit", limits.max_nodes.to_string()),
        ("memory limit", bytes(limits.max_bytes)),
    ];
    let (cuda, gpus) = gpus();
    rows.push(("cuda driver", cuda.clone()));
    rows.extend(gpus.iter().map(|gpu| ("gpu", gpu_text(gpu))));
    let file = match args.calibrate {
        true => Some(peak::keep(folder, &peaks)?.display().to_string()),
        false => None,
    };
    rows.extend(
        peaks.iter().map(|peak| ("peak", format!("{} on {} threads", peak.text(), peak.threads))),
    );
    rows.extend(file.clone().map(|file| ("kept in", file)));
    let text: String = rows.iter().map(|(name, row)| format!("{name:<14}{row}\n")).collect();
    let value = json!({
        "ok": code.is_ok(), "version": env!("CARGO_PKG_VERSION"), "target": target(),
        "processor": processor(), "features": listed, "vectors": vectors, "threads": threads,
        "memory_bytes": memory, "machine_code": code_text,
        "peaks": peaks.iter().map(Peak::json).collect::<Vec<Value>>(), "calibration": file,
        "cuda": { "driver": cuda, "devices": gpus.iter().map(gpu_json).collect::<Vec<Value>>() },
        "limits": { "nodes": limits.max_nodes, "bytes": limits.max_bytes },
    });
    term.report(value, &text)?;
    if code.is_err() {
        return Err(Failure::said(Exit::Incompatible));
    }
    Ok(())
}

/// What 1, 2, 4 and more threads can do, up to all.
fn calibrate(all: usize, term: &Term) -> Result<Vec<Peak>, Failure> {
    let powers = (0..).map(|power| 1 << power).take_while(|&threads| threads < all);
    let counts: Vec<usize> = powers.chain([all]).collect();
    term.during("measure the machine", None, || counts.into_iter().map(peak::best).collect())
}

/// The version of NVIDIA's driver, or why there is none, and the devices that it knows.
fn gpus() -> (String, Vec<Device>) {
    let found =
        kiln_cuda::driver_version().and_then(|version| Ok((version, kiln_cuda::devices()?)));
    match found {
        Ok((version, devices)) => (format!("CUDA {version}"), devices),
        Err(CudaError::NoDriver) => ("none".into(), Vec::new()),
        Err(error) => (sanitize(&error.to_string()), Vec::new()),
    }
}

fn gpu_text(gpu: &Device) -> String {
    let Device { ordinal, name, sm, memory, processors, .. } = gpu;
    let runs = match Gpu::for_device(*sm) {
        Some(_) => "",
        None => "; too old for Kiln's kernels",
    };
    let (name, memory) = (sanitize(name), bytes(*memory));
    format!("cuda:{ordinal} {name}, sm_{sm}, {memory}, {processors} multiprocessors{runs}")
}

fn gpu_json(gpu: &Device) -> Value {
    json!({
        "ordinal": gpu.ordinal, "name": sanitize(&gpu.name), "sm": gpu.sm,
        "memory_bytes": gpu.memory, "multiprocessors": gpu.processors,
        "runs": Gpu::for_device(gpu.sm).is_some(),
    })
}

fn target() -> String {
    format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

/// Features that decide which instructions are used, and whether they are here.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<(&'static str, bool)> {
    macro_rules! detect {
        ($($name:tt),*) => { vec![$(($name, std::arch::is_x86_feature_detected!($name))),*] };
    }
    detect!(
        "sse4.2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512vnni",
        "avx512bf16",
        "avx512fp16",
        "avxvnni"
    )
}

/// Features that decide which instructions are used, and whether they are here.
#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

/// What the system calls the processor.
pub fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: Value = serde_json::from_str(line.trim().trim_end_matches("kB").trim()).ok()?;
    Some(kib.as_u64()? * 1024)
}
