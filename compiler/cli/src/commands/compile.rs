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
    let contents = match emit {
        Emit::Graph => text(&stages.graph),
        Emit::Fused => text(&stages.fused),
        Emit::Loops => text(&stages.loops),
        Emit::Clif => text(&stages.clif),
        Emit::Asm => text(&stages.asm),
        Emit::Plan => text(&stages.plan),
        Emit::Obj => stages.obj,
    };
    if emit == Emit::Clif && contents.is_empty() {
        term.note("note: every kernel is wide code here; --no-wide shows Cranelift's form");
    }
    let Some(path) = &args.output else {
        return files::write(Path::new("-"), |out| out.write_all(&contents));
    };
    files::write(path, |out| out.write_all(&contents))?;
    let (name, size) = (model_name(path), contents.len());
    term.note(format_args!("wrote {name} ({})", bytes(size as u64)));
    if term.json {
        let model = model_name(&args.model.model);
        let value = json!({ "ok": true, "model": model, "output": name, "bytes": size });
        return term.report(value, "");
    }
    Ok(())
}

/// Text without the control characters that names of a model may bring in.
fn text(stage: &str) -> Vec<u8> {
    let clean = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    stage.chars().map(clean).collect::<String>().into_bytes()
}
