//! A shared library made from one object, without a linker: sections are laid out in segments,
//! relocations are applied (all are relative to the code, so none is left for load time), and the
//! exported functions are listed for the dynamic linker.
//!
//! Format: System V ABI, gABI 4.1; relocations: the psABI of each architecture.

use kiln_runtime::manifest::WEIGHTS;
use object::elf::*;
use object::read::elf::ElfFile64;
use object::read::{Object, ObjectSection, ObjectSymbol, RelocationTarget};
use object::write::StringId;
use object::write::elf::{FileHeader, ProgramHeader, SectionHeader, SectionIndex, Sym, Writer};
use object::{Endianness, RelocationFlags, SectionKind};

use super::{Packed, failed};

/// A section of the object, or the weights, in its place in the library.
struct Piece<'a> {
    name: String,
    bytes: &'a [u8],
    /// Bytes in memory; more than `bytes` where they are zero.
    size: usize,
    segment: Segment,
    align: usize,
    /// Index in the object; none for the weights.
    source: Option<object::SectionIndex>,
    /// Place in the file and in memory; both are the same.
    at: usize,
}

/// Which rights memory has. In the order of the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Segment {
    Headers,
    Code,
    Weights,
    Data,
}

/// A shared library of an object that leaves no name open but that of the weights.
pub fn shared(object: &[u8], weights: &[u8], soname: Option<&str>) -> Packed<Vec<u8>> {
    let file = ElfFile64::<Endianness>::parse(object).map_err(failed)?;
    let machine = file.elf_header().e_machine.get(Endianness::Little);
    let mut pieces = pieces(&file, weights)?;
    let mut out = Vec::new();
    let mut layout = Layout::new(&file, &mut pieces, soname, machine);
    layout.write(&mut out)?;
    let places: Vec<(Option<object::SectionIndex>, usize)> =
        pieces.iter().map(|p| (p.source, p.at)).collect();
    link(&file, &places, &mut out)?;
    Ok(out)
}

/// The sections that are part of a running program.
fn pieces<'a>(file: &ElfFile64<'a>, weights: &'a [u8]) -> Packed<Vec<Piece<'a>>> {
    let mut pieces = Vec::new();
    for section in file.sections() {
        let segment = match section.kind() {
            SectionKind::Text => Segment::Code,
            SectionKind::ReadOnlyData | SectionKind::ReadOnlyString => Segment::Headers,
            SectionKind::UninitializedData => Segment::Data,
            SectionKind::Data if section.size() == 0 => continue,
            SectionKind::Data | SectionKind::ReadOnlyDataWithRel => {
                return Err(failed("data that is written, or relocated at load time"));
            }
            _ => continue,
        };
        let name = section.name().map_err(failed)?.to_string();
        let bytes = section.data().map_err(failed)?;
        let (size, align) = (section.size() as usize, section.align().max(1) as usize);
        let source = Some(section.index());
        pieces.push(Piece { name, bytes, size, segment, align, source, at: 0 });
    }
    pieces.push(Piece {
        name: WEIGHTS.to_string(),
        bytes: weights,
        size: weights.len(),
        segment: Segment::Weights,
        align: 64,
        source: None,
        at: 0,
    });
    pieces.sort_by_key(|p| p.segment as usize);
    Ok(pieces)
}

/// A function in a table of symbols.
struct Function<'a> {
    name: &'a [u8],
    section: object::SectionIndex,
    value: u64,
    size: u64,
    exported: bool,
}

/// What the library is made of, before it is written.
struct Layout<'a, 'p> {
    pieces: &'p mut Vec<Piece<'a>>,
    functions: Vec<Function<'a>>,
    soname: Option<&'p str>,
    machine: u16,
    flags: u32,
    page: usize,
}

/// Start and end of each segment in the file, and its end in memory.
#[derive(Clone, Copy)]
struct Extent(usize, usize, usize);

/// Names, and numbers of sections, as the writer counts them.
struct Numbers {
    /// For each piece.
    sections: Vec<(StringId, SectionIndex)>,
    /// For each function.
    all: Vec<StringId>,
    /// For each function that is exported.
    dynamic: Vec<StringId>,
    soname: Option<StringId>,
}

/// Where the tables and segments are.
struct Places {
    hash: usize,
    dynsym: usize,
    dynstr: usize,
    dynamic: usize,
    segments: [Extent; 4],
}

/// Numbers of sections, names and symbols.
fn number<'a>(
    w: &mut Writer<'a>,
    pieces: &'a [String],
    functions: &[Function<'a>],
    soname: Option<&'a str>,
) -> Numbers {
    w.reserve_null_section_index();
    w.reserve_hash_section_index();
    w.reserve_dynsym_section_index();
    w.reserve_dynstr_section_index();
    let mut section =
        |name: &'a String| (w.add_section_name(name.as_bytes()), w.reserve_section_index());
    let sections = pieces.iter().map(&mut section).collect();
    w.reserve_dynamic_section_index();
    w.reserve_symtab_section_index();
    w.reserve_strtab_section_index();
    w.reserve_shstrtab_section_index();
    w.reserve_null_dynamic_symbol_index();
    w.reserve_null_symbol_index();
    let (mut all, mut dynamic) = (Vec::new(), Vec::new());
    for f in functions {
        all.push(w.add_string(f.name));
        w.reserve_symbol_index(None);
        if f.exported {
            dynamic.push(w.add_dynamic_string(f.name));
            w.reserve_dynamic_symbol_index();
        }
    }
    let soname = soname.map(|name| w.add_dynamic_string(name.as_bytes()));
    Numbers { sections, all, dynamic, soname }
}

impl<'a, 'p> Layout<'a, 'p> {
    fn new(
        file: &ElfFile64<'a>,
        pieces: &'p mut Vec<Piece<'a>>,
        soname: Option<&'p str>,
        machine: u16,
    ) -> Self {
        let mut functions: Vec<Function> = file
            .symbols()
            .filter(|s| s.kind() == object::SymbolKind::Text && s.size() > 0)
            .filter_map(|s| {
                let name = s.name_bytes().ok()?;
                let exported = s.is_global();
                let section = s.section_index()?;
                Some(Function { name, section, value: s.address(), size: s.size(), exported })
            })
            .collect();
        // Local symbols come first, as the format asks.
        functions.sort_by_key(|f| f.exported);
        // The largest page that a system of this architecture may have.
        let page = if machine == EM_AARCH64 { 1 << 16 } else { 1 << 12 };
        let flags = file.elf_header().e_flags.get(Endianness::Little);
        Layout { pieces, functions, soname, machine, flags, page }
    }

    fn section_of(&self, source: object::SectionIndex) -> usize {
        let found = self.pieces.iter().position(|p| p.source == Some(source));
        found.expect("functions are in a section of code")
    }

    /// Lays everything out and writes it.
    fn write(&mut self, out: &mut Vec<u8>) -> Packed<()> {
        let mut w = Writer::new(Endianness::Little, true, out);
        let names: Vec<String> = self.pieces.iter().map(|p| p.name.clone()).collect();
        let functions = std::mem::take(&mut self.functions);
        let numbers = number(&mut w, &names, &functions, self.soname);
        let places = self.places(&mut w, numbers.dynamic.len() as u32);
        self.contents(&mut w, &functions, &numbers, &places)?;
        self.section_headers(&mut w, &functions, &numbers, &places);
        Ok(())
    }

    /// Places in the file, which are those in memory too.
    fn places(&mut self, w: &mut Writer, exported: u32) -> Places {
        w.reserve_file_header();
        w.reserve_program_headers(HEADERS);
        let hash = w.reserve_hash(exported.max(1), exported + 1);
        let dynsym = w.reserve_dynsym();
        let dynstr = w.reserve_dynstr();
        let headers = self.place(w, Segment::Headers, 0);
        let code = self.place(w, Segment::Code, self.page);
        let weights = self.place(w, Segment::Weights, self.page);
        let dynamic = w.reserve(0, self.page);
        w.reserve_dynamic(DYNAMICS);
        let mut data = self.place(w, Segment::Data, 8);
        data.0 = dynamic;
        w.reserve_symtab();
        w.reserve_strtab();
        w.reserve_shstrtab();
        w.reserve_section_headers();
        Places { hash, dynsym, dynstr, dynamic, segments: [headers, code, weights, data] }
    }

    /// The bytes, in the order of their places.
    fn contents(
        &self,
        w: &mut Writer,
        functions: &[Function],
        numbers: &Numbers,
        places: &Places,
    ) -> Packed<()> {
        let (e_machine, e_flags) = (self.machine, self.flags);
        w.write_file_header(&FileHeader {
            os_abi: ELFOSABI_NONE,
            abi_version: 0,
            e_type: ET_DYN,
            e_machine,
            e_entry: 0,
            e_flags,
        })
        .map_err(failed)?;
        w.write_align_program_headers();
        self.program_headers(w, places.segments, places.dynamic);
        let exported = || functions.iter().filter(|f| f.exported);
        let hashes: Vec<u32> = exported().map(|f| object::elf::hash(f.name)).collect();
        let count = hashes.len() as u32;
        w.write_hash(count.max(1), count + 1, |i| i.checked_sub(1).map(|i| hashes[i as usize]));
        w.write_null_dynamic_symbol();
        for (f, name) in exported().zip(&numbers.dynamic) {
            w.write_dynamic_symbol(&self.symbol(f, *name, numbers));
        }
        w.write_dynstr();
        self.bytes(w, Segment::Headers);
        self.bytes(w, Segment::Code);
        self.bytes(w, Segment::Weights);
        w.pad_until(places.dynamic);
        w.write_align_dynamic();
        let dynstr_len = w.dynstr_len() as u64;
        match numbers.soname {
            Some(soname) => w.write_dynamic_string(DT_SONAME, soname),
            // An entry that says nothing keeps the place.
            None => w.write_dynamic(DT_DEBUG, 0),
        }
        .map_err(failed)?;
        for (tag, value) in [
            (DT_HASH, places.hash as u64),
            (DT_STRTAB, places.dynstr as u64),
            (DT_SYMTAB, places.dynsym as u64),
            (DT_STRSZ, dynstr_len),
            (DT_SYMENT, 24),
            (DT_NULL, 0),
        ] {
            w.write_dynamic(tag, value).map_err(failed)?;
        }
        w.write_null_symbol();
        for (f, name) in functions.iter().zip(&numbers.all) {
            w.write_symbol(&self.symbol(f, *name, numbers));
        }
        w.write_strtab();
        w.write_shstrtab();
        Ok(())
    }

    fn symbol(&self, f: &Function, name: StringId, numbers: &Numbers) -> Sym {
        let piece = self.section_of(f.section);
        let bind = if f.exported { STB_GLOBAL } else { STB_LOCAL };
        Sym {
            name: Some(name),
            section: Some(numbers.sections[piece].1),
            st_info: (bind << 4) | STT_FUNC,
            st_other: STV_DEFAULT,
            st_shndx: 0,
            st_value: self.pieces[piece].at as u64 + f.value,
            st_size: f.size,
        }
    }

    fn section_headers(
        &self,
        w: &mut Writer,
        functions: &[Function],
        numbers: &Numbers,
        places: &Places,
    ) {
        w.write_null_section_header();
        w.write_hash_section_header(places.hash as u64);
        w.write_dynsym_section_header(places.dynsym as u64, 1);
        w.write_dynstr_section_header(places.dynstr as u64);
        for (piece, (name, _)) in self.pieces.iter().zip(&numbers.sections) {
            w.write_section_header(&piece.header(*name));
        }
        w.write_dynamic_section_header(places.dynamic as u64);
        let locals = functions.iter().filter(|f| !f.exported).count() as u32 + 1;
        w.write_symtab_section_header(locals);
        w.write_strtab_section_header();
        w.write_shstrtab_section_header();
    }

    /// Gives the pieces of a segment their places.
    fn place(&mut self, w: &mut Writer, segment: Segment, align: usize) -> Extent {
        let start = if segment == Segment::Headers { 0 } else { w.reserve(0, align) };
        let mut memory = w.reserved_len();
        for piece in self.pieces.iter_mut().filter(|p| p.segment == segment) {
            piece.at = match segment {
                // Zeros take no place in the file.
                Segment::Data => memory.next_multiple_of(piece.align),
                _ => w.reserve(piece.size, piece.align),
            };
            memory = piece.at + piece.size;
        }
        Extent(start, w.reserved_len(), memory)
    }

    fn bytes(&self, w: &mut Writer, segment: Segment) {
        for piece in self.pieces.iter().filter(|p| p.segment == segment) {
            w.pad_until(piece.at);
            w.write(piece.bytes);
        }
    }

    fn program_headers(&self, w: &mut Writer, extents: [Extent; 4], dynamic: usize) {
        let mut header = |p_type, p_flags, Extent(start, end, memory): Extent, align: usize| {
            w.write_program_header(&ProgramHeader {
                p_type,
                p_flags,
                p_offset: start as u64,
                p_vaddr: start as u64,
                p_paddr: start as u64,
                p_filesz: (end - start) as u64,
                p_memsz: (memory - start) as u64,
                p_align: align as u64,
            });
        };
        let [headers, code, weights, data] = extents;
        header(PT_LOAD, PF_R, headers, self.page);
        header(PT_LOAD, PF_R | PF_X, code, self.page);
        header(PT_LOAD, PF_R, weights, self.page);
        header(PT_LOAD, PF_R | PF_W, data, self.page);
        let end = dynamic + DYNAMICS * 16;
        header(PT_DYNAMIC, PF_R | PF_W, Extent(dynamic, end, end), 8);
        header(PT_GNU_STACK, PF_R | PF_W, Extent(0, 0, 0), 16);
    }
}

/// Number of program headers, and of entries for the dynamic linker.
const HEADERS: u32 = 6;
const DYNAMICS: usize = 7;

impl Piece<'_> {
    fn header(&self, name: StringId) -> SectionHeader {
        let sh_flags = match self.segment {
            Segment::Headers | Segment::Weights => SHF_ALLOC,
            Segment::Code => SHF_ALLOC | SHF_EXECINSTR,
            Segment::Data => SHF_ALLOC | SHF_WRITE,
        };
        let data = self.segment == Segment::Data;
        SectionHeader {
            name: Some(name),
            sh_type: if data { SHT_NOBITS } else { SHT_PROGBITS },
            sh_flags: sh_flags.into(),
            sh_addr: self.at as u64,
            sh_offset: self.at as u64,
            sh_size: self.size as u64,
            sh_link: 0,
            sh_info: 0,
            sh_addralign: self.align as u64,
            sh_entsize: 0,
        }
    }
}

/// Applies the relocations of every section.
fn link(
    file: &ElfFile64,
    places: &[(Option<object::SectionIndex>, usize)],
    out: &mut [u8],
) -> Packed<()> {
    let place = |section| places.iter().find(|p| p.0 == section).map(|p| p.1 as u64);
    let target = |symbol: object::SymbolIndex| -> Packed<u64> {
        let symbol = file.symbol_by_index(symbol).map_err(failed)?;
        // The one open name is that of the weights, which are no section of the object.
        let base = place(symbol.section_index());
        let name = || String::from_utf8_lossy(symbol.name_bytes().unwrap_or_default()).to_string();
        base.map(|b| b + symbol.address()).ok_or_else(|| failed(format!("no place for {}", name())))
    };
    for section in file.sections() {
        let Some(base) = place(Some(section.index())) else { continue };
        for (offset, relocation) in section.relocations() {
            let RelocationFlags::Elf { r_type } = relocation.flags() else {
                return Err(failed("a relocation of another format"));
            };
            let RelocationTarget::Symbol(symbol) = relocation.target() else {
                return Err(failed("a relocation without a symbol"));
            };
            let mut to = target(symbol)?.wrapping_add_signed(relocation.addend());
            let mut from = base + offset;
            let machine = file.elf_header().e_machine.get(Endianness::Little);
            if machine == EM_RISCV && r_type == R_RISCV_PCREL_LO12_I {
                // Its symbol is the instruction with the upper part, whose target it completes.
                from = target(symbol)?;
                to = upper_target(&section, from - base, &target)?;
            }
            let at = (base + offset) as usize;
            apply(machine, r_type, &mut out[at..], from, to)?;
        }
    }
    Ok(())
}

/// What the relocation of an upper part at an offset leads to.
fn upper_target<'a>(
    section: &impl ObjectSection<'a>,
    at: u64,
    target: &impl Fn(object::SymbolIndex) -> Packed<u64>,
) -> Packed<u64> {
    let found = section.relocations().find(|(offset, r)| {
        let upper = matches!(r.flags(), RelocationFlags::Elf { r_type: R_RISCV_PCREL_HI20 });
        *offset == at && upper
    });
    match found.map(|(_, r)| (r.target(), r.addend())) {
        Some((RelocationTarget::Symbol(symbol), addend)) => {
            Ok(target(symbol)?.wrapping_add_signed(addend))
        }
        _ => Err(failed("a lower part without its upper part")),
    }
}

/// Writes one relocation: `at` holds the instruction, `from` is its address, `to` the target's.
fn apply(machine: u16, r_type: u32, at: &mut [u8], from: u64, to: u64) -> Packed<()> {
    let delta = to.wrapping_sub(from) as i64;
    let fits = |bits: u32| match delta >> (bits - 1) {
        0 | -1 => Ok(delta),
        _ => Err(failed("code and weights lie too far apart: write the weights beside")),
    };
    let mut patch = |index: usize, keep: u32, bits: u32| {
        let word = &mut at[index * 4..index * 4 + 4];
        let old = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        word.copy_from_slice(&((old & keep) | bits).to_le_bytes());
    };
    match (machine, r_type) {
        (EM_X86_64, R_X86_64_PC32 | R_X86_64_PLT32) => patch(0, 0, fits(32)? as u32),
        (EM_AARCH64, R_AARCH64_CALL26) => {
            patch(0, 0xfc00_0000, (fits(28)? >> 2) as u32 & 0x03ff_ffff);
        }
        (EM_AARCH64, R_AARCH64_ADR_PREL_PG_HI21) => {
            let pages = (to >> 12) as i64 - (from >> 12) as i64;
            fits(33)?;
            let (low, high) = (pages as u32 & 3, (pages >> 2) as u32 & 0x7_ffff);
            patch(0, 0x9f00_001f, low << 29 | high << 5);
        }
        (EM_AARCH64, R_AARCH64_ADD_ABS_LO12_NC) => {
            patch(0, 0xffc0_03ff, (to as u32 & 0xfff) << 10);
        }
        (EM_RISCV, R_RISCV_CALL_PLT) => {
            let (upper, lower) = halves(fits(32)?);
            patch(0, 0xfff, upper << 12);
            patch(1, 0xf_ffff, lower << 20);
        }
        (EM_RISCV, R_RISCV_PCREL_HI20) => patch(0, 0xfff, halves(fits(32)?).0 << 12),
        (EM_RISCV, R_RISCV_PCREL_LO12_I) => patch(0, 0xf_ffff, halves(delta).1 << 20),
        _ => return Err(failed(format!("relocation {r_type} of machine {machine}"))),
    }
    Ok(())
}

/// The upper 20 and lower 12 bits of an offset, where the lower ones are signed.
fn halves(delta: i64) -> (u32, u32) {
    let upper = ((delta + 0x800) >> 12) as u32 & 0xf_ffff;
    (upper, delta as u32 & 0xfff)
}
