//! A launch: a kernel, its grid, and its one argument, a struct.

use std::rc::Rc;

use super::memory::Owned;

/// A kernel as its source declares it. What stands here is compared with the compiled file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Kernel {
    /// The file: `kernels/<file>.cu`.
    pub file: &'static str,
    /// The function in it.
    pub name: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of its argument.
    pub args: usize,
    /// The most dynamic shared memory that a launch asks for, in bytes.
    pub shared: usize,
}

impl Kernel {
    /// A kernel that is called as its file is, with an argument of type `A`.
    pub(super) const fn new<A>(file: &'static str, threads: u32) -> Self {
        Self { file, name: file, threads, args: size_of::<A>(), shared: 0 }
    }
    /// Another function of the same file.
    pub(super) const fn named(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }
    /// Launches may ask for up to this much dynamic shared memory. A GPU that has less is asked for
    /// what it has, so a launch must look at [`GpuInfo::shared_bytes`](super::GpuInfo).
    pub(super) const fn with_shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }
}

/// The most bytes of an argument, so that launches need no memory of their own.
pub(super) const ARGS_BYTES: usize = 256;

/// A launch as an op asks for it.
#[derive(Clone)]
pub(super) struct Launch {
    pub(super) kernel: Kernel,
    /// Blocks.
    pub(super) grid: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub(super) shared: u32,
    /// The argument, on 16 bytes as a struct of pointers asks for.
    pub(super) args: Args,
    /// What the argument points to, kept for as long as the launch may be repeated.
    _memory: Vec<Rc<Owned>>,
}

#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub(super) struct Args(pub(super) [u8; ARGS_BYTES]);

impl Launch {
    /// `memory` is all that pointers in `args` point to.
    pub(super) fn new<A: bytemuck::NoUninit>(
        kernel: Kernel,
        grid: [u32; 3],
        args: &A,
        memory: &[&Rc<Owned>],
    ) -> Self {
        const { assert!(size_of::<A>() <= ARGS_BYTES, "an argument that is too long") };
        debug_assert_eq!(kernel.args, size_of::<A>(), "{}", kernel.name);
        let mut bytes = Args([0; ARGS_BYTES]);
        bytes.0[..size_of::<A>()].copy_from_slice(bytemuck::bytes_of(args));
        let memory = memory.iter().map(|&memory| Rc::clone(memory)).collect();
        Self { kernel, grid, shared: 0, args: bytes, _memory: memory }
    }

    /// With this much dynamic shared memory.
    pub(super) fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes as u32;
        self
    }
}

/// Blocks of a one-dimensional job: the first dimension of a grid may have 2³¹ − 1.
pub(super) fn grid(blocks: usize) -> [u32; 3] {
    [blocks.max(1) as u32, 1, 1]
}
