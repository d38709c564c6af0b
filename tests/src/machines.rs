//! Machines of other architectures, emulated by qemu: a program there loads compiled models and
//! runs them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock};

use kiln::backend::cpu::Cpu;
use kiln::graph::Graph;
use kiln::graph::op::Type;
use kiln::tensor::{DType, Tensor};
use kiln::{Compiler, Form, Kind};

use crate::skip;

/// How programs for a machine are built and run.
#[derive(Clone, Debug)]
pub struct Emulator {
    /// What code is made for.
    pub cpu: Cpu,
    /// A C compiler.
    pub cc: &'static str,
    /// The emulator and its arguments.
    pub qemu: Vec<&'static str>,
}

/// A program in an emulator that runs compiled models.
pub struct Machine {
    emulator: Emulator,
    server: Option<Server>,
}

struct Server {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// 64-bit Arm and RISC-V.
pub fn emulators() -> [Emulator; 2] {
    let cpu = |target| Cpu::named(Some(target), None).expect("a target that is known");
    [
        Emulator {
            cpu: cpu("aarch64-unknown-linux-gnu"),
            cc: "aarch64-linux-gnu-gcc",
            qemu: vec!["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"],
        },
        Emulator {
            cpu: cpu("riscv64gc-unknown-linux-gnu"),
            cc: "riscv64-linux-gnu-gcc",
            qemu: vec!["qemu-riscv64", "-L", "/usr/riscv64-linux-gnu"],
        },
    ]
}

/// The machines of other architectures that there are emulators for here; the others are said
/// aloud.
pub fn machines() -> &'static [Mutex<Machine>] {
    static MACHINES: OnceLock<Vec<Mutex<Machine>>> = OnceLock::new();
    MACHINES
        .get_or_init(|| emulators().into_iter().filter_map(Machine::new).map(Mutex::new).collect())
}

impl Machine {
    /// A machine, or `None`, said aloud, where something for it is missing.
    pub fn new(emulator: Emulator) -> Option<Machine> {
        for command in [emulator.cc, emulator.qemu[0]] {
            let mut version = Command::new(command);
            if version.arg("--version").output().is_err() {
                let target = emulator.cpu.triple.name;
                skip(&format!("no `{command}` for code of {target}; `tests/run` may install it"));
                return None;
            }
        }
        Some(Machine { emulator, server: None })
    }

    /// The CPU that code is made for.
    pub fn cpu(&self) -> &Cpu {
        &self.emulator.cpu
    }

    /// Compiles a graph for the machine and runs it there. An error says what went wrong, such as
    /// the status of the run.
    pub fn run(&mut self, graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
        self.run_for(self.emulator.cpu.clone(), graph, inputs)
    }

    /// The same for a CPU that may be another than the machine's.
    pub fn run_for(
        &mut self,
        cpu: Cpu,
        graph: &Graph,
        inputs: &[Tensor],
    ) -> Result<Vec<Tensor>, String> {
        let compiler = Compiler::new().verify_code(true).target(cpu);
        let package = compiler
            .package_of(graph, [0; 32], &Form::new(Kind::Shared, "net"))
            .map_err(|e| format!("compiling: {e}"))?;
        let port = |(_, node): &(String, _)| {
            let Type { dtype, shape, .. } = graph.ty(*node);
            (*dtype, shape.to_vec())
        };
        let outputs: Vec<(DType, Vec<usize>)> = graph.outputs.iter().map(port).collect();
        self.run_library(&package.file, &[], inputs, &outputs)
    }

    /// Runs a shared library of this machine, whose functions begin with `net`, for these lengths
    /// of its dims; `outputs` says what comes out then.
    pub fn run_library(
        &mut self,
        library: &[u8],
        dims: &[i64],
        inputs: &[Tensor],
        outputs: &[(DType, Vec<usize>)],
    ) -> Result<Vec<Tensor>, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let path = |name: &str| folder.path().join(name);
        let write = |name: &str, bytes: &[u8]| fs::write(path(name), bytes);
        write("net.so", library).map_err(|e| e.to_string())?;
        let lengths: Vec<u8> = dims.iter().flat_map(|length| length.to_le_bytes()).collect();
        write("dims_0.bin", &lengths).map_err(|e| e.to_string())?;
        for (i, input) in inputs.iter().enumerate() {
            write(&format!("input_{i}.bin"), input.bytes()).map_err(|e| e.to_string())?;
        }
        let status = self.ask(folder.path())?;
        if status != "0" {
            return Err(format!("status {status}"));
        }
        let output = |(i, (dtype, shape)): (usize, &(DType, Vec<usize>))| {
            let bytes = fs::read(path(&format!("output_{i}.bin"))).map_err(|e| e.to_string())?;
            Tensor::from_bytes(*dtype, shape, &bytes).ok_or("an output of another size".into())
        };
        outputs.iter().enumerate().map(output).collect()
    }

    fn ask(&mut self, folder: &Path) -> Result<String, String> {
        let server = match &mut self.server {
            Some(server) => server,
            none => none.insert(serve(&self.emulator)),
        };
        let answer = writeln!(server.to, "{}", folder.display()).and_then(|()| {
            let mut line = String::new();
            server.from.read_line(&mut line).map(|_| line)
        });
        match answer {
            Ok(line) if !line.is_empty() => Ok(line.trim().to_string()),
            ended => {
                let how = server.child.wait();
                self.server = None;
                Err(format!("the program ended: {how:?}, {ended:?}"))
            }
        }
    }
}

/// Builds and starts the program.
fn serve(emulator: &Emulator) -> Server {
    let folder = tempfile::tempdir().expect("a folder");
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::F32, &[1]));
    graph.outputs.push(("y".into(), x));
    let compiler = Compiler::new().target(emulator.cpu.clone());
    let package = compiler
        .package_of(&graph, [0; 32], &Form::new(Kind::Shared, "net"))
        .expect("the least of graphs");
    fs::write(folder.path().join("net.h"), package.header).expect("a header");
    let program = folder.path().join("serve");
    let mut cc = Command::new(emulator.cc);
    cc.args(["-std=c99", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-I"]);
    cc.arg(folder.path()).arg("-o").arg(&program);
    cc.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("targets/serve.c")).arg("-ldl");
    let built = cc.output().expect("a compiler that starts");
    assert!(built.status.success(), "{cc:?}\n{}", String::from_utf8_lossy(&built.stderr));
    let mut command = Command::new(emulator.qemu[0]);
    command.args(&emulator.qemu[1..]).arg(&program).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("an emulator that starts");
    let to = child.stdin.take().expect("a pipe");
    let mut from = BufReader::new(child.stdout.take().expect("a pipe"));
    // Once it has spoken it is loaded, and its file may go.
    let mut ready = String::new();
    from.read_line(&mut ready).expect("a line of the program");
    assert_eq!(ready, "ready\n", "{command:?}");
    Server { child, to, from }
}
