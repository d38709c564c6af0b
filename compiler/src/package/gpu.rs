//! Files of a model that was compiled for GPUs: the same container as for CPUs, an ELF object, with
//! text in place of code. Nothing links it; `kiln` and `kiln-cuda` load it.

use kiln_runtime::gpu::{EM_CUDA, GpuArtifact, TRIPLE};
use kiln_runtime::manifest::{self, Hash, Manifest, SECTION, TEXT, WEIGHTS, Weights};
use object::write::{Object, StandardSegment};
use object::{Architecture, BinaryFormat, Endianness, SectionKind};

use super::{Form, Package, Packed, failed, seal};
use crate::error::{Diagnostic, Error, ErrorKind, Result};

/// Where the number of the machine is in an ELF header.
const E_MACHINE: usize = 18;

/// The file of a model, and that of its weights where they lie beside.
pub fn package(artifact: GpuArtifact, model_hash: Hash, form: &Form) -> Result<Package> {
    files(artifact, model_hash, form).map_err(|why| {
        let diagnostic = Diagnostic::new("K0901", "the file of a compiled model").found(why);
        Error::new(ErrorKind::Model, diagnostic)
    })
}

fn files(artifact: GpuArtifact, model_hash: Hash, form: &Form) -> Packed<Package> {
    let scratch_bytes = artifact.memory().total();
    let GpuArtifact { plan, text, modules, constants } = artifact;
    let bytes = constants.len();
    let external = form.weights.is_some();
    let weights = match &form.weights {
        None => Weights::Inside { bytes },
        Some(file) => {
            let hash = *blake3::hash(constants.bytes()).as_bytes();
            Weights::External { file: file.clone(), bytes, hash }
        }
    };
    let manifest = manifest::encode(&Manifest {
        producer: env!("CARGO_PKG_VERSION").to_string(),
        target: TRIPLE.to_string(),
        features: Vec::new(),
        model_hash,
        name: form.name.clone(),
        plan,
        entries: Vec::new(),
        faster: Vec::new(),
        modules,
        weights,
    });
    let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let inside: &[u8] = if external { &[] } else { constants.bytes() };
    for (name, bytes) in [(TEXT, &text[..]), (SECTION, &manifest), (WEIGHTS, inside)] {
        let segment = object.segment_name(StandardSegment::Data).to_vec();
        let id = object.add_section(segment, name.into(), SectionKind::ReadOnlyData);
        object.set_section_data(id, bytes, 64);
    }
    let mut file = object.write().map_err(failed)?;
    file[E_MACHINE..E_MACHINE + 2].copy_from_slice(&EM_CUDA.to_le_bytes());
    seal(&mut file, &manifest)?;
    let weights = external.then_some(constants);
    Ok(Package { file, header: String::new(), scratch_bytes: scratch_bytes as usize, weights })
}
