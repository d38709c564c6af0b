//! What the command understands.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln::{DimRange, Precision};

use crate::device::{DeviceArgs, Place, parse_place};

/// Kiln fires a model into machine code.
#[derive(Parser, Debug)]
#[command(name = "kiln", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "EXAMPLES:\n  \
    kiln check model.onnx                      every problem at once\n  \
    kiln run model.onnx -i x.npy -o out.npz    compile in memory and run\n  \
    kiln bench model.onnx --threads 2          latency of random inputs\n  \
    kiln profile model.onnx                    where the time goes\n  \
    kiln verify model.onnx -i test_data_set_0  compare with the reference\n  \
    kiln compile model.onnx --emit loops       look at a stage\n\n\
    COMPILED MODELS (.so, .o, .kiln) ARE CODE: run, bench, profile and verify execute them\n  \
    with your rights.\n  \
    Give only files whose origin you trust. inspect checks a file and executes nothing of it.\n\n\
    EXIT CODES:\n  \
    0 ok, 1 other failure, 2 usage, 3 invalid or unsupported model, 4 results differ,\n  \
    5 this machine cannot run it, 6 a limit was hit, 7 a file could not be read or written,\n  \
    130 interrupted")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How to say it.
    #[command(flatten)]
    pub output: Output,
}

/// Flags of every command.
#[derive(Args, Clone, Debug)]
pub struct Output {
    /// Print one JSON object on standard output instead of text
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,
    /// Print nothing but results and errors
    #[arg(short, long, global = true, help_heading = "Output", conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more about what happens
    #[arg(short, long, global = true, help_heading = "Output")]
    pub verbose: bool,
    /// Colour of messages
    #[arg(
        long,
        global = true,
        help_heading = "Output",
        value_name = "WHEN",
        default_value = "auto"
    )]
    pub color: When,
    /// Progress of anything longer than a second, on standard error
    #[arg(
        long,
        global = true,
        help_heading = "Output",
        value_name = "HOW",
        default_value = "auto"
    )]
    pub progress: ProgressForm,
}

/// When to use colour.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How to show progress.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProgressForm {
    /// A bar on a terminal.
    Auto,
    /// Not at all.
    Never,
    /// One JSON object a line.
    Json,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// List everything that is wrong with a model or not supported
    Check(CheckArgs),
    /// Compile a model into a shared library, object or static library, or show a stage
    Compile(CompileArgs),
    /// Compile a model in memory, or load a compiled one, and run it
    Run(RunArgs),
    /// Measure compile time, latency and memory
    Bench(BenchArgs),
    /// Show how long each kernel takes, and how close to the machine it comes
    Profile(ProfileArgs),
    /// Show inputs, outputs, operators and memory of a model
    Inspect(InspectArgs),
    /// Compare the compiled model with the reference interpreter and with stored outputs
    Verify(VerifyArgs),
    /// Show what became of a node of the model
    Explain(ExplainArgs),
    /// List the operators that are supported
    Ops(OpsArgs),
    /// Show what Kiln sees of this machine, and whether it can run here
    Doctor(DoctorArgs),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print a manual page
    Man {
        /// The command that it is about; without it, `kiln` itself
        command: Option<String>,
    },
}

/// The model and how far it may go.
#[derive(Args, Clone, Debug, Default)]
pub struct ModelArgs {
    /// The model, an .onnx file; run, bench, profile, inspect and verify also take compiled ones,
    /// .so or .o, or .kiln for GPUs
    pub model: PathBuf,
    /// Extent of a named dimension of the inputs, or its range LEAST..MOST and what to compile for
    /// where no tensor settles it, such as batch=1..8@4; may be given several times
    #[arg(long, value_name = "NAME=N", value_parser = parse_dim, help_heading = "Model")]
    pub dim: Vec<(String, DimRange)>,
    /// Bytes that the tensors of the model may take, such as 512M or 2G
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Model")]
    pub max_memory: Option<u64>,
    /// Nodes that the model may have
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub max_nodes: Option<usize>,
    /// Axes that a tensor may have
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub max_rank: Option<usize>,
    /// Graphs that may be within each other, as those of If and Loop
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub max_depth: Option<usize>,
    /// Nodes that the e-graph may have; with fewer, less is optimised
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub max_egraph: Option<usize>,
    /// Kernels that the model may become
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub max_kernels: Option<usize>,
}

/// How to compile.
#[derive(Args, Clone, Debug)]
pub struct BuildArgs {
    /// Threads to run on; 0 means all that the system offers
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Compiler")]
    pub threads: usize,
    /// Leave out optimisation by equality saturation
    #[arg(long, help_heading = "Compiler")]
    pub no_egraph: bool,
    /// Sum the products of convolutions as the model writes them down: less memory for weights,
    /// smaller differences, slower
    #[arg(long, help_heading = "Compiler")]
    pub exact_conv: bool,
    /// What products with weights are made of: bf16, f16 and tf32 round both their operands to 8,
    /// 11 and 11 bits. GPUs multiply these by their units for matrices, CPUs with AVX512_BF16
    /// multiply bf16 at twice the speed; bf16 and f16 take half the memory for weights. Numbers
    /// above 65504 are infinite in f16. Sums and all else are f32
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = precision(),
        help_heading = "Compiler")]
    pub precision: Precision,
    /// Use 128-bit vectors only
    #[arg(long, help_heading = "Compiler")]
    pub no_wide: bool,
}

/// Reads a precision by its name.
fn precision() -> impl TypedValueParser<Value = Precision> {
    let names = PossibleValuesParser::new(Precision::ALL.map(Precision::name));
    names.map(|name| Precision::ALL.into_iter().find(|p| p.name() == name).unwrap_or_default())
}

/// Where compiled models are kept.
#[derive(Args, Clone, Debug, Default)]
pub struct CacheArgs {
    /// Keep what is compiled in this folder, and take it from there the next time. Code is loaded
    /// from it, so it must be private to you. Its files may be removed at any time
    #[arg(long, value_name = "DIR", help_heading = "Compiler")]
    pub cache: Option<PathBuf>,
}

/// What is kept from run to run.
#[derive(Args, Clone, Debug, Default)]
pub struct StateArgs {
    /// Keep an output as the next value of an input, such as h=next_h, or past_*=present_* for all
    /// pairs with the same text for *. A cache that grows along a dim with a range, as in
    /// --dim past=0..1024, is appended to where it lies; may be given several times
    #[arg(long, value_name = "INPUT=OUTPUT", value_parser = parse_pair, help_heading = "Model")]
    pub state: Vec<(String, String)>,
}

/// `kiln check`
#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
}

/// `kiln compile`
#[derive(Args, Debug)]
pub struct CompileArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub build: BuildArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub states: StateArgs,
    /// File to write; without it, text goes to standard output. A header for C goes beside a
    /// library or object: model.so and model.h
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// What to write (default: what the ending of the output says, .so, .o, .a or .h, .kiln or
    /// .ptx for GPUs; plan without an output)
    #[arg(long, value_name = "WHAT")]
    pub emit: Option<Emit>,
    /// What the model is compiled for; for cuda there are .kiln files, which kiln runs, and text
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Versions of the GPU's instruction set, one text each: 80 (the default) runs on all later
    /// ones too
    #[arg(long, value_name = "SM", value_delimiter = ',')]
    pub sm: Vec<u32>,
    /// Target to compile for, such as aarch64-unknown-linux-gnu (default: this machine)
    #[arg(long, value_name = "TRIPLE")]
    pub target: Option<String>,
    /// What the CPU has: host, x86-64-v2, x86-64-v3, x86-64-v4, features like +avx2,+fma, or
    /// multi: code for v2 and for v3 in one file, which chooses when it runs (default: host, and
    /// x86-64-v2 for another target)
    #[arg(long, value_name = "CPU")]
    pub cpu: Option<String>,
    /// What the functions of the library or object begin with (default: the name of the file)
    #[arg(long, value_name = "PREFIX")]
    pub name: Option<String>,
    /// Where the weights go
    #[arg(long, value_name = "WHERE", value_enum, default_value_t = Weights::Inside)]
    pub weights: Weights,
}

/// What runs a model.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// Processors.
    Cpu,
    /// A GPU of NVIDIA's.
    Cuda,
}

/// Where the weights of a compiled model go.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weights {
    /// Into the library or object.
    Inside,
    /// Into a file beside it: model.so and model.weights.
    External,
}

/// A stage of the pipeline, or what comes out of it.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Emit {
    /// The model as Kiln's graph of tensors.
    Graph,
    /// The graph after optimisation: one node for each kernel.
    Fused,
    /// The loops of each kernel.
    Loops,
    /// Cranelift's form of each kernel.
    Clif,
    /// Machine code, disassembled.
    Asm,
    /// PTX, for a GPU (--device cuda).
    Ptx,
    /// A compiled model for GPUs (--device cuda), which kiln runs.
    Kiln,
    /// Order of kernels and places in memory.
    Plan,
    /// A shared library.
    So,
    /// An object file.
    Obj,
    /// A static library.
    Staticlib,
    /// The header for C.
    Header,
}

/// Where inputs come from.
#[derive(Args, Clone, Debug)]
pub struct InputArgs {
    /// Tensors, in any of the forms that the help text names.
    #[arg(short, long, value_name = "INPUT")]
    #[arg(help = "NAME=FILE.npy, FILE.npy, FILE.npz, FILE.pb, random[:SEED], or a folder of \
        input_K.pb; may be given several times")]
    pub input: Vec<String>,
}

/// A model that is made ready to run, and what it runs on.
#[derive(Args, Debug)]
pub struct GivenArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub build: BuildArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub cache: CacheArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub inputs: InputArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub states: StateArgs,
}

/// `kiln run`
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub given: GivenArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub device: DeviceArgs,
    /// Runs, each with the states that the one before left; the outputs are those of the last
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// File for the outputs: .npz, with their names as keys, or .npy for a single one;
    /// without it, a summary goes to standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `kiln bench`
#[derive(Args, Debug)]
pub struct BenchArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub given: GivenArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub device: DeviceArgs,
    /// How long to run before measuring
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    pub warmup: Duration,
    /// How long to measure
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    pub time: Duration,
    /// Percentiles of the latency to print
    #[arg(long, value_name = "P,..", default_value = "50,90,99", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=100))]
    pub percentiles: Vec<u8>,
}

/// What the machine can do at most.
#[derive(Args, Clone, Debug, Default)]
pub struct CalibrationArgs {
    /// Folder of what `kiln doctor --calibrate` measured (default: kiln in $XDG_CACHE_HOME or
    /// ~/.cache)
    #[arg(long, value_name = "DIR")]
    pub calibration: Option<PathBuf>,
}

/// `kiln profile`
#[derive(Args, Debug)]
#[command(after_help = "\
    A row is a kernel: the nodes of the model that it computes, the median of its time, and what\n\
    it does in that time. Sums of products count as two operations for each product that the\n\
    model states, other functions as one; bytes are operands and results, each once. Roof is the\n\
    least time that this takes on this machine, whichever of operations (compute) and bytes\n\
    (memory) takes longer, over the time that it took. The machine's figures are those of f32\n\
    and of memory beyond all caches. A kernel can be above 100 %: Winograd's convolutions need\n\
    fewer products than the model states, and what is in a cache is read faster than memory.\n\
    The last row has the sums of all.\n\n\
    On a GPU, times are between events of the device, without copies of inputs and outputs, and\n\
    the machine's figures are those of its clocks.\n\n\
    The trace has one run, that of median time, for chrome://tracing or ui.perfetto.dev.")]
pub struct ProfileArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub given: GivenArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub device: DeviceArgs,
    /// How long to run before measuring
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_time)]
    pub warmup: Duration,
    /// How long to measure
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    pub time: Duration,
    /// File for a trace of one run, in Chrome's format
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub calibration: CalibrationArgs,
}

/// `kiln doctor`
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Measure how many operations and bytes this machine, when idle, can do in a second, and keep
    /// it for `kiln profile`
    #[arg(long)]
    pub calibrate: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub calibration: CalibrationArgs,
}

/// `kiln inspect`
#[derive(Args, Debug)]
pub struct InspectArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Let the driver of cuda or cuda:N assemble the kernels of a .kiln file, and show their
    /// registers
    #[arg(long, value_name = "DEVICE", value_parser = parse_place)]
    pub device: Option<Place>,
}

/// `kiln verify`
#[derive(Args, Debug)]
pub struct VerifyArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub build: BuildArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub cache: CacheArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub inputs: InputArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub device: DeviceArgs,
    /// What to compare a compiled model with: the .onnx file that it was made of
    #[arg(long = "model", value_name = "MODEL")]
    pub reference: Option<PathBuf>,
    /// Relative difference that is allowed; 1e-3 where nothing is said, 2^-6 of bf16
    #[arg(long, value_name = "X")]
    pub rtol: Option<f64>,
    /// Absolute difference that is allowed; 1e-5 where nothing is said, of bf16 2^-6 of the largest
    /// element
    #[arg(long, value_name = "X")]
    pub atol: Option<f64>,
    /// Also compare the result of every kernel: outputs may hide differences, as a softmax does
    /// whose largest element is 1
    #[arg(long)]
    pub kernels: bool,
    /// Where code is wrong, looks for the smallest graph that shows it and writes it there, as
    /// graph.txt, with its inputs as inputs.npz
    #[arg(long, value_name = "FOLDER")]
    pub reduce: Option<PathBuf>,
}

/// `kiln explain`
#[derive(Args, Debug)]
pub struct ExplainArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Name of the node, or a part of it
    pub node: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub build: BuildArgs,
}

/// `kiln ops`
#[derive(Args, Debug)]
pub struct OpsArgs {
    /// Only operators whose name contains this, in any case
    pub filter: Option<String>,
}

fn parse_dim(text: &str) -> Result<(String, DimRange), String> {
    let (name, extent) = text.rsplit_once('=').ok_or("expected NAME=N, such as batch=1")?;
    let number = |text: &str| -> Result<usize, String> {
        text.parse().map_err(|_| format!("`{text}` is no extent"))
    };
    let (range, typical) = match extent.split_once('@') {
        Some((range, typical)) => (range, Some(number(typical)?)),
        None => (extent, None),
    };
    let (least, most) = range.split_once("..").unwrap_or((range, range));
    let (least, most) = (number(least)?, number(most)?);
    let typical = typical.unwrap_or(most);
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    if !(least..=most).contains(&typical) {
        return Err(format!("{typical} is not in {least}..{most}"));
    }
    Ok((name.into(), DimRange { least, most, typical }))
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let wrong = || "expected INPUT=OUTPUT, such as past_k=present_k".to_string();
    let (input, output) = text.split_once('=').ok_or_else(wrong)?;
    match input.is_empty() || output.is_empty() {
        true => Err(wrong()),
        false => Ok((input.into(), output.into())),
    }
}

/// A number of bytes, with a suffix for a power of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write bytes, or a number with K, M, G or T");
    let upper = text.to_ascii_uppercase();
    let trimmed = upper.trim_end_matches('B').trim_end_matches('I');
    let suffixes = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let suffix = suffixes.iter().find(|(suffix, _)| trimmed.ends_with(*suffix));
    let (digits, shift) =
        suffix.map_or((trimmed, 0), |(s, shift)| (trimmed.trim_end_matches(*s), *shift));
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// A time such as `500ms`, `2s`, `1m`; a bare number is seconds.
fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time; write 500ms, 2s or 1m");
    let units = [("ms", 1e-3), ("us", 1e-6), ("s", 1.0), ("m", 60.0)];
    let unit = units.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale)));
    let (number, scale) = unit.unwrap_or((text, 1.0));
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * scale).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_times_and_dims() {
        assert_eq!(parse_size("1024"), Ok(1024));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("1kb"), Ok(1024));
        assert!(parse_size("x").is_err() && parse_size("99999999999T").is_err());
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("2"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_time("1m"), Ok(Duration::from_secs(60)));
        assert!(parse_time("-1s").is_err() && parse_time("fast").is_err());
        let range =
            |least, most, typical| Ok(("batch".to_string(), DimRange { least, most, typical }));
        assert_eq!(parse_dim("batch=4"), range(4, 4, 4));
        assert_eq!(parse_dim("batch=1..8"), range(1, 8, 8));
        assert_eq!(parse_dim("batch=1..8@4"), range(1, 8, 4));
        for wrong in ["batch", "=4", "batch=8..1", "batch=1..8@9", "batch=1..x"] {
            assert!(parse_dim(wrong).is_err(), "{wrong}");
        }
    }
}
