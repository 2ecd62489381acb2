//! Which instructions the kernels use: found out once, then carried as a value whose existence is
//! the proof.

use super::simd::{Simd, scalar::Scalar};
#[cfg(target_arch = "x86_64")]
use super::simd::{avx2::Avx2, avx512::Avx512};
use crate::error::LoadError;

/// The environment variable that overrides the choice.
const VARIABLE: &str = "TRINE_ISA";

/// A set of instructions that the kernels come in. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// What the architecture always has.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI, and the former.
    Avx512Vnni,
}

impl Isa {
    const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512Vnni];

    /// What this machine has, the best last.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|&isa| Token::new(isa).is_some()).collect()
    }

    /// The name, as `TRINE_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512Vnni => "avx512vnni",
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The proof that an instruction set is there.
#[derive(Clone, Copy)]
pub(super) enum Token {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Token {
    /// The token of `isa`, on a machine that has it.
    fn new(isa: Isa) -> Option<Self> {
        match isa {
            Isa::Scalar => Some(Self::Scalar(Scalar)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::new().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Avx512::new().map(Self::Avx512),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512Vnni => None,
        }
    }

    /// The token of what was asked for: by the program, else by the environment, else the best.
    pub(super) fn choose(asked: Option<Isa>) -> Result<(Isa, Self), LoadError> {
        let variable = std::env::var(VARIABLE).ok();
        Self::choose_from(asked, variable.as_deref())
    }

    fn choose_from(asked: Option<Isa>, variable: Option<&str>) -> Result<(Isa, Self), LoadError> {
        let available = Isa::available();
        let refuse = |option: &str, found: &str| LoadError::Option {
            option: option.to_owned(),
            expected: format!(
                "an instruction set of this machine: {}",
                available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
            ),
            found: found.to_owned(),
        };
        let isa = match (asked, variable) {
            (Some(isa), _) => isa,
            (None, Some(name)) if !name.is_empty() => *Isa::ALL
                .iter()
                .find(|isa| isa.name() == name)
                .ok_or_else(|| refuse(VARIABLE, name))?,
            _ => available.last().copied().unwrap_or(Isa::Scalar),
        };
        let option = if asked.is_some() { "isa" } else { VARIABLE };
        Ok((isa, Self::new(isa).ok_or_else(|| refuse(option, isa.name()))?))
    }

    /// Runs a kernel with the instructions enabled.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Scalar(simd) => kernel.run(simd),
            // SAFETY: Avx2::new, the only maker of this token, has found these features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => unsafe { run_avx2(simd, kernel) },
            // SAFETY: Avx512::new, the only maker of this token, has found these features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => unsafe { run_avx512(simd, kernel) },
        }
    }
}

/// A body that is compiled once for every instruction set.
pub(super) trait Kernel {
    type Output;
    /// Must be `inline(always)`, see [`simd`](super::simd).
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
    kernel.run(simd)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn run_avx512<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_outranks_the_environment_and_nothing_means_the_best() {
        let choose = |asked, variable| Token::choose_from(asked, variable).map(|(isa, _)| isa).ok();
        assert_eq!(choose(None, Some("scalar")), Some(Isa::Scalar));
        assert_eq!(choose(Some(Isa::Scalar), Some("no such")), Some(Isa::Scalar));
        assert_eq!(choose(None, None), Isa::available().last().copied());
        assert_eq!(choose(None, Some("")), Isa::available().last().copied());
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_is() {
        let message = match Token::choose_from(None, Some("sse9")) {
            Err(error) => error.to_string(),
            Ok((isa, _)) => panic!("{isa} was chosen"),
        };
        assert!(message.contains("TRINE_ISA") && message.contains("scalar"), "{message}");
        assert!(message.contains("sse9"), "{message}");
    }
}
