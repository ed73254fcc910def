//! `lockstep devices`.

use lockstep_model::device;

/// Lists what this machine can compute on.
pub(crate) fn run() -> anyhow::Result<()> {
    let devices = device::list();
    for listed in &devices {
        let auto = if listed.auto { "  ← auto" } else { "" };
        println!("{:<8} {}{auto}", listed.choice.to_string(), listed.description);
    }
    if devices.len() == 1 && cfg!(feature = "wgpu") {
        println!("\nNo GPU adapter was found. On Linux a GPU needs its Vulkan driver.");
    }
    Ok(())
}
