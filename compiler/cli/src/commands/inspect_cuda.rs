//! `kiln inspect` of a model that was compiled for GPUs: kernels, and the memory that a run takes.

use std::path::Path;

use kiln::ArtifactFile;
use kiln::error::sanitize;
use kiln::gpu::{DeviceMemory, Kernel, Module, runs};
use kiln::manifest::{Weights, hex};
use kiln::plan::Step;
use kiln_cuda::Gpu;
use kiln_cuda::driver::Footprint;
use serde_json::{Value, json};

use crate::commands::inspect_artifact::{ports, states};
use crate::commands::ready::opened;
use crate::commands::{cuda, model_name};
use crate::failure::Failure;
use crate::term::{Term, bytes};

/// Prints what the file says of itself. Nothing of it runs; a device is asked where it is named.
pub fn run(
    path: &Path,
    file: ArtifactFile,
    device: Option<usize>,
    term: &Term,
) -> Result<(), Failure> {
    let made = match device {
        Some(ordinal) => Some(assembled(path, ordinal, term)?),
        None => None,
    };
    let (manifest, name) = (&file.manifest, model_name(path));
    let plan = &manifest.plan;
    let memory = DeviceMemory::of(plan, manifest.weights.bytes());
    let beside = match &manifest.weights {
        Weights::Inside { .. } => None,
        Weights::External { file, .. } => Some(sanitize(file)),
    };
    let lists = [
        ("input", ports(&plan.inputs)),
        ("output", ports(&plan.outputs)),
        ("dim", plan.dims.iter().map(|dim| sanitize(&dim.to_string())).collect()),
        ("state", states(plan)),
    ];
    let mut text = format!("{name}\n");
    for (label, lines) in &lists {
        lines.iter().for_each(|line| text += &format!("{label:<9} {line}\n"));
    }
    let [inputs, outputs, dims, states] = lists.map(|(_, lines)| lines);
    let (producer, target) = (sanitize(&manifest.producer), sanitize(&manifest.target));
    let (hash, size) = (hex(&manifest.model_hash), file.file_bytes() as u64);
    for (label, value) in figures(&file, &memory, beside.as_deref()) {
        text += &format!("{label:<9} {value}\n");
    }
    // All versions have the same kernels.
    let kernels = manifest.modules.first().map_or(&[][..], |module: &Module| &module.kernels);
    for step in &plan.steps {
        let made = made.as_ref().and_then(|made| made.get(step.kernel));
        text += &step_text(step, kernels.get(step.kernel), made);
    }
    let footprint = |made: &Footprint| {
        json!({
            "registers": made.registers, "spilled_bytes": made.spilled,
            "shared_bytes": made.shared,
        })
    };
    let step = |step: &Step| json!({ "kernel": step.kernel, "name": sanitize(&step.name) });
    let value = json!({
        "artifact": name, "inputs": inputs, "outputs": outputs, "dims": dims, "states": states,
        "producer": producer, "target": target, "model_hash": hash,
        "file_bytes": size, "weights_file": beside, "weight_bytes": memory.weights,
        "arena_bytes": memory.arena, "port_bytes": memory.ports, "state_bytes": memory.kept,
        "device_bytes": memory.total(),
        "assembled": made.map(|made| made.iter().map(footprint).collect::<Vec<Value>>()),
        "modules": manifest.modules.iter().map(module_json).collect::<Vec<Value>>(),
        "steps": plan.steps.iter().map(step).collect::<Vec<Value>>(),
    });
    term.report(value, &text)
}

/// What the driver of a device makes of each kernel.
fn assembled(path: &Path, ordinal: usize, term: &Term) -> Result<Vec<Footprint>, Failure> {
    let artifact = cuda::artifact(opened(path, term)?, path)?;
    let gpu = Gpu::open(ordinal).map_err(|error| cuda::failure(&error))?;
    let made = term.during("assemble", None, || kiln_cuda::footprints(&gpu, &artifact));
    made.map_err(|error| cuda::failure(&error))
}

/// Lines on the file as a whole.
fn figures(
    file: &ArtifactFile,
    memory: &DeviceMemory,
    beside: Option<&str>,
) -> Vec<(&'static str, String)> {
    let manifest = &file.manifest;
    let version = |sm: u32| match runs(sm, sm + 1) {
        true => format!("sm_{sm} and later"),
        false => format!("sm_{sm}"),
    };
    let versions: Vec<String> = manifest.modules.iter().map(|m| version(m.sm)).collect();
    let place = beside.map_or(String::new(), |file| format!(" in {file}"));
    let mut lines = vec![
        ("producer", sanitize(&manifest.producer)),
        ("target", sanitize(&manifest.target)),
        ("for", versions.join(", ")),
        ("model", format!("blake3 {}", hex(&manifest.model_hash))),
        ("file", bytes(file.file_bytes() as u64)),
        ("text", bytes(file.sections.text.len() as u64)),
        ("weights", format!("{}{place}", bytes(memory.weights))),
        ("arena", bytes(memory.arena)),
        ("ports", bytes(memory.ports)),
    ];
    if memory.kept > 0 {
        lines.push(("states", bytes(memory.kept)));
    }
    let total = bytes(memory.total());
    lines.push(("memory", format!("{total} of the device for one run at a time")));
    lines.push(("steps", manifest.plan.steps.len().to_string()));
    lines
}

fn module_json(module: &Module) -> Value {
    let kernel = |kernel: &Kernel| {
        json!({
            "name": sanitize(&kernel.name), "blocks": kernel.blocks, "threads": kernel.threads,
            "shared_bytes": kernel.shared,
        })
    };
    let kernels = module.kernels.iter().map(kernel).collect::<Vec<Value>>();
    json!({ "sm": module.sm, "text_bytes": module.text.len(), "kernels": kernels })
}

/// A launch: what it computes, and the threads of its kernel.
fn step_text(step: &Step, kernel: Option<&Kernel>, made: Option<&Footprint>) -> String {
    let grid = kernel.map_or(String::new(), |Kernel { blocks, threads, shared, .. }| {
        let shared = match *shared {
            0 => String::new(),
            shared => format!(", {} shared", bytes(shared.into())),
        };
        format!("{blocks} x {threads} threads{shared}")
    });
    let made = made.map_or(String::new(), |made| match made.spilled {
        0 => format!("{:>3} registers  ", made.registers),
        spilled => format!("{:>3} registers, {spilled} bytes spilled  ", made.registers),
    });
    format!("{:>9} {grid:<36} {made}{}\n", step.kernel, sanitize(&step.name))
}
