//! Places in the arena: values whose lifetimes do not overlap share bytes.

/// A value in the arena: its size, and the first and last step that touches it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lifetime {
    /// Size in bytes.
    pub bytes: usize,
    /// The step that writes it first.
    pub first: usize,
    /// The last step that reads it.
    pub last: usize,
}

/// Alignment of every value: a cache line.
pub const ALIGN: usize = 64;

/// An offset for each value, and the size of the arena: largest values first, each at the lowest
/// offset where no value of an overlapping lifetime lies (Pisarchyk and Lee 2020, greedy by size).
pub fn assign(values: &[Lifetime]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(values[i].bytes), values[i].first, i));
    let mut offsets = vec![0; values.len()];
    let mut placed: Vec<usize> = Vec::new();
    let mut total = 0;
    for &i in &order {
        let value = values[i];
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| values[j].first <= value.last && value.first <= values[j].last)
            .map(|&j| (offsets[j], offsets[j] + values[j].bytes))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if offset + value.bytes <= start {
                break;
            }
            offset = offset.max(end.next_multiple_of(ALIGN));
        }
        offsets[i] = offset;
        total = total.max(offset + value.bytes);
        placed.push(i);
    }
    (offsets, total.next_multiple_of(ALIGN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_live_together_do_not_overlap() {
        let values: Vec<Lifetime> = (0..200usize)
            .map(|i| Lifetime {
                bytes: (i * 7919) % 5000 + 1,
                first: (i * 31) % 97,
                last: (i * 31) % 97 + (i * 13) % 11,
            })
            .collect();
        let (offsets, total) = assign(&values);
        for i in 0..values.len() {
            assert!(offsets[i].is_multiple_of(ALIGN) && offsets[i] + values[i].bytes <= total);
            for j in 0..i {
                let together =
                    values[i].first <= values[j].last && values[j].first <= values[i].last;
                let apart = offsets[i] + values[i].bytes <= offsets[j]
                    || offsets[j] + values[j].bytes <= offsets[i];
                assert!(!together || apart, "{i} and {j}");
            }
        }
        let sum: usize = values.iter().map(|v| v.bytes).sum();
        assert!(total < sum / 3, "memory is reused: {total} of {sum}");
    }
}
