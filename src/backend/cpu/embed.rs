//! [`Embed`]: rows of the embedding table, and the tokens into their histories.

use super::pool::Disjoint;
use super::{Cpu, SMALL};
use crate::backend::ops::{Embed, check_len};
use crate::backend::{FROM_LANE, NONE};
use crate::error::RunError;

impl Cpu {
    pub(super) fn embed(&mut self, op: Embed<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "embed";
        let Embed { rows, batch, lanes, table, scale, output, width } = op;
        check_len(OP, "tokens", rows, batch.tokens.len())?;
        check_len(OP, "positions", rows, batch.positions.len())?;
        check_len(OP, "sequences", rows, batch.sequences.len())?;
        check_len(OP, "output", rows * width, output.len())?;
        table.check(OP, None, width)?;
        let table = &table.0;

        self.tokens.clear();
        for row in 0..rows {
            let token = match batch.tokens[row] {
                NONE => NONE,
                entry if entry & FROM_LANE != 0 => {
                    lanes.sampled.get((entry ^ FROM_LANE) as usize).copied().unwrap_or(NONE)
                }
                token => token,
            };
            let token = if (token as usize) < table.rows { token } else { NONE };
            self.tokens.push(token);
            if token == NONE {
                continue;
            }
            let position = batch.positions[row] as usize;
            let lane = batch.lanes.get(batch.sequences[row] as usize).copied().unwrap_or(NONE);
            if lane != NONE && position < lanes.context {
                let entry = lanes.history.get_mut(lane as usize * lanes.context + position);
                if let Some(entry) = entry {
                    *entry = token;
                }
            }
        }

        let tokens = &self.tokens;
        let output = Disjoint::new(output);
        self.pool.split(rows, 1, (rows * width, SMALL), |rows| {
            for row in rows {
                // SAFETY: the parts of a job have rows of their own.
                let out = unsafe { output.range(row * width..(row + 1) * width) };
                match tokens[row] {
                    NONE => out.fill(0.0),
                    token => {
                        table.read_row(token as usize, out);
                        out.iter_mut().for_each(|x| *x *= scale);
                    }
                }
            }
        });
        Ok(())
    }
}
