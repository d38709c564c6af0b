//! What the command prints, where, and with which exit code, on the model that ships with Kiln.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Folder, expect, json, kiln, pb, shipped};
use kiln::npz::{read_npz, write_npy};
use kiln::tensor::Tensor;

#[test]
fn run_reads_an_archive_and_writes_one() {
    let folder = Folder::new();
    let (model, data) = (shipped("digits.onnx"), shipped("digits_test.npz"));
    let mut files = Vec::new();
    for (name, threads) in [("one.npz", "1"), ("two.npz", "2")] {
        let args = ["run", &model, "-i", &data, "-o", &folder.path(name), "--threads", threads];
        let (out, err) = expect(0, &args);
        assert!(out.is_empty() && err.starts_with("wrote "), "{out}{err}");
        files.push(fs::read(folder.path(name)).expect("the outputs"));
    }
    assert!(files[0] == files[1], "results depend on the number of threads");
    assert_eq!(folder.names(), [PathBuf::from("one.npz"), PathBuf::from("two.npz")]);
    let outputs = read_npz(&files[0]).expect("a sound archive");
    let (name, tensor) = &outputs[0];
    assert_eq!((name.as_str(), tensor.shape()), ("probabilities", &[360, 10][..]));
    let labels = read_npz(&fs::read(data).expect("the data")).expect("a sound archive");
    let labels = labels.iter().find(|(name, _)| name == "label").expect("labels");
    let scores = tensor.as_slice::<f32>().expect("f32").chunks(10);
    let answers = scores.map(|row| (0..10).max_by(|a, b| row[*a].total_cmp(&row[*b])));
    let right = answers
        .zip(labels.1.as_slice::<i64>().expect("i64"))
        .filter(|(answer, label)| answer.map(|a| a as i64) == Some(**label));
    assert!(right.count() > 340);
}

#[test]
fn products_of_bf16_change_results_a_little() {
    let model = shipped("digits.onnx");
    let args = ["--dim", "batch=1", "--precision", "bf16", "--kernels"];
    let value = json(0, &[&["verify", &model], &args[..]].concat());
    let text = value.to_string();
    assert_eq!(value["ok"], true, "{text}");
    let rows = value["outputs"].as_array().expect("comparisons");
    let against = |what: &str| rows.iter().find(|row| row["against"] == what).expect("one");
    let apart = |what: &str| against(what)["max_abs"].as_f64().expect("a number");
    // Rounding shows, and code rounds what the interpreter does.
    assert!(apart("f32") > 1e-5 && apart("f32") < 0.02, "{text}");
    assert!(apart("interpreter") < apart("f32"), "{text}");
    let (_, err) = expect(2, &["run", &model, "--precision", "bf8"]);
    assert!(err.contains("possible values: f32, bf16"), "{err}");
    let folder = Folder::new();
    let file = folder.path("digits.so");
    let long = expect(0, &["compile", &model, "--dim", "batch=1", "-o", &file]);
    let bytes = fs::metadata(&file).expect("a file").len();
    let half = ["compile", &model, "--dim", "batch=1", "--precision", "bf16", "-o", &file];
    let short = expect(0, &half);
    assert!(fs::metadata(&file).expect("a file").len() < bytes, "{long:?} {short:?}");
    let with = ["verify", &file, "--model", &model, "--dim", "batch=1", "--precision", "bf16"];
    expect(0, &with);
    let exact = ["verify", &file, "--model", &model, "--dim", "batch=1"];
    let (_, err) = expect(4, &exact);
    assert!(err.is_empty() || err.contains("differ"), "{err}");
    let (_, err) = expect(2, &["run", &file, "--precision", "bf16"]);
    assert!(err.contains("--precision is for models that are compiled"), "{err}");
}

#[test]
fn every_command_prints_text_and_json() {
    let model = shipped("digits.onnx");
    let (out, err) = expect(0, &["check", &model]);
    assert!(out.starts_with("ok ") && err.contains("dim batch is taken as 1"), "{out}{err}");
    assert_eq!(json(0, &["check", &model])["nodes"], 8);
    let (out, _) = expect(0, &["inspect", &model]);
    assert!(out.contains("input     image : f32[batch,1,8,8]"), "{out}");
    assert_eq!(json(0, &["inspect", &model])["ops"][0]["count"], 2);
    let one = ["--dim", "batch=1"];
    let (out, _) = expect(0, &[&["run", &model, "-i", "random:7"], &one[..]].concat());
    assert!(out.starts_with("probabilities: f32[1,10]\n"), "{out}");
    let value = json(0, &[&["run", &model, "-i", "random:7"], &one[..]].concat());
    assert_eq!(value["outputs"][0]["shape"], serde_json::json!([1, 10]));
    let range = ["--dim", "batch=1..8@3"];
    let value = json(0, &[&["run", &model, "-i", "random:7"], &range[..]].concat());
    assert_eq!(value["outputs"][0]["shape"], serde_json::json!([3, 10]));
    let (out, _) = expect(0, &[&["verify", &model], &one[..]].concat());
    assert!(out.starts_with("ok       probabilities against interpreter"), "{out}");
    assert_eq!(json(0, &[&["verify", &model], &one[..]].concat())["ok"], true);
    let (out, _) = expect(0, &[&["verify", &model, "--kernels"], &one[..]].concat());
    assert!(out.contains(" kernels against interpreter: largest difference"), "{out}");
    let (out, _) = expect(0, &[&["explain", &model, "dense1"], &one[..]].concat());
    assert!(out.contains("read as\n") && out.contains("compiled into\n"), "{out}");
    let (out, _) = expect(0, &["ops", "softmax"]);
    assert!(out.contains("Softmax") && !out.contains("Relu"), "{out}");
    assert!(json(0, &["ops"])["ops"].as_array().expect("a list").len() > 60);
    assert_eq!(json(0, &["doctor"])["machine_code"], "works");
    assert!(expect(0, &["completions", "bash"]).0.contains("_kiln()"));
    assert!(expect(0, &["man", "bench"]).0.contains(".TH kiln-bench 1"));
}

#[test]
fn bench_prints_the_figures_of_the_harness() {
    let model = shipped("digits.onnx");
    let flags = ["--dim", "batch=1", "--threads", "2", "--warmup", "10ms", "--time", "50ms"];
    let value = json(0, &[&["bench", &model], &flags[..]].concat());
    for key in ["compile_ms", "load_ms", "min_ms", "p50_ms", "p90_ms", "p99_ms", "peak_rss_mb"] {
        assert!(value[key].as_f64().expect(key) > 0.0, "{key}");
    }
    assert_eq!(value["threads"], 2);
    assert!(value["runs"].as_u64().expect("runs") > 0);
    let (out, _) = expect(0, &[&["bench", &model, "--percentiles", "75"], &flags[..]].concat());
    assert!(out.contains("p75") && !out.contains("p99"), "{out}");
}

#[test]
fn compile_writes_every_stage_and_equal_bytes() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    for stage in ["graph", "fused", "loops", "clif", "asm", "plan"] {
        // Wide code does not pass through Cranelift: on some machines all kernels are wide.
        let args = ["compile", &model, "--emit", stage, "--dim", "batch=1", "--no-wide"];
        let (out, err) = expect(0, &args);
        assert!(!out.is_empty() && err.is_empty(), "{stage}: {err}");
        assert_eq!(expect(0, &args).0, out, "{stage} differs from run to run");
    }
    let cuda = ["compile", &model, "--device", "cuda", "--sm", "80,90", "--dim", "batch=1"];
    let (out, _) = expect(0, &cuda);
    for part in [".target sm_80", ".target sm_90", ".visible .entry"] {
        assert!(out.contains(part), "{part} is missing:\n{out}");
    }
    assert_eq!(expect(0, &cuda).0, out, "PTX differs from run to run");
    expect(2, &["compile", &model, "--emit", "ptx"]);
    for wrong in [&["--device", "cuda", "--emit", "so"][..], &["--device", "cuda"], &["--sm", "80"]]
    {
        let path = folder.path("x.so");
        expect(2, &[&["compile", &model, "-o", &path], wrong].concat());
        assert!(!std::path::Path::new(&path).exists(), "{wrong:?} left a file");
    }
    let (_, err) = expect(2, &["compile", &model, "--device", "cuda", "--sm", "12"]);
    assert!(err.contains("80"), "{err}");
    let objects = ["a.o", "b.o"].map(|name| {
        let path = folder.path(name);
        let flags = ["--name", "digits", "--dim", "batch=1", "-q"];
        let (out, _) = expect(0, &[&["compile", &model, "-o", &path], &flags[..]].concat());
        assert!(out.is_empty());
        fs::read(path).expect("an object file")
    });
    assert!(objects[0] == objects[1], "equal input gives equal bytes");
    assert!(objects[0].starts_with(b"\x7fELF"));
}

#[test]
fn compile_makes_files_for_other_machines() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    let cases: [(&str, &str, &[u8]); 5] = [
        ("riscv64gc-unknown-linux-gnu", "a.so", b"\x7fELF"),
        ("aarch64-unknown-linux-gnu", "b.o", b"\x7fELF"),
        ("aarch64-apple-darwin", "c.o", b"\xcf\xfa\xed\xfe"),
        ("x86_64-apple-darwin", "d.a", b"!<arch>\n"),
        ("x86_64-pc-windows-msvc", "e.lib", b"!<arch>\n"),
    ];
    for (target, name, magic) in cases {
        let path = folder.path(name);
        let flags = ["--target", target, "--dim", "batch=1", "-q"];
        expect(0, &[&["compile", &model, "-o", &path], &flags[..]].concat());
        assert!(fs::read(&path).expect("a file").starts_with(magic), "{target}");
    }
    let refused = |flags: &[&str]| {
        let path = folder.path("f.so");
        expect(2, &[&["compile", &model, "-o", &path, "--dim", "batch=1"], flags].concat()).1
    };
    let text = refused(&["--target", "x86_64-apple-darwin"]);
    assert!(text.contains("write an object or a static library"), "{text}");
    let text = refused(&["--target", "aarch64-unknown-linux-gn"]);
    assert!(text.contains("did you mean `aarch64-unknown-linux-gnu`?"), "{text}");
    if cfg!(target_arch = "x86_64") {
        let text = refused(&["--cpu", "x86-64v3"]);
        assert!(text.contains("did you mean `x86-64-v3`?"), "{text}");
        let path = folder.path("multi.so");
        let flags = ["--cpu", "multi", "--dim", "batch=1", "-q"];
        expect(0, &[&["compile", &model, "-o", &path], &flags[..]].concat());
        let (text, _) = expect(0, &["inspect", &path]);
        assert!(text.contains("\nneeds     sse3") && text.contains("\nfaster    movbe avx fma"));
    }
}

#[test]
fn wrong_requests_end_with_code_2() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    let (_, err) = expect(2, &["benhc"]);
    assert!(err.contains("'bench'"), "{err}");
    let (_, err) = expect(2, &["bench", &model, "--thread", "2"]);
    assert!(err.contains("'--threads'"), "{err}");
    let (_, err) = expect(2, &["run", &model, "--dim", "batch=1"]);
    assert!(err.contains("no tensor given for input image: f32[1,1,8,8]"), "{err}");
    let mut bytes = Vec::new();
    write_npy(&mut bytes, Tensor::from_slice(&[2], &[1i64, 2]).view()).expect("memory");
    let wrong = folder.write("wrong.npy", &bytes);
    let (_, err) = expect(2, &["run", &model, "--dim", "batch=1", "-i", &wrong]);
    assert!(err.contains("expected  f32[batch,1,8,8]\n  found     [2]"), "{err}");
    let (_, err) = expect(2, &["run", &model, "--dim", "btach=1", "-i", "random"]);
    assert!(err.contains("btach") && err.contains("expected  batch"), "{err}");
    let (_, err) = expect(2, &["run", &model, "--dim", "batch=4..1", "-i", "random"]);
    assert!(err.contains("is not in 4..1"), "{err}");
    let named = format!("picture={wrong}");
    let value = json(2, &["run", &model, "--dim", "batch=1", "-i", &named]);
    assert_eq!(value["error"]["kind"], "usage");
    assert_eq!(value["diagnostics"][0]["help"], "the inputs are `image`");
}

#[test]
fn broken_models_limits_and_files_have_codes_of_their_own() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    let bytes = fs::read(&model).expect("the model");
    let cut = folder.write("cut.onnx", &bytes[..bytes.len() / 2]);
    let out = folder.path("out.o");
    let (_, err) = expect(3, &["compile", &cut, "-o", &out, "--dim", "batch=1"]);
    assert!(err.starts_with("error[K0101]"), "{err}");
    assert_eq!(json(3, &["check", &cut])["error"]["exit"], 3);
    expect(3, &["run", &model, "-i", "random"]);
    expect(6, &["check", &model, "--max-nodes", "3"]);
    expect(6, &["check", &model, "--max-memory", "1K"]);
    let (_, err) = expect(6, &["check", &model, "--max-rank", "3"]);
    assert!(err.contains("too many axes"), "{err}");
    let run = ["run", &model, "--dim", "batch=1", "-i", "random"];
    let (_, err) = expect(6, &[&run[..], &["--max-kernels", "1"]].concat());
    assert!(err.contains("too many kernels"), "{err}");
    // Less is optimised; the model runs as it does.
    expect(0, &[&run[..], &["--max-egraph", "1", "--max-depth", "0"]].concat());
    expect(7, &["check", &folder.path("none.onnx")]);
    expect(7, &["run", &model, "-i", &folder.path("none.npy")]);
    let damaged = folder.write("damaged.npz", b"PK but nothing more");
    let (_, err) = expect(7, &["run", &model, "-i", &damaged]);
    assert!(err.contains("not a .npz file"), "{err}");
    let nowhere = folder.path("no/such/out.npz");
    let (_, err) = expect(7, &["run", &model, "-i", &shipped("digits_test.npz"), "-o", &nowhere]);
    assert!(err.contains("no/such/out.npz"), "{err}");
    assert_eq!(folder.names(), [PathBuf::from("cut.onnx"), PathBuf::from("damaged.npz")]);
}

#[test]
fn stored_outputs_that_differ_end_with_code_4() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    folder.write("input_0.pb", &pb(&[1, 1, 8, 8], &[0.5; 64]));
    let data = folder.path("");
    let written = folder.path("found.npz");
    expect(0, &["run", &model, "-i", &data, "-o", &written]);
    let found = read_npz(&fs::read(&written).expect("the outputs")).expect("a sound archive");
    let values = found[0].1.as_slice::<f32>().expect("f32").to_vec();
    folder.write("output_0.pb", &pb(&[1, 10], &values));
    let (out, _) = expect(0, &["verify", &model, "-i", &data]);
    assert!(out.contains("ok       probabilities against stored"), "{out}");
    let wrong: Vec<f32> = values.iter().map(|value| value + 0.1).collect();
    folder.write("output_0.pb", &pb(&[1, 10], &wrong));
    let (out, _) = expect(4, &["verify", &model, "-i", &data]);
    assert!(out.contains("DIFFERS  probabilities against stored"), "{out}");
    assert!(out.contains("10 of 10 elements"), "{out}");
    assert_eq!(json(4, &["verify", &model, "-i", &data])["ok"], false);
}

#[test]
fn names_of_a_model_cannot_drive_a_terminal() {
    let folder = Folder::new();
    let mut bytes = fs::read(shipped("digits.onnx")).expect("the model");
    for (old, new) in [(&b"conv.relu"[..], &b"\x1b[31mrelu"[..]), (b"image", b"\x1b[3mg")] {
        let length = old.len();
        let places: Vec<usize> =
            (0..bytes.len() - length).filter(|at| &bytes[*at..at + length] == old).collect();
        assert!(!places.is_empty());
        places.iter().for_each(|at| bytes[*at..at + length].copy_from_slice(new));
    }
    let model = folder.write("evil.onnx", &bytes);
    let one = ["--dim", "batch=1", "-v"];
    for command in [
        &["check"][..],
        &["inspect"],
        &["run"],
        &["run", "-i", "random"],
        &["verify"],
        &["bench", "--time", "1ms", "--warmup", "1ms"],
        &["profile", "--time", "1ms", "--warmup", "1ms", "--trace", "-"],
        &["compile", "--emit", "graph"],
        &["compile", "--emit", "fused"],
        &["compile", "--emit", "loops"],
        &["compile", "--emit", "clif"],
        &["compile", "--emit", "asm"],
        &["compile", "--emit", "plan"],
        &["compile", "--device", "cuda"],
    ] {
        let output = kiln(&[&command[..1], &[&model], &command[1..], &one].concat());
        for (stream, bytes) in [("output", output.stdout), ("error", output.stderr)] {
            assert!(!bytes.contains(&0x1b), "{command:?}: standard {stream}");
        }
    }
}
