//! A control socket without disks behind it, to try QMP clients on:
//! `cargo run -p control --example rehearsal -- /tmp/control.sock`
//!
//! A second argument is the number of seconds after which it gives up.

#[path = "../tests/rehearsal/mod.rs"]
mod rehearsal;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use control::{EventHub, Listener, Options, Server};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: rehearsal SOCKET [SECONDS]")?;
    let seconds = arguments.next().map_or(Ok(3600), |text| text.parse())?;
    let listener = Listener::bind(Path::new(&path))?;
    let events = EventHub::new();
    let service = Arc::new(rehearsal::Rehearsal::new(events.clone()));
    let server = Server::start(listener, service.clone(), events, Options::default())?;
    println!("listening on {}", server.path().display());
    service.wait_for_quit(Duration::from_secs(seconds));
    server.stop(Duration::from_secs(2));
    Ok(())
}
