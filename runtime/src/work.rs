//! What kernels do, and how long a run took over it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::plan::Dims;

/// A number times the lengths of some axes that are as long as a dim and some more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Term {
    /// The number.
    pub times: i64,
    /// For each axis, the index of its dim in [`Plan::dims`](crate::plan::Plan::dims), and how much
    /// longer it is.
    pub lengths: Vec<(usize, i64)>,
}

/// What a kernel of the graph does, as the model says it; some are done in several steps.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Work {
    /// Names of the model.
    pub name: String,
    /// Operations on numbers: a sum of products is two for each product, whatever it is computed
    /// by, and a function is one.
    pub flops: Vec<Term>,
    /// Bytes of what it reads and of its result, each counted once.
    pub bytes: Vec<Term>,
}

/// The sum of terms, where the dims have these lengths; of a dim that is not there, none.
pub fn sum(terms: &[Term], dims: &Dims) -> f64 {
    let length = |&(dim, more): &(usize, i64)| {
        dims.get(dim).map_or(0.0, |&length| length as f64 + more as f64)
    };
    let term = |term: &Term| term.lengths.iter().map(length).product::<f64>() * term.times as f64;
    // The sum of nothing is -0 otherwise.
    terms.iter().map(term).fold(0.0, |sum, term| sum + term)
}

/// How long each step of a run took.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Profile {
    /// Lengths of the dims in this run.
    pub dims: Dims,
    /// Nanoseconds from the begin of the first step to the end of each.
    pub ends: Vec<u64>,
}

impl Profile {
    /// When a step began and ended; it begins when the one before ends.
    pub fn step(&self, index: usize) -> Range<u64> {
        let begin = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        begin..self.ends[index]
    }

    /// Nanoseconds of all steps.
    pub fn total(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::DIMS;

    #[test]
    fn terms_follow_the_lengths_of_dims() {
        let mut dims = [0; DIMS];
        (dims[0], dims[1]) = (3, 10);
        let terms = [
            Term { times: 8, lengths: vec![(0, 0), (1, 1)] },
            Term { times: -8, lengths: vec![(0, 0), (1, 0)] },
            Term { times: 5, lengths: Vec::new() },
        ];
        assert_eq!(sum(&terms, &dims), 8.0 * 3.0 * 11.0 - 8.0 * 3.0 * 10.0 + 5.0);
        assert_eq!(sum(&[Term { times: 1, lengths: vec![(DIMS, 0)] }], &dims), 0.0);
        assert!(sum(&[], &dims).is_sign_positive());
    }

    #[test]
    fn steps_follow_one_another() {
        let profile = Profile { dims: [0; DIMS], ends: vec![5, 5, 9] };
        assert_eq!([0, 1, 2].map(|i| profile.step(i)), [0..5, 5..5, 5..9]);
        assert_eq!(profile.total(), 9);
    }
}
