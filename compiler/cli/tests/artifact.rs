//! Compiled models: loaded, looked at, compared, and refused.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::{Folder, expect, json, pb, shipped};
use kiln::manifest;
use rustix::process::{Pid, Signal, kill_process};

const ONE: [&str; 2] = ["--dim", "batch=1"];

/// The model that ships with Kiln, compiled.
fn compiled(folder: &Folder, name: &str, flags: &[&str]) -> String {
    let (model, path) = (shipped("digits.onnx"), folder.path(name));
    expect(0, &[&["compile", &model, "-o", &path, "-q"], &ONE[..], flags].concat());
    path
}

/// Where the manifest is.
fn place(bytes: &[u8]) -> usize {
    let starts = |window: &[u8]| window == manifest::MAGIC;
    bytes.windows(manifest::MAGIC.len()).position(starts).expect("a manifest")
}

#[test]
fn libraries_and_objects_run_as_the_model_does() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    let (expected, found) = (folder.path("expected.npz"), folder.path("found.npz"));
    expect(0, &[&["run", &model, "-i", "random", "-o", &expected], &ONE[..]].concat());
    let expected = fs::read(expected).expect("outputs");
    for (name, flags) in [
        ("inside.so", &[][..]),
        ("inside.o", &[]),
        ("beside.so", &["--weights", "external"]),
        ("beside.o", &["--weights", "external"]),
    ] {
        let artifact = compiled(&folder, name, flags);
        expect(0, &["run", &artifact, "-i", "random", "-o", &found]);
        assert!(fs::read(&found).expect("outputs") == expected, "{name}");
        let value = json(0, &["bench", &artifact, "--time", "1ms", "--warmup", "1ms"]);
        assert!(value["load_ms"].as_f64().expect("a time") > 0.0 && value["compile_ms"].is_null());
    }
    let (out, _) = expect(0, &["bench", &folder.path("inside.so"), "--time", "1ms"]);
    assert!(out.contains("load ") && !out.contains("compile"), "{out}");
}

#[test]
fn one_file_serves_all_lengths_of_its_ranges() {
    let folder = Folder::new();
    let (model, artifact) = (shipped("digits.onnx"), folder.path("ranges.so"));
    expect(0, &["compile", &model, "-o", &artifact, "--dim", "batch=1..8"]);
    let (out, _) = expect(0, &["inspect", &artifact]);
    assert!(out.contains("f32[<=8,1,8,8]") && out.contains("batch: 1 to 8"), "{out}");
    let images = |batch: u8| {
        let pixels: Vec<f32> = (0..usize::from(batch) * 64).map(|i| (i % 17) as f32).collect();
        folder.write("images.pb", &pb(&[batch, 1, 8, 8], &pixels))
    };
    for batch in [1, 3, 8] {
        let given = images(batch);
        let value = json(0, &["run", &artifact, "-i", &given]);
        assert_eq!(value["outputs"][0]["shape"], serde_json::json!([batch, 10]));
        let times = ["--time", "1ms", "--warmup", "1ms"];
        json(0, &[&["bench", &artifact, "-i", &given], &times[..]].concat());
        expect(0, &["verify", &artifact, "--model", &model, "-i", &given]);
    }
    let (_, err) = expect(2, &["run", &artifact, "-i", &images(9)]);
    assert!(err.contains("does not fit input image"), "{err}");
}

#[test]
fn inspect_shows_what_the_file_says_of_itself() {
    let folder = Folder::new();
    let artifact = compiled(&folder, "digits.so", &[]);
    let (out, _) = expect(0, &["inspect", &artifact]);
    for part in
        ["input     image: f32[1,1,8,8]", "target    x86_64-", "here      runs", "kernels   "]
    {
        assert!(out.contains(part), "{part}\n{out}");
    }
    let value = json(0, &["inspect", &artifact]);
    let hash = kiln::Model::open(shipped("digits.onnx"), &kiln::Limits::default());
    let hash = manifest::hex(&hash.expect("the model").hash());
    assert_eq!(value["model_hash"], hash);
    assert_eq!(value["file_bytes"], fs::metadata(&artifact).expect("the file").len());
    assert!(value["runs_here"] == true && value["prefix"] == "digits");
    assert!(!value["steps"].as_array().expect("a list").is_empty());
    let beside = compiled(&folder, "beside.so", &["--weights", "external"]);
    assert_eq!(json(0, &["inspect", &beside])["weights_file"], "beside.weights");
}

#[test]
fn verify_compares_with_the_model_and_with_stored_outputs() {
    let folder = Folder::new();
    let (model, artifact) = (shipped("digits.onnx"), compiled(&folder, "digits.so", &[]));
    let (_, err) = expect(2, &["verify", &artifact]);
    assert!(err.contains("nothing to compare") && err.contains("--model"), "{err}");
    let (out, err) = expect(0, &["verify", &artifact, "--model", &model]);
    assert!(out.starts_with("ok       probabilities against interpreter"), "{out}");
    assert!(!err.contains("another file"), "{err}");
    let mut changed = fs::read(&model).expect("the model");
    let name = b"dense1";
    let at = changed.windows(name.len()).position(|w| w == name).expect("a node");
    changed[at] = b'D';
    let changed = folder.write("changed.onnx", &changed);
    let output = common::kiln(&["verify", &artifact, "--model", &changed]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("another file"));
    let data = folder.path("");
    folder.write("input_0.pb", &pb(&[1, 1, 8, 8], &[0.5; 64]));
    folder.write("output_0.pb", &pb(&[1, 10], &[0.5; 10]));
    let (out, _) = expect(4, &["verify", &artifact, "-i", &data]);
    assert!(out.contains("DIFFERS  probabilities against stored"), "{out}");
    let value = json(4, &["verify", &artifact, "-i", &data, "--model", &model]);
    assert_eq!(value["outputs"].as_array().expect("rows").len(), 2);
    expect(2, &["verify", &model, "--model", &model]);
    expect(2, &["verify", &artifact, "--model", &model, "--kernels"]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = Folder::new();
    let artifact = compiled(&folder, "digits.so", &[]);
    for flag in [&ONE[..], &["--no-wide"], &["--no-egraph"], &["--cache", "x"]] {
        let (_, err) = expect(2, &[&["run", &artifact, "-i", "random"], flag].concat());
        assert!(err.contains("is compiled already"), "{err}");
    }
    for command in ["check", "compile"] {
        let (_, err) = expect(2, &[command, &artifact]);
        assert!(err.contains("is a compiled model"), "{err}");
    }
    let bytes = fs::read(&artifact).expect("the library");
    let run = |code: i32, name: &str, bytes: &[u8]| {
        expect(code, &["run", &folder.write(name, bytes), "-i", "random"]).1
    };
    assert!(run(7, "cut.so", &bytes[..bytes.len() / 2]).starts_with("error[K0911]"));
    let at = place(&bytes);
    let mut changed = bytes.clone();
    changed[at + 8] = 99;
    assert!(run(5, "version.so", &changed).contains("format 99"));
    // Another processor and another machine, under a right hash. Names of the same length.
    for (old, new, part) in [
        ("sse3", "xse3", "a processor with `xse3`, which this one lacks"),
        ("x86_64-unknown", "mips64-unknown", "compiled for mips64-unknown-linux"),
    ] {
        let mut changed = bytes.clone();
        let old_at = changed[at..].windows(old.len()).position(|w| w == old.as_bytes());
        let old_at = at + old_at.expect("the name in the manifest");
        changed[old_at..old_at + old.len()].copy_from_slice(new.as_bytes());
        manifest::seal(&mut changed, at);
        let error = run(5, "other.so", &changed);
        assert!(error.starts_with("error[K0912]") && error.contains(part), "{error}");
        let (out, _) = expect(0, &["inspect", &folder.path("other.so")]);
        assert!(out.contains("here      the model was compiled for"), "{out}");
    }
    let archive = compiled(&folder, "digits.a", &[]);
    let (_, err) = expect(7, &["run", &archive, "-i", "random"]);
    assert!(err.contains("a static library is for a linker"), "{err}");
    let beside = compiled(&folder, "beside.so", &["--weights", "external"]);
    fs::remove_file(folder.path("beside.weights")).expect("the weights");
    let (_, err) = expect(7, &["run", &beside, "-i", "random"]);
    assert!(err.contains("beside.weights: No such file"), "{err}");
}

#[test]
fn every_kind_of_flipped_bit_is_refused() {
    let folder = Folder::new();
    for name in ["digits.so", "digits.o"] {
        let mut bytes = fs::read(compiled(&folder, name, &[])).expect("the file");
        let at = place(&bytes);
        // Headers, the manifest, and places all over the file.
        let far = (0..bytes.len()).step_by(bytes.len() / 500);
        for byte in (0..256).chain(at..at + 512).chain(bytes.len() - 256..bytes.len()).chain(far) {
            let bit = 1 << (byte % 8);
            bytes[byte] ^= bit;
            assert!(manifest::find(&bytes).is_err(), "byte {byte} of {name}");
            bytes[byte] ^= bit;
        }
        manifest::find(&bytes).expect("the sound file");
    }
}

/// A command that is interrupted while it writes removes what it has written.
#[test]
fn an_interrupt_leaves_no_temporary_file() {
    let folder = Folder::new();
    let (model, path) = (shipped("digits.onnx"), folder.path("out.so"));
    let temporary = || folder.names().iter().any(|name| name.extension() == Some("tmp".as_ref()));
    let mut interrupted = 0;
    for _ in 0..300 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.args(["compile", &model, "-o", &path]).args(ONE);
        let mut child = command.stderr(Stdio::null()).spawn().expect("the command starts");
        while !temporary() && child.try_wait().expect("a child").is_none() {
            // No sleep: the time in which a small file is written is short.
            std::thread::yield_now();
        }
        let _ = kill_process(Pid::from_child(&child), Signal::INT);
        let status = child.wait().expect("its end");
        assert!(matches!(status.code(), Some(0 | 130)), "{status}");
        assert!(!temporary(), "{:?}", folder.names());
        interrupted += usize::from(status.code() == Some(130));
        if interrupted == 5 {
            return;
        }
    }
    if interrupted == 0 {
        // On a busy machine this program may sleep for as long as the other one writes.
        let text = "skipped: no interrupt came while a file was written\n";
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

#[test]
fn names_in_a_compiled_model_cannot_drive_a_terminal() {
    let folder = Folder::new();
    let mut bytes = fs::read(shipped("digits.onnx")).expect("the model");
    let name = b"image";
    for at in 0..bytes.len() - name.len() {
        if bytes[at..].starts_with(name) {
            bytes[at..at + name.len()].copy_from_slice(b"\x1b[3mg");
        }
    }
    let model = folder.write("evil.onnx", &bytes);
    let artifact = folder.path("evil.so");
    expect(0, &[&["compile", &model, "-o", &artifact], &ONE[..]].concat());
    for args in [&["inspect", &artifact][..], &["run", &artifact], &["run", &artifact, "-i", "x=y"]]
    {
        let output = common::kiln(args);
        assert!(!output.stdout.contains(&0x1b) && !output.stderr.contains(&0x1b), "{args:?}");
    }
    assert!(folder.names().contains(&PathBuf::from("evil.so")));
}
