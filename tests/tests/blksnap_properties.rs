//! What blksnap's own tests show of blksnap, shown of Ebbtide: one test for each of them, named after it.
//!
//! The numbers are those of blksnap's `tests/*.sh`, `cpp` are the programs in its `tests/cpp`, and `missing`
//! is what neither has a test for. Power cuts are in `sim.rs`,
//! which can lose what was not flushed; throughput is in the benchmarks.

#![forbid(unsafe_code)]

#[path = "blksnap_properties/ends.rs"]
mod ends;
#[path = "blksnap_properties/growth.rs"]
mod growth;
#[path = "blksnap_properties/images.rs"]
mod images;
#[path = "blksnap_properties/stops.rs"]
mod stops;
#[path = "blksnap_properties/store.rs"]
mod store;
#[path = "blksnap_properties/takes.rs"]
mod takes;
#[path = "blksnap_properties/tracking.rs"]
mod tracking;
