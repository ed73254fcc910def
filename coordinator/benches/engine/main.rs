//! How many events a second the engine decides on: the whole run of a cluster, workers that join, heartbeats, results
//! and ticks, and after each event the question when the next tick is due, as the runtime asks it.
//!
//! `cargo bench --workspace --bench engine -- [FILTER]`

mod cluster;

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

use cluster::Cluster;

fn engine(c: &mut Criterion) {
    let even = Cluster { workers: 0, slots_per_worker: 1, secs_per_slot: (2.0, 2.4), audit: 0.0, steps: 10 };
    // Blocks of several slots for the fast; who is done early takes more, or what the slow have not finished.
    let uneven = Cluster { slots_per_worker: 4, secs_per_slot: (0.2, 1.0), ..even };
    let audited = Cluster { audit: 0.05, ..even };
    for (name, cluster) in [("even", even), ("uneven", uneven), ("audited", audited)] {
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for workers in [100, 1_000, 10_000] {
            let cluster = Cluster { workers, ..cluster };
            let events = cluster.events();
            group.throughput(Throughput::Elements(events.len() as u64));
            group.bench_function(format!("{workers} workers, {} events", events.len()), |b| {
                b.iter_batched(
                    || (cluster.engine(), events.clone()),
                    |(mut engine, events)| {
                        for (event, now) in events {
                            black_box(engine.handle(event, now));
                            black_box(engine.next_deadline());
                        }
                        engine
                    },
                    BatchSize::PerIteration,
                );
            });
        }
        group.finish();
    }
}

criterion_group!(benches, engine);
criterion_main!(benches);
