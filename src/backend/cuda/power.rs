//! Energy, clocks and throttling of a GPU, from NVML: the management library that comes with the
//! driver. Where it is missing there are no figures, and nothing else changes.

use cudarc::driver::{DriverError, result};
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::error::NvmlError;

use super::GpuInfo;
use super::device::sentence;

/// Reads one GPU's meters.
pub struct PowerMeter {
    nvml: Nvml,
    /// The driver's name for the GPU: NVML may count GPUs in another order than CUDA.
    uuid: String,
}

/// What the meters say. What a GPU does not tell is absent.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct PowerReading {
    /// Energy that the GPU has used since the driver was loaded, in joules. The difference between
    /// two readings is what lies between them; the counter moves a few times in a second only.
    pub joules: Option<f64>,
    /// Power, in watts, as the GPU averages it.
    pub watts: Option<f64>,
    /// Clock of the multiprocessors, in MHz.
    pub sm_mhz: Option<u32>,
    /// Clock of the memory, in MHz.
    pub memory_mhz: Option<u32>,
    /// Temperature, in degrees Celsius.
    pub celsius: Option<u32>,
    /// What holds the clocks down; empty if nothing does.
    pub throttling: Option<Vec<&'static str>>,
}

impl PowerMeter {
    /// Finds the GPU's meters. The `Err` says why there are none.
    pub fn new(gpu: &GpuInfo) -> Result<Self, String> {
        if gpu.is_emulated() {
            return Err("an emulated GPU has no meters".into());
        }
        let uuid = uuid(gpu.ordinal).map_err(sentence)?;
        let nvml = Nvml::init().map_err(|error| match error {
            NvmlError::LibloadingError(_) => {
                "there is no NVML on this machine (no libnvidia-ml)".to_owned()
            }
            error => format!("NVML does not start: {error}"),
        })?;
        let known = nvml.device_by_uuid(uuid.as_str()).map(|_| ());
        known.map_err(|error| format!("NVML does not know the GPU {uuid}: {error}"))?;
        Ok(Self { nvml, uuid })
    }

    /// The GPU as the driver names it, `GPU-` and 32 hexadecimal digits.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Reads all meters.
    pub fn read(&self) -> PowerReading {
        let Ok(device) = self.nvml.device_by_uuid(self.uuid.as_str()) else {
            return PowerReading::default();
        };
        let milli = |value: u64| value as f64 / 1e3;
        PowerReading {
            joules: device.total_energy_consumption().ok().map(milli),
            watts: device.power_usage().ok().map(|value| milli(value.into())),
            sm_mhz: device.clock_info(Clock::SM).ok(),
            memory_mhz: device.clock_info(Clock::Memory).ok(),
            celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            throttling: device.current_throttle_reasons().ok().map(names),
        }
    }
}

/// What holds clocks down, in words. An idle GPU is not held down.
fn names(reasons: ThrottleReasons) -> Vec<&'static str> {
    let all = [
        (ThrottleReasons::APPLICATIONS_CLOCKS_SETTING, "clocks set by the user"),
        (ThrottleReasons::DISPLAY_CLOCK_SETTING, "clocks set for the display"),
        (ThrottleReasons::SW_POWER_CAP, "power cap"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power brake"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "temperature"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "temperature, by hardware"),
        (ThrottleReasons::SYNC_BOOST, "another GPU of its group"),
        (ThrottleReasons::HW_SLOWDOWN, "slowdown by hardware"),
    ];
    all.into_iter().filter(|(reason, _)| reasons.contains(*reason)).map(|(_, name)| name).collect()
}

/// The name of the whole GPU, also where it is shared out in parts.
fn uuid(ordinal: usize) -> Result<String, DriverError> {
    let uuid = result::device::get_uuid(result::device::get(ordinal as i32)?)?;
    Ok(spelled(uuid.bytes.map(|byte| byte as u8)))
}

/// A UUID as NVML spells it.
fn spelled(bytes: [u8; 16]) -> String {
    let mut text = String::from("GPU-");
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_spelled_as_nvml_does() {
        let bytes = std::array::from_fn(|index| (index * 17) as u8);
        assert_eq!(spelled(bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }

    #[test]
    fn reasons_have_names_and_idling_is_none() {
        assert!(names(ThrottleReasons::GPU_IDLE | ThrottleReasons::NONE).is_empty());
        let hot = ThrottleReasons::SW_POWER_CAP | ThrottleReasons::SW_THERMAL_SLOWDOWN;
        assert_eq!(names(hot), ["power cap", "temperature"]);
    }
}
