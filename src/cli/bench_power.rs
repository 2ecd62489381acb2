//! What `trine bench` says of a GPU's energy, clocks and throttling, where it has meters.

use serde_json::{Map, Value, json};

use super::output;

/// A device's meters, if it has any.
pub(crate) struct Meter {
    #[cfg(feature = "cuda")]
    meter: Option<trine::backend::cuda::PowerMeter>,
}

/// What a run of a test took, and how the GPU was at its end.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Power {
    joules: Option<f64>,
    sm_mhz: Option<u32>,
    memory_mhz: Option<u32>,
    celsius: Option<u32>,
    throttling: Option<Vec<&'static str>>,
}

impl Meter {
    /// The meters of a device; says why a CUDA device has none.
    #[cfg(feature = "cuda")]
    pub(crate) fn new(device: &str) -> Self {
        use trine::backend::cuda::{PowerMeter, choose};

        let number = device.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        let meter = number.map(|number| {
            choose(number).map_err(|error| error.to_string()).and_then(|gpu| PowerMeter::new(&gpu))
        });
        let meter = match meter {
            Some(Err(reason)) => {
                output::note(format_args!("no energy and no clocks: {reason}"));
                None
            }
            found => found.and_then(Result::ok),
        };
        Self { meter }
    }

    #[cfg(not(feature = "cuda"))]
    pub(crate) fn new(_: &str) -> Self {
        Self {}
    }

    /// Joules used so far.
    pub(crate) fn joules(&self) -> Option<f64> {
        #[cfg(feature = "cuda")]
        return self.meter.as_ref()?.read().joules;
        #[cfg(not(feature = "cuda"))]
        None
    }

    /// How the GPU is, and what it used since the meter said `before`.
    pub(crate) fn since(&self, before: Option<f64>) -> Option<Power> {
        #[cfg(feature = "cuda")]
        {
            let now = self.meter.as_ref()?.read();
            let joules = now.joules.zip(before).map(|(now, before)| now - before);
            Some(Power {
                joules,
                sm_mhz: now.sm_mhz,
                memory_mhz: now.memory_mhz,
                celsius: now.celsius,
                throttling: now.throttling,
            })
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = before;
            None
        }
    }
}

/// All runs of a test.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct PowerSummary {
    pub(crate) joules_per_token: Option<f64>,
    pub(crate) watts: Option<f64>,
    /// The lowest clocks and the highest temperature of any run.
    pub(crate) sm_mhz: Option<u32>,
    pub(crate) memory_mhz: Option<u32>,
    pub(crate) celsius: Option<u32>,
    /// What held clocks down in any run, or `no`.
    pub(crate) throttled: Option<String>,
}

impl PowerSummary {
    /// Of runs of `tokens` tokens each, with their seconds. Nothing where one has no meter.
    pub(crate) fn of(runs: &[(Option<&Power>, f64)], tokens: usize) -> Option<Self> {
        let mut summary = Self::default();
        let (mut joules, mut seconds) = (Some(0.0), 0.0);
        let mut reasons: Option<Vec<&str>> = None;
        for (run, time) in runs {
            let run = (*run)?;
            joules = joules.zip(run.joules).map(|(sum, joules)| sum + joules);
            seconds += time;
            let lower = |a: Option<u32>, b: Option<u32>| a.into_iter().chain(b).min();
            summary.sm_mhz = lower(summary.sm_mhz, run.sm_mhz);
            summary.memory_mhz = lower(summary.memory_mhz, run.memory_mhz);
            summary.celsius = summary.celsius.into_iter().chain(run.celsius).max();
            for reason in run.throttling.iter().flatten() {
                let reasons = reasons.get_or_insert_default();
                if !reasons.contains(reason) {
                    reasons.push(reason);
                }
            }
            if run.throttling.is_some() {
                reasons.get_or_insert_default();
            }
        }
        let tokens = (runs.len() * tokens) as f64;
        // The counter moves a few times in a second: in a short test it may not move at all.
        let joules = joules.filter(|&joules| joules > 0.0);
        summary.joules_per_token = joules.filter(|_| tokens > 0.0).map(|joules| joules / tokens);
        summary.watts = joules.filter(|_| seconds > 0.0).map(|joules| joules / seconds);
        summary.throttled = reasons.map(|reasons| match reasons.as_slice() {
            [] => "no".to_owned(),
            reasons => reasons.join(", "),
        });
        Some(summary)
    }

    /// Adds the fields of a test's result; nulls where there is no meter.
    pub(crate) fn add_to(power: Option<&Self>, fields: &mut Map<String, Value>) {
        let none = Self::default();
        let power = power.unwrap_or(&none);
        for (name, value) in [
            ("joules_per_token", json!(power.joules_per_token)),
            ("watts", json!(power.watts)),
            ("sm_clock_mhz", json!(power.sm_mhz)),
            ("memory_clock_mhz", json!(power.memory_mhz)),
            ("celsius", json!(power.celsius)),
            ("throttled", json!(power.throttled)),
        ] {
            fields.insert(name.to_owned(), value);
        }
    }

    /// The cells of a table: joules per token, MHz, throttled.
    pub(crate) fn cells(&self) -> [String; 3] {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        [
            or_dash(self.joules_per_token.map(|joules| format!("{joules:.4}"))),
            or_dash(self.sm_mhz.map(|mhz| mhz.to_string())),
            or_dash(self.throttled.clone()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_add_up() {
        let run = |joules, sm_mhz, reasons: &[&'static str]| Power {
            joules: Some(joules),
            sm_mhz: Some(sm_mhz),
            celsius: Some(sm_mhz / 30),
            throttling: Some(reasons.to_vec()),
            ..Power::default()
        };
        let (cool, hot) = (run(3.0, 1980, &[]), run(5.0, 1755, &["power cap"]));
        let both = PowerSummary::of(&[(Some(&cool), 0.25), (Some(&hot), 0.75)], 4).unwrap();
        assert_eq!((both.joules_per_token, both.watts), (Some(1.0), Some(8.0)));
        assert_eq!((both.sm_mhz, both.celsius), (Some(1755), Some(66)));
        assert_eq!(both.cells(), ["1.0000", "1755", "power cap"]);
        let one = PowerSummary::of(&[(Some(&cool), 0.25)], 4).unwrap();
        assert_eq!(one.throttled.as_deref(), Some("no"));
        assert_eq!(PowerSummary::of(&[(Some(&cool), 1.0), (None, 1.0)], 4), None);
    }

    #[test]
    fn what_the_gpu_does_not_tell_is_a_dash() {
        let nothing = Power { joules: Some(0.0), ..Power::default() };
        let summary = PowerSummary::of(&[(Some(&nothing), 1.0)], 4).unwrap();
        assert_eq!(summary.cells(), ["-", "-", "-"]);
    }
}
