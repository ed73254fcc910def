//! Names that put one step's spans, from all processes, into one trace (W3C Trace Context).

use lockstep_model::digest::{bytes_sha256, hex};

/// The trace of step `step` of run `run_id`: 32 hexadecimal digits.
pub fn trace_id(run_id: &str, step: u64) -> String {
    hex(&bytes_sha256(format!("{run_id}/{step}").as_bytes())[..16])
}

/// The span of the step itself.
pub(crate) fn span_id(run_id: &str, step: u64) -> u64 {
    let digest = bytes_sha256(format!("{run_id}/{step}/span").as_bytes());
    u64::from_be_bytes(std::array::from_fn(|i| digest[i]))
}

/// The header by which a worker hangs its spans under the step.
pub(crate) fn traceparent(run_id: &str, step: u64) -> String {
    format!("00-{}-{:016x}-01", trace_id(run_id, step), span_id(run_id, step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_has_its_form() {
        let text = traceparent("run", 3);
        let lengths: Vec<usize> = text.split('-').map(str::len).collect();
        assert_eq!(lengths, [2, 32, 16, 2]);
        assert_ne!(trace_id("run", 3), trace_id("run", 4));
    }
}
