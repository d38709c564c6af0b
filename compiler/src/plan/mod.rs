//! From a graph of kernels to code, an order of launches and places in memory.

pub mod border;
pub mod eval;
pub mod kernels;
pub mod memory;
pub mod order;
pub mod work;

pub use kiln_runtime::plan::{Place, Plan, PlanState, Port, Step};
