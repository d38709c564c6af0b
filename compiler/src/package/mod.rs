//! Files of a compiled model that a program of any language can use: a shared library, an object
//! or a static library, each with a C header. They need the C library at most.

mod driver;
mod elf;
mod header;
mod object;

use ::object::{Object, ObjectSection};
use kiln_runtime::artifact::Constants;
use kiln_runtime::manifest::{self, Hash, Manifest, Weights};
use kiln_runtime::plan::{Plan, Step};

use crate::backend::cpu::target::System;
use crate::backend::cpu::{Cpu, Emitted, cpuid};
use crate::error::{Diagnostic, Error, ErrorKind, Result};

/// What kind of file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A shared library (`.so`), for ELF systems.
    Shared,
    /// A relocatable object (`.o`), for any linker.
    Object,
    /// A static library (`.a`) of one object.
    Archive,
}

/// How a file is made.
#[derive(Clone, Debug)]
pub struct Form {
    /// What kind of file.
    pub kind: Kind,
    /// What its functions begin with: a C identifier.
    pub name: String,
    /// The file name of the weights, where they lie beside.
    pub weights: Option<String>,
}

/// A compiled model as files.
pub struct Package {
    /// The shared library, object or static library.
    pub file: Vec<u8>,
    /// Its C header.
    pub header: String,
    /// The weights, where they lie beside.
    pub weights: Option<Constants>,
}

type Packed<T> = std::result::Result<T, String>;

fn failed(why: impl std::fmt::Display) -> String {
    why.to_string()
}

/// A C identifier made of any text.
pub fn identifier(text: &str) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name: String = text.chars().take(100).map(clean).collect();
    match name.chars().next() {
        None => "model".to_string(),
        Some(c) if c.is_ascii_digit() => format!("model_{name}"),
        Some(_) => name,
    }
}

/// What a package is made of.
pub struct Contents<'a> {
    /// Order and memory.
    pub plan: &'a Plan,
    /// Kernels.
    pub emitted: &'a Emitted,
    /// What the kernels read besides inputs.
    pub constants: Constants,
    /// What it is for.
    pub cpu: &'a Cpu,
    /// Hash of what it was made from.
    pub model_hash: Hash,
}

/// The files of a compiled model.
pub fn package(contents: Contents, form: &Form, verify: bool) -> Result<Package> {
    files(contents, form, verify).map_err(|why| {
        let diagnostic = Diagnostic::new("K0901", "the file of a compiled model").found(why);
        Error::new(ErrorKind::Model, diagnostic)
    })
}

fn files(contents: Contents, form: &Form, verify: bool) -> Packed<Package> {
    let Contents { constants, cpu, model_hash, .. } = contents;
    let (plan, emitted) = used(contents.plan, contents.emitted);
    let external = form.weights.is_some();
    let features: Vec<String> = cpu.features.iter().map(|f| f.name.to_string()).collect();
    let about = about(cpu, &features, &model_hash);
    let supported = cpuid::checks(cpu).map(|checks| cpuid::supported(&checks));
    let parts = driver::Parts {
        name: &form.name,
        plan: &plan,
        emitted: &emitted,
        supported: supported.as_deref(),
        weights: constants.len(),
        external,
        about: &about,
    };
    let beside = form.weights.as_deref().map(|file| (file, constants.len()));
    let header = header::header(&form.name, &plan, &about, beside);
    let mut code = object::code(&parts, cpu, verify)?;
    let bytes = constants.len();
    let weights = match &form.weights {
        None => Weights::Inside { bytes },
        Some(file) => {
            let hash = *blake3::hash(constants.bytes()).as_bytes();
            Weights::External { file: file.clone(), bytes, hash }
        }
    };
    let manifest = manifest::encode(&Manifest {
        producer: env!("CARGO_PKG_VERSION").to_string(),
        target: cpu.triple.name.to_string(),
        features,
        model_hash,
        name: form.name.clone(),
        plan,
        entries: code.entries.clone(),
        weights,
    });
    code.manifest(&manifest);
    let inside: &[u8] = if external { &[] } else { constants.bytes() };
    let mut file = match form.kind {
        Kind::Shared => elf::shared(&code.write()?, inside, &format!("{}.so", form.name))?,
        Kind::Object | Kind::Archive => {
            code.weights(inside);
            code.write()?
        }
    };
    seal(&mut file, &manifest)?;
    if form.kind == Kind::Archive {
        file = object::archive(&file, &format!("{}.o", form.name), apple(cpu))?;
    }
    Ok(Package { file, header, weights: external.then_some(constants) })
}

/// What is run, without the kernels that were only needed to compute constants.
fn used(plan: &Plan, emitted: &Emitted) -> (Plan, Emitted) {
    let mut kept: Vec<usize> = plan.steps.iter().map(|step| step.kernel).collect();
    kept.sort_unstable();
    kept.dedup();
    let number = |kernel| kept.binary_search(&kernel).expect("every kernel of a step is kept");
    let step = |step: &Step| Step { kernel: number(step.kernel), ..step.clone() };
    let steps = plan.steps.iter().map(step).collect();
    let code = emitted.code.clone();
    let of = |all: &[usize]| kept.iter().map(|&kernel| all[kernel]).collect();
    let (entries, sizes) = (of(&emitted.entries), of(&emitted.sizes));
    (Plan { steps, ..plan.clone() }, Emitted { code, entries, sizes, ..Emitted::default() })
}

/// What `NAME_about` says.
fn about(cpu: &Cpu, features: &[String], model_hash: &Hash) -> String {
    let needs = match features {
        [] => String::new(),
        features => format!(", needs {}", features.join(" ")),
    };
    let (version, hash) = (env!("CARGO_PKG_VERSION"), manifest::hex(model_hash));
    format!("Kiln {version}, {}{needs}, model {}", cpu.triple.name, &hash[..16])
}

/// Writes the hash of the whole file into its manifest.
fn seal(file: &mut [u8], manifest: &[u8]) -> Packed<()> {
    let names = [manifest::SECTION, "__kiln"];
    let at = {
        let parsed = ::object::File::parse(&*file).map_err(failed)?;
        let section = names.iter().find_map(|name| parsed.section_by_name(name));
        section.and_then(|s| s.file_range()).map(|range| range.0 as usize)
    };
    let at = at.filter(|&at| file[at..].starts_with(manifest));
    manifest::seal(file, at.ok_or_else(|| failed("the manifest is not where it was put"))?);
    Ok(())
}

fn apple(cpu: &Cpu) -> bool {
    cpu.triple.system == System::Darwin
}
