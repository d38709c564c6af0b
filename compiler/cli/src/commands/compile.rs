//! `kiln compile`: a stage of the pipeline as text, or an object file.

use std::io::IsTerminal;
use std::path::Path;

use serde_json::json;

use crate::args::{CompileArgs, Emit};
use crate::commands::{compiler, model_name, open};
use crate::failure::Failure;
use crate::files;
use crate::term::{Term, bytes};

/// Compiles and writes what was asked for.
pub fn run(args: &CompileArgs, term: &Term) -> Result<(), Failure> {
    let default = if args.output.is_some() { Emit::Obj } else { Emit::Plan };
    let emit = args.emit.unwrap_or(default);
    let to_terminal = args.output.is_none() && std::io::stdout().is_terminal();
    if emit == Emit::Obj && to_terminal {
        return Err(Failure::usage("an object file is no text for a terminal")
            .help("give a file with -o model.o"));
    }
    let (model, _) = open(&args.model, term)?;
    let compiler = compiler(&args.model, &args.build);
    let stages = term.during("compile", None, || compiler.stages(&model))?;
    let contents: &[u8] = match emit {
        Emit::Graph => stages.graph.as_bytes(),
        Emit::Fused => stages.fused.as_bytes(),
        Emit::Loops => stages.loops.as_bytes(),
        Emit::Clif => stages.clif.as_bytes(),
        Emit::Asm => stages.asm.as_bytes(),
        Emit::Plan => stages.plan.as_bytes(),
        Emit::Obj => &stages.obj,
    };
    let Some(path) = &args.output else {
        return files::write(Path::new("-"), |out| out.write_all(contents));
    };
    files::write(path, |out| out.write_all(contents))?;
    let (name, size) = (model_name(path), contents.len());
    term.note(format_args!("wrote {name} ({})", bytes(size as u64)));
    if term.json {
        let model = model_name(&args.model.model);
        let value = json!({ "ok": true, "model": model, "output": name, "bytes": size });
        return term.report(value, "");
    }
    Ok(())
}
