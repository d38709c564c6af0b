//! Tensors for the inputs of a model, from wherever the person has them.

use std::path::{Path, PathBuf};

use kiln::graph::small::code;
use kiln::plan::Port;
use kiln::tensor::{DType, Tensor, TensorView};

use crate::args::InputArgs;
use crate::failure::{Exit, Failure};
use crate::files;

/// Tensors in the order of the model's inputs, and what should come out where that is known.
pub struct Inputs {
    /// Names and tensors in the order of the model.
    pub tensors: Vec<(String, Tensor)>,
    /// Stored outputs, in the order of their numbers; a name may be empty.
    pub expected: Vec<(String, Tensor)>,
}

impl Inputs {
    /// What `run` takes.
    pub fn named(&self) -> Vec<(&str, TensorView<'_>)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.view())).collect()
    }

    /// What `run_into` takes.
    pub fn views(&self) -> Vec<TensorView<'_>> {
        self.tensors.iter().map(|(_, tensor)| tensor.view()).collect()
    }
}

/// What the flags give, before the types and shapes of the inputs are known.
#[derive(Clone)]
pub struct Given {
    slots: Slots,
    seed: Option<u64>,
    expected: Vec<(String, Tensor)>,
}

/// Reads what the flags give for the inputs of those names. `fallback` says whether those that are
/// not given may be random; a command that only measures does not care.
pub fn gather(names: Vec<String>, args: &InputArgs, fallback: bool) -> Result<Given, Failure> {
    let mut slots = Slots { tensors: vec![None; names.len()], names };
    let mut seed = fallback.then_some(0);
    let mut expected = Vec::new();
    for text in &args.input {
        match source(text)? {
            Source::Random(given) => seed = Some(given),
            Source::Named(name, path) => slots.put(&name, single(&path)?.1)?,
            Source::Archive(path) => slots.archive(&path)?,
            Source::Single(path) => {
                let (name, tensor) = single(&path)?;
                slots.put_or_next(&name, tensor, &path)?;
            }
            Source::Folder(path) => {
                for (name, tensor) in numbered(&path, "input")? {
                    slots.put_or_next(&name, tensor, &path)?;
                }
                expected.extend(numbered(&path, "output")?);
            }
        }
    }
    Ok(Given { slots, seed, expected })
}

impl Given {
    /// The tensor for the input of that name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let index = self.slots.names.iter().position(|known| known == name)?;
        self.slots.tensors[index].as_ref()
    }

    /// All tensors that were given.
    pub fn all(&self) -> Vec<(&str, TensorView<'_>)> {
        let named = self.slots.names.iter().zip(&self.slots.tensors);
        named.filter_map(|(name, tensor)| Some((name.as_str(), tensor.as_ref()?.view()))).collect()
    }

    /// Checks tensors against the inputs of the compiled model, and makes up those that may be.
    pub fn complete(mut self, ports: &[Port]) -> Result<Inputs, Failure> {
        let mut tensors = Vec::new();
        for (index, port) in ports.iter().enumerate() {
            let tensor = match (self.slots.take(&port.name), self.seed) {
                (Some(tensor), _) => tensor,
                (None, Some(seed)) => random(port, seed, index),
                (None, None) => {
                    let text = format!("no tensor given for input {port}");
                    return Err(Failure::usage(text)
                        .help("give one with -i NAME=FILE.npy, or -i random for made-up ones"));
                }
            };
            let tensor = coded(tensor, port);
            let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
            if dtype != port.dtype || !port.admits(&shape) {
                let found = Port::new("given", dtype, &shape);
                let text = format!("the tensor does not fit input {port}; {found}");
                return Err(Failure::usage(text));
            }
            tensors.push((port.name.clone(), tensor));
        }
        Ok(Inputs { tensors, expected: self.expected })
    }
}

/// A tensor of bytes as the codes that an input asks for: files of NumPy have no names for those.
fn coded(tensor: Tensor, port: &Port) -> Tensor {
    let small = matches!(port.dtype, DType::Small(_)) && tensor.dtype() == port.dtype.stored();
    let codes = small.then(|| Tensor::from_bytes(port.dtype, tensor.shape(), tensor.bytes()));
    codes.flatten().unwrap_or(tensor)
}

/// Where a tensor comes from.
#[derive(Debug, PartialEq)]
enum Source {
    Random(u64),
    Named(String, PathBuf),
    Archive(PathBuf),
    Single(PathBuf),
    Folder(PathBuf),
}

fn source(text: &str) -> Result<Source, Failure> {
    let path = PathBuf::from(text);
    if text == "random" {
        return Ok(Source::Random(0));
    }
    if let Some(seed) = text.strip_prefix("random:") {
        let wrong = |_| Failure::usage(format!("`{seed}` is no seed; write -i random:1"));
        return seed.parse().map(Source::Random).map_err(wrong);
    }
    if path.is_dir() {
        return Ok(Source::Folder(path));
    }
    // A file whose name has a `=` in it is a file all the same.
    if !path.exists()
        && let Some((name, file)) = text.split_once('=')
    {
        return Ok(Source::Named(name.to_string(), PathBuf::from(file)));
    }
    match extension(&path) {
        "npz" => Ok(Source::Archive(path)),
        _ => Ok(Source::Single(path)),
    }
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|extension| extension.to_str()).unwrap_or("")
}

/// Reads a file of one tensor; its name is empty where the file has none.
fn single(path: &Path) -> Result<(String, Tensor), Failure> {
    let read = match extension(path) {
        "npy" => read_npy,
        "pb" => read_pb,
        _ => {
            let text = format!("{}: neither .npy, .npz nor .pb", path.display());
            return Err(Failure::usage(text));
        }
    };
    read(path)
}

fn read_npy(path: &Path) -> Result<(String, Tensor), Failure> {
    let tensor = kiln::npz::read_npy(&files::read(path)?);
    let tensor = tensor.map_err(|error| Failure::io(path.display(), error))?;
    Ok((String::new(), tensor))
}

fn read_pb(path: &Path) -> Result<(String, Tensor), Failure> {
    kiln::read_tensor_pb(&files::read(path)?).map_err(|error| {
        let said = error.diagnostics.first().map_or_else(String::new, |d| d.message.clone());
        Failure::new(Exit::Io, format!("{}: {said}", path.display()))
    })
}

/// Reads `KIND_0.pb`, `KIND_1.pb` ... as far as they go.
fn numbered(folder: &Path, kind: &str) -> Result<Vec<(String, Tensor)>, Failure> {
    let files = (0..).map(|index| folder.join(format!("{kind}_{index}.pb")));
    let tensors: Vec<_> = files
        .take_while(|path| path.exists())
        .map(|path| read_pb(&path))
        .collect::<Result<_, _>>()?;
    if kind == "input" && tensors.is_empty() {
        let text = format!("{}: the folder has no input_0.pb", folder.display());
        return Err(Failure::new(Exit::Io, text));
    }
    Ok(tensors)
}

/// Tensors beside the names of their inputs.
#[derive(Clone)]
struct Slots {
    names: Vec<String>,
    tensors: Vec<Option<Tensor>>,
}

impl Slots {
    fn take(&mut self, name: &str) -> Option<Tensor> {
        let index = self.names.iter().position(|known| known == name)?;
        self.tensors[index].take()
    }

    fn put(&mut self, name: &str, tensor: Tensor) -> Result<(), Failure> {
        let index = self.names.iter().position(|known| known == name);
        let index = index.ok_or_else(|| self.unknown(&format!("no input `{name}`")))?;
        self.put_at(index, tensor)
    }

    fn put_at(&mut self, index: usize, tensor: Tensor) -> Result<(), Failure> {
        if self.tensors[index].is_some() {
            let text = format!("two tensors given for input `{}`", self.names[index]);
            return Err(Failure::usage(text));
        }
        self.tensors[index] = Some(tensor);
        Ok(())
    }

    /// By name where the model has an input of that name, else into the first free one.
    fn put_or_next(&mut self, name: &str, tensor: Tensor, path: &Path) -> Result<(), Failure> {
        let named = self.names.iter().position(|known| !name.is_empty() && known == name);
        let free = || self.tensors.iter().position(Option::is_none);
        let index = named.or_else(free).ok_or_else(|| {
            let text = format!("{}: the model has no more inputs", path.display());
            self.unknown(&text)
        })?;
        self.put_at(index, tensor)
    }

    fn archive(&mut self, path: &Path) -> Result<(), Failure> {
        let arrays = kiln::npz::read_npz(&files::read(path)?);
        let arrays = arrays.map_err(|error| Failure::io(path.display(), error))?;
        let known = |name: &str| self.names.iter().any(|known| known == name);
        // Files often hold labels and the like beside the inputs.
        let (inputs, others): (Vec<_>, Vec<_>) =
            arrays.into_iter().partition(|(name, _)| known(name));
        if inputs.is_empty() {
            let keys: Vec<String> = others.iter().map(|(name, _)| format!("`{name}`")).collect();
            let text = format!("{}: no key is an input ({})", path.display(), keys.join(", "));
            return Err(self.unknown(&text));
        }
        inputs.into_iter().try_for_each(|(name, tensor)| self.put(&name, tensor))
    }

    fn unknown(&self, text: &str) -> Failure {
        let names: Vec<String> = self.names.iter().map(|name| format!("`{name}`")).collect();
        Failure::usage(text).help(format!("the inputs are {}", names.join(", ")))
    }
}

/// Made-up elements that depend on the seed and the input's index only: floats are about normal,
/// integers lie in 0..10, so that they are indices into most tables.
pub fn random(port: &Port, seed: u64, index: usize) -> Tensor {
    let mut tensor = Tensor::zeros(port.dtype, &port.shape);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((index as u64) << 32);
    let mut float = move || {
        // A sum of twelve uniform numbers: mean 6, variance 1.
        (0..12).map(|_| (next(&mut state) >> 11) as f64 / (1u64 << 53) as f64).sum::<f64>() - 6.0
    };
    let mut small = {
        let mut state = seed ^ index as u64;
        move |limit: u64| next(&mut state) % limit
    };
    // Codes of numbers as large as others are.
    let codes: Vec<u8> = match port.dtype {
        DType::Small(small) => (0..64).map(|_| code(small, float())).collect(),
        _ => Vec::new(),
    };
    let width = port.dtype.bytes();
    for element in tensor.bytes_mut().chunks_exact_mut(width) {
        match port.dtype {
            DType::F32 | DType::TF32 => element.copy_from_slice(&(float() as f32).to_ne_bytes()),
            DType::F64 => element.copy_from_slice(&float().to_ne_bytes()),
            DType::F16 | DType::BF16 => {
                element.copy_from_slice(&half_bits(port.dtype, float() as f32).to_ne_bytes());
            }
            DType::Bool => element[0] = small(2) as u8,
            DType::I8 | DType::I16 | DType::I32 | DType::I64 => set_integer(element, small(10)),
            DType::U8 | DType::U16 | DType::U32 | DType::U64 => set_integer(element, small(10)),
            DType::Small(_) => element[0] = codes[small(codes.len() as u64) as usize],
        }
    }
    tensor
}

fn set_integer(element: &mut [u8], value: u64) {
    let bytes = value.to_ne_bytes();
    let from = if cfg!(target_endian = "little") { 0 } else { 8 - element.len() };
    element.copy_from_slice(&bytes[from..from + element.len()]);
}

fn half_bits(dtype: DType, value: f32) -> u16 {
    if dtype == DType::F16 {
        kiln::half::f16::from_f32(value).to_bits()
    } else {
        kiln::half::bf16::from_f32(value).to_bits()
    }
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> Vec<Port> {
        vec![Port::new("x", DType::F32, &[2, 3]), Port::new("ids", DType::I64, &[4])]
    }

    fn load(ports: &[Port], args: &InputArgs, fallback: bool) -> Result<Inputs, Failure> {
        let names = ports.iter().map(|port| port.name.clone()).collect();
        gather(names, args, fallback)?.complete(ports)
    }

    fn args(inputs: &[&str]) -> InputArgs {
        InputArgs { input: inputs.iter().map(ToString::to_string).collect() }
    }

    #[test]
    fn sources_are_told_apart() {
        assert_eq!(source("random").expect("a source"), Source::Random(0));
        assert_eq!(source("random:7").expect("a source"), Source::Random(7));
        assert_eq!(source("x=a.npy").expect("one"), Source::Named("x".into(), "a.npy".into()));
        assert_eq!(source("a.npz").expect("a source"), Source::Archive("a.npz".into()));
        assert_eq!(source("a.npy").expect("a source"), Source::Single("a.npy".into()));
        assert_eq!(source(".").expect("a source"), Source::Folder(".".into()));
        assert!(source("random:x").is_err());
    }

    #[test]
    fn random_tensors_depend_on_the_seed_only() {
        for dtype in kiln::tensor::DTYPES {
            let port = Port::new("x", dtype, &[1000]);
            assert!(random(&port, 1, 0) == random(&port, 1, 0));
            assert!(random(&port, 1, 0) != random(&port, 2, 0), "{dtype}");
        }
        let values = random(&ports()[0], 3, 0);
        assert!(values.as_slice::<f32>().expect("f32").iter().all(|v| v.abs() < 6.0));
        let ids = random(&ports()[1], 3, 1);
        assert!(ids.as_slice::<i64>().expect("i64").iter().all(|v| (0..10).contains(v)));
    }

    #[test]
    fn files_find_their_inputs() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let x = Tensor::from_slice(&[2, 3], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let ids = Tensor::from_slice(&[4], &[1i64, 2, 3, 4]);
        let mut bytes = Vec::new();
        kiln::npz::write_npy(&mut bytes, x.view()).expect("a file");
        std::fs::write(path("x.npy"), &bytes).expect("a file");
        let mut bytes = Vec::new();
        let arrays = [("ids", ids.view()), ("labels", x.view())];
        kiln::npz::write_npz(&mut bytes, &arrays).expect("a file");
        std::fs::write(path("all.npz"), &bytes).expect("a file");
        let text = |name: &str| path(name).display().to_string();
        let given = args(&[&text("all.npz"), &text("x.npy")]);
        let inputs = load(&ports(), &given, false).expect("inputs");
        assert!(inputs.tensors[0].1 == x && inputs.tensors[1].1 == ids);
        let by_name = format!("ids={}", text("x.npy"));
        for (given, message) in [
            (args(&[&text("x.npy")]), "no tensor given for input ids: i64[4]"),
            (args(&[&text("x.npy"), &by_name]), "does not fit input ids: i64[4]; given: f32[2,3]"),
            (args(&["y=x.npy"]), "No such file"),
            (args(&[&text("x.npy"), &text("x.npy")]), "does not fit input ids"),
            (args(&[&text("all.npz"), &by_name]), "two tensors given for input `ids`"),
            (args(&["random", "x.txt"]), "neither .npy, .npz nor .pb"),
        ] {
            let failure = load(&ports(), &given, false).err().expect("a failure").to_string();
            assert!(failure.contains(message), "{failure}");
        }
        assert!(load(&ports(), &args(&[]), true).is_ok());
    }
}
