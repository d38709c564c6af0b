//! Files of a compiled model that a program of any language can use: a shared library, an object
//! or a static library, each with a C header. They need the C library at most.

mod driver;
mod elf;
pub mod gpu;
mod header;
mod object;

use ::object::{Object, ObjectSection};
use kiln_runtime::artifact::Constants;
use kiln_runtime::manifest::{self, Faster, Hash, Manifest, Weights};
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
    /// The name of the file, by which programs that were linked to a shared library look for it;
    /// none where they look for the path that they were linked with.
    pub file: Option<String>,
    /// The file name of the weights, where they lie beside.
    pub weights: Option<String>,
}

impl Form {
    /// A file with the weights in it, whose functions begin with a name.
    pub fn new(kind: Kind, name: &str) -> Form {
        Form { kind, name: name.to_string(), file: None, weights: None }
    }
}

/// A compiled model as files.
pub struct Package {
    /// The shared library, object or static library.
    pub file: Vec<u8>,
    /// Its C header.
    pub header: String,
    /// Bytes of memory that a run takes from its caller; with ranges of dims, the longest one.
    pub scratch_bytes: usize,
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
    /// What it is for, and kernels for it; the fastest first.
    pub sets: &'a [(Cpu, Emitted)],
    /// What the kernels read besides inputs.
    pub constants: Constants,
    /// Hash of what it was made from.
    pub model_hash: Hash,
}

/// The files of a compiled model.
pub fn package(contents: Contents, form: &Form, verify: bool) -> Result<Package> {
    let target = contents.sets.first().map(|(cpu, _)| cpu.triple);
    if let Some(triple) = target.filter(|t| form.kind == Kind::Shared && t.system != System::Linux)
    {
        let message = "a shared library for this system is made by its own linker";
        let diagnostic = Diagnostic::new("K0902", message)
            .found(format!("target {}", triple.name))
            .help("write an object or a static library, and link that there");
        return Err(Error::new(ErrorKind::Usage, diagnostic));
    }
    files(contents, form, verify).map_err(|why| {
        let diagnostic = Diagnostic::new("K0901", "the file of a compiled model").found(why);
        Error::new(ErrorKind::Model, diagnostic)
    })
}

fn files(contents: Contents, form: &Form, verify: bool) -> Packed<Package> {
    let Contents { constants, sets, model_hash, .. } = contents;
    let (cpu, _) = sets.last().ok_or_else(|| failed("no code"))?;
    let (plan, kept) = used(contents.plan);
    let external = form.weights.is_some();
    let about = about(sets, &model_hash);
    let set = |(cpu, emitted): &(Cpu, Emitted)| driver::Set {
        emitted: only(emitted, &kept),
        supported: cpuid::checks(cpu).map(|checks| cpuid::supported(&checks)),
    };
    let driven: Vec<driver::Set> = sets.iter().map(set).collect();
    let parts = driver::Parts {
        name: &form.name,
        plan: &plan,
        sets: &driven,
        weights: constants.len(),
        external,
        about: &about,
    };
    let beside = form.weights.as_deref().map(|file| (file, constants.len()));
    let scratch_bytes = driver::scratch_bytes(&plan) as usize;
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
    let mut faster = code.entries.clone();
    let entries = faster.pop().ok_or_else(|| failed("no code"))?;
    let set = |cpu, entries| Faster { features: features(cpu), entries };
    let manifest = manifest::encode(&Manifest {
        producer: env!("CARGO_PKG_VERSION").to_string(),
        target: cpu.triple.name.to_string(),
        features: features(cpu),
        model_hash,
        name: form.name.clone(),
        plan,
        entries,
        faster: sets.iter().zip(faster).map(|((cpu, _), e)| set(cpu, e)).collect(),
        modules: Vec::new(),
        weights,
    });
    code.manifest(&manifest);
    let inside: &[u8] = if external { &[] } else { constants.bytes() };
    let mut file = match form.kind {
        Kind::Shared => elf::shared(&code.write()?, inside, form.file.as_deref())?,
        Kind::Object | Kind::Archive => {
            code.weights(inside);
            code.write()?
        }
    };
    seal(&mut file, &manifest)?;
    if form.kind == Kind::Archive {
        file = object::archive(&file, &format!("{}.o", form.name), cpu.triple.system)?;
    }
    Ok(Package { file, header, scratch_bytes, weights: external.then_some(constants) })
}

fn features(cpu: &Cpu) -> Vec<String> {
    cpu.features.iter().map(|f| f.name.to_string()).collect()
}

/// What is run, and the kernels in it: others were only needed to compute constants.
pub fn used(plan: &Plan) -> (Plan, Vec<usize>) {
    let mut kept: Vec<usize> = plan.steps.iter().map(|step| step.kernel).collect();
    kept.sort_unstable();
    kept.dedup();
    let number = |kernel| kept.binary_search(&kernel).expect("every kernel of a step is kept");
    let step = |step: &Step| Step { kernel: number(step.kernel), ..step.clone() };
    let steps = plan.steps.iter().map(step).collect();
    (Plan { steps, ..plan.clone() }, kept)
}

/// The kernels that are kept.
fn only(emitted: &Emitted, kept: &[usize]) -> Emitted {
    let code = emitted.code.clone();
    let of = |all: &[usize]| kept.iter().map(|&kernel| all[kernel]).collect();
    let (entries, sizes) = (of(&emitted.entries), of(&emitted.sizes));
    Emitted { code, entries, sizes, ..Emitted::default() }
}

/// What `NAME_about` says.
fn about(sets: &[(Cpu, Emitted)], model_hash: &Hash) -> String {
    let (version, hash) = (env!("CARGO_PKG_VERSION"), manifest::hex(model_hash));
    let mut text = format!("Kiln {version}");
    for (i, (cpu, _)) in sets.iter().enumerate().rev() {
        match features(cpu).as_slice() {
            _ if i + 1 < sets.len() => text.push_str(", faster with "),
            [] => text.push_str(&format!(", {}", cpu.triple.name)),
            _ => text.push_str(&format!(", {}, needs ", cpu.triple.name)),
        }
        text.push_str(&features(cpu).join(" "));
    }
    format!("{text}, model {}", &hash[..16])
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
