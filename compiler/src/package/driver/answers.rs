//! What a compiled model says of itself: text and tables, and the functions that give them out.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, types};
use cranelift_module::{DataDescription, Linkage, Module};
use kiln_runtime::plan::Port;

use super::{Built, Driver, POINTER, TRUSTED, scratch_bytes};
use crate::package::header::{ABI_VERSION, FIRST_DIM, Status, dim_text, type_code};

/// Text and tables that the functions answer with.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    fn add(&mut self, bytes: &[u8], align: usize) -> i64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(align), 0);
        self.bytes.extend(bytes);
        (self.bytes.len() - bytes.len()) as i64
    }

    fn text(&mut self, text: &str) -> i64 {
        // C ends a text at the first zero.
        let bytes: Vec<u8> = text.bytes().filter(|b| *b != 0).chain([0]).collect();
        self.add(&bytes, 1)
    }

    fn words(&mut self, words: impl IntoIterator<Item = i64>) -> i64 {
        let bytes: Vec<u8> = words.into_iter().flat_map(i64::to_le_bytes).collect();
        self.add(&bytes, 8)
    }

    /// Seven words for each port: offsets of name, shape, dims and what is added to these, then
    /// rank, size, and type together with the port of a state.
    fn ports(&mut self, ports: &[Port], partner: impl Fn(usize) -> Option<usize>) -> i64 {
        let mut words = Vec::new();
        for (i, port) in ports.iter().enumerate() {
            let name = self.text(&port.name);
            let shape = self.words(port.shape.iter().map(|&e| e as i64));
            let (mut dims, mut more) = (vec![-1; port.shape.len()], vec![0; port.shape.len()]);
            for length in &port.lengths {
                (dims[length.axis], more[length.axis]) = (length.dim as i64, length.more);
            }
            let (dims, more) = (self.words(dims), self.words(more));
            let size = port.size_bytes().unwrap_or(usize::MAX);
            words.extend([name, shape, dims, more, port.shape.len() as i64, size as i64]);
            let state = partner(i).map_or(0, |partner| partner as i64 + 1);
            words.push(type_code(port.dtype) | state << 32);
        }
        self.words(words)
    }
}

impl Driver<'_> {
    /// Everything that only says what the model is.
    pub(super) fn answers(&mut self) -> Built<()> {
        let mut tables = Tables { bytes: Vec::new() };
        let plan = self.parts.plan;
        let numbers = [
            ("abi_version", types::I32, i64::from(ABI_VERSION)),
            ("input_count", types::I64, plan.inputs.len() as i64),
            ("output_count", types::I64, plan.outputs.len() as i64),
            ("dim_count", types::I64, plan.dims.len() as i64),
            ("scratch_size", types::I64, scratch_bytes(plan)),
            ("weights_size", types::I64, self.parts.weights as i64),
        ];
        for (name, ty, value) in numbers {
            self.function((name, Linkage::Export), &[], &[ty], |_, f| {
                let value = f.b.ins().iconst(ty, value);
                f.b.ins().return_(&[value]);
                Ok(())
            })?;
        }
        let about = tables.text(self.parts.about);
        self.function(("about", Linkage::Export), &[], &[POINTER], |this, f| {
            let base = this.address(f, this.tables);
            let text = f.b.ins().iadd_imm_s(base, about);
            f.b.ins().return_(&[text]);
            Ok(())
        })?;
        self.status_text(&mut tables)?;
        let kept = || plan.states.iter().filter(|state| state.in_place);
        let table = tables.ports(&plan.inputs, |i| {
            kept().find(|state| state.input == i).map(|state| state.output)
        });
        self.row("input", table, plan.inputs.len(), (7, 4))?;
        let table = tables.ports(&plan.outputs, |o| {
            kept().find(|state| state.output == o).map(|state| state.input)
        });
        self.row("output", table, plan.outputs.len(), (7, 4))?;
        let mut words = Vec::new();
        for dim in &plan.dims {
            words.extend([tables.text(&dim.name), dim.least as i64, dim.most as i64]);
        }
        let table = tables.words(words);
        self.row("dim", table, plan.dims.len(), (3, 1))?;
        let mut data = DataDescription::new();
        data.define(tables.bytes.into_boxed_slice());
        data.set_align(8);
        self.module.define_data(self.tables, &data)?;
        Ok(())
    }

    /// `const char *NAME_status_text(int32_t status)`
    fn status_text(&mut self, tables: &mut Tables) -> Built<()> {
        let texts: Vec<i64> = Status::ALL.iter().map(|s| tables.text(s.text())).collect();
        let unknown = tables.text("no status of a compiled model");
        let dims = self.parts.plan.dims.iter().map(|dim| tables.text(&dim_text(dim)));
        let dims: Vec<i64> = dims.collect();
        let mut texts = texts;
        texts.resize(FIRST_DIM as usize, unknown);
        texts.extend(dims);
        let count = texts.len() as i64;
        let table = tables.words(texts.into_iter().chain([unknown]));
        let name = ("status_text", Linkage::Export);
        self.function(name, &[types::I32], &[POINTER], |this, f| {
            let base = this.address(f, this.tables);
            let status = f.b.ins().uextend(types::I64, f.params[0]);
            let last = f.number(count);
            let row = f.b.ins().umin(status, last);
            let at = f.b.ins().ishl_imm_u(row, 3);
            let at = f.b.ins().iadd(base, at);
            let offset = f.b.ins().load(types::I64, TRUSTED(), at, table as i32);
            let text = f.b.ins().iadd(base, offset);
            f.b.ins().return_(&[text]);
            Ok(())
        })?;
        Ok(())
    }

    /// `int32_t NAME_input(size_t index, kiln_port *port)` and the like: copies a row of a table,
    /// of so many words, the first of which are offsets of what pointers are to lead to.
    fn row(
        &mut self,
        name: &str,
        table: i64,
        count: usize,
        (words, pointers): (i32, i32),
    ) -> Built<()> {
        let params = [types::I64, POINTER];
        self.function((name, Linkage::Export), &params, &[types::I32], |this, f| {
            let (index, port) = (f.params[0], f.params[1]);
            f.leave_if_null(port);
            let count = f.number(count as i64);
            let outside = f.b.ins().icmp(IntCC::UnsignedGreaterThanOrEqual, index, count);
            f.leave_if(outside, Status::Index);
            let base = this.address(f, this.tables);
            let row = f.b.ins().imul_imm_s(index, i64::from(words) * 8);
            let row = f.b.ins().iadd(base, row);
            for word in 0..words {
                let value = f.load(row, table as i32 + word * 8);
                let value = if word < pointers { f.b.ins().iadd(base, value) } else { value };
                f.store(value, port, word * 8);
            }
            f.leave(Status::Ok as i64);
            Ok(())
        })?;
        Ok(())
    }
}
