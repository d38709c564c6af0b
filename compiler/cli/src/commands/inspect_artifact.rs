//! `kiln inspect` of a compiled model: what it is for, and what it consists of.

use std::path::Path;

use kiln::error::sanitize;
use kiln::manifest::{Weights, hex};
use kiln::plan::{Plan, PlanState, Port};
use serde_json::{Value, json};

use crate::commands::ready::opened;
use crate::commands::{inspect_cuda, model_name};
use crate::failure::Failure;
use crate::term::{Term, bytes};

/// Prints what the file says of itself. Nothing of it runs; a device assembles its kernels.
pub fn run(path: &Path, device: Option<usize>, term: &Term) -> Result<(), Failure> {
    let file = opened(path, term)?;
    if !file.manifest.modules.is_empty() {
        return inspect_cuda::run(path, file, device, term);
    }
    let (manifest, name) = (&file.manifest, model_name(path));
    let plan = &manifest.plan;
    let here = file.check_machine().err().map(|error| sanitize(&error.to_string()));
    let (inputs, outputs) = (ports(&plan.inputs), ports(&plan.outputs));
    let (size, text_size) = (file.file_bytes() as u64, file.sections.text.len() as u64);
    let weights = manifest.weights.bytes() as u64;
    let beside = match &manifest.weights {
        Weights::Inside { .. } => None,
        Weights::External { file, .. } => Some(sanitize(file)),
    };
    let features: Vec<String> = manifest.features.iter().map(|name| sanitize(name)).collect();
    let (producer, target) = (sanitize(&manifest.producer), sanitize(&manifest.target));
    let (prefix, hash) = (sanitize(&manifest.name), hex(&manifest.model_hash));
    let place = beside.as_ref().map_or(String::new(), |file| format!(" in {file}"));
    let mut text = format!("{name}\n");
    inputs.iter().for_each(|port| text += &format!("input     {port}\n"));
    outputs.iter().for_each(|port| text += &format!("output    {port}\n"));
    let dims: Vec<String> = plan.dims.iter().map(|dim| sanitize(&dim.to_string())).collect();
    dims.iter().for_each(|dim| text += &format!("dim       {dim}\n"));
    let states = states(plan);
    states.iter().for_each(|state| text += &format!("state     {state}\n"));
    // What the faster kernels need beyond what all of the file does.
    let names = |all: &[String]| all.iter().map(|name| sanitize(name)).collect::<Vec<_>>();
    let faster: Vec<Vec<String>> = manifest.faster.iter().map(|f| names(&f.features)).collect();
    let beyond = |all: &Vec<String>| {
        all.iter().filter(|name| !features.contains(name)).cloned().collect::<Vec<_>>().join(" ")
    };
    for (label, value) in [
        ("producer", producer.clone()),
        ("target", target.clone()),
        ("needs", if features.is_empty() { "nothing".into() } else { features.join(" ") }),
        ("faster", faster.iter().map(beyond).collect::<Vec<_>>().join(" or ")),
        ("here", here.clone().unwrap_or_else(|| "runs".into())),
        ("model", format!("blake3 {hash}")),
        ("prefix", prefix.clone()),
        ("file", bytes(size)),
        ("code", bytes(text_size)),
        ("weights", format!("{}{place}", bytes(weights))),
        ("arena", bytes(plan.arena_bytes as u64)),
        ("kernels", format!("{} in {} steps", manifest.entries.len(), plan.steps.len())),
    ]
    .into_iter()
    .filter(|(label, value)| *label != "faster" || !value.is_empty())
    {
        text += &format!("{label:<9} {value}\n");
    }
    for step in &plan.steps {
        text += &format!("{:>9} {}\n", step.kernel, sanitize(&step.name));
    }
    let step =
        |step: &kiln::plan::Step| json!({ "kernel": step.kernel, "name": sanitize(&step.name) });
    let value = json!({
        "artifact": name, "inputs": inputs, "outputs": outputs, "dims": dims, "states": states,
        "producer": producer, "target": target, "features": features, "faster": faster, "runs_here": here.is_none(), "why": here,
        "model_hash": hash, "prefix": prefix, "file_bytes": size, "text_bytes": text_size,
        "weight_bytes": weights, "weights_file": beside, "arena_bytes": plan.arena_bytes,
        "kernels": manifest.entries.len(),
        "steps": plan.steps.iter().map(step).collect::<Vec<Value>>(),
    });
    term.report(value, &text)
}

/// Inputs or outputs as people read them.
pub fn ports(ports: &[Port]) -> Vec<String> {
    ports.iter().map(|port| sanitize(&port.to_string())).collect()
}

/// Pairs of inputs and outputs that are kept from run to run.
pub fn states(plan: &Plan) -> Vec<String> {
    let pair = |state: &PlanState| {
        let (input, output) = (&plan.inputs[state.input].name, &plan.outputs[state.output].name);
        let how = if state.in_place { " in place" } else { "" };
        format!("{}={}{how}", sanitize(input), sanitize(output))
    };
    plan.states.iter().map(pair).collect()
}
