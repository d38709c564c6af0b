//! Limits that keep the code readable, as a test.

use std::path::{Path, PathBuf};

/// Files longer than the guide, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[("compiler/src/onnx/proto.rs", "made by prost")];
const FILE_LINES: usize = 600;

/// Functions longer than the guide, each with its reason.
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[
    ("compiler/src/graph/infer.rs", "infer_unchecked", "an arm for each operation of the graph"),
    (
        "compiler/src/backend/cpu/wide/graphs.rs",
        "grow",
        "random graphs: an arm for each kind of node",
    ),
];
const FUNCTION_LINES: usize = 70;

const LINE_COLUMNS: usize = 100;

/// Folders of the compiler in the order of the pipeline: each imports only from those before it.
const ORDER: &[&[&str]] = &[
    &["error"],
    &["graph"],
    &["onnx", "rules"],
    &["loops"],
    &["plan"],
    &["backend"],
    &["package", "compile"],
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).expect("a folder of the project");
    for entry in entries.map(|e| e.expect("an entry").path()) {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if entry.is_dir() && !name.starts_with('.') && name != "target" {
            rust_files(&entry, files);
        } else if name.ends_with(".rs") {
            files.push(entry);
        }
    }
}

fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for folder in ["compiler/src", "compiler/cli", "runtime", "tests", "benches", "examples"] {
        rust_files(&root().join(folder), &mut files);
    }
    files.sort();
    files
        .into_iter()
        .map(|file| {
            let text = std::fs::read_to_string(&file).expect("source is text");
            let name = file.strip_prefix(root()).expect("below the root").display().to_string();
            (name, text)
        })
        .collect()
}

#[test]
fn files_and_lines_are_short() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let excused = LONG_FILES.iter().any(|l| l.0 == name);
        let lines = text.lines().count();
        if lines > FILE_LINES && !excused {
            problems.push(format!("{name}: {lines} lines"));
        }
        for (i, line) in text.lines().enumerate() {
            // Text in quotes may be as long as it is.
            if line.chars().count() > LINE_COLUMNS && !line.contains('"') {
                problems.push(format!("{name}:{}: {} columns", i + 1, line.chars().count()));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn excuses_are_needed() {
    let sources = sources();
    for (name, reason) in LONG_FILES {
        let text = &sources.iter().find(|s| s.0 == *name).expect("the file is there").1;
        assert!(text.lines().count() > FILE_LINES * 9 / 10, "{name} is short now: {reason}");
    }
}

/// Functions of a file with their lengths: rustfmt ends each at the indent at which it begins.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(key) = words.iter().position(|w| *w == "fn") else { continue };
        let before = ["pub", "pub(super)", "pub(crate)", "unsafe", "const", "extern", "\"C\""];
        if !words[..key].iter().all(|w| before.contains(w)) {
            continue;
        }
        let name = words.get(key + 1).copied().unwrap_or_default();
        let name = name.split(['(', '<']).next().unwrap_or_default().to_string();
        let close = format!("{}}}", " ".repeat(indent));
        // The header ends where a body begins, or without one, or with one of a line.
        let header = lines[at..].iter().find(|l| l.ends_with(['{', ';', '}']));
        let length = match header {
            Some(line) if line.ends_with('{') => {
                lines[at..].iter().position(|l| *l == close).map_or(1, |n| n + 1)
            }
            _ => 1,
        };
        found.push((name, length));
    }
    found
}

#[test]
fn functions_are_short() {
    let mut problems = Vec::new();
    let mut excused = vec![false; LONG_FUNCTIONS.len()];
    for (file, text) in sources() {
        for (name, length) in functions(&text).into_iter().filter(|f| f.1 > FUNCTION_LINES) {
            match LONG_FUNCTIONS.iter().position(|l| (l.0, l.1) == (file.as_str(), name.as_str())) {
                Some(at) => excused[at] = true,
                None => problems.push(format!("{file}: {name} has {length} lines")),
            }
        }
    }
    for ((file, name, reason), _) in LONG_FUNCTIONS.iter().zip(excused).filter(|e| !e.1) {
        problems.push(format!("{file}: {name} is short now: {reason}"));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn lengths_of_functions_are_seen() {
    let text = "fn a() {\n    b();\n}\n    pub fn c(\n    ) -> T {\n        d;\n    }\nfn e();\n";
    let want = [("a".to_string(), 3), ("c".to_string(), 4), ("e".to_string(), 1)];
    assert_eq!(functions(text), want);
}

/// `missing_docs` and the other lints of the workspace hold where a manifest asks for them.
#[test]
fn every_package_has_the_lints_of_the_workspace() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("the workspace");
    assert!(manifest.contains("missing_docs = \"deny\""));
    let members = manifest.lines().find(|l| l.starts_with("members")).expect("members");
    for member in members.split('"').skip(1).step_by(2) {
        let path = root().join(member).join("Cargo.toml");
        let text = std::fs::read_to_string(&path).expect("a manifest");
        assert!(text.contains("[lints]\nworkspace = true"), "{member} has lints of its own");
    }
}

/// The test that holds every rule to fire goes over the table itself: no list of names can be old.
#[test]
fn every_rule_is_tested_for_soundness() {
    let file = root().join("compiler/src/rules/tests.rs");
    let text = std::fs::read_to_string(file).expect("tests of the rules");
    assert!(text.contains("for rule in RULES") && text.contains("fired[rule.name]"));
}

#[test]
fn nothing_is_left_for_later() {
    let marks = ["todo", "unimplemented", "dbg"].map(|m| format!("{m}!("));
    let mut problems = Vec::new();
    for (name, text) in sources() {
        for (i, line) in text.lines().enumerate() {
            if marks.iter().any(|m| line.contains(m.as_str())) {
                problems.push(format!("{name}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn imports_go_one_way() {
    let stage_of = |module: &str| ORDER.iter().position(|group| group.contains(&module));
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let Some(inside) = name.strip_prefix("compiler/src/") else { continue };
        let folder = inside.split(['/', '.']).next().unwrap_or_default();
        let Some(own) = stage_of(folder) else { continue };
        // Tests may look at everything.
        if inside.ends_with("tests.rs") {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            for part in line.split("crate::").skip(1) {
                let module: String =
                    part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let stage = stage_of(&module);
                let allowed = module == folder || stage.is_none_or(|s| s < own);
                if !allowed {
                    problems.push(format!("{name}:{}: {folder} imports {module}", i + 1));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn the_product_does_not_depend_on_oracles() {
    for manifest in ["compiler/Cargo.toml", "compiler/cli/Cargo.toml", "runtime/Cargo.toml"] {
        let text = std::fs::read_to_string(root().join(manifest)).expect("a manifest");
        for banned in ["tch", "torch-sys", "reqwest", "curl", "openssl"] {
            let line = text.lines().find(|l| l.trim_start().starts_with(&format!("{banned}.")));
            assert!(line.is_none(), "{manifest}: {line:?}");
        }
    }
}
