//! CPUs that code is made for: the one that this runs on, or one that is named.

use kiln_runtime::tensor::DType;

use super::features::{
    AVX2, AVX512, DOTS, FEATURES, Feature, HALVES, LEVELS, closure, feature, level,
};
use super::wide::isa::Level;
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::scalar::Dots;
use crate::loops::lower::Target;

/// Architectures that there is an emitter for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arch {
    /// x86-64
    X86_64,
    /// 64-bit Arm, little endian
    Aarch64,
    /// 64-bit RISC-V with the extensions of `riscv64gc`
    Riscv64,
}

/// Systems by how they write object files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum System {
    /// ELF
    Linux,
    /// Mach-O
    Darwin,
    /// COFF
    Windows,
}

/// A target by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Triple {
    /// Name, as rustc has it.
    pub name: &'static str,
    /// Architecture.
    pub arch: Arch,
    /// System.
    pub system: System,
}

const fn triple(name: &'static str, arch: Arch, system: System) -> Triple {
    Triple { name, arch, system }
}

/// The targets that there are names for.
pub const TRIPLES: &[Triple] = &[
    triple("x86_64-unknown-linux-gnu", Arch::X86_64, System::Linux),
    triple("aarch64-unknown-linux-gnu", Arch::Aarch64, System::Linux),
    triple("riscv64gc-unknown-linux-gnu", Arch::Riscv64, System::Linux),
    triple("x86_64-apple-darwin", Arch::X86_64, System::Darwin),
    triple("aarch64-apple-darwin", Arch::Aarch64, System::Darwin),
    triple("x86_64-pc-windows-msvc", Arch::X86_64, System::Windows),
];

/// The level that x86-64 code is made for where nothing is known of the CPU, and the least that
/// there is code for.
const LEAST: &str = "x86-64-v2";

/// Several levels in one file.
const MULTI: &str = "multi";

/// A CPU: what code may use of it, and how wide vectors are.
///
/// Kernels have one calling convention on every target of an architecture, on x86-64 that of
/// System V, Windows included: nobody calls them but code that Kiln makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Architecture and system.
    pub triple: Triple,
    /// The features that it has to have, in the order of their table; none but on x86-64.
    pub features: Vec<&'static Feature>,
    /// Lanes of f32 that loops are made for.
    pub lanes: usize,
    /// Lanes of f32 in the wide emitter: 16 with AVX-512 F, BW, DQ and VL, 8 with AVX2, FMA
    /// and F16C, and 0 where only Cranelift emits.
    pub wide_lanes: usize,
    /// CPUs that can do more, the best first: files hold code for them too, made of the same
    /// loops, and choose when they run.
    pub faster: Vec<Cpu>,
}

impl Cpu {
    /// The CPU that this runs on. `wide` allows vectors of more than 128 bits.
    pub fn host(wide: bool) -> Cpu {
        // What code never uses must not keep it from running.
        let is_512 = AVX512.iter().all(|n| kiln_runtime::cpu::has(n));
        let of_lanes = |name: &str| {
            let dots = name == DOTS[usize::from(is_512)] || is_512 && name == HALVES;
            AVX512.contains(&name) || AVX2.contains(&name) || dots
        };
        let used = |f: &&Feature| f.clif.is_some() || (wide && of_lanes(f.name));
        let features = FEATURES.iter().filter(used).filter(|f| f.here()).collect();
        Cpu::new(host_triple(), features, wide)
    }

    /// A CPU by the names of a target and of what it has; where nothing is said it is this one.
    ///
    /// # Errors
    /// A name that is not known, or one that says nothing of the target's architecture.
    pub fn named(target: Option<&str>, cpu: Option<&str>) -> Result<Cpu> {
        let host = host_triple();
        let triple = match target {
            None | Some("host") => host,
            Some(name) => *TRIPLES
                .iter()
                .find(|t| t.name == name)
                .ok_or_else(|| unknown("target", name, &names(TRIPLES.iter().map(|t| t.name))))?,
        };
        match (cpu, triple.arch) {
            (Some("host"), _) if triple != host => Err(not_this_machine(triple)),
            (None | Some("host"), _) if triple == host => Ok(Cpu::host(true)),
            (None, Arch::X86_64) => x86(triple, LEAST),
            (Some(cpu), Arch::X86_64) => x86(triple, cpu),
            (None, Arch::Aarch64 | Arch::Riscv64) => Ok(Cpu::new(triple, Vec::new(), false)),
            (Some(cpu), Arch::Aarch64 | Arch::Riscv64) => {
                Err(no_levels(triple, cpu, if triple == host { "`host`" } else { "no `--cpu`" }))
            }
        }
    }

    /// The same without dot products of bf16, for models that are compiled without them: what code
    /// never uses must not keep it from running.
    pub fn without_halves(mut self) -> Cpu {
        self.features.retain(|f| f.name != HALVES);
        self.faster = self.faster.into_iter().map(Cpu::without_halves).collect();
        self
    }

    /// The same without vectors of more than 128 bits.
    pub fn narrow(self) -> Cpu {
        let features = self
            .features
            .into_iter()
            .filter(|f| !f.name.starts_with("avx512") && !DOTS.contains(&f.name));
        Cpu::new(self.triple, features.collect(), false)
    }

    fn new(triple: Triple, features: Vec<&'static Feature>, wide: bool) -> Cpu {
        let has = |all: &[&str]| all.iter().all(|n| features.iter().any(|f| f.name == *n));
        let level = match wide && triple.arch == Arch::X86_64 {
            true if has(AVX512) => Some(Level::Avx512),
            true if has(AVX2) => Some(Level::Avx2),
            true | false => None,
        };
        let wide_lanes = level.map_or(0, Level::lanes);
        let lanes = level.map_or(4, Level::lanes);
        Cpu { triple, features, lanes, wide_lanes, faster: Vec::new() }
    }

    /// What loops need to know of it.
    pub fn target(&self) -> Target {
        if let Some(best) = self.faster.first() {
            return best.target();
        }
        let (lanes, registers) = match (Level::of(self.wide_lanes), self.triple.arch) {
            (Some(level), _) => (level.lanes(), level.registers()),
            (None, Arch::X86_64) => (self.lanes, 11),
            (None, Arch::Aarch64) => (self.lanes, 27),
            // Lanes are scalars there: four of the registers hold what elsewhere one does.
            (None, Arch::Riscv64) => (self.lanes, 7),
        };
        Target { lanes, registers, exact: false, halves: self.dots().rounded.is_some(), threads: 0 }
    }

    /// The dot products that wide code has instructions for.
    pub fn dots(&self) -> Dots {
        let has = |name: &str| self.features.iter().any(|f| f.name == name);
        match Level::of(self.wide_lanes) {
            Some(Level::Avx2) => Dots { whole: has(DOTS[0]), ..Dots::default() },
            Some(Level::Avx512) => {
                let rounded = has(HALVES).then_some(DType::BF16);
                Dots { whole: has(DOTS[1]), rounded, ..Dots::default() }
            }
            None => Dots::default(),
        }
    }

    /// Those that kernels should be made of.
    pub fn wanted_dots(&self) -> Dots {
        self.faster.first().unwrap_or(self).dots()
    }

    /// Cranelift's names of the features.
    pub fn flags(&self) -> Vec<&'static str> {
        self.features.iter().filter_map(|f| f.clif).collect()
    }

    /// Whether its code runs on this machine.
    pub fn runs_here(&self) -> bool {
        self.triple == host_triple() && self.features.iter().all(|f| f.here())
    }

    /// # Errors
    /// Where its code does not run on this machine: what is missing.
    pub fn must_run_here(&self) -> Result<()> {
        if self.runs_here() {
            return Ok(());
        }
        let host = host_triple();
        let missing = self.features.iter().filter(|f| !f.here()).map(|f| f.name);
        let missing: Vec<&str> = missing.collect();
        let found = match self.triple == host {
            true => format!("a CPU without {}", missing.join(", ")),
            false => format!("{}, code for {}", host.name, self.triple.name),
        };
        let diagnostic = Diagnostic::new("K0703", "this machine cannot run code for that target")
            .found(found)
            .help("compile into a file, and run that where it is for");
        Err(Error::new(ErrorKind::Incompatible, diagnostic))
    }

    /// The best of it and those beside it that runs on this machine, or itself.
    pub fn best_here(&self) -> &Cpu {
        self.faster.iter().find(|cpu| cpu.runs_here()).unwrap_or(self)
    }

    /// This machine, running loops that are made for the lanes of that CPU.
    pub fn stand_in(&self) -> Cpu {
        let host = Cpu::host(true);
        let wide_lanes = if host.wide_lanes >= self.wide_lanes { self.wide_lanes } else { 0 };
        Cpu { lanes: self.lanes, wide_lanes, ..host }
    }
}

fn x86(triple: Triple, cpu: &str) -> Result<Cpu> {
    if cpu == MULTI {
        let best = x86(triple, "x86-64-v3")?;
        let least = Cpu { lanes: best.lanes, wide_lanes: 0, ..x86(triple, LEAST)? };
        return Ok(Cpu { faster: vec![best], ..least });
    }
    let features = match level(cpu) {
        Some(features) => features,
        None if cpu.starts_with('+') => listed(cpu)?,
        None => {
            let known = names(["host", MULTI].into_iter().chain(LEVELS.iter().map(|l| l.0)));
            return Err(unknown("CPU", cpu, &known));
        }
    };
    Ok(Cpu::new(triple, features, true))
}

/// Features of a list like `+avx2,+fma`, beside those that every CPU has.
fn listed(list: &str) -> Result<Vec<&'static Feature>> {
    let mut wanted: Vec<&str> = level(LEAST).into_iter().flatten().map(|f| f.name).collect();
    for entry in list.split(',') {
        let name = entry.trim().trim_start_matches('+');
        let known = || names(FEATURES.iter().map(|f| f.name));
        let feature = feature(name).ok_or_else(|| unknown("CPU feature", name, &known()))?;
        wanted.push(feature.name);
    }
    Ok(closure(&wanted))
}

fn host_triple() -> Triple {
    let arch = match std::env::consts::ARCH {
        "aarch64" => Arch::Aarch64,
        "riscv64" => Arch::Riscv64,
        _ => Arch::X86_64,
    };
    let system = match std::env::consts::OS {
        "macos" => System::Darwin,
        "windows" => System::Windows,
        _ => System::Linux,
    };
    let known = TRIPLES.iter().find(|t| t.arch == arch && t.system == system);
    *known.unwrap_or(&TRIPLES[0])
}

fn names(names: impl Iterator<Item = &'static str>) -> Vec<&'static str> {
    names.collect()
}

fn unknown(what: &str, found: &str, known: &[&'static str]) -> Error {
    let mut diagnostic = Diagnostic::new("K0702", format!("an unknown {what}"))
        .found(format!("`{found}`"))
        .expected(format!("one of {}", known.join(", ")));
    let near = known.iter().map(|name| (distance(found, name), name)).min();
    if let Some((_, name)) = near.filter(|(steps, name)| *steps <= name.len() / 3) {
        diagnostic = diagnostic.help(format!("did you mean `{name}`?"));
    }
    Error::new(ErrorKind::Usage, diagnostic)
}

fn not_this_machine(triple: Triple) -> Error {
    let diagnostic = Diagnostic::new("K0702", "`host` is this machine, which the target is not")
        .found(format!("target {}", triple.name))
        .expected(format!("target {}", host_triple().name))
        .help("leave the CPU out, or name what it has");
    Error::new(ErrorKind::Usage, diagnostic)
}

fn no_levels(triple: Triple, cpu: &str, expected: &str) -> Error {
    let message = "there is one set of features for this target, which every such CPU has";
    let diagnostic = Diagnostic::new("K0702", message)
        .found(format!("CPU `{cpu}` of target {}", triple.name))
        .expected(expected)
        .help("names and features of CPUs are for targets of x86-64");
    Error::new(ErrorKind::Usage, diagnostic)
}

/// How many letters have to be put in, taken out or changed to get from one to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // A name comes from a person: what is longer than any name is not compared to its end.
    for (i, x) in a.chars().take(100).enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = changed.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_cpus_have_names() {
        assert_eq!(Cpu::named(None, None).unwrap(), Cpu::host(true));
        assert_eq!(Cpu::named(Some("host"), Some("host")).unwrap(), Cpu::host(true));
        let linux = Some("x86_64-unknown-linux-gnu");
        let lanes = |cpu: &str| Cpu::named(linux, Some(cpu)).unwrap().target().lanes;
        assert_eq!(["x86-64-v2", "x86-64-v3", "x86-64-v4"].map(lanes), [4, 8, 16]);
        assert_eq!(["+avx2,+fma", "+avx2, +bmi2", "+avx512f"].map(lanes), [8, 4, 8]);
        let multi = Cpu::named(linux, Some("multi")).unwrap();
        assert_eq!((multi.lanes, multi.wide_lanes, multi.faster.len()), (8, 0, 1));
        assert_eq!((multi.target(), multi.faster[0].wide_lanes), (multi.faster[0].target(), 8));
        for triple in TRIPLES {
            let cpu = Cpu::named(Some(triple.name), None).unwrap();
            assert_eq!(cpu.triple, *triple);
        }
        assert!(Cpu::host(true).runs_here() && Cpu::host(false).runs_here());
        assert!(!Cpu::named(Some("riscv64gc-unknown-linux-gnu"), None).unwrap().runs_here());
        assert_eq!(Cpu::named(linux, Some("x86-64-v4")).unwrap().narrow().target().lanes, 4);
    }

    #[test]
    fn other_names_are_errors_that_help() {
        let text = |t, c| Cpu::named(t, c).unwrap_err().to_string();
        let linux = Some("x86_64-unknown-linux-gnu");
        let far = Cpu::named(Some("riscv64gc-unknown-linux-gnu"), None).unwrap();
        assert!(far.must_run_here().unwrap_err().to_string().contains("error[K0703]"));
        let cases = [
            (text(Some("aarch64-linux-gnu"), None), "one of x86_64-unknown-linux-gnu, aarch64-"),
            (text(Some("aarch64-unknown-linux-gnu2"), None), "`aarch64-unknown-linux-gnu`?"),
            (text(linux, Some("x86-64v3")), "did you mean `x86-64-v3`?"),
            (text(linux, Some("native")), "one of host, multi, x86-64-v2, x86-64-v3, x86-64-v4"),
            (text(linux, Some("+avx2,+fmaa")), "did you mean `fma`?"),
            (text(linux, Some("+")), "one of sse3, ssse3"),
            (text(Some("riscv64gc-unknown-linux-gnu"), Some("x86-64-v3")), "no `--cpu`"),
            (text(Some("aarch64-apple-darwin"), Some("host")), "leave the CPU out"),
        ];
        for (text, part) in cases {
            assert!(text.contains("error[K0702]") && text.contains(part), "{text}");
        }
        assert!(!text(linux, Some("native")).contains("did you mean"));
    }

    #[test]
    fn letters_between_names() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
    }
}
