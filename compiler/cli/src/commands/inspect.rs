//! `kiln inspect`: what a model consists of.

use std::collections::BTreeMap;

use kiln::error::sanitize;
use kiln::tensor::{DType, SMALL};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::commands::{inspect_artifact, model_name, open};
use crate::device::Place;
use crate::failure::Failure;
use crate::term::{Term, bytes};

/// Whether an input or output is a tensor of that dtype.
fn has(port: &kiln::ModelPort, dtype: &str) -> bool {
    port.ty.strip_prefix(dtype).is_some_and(|shape| shape.starts_with('['))
}

/// Prints inputs, outputs, operators and sizes.
pub fn run(args: &InspectArgs, term: &Term) -> Result<(), Failure> {
    let path = &args.model.model;
    let device = match args.device {
        Some(Place::Cuda(ordinal)) if kiln::is_cuda_artifact(path) => Some(ordinal),
        Some(_) => {
            return Err(Failure::usage("--device shows what its driver makes of a .kiln file")
                .help("leave --device out, or write such a file: kiln compile --device cuda"));
        }
        None => None,
    };
    if kiln::is_artifact(path) {
        return inspect_artifact::run(path, device, term);
    }
    let (model, _) = open(&args.model, term)?;
    let mut ops: BTreeMap<String, usize> = BTreeMap::new();
    for node in model.nodes() {
        *ops.entry(sanitize(&node.op)).or_default() += 1;
    }
    let mut ops: Vec<(String, usize)> = ops.into_iter().collect();
    ops.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let name = model_name(&args.model.model);
    let ports = |ports: &[kiln::ModelPort]| -> Vec<String> {
        ports.iter().map(|port| sanitize(&port.to_string())).collect()
    };
    let (inputs, outputs) = (ports(model.inputs()), ports(model.outputs()));
    let mut text = format!("{name}\n");
    inputs.iter().for_each(|port| text += &format!("input     {port}\n"));
    outputs.iter().for_each(|port| text += &format!("output    {port}\n"));
    let all = || model.inputs().iter().chain(model.outputs());
    for (small, name) in SMALL.into_iter().filter(|s| all().any(|port| has(port, s.1))) {
        // Files of NumPy have no name for it.
        let stored = DType::Small(small).stored();
        text += &format!("in .npy   {name} is {stored}, a byte for each\n");
    }
    text += &format!("opset     {}\n", model.opset());
    text += &format!("weights   {}\n", bytes(model.weight_bytes()));
    text += &format!("nodes     {}\n", model.nodes().len());
    ops.iter().for_each(|(op, count)| text += &format!("{count:>9} {op}\n"));
    let rows = ops.iter().map(|(op, count)| json!({ "op": op, "count": count }));
    let value = json!({
        "model": name, "inputs": inputs, "outputs": outputs, "opset": model.opset(),
        "weight_bytes": model.weight_bytes(), "nodes": model.nodes().len(),
        "ops": rows.collect::<Vec<Value>>(),
    });
    term.report(value, &text)
}
