//! No kernel reads or writes a byte outside of its tensors: they lie against pages that nobody may
//! touch, once with their ends and once with their beginnings.
//!
//! The kernels run in a process of their own, as one that goes astray ends it.

use std::fs;
use std::process::Command;
use std::ptr;

use kiln::graph::eval::{Value, eval_nodes};
use kiln::graph::op::Op;
use kiln::graph::{Graph, NodeId, text};
use kiln::tensor::{Tensor, TensorView, TensorViewMut};
use kiln::{Compiler, Executable};
use kiln_tests::grown::{Diet, grow};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::environment;

/// Names the file in which the process says what it does; there is none where it is the parent.
const NOTES: &str = "KILN_GUARDED";

/// Bytes between pages that nobody may touch.
struct Guarded {
    pages: *mut u8,
    total: usize,
    start: usize,
    len: usize,
}

impl Guarded {
    /// So many bytes that end where a page does, or begin so.
    fn new(len: usize, at_end: bool) -> Guarded {
        let page = rustix::param::page_size();
        let room = len.next_multiple_of(page).max(page);
        let total = room + 2 * page;
        // SAFETY: new memory of this process, of which only the middle may be touched.
        let pages = unsafe {
            let pages =
                mmap_anonymous(ptr::null_mut(), total, ProtFlags::empty(), MapFlags::PRIVATE)
                    .expect("memory");
            let middle = pages.cast::<u8>().add(page).cast();
            mprotect(middle, room, MprotectFlags::READ | MprotectFlags::WRITE).expect("memory");
            pages.cast::<u8>()
        };
        Guarded { pages, total, start: if at_end { page + room - len } else { page }, len }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: within what may be read, and all of it has a value.
        unsafe { std::slice::from_raw_parts(self.pages.add(self.start), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: within what may be written, and borrowed from its owner.
        unsafe { std::slice::from_raw_parts_mut(self.pages.add(self.start), self.len) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the memory that was mapped, which nobody borrows any more.
        unsafe { munmap(self.pages.cast(), self.total).expect("it was mapped") }
    }
}

/// The graph of one kernel, with its arguments as inputs but for constants, and their values.
fn alone(fused: &Graph, id: NodeId, values: &[Value]) -> (Graph, Vec<Value>) {
    let mut graph = Graph::empty_like(fused);
    graph.inputs.clear();
    graph.bodies = fused.bodies.clone();
    let node = fused.node(id);
    let mut inputs = Vec::new();
    let mut args = Vec::new();
    for &arg in &node.args {
        let value = &values[arg.index()];
        args.push(match fused.constant(arg) {
            Some(_) => graph.tensor(&value.to_tensor(), &"c".into()),
            None => {
                inputs.push(value.clone());
                graph.input(&format!("x{}", inputs.len()), value.ty.clone())
            }
        });
    }
    let args = args.into_iter().collect();
    let root = graph.push(node.op.clone(), args, node.ty.clone(), &node.origin);
    graph.outputs.push(("y".into(), root));
    (graph, inputs)
}

/// Runs a kernel between pages that it may not touch; its result is the same as elsewhere.
fn run_guarded(executable: &Executable, inputs: &[Value], at_end: bool) -> Result<(), String> {
    let tensors: Vec<Tensor> = inputs.iter().map(Value::to_tensor).collect();
    let named = executable.inputs().iter().map(|port| port.name.as_str());
    let named: Vec<(&str, TensorView)> = named.zip(tensors.iter().map(Tensor::view)).collect();
    let free = executable.run(&named).map_err(|e| e.to_string())?.swap_remove(0).1;
    let mut guarded: Vec<Guarded> = Vec::new();
    for tensor in &tensors {
        let mut bytes = Guarded::new(tensor.bytes().len(), at_end);
        bytes.bytes_mut().copy_from_slice(tensor.bytes());
        guarded.push(bytes);
    }
    let views: Vec<TensorView> = guarded
        .iter()
        .zip(&tensors)
        .map(|(g, t)| TensorView { dtype: t.dtype(), shape: t.shape(), bytes: g.bytes() })
        .collect();
    let mut out = Guarded::new(free.bytes().len(), at_end);
    let view = TensorViewMut { dtype: free.dtype(), shape: free.shape(), bytes: out.bytes_mut() };
    executable.run_into(&views, &mut [view]).map_err(|e| e.to_string())?;
    if out.bytes() != free.bytes() {
        return Err("another result than elsewhere".into());
    }
    Ok(())
}

/// What the process of its own does.
fn run_all(notes: &str) {
    let (first, count) = (environment("KILN_SEED", 0), environment("KILN_GRAPHS", 2000) / 4);
    let compiler = Compiler::new();
    let mut kernels = 0;
    for seed in first..first + count {
        let grown = grow(seed, Diet::Tame);
        for (way, compiler) in
            [("wide", compiler.clone()), ("narrow", compiler.clone().wide(false))]
        {
            let fused = compiler.optimise(&grown.graph).expect("a graph that compiles");
            let values = eval_nodes(&fused, &grown.inputs);
            for id in fused.ids().filter(|id| matches!(fused.node(*id).op, Op::Fused(_))) {
                let (graph, inputs) = alone(&fused, id, &values);
                let executable = compiler.build(&graph).expect("a kernel that compiles");
                for at_end in [true, false] {
                    let what = format!("graph {seed}, {way}, at end {at_end}");
                    let note = format!("{what}\n{}", text::print(&graph));
                    fs::write(notes, &note).expect("a file for notes");
                    let run = run_guarded(&executable, &inputs, at_end);
                    run.unwrap_or_else(|why| panic!("{why}: {note}"));
                }
                kernels += 1;
            }
        }
    }
    println!("{kernels} kernels of {count} graphs between guarded pages");
    assert!(kernels as u64 > count);
}

/// Runs the test of that name in a process of its own, and gives whether it ended well, and what
/// it said.
fn process(test: &str, notes: &str) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().expect("a test is a program"));
    let output = command.args(["--exact", test, "--nocapture"]).env(NOTES, notes).output();
    let output = output.expect("a process");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into());
    let said: [String; 2] = said;
    (output.status.success(), said.concat())
}

#[test]
fn kernels_stay_within_their_tensors() {
    if let Ok(notes) = std::env::var(NOTES) {
        return run_all(&notes);
    }
    let file = tempfile::NamedTempFile::new().expect("a file");
    let notes = file.path().display().to_string();
    let (well, said) = process("guarded::kernels_stay_within_their_tensors", &notes);
    let last = fs::read_to_string(file.path()).unwrap_or_default();
    assert!(well, "{said}\nthe last kernel: {last}");
    println!("{said}");
}

#[test]
fn a_byte_outside_is_noticed() {
    const TEST: &str = "guarded::a_byte_outside_is_noticed";
    if let Ok(side) = std::env::var(NOTES) {
        let bytes = Guarded::new(10, side == "behind");
        let at = if side == "behind" { 10 } else { -1 };
        // SAFETY: none; that this ends the process is what is tested.
        let byte = unsafe { bytes.pages.add(bytes.start).offset(at).read_volatile() };
        println!("read {byte}");
        return;
    }
    for side in ["behind", "before"] {
        assert!(!process(TEST, side).0, "a byte {side} is read");
    }
}
