//! Object files: the kernels of a model as functions that a linker can place.

use object::write::{Object, StandardSegment, Symbol, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
};

use crate::backend::cpu::{Cpu, Emitted};
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::loops::ir::Loops;

/// An ELF object with one symbol for each kernel.
pub fn object(kernels: &[Loops], emitted: &Emitted, cpu: &Cpu) -> Result<Vec<u8>> {
    let architecture = match cpu.triple.split('-').next() {
        Some("x86_64") => Architecture::X86_64,
        Some("aarch64") => Architecture::Aarch64,
        _ => Architecture::Riscv64,
    };
    let mut object = Object::new(BinaryFormat::Elf, architecture, Endianness::Little);
    let segment = object.segment_name(StandardSegment::Text).to_vec();
    let text = object.add_section(segment, b".text".to_vec(), SectionKind::Text);
    let start = object.append_section_data(text, &emitted.code, 64);
    for (i, kernel) in kernels.iter().enumerate() {
        let clean = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let name: String = kernel.name.chars().map(clean).collect();
        object.add_symbol(Symbol {
            name: format!("kiln_{i}_{name}").into_bytes(),
            value: start + emitted.entries[i] as u64,
            size: emitted.sizes[i] as u64,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            weak: false,
            section: SymbolSection::Section(text),
            flags: SymbolFlags::None,
        });
    }
    object.write().map_err(|e| {
        let diagnostic = Diagnostic::new("K0901", "the object file").found(e.to_string());
        Error::new(ErrorKind::Io, diagnostic)
    })
}
