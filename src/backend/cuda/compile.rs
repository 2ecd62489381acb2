//! Kernels compiled for the very GPU that is opened, by NVRTC, the run-time compiler of CUDA
//! (feature `nvrtc`). The compiled kernels that are part of the crate need none of this: it is for
//! GPUs newer than they are, and for whoever changes a kernel.
//!
//! Interface: <https://docs.nvidia.com/cuda/nvrtc/index.html>.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use cudarc::nvrtc::result::{NvrtcError, destroy_program, get_program_log};
use cudarc::nvrtc::sys;

use crate::caught::caught;

/// The one header of the kernels.
const PRELUDE: (&CStr, &str) = (c"prelude.cuh", include_str!("../../../kernels/prelude.cuh"));

/// As `tools/build_kernels.py` compiles: no contraction, a fused multiply-add is where a kernel
/// writes one.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

/// The least version that knows what the kernels use: `sm_90a` came with 12.0.
const OLDEST: (i32, i32) = (12, 0);

/// The library that compiles, found and new enough.
pub struct Nvrtc {
    version: (i32, i32),
}

impl Nvrtc {
    /// Looks for the library, or says why it is of no use. Neither panics nor prints without it.
    pub fn find() -> Result<Self, String> {
        // SAFETY: it opens the library, whose initialisers are trusted as the driver's are.
        if !unsafe { sys::is_culib_present() } {
            return Err(
                "NVRTC is not found (libnvrtc.so.12, on Windows nvrtc64_120_0.dll): it comes \
                        with the CUDA toolkit, or as the package nvidia-cuda-nvrtc-cu12 of PyPI; \
                        its folder must be where libraries are looked for"
                    .into(),
            );
        }
        let version = lacking(|| {
            let (mut major, mut minor) = (0, 0);
            // SAFETY: the pointers are to live integers.
            unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(in_words)?;
            Ok((major, minor))
        })?;
        if version < OLDEST {
            let ((major, minor), oldest) = (version, OLDEST);
            return Err(format!(
                "NVRTC is of CUDA {major}.{minor}, and the kernels need {}.{} or newer",
                oldest.0, oldest.1
            ));
        }
        Ok(Self { version })
    }

    /// The machine code of a file of kernels for a GPU of this compute capability.
    pub(super) fn machine_code(
        &self,
        file: &str,
        source: &str,
        capability: (i32, i32),
    ) -> Result<Vec<u8>, String> {
        let (major, minor) = capability;
        // The kernels use what only the architecture-specific form of 9.0 has.
        let specific = if capability == (9, 0) { "a" } else { "" };
        let program = self.compile(file, source, &format!("sm_{major}{minor}{specific}"))?;
        program.bytes(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)
    }

    /// The PTX of a file of kernels for an architecture such as `sm_80`.
    pub fn ptx(&self, file: &str, source: &str, architecture: &str) -> Result<String, String> {
        let program = self.compile(file, source, architecture)?;
        let mut ptx = program.bytes(sys::nvrtcGetPTXSize, sys::nvrtcGetPTX)?;
        // It ends in the zero of a C string.
        ptx.pop();
        String::from_utf8(ptx).map_err(|_| format!("NVRTC's PTX of {file} is not text"))
    }

    fn compile(&self, file: &str, source: &str, architecture: &str) -> Result<Program, String> {
        let told = |what: String| {
            let (major, minor) = self.version;
            format!("NVRTC {major}.{minor} cannot compile {file}.cu for {architecture}: {what}")
        };
        let text = |text: &str| CString::new(text).map_err(|e| told(e.to_string()));
        let source = text(source)?;
        let name = text(&format!("{file}.cu"))?;
        let header = text(PRELUDE.1)?;
        let architecture = text(&format!("--gpu-architecture={architecture}"))?;
        let options = OPTIONS.map(text).into_iter().collect::<Result<Vec<_>, _>>()?;
        let options: Vec<*const c_char> =
            [architecture.as_ptr()].into_iter().chain(options.iter().map(|o| o.as_ptr())).collect();
        lacking(|| {
            let mut program = Program(ptr::null_mut());
            // SAFETY: all strings end in zero and outlive the call, which copies them; there is one
            // header, with one name.
            unsafe {
                sys::nvrtcCreateProgram(
                    &mut program.0,
                    source.as_ptr(),
                    name.as_ptr(),
                    1,
                    [header.as_ptr()].as_ptr(),
                    [PRELUDE.0.as_ptr()].as_ptr(),
                )
            }
            .result()
            .map_err(|error| told(in_words(error)))?;
            // SAFETY: the program is live, and the options outlive the call.
            let compiled = unsafe {
                sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr())
            };
            match compiled.result() {
                Ok(()) => Ok(program),
                Err(error) => Err(told(format!("{}{}", in_words(error), program.log()))),
            }
        })
    }
}

/// A program of NVRTC, destroyed when it is dropped.
struct Program(sys::nvrtcProgram);

/// A function that says how many bytes another writes.
type Size = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
/// A function that writes what was compiled.
type Write = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

impl Program {
    fn bytes(&self, size: Size, write: Write) -> Result<Vec<u8>, String> {
        lacking(|| {
            let mut bytes = 0;
            // SAFETY: the program is live, and the pointer is to a live integer.
            unsafe { size(self.0, &mut bytes) }.result().map_err(in_words)?;
            let mut output = vec![0u8; bytes];
            // SAFETY: the output has the length that was just asked for.
            unsafe { write(self.0, output.as_mut_ptr().cast()) }.result().map_err(in_words)?;
            Ok(output)
        })
    }

    /// The first lines of what the compiler says, after a comma.
    fn log(&self) -> String {
        // SAFETY: the program is live.
        let log = unsafe { get_program_log(self.0) }.unwrap_or_default();
        let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
        let log = String::from_utf8_lossy(&log);
        log.lines().take(5).map(|line| format!("; {}", line.trim())).collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it was created and is destroyed once. There is nothing to do about an error.
            let _ = unsafe { destroy_program(self.0) };
        }
    }
}

fn in_words(NvrtcError(error): NvrtcError) -> String {
    // SAFETY: it answers a string that lives as long as the library.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(error)) };
    text.to_string_lossy().into_owned()
}

/// cudarc meets a function that a library lacks with a panic.
fn lacking<R>(call: impl FnOnce() -> Result<R, String>) -> Result<R, String> {
    caught(call).unwrap_or_else(|_| Err("NVRTC lacks functions of CUDA 12; update it".into()))
}
