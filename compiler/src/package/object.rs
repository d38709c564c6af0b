//! Object files: kernels, the functions that drive them, weights and the manifest, for a linker
//! to place.

use ar_archive_writer::{ArchiveKind, DEFAULT_OBJECT_READER, NewArchiveMember};
use cranelift_object::{ObjectBuilder, ObjectModule};
use object::write::{Object, SectionId, StandardSegment, SymbolId, SymbolSection};
use object::{BinaryFormat, SectionKind, SymbolScope};

use kiln_runtime::manifest::{SECTION, WEIGHTS};

use super::driver::{Parts, define};
use super::{Packed, failed};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::clif::target_isa;

/// An object without its weights, and where each kernel starts in its text.
pub struct Code<'a> {
    object: Object<'a>,
    weights: Option<SymbolId>,
    /// Offsets of kernels in the section of code.
    pub entries: Vec<usize>,
}

/// Compiles the functions of a model around its kernels.
pub fn code<'a>(parts: &Parts, cpu: &Cpu, verify: bool) -> Packed<Code<'a>> {
    // Functions that ask what the processor can do must run on every processor: no features.
    let isa = target_isa(cpu.triple.name, &[], verify).map_err(|e| failed(e.0))?;
    let libcalls = cranelift_module::default_libcall_names();
    let builder = ObjectBuilder::new(isa, parts.name, libcalls).map_err(failed)?;
    let mut module = ObjectModule::new(builder);
    let defined = define(&mut module, parts).map_err(failed)?;
    let product = module.finish();
    let symbol = |id| product.object.symbol(product.function_symbol(id));
    let entries = defined.kernels.iter().map(|&id| symbol(id).value as usize).collect();
    let weights = defined.weights.map(|id| product.data_symbol(id));
    Ok(Code { object: product.object, weights, entries })
}

/// Names of a section in the segment of read-only data.
fn names(object: &Object, name: &str) -> (Vec<u8>, Vec<u8>) {
    match object.format() {
        BinaryFormat::MachO => (b"__KILN".to_vec(), format!("__{}", &name[1..]).into_bytes()),
        _ => {
            let segment = object.segment_name(StandardSegment::Data).to_vec();
            (segment, name.as_bytes().to_vec())
        }
    }
}

impl<'a> Code<'a> {
    /// Adds a section of read-only bytes.
    fn section(&mut self, name: &str, bytes: &'a [u8]) -> SectionId {
        let (segment, name) = names(&self.object, name);
        let id = self.object.add_section(segment, name, SectionKind::ReadOnlyData);
        self.object.set_section_data(id, bytes, 64);
        id
    }

    /// Adds the manifest.
    pub fn manifest(&mut self, bytes: &'a [u8]) {
        self.section(SECTION, bytes);
    }

    /// Adds the weights; without, the name of the weights stays open.
    pub fn weights(&mut self, bytes: &'a [u8]) {
        let Some(symbol) = self.weights else { return };
        let section = self.section(WEIGHTS, bytes);
        let symbol = self.object.symbol_mut(symbol);
        symbol.section = SymbolSection::Section(section);
        symbol.scope = SymbolScope::Compilation;
        symbol.size = bytes.len() as u64;
    }

    /// The file.
    pub fn write(&self) -> Packed<Vec<u8>> {
        self.object.write().map_err(failed)
    }
}

/// A static library of one object.
pub fn archive(object: &[u8], member: &str, apple: bool) -> Packed<Vec<u8>> {
    let kind = if apple { ArchiveKind::Darwin } else { ArchiveKind::Gnu };
    let member = NewArchiveMember::new(object, &DEFAULT_OBJECT_READER, member.to_string());
    let mut out = std::io::Cursor::new(Vec::new());
    ar_archive_writer::write_archive_to_stream(&mut out, &[member], kind, false, None)
        .map_err(failed)?;
    Ok(out.into_inner())
}
