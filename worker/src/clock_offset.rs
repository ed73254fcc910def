//! How far the coordinator's clock is ahead of this machine's, from the round trips of heartbeats.

/// The estimate of (coordinator clock - own clock), from the round trip with the least delay so far.
///
/// The coordinator stamps a heartbeat on arrival. If both ways took equally long, that was halfway between sending it and
/// hearing back; the error is at most half the round trip, so the fastest one is believed (Mills, RFC 5905, section 10).
#[derive(Clone, Debug, Default)]
pub(crate) struct ClockOffset {
    best: Option<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    delay_nanos: u64,
    offset_nanos: i64,
}

impl ClockOffset {
    /// Takes one round trip: sent and acknowledged by the own clock, received by the coordinator's; nanoseconds since the
    /// Unix epoch. A round trip during which the own clock was set back says nothing and is left out.
    pub(crate) fn observe(&mut self, sent: u64, received: u64, acknowledged: u64) {
        let Some(delay_nanos) = acknowledged.checked_sub(sent) else { return };
        let halfway = sent + delay_nanos / 2;
        let offset_nanos = received.wrapping_sub(halfway) as i64;
        if self.best.is_none_or(|best| delay_nanos < best.delay_nanos) {
            self.best = Some(Sample { delay_nanos, offset_nanos });
        }
    }

    /// Nanoseconds to add to the own clock to get the coordinator's; 0 before the first round trip.
    pub(crate) fn nanos(&self) -> i64 {
        self.best.map_or(0, |best| best.offset_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_is_taken_halfway_through_the_round_trip() {
        let mut ahead = ClockOffset::default();
        assert_eq!(ahead.nanos(), 0);
        ahead.observe(1000, 5100, 1200);
        assert_eq!(ahead.nanos(), 4000);

        let mut behind = ClockOffset::default();
        behind.observe(9000, 2050, 9100);
        assert_eq!(behind.nanos(), -7000);
    }

    #[test]
    fn the_fastest_round_trip_wins() {
        let mut clock = ClockOffset::default();
        clock.observe(0, 900, 1000); // slow on the way there: seems 400 ahead
        clock.observe(2000, 2010, 2020);
        clock.observe(3000, 3100, 3800);
        assert_eq!(clock.nanos(), 0);
    }

    #[test]
    fn a_clock_that_was_set_back_gives_no_sample() {
        let mut clock = ClockOffset::default();
        clock.observe(1000, 5000, 900);
        assert_eq!(clock.nanos(), 0);
    }
}
