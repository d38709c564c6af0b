//! `kiln profile`: what it says of each kernel, and the files that it writes and reads.

mod common;

use std::fs;
use std::path::Path;

use common::{Folder, expect, json, shipped};
use serde_json::{Value, json};

const QUICK: [&str; 4] = ["--warmup", "1ms", "--time", "20ms"];

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().unwrap_or_else(|| panic!("{name} is a list"))
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("{name} is a number: {value}"))
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * b.abs().max(1e-9)
}

/// What must hold of everything that the command says as JSON.
fn check(value: &Value) {
    let peak = &value["peak"];
    let (gflops, gb) = (number(peak, "gflops"), number(peak, "gb_per_s"));
    assert!(gflops > 0.0 && gb > 0.0 && number(value, "runs") >= 5.0);
    assert_eq!(peak["threads"], value["threads"]);
    let sum = |name: &str| list(value, "kernels").iter().map(|row| number(row, name)).sum::<f64>();
    for row in list(value, "kernels") {
        let (us, flops, bytes) = (number(row, "us"), number(row, "flops"), number(row, "bytes"));
        let least = [flops / gflops, bytes / gb].map(|ns| ns / 1e3);
        if us > 0.0 {
            assert!(near(number(row, "gflops"), flops / us / 1e3), "{row}");
            assert!(near(number(row, "gb_per_s"), bytes / us / 1e3), "{row}");
            let roof = 100.0 * least[0].max(least[1]) / us;
            assert!(near(number(row, "roof_percent"), roof), "{row}");
        }
        let bound = if least[0] > least[1] { "compute" } else { "memory" };
        assert!(row["bound"] == bound && row["name"].is_string(), "{row}");
        assert!(!list(row, "steps").is_empty(), "{row}");
    }
    assert!(near(sum("share"), 1.0) && near(sum("us"), number(&value["total"], "us")));
    assert!(near(sum("flops"), number(&value["total"], "flops")));
    assert!(near(sum("bytes"), number(&value["total"], "bytes")));
    let least = list(value, "kernels").iter().map(|r| number(r, "us") * number(r, "roof_percent"));
    let total = &value["total"];
    assert!(near(least.sum::<f64>(), number(total, "us") * number(total, "roof_percent")));
    // Medians of kernels do not add up to the median of runs; they come close.
    let ratio = sum("us") / number(value, "run_us");
    assert!((0.5..2.0).contains(&ratio), "kernels take {ratio} of a run");
}

#[test]
fn every_kernel_has_its_figures() {
    let model = shipped("digits.onnx");
    let flags = |batch| ["--dim", batch, "--threads", "1", "--warmup", "1ms", "--time", "20ms"];
    let value = json(0, &[&["profile", &model], &flags("batch=1")[..]].concat());
    check(&value);
    // What is done is done for each image.
    let many = json(0, &[&["profile", &model], &flags("batch=16")[..]].concat());
    check(&many);
    let flops = |value: &Value| number(&value["total"], "flops");
    assert!(near(flops(&many), 16.0 * flops(&value)), "{} {}", flops(&many), flops(&value));
    let (out, _) = expect(0, &[&["profile", &model], &flags("batch=1")[..]].concat());
    assert!(out.contains("this machine: ") && out.contains(" roof "), "{out}");
    assert!(out.contains("100.0%") && out.contains("dense1"), "{out}");
}

#[test]
fn the_trace_has_one_run() {
    let folder = Folder::new();
    let (model, path) = (shipped("digits.onnx"), folder.path("trace.json"));
    let args = ["profile", &model, "--dim", "batch=2", "--trace", &path];
    let value = json(0, &[&args[..], &QUICK].concat());
    let trace: Value = serde_json::from_slice(&fs::read(&path).expect("a trace")).expect("JSON");
    let events = list(&trace, "traceEvents");
    let (named, steps): (Vec<&Value>, Vec<&Value>) = events.iter().partition(|e| e["ph"] == "M");
    assert_eq!(
        named.iter().map(|e| &e["name"]).collect::<Vec<_>>(),
        [&json!("process_name"), &json!("thread_name")]
    );
    assert_eq!(steps.len(), list(&value["total"], "steps").len());
    let mut at = 0.0;
    for step in steps {
        assert!(step["ph"] == "X" && step["name"].is_string() && step["cat"] == "kernel");
        assert!(step["pid"].is_u64() && step["tid"].is_u64(), "{step}");
        let (begin, length) = (number(step, "ts"), number(step, "dur"));
        assert!((begin - at).abs() < 1e-3 && length >= 0.0, "steps follow one another: {step}");
        at = begin + length;
        let kernels = list(&value, "kernels");
        assert!(kernels.iter().any(|row| row["name"] == step["args"]["kernel"]), "{step}");
    }
    assert!((at - number(&value, "run_us")).abs() < 1e-3);
}

#[test]
fn what_the_machine_can_do_is_measured_once() {
    let folder = Folder::new();
    let place = folder.path("made/by/doctor");
    let doctor = ["doctor", "--calibrate", "--calibration", &place];
    let value = json(0, &doctor);
    let peaks = list(&value, "peaks").to_vec();
    assert_eq!(peaks[0]["threads"], 1);
    assert_eq!(peaks.last().map(|peak| &peak["threads"]), Some(&value["threads"]));
    let file = Path::new(&place).join("peak.json");
    assert_eq!(value["calibration"], json!(file));
    let (model, of) = (shipped("digits.onnx"), ["--dim", "batch=1", "--threads", "1"]);
    let profile = [&["profile", &model, "--calibration", &place], &of[..], &QUICK].concat();
    let value = json(0, &profile);
    assert_eq!(value["peak"]["file"], json!(file));
    assert_eq!(value["peak"]["gflops"], peaks[0]["gflops"]);
    check(&value);
    // A file of another machine, or a damaged one, is not believed.
    fs::write(&file, "{").expect("a damaged file");
    let (out, err) = expect(0, &profile);
    assert!(out.contains("(measured now)") && err.contains("is measured now"), "{out}{err}");
    let (_, err) =
        expect(2, &["profile", &model, "--dim", "batch=1", "--calibration", &folder.path("none")]);
    assert!(err.contains("kiln doctor --calibrate --calibration"), "{err}");
    let (_, err) = expect(2, &["doctor", "--calibration", &place]);
    assert!(err.contains("--calibrate"), "{err}");
}

#[test]
fn wrong_requests_are_answered_with_what_is_meant() {
    let model = shipped("digits.onnx");
    let (_, err) = expect(2, &["profil", &model]);
    assert!(err.contains("'profile'"), "{err}");
    let (_, err) = expect(2, &["profile", &model, "--traces", "x.json"]);
    assert!(err.contains("'--trace'"), "{err}");
    let (_, err) = expect(2, &["profile", &model, "--dim", "btach=1"]);
    assert!(err.contains("expected  batch"), "{err}");
    let nowhere = ["profile", &model, "--dim", "batch=1", "--trace", "/no/such/trace.json"];
    let (_, err) = expect(7, &[&nowhere[..], &QUICK].concat());
    assert!(err.contains("/no/such/trace.json"), "{err}");
    let (_, err) = expect(2, &["bench", &model, "--dim", "batch=1", "--kernels"]);
    assert!(err.contains("--kernels"), "{err}");
    let (help, _) = expect(0, &["profile", "--help"]);
    assert!(help.contains("above 100 %") && help.contains("Winograd"), "{help}");
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn states_in_place_ranges_and_compiled_files() {
    let folder = Folder::new();
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/cache.onnx");
    let (cache, artifact) = (cache.display().to_string(), folder.path("cache.so"));
    let flags =
        ["--dim", "past=0..4", "--state", "past_*=present_*", "--state", "count=next_count"];
    let of_model = json(0, &[&["profile", &cache], &flags[..], &QUICK].concat());
    expect(0, &[&["compile", &cache, "-o", &artifact, "-q"], &flags[..]].concat());
    let of_file = json(0, &[&["profile", &artifact], &QUICK[..]].concat());
    for value in [&of_model, &of_file] {
        check(value);
        let row = |name: &str| {
            let mut kernels = list(value, "kernels").iter();
            kernels.find(|row| row["name"].as_str().is_some_and(|found| found.contains(name)))
        };
        // One row of two numbers is read and written, however many there are.
        assert_eq!(number(row("present_rows").expect("the cache"), "bytes"), 16.0);
    }
    assert_eq!(of_model["total"]["bytes"], of_file["total"]["bytes"]);
    // What a kernel does follows the lengths of a run.
    let (model, artifact) = (shipped("digits.onnx"), folder.path("digits.so"));
    expect(0, &["compile", &model, "--dim", "batch=1..8", "-o", &artifact, "-q"]);
    let total = |input: &[&str]| {
        let value = json(0, &[&["profile", &artifact], input, &QUICK[..]].concat());
        check(&value);
        number(&value["total"], "flops")
    };
    let image = folder.write("image.pb", &common::pb(&[2, 1, 8, 8], &[0.5; 128]));
    assert!(near(total(&[]), 4.0 * total(&["-i", &image])));
    let (_, err) = expect(2, &["profile", &artifact, "--dim", "batch=1"]);
    assert!(err.contains("--dim is for models that are compiled"), "{err}");
}
