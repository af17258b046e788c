//! A load whose data tells what a view of a snapshot may contain, while guests write.
//!
//! A disk is cut into units. Every unit that a write touches holds its disk, its place and the number of
//! the write, over and over with a checksum ([`mod@unit`]). The [`journal`] knows when each write was issued
//! and when it was acknowledged, by one clock for all disks, and from that whether there was an instant
//! at which the disks held what a view shows. The [`load`] keeps the queues of a disk full; the [`rig`]
//! puts daemon, load, snapshots and judgement together.
//!
//! Always: no two requests in flight touch the same unit, so the writes of a unit have one order.
//! Absent: what a request does that ended with an error. There is none: the load ends over it.

pub mod journal;
pub mod load;
pub mod rig;
pub mod unit;
