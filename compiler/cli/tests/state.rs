//! States: kept from run to run, in models that are compiled in memory and in files.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::path::Path;

use common::{Folder, expect, json, pb};
use serde_json::{Value, json};

/// A row is put behind those before it, and all are added up; it counts as well.
fn model() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/cache.onnx");
    path.display().to_string()
}

const FLAGS: [&str; 6] =
    ["--dim", "past=0..4", "--state", "past_*=present_*", "--state", "count=next_count"];

fn outputs(value: &Value) -> Vec<(&str, &Value)> {
    let outputs = value["outputs"].as_array().expect("outputs");
    let name = |output: &Value| output["name"].as_str().expect("a name").to_string();
    let names = outputs.iter().map(name).collect::<Vec<_>>();
    assert_eq!(names, ["total", "present_rows", "next_count"]);
    outputs.iter().map(|o| (o["name"].as_str().unwrap_or_default(), o)).collect()
}

fn check(steps: usize, value: &Value) {
    let outputs = outputs(value);
    let (n, steps) = (steps as f64, steps);
    assert_eq!(outputs[0].1["first"], json!([n, 2.0 * n]));
    assert_eq!(outputs[1].1["shape"], json!([steps, 2]));
    assert_eq!(outputs[2].1["first"], json!([n]));
}

#[test]
fn a_run_of_some_steps_keeps_what_each_of_them_leaves() {
    let folder = Folder::new();
    let (model, row) = (model(), folder.write("row.pb", &pb(&[1, 2], &[1.0, 2.0])));
    let row = format!("row={row}");
    for steps in ["1", "4"] {
        let value = json(0, &[&["run", &model, "-i", &row, "--steps", steps], &FLAGS[..]].concat());
        check(steps.parse().expect("a number"), &value);
    }
    let (_, err) = expect(2, &[&["run", &model, "-i", &row, "--steps", "6"], &FLAGS[..]].concat());
    assert!(err.contains("dim `past` 5, expected 0 to 4"), "{err}");
    // It goes on from rows that are given.
    let past = folder.write("past.pb", &pb(&[2, 2], &[1.0, 2.0, 1.0, 2.0]));
    let count = folder.write("count.pb", &pb(&[1], &[2.0]));
    let (past, count) = (format!("past_rows={past}"), format!("count={count}"));
    let given = ["-i", &past, "-i", &count];
    let value = json(0, &[&["run", &model, "-i", &row], &given[..], &FLAGS].concat());
    check(3, &value);
    // Without states it is an ordinary model.
    check(3, &json(0, &[&["run", &model, "-i", &row], &given[..]].concat()));
}

#[test]
fn compiled_files_keep_their_states() {
    let folder = Folder::new();
    let (model, artifact) = (model(), folder.path("cache.so"));
    let row = format!("row={}", folder.write("row.pb", &pb(&[1, 2], &[1.0, 2.0])));
    expect(0, &[&["compile", &model, "-o", &artifact], &FLAGS[..]].concat());
    let (out, _) = expect(0, &["inspect", &artifact]);
    assert!(out.contains("state     past_rows=present_rows in place"), "{out}");
    assert!(out.contains("state     count=next_count\n"), "{out}");
    check(4, &json(0, &["run", &artifact, "-i", &row, "--steps", "4"]));
    json(0, &["bench", &artifact, "--time", "1ms", "--warmup", "1ms"]);
    expect(0, &["verify", &artifact, "--model", &model]);
    let (_, err) = expect(2, &[&["run", &artifact, "-i", &row], &FLAGS[2..4]].concat());
    assert!(err.contains("--state is for models that are compiled"), "{err}");
}

#[test]
fn pairs_that_do_not_fit_are_named() {
    let model = model();
    let with = |flags: &[&str]| {
        let (_, err) = expect(2, &[&["compile", &model, "--emit", "plan"], flags].concat());
        err
    };
    let range = ["--dim", "past=0..4", "--state"];
    let err = with(&[&range[..], &["rows=present_rows"]].concat());
    assert!(err.contains("no such input") && err.contains("past_rows"), "{err}");
    let err = with(&[&range[..], &["past_*=presents_*"]].concat());
    assert!(err.contains("no such output") && err.contains("presents_rows"), "{err}");
    let err = with(&[&range[..], &["past_*=present_rows"]].concat());
    assert!(err.contains("a * in one name"), "{err}");
    let err = with(&[&range[..], &["row=total"]].concat());
    assert!(err.contains("row=total") && err.contains("f32[1,2]"), "{err}");
    let twice = ["past_rows=present_rows", "--state", "past_*=present_*"];
    let err = with(&[&range[..], &twice].concat());
    assert!(err.contains("part of two states"), "{err}");
    // A cache grows: its dim needs a range.
    let err = with(&["--dim", "past=4", "--state", "past_rows=present_rows"]);
    assert!(err.contains("give the dim a range"), "{err}");
    assert!(with(&["--state", "past_rows"]).contains("INPUT=OUTPUT"));
}
