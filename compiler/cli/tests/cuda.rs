//! Models for GPUs on a machine that has none: files are written, shown and refused, and what is
//! missing is said.

mod common;

use std::fs;

use common::{Folder, expect, json, shipped};

/// Whether this machine has a driver: then nothing here is missing.
fn has_driver() -> bool {
    json(0, &["doctor"])["cuda"]["driver"] != "none"
}

fn flags<'a>(command: &'a str, model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[command, model, "--dim", "batch=1"], more].concat()
}

#[test]
fn without_a_driver_the_cpu_runs_a_model_only_when_it_is_asked_to() {
    if has_driver() {
        return kiln_skip("this machine has a driver");
    }
    let model = shipped("digits.onnx");
    for command in ["run", "bench", "profile", "verify"] {
        let (out, err) =
            expect(5, &flags(command, &model, &["--device", "cuda:1", "-i", "random"]));
        assert!(out.is_empty() && err.contains("K1001") && err.contains("libcuda.so.1"), "{err}");
    }
    let value = json(5, &flags("run", &model, &["--device", "cuda", "-i", "random"]));
    assert_eq!((&value["error"]["kind"], &value["ok"]), (&"incompatible".into(), &false.into()));
    let cpu = expect(0, &flags("run", &model, &["-i", "random:3"]));
    let asked = ["-i", "random:3", "--device", "cuda", "--fallback", "cpu"];
    let (out, err) = expect(0, &flags("run", &model, &asked));
    assert_eq!(out, cpu.0);
    assert!(err.contains("no driver") && err.contains("runs on the CPU"), "{err}");
    // What is wrong everywhere is no reason to fall back.
    let (_, err) = expect(2, &flags("run", &model, &["--device", "cuda", "--fallback", "tpu"]));
    assert!(err.contains("possible values: cpu"), "{err}");
    expect(7, &["run", "nothing.onnx", "--device", "cuda", "--fallback", "cpu"]);
}

fn kiln_skip(why: &str) {
    println!("skipped: {why}");
}

#[test]
fn flags_for_gpus_ask_for_one() {
    let model = shipped("digits.onnx");
    for more in [&["--fallback", "cpu"][..], &["--device-memory", "grow"]] {
        let (_, err) = expect(2, &flags("run", &model, more));
        assert!(err.contains("is for GPUs"), "{err}");
    }
    for more in [&["--target", "aarch64-unknown-linux-gnu"][..], &["--cpu", "host"], &["--no-wide"]]
    {
        let asked = [&["--device", "cuda", "--emit", "ptx"], more].concat();
        let (_, err) = expect(2, &flags("compile", &model, &asked));
        assert!(err.contains("for CPUs"), "{err}");
    }
    for wrong in ["limit", "much", "limit=x"] {
        let asked = ["--device", "cuda", "--device-memory", wrong];
        expect(2, &flags("run", &model, &asked));
    }
}

#[test]
fn a_file_for_gpus_says_what_it_needs_and_is_refused_elsewhere() {
    let folder = Folder::new();
    let (model, file) = (shipped("digits.onnx"), folder.path("digits.kiln"));
    let asked = ["--device", "cuda", "--sm", "90,80", "-o", &file];
    let (_, err) = expect(0, &flags("compile", &model, &asked));
    assert!(err.contains("of device memory") && err.contains("wrote "), "{err}");
    let bytes = fs::read(&file).expect("a file");
    expect(0, &flags("compile", &model, &asked));
    assert!(bytes == fs::read(&file).expect("a file"), "equal input gives equal bytes");
    let (out, _) = expect(0, &["inspect", &file]);
    for part in ["nvptx64-nvidia-cuda", "sm_80 and later, sm_90", " x ", "dense1"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let value = json(0, &["inspect", &file]);
    let number = |name: &str| value[name].as_u64().expect(name);
    let parts = ["weight_bytes", "arena_bytes", "port_bytes", "state_bytes"].map(number);
    assert_eq!(number("device_bytes"), parts.iter().sum::<u64>());
    let modules = value["modules"].as_array().expect("modules");
    assert_eq!(modules.iter().map(|m| &m["sm"]).collect::<Vec<_>>(), [80, 90]);
    for kernel in modules[0]["kernels"].as_array().expect("kernels") {
        assert!(kernel["blocks"].as_u64() > Some(0) && kernel["threads"].as_u64() > Some(0));
    }
    // A file is for one kind of machine.
    for more in [&["--device", "cpu"][..], &["--fallback", "cpu"]] {
        let (_, err) = expect(2, &[&["run", &file, "-i", "random"], more].concat());
        assert!(err.contains("was compiled for GPUs"), "{err}");
    }
    let library = folder.path("digits.so");
    expect(0, &flags("compile", &model, &["-o", &library]));
    for command in ["run", "verify", "bench"] {
        let (_, err) = expect(2, &[command, &library, "--device", "cuda"]);
        assert!(err.contains("was compiled for CPUs"), "{err}");
    }
    if !has_driver() {
        expect(5, &["run", &file, "-i", "random"]);
        expect(5, &["profile", &file]);
        expect(5, &["inspect", &file, "--device", "cuda"]);
        expect(5, &["verify", &file, "--model", &model]);
    }
}

#[test]
fn a_file_for_gpus_that_is_damaged_is_refused() {
    let folder = Folder::new();
    let (model, file) = (shipped("digits.onnx"), folder.path("digits.kiln"));
    expect(0, &flags("compile", &model, &["--device", "cuda", "-o", &file]));
    let bytes = fs::read(&file).expect("a file");
    assert!(kiln::manifest::find(&bytes).is_ok());
    let mut damaged = bytes.clone();
    for at in (0..bytes.len()).step_by(7) {
        damaged[at] ^= 1 << (at % 8);
        assert!(kiln::manifest::find(&damaged).is_err(), "byte {at}");
        damaged[at] = bytes[at];
    }
    for length in (0..bytes.len()).step_by(101) {
        assert!(kiln::manifest::find(&bytes[..length]).is_err(), "{length} bytes");
    }
    let path = folder.write("cut.kiln", &bytes[..bytes.len() / 2]);
    expect(7, &["inspect", &path]);
}

#[test]
fn weights_may_lie_beside_a_file_for_gpus() {
    let folder = Folder::new();
    let (model, file) = (shipped("digits.onnx"), folder.path("digits.kiln"));
    let asked = ["--device", "cuda", "--weights", "external", "-o", &file];
    expect(0, &flags("compile", &model, &asked));
    let names: Vec<_> = folder.names().into_iter().map(|n| n.display().to_string()).collect();
    assert_eq!(names, ["digits.kiln", "digits.weights"]);
    let opened = kiln::open_artifact(&file).expect("a file");
    let artifact = kiln::load_cuda(opened, &file).expect("the weights beside it");
    let bytes = fs::read(folder.path("digits.weights")).expect("a file");
    assert_eq!(artifact.constants.bytes(), bytes);
    fs::write(folder.path("digits.weights"), &bytes[1..]).expect("a file");
    let opened = kiln::open_artifact(&file).expect("a file");
    assert!(kiln::load_cuda(opened, &file).is_err());
}

/// A folder with a library that looks like NVIDIA's driver, and runs kernels by the interpreter.
fn driver(folder: &Folder) -> String {
    let library =
        format!("{}kiln_fake_cuda{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let beside = std::env::current_exe().expect("this test").with_file_name(&library);
    fs::create_dir(folder.path("driver")).expect("a folder");
    // Both names, so that a real one is not found first.
    for name in ["driver/libcuda.so", "driver/libcuda.so.1"] {
        std::os::unix::fs::symlink(&beside, folder.path(name)).expect("a link");
    }
    folder.path("driver")
}

/// Runs the command with that driver; gives its output, and checks what the driver says of it.
fn with_driver(folder: &Folder, driver: &str, behaviour: &str, code: i32, args: &[&str]) -> String {
    let report = folder.path("report");
    let _ = fs::remove_file(&report);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(args).env("LD_LIBRARY_PATH", driver).env("KILN_FAKE_CUDA", behaviour);
    let output = command.env("KILN_FAKE_CUDA_REPORT", &report).output().expect("it starts");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "kiln {args:?}\n{out}\n{err}");
    if let Ok(problems) = fs::read_to_string(&report) {
        assert_eq!(problems, "", "kiln {args:?}");
    }
    out + &err
}

/// The whole way, from the search for a library to results, through the bindings of the real one.
#[test]
#[cfg(target_os = "linux")]
fn the_command_runs_models_through_a_library_like_the_drivers() {
    let folder = Folder::new();
    let driver = driver(&folder);
    let kiln = |behaviour: &str, code: i32, args: &[&str]| {
        with_driver(&folder, &driver, behaviour, code, args)
    };
    let model = shipped("digits.onnx");
    let out = kiln("", 0, &["doctor"]);
    assert!(
        out.contains("CUDA 12.4") && out.contains("cuda:0 a device that is not there"),
        "{out}"
    );
    let (cpu, _) = expect(0, &flags("run", &model, &["-i", "random:3"]));
    let asked = flags("run", &model, &["-i", "random:3", "--device", "cuda"]);
    let out = kiln("", 0, &asked);
    let line = |text: &str| text.lines().find(|l| l.starts_with("  0.")).map(str::to_string);
    assert!(line(&cpu).is_some() && line(&cpu) == line(&out), "{cpu}{out}");
    assert!(out.contains("cuda:0 a device that is not there, sm_80; memory: "), "{out}");
    assert!(folder.path("report").as_str() > "" && fs::exists(folder.path("report")).unwrap());
    let out = kiln("", 0, &[&asked[..], &["-v"]].concat());
    assert!(out.contains(" registers, "), "{out}");
    let verify = flags("verify", &model, &["--device", "cuda", "--kernels"]);
    assert!(kiln("", 0, &verify).contains("kernels against interpreter"));
    let short = ["--device", "cuda", "--warmup", "1ms", "--time", "5ms"];
    assert!(kiln("", 0, &flags("bench", &model, &short)).contains("stream"));
    assert!(kiln("", 0, &flags("profile", &model, &short)).contains("by its clocks"));
    let file = folder.path("digits.kiln");
    expect(0, &flags("compile", &model, &["--device", "cuda", "-o", &file]));
    assert!(kiln("", 0, &["inspect", &file, "--device", "cuda"]).contains(" registers  "));
    kiln("", 2, &["inspect", &model, "--device", "cuda"]);
    let out = kiln("", 0, &["run", &file, "-i", "random:3"]);
    assert!(line(&cpu) == line(&out), "{cpu}{out}");
    kiln("", 0, &["verify", &file, "--model", &model, "--device-memory", "preallocate"]);
    // What may be missing.
    assert!(kiln("devices=0", 5, &asked).contains("K1004"));
    assert!(
        kiln("", 5, &flags("run", &model, &["--device", "cuda:1"])).contains("this machine has 1")
    );
    assert!(kiln("sm=75", 5, &asked).contains("K1005"));
    assert!(kiln("sm=75", 5, &["run", &file, "-i", "random"]).contains("compiled for sm_80"));
    assert!(kiln("memory=40000", 6, &asked).contains("K1007"));
    let limited = flags("run", &model, &["--device", "cuda", "--device-memory", "limit=1K"]);
    assert!(kiln("", 6, &[&limited[..], &["-i", "random"]].concat()).contains("K1008"));
    let out = kiln("memory=40000", 0, &[&asked[..], &["--fallback", "cpu"]].concat());
    assert!(out.contains("this runs on the CPU") && line(&out) == line(&cpu), "{out}");
}
