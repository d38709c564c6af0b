//! The C interface of a compiled model: numbers that both sides agree on, and the header.

use std::fmt::Write;

use kiln_runtime::plan::{Length, Plan, PlanDim, Port};
use kiln_runtime::tensor::{DType, Small};

use super::driver::scratch_bytes;

/// Version of the interface; changes when anything in it does.
pub const ABI_VERSION: u32 = 1;

/// Byte offsets in `kiln_call`.
pub struct Call;

impl Call {
    /// `uint32_t`; four bytes that must be 0 follow.
    pub const ABI_VERSION: i32 = 0;
    /// Pointers to inputs.
    pub const INPUTS: i32 = 8;
    /// Pointers to outputs.
    pub const OUTPUTS: i32 = 16;
    /// Memory of the run.
    pub const SCRATCH: i32 = 24;
    /// Its size.
    pub const SCRATCH_SIZE: i32 = 32;
    /// Weights that lie beside.
    pub const WEIGHTS: i32 = 40;
    /// Their size.
    pub const WEIGHTS_SIZE: i32 = 48;
    /// Threads of the caller.
    pub const POOL: i32 = 56;
    /// Lengths of the model's dims.
    pub const DIMS: i32 = 64;
    /// Size of the whole.
    pub const SIZE: i32 = 72;
}

/// The status that says that the first dim is out of its range; those of other dims follow.
pub const FIRST_DIM: i64 = 100;

/// What the status of a dim says to people.
pub fn dim_text(dim: &PlanDim) -> String {
    let PlanDim { name, least, most } = dim;
    format!("dim `{name}` is not within {least} and {most}, for which the model was compiled")
}

/// What a function of a compiled model returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// It worked.
    Ok = 0,
    /// A pointer that must lead somewhere is null.
    NullPointer = 1,
    /// The scratch memory is smaller than `NAME_scratch_size`.
    ScratchTooSmall = 2,
    /// The processor lacks an instruction set.
    UnsupportedCpu = 3,
    /// The call was made for another version of the interface.
    AbiVersion = 4,
    /// No input or output of that index.
    Index = 5,
    /// The weights have another size or are not aligned.
    Weights = 6,
    /// The caller's pool failed.
    Pool = 7,
}

impl Status {
    /// All of them, in the order of their numbers.
    pub const ALL: [Status; 8] = [
        Status::Ok,
        Status::NullPointer,
        Status::ScratchTooSmall,
        Status::UnsupportedCpu,
        Status::AbiVersion,
        Status::Index,
        Status::Weights,
        Status::Pool,
    ];

    /// Its name in C.
    fn name(self) -> &'static str {
        match self {
            Status::Ok => "KILN_OK",
            Status::NullPointer => "KILN_NULL_POINTER",
            Status::ScratchTooSmall => "KILN_SCRATCH_TOO_SMALL",
            Status::UnsupportedCpu => "KILN_UNSUPPORTED_CPU",
            Status::AbiVersion => "KILN_ABI_MISMATCH",
            Status::Index => "KILN_NO_SUCH_INDEX",
            Status::Weights => "KILN_BAD_WEIGHTS",
            Status::Pool => "KILN_POOL_FAILED",
        }
    }

    /// What it says to people.
    pub fn text(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::NullPointer => "a pointer is null",
            Status::ScratchTooSmall => "the scratch memory is too small",
            Status::UnsupportedCpu => "this processor lacks an instruction set that the code uses",
            Status::AbiVersion => "the call was made for another version of the interface",
            Status::Index => "there is no input or output of that index",
            Status::Weights => "the weights have the wrong size, or do not start on 64 bytes",
            Status::Pool => "the pool did not run all of its tasks",
        }
    }
}

const TYPES: [(DType, &str, &str); 23] = [
    (DType::F32, "KILN_F32", "float"),
    (DType::F64, "KILN_F64", "double"),
    (DType::F16, "KILN_F16", "uint16_t, bits of an IEEE binary16"),
    (DType::BF16, "KILN_BF16", "uint16_t, bits of a bfloat16"),
    (DType::I8, "KILN_I8", "int8_t"),
    (DType::I16, "KILN_I16", "int16_t"),
    (DType::I32, "KILN_I32", "int32_t"),
    (DType::I64, "KILN_I64", "int64_t"),
    (DType::U8, "KILN_U8", "uint8_t"),
    (DType::U16, "KILN_U16", "uint16_t"),
    (DType::U32, "KILN_U32", "uint32_t"),
    (DType::U64, "KILN_U64", "uint64_t"),
    (DType::Bool, "KILN_BOOL", "uint8_t, 0 or 1"),
    (DType::Small(Small::F8E4M3FN), "KILN_F8E4M3FN", "uint8_t, a code of float8 e4m3fn"),
    (DType::Small(Small::F8E4M3FNUZ), "KILN_F8E4M3FNUZ", "uint8_t, a code of float8 e4m3fnuz"),
    (DType::Small(Small::F8E5M2), "KILN_F8E5M2", "uint8_t, a code of float8 e5m2"),
    (DType::Small(Small::F8E5M2FNUZ), "KILN_F8E5M2FNUZ", "uint8_t, a code of float8 e5m2fnuz"),
    (DType::Small(Small::F8E8M0), "KILN_F8E8M0", "uint8_t, a code of float8 e8m0"),
    (DType::Small(Small::F4E2M1), "KILN_F4E2M1", "uint8_t, a code of float4 e2m1, one a byte"),
    (DType::Small(Small::I4), "KILN_I4", "int8_t, -8 to 7, one a byte"),
    (DType::Small(Small::U4), "KILN_U4", "uint8_t, 0 to 15, one a byte"),
    (DType::Small(Small::I2), "KILN_I2", "int8_t, -2 to 1, one a byte"),
    (DType::Small(Small::U2), "KILN_U2", "uint8_t, 0 to 3, one a byte"),
];

/// The number of an element type in C.
pub fn type_code(dtype: DType) -> i64 {
    let found = TYPES.iter().position(|t| t.0 == dtype.storage());
    found.expect("every type has a number") as i64
}

/// Text that may stand in a comment of C.
fn comment(text: &str) -> String {
    let clean = |c: char| if c.is_control() || !c.is_ascii() { '?' } else { c };
    text.chars().map(clean).collect::<String>().replace("*/", "* /").replace("/*", "/ *")
}

fn port(out: &mut String, name: &str, side: &str, index: usize, port: &Port) {
    let mut shape: Vec<String> = port.shape.iter().map(usize::to_string).collect();
    for Length { axis, dim, more } in &port.lengths {
        shape[*axis] =
            if *more == 0 { format!("dim {dim}") } else { format!("dim {dim} + {more}") };
    }
    let (_, _, element) = TYPES[type_code(port.dtype) as usize];
    let (bytes, elements) = (port.size_bytes().unwrap_or(0), port.shape.iter().product::<usize>());
    let (text, shape) = (comment(&port.name), shape.join(", "));
    _ = writeln!(out, "/* {side} {index}: \"{text}\" [{shape}] of {element} */");
    let (prefix, side) = (name.to_uppercase(), side.to_uppercase());
    _ = writeln!(out, "#define {prefix}_{side}_{index}_ELEMENTS {elements}");
    _ = writeln!(out, "#define {prefix}_{side}_{index}_SIZE {bytes}");
}

/// Types of the interface in C.
const STRUCTS: &str = "\
/* An input or output: a tensor, outermost axis first. It is dense, but where it is a state: then an
   output is the next value of an input and lies in its memory, of size bytes, with the strides of
   the whole shape however long its dims are. A run writes behind what is there. */
typedef struct kiln_port {
    const char *name;     /* in the model, UTF-8 */
    const int64_t *shape; /* rank extents; the most where the axis has a dim */
    const int64_t *dims;  /* rank indices of the dims that the axes are as long as; or -1 */
    const int64_t *more;  /* rank numbers of elements by which axes are longer than their dims */
    size_t rank;
    size_t size;          /* bytes; the most where there are dims */
    int32_t type;         /* enum kiln_type */
    int32_t state;        /* 0, or 1 + the index of the output or input that is the same memory */
} kiln_port;

/* A dim of the model whose length each run decides. */
typedef struct kiln_dim {
    const char *name; /* in the model, UTF-8 */
    int64_t least;
    int64_t most;
} kiln_dim;

/* Threads of the caller. run calls task(argument, index) once for every index below count, on any
   threads, and returns 0 when all of them are done. */
typedef struct kiln_pool {
    void *context;
    int32_t (*run)(void *context, void (*task)(void *argument, size_t index), void *argument,
                   size_t count);
} kiln_pool;

/* All that a run can be given. Set what you do not use to 0. */
typedef struct kiln_call {
    uint32_t abi_version; /* KILN_ABI_VERSION */
    uint32_t reserved;
    const void *const *inputs; /* pointers to tensors, in the order of the inputs */
    void *const *outputs;      /* likewise; written */
    void *scratch;             /* memory for intermediate values, at any address */
    size_t scratch_size;       /* at least NAME_scratch_size() */
    const void *weights;       /* only for models whose weights lie in a file beside */
    size_t weights_size;
    const kiln_pool *pool;     /* or null: one thread */
    const int64_t *dims;       /* lengths of the dims, in order; only for models that have some */
} kiln_call;
#endif

";

/// What is the same for every model; the first header that a program includes brings it.
fn common(out: &mut String) {
    let mut types = String::new();
    for (code, (_, name, element)) in TYPES.iter().enumerate() {
        _ = writeln!(types, "    {name} = {code}, /* {element} */");
    }
    let mut statuses = String::new();
    for status in Status::ALL {
        let (name, code, text) = (status.name(), status as i32, status.text());
        _ = writeln!(statuses, "    {name} = {code}, /* {text} */");
    }
    let last_comma = |list: &str| {
        let at = list.rfind(", /*").map_or(0, |at| at);
        format!("{}{}", &list[..at], list[at..].replacen(',', "", 1))
    };
    let (types, statuses) = (last_comma(&types), last_comma(&statuses));
    _ = write!(
        out,
        "\
#ifndef KILN_ABI_VERSION
#define KILN_ABI_VERSION {ABI_VERSION}u

/* Element types. */
enum kiln_type {{
{types}}};

/* What functions return; KILN_DIM + N where the length of dim N is out of its range. */
enum kiln_status {{
{statuses}}};
#define KILN_DIM {FIRST_DIM}

{STRUCTS}"
    );
}

fn dims(out: &mut String, name: &str, plan: &Plan) {
    for (index, dim) in plan.dims.iter().enumerate() {
        let PlanDim { name: text, least, most } = dim;
        let (text, prefix) = (comment(text), name.to_uppercase());
        _ = writeln!(out, "/* dim {index}: \"{text}\", {least} to {most} */");
        _ = writeln!(out, "#define {prefix}_DIM_{index}_MOST {most}\n");
    }
}

/// The simplest way to run, or how to hand in the weights.
fn simple(out: &mut String, name: &str, plan: &Plan, external: Option<(&str, usize)>) {
    match external {
        None if !plan.dims.is_empty() => {}
        None => {
            _ = write!(
                out,
                "/* Runs the model on this thread. inputs and outputs are pointers to tensors in \
                 the order\n   above; scratch is NAME_scratch_size() bytes at any address. Returns \
                 an enum kiln_status. */\n\
                 int32_t {name}_run(const void *const *inputs, void *const *outputs, void \
                 *scratch,\n    size_t scratch_size);\n\n"
            );
        }
        Some((file, bytes)) => {
            _ = write!(
                out,
                "/* The weights are the {bytes} bytes of the file {}. Map it, and hand it to \
                 {name}_run_with.\n   They must start on a multiple of 64. */\n\
                 #define {}_WEIGHTS_SIZE {bytes}\n\n",
                comment(file),
                name.to_uppercase()
            );
        }
    }
}

/// The header of a model.
pub fn header(name: &str, plan: &Plan, about: &str, external: Option<(&str, usize)>) -> String {
    let mut out = String::new();
    let guard = format!("{}_H", name.to_uppercase());
    _ = write!(
        out,
        "/* {}\n   Every function may be called from several threads at once, each call with memory \
         of its own.\n   Nothing is allocated, and no thread is started. */\n\
         #ifndef {guard}\n#define {guard}\n\n#include <stddef.h>\n#include <stdint.h>\n\n\
         #ifdef __cplusplus\nextern \"C\" {{\n#endif\n\n",
        comment(about)
    );
    common(&mut out);
    dims(&mut out, name, plan);
    for (side, ports) in [("input", &plan.inputs), ("output", &plan.outputs)] {
        for (index, p) in ports.iter().enumerate() {
            port(&mut out, name, side, index, p);
            let kept = plan.states.iter().filter(|state| state.in_place && side == "output");
            for state in kept.filter(|state| state.output == index) {
                _ = writeln!(
                    out,
                    "/* a state: written into the memory of input {} */",
                    state.input
                );
            }
        }
        _ = writeln!(out, "#define {}_{}S {}\n", name.to_uppercase(), side.to_uppercase(), {
            ports.len()
        });
    }
    let scratch = scratch_bytes(plan);
    _ = writeln!(out, "#define {}_SCRATCH_SIZE {scratch}\n", name.to_uppercase());
    simple(&mut out, name, plan, external);
    _ = write!(
        out,
        "/* The same with all that a run can be given. */\n\
         int32_t {name}_run_with(const kiln_call *call);\n\n\
         /* Describes an input or output; what it points to lives as long as the code. */\n\
         int32_t {name}_input(size_t index, kiln_port *port);\n\
         int32_t {name}_output(size_t index, kiln_port *port);\n\
         size_t {name}_input_count(void);\n\
         size_t {name}_output_count(void);\n\
         int32_t {name}_dim(size_t index, kiln_dim *dim);\n\
         size_t {name}_dim_count(void);\n\n\
         /* Sizes in bytes; the version of this interface that the code was made for. */\n\
         size_t {name}_scratch_size(void);\n\
         size_t {name}_weights_size(void);\n\
         uint32_t {name}_abi_version(void);\n\n\
         /* For people: what a status means, and what the code was made from and for. */\n\
         const char *{name}_status_text(int32_t status);\n\
         const char *{name}_about(void);\n\n\
         #ifdef __cplusplus\n}}\n#endif\n\n#endif\n"
    );
    out
}
