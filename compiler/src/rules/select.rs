//! Phase C: one kernel for each value that is needed, so that the sum is small. The exact problem
//! is NP-hard (set cover); area flow gives first answers and exact local area improves them, as
//! in technology mapping, and the cheapest of several starts is taken.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use smallvec::SmallVec;

use super::bodies::Places;
use super::choices::{ChoiceGraph, Kernel};

/// Passes of local improvement.
const PASSES: usize = 8;

/// A kernel as a choice: what it costs by itself, the values it needs, each once, and how much of
/// them it reads where it only takes parts.
struct Choice {
    us: f64,
    needs: Places,
    parts: SmallVec<[f64; 6]>,
}

/// Number of the kernel chosen for each value.
pub type Selection = Vec<Option<u32>>;

/// The problem: choices for each value.
pub struct Problem {
    choices: Vec<Vec<Choice>>,
    free: Vec<bool>,
    users: Vec<f64>,
    outputs: Vec<u32>,
}

impl Problem {
    /// The kernels of each value as choices.
    pub fn new(graph: &mut ChoiceGraph, kernels: &[Vec<Kernel>]) -> Problem {
        let free: Vec<bool> = graph.values.iter().map(|v| v.free).collect();
        let choices = kernels.iter().map(|kernels| {
            let choice = |kernel: &Kernel| {
                let us = graph.us(kernel);
                let read = kernel.args.iter().copied().zip(graph.bodies.parts(kernel.body));
                let read = read.filter(|r| !free[r.0 as usize]);
                let (needs, parts) = read.map(|(need, &part)| (need, part)).unzip();
                Choice { us, needs, parts }
            };
            kernels.iter().map(choice).collect()
        });
        let choices = choices.collect();
        let users = graph.values.iter().map(|v| v.users).collect();
        let outputs = graph.outputs.iter().copied().filter(|&o| !free[o as usize]).collect();
        Problem { choices, free, users, outputs }
    }

    /// The cheapest choices found from these starts and from area flow: values that are needed,
    /// operands first, with the number of their kernel.
    pub fn solve(&self, starts: &[Selection]) -> Vec<(u32, u32)> {
        let flow = self.settle(&|value| self.users[value], &|_| false);
        // Between what is used as often as in the model and a tree, in which nothing is shared.
        let half = self.settle(&|value| self.users[value].sqrt(), &|_| false);
        let tree = self.settle(&|_| 1.0, &|_| false);
        let complete = |start: &Selection| -> Selection {
            start.iter().zip(&flow).map(|(s, f)| s.or(*f)).collect()
        };
        let starts = starts.iter().map(complete).chain([flow.clone(), half, tree]);
        let improved = starts.map(|s| self.improve(s)).map(|s| (self.us(&s), s));
        // The first of equals.
        let best =
            improved.reduce(|a, b| if b.0 < a.0 { b } else { a }).map_or(flow, |best| best.1);
        let order = self.order(&best).unwrap_or_default();
        order.into_iter().filter_map(|v| Some((v, best[v as usize]?))).collect()
    }

    /// What a selection costs; infinite where it goes in a circle.
    fn us(&self, selection: &Selection) -> f64 {
        self.order(selection).map_or(f64::INFINITY, |order| {
            order.iter().filter_map(|&v| Some(self.chosen(selection, v)?.us)).sum()
        })
    }

    fn chosen(&self, selection: &Selection, value: u32) -> Option<&Choice> {
        self.choices[value as usize].get(selection[value as usize]? as usize)
    }

    /// The values that are needed, operands first; nothing where they go in a circle.
    fn order(&self, selection: &Selection) -> Option<Vec<u32>> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; self.choices.len()];
        let mut order = Vec::new();
        let mut open: Vec<(u32, usize)> = self.outputs.iter().rev().map(|&o| (o, 0)).collect();
        while let Some((value, next)) = open.pop() {
            let mark = &mut marks[value as usize];
            if next == 0 && *mark != Mark::New {
                continue;
            }
            *mark = Mark::Open;
            let needs = &self.chosen(selection, value)?.needs;
            let Some(&need) = needs.get(next) else {
                marks[value as usize] = Mark::Done;
                order.push(value);
                continue;
            };
            open.push((value, next + 1));
            match marks[need as usize] {
                Mark::New => open.push((need, 0)),
                Mark::Open => return None,
                Mark::Done => {}
            }
        }
        Some(order)
    }

    /// A choice for each value by Knuth's generalisation of Dijkstra's algorithm; what a value
    /// costs is shared, and `given` ones cost nothing.
    fn settle(&self, share: &dyn Fn(usize) -> f64, given: &dyn Fn(usize) -> bool) -> Selection {
        let count = self.choices.len();
        let mut users: Vec<Vec<(u32, u32, f64)>> = vec![Vec::new(); count];
        let mut waiting: Vec<Vec<(usize, f64)>> = Vec::with_capacity(count);
        // Costs are positive, so their bits are in the order of their values.
        let mut queue: BinaryHeap<Reverse<(u64, u32, Option<u32>)>> = BinaryHeap::new();
        for (value, choices) in self.choices.iter().enumerate() {
            waiting.push(choices.iter().map(|c| (c.needs.len(), c.us)).collect());
            if given(value) {
                queue.push(Reverse((0, value as u32, None)));
            }
            for (k, choice) in choices.iter().enumerate() {
                let place = (value as u32, k as u32);
                for (&need, &part) in choice.needs.iter().zip(&choice.parts) {
                    users[need as usize].push((place.0, place.1, part));
                }
                if choice.needs.is_empty() {
                    queue.push(Reverse((choice.us.to_bits(), place.0, Some(place.1))));
                }
            }
        }
        let mut settled = vec![false; count];
        let mut selection: Selection = vec![None; count];
        while let Some(Reverse((bits, value, choice))) = queue.pop() {
            let at = value as usize;
            if std::mem::replace(&mut settled[at], true) {
                continue;
            }
            selection[at] = choice;
            let whole = f64::from_bits(bits);
            for &(user, k, part) in &users[at] {
                let us = if part < 1.0 { whole * part } else { whole / share(at).max(1.0) };
                let (left, total) = &mut waiting[user as usize][k as usize];
                *left -= 1;
                *total += us;
                if *left == 0 {
                    queue.push(Reverse((total.to_bits(), user, Some(k))));
                }
            }
        }
        selection
    }

    /// Improves a selection value by value: what a choice costs exactly is what it brings with it
    /// that nothing else needs.
    fn improve(&self, mut selection: Selection) -> Selection {
        let mut total = self.us(&selection);
        for _ in 0..PASSES {
            let Some(order) = self.order(&selection) else { return selection };
            let mut uses = vec![0u32; self.choices.len()];
            self.outputs.iter().for_each(|&o| uses[o as usize] += 1);
            for &value in &order {
                for &need in self.chosen(&selection, value).map_or(&[][..], |c| &c.needs) {
                    uses[need as usize] += 1;
                }
            }
            // The best ways to values that are not there, where those that are cost nothing.
            let rest = self.settle(&|_| 1.0, &|value| uses[value] > 0);
            for (value, choice) in rest.into_iter().enumerate() {
                if uses[value] == 0 && choice.is_some() {
                    selection[value] = choice;
                }
            }
            let before = selection.clone();
            let mut marks = Marks { marks: vec![0; self.choices.len()], turn: 0 };
            for &value in order.iter().rev() {
                if uses[value as usize] > 0 && self.choices[value as usize].len() > 1 {
                    self.improve_value(&mut selection, &mut uses, value, &mut marks);
                }
            }
            let now = self.us(&selection);
            if now >= total - 1e-9 {
                return before;
            }
            total = now;
        }
        selection
    }

    fn improve_value(
        &self,
        selection: &mut Selection,
        uses: &mut [u32],
        value: u32,
        marks: &mut Marks,
    ) {
        let at = value as usize;
        let old = selection[at];
        let mut best = (self.release(selection, uses, value), old);
        for k in 0..self.choices[at].len() as u32 {
            let choice = &self.choices[at][k as usize];
            let fits = Some(k) != old && choice.us < best.0;
            if !fits || self.leads_to(selection, &choice.needs, value, marks) {
                continue;
            }
            selection[at] = Some(k);
            let us = self.acquire(selection, uses, value);
            self.release(selection, uses, value);
            if us < best.0 - 1e-9 {
                best = (us, Some(k));
            }
        }
        selection[at] = best.1;
        self.acquire(selection, uses, value);
    }

    /// Takes away a value's kernel and all that only it needs; gives what they cost.
    fn release(&self, selection: &Selection, uses: &mut [u32], value: u32) -> f64 {
        self.walk(selection, value, |need| {
            uses[need] -= 1;
            uses[need] == 0
        })
    }

    /// Adds a value's kernel and all that it needs and is not there; gives what they cost.
    fn acquire(&self, selection: &Selection, uses: &mut [u32], value: u32) -> f64 {
        self.walk(selection, value, |need| {
            uses[need] += 1;
            uses[need] == 1
        })
    }

    fn walk(
        &self,
        selection: &Selection,
        value: u32,
        mut enters: impl FnMut(usize) -> bool,
    ) -> f64 {
        let mut us = 0.0;
        let mut open = vec![value];
        while let Some(value) = open.pop() {
            let Some(choice) = self.chosen(selection, value) else { return f64::INFINITY };
            us += choice.us;
            open.extend(choice.needs.iter().copied().filter(|&n| enters(n as usize)));
        }
        us
    }

    /// Whether a value is needed for these ones, or there is no way to them.
    fn leads_to(&self, selection: &Selection, from: &[u32], to: u32, marks: &mut Marks) -> bool {
        marks.turn += 1;
        let mut open: Vec<u32> = from.to_vec();
        while let Some(value) = open.pop() {
            if value == to {
                return true;
            }
            let mark = &mut marks.marks[value as usize];
            if std::mem::replace(mark, marks.turn) == marks.turn || self.free[value as usize] {
                continue;
            }
            match self.chosen(selection, value) {
                Some(choice) => open.extend(&choice.needs),
                None => return true,
            }
        }
        false
    }
}

/// Values that a walk has seen, without clearing them between walks.
struct Marks {
    marks: Vec<u32>,
    turn: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random choices over earlier values, and at times over later ones, which may go in circles.
    fn random(seed: u64) -> Problem {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let count = 8u64;
        let choices = (0..count).map(|value| {
            let mut choices = Vec::new();
            for _ in 0..1 + below(3) {
                let mut needs = Places::new();
                for _ in 0..below(3) {
                    let need = if below(8) == 0 { below(count) } else { below(value + 1) } as u32;
                    if u64::from(need) != value && !needs.contains(&need) {
                        needs.push(need);
                    }
                }
                let parts = SmallVec::from_elem(1.0, needs.len());
                choices.push(Choice { us: 1.0 + below(9) as f64, needs, parts });
            }
            let (needs, parts) = (Places::new(), SmallVec::new());
            choices.push(Choice { us: 12.0, needs, parts });
            choices
        });
        let choices: Vec<Vec<Choice>> = choices.collect();
        let (free, users) = (vec![false; choices.len()], vec![1.0; choices.len()]);
        Problem { choices, free, users, outputs: vec![count as u32 - 1, count as u32 - 2] }
    }

    fn least(problem: &Problem) -> f64 {
        let mut selection: Selection = vec![Some(0); problem.choices.len()];
        let mut least = f64::INFINITY;
        loop {
            least = least.min(problem.us(&selection));
            let mut at = 0;
            loop {
                let Some(choices) = problem.choices.get(at) else { return least };
                let next = selection[at].map_or(0, |k| k + 1);
                if (next as usize) < choices.len() {
                    selection[at] = Some(next);
                    break;
                }
                selection[at] = Some(0);
                at += 1;
            }
        }
    }

    #[test]
    fn selections_are_close_to_the_best() {
        let mut best = 0;
        for seed in 0..300 {
            let problem = random(seed);
            let solved = problem.solve(&[]);
            let mut selection: Selection = vec![None; problem.choices.len()];
            solved.iter().for_each(|&(v, k)| selection[v as usize] = Some(k));
            let (found, least) = (problem.us(&selection), least(&problem));
            assert!(found >= least - 1e-9 && found <= 1.5 * least, "{seed}: {found}, {least}");
            best += usize::from(found < least + 1e-9);
        }
        assert!(best >= 240, "{best} of 300 are the best");
    }
}
