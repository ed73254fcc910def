//! What this machine can compute on, and the choice among it.

use std::fmt;
use std::str::FromStr;

use burn::tensor::{Device, Tensor};

/// What a user asks for: `auto`, `cpu`, `wgpu` or `wgpu:INDEX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first real GPU if there is one, else the CPU. Never a software adapter.
    Auto,
    /// The CPU backend.
    Cpu,
    /// The wgpu adapter of this index in [`list`]; the first where none is given.
    Wgpu(Option<usize>),
}

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not a device's name.
    #[error("device {0:?} is none of auto, cpu, wgpu and wgpu:INDEX; for example --device wgpu:0")]
    Name(String),
    /// The backend was left out of this build.
    #[error("this build has no {0} backend; build it with --features {0}, or choose another --device")]
    NotBuilt(&'static str),
    /// No adapter of that index.
    #[error(
        "there is no wgpu adapter {index}: {found} found; `lockstep devices` lists them (a missing Vulkan driver is the \
         usual cause on Linux)"
    )]
    NoAdapter {
        /// The index asked for.
        index: usize,
        /// How many there are.
        found: usize,
    },
    /// A software adapter, and kernels that are chosen by trying many.
    #[error(
        "{0}: this build (feature gpu-tuned) finds its kernels by trying many, which takes a software adapter hours; use \
         --device cpu, or a build without gpu-tuned"
    )]
    TunedForGpus(String),
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "wgpu" => Ok(Self::Wgpu(None)),
            _ => {
                let index = name.strip_prefix("wgpu:").and_then(|index| index.parse().ok());
                index.map(|index| Self::Wgpu(Some(index))).ok_or_else(|| DeviceError::Name(name.into()))
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Wgpu(None) => write!(f, "wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
        }
    }
}

/// A device that can compute.
#[derive(Clone, Debug)]
pub struct ComputeDevice {
    /// Backend and part, in words.
    pub description: String,
    handle: Device,
}

impl ComputeDevice {
    /// Finds the device of `choice`.
    ///
    /// # Errors
    /// If the backend is not in this build, or there is no such adapter.
    pub fn open(choice: DeviceChoice) -> Result<Self, DeviceError> {
        match choice {
            DeviceChoice::Cpu => cpu(),
            DeviceChoice::Wgpu(index) => {
                let index = index.unwrap_or(0);
                let adapters = wgpu_adapters()?;
                let found = adapters.len();
                let adapter = adapters.into_iter().nth(index).ok_or(DeviceError::NoAdapter { index, found })?;
                if adapter.software && cfg!(feature = "gpu-tuned") {
                    return Err(DeviceError::TunedForGpus(adapter.device.description));
                }
                Ok(adapter.device)
            }
            DeviceChoice::Auto => {
                let gpu = wgpu_adapters().ok().and_then(|adapters| adapters.into_iter().find(|a| !a.software));
                gpu.map_or_else(cpu, |adapter| Ok(adapter.device))
            }
        }
    }

    /// Whether it is the CPU backend.
    pub fn is_cpu(&self) -> bool {
        #[cfg(feature = "cpu")]
        return self.handle == Device::flex();
        #[cfg(not(feature = "cpu"))]
        false
    }

    /// Makes the present thread, if this is the CPU backend, one of those that operations are split among, as many as rayon's
    /// own pool has: computing here wakes no other thread unless there is work for several. What is returned has the others,
    /// and is to be kept as long as this thread computes.
    pub fn enrol(&self) -> Option<rayon::ThreadPool> {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(rayon::current_num_threads()).use_current_thread();
        self.is_cpu().then(|| threads.build().ok()).flatten()
    }

    /// Bytes that are taken of the device's memory, in use or for the next tensors; none on the CPU.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.handle.memory_pool_usage().map(|usage| usage.bytes_reserved)
    }

    /// Whether the device adds f32 as IEEE 754 says, subnormal numbers included, which some flush to 0. Only then are its
    /// sums those of the coordinator.
    pub(crate) fn adds_exactly(&self) -> bool {
        let left = [f32::MIN_POSITIVE, 1e-40, -1.5e-38, 1.0, -0.0, 16_777_216.0, f32::MAX];
        let right = [-1.5e-39, 1e-45, 1.4e-38, f32::EPSILON / 2.0, -0.0, 1.0, f32::MIN_POSITIVE];
        let tensor = |values: [f32; 7]| Tensor::<1>::from_data(values, &self.handle);
        let sum = (tensor(left) + tensor(right)).try_into_data().ok();
        let sum = sum.and_then(|sum| sum.try_into_vec::<f32>().ok()).unwrap_or_default();
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
        bits(&sum) == left.iter().zip(right).map(|(left, right)| (left + right).to_bits()).collect::<Vec<u32>>()
    }

    /// burn's handle.
    pub(crate) fn handle(&self) -> &Device {
        &self.handle
    }
}

/// One line of [`list`].
#[derive(Clone, Debug)]
pub struct Listed {
    /// What to give as `--device`.
    pub choice: DeviceChoice,
    /// The device in words.
    pub description: String,
    /// Whether `auto` takes it.
    pub auto: bool,
}

/// All devices of this machine that this build can compute on.
pub fn list() -> Vec<Listed> {
    let adapters = wgpu_adapters().unwrap_or_default();
    let auto = adapters.iter().position(|adapter| !adapter.software);
    let wgpu = adapters.into_iter().enumerate().map(|(index, adapter)| Listed {
        choice: DeviceChoice::Wgpu(Some(index)),
        description: adapter.device.description,
        auto: auto == Some(index),
    });
    let cpu = cpu().into_iter().map(|device| Listed {
        choice: DeviceChoice::Cpu,
        description: device.description,
        auto: auto.is_none(),
    });
    cpu.chain(wgpu).collect()
}

/// An adapter that wgpu sees.
struct Adapter {
    device: ComputeDevice,
    /// A CPU that plays a GPU: right, and slower than the CPU backend.
    software: bool,
}

#[cfg(feature = "cpu")]
fn cpu() -> Result<ComputeDevice, DeviceError> {
    Ok(ComputeDevice { description: "cpu (burn-flex)".into(), handle: Device::flex() })
}

#[cfg(not(feature = "cpu"))]
fn cpu() -> Result<ComputeDevice, DeviceError> {
    Err(DeviceError::NotBuilt("cpu"))
}

#[cfg(feature = "wgpu")]
fn wgpu_adapters() -> Result<Vec<Adapter>, DeviceError> {
    let devices = Device::enumerate(burn::tensor::DeviceType::Wgpu);
    let adapter = |handle: Device| {
        let identity = handle.identity();
        let software = identity.as_ref().is_none_or(|identity| identity.physical.is_none());
        let name = identity.map_or_else(|| "unnamed adapter".to_string(), |identity| identity.name);
        let kind = if software { ", software adapter" } else { "" };
        let tuned = if cfg!(feature = "gpu-tuned") { ", tuned" } else { "" };
        Adapter { device: ComputeDevice { description: format!("wgpu ({name}{kind}{tuned})"), handle }, software }
    };
    Ok(devices.into_iter().map(adapter).collect())
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_adapters() -> Result<Vec<Adapter>, DeviceError> {
    Err(DeviceError::NotBuilt("wgpu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_shown_alike() {
        for name in ["auto", "cpu", "wgpu", "wgpu:3"] {
            assert_eq!(name.parse::<DeviceChoice>().unwrap().to_string(), name);
        }
        let error = "cuda".parse::<DeviceChoice>().unwrap_err().to_string();
        assert_eq!(error, "device \"cuda\" is none of auto, cpu, wgpu and wgpu:INDEX; for example --device wgpu:0");
    }
}
