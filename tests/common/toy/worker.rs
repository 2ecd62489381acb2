//! The toy's own thread: takes jobs in the order they were enqueued.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use trine::error::RunError;

use super::control::Control;
use super::record::Recording;

pub(super) enum Job {
    Write(Box<dyn FnOnce() + Send>),
    Run(Arc<Recording>),
    /// Is told the fault of the step before it, if there was one.
    Fetch(Box<dyn FnOnce(Option<RunError>) + Send>),
}

pub(super) fn start(jobs: Receiver<Job>, control: Arc<Control>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut fault, mut dirty) = (None, false);
        for job in jobs {
            match job {
                Job::Write(write) => {
                    // The first write after a step begins the next one. Neither its inputs nor its
                    // intermediates may still be needed.
                    if std::mem::take(&mut dirty) {
                        control.poison();
                    }
                    write();
                }
                Job::Run(recording) => {
                    control.pass_gate();
                    fault = recording.run(&control).err();
                    dirty = true;
                }
                Job::Fetch(fetch) => fetch(fault.clone()),
            }
        }
    })
}
