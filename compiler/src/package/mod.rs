//! Files of a compiled model that a program of any language can use: a shared library, an object
//! or a static library, each with a C header. They need the C library at most.

mod driver;
mod elf;
mod header;
mod object;

use kiln_runtime::artifact::Constants;
use kiln_runtime::plan::Plan;

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
    /// Says what it was made from.
    pub model: &'a str,
}

/// The files of a compiled model.
pub fn package(contents: Contents, form: &Form, verify: bool) -> Result<Package> {
    files(contents, form, verify).map_err(|why| {
        let diagnostic = Diagnostic::new("K0901", "the file of a compiled model").found(why);
        Error::new(ErrorKind::Model, diagnostic)
    })
}

fn files(contents: Contents, form: &Form, verify: bool) -> Packed<Package> {
    let Contents { plan, emitted, constants, cpu, model } = contents;
    let external = form.weights.is_some();
    let version = env!("CARGO_PKG_VERSION");
    let about = format!("Kiln {version}, {}, {model}", cpu.triple.name);
    let supported = cpuid::checks(cpu).map(|checks| cpuid::supported(&checks));
    let parts = driver::Parts {
        name: &form.name,
        plan,
        emitted,
        supported: supported.as_deref(),
        weights: constants.len(),
        external,
        about: &about,
    };
    let beside = form.weights.as_deref().map(|file| (file, constants.len()));
    let header = header::header(&form.name, plan, &about, beside);
    let mut code = object::code(&parts, cpu, verify)?;
    let manifest = vec![0; 64];
    code.manifest(&manifest);
    let inside: &[u8] = if external { &[] } else { constants.bytes() };
    let file = match form.kind {
        Kind::Shared => elf::shared(&code.write()?, inside, &format!("{}.so", form.name))?,
        Kind::Object => {
            code.weights(inside);
            code.write()?
        }
        Kind::Archive => {
            code.weights(inside);
            object::archive(&code.write()?, &format!("{}.o", form.name), apple(cpu))?
        }
    };
    Ok(Package { file, header, weights: external.then_some(constants) })
}

fn apple(cpu: &Cpu) -> bool {
    cpu.triple.system == System::Darwin
}
