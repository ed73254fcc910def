//! How long a step takes with any number of workers, over links of given bandwidth and latency: the real engine and the
//! real sessions in virtual time. The example `scale` prints it. What is computed is what the simulator computes.

pub(crate) mod cluster;
pub(crate) mod link;
pub(crate) mod relays;
#[cfg(test)]
mod tests;
