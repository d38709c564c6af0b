//! `kiln run`: compiles a model in memory, or loads a compiled one, and runs it.

use std::path::Path;
use std::time::Instant;

use kiln::error::sanitize;
use kiln::plan::Port;
use kiln::tensor::{Tensor, TensorView};
use kiln::{Executable, OnDemand, RunError};
use serde_json::{Value, json};

use crate::args::RunArgs;
use crate::commands::again::{Split, split};
use crate::commands::ready::{Found, find};
use crate::commands::{cuda, model_name};
use crate::failure::Failure;
use crate::files;
use crate::input::{Given, Inputs};
use crate::stats::values;
use crate::term::{Term, milliseconds};

/// Runs the model and writes its outputs, or a summary of them.
pub fn run(args: &RunArgs, term: &Term) -> Result<(), Failure> {
    let (device, given) = (&args.device, &args.given);
    let on_device = cuda::on_device(device, &given.model, term, |gpu| {
        let ready = cuda::ready(gpu, device, given, false, term)?;
        let outputs = cuda::steps(&ready.model, &ready.inputs, (args.steps, false), term);
        outputs.map_err(|error| cuda::failure(&error))
    })?;
    let outputs = match on_device {
        Some(outputs) => outputs,
        None => match find(given, false, term)? {
            Found::Whole(ready) => {
                let outputs = steps(&ready.executable, &ready.inputs, args.steps, term);
                outputs.map_err(|error| Failure::usage(error.to_string()))?
            }
            Found::Staged(on_demand, given) => stages(&on_demand, &given, args.steps, term)?,
        },
    };
    let Some(path) = &args.output else {
        let name = model_name(&args.given.model.model);
        let list: Vec<Value> = outputs.iter().map(|(name, t)| summary_json(name, t)).collect();
        let text: String = outputs.iter().map(|(name, t)| summary(name, t)).collect();
        return term.report(json!({ "ok": true, "model": name, "outputs": list }), &text);
    };
    write(path, &outputs)?;
    term.note(format_args!("wrote {}", model_name(path)));
    if term.json {
        term.report(json!({ "ok": true, "output": model_name(path) }), "")?;
    }
    Ok(())
}

/// Runs so many times; the outputs of the last run, with the states that it leaves.
pub fn steps(
    executable: &Executable,
    inputs: &Inputs,
    count: u32,
    term: &Term,
) -> Result<Vec<(String, Tensor)>, RunError> {
    let (mut session, plan) = (executable.session(), executable.plan());
    let Split { states, others, .. } = split(plan, inputs);
    for (name, value) in states {
        session.set_state(name, value)?;
    }
    let mut outputs = Vec::new();
    for step in 0..count {
        let begin = Instant::now();
        outputs = session.run(&others)?;
        term.detail(format_args!("run {}: {}", step + 1, milliseconds(begin.elapsed())));
    }
    for state in &plan.states {
        let value = session.state(&plan.inputs[state.input].name);
        let name = plan.outputs[state.output].name.clone();
        outputs.extend(value.map(|value| (name, value)));
    }
    let place = |name: &str| plan.outputs.iter().position(|port| port.name == name);
    outputs.sort_by_key(|(name, _)| place(name));
    Ok(outputs)
}

/// Runs so many times a model that is compiled in stages; the first run compiles.
fn stages(
    on_demand: &OnDemand,
    given: &Given,
    count: u32,
    term: &Term,
) -> Result<Vec<(String, Tensor)>, Failure> {
    let inputs = given.all();
    let mut outputs = Vec::new();
    for step in 0..count {
        let begin = Instant::now();
        outputs = on_demand.run(&inputs)?;
        term.detail(format_args!("run {} in stages: {}", step + 1, milliseconds(begin.elapsed())));
    }
    Ok(outputs)
}

fn write(path: &Path, outputs: &[(String, Tensor)]) -> Result<(), Failure> {
    let views: Vec<(&str, TensorView<'_>)> =
        outputs.iter().map(|(name, tensor)| (name.as_str(), tensor.view())).collect();
    let extension = path.extension().and_then(|extension| extension.to_str());
    match (extension, views.as_slice()) {
        (Some("npz"), views) => files::write(path, |mut out| kiln::npz::write_npz(&mut out, views)),
        (Some("npy"), [(_, view)]) => {
            files::write(path, |mut out| kiln::npz::write_npy(&mut out, *view))
        }
        (Some("npy"), _) => {
            let text = format!("a .npy file holds one tensor, the model has {}", views.len());
            Err(Failure::usage(text).help("write a .npz file"))
        }
        _ => Err(Failure::usage(format!("{}: neither .npz nor .npy", path.display()))),
    }
}

/// Smallest, largest and mean element; NaN and infinities are left out and counted.
fn figures(values: &[f64]) -> (f64, f64, f64, usize) {
    let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    let min = finite.iter().copied().fold(f64::INFINITY, f64::min);
    let max = finite.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mean = finite.iter().sum::<f64>() / finite.len() as f64;
    (min, max, mean, values.len() - finite.len())
}

fn port(name: &str, tensor: &Tensor) -> String {
    Port::new(sanitize(name), tensor.dtype(), tensor.shape()).to_string()
}

fn summary(name: &str, tensor: &Tensor) -> String {
    let values = values(tensor);
    let first: Vec<String> = values.iter().take(8).map(|value| format!("{value:.6}")).collect();
    let more = if values.len() > 8 { " ..." } else { "" };
    let mut text = format!("{}\n  {}{more}\n", port(name, tensor), first.join(" "));
    let (min, max, mean, odd) = figures(&values);
    if values.len() > odd {
        text += &format!("  min {min:.6}  max {max:.6}  mean {mean:.6}\n");
    }
    if odd > 0 {
        text += &format!("  {odd} elements are not finite\n");
    }
    text
}

fn summary_json(name: &str, tensor: &Tensor) -> Value {
    let values = values(tensor);
    let (min, max, mean, odd) = figures(&values);
    // JSON has no infinities: where nothing is finite these become null.
    json!({
        "name": sanitize(name), "dtype": tensor.dtype().name(), "shape": tensor.shape(),
        "min": min, "max": max, "mean": mean, "not_finite": odd,
        "first": values.iter().take(8).collect::<Vec<_>>(),
    })
}
