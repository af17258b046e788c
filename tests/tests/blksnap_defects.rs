//! Defects that reading found in blksnap, and that cannot happen here: one test for each, by its number.
//!
//! Where a defect belongs to a kernel module and has no counterpart, the test is of the nearest property
//! that can be observed from outside, and says so.

#![forbid(unsafe_code)]

#[path = "blksnap_defects/takes.rs"]
mod takes;
#[path = "blksnap_defects/tracking.rs"]
mod tracking;
