//! Loads of neighbours become one load, and stores one store: of two or four elements, of 16 bytes
//! at most.

use std::collections::BTreeMap;

use super::isa::{Inst, Reg, Space, Ty};

/// Loads that may be joined: of a kind of memory, a type and a base, by how far from the base.
type Group = BTreeMap<i64, usize>;
type Groups = BTreeMap<(Space, Ty, Reg), Group>;

/// The instructions with neighbours joined where nothing in between is written or waited for.
pub fn join(code: Vec<Inst>) -> Vec<Inst> {
    let mut code: Vec<Option<Inst>> = code.into_iter().map(Some).collect();
    let mut groups = Groups::new();
    for at in 0..=code.len() {
        match code.get(at).map(|inst| inst.as_ref()) {
            Some(Some(Inst::Load(space, ty, to, place))) => {
                if let [_] = to[..] {
                    let group = groups.entry((*space, *ty, place.base)).or_default();
                    group.entry(place.offset).or_insert(at);
                }
            }
            Some(Some(Inst::Store(written, ..))) => {
                let written = *written;
                let (met, kept) = groups.into_iter().partition(|(key, _)| key.0 == written);
                groups = kept;
                together(&mut code, met);
            }
            Some(Some(
                Inst::Label(_) | Inst::Branch(..) | Inst::Barrier | Inst::Return | Inst::Copy(..),
            ))
            | None => together(&mut code, std::mem::take(&mut groups)),
            Some(_) => {}
        }
    }
    stores(code.into_iter().flatten())
}

/// The instructions with stores of neighbours joined that have nothing but arithmetic between them:
/// each is put off until the next one.
fn stores(code: impl Iterator<Item = Inst>) -> Vec<Inst> {
    let mut out = Vec::new();
    for inst in code {
        out.push(inst);
        while let Some((at, joined)) = with_neighbour(&out) {
            out.pop();
            out.remove(at);
            out.push(joined);
        }
    }
    out
}

/// Where the last instruction is a store: the one of the elements before it, and both as one.
fn with_neighbour(code: &[Inst]) -> Option<(usize, Inst)> {
    let (last, before) = code.split_last()?;
    let Inst::Store(space, ty, place, values) = last else { return None };
    let mut changed: Vec<Reg> = Vec::new();
    for (at, inst) in before.iter().enumerate().rev() {
        match inst {
            Inst::Op(_, _, to, _) | Inst::Convert(_, _, to, _) => changed.push(*to),
            Inst::Store(other, of, start, first) => {
                let bytes = first.len() as i64 * ty.bytes();
                let beside = start.base == place.base && start.offset + bytes == place.offset;
                let same = (other, of, first.len()) == (space, ty, values.len()) && beside;
                let aligned = start.align.min(16) >= 2 * bytes && start.offset % (2 * bytes) == 0;
                let stays = !first.iter().chain([&start.base]).any(|reg| changed.contains(reg));
                let all: Vec<Reg> = first.iter().chain(values).copied().collect();
                let fits = same && aligned && stays && all.len() <= 4;
                return fits.then_some((at, Inst::Store(*space, *ty, *start, all)));
            }
            _ => return None,
        }
    }
    None
}

/// Joins what can be joined of some groups: it is read where the first of it was.
fn together(code: &mut [Option<Inst>], groups: Groups) {
    for ((space, ty, _), group) in groups {
        let size = ty.bytes();
        let mut left = group;
        for count in [4, 2] {
            let starts: Vec<i64> = left.keys().copied().collect();
            for start in starts {
                let all: Vec<usize> =
                    (0..count).map_while(|k| left.get(&(start + k * size)).copied()).collect();
                let whole = count * size;
                let fits = all.len() as i64 == count && whole <= 16 && start % whole == 0;
                let Some(&first) = all.iter().min().filter(|_| fits) else { continue };
                let loads = all.iter().map(|&at| match &code[at] {
                    Some(Inst::Load(_, _, to, place)) => (to[0], *place),
                    _ => unreachable!("groups are made of loads"),
                });
                let loads: Vec<_> = loads.collect();
                if loads[0].1.align < whole {
                    continue;
                }
                (0..count).for_each(|k| _ = left.remove(&(start + k * size)));
                all.iter().for_each(|&at| code[at] = None);
                let regs = loads.iter().map(|l| l.0).collect();
                code[first] = Some(Inst::Load(space, ty, regs, loads[0].1));
            }
        }
    }
}
