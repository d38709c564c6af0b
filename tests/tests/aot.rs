//! Compiled models as files: C99, C++17 and Rust programs run them, and get the bits that the same
//! model gives when it is compiled in memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln::tensor::{Tensor, TensorView};
use kiln::{Compiler, Executable, Form, Kind, Limits, Model, Package};
use kiln_tests::cases::{folders, name_of, read_case};
use kiln_tests::{Random, oracle, skip};
use object::elf::{DT_NEEDED, DT_TEXTREL, PF_W, PF_X, PT_LOAD};
use object::read::elf::{Dyn, ElfFile64, ProgramHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol};

/// A language, its compiler, and what turns every doubt into an error.
struct Language {
    name: &'static str,
    command: &'static str,
    flags: &'static [&'static str],
}

const C: Language = Language { name: "C99", command: "cc", flags: &["-std=c99"] };
const CPP: Language =
    Language { name: "C++17", command: "c++", flags: &["-std=c++17", "-x", "c++"] };
const STRICT: [&str; 5] = ["-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"];

fn there(command: &str) -> bool {
    let there = Command::new(command).arg("--version").output().is_ok_and(|o| o.status.success());
    if !there {
        skip(&format!("no `{command}` to build programs around compiled models"));
    }
    there
}

fn done(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out
}

fn ending(kind: Kind) -> &'static str {
    match kind {
        Kind::Shared => "so",
        Kind::Object => "o",
        Kind::Archive => "a",
    }
}

/// A model in a folder of its own: what programs are to give, and the files that they use.
struct Work {
    folder: tempfile::TempDir,
    model: Model,
    expected: Vec<Vec<u8>>,
    compiler: Compiler,
}

impl Work {
    /// Compiles a model in memory and writes down inputs; the outputs are what others must give.
    fn new(case: &Path) -> Work {
        let folder = tempfile::tempdir().expect("a folder");
        let data = read_case(case, case).expect("a stored case");
        let model = Model::open(case.join("model.onnx"), &Limits::default()).expect("a model");
        let mut work = Work { folder, model, expected: Vec::new(), compiler: Compiler::new() };
        let executable = work.compiler.compile(&work.model).expect("a compiled model");
        work.give(&executable, &data.inputs);
        work
    }

    /// Writes down inputs, and what the model compiled in memory makes of them.
    fn give(&mut self, executable: &Executable, inputs: &[Tensor]) {
        let names = executable.inputs().iter().map(|port| port.name.clone());
        let names: Vec<String> = names.collect();
        let inputs: Vec<(&str, TensorView)> =
            names.iter().map(String::as_str).zip(inputs.iter().map(Tensor::view)).collect();
        for (i, (_, input)) in inputs.iter().enumerate() {
            let path = self.path(&format!("input_{i}.bin"));
            fs::write(path, input.bytes).expect("an input is written");
        }
        let outputs = executable.run(&inputs).expect("a run");
        self.expected = outputs.iter().map(|(_, t)| t.view().bytes.to_vec()).collect();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn package(&self, kind: Kind, weights: Option<&str>) -> Package {
        let weights = weights.map(String::from);
        let file = Some(format!("net.{}", ending(kind)));
        let form = Form { kind, name: "net".into(), file, weights: weights.clone() };
        let package = self.compiler.package(&self.model, &form).expect("a package");
        fs::write(self.path(&format!("net.{}", ending(kind))), &package.file).expect("a file");
        fs::write(self.path("net.h"), &package.header).expect("a header");
        if let (Some(name), Some(weights)) = (&weights, &package.weights) {
            fs::write(self.path(name), weights.bytes()).expect("weights");
        }
        package
    }

    /// Builds the program of `aot/run.c` around a file, runs it and compares the outputs.
    fn check(&self, language: &Language, kind: Kind, weights: Option<&str>) -> String {
        self.check_with(language, kind, weights, &[])
    }

    /// The same with more arguments for the compiler of the program.
    fn check_with(
        &self,
        language: &Language,
        kind: Kind,
        weights: Option<&str>,
        more: &[String],
    ) -> String {
        let file = self.path(&format!("net.{}", ending(kind)));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("aot/run.c");
        let program = self.path("program");
        let mut build = Command::new(language.command);
        build.args(language.flags).args(STRICT).arg("-I").arg(self.folder.path());
        build.args(["-DNAME=net", "-DHEADER=\"net.h\""]).args(more);
        if let Some(name) = weights {
            build.arg(format!("-DWEIGHTS=\"{}\"", self.path(name).display()));
        }
        build.arg(source).args(["-x", "none"]).arg(file).arg("-o").arg(&program);
        build.arg(format!("-Wl,-rpath,{}", self.folder.path().display()));
        done(&mut build);
        let said = done(Command::new(&program).arg(self.folder.path()));
        for (i, expected) in self.expected.iter().enumerate() {
            let path = self.path(&format!("output_{i}.bin"));
            let found = fs::read(&path).expect("an output");
            assert!(found == *expected, "{}, {kind:?}: output {i} differs", language.name);
            fs::remove_file(path).expect("an output is removed");
        }
        said
    }
}

fn weight_bytes(file: &[u8]) -> u64 {
    let file = ElfFile64::<Endianness>::parse(file).expect("an ELF file");
    file.section_by_name(".weights").map_or(0, |section| section.size())
}

#[test]
fn every_model_runs_from_a_shared_library() {
    let Some(models) = oracle("models") else { return };
    if !there(C.command) {
        return;
    }
    for case in folders(&models) {
        let work = Work::new(&case);
        let file = work.package(Kind::Shared, None).file;
        let said = work.check(&C, Kind::Shared, None);
        let rest = file.len() as u64 - weight_bytes(&file);
        println!("{}: {} KB beside the weights; {said}", name_of(&case), rest / 1024);
    }
}

#[test]
fn resnet_runs_in_every_form_from_c_and_cpp() {
    let Some(models) = oracle("models") else { return };
    if !there(C.command) || !there(CPP.command) {
        return;
    }
    let work = Work::new(&models.join("light_resnet50_random"));
    for kind in [Kind::Shared, Kind::Object, Kind::Archive] {
        let file = work.package(kind, None).file;
        if kind == Kind::Shared {
            let rest = file.len() as u64 - weight_bytes(&file);
            assert!(rest < 400 << 10, "{rest} bytes beside the weights");
        }
        work.check(&C, kind, None);
        work.check(&CPP, kind, None);
        let file = work.package(kind, Some("net.weights")).file;
        assert!(file.len() < 400 << 10, "{} bytes without weights", file.len());
        work.check(&C, kind, Some("net.weights"));
    }
}

#[test]
fn programs_are_clean_under_sanitizers() {
    let Some(models) = oracle("models") else { return };
    if !there(C.command) {
        return;
    }
    let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"].map(String::from);
    for name in ["mlp_b1", "cnn_b1", "encoder", "qdq_mlp_b1"] {
        let work = Work::new(&models.join(name));
        for kind in [Kind::Shared, Kind::Object] {
            work.package(kind, None);
            work.check_with(&C, kind, None, &flags);
        }
    }
}

#[test]
fn one_file_serves_all_lengths_of_dims() {
    let Some(models) = oracle("dynamic") else { return };
    if !there(C.command) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let model = Model::open(models.join("encoder/model.onnx"), &Limits::default());
    let model = model.expect("a model");
    let compiler = Compiler::new().dim_range("batch", 1..=4).dim_range("sequence", 1..=64);
    let executable = compiler.compile_ranges(&model).expect("an executable");
    let mut work = Work { folder, model, expected: Vec::new(), compiler };
    work.package(Kind::Shared, None);
    work.package(Kind::Object, None);
    for (batch, sequence) in [(2, 17), (1, 1), (4, 64), (3, 40)] {
        let mut random = Random::new(batch as u64);
        let ids: Vec<i64> = (0..batch * sequence).map(|_| random.below(50) as i64).collect();
        let ids = Tensor::from_slice(&[batch, sequence], &ids);
        let mask = random.tensor(&[batch, sequence]);
        work.give(&executable, &[ids, mask]);
        let dims = [format!("-DDIMS={batch},{sequence}")];
        work.check_with(&C, Kind::Shared, None, &dims);
        work.check_with(&CPP, Kind::Object, None, &dims);
    }
}

#[test]
fn a_program_in_c_keeps_its_caches_in_place() {
    let Some(models) = oracle("dynamic") else { return };
    if !there(C.command) {
        return;
    }
    let model = models.join("language/model.onnx");
    let model = Model::open(model, &Limits::default()).expect("a model");
    let compiler = Compiler::new().dim_range("past", 0..=64).state("past_*", "present_*");
    let mut session = compiler.compile_ranges(&model).expect("an executable").session();
    let (mut token, mut expected) = (7i64, String::new());
    for position in 0..64 {
        let (given, place) = (
            Tensor::from_slice(&[1, 1], &[token]),
            Tensor::from_slice(&[1, 1], &[position as i64]),
        );
        let outputs = session.run(&[("token", given.view()), ("position", place.view())]);
        let outputs = outputs.expect("a step");
        let scores = outputs[0].1.as_slice::<f32>().expect("scores");
        let best = (0..scores.len()).rev().max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        token = best.expect("a vocabulary") as i64;
        expected += &format!("{token} ");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let work = Work { folder, model, expected: Vec::new(), compiler };
    work.package(Kind::Shared, None);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("aot/generate.c");
    let program = work.path("generate");
    let mut build = Command::new(C.command);
    build.args(C.flags).args(STRICT).arg("-I").arg(work.folder.path());
    build.args(["-DNAME=net", "-DHEADER=\"net.h\""]).arg(source).arg(work.path("net.so"));
    build.arg(format!("-Wl,-rpath,{}", work.folder.path().display())).arg("-o").arg(&program);
    done(&mut build);
    assert_eq!(done(Command::new(&program).args(["7", "64"])), expected);
    // One more than there is room for.
    let output = Command::new(&program).args(["7", "66"]).output().expect("a run");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("dim `past`"), "{text}");
}

#[test]
fn a_shared_library_needs_nothing_and_changes_nothing() {
    let Some(models) = oracle("models") else { return };
    let work = Work::new(&models.join("cnn_b1"));
    let bytes = work.package(Kind::Shared, None).file;
    assert_eq!(bytes, work.package(Kind::Shared, None).file, "the same model, the same bytes");
    let file = ElfFile64::<Endianness>::parse(&*bytes).expect("an ELF file");
    let endian = Endianness::Little;
    for header in file.elf_program_headers() {
        let flags = header.p_flags(endian);
        assert_ne!(flags & (PF_W | PF_X), PF_W | PF_X, "memory that is written and run");
        if header.p_type(endian) == PT_LOAD && flags & PF_W != 0 {
            assert!(header.p_filesz(endian) < 4096, "weights are shared, not written");
        }
        let dynamic = header.dynamic(endian, &*bytes).expect("a table for the dynamic linker");
        for entry in dynamic.into_iter().flatten() {
            let tag = entry.d_tag(endian);
            assert!(![DT_NEEDED, DT_TEXTREL].contains(&tag), "an entry {tag}");
        }
    }
    for symbol in file.dynamic_symbols() {
        assert!(!symbol.is_undefined(), "{:?} is not in the file", symbol.name());
    }
    assert!(file.dynamic_relocations().is_none_or(|mut all| all.next().is_none()));
    let functions = file.dynamic_symbols().filter_map(|s| s.name().ok().map(String::from));
    let mut functions: Vec<String> = functions.filter(|name| !name.is_empty()).collect();
    functions.sort();
    let expected = [
        "abi_version",
        "about",
        "dim",
        "dim_count",
        "input",
        "input_count",
        "output",
        "output_count",
        "run",
        "run_with",
        "scratch_size",
        "status_text",
        "weights_size",
    ];
    assert_eq!(functions, expected.map(|name| format!("net_{name}")));
}

#[test]
fn programs_of_the_examples_link_the_object() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/embed");
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["Cargo.toml", "build.rs", "src/main.rs"] {
        let to = folder.path().join(file);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::copy(example.join(file), to).expect("a copy");
    }
    let model = example.join("../digits.onnx");
    let model = Model::open(model, &Limits::default()).expect("the model of the example");
    let form = Form::new(Kind::Object, "digits");
    let package = Compiler::new().dim("batch", 1).package(&model, &form).expect("a package");
    fs::write(folder.path().join("digits.o"), package.file).expect("an object");
    fs::write(folder.path().join("digits.h"), package.header).expect("a header");
    if there(C.command) {
        let mut build = Command::new(C.command);
        build.args(C.flags).args(STRICT).arg("-I").arg(folder.path());
        build.arg(example.join("digits.c")).arg(folder.path().join("digits.o"));
        done(build.arg("-o").arg(folder.path().join("digits")));
        let said = done(&mut Command::new(folder.path().join("digits")));
        assert!(said.contains("is a 6"), "{said}");
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "-q", "--release", "--offline"]).current_dir(folder.path());
    cargo.env("CARGO_TARGET_DIR", folder.path().join("target"));
    let said = done(&mut cargo);
    assert!(said.contains("is a 6"), "{said}");
}
