//! Objects for systems that this one is not: looked at, and where the processor is that of this
//! machine, linked by hand and run with the calling convention of the system.

use std::ffi::c_void;
use std::ptr;

use kiln::backend::cpu::Cpu;
use kiln::backend::cpu::target::{Arch, System, TRIPLES};
use kiln::graph::Graph;
use kiln::onnx::{ImportOptions, import};
use kiln::{Compiler, Form, Kind, Limits, Model};
use kiln_tests::cases::{Case, read_case};
use kiln_tests::{oracle, run_compiled};
use object::{
    BinaryFormat, Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind, SymbolKind,
};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

fn model(name: &str) -> Option<(Graph, Case)> {
    let folder = oracle("models")?.join(name);
    let case = read_case(&folder, &folder).expect("a stored case");
    let graph = import(case.model.clone(), &ImportOptions::default()).expect("a sound model");
    Some((graph, case))
}

/// Objects of every target: functions are there by the names that C has for them, and everything
/// that is referred to is in the file, but for what the systems' linkers bring.
#[test]
fn objects_are_whole() {
    let Some(models) = oracle("models") else { return };
    let path = models.join("cnn_b1/model.onnx");
    let model = Model::open(path, &Limits::default()).expect("a model");
    for triple in TRIPLES {
        let cpu = Cpu::named(Some(triple.name), None).expect("a known target");
        let form = Form::new(Kind::Object, "net");
        let package = Compiler::new().target(cpu).package(&model, &form);
        let package = package.unwrap_or_else(|e| panic!("{}: {e}", triple.name));
        let file = object::File::parse(&*package.file).expect("an object file");
        let (format, prefix) = match triple.system {
            System::Linux => (BinaryFormat::Elf, ""),
            System::Darwin => (BinaryFormat::MachO, "_"),
            System::Windows => (BinaryFormat::Coff, ""),
        };
        let architecture = match triple.arch {
            Arch::X86_64 => object::Architecture::X86_64,
            Arch::Aarch64 => object::Architecture::Aarch64,
            Arch::Riscv64 => object::Architecture::Riscv64,
        };
        assert_eq!((file.format(), file.architecture()), (format, architecture));
        for function in ["run", "run_with", "scratch_size", "input", "output", "status_text"] {
            let name = format!("{prefix}net_{function}");
            let symbol = file.symbol_by_name(&name).unwrap_or_else(|| panic!("no {name}"));
            assert!(symbol.is_global() && symbol.is_definition(), "{name}");
            assert_eq!(symbol.kind(), SymbolKind::Text, "{name}");
        }
        let mut open = file.symbols().filter(|s| s.is_undefined() && s.name() != Ok(""));
        let open = open.next().map(|s| s.name().map(String::from));
        assert_eq!(open, None, "{}: a name that is not in the file", triple.name);
        let relocations = resolvable(&file);
        assert!(relocations > 10, "{}: {relocations} relocations", triple.name);
    }
}

/// Counts relocations; each leads to a place in a section of the file.
fn resolvable(file: &object::File) -> usize {
    let mut count = 0;
    for section in file.sections() {
        for (offset, relocation) in section.relocations() {
            assert!(offset < section.size());
            let (index, at) = match relocation.target() {
                RelocationTarget::Symbol(index) => {
                    let symbol = file.symbol_by_index(index).expect("a symbol of the file");
                    (symbol.section_index(), symbol.address())
                }
                RelocationTarget::Section(index) => (Some(index), 0),
                other => panic!("{other:?}"),
            };
            let target = index.map(|i| file.section_by_index(i).expect("a section of the file"));
            let target = target.expect("a symbol with a place");
            assert!(at <= target.address() + target.size(), "{:?}", target.name());
            assert_ne!(target.kind(), SectionKind::Debug);
            count += 1;
        }
    }
    count
}

/// An object in memory, ready to run.
struct Linked {
    base: *mut c_void,
    bytes: usize,
    functions: Vec<(String, usize)>,
}

impl Drop for Linked {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and functions of it are called while it lives.
        unsafe { munmap(self.base, self.bytes) }.expect("a mapping");
    }
}

const PAGE: usize = 4096;

/// Places all sections, each on pages of its own, and applies the relocations, all of which say
/// how far something is from the code.
fn link(bytes: &[u8]) -> Linked {
    let file = object::File::parse(bytes).expect("an object file");
    let mut places = Vec::new();
    let mut end = 0;
    for section in file.sections().filter(|s| s.size() > 0) {
        places.push((section.index(), end));
        end += (section.size() as usize).next_multiple_of(PAGE);
    }
    let place = |index| places.iter().find(|p| p.0 == index).expect("a section with bytes").1;
    let at = |symbol: &object::Symbol| {
        let section = symbol.section_index().expect("a symbol with a place");
        let base = file.section_by_index(section).expect("a section").address();
        place(section) + (symbol.address() - base) as usize
    };
    let mut image = vec![0u8; end];
    for section in file.sections().filter(|s| s.size() > 0) {
        let start = place(section.index());
        if let Ok(data) = section.data() {
            image[start..start + data.len()].copy_from_slice(data);
        }
        for (offset, relocation) in section.relocations() {
            let RelocationTarget::Symbol(symbol) = relocation.target() else {
                panic!("a relocation without a symbol")
            };
            assert_eq!(relocation.size(), 32);
            let from = start + offset as usize;
            let field = &mut image[from..from + 4];
            let kept = match relocation.has_implicit_addend() {
                true => i32::from_le_bytes(field.try_into().expect("four bytes")),
                false => 0,
            };
            let symbol = file.symbol_by_index(symbol).expect("a symbol");
            let to = at(&symbol) as i64 + relocation.addend() + i64::from(kept);
            let distance = i32::try_from(to - from as i64).expect("a small object");
            field.copy_from_slice(&distance.to_le_bytes());
        }
    }
    let text = file.sections().filter(|s| s.kind() == SectionKind::Text && s.size() > 0);
    let text: Vec<(usize, usize)> = text.map(|s| (place(s.index()), s.size() as usize)).collect();
    let functions = file.symbols().filter(|s| s.is_global() && s.is_definition());
    let functions = functions.map(|s| (s.name().expect("a name").to_string(), at(&s))).collect();
    // SAFETY: a new mapping of that size, written before any of it can be executed.
    let base = unsafe {
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let base = mmap_anonymous(ptr::null_mut(), end, rights, MapFlags::PRIVATE).expect("memory");
        ptr::copy_nonoverlapping(image.as_ptr(), base.cast(), end);
        for (start, size) in text {
            let rights = MprotectFlags::READ | MprotectFlags::EXEC;
            mprotect(base.byte_add(start), size, rights).expect("code");
        }
        base
    };
    Linked { base, bytes: end, functions }
}

impl Linked {
    fn address(&self, name: &str) -> *mut c_void {
        let found = self.functions.iter().find(|f| f.0.trim_start_matches('_') == name);
        // SAFETY: it lies in the mapping.
        unsafe { self.base.byte_add(found.unwrap_or_else(|| panic!("no {name}")).1) }
    }
}

/// Runs a model by its two functions, which have the calling convention `$abi`.
macro_rules! call {
    ($abi:literal, $linked:expr, $inputs:expr, $outputs:expr) => {{
        type Size = unsafe extern $abi fn() -> usize;
        type Run = unsafe extern $abi fn(*const *const u8, *const *mut u8, *mut u8, usize) -> i32;
        // SAFETY: the functions have these types in the header of the model.
        let (size, run) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Size>($linked.address("net_scratch_size")),
                std::mem::transmute::<*mut c_void, Run>($linked.address("net_run")),
            )
        };
        // SAFETY: the tensors are as large as the model says.
        unsafe {
            let mut scratch = vec![0u8; size()];
            run($inputs.as_ptr(), $outputs.as_ptr(), scratch.as_mut_ptr(), scratch.len())
        }
    }};
}

#[test]
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn objects_of_other_systems_run() {
    let Some((graph, case)) = model("cnn_b1") else { return };
    for triple in TRIPLES.iter().filter(|t| t.arch == Arch::X86_64) {
        let level = |target| Cpu::named(target, Some("x86-64-v3")).expect("a level");
        let here = Compiler::new().target(level(None));
        if here.cpu().must_run_here().is_err() {
            kiln_tests::skip("this machine is older than x86-64-v3");
            return;
        }
        let want = run_compiled(&graph, &case.inputs, &here).expect("a run");
        let form = Form::new(Kind::Object, "net");
        let compiler = Compiler::new().target(level(Some(triple.name)));
        let package = compiler.package_of(&graph, [0; 32], &form).expect("a package");
        let linked = link(&package.file);
        let inputs: Vec<*const u8> = case.inputs.iter().map(|t| t.bytes().as_ptr()).collect();
        let mut outputs: Vec<Vec<u8>> = want.iter().map(|t| vec![0; t.bytes().len()]).collect();
        let places: Vec<*mut u8> = outputs.iter_mut().map(|bytes| bytes.as_mut_ptr()).collect();
        let status = match triple.system {
            System::Linux | System::Darwin => call!("sysv64", linked, inputs, places),
            System::Windows => call!("win64", linked, inputs, places),
        };
        assert_eq!(status, 0, "{}", triple.name);
        for (got, want) in outputs.iter().zip(&want) {
            assert!(got == want.bytes(), "{}", triple.name);
        }
    }
}
