//! The ONNX backend suite, interpreted and compiled, against a ledger.
//!
//! Every case passes or has a reason in `tests/ledger.txt`; a case that does better than its line
//! fails as one that does worse does. `BLESS=1` writes the ledger.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use kiln::Compiler;
use kiln::graph::Graph;
use kiln::graph::eval::Value;
use kiln::tensor::Tensor;
use kiln_tests::suite::{Given, KINDS, cases, given, reason, run_all};
use kiln_tests::{ONNX, difference, interpret, oracle, run_compiled};

fn compare(got: &[Tensor], want: &[Tensor]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} outputs, expected {}", got.len(), want.len()));
    }
    match got.iter().zip(want).find_map(|(got, want)| difference(got, want, ONNX)) {
        Some(difference) => Err(difference),
        None => Ok(()),
    }
}

/// What the ledger says of a case.
fn outcome(folder: &Path) -> Result<String, String> {
    let Given { graph, inputs, outputs, names } = given(folder)?;
    compare(&interpret(&graph, &inputs), &outputs).map_err(|e| format!("differs: {e}"))?;
    let constants: Vec<&str> =
        names.iter().filter(|n| graph.inputs.iter().all(|p| p.0 != **n)).map(|n| &n[..]).collect();
    let note = match constants.as_slice() {
        [] => String::new(),
        names => format!(" with constant {}", names.join(" ")),
    };
    let compiled = run_compiled(&graph, &inputs, &Compiler::new()).map_err(|e| reason(&e));
    match compiled.and_then(|got| compare(&got, &outputs)) {
        Ok(()) => {
            check_loops(&graph, &inputs, &outputs).map_err(|e| format!("loops: {e}"))?;
            Ok(format!("pass{note}"))
        }
        Err(why) => Ok(format!("interpreted{note}; compiled: {why}")),
    }
}

/// The loops of what compiles: their text reads back, and their interpreter gives the outputs.
fn check_loops(graph: &Graph, inputs: &[Tensor], outputs: &[Tensor]) -> Result<(), String> {
    let compiler = Compiler::new();
    let kernels = compiler.optimise(graph).map_err(|e| reason(&e))?;
    let program = compiler.lower(&kernels).map_err(|e| reason(&e))?;
    for kernel in &program.kernels {
        let text = kiln::loops::text::print(kernel);
        let again = kiln::loops::text::parse(&text).map_err(|e| e.to_string())?;
        // As text: a NaN is not equal to itself.
        if format!("{again:?}") != format!("{:?}", [kernel]) {
            return Err(format!("the text reads back as another kernel: {text}"));
        }
    }
    let inputs: Vec<Value> = inputs.iter().map(Value::from_tensor).collect();
    let found = kiln::plan::eval::eval(&kernels, &program, &inputs).map_err(|e| e.to_string())?;
    let different = found
        .iter()
        .zip(outputs)
        .find_map(|(found, want)| difference(&found.to_tensor(), want, ONNX));
    different.map_or(Ok(()), Err)
}

fn summary(results: &BTreeMap<String, String>, kind: &str) -> String {
    let of_kind = results.iter().filter(|r| r.0.starts_with(kind)).map(|r| r.1.as_str());
    let lines: Vec<&str> = of_kind.collect();
    let count = |start: &str| lines.iter().filter(|l| l.starts_with(start)).count();
    let (pass, specialised) = (count("pass"), count("pass with"));
    format!(
        "{kind}: {pass} of {} pass ({specialised} with inputs made constants), {} more interpreted",
        lines.len(),
        count("interpreted"),
    )
}

#[test]
fn every_case_is_as_the_ledger_says() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let results = run_all(&cases(&data), outcome);
    let line = |result: Result<String, String>| match result {
        Ok(line) => line,
        Err(why) if why.starts_with("PANIC") => why,
        Err(why) => format!("no: {why}"),
    };
    let results: BTreeMap<String, String> =
        results.into_iter().map(|(name, result)| (name, line(result).replace('\n', " "))).collect();
    for kind in KINDS {
        println!("{}", summary(&results, kind));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ledger.txt");
    let mut text = String::from(
        "# What becomes of each case of the ONNX 1.22.0 suite; BLESS=1 writes this file.\n",
    );
    for (name, line) in &results {
        writeln!(text, "{name} | {line}").expect("a string takes all");
    }
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &text).expect("the ledger can be written");
    }
    let panics: Vec<_> = results.iter().filter(|r| r.1.starts_with("PANIC")).collect();
    assert!(panics.is_empty(), "panics: {panics:#?}");
    let ledger = std::fs::read_to_string(&path).unwrap_or_default();
    let known: std::collections::BTreeSet<&str> = ledger.lines().collect();
    let news: Vec<&str> = text.lines().filter(|l| !known.contains(l)).collect();
    assert!(news.is_empty(), "{} lines are not in the ledger:\n{}", news.len(), news.join("\n"));
    assert_eq!(ledger.lines().count(), text.lines().count(), "cases of the ledger");
}
