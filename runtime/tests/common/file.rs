//! Compiled files by the writer of the `object` crate, so that they do not depend on the compiler.

use kiln_runtime::manifest::{Manifest, SECTION, TEXT, WEIGHTS, encode, seal};
use object::write::{Object, StandardSegment};
use object::{Architecture, BinaryFormat, Endianness, Object as _, ObjectSection, SectionKind};

/// A file with these sections.
pub fn sections(format: BinaryFormat, sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut object = Object::new(format, Architecture::X86_64, Endianness::Little);
    for &(name, bytes) in sections {
        let (segment, name) = match format {
            BinaryFormat::MachO => (b"__KILN".to_vec(), name.replace('.', "__")),
            _ => (object.segment_name(StandardSegment::Data).to_vec(), name.to_string()),
        };
        let id = object.add_section(segment, name.into_bytes(), SectionKind::ReadOnlyData);
        object.set_section_data(id, bytes, 64);
    }
    object.write().expect("a file")
}

/// Where the section of that name starts.
pub fn offset(file: &[u8], name: &str) -> usize {
    let object = object::File::parse(file).expect("a file");
    let section = object.section_by_name(name).expect("the section");
    section.file_range().expect("bytes").0 as usize
}

/// A compiled file, whose hash is right whatever the manifest says.
pub fn sealed(format: BinaryFormat, text: &[u8], encoded: &[u8], weights: &[u8]) -> Vec<u8> {
    let mut file = sections(format, &[(TEXT, text), (SECTION, encoded), (WEIGHTS, weights)]);
    let at = offset(&file, SECTION);
    seal(&mut file, at);
    file
}

/// A compiled file.
pub fn artifact(manifest: &Manifest, text: &[u8], weights: &[u8]) -> Vec<u8> {
    sealed(BinaryFormat::Elf, text, &encode(manifest), weights)
}
