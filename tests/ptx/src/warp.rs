//! What all threads of a warp do together with matrices. Fragments lie as the manual of PTX says:
//! of a matrix of 8 rows of 16 bytes, lane `l` holds 4 bytes of row `l / 4`, from byte
//! `4 * (l % 4)` on.

use half::{bf16, f16};

use super::Fault;
use super::parse::{Operand, Ty};
use super::run::Block;

const WARP: usize = 32;
/// Bytes of a row of a matrix.
const ROW: usize = 16;

impl Block<'_> {
    /// Loads matrices: lane `8 * m + r` has the address of row `r` of matrix `m`. Where they are
    /// turned, rows and columns of elements of two bytes change places.
    pub(crate) fn matrices(
        &mut self,
        first: usize,
        to: &[usize],
        place: (Operand, i64),
        turned: bool,
    ) -> Result<(), Fault> {
        for (m, reg) in to.iter().enumerate() {
            let mut rows = [[0u8; ROW]; 8];
            for (r, row) in rows.iter_mut().enumerate() {
                let t = first + 8 * m + r;
                let who = self.who(t);
                let at = self.address(t, place).map_err(|why| self.fault(t, why))?;
                match self.shared.load(at, ROW, who) {
                    Ok(bytes) => row.copy_from_slice(bytes),
                    Err(why) => return Err(self.fault(t, why)),
                }
            }
            for lane in 0..WARP {
                let (row, pair) = (lane / 4, lane % 4);
                let bytes: [u8; 4] = std::array::from_fn(|b| match turned {
                    false => rows[row][4 * pair + b],
                    true => rows[2 * pair + b / 2][2 * row + b % 2],
                });
                self.write(first + lane, *reg, u32::from_le_bytes(bytes).into());
            }
        }
        Ok(())
    }

    /// A product of 16 rows and 8 columns, added to sums. Products of short floats are exact; their
    /// sum is rounded once here, in some other order on a GPU.
    pub(crate) fn multiply(
        &mut self,
        first: usize,
        types: [Ty; 2],
        [to, x, y, sums]: &[Vec<usize>; 4],
    ) -> Result<(), Fault> {
        let rows = self.lines(first, x, types[0])?;
        let columns = self.lines(first, y, types[1])?;
        for lane in 0..WARP {
            let t = first + lane;
            for e in 0..4 {
                let sum = self.read(t, Operand::Reg(sums[e])).map_err(|why| self.fault(t, why))?;
                let row = &rows[lane / 4 + 8 * (e / 2)];
                let column = &columns[2 * (lane % 4) + e % 2];
                let all: f64 = row.iter().zip(column).map(|(x, y)| x * y).sum();
                let value = match types[0].bits() {
                    8 => (sum as u32).wrapping_add(all as i64 as u32).into(),
                    _ => ((f64::from(f32::from_bits(sum as u32)) + all) as f32).to_bits().into(),
                };
                self.write(t, to[e], value);
            }
        }
        Ok(())
    }

    /// The numbers of rows or columns that registers hold: every two registers have 16 bytes, and
    /// then 16 more, of eight lines, or of sixteen.
    fn lines(&self, first: usize, regs: &[usize], ty: Ty) -> Result<Vec<Vec<f64>>, Fault> {
        let groups = regs.len() / 2;
        let mut lines = vec![[0u8; 2 * ROW]; 8 * groups];
        for lane in 0..WARP {
            let t = first + lane;
            for (n, reg) in regs.iter().enumerate() {
                let bits = self.read(t, Operand::Reg(*reg)).map_err(|why| self.fault(t, why))?;
                let line = &mut lines[lane / 4 + 8 * (n % groups)];
                let at = ROW * (n / groups) + 4 * (lane % 4);
                line[at..at + 4].copy_from_slice(&(bits as u32).to_le_bytes());
            }
        }
        let number = |bytes: &[u8]| match (ty, bytes) {
            (Ty::S(_), _) => Ok((bytes[0] as i8).into()),
            (Ty::U(_), _) => Ok(bytes[0].into()),
            (Ty::BF16, _) => Ok(bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64()),
            (Ty::TF32, &[low, next, ..]) if low != 0 || next & 0x1f != 0 => {
                Err(self.fault(first, "a number of more bits than tf32 has"))
            }
            (Ty::TF32, &[a, b, c, d]) => Ok(f32::from_le_bytes([a, b, c, d]).into()),
            _ => Ok(f16::from_le_bytes([bytes[0], bytes[1]]).to_f64()),
        };
        let size = (ty.bits() / 8) as usize;
        lines.iter().map(|line| line.chunks(size).map(number).collect()).collect()
    }
}
