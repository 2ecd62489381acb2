//! What the integration tests share: random models, ways to run them, a toy backend, and the list
//! of backends that every generic test runs on.

// Each test binary compiles all of this and uses a part.
#![allow(dead_code, unused_imports, unused_macros)]

pub(crate) mod attention;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod demo;
pub(crate) mod host;
pub(crate) mod markov;
pub(crate) mod model;
pub(crate) mod ops;
pub(crate) mod rng;
pub(crate) mod run;
pub(crate) mod sample;
pub(crate) mod sample_tests;
pub(crate) mod toy;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;
pub(crate) mod workload;

use trine::backend::Backend;
use trine::backend::cpu::{Cpu, CpuOptions, Isa};
use trine::backend::reference::Reference;

/// The body of a test that holds for every backend.
pub(crate) trait Body {
    /// `open` opens the backend anew at each call.
    fn run<B: Backend>(&self, open: &dyn Fn() -> B);
}

/// Runs `body` on every backend of this machine. A new backend, or a variant of one, is a line.
///
/// Tests of the whole model pass `slow` adapters by; `wgpu_model.rs` has what they run.
#[cfg_attr(not(any(feature = "cuda", feature = "wgpu")), allow(unused_variables))]
pub(crate) fn on_every_backend(body: &impl Body, slow: bool) {
    // Its ops are compared with themselves, which shows that the tests' own arithmetic is right.
    named("reference", || body.run(&Reference::new));
    named("toy", || body.run(&toy::Toy::new));
    #[cfg(feature = "cuda")]
    for (name, gpu, options) in cuda::backends(slow) {
        use trine::backend::cuda::Cuda;
        named(name, || body.run(&|| Cuda::new(gpu.clone(), options).expect("opens")));
    }
    #[cfg(feature = "wgpu")]
    for (name, gpu, options) in wgpu::backends(slow) {
        named(name, || body.run(&|| trine::backend::wgpu::Wgpu::new(&gpu, options)));
    }
    for isa in Isa::available() {
        for threads in 1..=3 {
            let options = CpuOptions::default().isa(isa).threads(threads);
            let open = || Cpu::new(options).expect("the instruction set is there");
            named(&format!("cpu, {isa:?}, {threads} threads"), || body.run(&open));
        }
    }
}

/// Says which backend a failing test was on.
fn named(name: &str, test: impl FnOnce()) {
    struct Name<'a>(&'a str);
    impl Drop for Name<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("on backend {}", self.0);
            }
        }
    }
    let _name = Name(name);
    test();
}

/// Turns generic functions `fn name<B>(open)` into tests that run on every backend, or on all but
/// those that are slow.
macro_rules! backend_tests {
    (not slow; $($tests:tt)*) => { $crate::common::backend_tests! { @slow = false; $($tests)* } };
    (@slow = $slow:literal; $($(#[$attribute:meta])* fn $name:ident<$backend:ident>($open:ident) $body:block)*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            struct This;
            impl $crate::common::Body for This {
                fn run<$backend: trine::backend::Backend>(&self, $open: &dyn Fn() -> $backend) {
                    $body
                }
            }
            $crate::common::on_every_backend(&This, $slow);
        }
    )*};
    ($($tests:tt)*) => { $crate::common::backend_tests! { @slow = true; $($tests)* } };
}
pub(crate) use backend_tests;
