//! Code for machines that this one is not, run by emulators.

use std::fs;
use std::path::Path;
use std::process::Command;

use kiln::backend::cpu::Cpu;
use kiln::graph::Graph;
use kiln::graph::eval::Value;
use kiln::onnx::{ImportOptions, import};
use kiln::tensor::Tensor;
use kiln::{Compiler, Executable, Form, Kind, Precision};
use kiln_tests::cases::{Case, read_case};
use kiln_tests::machines::{Emulator, Machine, emulators, machines};
use kiln_tests::{Tolerance, difference, oracle, run_compiled, skip};

/// Small enough to be emulated in seconds.
const MODELS: [&str; 6] =
    ["mlp_b1", "mlp_b64", "cnn_b1", "encoder", "encoder_decomposed", "light_squeezenet_random"];

fn model(name: &str) -> Option<(Graph, Case)> {
    let folder = oracle("models")?.join(name);
    let case = read_case(&folder, &folder).expect("a stored case");
    let graph = import(case.model.clone(), &ImportOptions::default()).expect("a sound model");
    Some((graph, case))
}

/// As for models on this machine: outputs near zero get room in proportion to the largest one.
fn tolerance(reference: &Tensor) -> Tolerance {
    let largest = Value::from_tensor(reference).as_f64s().iter().fold(0.0, |m, v| v.abs().max(m));
    Tolerance { rtol: 1e-3, atol: 1e-5 * largest }
}

fn check(what: &str, got: &[Tensor], want: &[Tensor]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert_eq!(difference(got, want, tolerance(want)), None, "{what}");
    }
}

#[test]
fn models_run_on_other_architectures() {
    for name in MODELS {
        let Some((graph, case)) = model(name) else { return };
        let here = run_compiled(&graph, &case.inputs, &Compiler::new()).expect("a run");
        for machine in machines() {
            let mut machine = machine.lock().expect("no other test panics with it");
            let what = format!("{name} on {}", machine.cpu().triple.name);
            let start = std::time::Instant::now();
            let got = machine.run(&graph, &case.inputs).unwrap_or_else(|e| panic!("{what}: {e}"));
            println!("{what}: {:.1} s", start.elapsed().as_secs_f64());
            check(&what, &got, &case.outputs);
            check(&format!("{what} beside this machine"), &got, &here);
        }
    }
}

/// The linkers of other architectures take objects and archives.
#[test]
fn programs_of_other_architectures_link_models() {
    let Some((graph, case)) = model("cnn_b1") else { return };
    for emulator in emulators() {
        if Machine::new(emulator.clone()).is_none() {
            continue;
        }
        let target = emulator.cpu.triple.name;
        for (kind, name) in [(Kind::Object, "net.o"), (Kind::Archive, "net.a")] {
            let folder = tempfile::tempdir().expect("a folder");
            let path = |name: &str| folder.path().join(name);
            let form = Form::new(kind, "net");
            let compiler = Compiler::new().target(emulator.cpu.clone());
            let package = compiler.package_of(&graph, [0; 32], &form).expect("a package");
            fs::write(path(name), package.file).expect("a file");
            fs::write(path("net.h"), package.header).expect("a header");
            for (i, input) in case.inputs.iter().enumerate() {
                fs::write(path(&format!("input_{i}.bin")), input.bytes()).expect("an input");
            }
            let mut cc = Command::new(emulator.cc);
            cc.args(["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-DNAME=net"]);
            cc.arg("-DHEADER=\"net.h\"").arg("-I").arg(folder.path());
            cc.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("aot/run.c"));
            cc.arg(path(name)).arg("-o").arg(path("program"));
            let mut run = Command::new(emulator.qemu[0]);
            run.args(&emulator.qemu[1..]).arg(path("program")).arg(folder.path());
            for command in [&mut cc, &mut run] {
                let output = command.output().expect("a command that starts");
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{target}, {command:?}: {said}");
            }
            for (i, want) in case.outputs.iter().enumerate() {
                let bytes = fs::read(path(&format!("output_{i}.bin"))).expect("an output");
                let got = Tensor::from_bytes(want.dtype(), want.shape(), &bytes).expect("a size");
                check(&format!("{name} of {target}"), &[got], std::slice::from_ref(want));
            }
        }
    }
}

/// This machine's architecture, as a CPU of a time.
fn x86(model: &'static str) -> Option<Machine> {
    let cpu = Cpu::named(Some("x86_64-unknown-linux-gnu"), None).expect("a known target");
    Machine::new(Emulator { cpu, cc: "cc", qemu: vec!["qemu-x86_64", "-cpu", model] })
}

/// What a CPU says of code for each level: it runs, or the CPU lacks something. Never an illegal
/// instruction.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_cpu_refuses_what_it_lacks() {
    let Some((graph, case)) = model("mlp_b1") else { return };
    // Core 2 has no SSE4; Nehalem no AVX, Ivy Bridge no AVX2; qemu has no AVX-512.
    let cpus = [("Conroe", 0), ("Nehalem", 1), ("IvyBridge", 1), ("Haswell", 2)];
    for (name, runs) in cpus {
        let Some(mut machine) = x86(name) else { return };
        for (i, level) in ["x86-64-v2", "x86-64-v3", "x86-64-v4"].into_iter().enumerate() {
            let cpu = Cpu::named(Some("x86_64-unknown-linux-gnu"), Some(level)).expect("a level");
            match machine.run_for(cpu, &graph, &case.inputs) {
                Ok(got) if i < runs => check(&format!("{level} on {name}"), &got, &case.outputs),
                Ok(_) => panic!("{name} runs {level}"),
                // KILN_UNSUPPORTED_CPU
                Err(why) => assert_eq!((why.as_str(), i < runs), ("status 3", false), "{name}"),
            }
        }
    }
}

/// One file for all of them: the fastest code that the CPU can run, as if there were no other.
#[test]
#[cfg(target_arch = "x86_64")]
fn several_levels_in_one_file() {
    let Some((graph, case)) = model("mlp_b1") else { return };
    let level = |name| Cpu::named(Some("x86_64-unknown-linux-gnu"), Some(name)).expect("a level");
    for (name, same) in [("Conroe", None), ("Nehalem", None), ("Haswell", Some("x86-64-v3"))] {
        let Some(mut machine) = x86(name) else { return };
        let got = machine.run_for(level("multi"), &graph, &case.inputs);
        if name == "Conroe" {
            assert_eq!(got.expect_err("a CPU without SSE4"), "status 3");
            continue;
        }
        let got = got.unwrap_or_else(|why| panic!("{name}: {why}"));
        check(name, &got, &case.outputs);
        if let Some(same) = same {
            let alone = machine.run_for(level(same), &graph, &case.inputs).expect("a run");
            assert!(got.iter().zip(&alone).all(|(a, b)| a.bytes() == b.bytes()), "{name}");
        }
    }
}

/// Such a file loaded here, and the kernels of it that are chosen.
#[test]
#[cfg(target_arch = "x86_64")]
fn several_levels_are_loaded() {
    let Some((graph, case)) = model("cnn_b1") else { return };
    let level = |name| Cpu::named(Some("x86_64-unknown-linux-gnu"), Some(name)).expect("a level");
    if !level("x86-64-v3").runs_here() {
        skip("this machine is older than x86-64-v3");
        return;
    }
    for precision in Precision::ALL {
        let compiler = Compiler::new().precision(precision);
        let graph = compiler.rounded(graph.clone());
        let [multi, here] = ["multi", "x86-64-v3"].map(|name| compiler.clone().target(level(name)));
        loaded_as(&graph, &case.inputs, &multi, &here);
    }
}

/// The file of one compiler gives the same bytes as the kernels of another one.
#[cfg(target_arch = "x86_64")]
fn loaded_as(graph: &Graph, inputs: &[Tensor], compiler: &Compiler, here: &Compiler) {
    let form = Form::new(Kind::Shared, "net");
    let package = compiler.package_of(graph, [0; 32], &form).expect("a package");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("net.so");
    fs::write(&path, package.file).expect("a file");
    let pool = std::sync::Arc::new(kiln_runtime::pool::Pool::new(1).expect("threads"));
    // SAFETY: the file was written above.
    let loaded = unsafe { Executable::load(&path, pool) }.expect("a file that loads");
    let names: Vec<String> = graph.inputs.iter().map(|port| port.0.clone()).collect();
    let views: Vec<_> =
        names.iter().map(String::as_str).zip(inputs.iter().map(Tensor::view)).collect();
    let got = loaded.run(&views).expect("a run");
    let want = run_compiled(graph, inputs, here).expect("a run");
    for ((_, got), want) in got.iter().zip(&want) {
        assert_eq!(got.bytes(), want.bytes());
    }
}

/// Old levels run here too: the same model on narrower vectors.
#[test]
#[cfg(target_arch = "x86_64")]
fn levels_agree_on_models() {
    for name in MODELS {
        let Some((graph, case)) = model(name) else { return };
        for level in ["x86-64-v2", "x86-64-v3", "+avx,+bmi1", "multi"] {
            let cpu = Cpu::named(None, Some(level)).expect("a level");
            if !cpu.runs_here() {
                continue;
            }
            let compiler = Compiler::new().target(cpu);
            let got = run_compiled(&graph, &case.inputs, &compiler).expect("a run");
            check(&format!("{name} for {level}"), &got, &case.outputs);
        }
    }
}
