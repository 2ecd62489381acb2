//! A step's inputs: all that is written between two steps goes to the device in one launch.
//!
//! A dozen small copies in front of each step would take longer than the step's norms. The host
//! writes them one behind the other into memory that the device can read, and a kernel puts them
//! where they belong.

use std::rc::Rc;

use super::device::Device;
use super::launch::{Kernel, Launch, grid};
use super::memory::{Owned, Pinned};

/// Bytes of a stage: the inputs of a step of some thousand tokens.
const STAGE: usize = 1 << 18;

/// Stages: one for each step that may be in flight, and one more.
const STAGES: usize = 3;

/// Pieces that one launch takes.
const PIECES: usize = 14;

pub(super) const KERNEL: Kernel = Kernel::new::<Args>("scatter", 256);

pub(super) const KERNELS: &[Kernel] = &[KERNEL];

/// `ScatterArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
pub(super) struct Args {
    from: u64,
    pieces: [Piece; PIECES],
}

#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Piece {
    to: u64,
    offset: u32,
    bytes: u32,
}

/// What is written and not on its way.
pub(super) struct Inputs {
    stages: Vec<Pinned>,
    stage: usize,
    used: usize,
    pieces: Vec<(Rc<Owned>, Piece)>,
}

impl Inputs {
    pub(super) fn new() -> Self {
        Self { stages: Vec::new(), stage: 0, used: 0, pieces: Vec::new() }
    }

    /// Takes note of bytes for the start of a piece of memory, if there is room for them.
    pub(super) fn push(
        &mut self,
        device: &Rc<Device>,
        to: &Rc<Owned>,
        bytes: &[u8],
    ) -> Result<bool, String> {
        // The kernel copies words.
        let start = self.used.next_multiple_of(16);
        if start + bytes.len() > STAGE {
            return Ok(false);
        }
        if self.stages.len() <= self.stage {
            self.stages.push(Pinned::new(device, STAGE)?);
        }
        // At the first bytes of a stage this waits for the step that used it last.
        let stage = self.stages[self.stage].bytes_mut()?;
        stage[start..start + bytes.len()].copy_from_slice(bytes);
        self.used = start + bytes.len();
        let piece = Piece { to: to.address(), offset: start as u32, bytes: bytes.len() as u32 };
        self.pieces.push((Rc::clone(to), piece));
        Ok(true)
    }

    /// The launches that put everything where it belongs. They must be enqueued before
    /// [`sent`](Self::sent) is called.
    pub(super) fn launches(&self) -> Vec<Launch> {
        let Some(stage) = self.stages.get(self.stage) else { return Vec::new() };
        let of = |pieces: &[(Rc<Owned>, Piece)]| {
            let mut args = Args { from: stage.address(), pieces: Default::default() };
            for (slot, (_, piece)) in args.pieces.iter_mut().zip(pieces) {
                *slot = *piece;
            }
            let memory: Vec<_> = pieces.iter().map(|(to, _)| to).collect();
            Launch::new(KERNEL, grid(pieces.len()), &args, &memory)
        };
        self.pieces.chunks(PIECES).map(of).collect()
    }

    /// Says that the launches are enqueued; the next stage is used from here on.
    pub(super) fn sent(&mut self) -> Result<(), String> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        self.pieces.clear();
        self.used = 0;
        let sent = self.stage;
        self.stage = (sent + 1) % STAGES;
        self.stages[sent].in_use()
    }
}
