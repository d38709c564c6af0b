//! `kiln verify` of a compiled model: against stored outputs, and the model it was made of.

use std::time::Instant;

use kiln::error::sanitize;
use kiln::graph::eval::{Value as Meaning, eval};
use kiln::tensor::{Tensor, TensorView};
use kiln::{ArtifactFile, Precision};

use crate::args::{BuildArgs, ModelArgs, VerifyArgs};
use crate::commands::ready::{complete, loaded, opened, refuse_flags};
use crate::commands::run::steps;
use crate::commands::verify::{Row, report, row, stored};
use crate::commands::{compiler, cuda, open};
use crate::failure::{Exit, Failure};
use crate::input::{self, Inputs};
use crate::stats::Tolerance;
use crate::term::Term;

/// Compares and prints; fails with [`Exit::Mismatch`] when anything differs.
pub fn run(args: &VerifyArgs, term: &Term) -> Result<(), Failure> {
    let tolerance = Tolerance::of(args.rtol, args.atol, args.build.precision);
    if args.kernels {
        let text = "--kernels compares each kernel with the model, which must be an .onnx file";
        return Err(Failure::usage(text));
    }
    if args.reduce.is_some() {
        return Err(Failure::usage("--reduce needs the graph of the model: an .onnx file"));
    }
    // With the model at hand its flags mean something.
    let own = ModelArgs { model: args.model.model.clone(), ..ModelArgs::default() };
    let (model, build) = match args.reference {
        Some(_) => (&own, &BuildArgs { precision: Precision::F32, ..args.build.clone() }),
        None => (&args.model, &args.build),
    };
    refuse_flags(model, build, &args.cache)?;
    let begin = Instant::now();
    let file = opened(&args.model.model, term)?;
    let model_hash = file.manifest.model_hash;
    let (inputs, found) = found(args, file, begin, term)?;
    let mut rows: Vec<Row> = Vec::new();
    if let Some(reference) = &args.reference {
        let reference = ModelArgs { model: reference.clone(), ..args.model.clone() };
        let expected = interpret(args, &reference, &inputs, model_hash, term)?;
        for (name, tensor) in &found {
            let same = expected.iter().find(|(output, _)| output == name);
            let (_, expected) = same.ok_or_else(|| {
                Failure::usage(format!("the model has no output `{name}`; is it another one?"))
            })?;
            if tensor.shape() != expected.shape() || tensor.dtype() != expected.dtype() {
                let text = format!("output `{name}` has another type in the model");
                return Err(Failure::usage(text));
            }
            rows.push(row(name, "interpreter", tensor, expected, tolerance));
        }
    }
    rows.extend(stored(&found, &inputs, tolerance));
    if rows.is_empty() {
        let text = "there is nothing to compare the compiled model with";
        return Err(Failure::usage(text)
            .help("give a folder with output_K.pb by -i, or the .onnx file by --model"));
    }
    report(args, &rows, None, None, term)?;
    let wrong = rows.iter().any(|row| row.difference.outside > 0);
    if wrong { Err(Failure::said(Exit::Mismatch)) } else { Ok(()) }
}

/// Inputs, and what the compiled model gives for them, on the device that it is for.
fn found(
    args: &VerifyArgs,
    file: ArtifactFile,
    begin: Instant,
    term: &Term,
) -> Result<(Inputs, Vec<(String, Tensor)>), Failure> {
    let path = &args.model.model;
    if file.manifest.modules.is_empty() {
        // Flags for GPUs are refused.
        cuda::on_device(&args.device, &args.model, term, |_| Ok(()))?;
        let ready = loaded(file, path, &args.build, &args.inputs, true, begin)?;
        let found = steps(&ready.executable, &ready.inputs, 1, term);
        return Ok((ready.inputs, found.map_err(|error| Failure::usage(error.to_string()))?));
    }
    let artifact = cuda::artifact(file, path)?;
    let done = cuda::on_device(&args.device, &args.model, term, |gpu| {
        let names = artifact.plan.inputs.iter().map(|port| port.name.clone()).collect();
        let given = input::gather(names, &args.inputs, true)?;
        let inputs = complete(given, &artifact.plan, true)?;
        let (model, _) = cuda::load(gpu, &args.device, &artifact, term)?;
        let found = cuda::steps(&model, &inputs, (1, false), term);
        Ok((inputs, found.map_err(|error| cuda::failure(&error))?))
    })?;
    Ok(done.expect("a model for GPUs runs on one, or fails"))
}

/// What the model means on these inputs.
fn interpret(
    args: &VerifyArgs,
    reference: &ModelArgs,
    inputs: &Inputs,
    model_hash: [u8; 32],
    term: &Term,
) -> Result<Vec<(String, Tensor)>, Failure> {
    let (model, _) = open(reference, term)?;
    if model.hash() != model_hash {
        term.note("note: the compiled model was made from another file than that of --model");
    }
    let given: Vec<(&str, TensorView<'_>)> = model
        .inputs()
        .iter()
        .filter_map(|port| inputs.named().into_iter().find(|(name, _)| *name == port.name))
        .collect();
    let compiler = compiler(reference, &args.build);
    let graph = compiler.for_inputs(&model, &given)?.graph(&model)?;
    let tensor = |(name, _): &(String, _)| {
        let tensor = inputs.tensors.iter().find(|(input, _)| input == name);
        tensor.map(|(_, tensor)| Meaning::from_tensor(tensor)).ok_or_else(|| {
            let name = sanitize(name);
            Failure::usage(format!("the model has an input `{name}`, the compiled model has none"))
        })
    };
    let values = graph.inputs.iter().map(tensor).collect::<Result<Vec<_>, _>>()?;
    let expected = term.during("interpret", None, || eval(&graph, &values));
    let names = graph.outputs.iter().map(|(name, _)| name.clone());
    Ok(names.zip(expected.iter().map(Meaning::to_tensor)).collect())
}
