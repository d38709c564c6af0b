//! `kiln ops`: the operators that the importer knows.

use serde_json::{Value, json};

use crate::args::OpsArgs;
use crate::failure::Failure;
use crate::term::Term;

/// Prints the table of operators.
pub fn run(args: &OpsArgs, term: &Term) -> Result<(), Failure> {
    let filter = args.filter.as_deref().unwrap_or("").to_ascii_lowercase();
    let all = kiln::onnx::ops();
    let ops = all.iter().filter(|op| op.name.to_ascii_lowercase().contains(&filter));
    let rows: Vec<(String, i64, i64)> =
        ops.map(|op| (op.name.to_string(), op.since, op.until)).collect();
    let list: Vec<Value> = rows
        .iter()
        .map(|(name, since, until)| json!({ "name": name, "since": since, "until": until }))
        .collect();
    let mut text: String = rows
        .iter()
        .map(|(name, since, until)| format!("{name:<32} opset {since} to {until}\n"))
        .collect();
    if args.filter.is_none() {
        text += &format!("{} operators\n", rows.len());
    }
    term.report(json!({ "ops": list }), &text)
}
