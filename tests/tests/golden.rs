//! The text of every stage of three small models, as it is in `golden/`.
//!
//! `KILN_BLESS=1 cargo test -p kiln-tests --test golden` writes the files anew. Portable stages are
//! those of 128 bit vectors, which every machine can emit; `asm` is the wide code of AVX2. Of
//! machine code there is the shortest kernel of each model.

use std::fmt::Write;
use std::path::PathBuf;

use kiln::Compiler;
use kiln::backend::cpu::Cpu;
use kiln::tensor::Tensor;
use kiln_tests::small::{MODELS, graph};
use kiln_tests::{
    Random, Tolerance, compilers, difference, interpret, old_compiler, run_compiled, skip,
};

/// The shortest kernel of a text in which each one begins with a line `; name`: code is long.
fn shortest(text: &str) -> String {
    let kernels = text.split("\n; ").map(|k| k.strip_prefix("; ").unwrap_or(k).trim_end());
    let one = kernels.min_by_key(|k| k.lines().count()).unwrap_or_default();
    format!("; {one}\n")
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// The first lines that differ, with a few around them.
fn first_difference(name: &str, want: &str, got: &str) -> Option<String> {
    if want == got {
        return None;
    }
    let (want, got): (Vec<&str>, Vec<&str>) = (want.lines().collect(), got.lines().collect());
    let at = (0..want.len().max(got.len())).find(|&i| want.get(i) != got.get(i))?;
    let mut text = format!("{name} differs at line {}:\n", at + 1);
    let lines = |all: &[&str], range: std::ops::Range<usize>| -> Vec<String> {
        all.iter().skip(range.start).take(range.len()).map(|l| l.to_string()).collect()
    };
    for (mark, part) in [
        (' ', lines(&want, at.saturating_sub(3)..at)),
        ('-', lines(&want, at..at + 6)),
        ('+', lines(&got, at..at + 6)),
    ] {
        part.iter().for_each(|line| {
            let _ = writeln!(text, "{mark} {line}");
        });
    }
    let _ = writeln!(text, "({} lines, now {})", want.len(), got.len());
    Some(text)
}

#[test]
fn stages_are_as_they_were() {
    let bless = std::env::var_os("KILN_BLESS").is_some();
    // Whatever this machine can run: these texts are never run.
    let avx2 = Cpu::named(None, Some("x86-64-v3"));
    if let Err(why) = &avx2 {
        skip(&format!("asm of the golden models: {why}"));
    }
    let mut problems = Vec::new();
    for (name, make) in MODELS {
        let graph = graph(make);
        let stages = Compiler::new().wide(false).stages_of(&graph).expect("a sound model");
        let mut files = vec![
            ("graph", stages.graph),
            ("fused", stages.fused),
            ("loops", stages.loops),
            ("clif", shortest(&stages.clif)),
            ("plan", stages.plan),
        ];
        if let Ok(avx2) = &avx2 {
            let compiler = Compiler::new().target(avx2.clone());
            let stages = compiler.stages_of(&graph).expect("a sound model");
            files.push(("asm", shortest(&stages.asm)));
        }
        for (stage, got) in files {
            let name = format!("{name}.{stage}.txt");
            if bless {
                std::fs::write(golden(&name), &got).expect("a file beside the tests");
            }
            let want = std::fs::read_to_string(golden(&name)).unwrap_or_default();
            problems.extend(first_difference(&name, &want, &got));
        }
    }
    assert!(problems.is_empty(), "{}\nKILN_BLESS=1 writes them anew.", problems.join("\n"));
}

/// What is written down is right.
#[test]
fn the_models_compute_what_they_mean() {
    for (name, make) in MODELS {
        let graph = graph(make);
        let x = Random::new(2).tensor(&graph.inputs[0].1.shape);
        let want: Tensor = interpret(&graph, std::slice::from_ref(&x)).remove(0);
        for (way, compiler) in compilers().into_iter().chain(old_compiler()) {
            let got = run_compiled(&graph, std::slice::from_ref(&x), &compiler).expect(name);
            let found = difference(&got[0], &want, Tolerance { rtol: 1e-5, atol: 1e-5 });
            assert_eq!(found, None, "{name} {way}");
        }
    }
}
