//! How long a step takes with any number of workers, over links of given bandwidth and latency: the real engine and the
//! real sessions in virtual time. The example `scale` prints it.

#[path = "../simulator/chance.rs"]
#[allow(dead_code)] // what the simulator draws besides
mod chance;
pub(crate) mod cluster;
pub(crate) mod link;
#[path = "../simulator/numbers.rs"]
#[allow(dead_code)] // evaluations, and what is wrong with gradients
pub(crate) mod numbers;
pub(crate) mod relays;
#[cfg(test)]
mod tests;
