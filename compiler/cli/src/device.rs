//! Flags that say what runs a model.

use clap::{Args, ValueEnum};
use kiln_cuda::MemoryPolicy;

use crate::args::parse_size;

/// What runs a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Processors.
    Cpu,
    /// The GPU of that number.
    Cuda(usize),
}

/// What runs a model where its device does not.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fallback {
    /// Processors.
    Cpu,
}

/// Where a model runs.
#[derive(Args, Clone, Debug, Default)]
pub struct DeviceArgs {
    /// What runs the model: cpu, cuda, or cuda:N for one of several GPUs (default: cpu, and cuda
    /// for models that were compiled for it)
    #[arg(long, value_name = "DEVICE", value_parser = parse_place, help_heading = "Device")]
    pub device: Option<Place>,
    /// What runs it where the GPU, its driver or its memory is missing, or a node has no kernel for
    /// GPUs; it is said when that happens
    #[arg(long, value_name = "DEVICE", value_enum, help_heading = "Device")]
    pub fallback: Option<Fallback>,
    /// When memory of the GPU is asked for: preallocate (all that one run takes, at once), grow
    /// (when more runs at once need it), or limit=SIZE (the same, up to that)
    #[arg(long, value_name = "POLICY", value_parser = parse_policy, help_heading = "Device")]
    pub device_memory: Option<MemoryPolicy>,
}

/// A device by its name.
pub fn parse_place(text: &str) -> Result<Place, String> {
    let wrong = || format!("`{text}` is no device; write cpu, cuda or cuda:1");
    match text.split_once(':') {
        None if text == "cpu" => Ok(Place::Cpu),
        None if text == "cuda" => Ok(Place::Cuda(0)),
        Some(("cuda", number)) => number.parse().map(Place::Cuda).map_err(|_| wrong()),
        Some(_) | None => Err(wrong()),
    }
}

fn parse_policy(text: &str) -> Result<MemoryPolicy, String> {
    match text.split_once('=') {
        None if text == "preallocate" => Ok(MemoryPolicy::Preallocate),
        None if text == "grow" => Ok(MemoryPolicy::Grow),
        Some(("limit", size)) => parse_size(size).map(MemoryPolicy::Limit),
        Some(_) | None => {
            Err(format!("`{text}` is no policy; write preallocate, grow or limit=2G"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_policies() {
        assert_eq!(parse_place("cpu"), Ok(Place::Cpu));
        assert_eq!(parse_place("cuda"), Ok(Place::Cuda(0)));
        assert_eq!(parse_place("cuda:3"), Ok(Place::Cuda(3)));
        for wrong in ["gpu", "cuda:", "cuda:x", "cpu:0", ""] {
            assert!(parse_place(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_policy("preallocate"), Ok(MemoryPolicy::Preallocate));
        assert_eq!(parse_policy("grow"), Ok(MemoryPolicy::Grow));
        assert_eq!(parse_policy("limit=2G"), Ok(MemoryPolicy::Limit(2 << 30)));
        for wrong in ["limit", "limit=", "limit=x", "grow=1"] {
            assert!(parse_policy(wrong).is_err(), "{wrong}");
        }
    }
}
