//! What happens without being asked for, and how it reaches every client.
//!
//! What always holds: [`EventHub::post`] may be called from any thread and never waits for a
//! client; all clients see events in the same order; a client that has negotiated sees every
//! event or is disconnected. The timestamp is that of the call.
//!
//! Absent: a history. Who connects later asks the queries.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::commands::{OnOverflow, SnapshotPoint, Timestamp};
use crate::outbox::Outbox;
use crate::wire;

/// An event, `{"event": NAME, "data": {…}}` on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "event",
    content = "data",
    rename_all = "SCREAMING_SNAKE_CASE",
    rename_all_fields = "kebab-case"
)]
pub enum Event {
    /// A snapshot was taken.
    SnapshotCreated {
        /// Its name.
        name: String,
        /// Its disks.
        disks: Vec<SnapshotPoint>,
    },
    /// A snapshot was deleted, on request or because its disk's history began anew.
    SnapshotDeleted {
        /// Its name.
        name: String,
        /// The disks that no longer have it.
        disks: Vec<String>,
    },
    /// An instant got a name that outlives its snapshot.
    CheckpointCreated {
        /// Its name.
        name: String,
        /// Its disks.
        disks: Vec<SnapshotPoint>,
    },
    /// A checkpoint was deleted.
    CheckpointDeleted {
        /// Its name.
        name: String,
        /// The disks that no longer have it.
        disks: Vec<String>,
    },
    /// Changes up to a checkpoint cannot be told any more; changes since it can.
    CheckpointDamaged {
        /// Its name.
        name: String,
        /// The disk it is of.
        disk: String,
        /// One sentence for people.
        desc: String,
    },
    /// A snapshot can no longer be read; the guest goes on.
    SnapshotBroken {
        /// Its name.
        name: String,
        /// The disk it is of.
        disk: String,
        /// A stable code such as `store-full`.
        reason: String,
        /// One sentence for people.
        desc: String,
    },
    /// A disk became a snapshot again; what differs is copied back from now on.
    RewindStarted {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
        /// Bytes that are to be copied back.
        bytes: u64,
    },
    /// What a rewind was to copy back is on the image.
    RewindCompleted {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
    },
    /// A rewind does not go on, or what it needs cannot be read; it is tried again.
    RewindFailed {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
        /// One sentence for people.
        desc: String,
    },
    /// Guests' writes wait or fail, for there is no space for old content; told again while it goes on.
    StoreOverflow {
        /// The disk.
        disk: String,
        /// What was chosen.
        action: OnOverflow,
        /// How long writes wait, in seconds, if they do.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hold_deadline: Option<u32>,
        /// One sentence for people.
        desc: String,
    },
    /// A difference store will soon be full.
    LowSpace {
        /// The disk.
        disk: String,
        /// Bytes that still fit.
        bytes_left: u64,
        /// Bytes that are preserved in a second, of late.
        bytes_per_second: u64,
        /// Seconds after which it is full if that goes on; null if nothing is written.
        seconds_left: Option<u64>,
        /// What will be full first: an area's path, `store-limit` or `daemon-limit`.
        bound_by: String,
    },
    /// An operator ended a disk's history: the next backup must be a full one. Of one that a start of the daemon could
    /// not prove complete `query-tracker` tells: nobody is there yet to hear an event.
    TrackerReset {
        /// The disk.
        disk: String,
        /// The generation that begins.
        generation: String,
        /// A stable code, as of `query-disks`, such as `host-stopped`.
        reason: String,
        /// One sentence for people.
        desc: String,
    },
    /// A front end connected to a disk.
    FrontendConnected {
        /// The disk.
        disk: String,
    },
    /// A front end went away from a disk.
    FrontendDisconnected {
        /// The disk.
        disk: String,
    },
}

#[derive(Serialize)]
struct Stamped<'a> {
    #[serde(flatten)]
    event: &'a Event,
    timestamp: Timestamp,
}

/// Carries events from the daemon's threads to the clients of one server.
///
/// Clones are the same hub.
#[derive(Clone, Debug, Default)]
pub struct EventHub {
    clients: Arc<Mutex<Vec<Arc<Outbox>>>>,
}

impl EventHub {
    /// A hub that nobody listens to yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends `event` to every client that has negotiated.
    pub fn post(&self, event: &Event) {
        log::debug!("event {event:?}");
        let mut clients = self.lock();
        if clients.is_empty() {
            return;
        }
        let stamped = Stamped { event, timestamp: Timestamp::now() };
        let line: Arc<[u8]> = match wire::line(&stamped) {
            Ok(line) => line.into(),
            Err(error) => {
                log::error!("an event has no JSON form: {error}: {event:?}");
                return;
            }
        };
        for client in clients.iter() {
            client.event(&line);
        }
        clients.retain(|client| !client.is_closed());
    }

    pub(crate) fn subscribe(&self, client: &Arc<Outbox>) {
        self.lock().push(Arc::clone(client));
    }

    pub(crate) fn unsubscribe(&self, client: &Arc<Outbox>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, client));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Outbox>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_qmps_shape() {
        let event = Event::SnapshotBroken {
            name: "s1".to_owned(),
            disk: "vda".to_owned(),
            reason: "store-full".to_owned(),
            desc: "The store is full.".to_owned(),
        };
        let stamped = Stamped { event: &event, timestamp: Timestamp { seconds: 1, microseconds: 2 } };
        let expected = r#"{"event":"SNAPSHOT_BROKEN","data":{"name":"s1","disk":"vda","reason":"store-full","desc":"The store is full."},"timestamp":{"seconds":1,"microseconds":2}}"#;
        assert_eq!(serde_json::to_string(&stamped).unwrap(), expected);
        assert_eq!(serde_json::from_str::<Event>(expected).unwrap(), event);
    }

    #[test]
    fn members_of_events_are_kebab_case() {
        let event = Event::SnapshotCreated {
            name: "s".to_owned(),
            disks: vec![SnapshotPoint { disk: "d".to_owned(), change_id: "g/1".to_owned(), size: 512 }],
        };
        let text = serde_json::to_string(&event).unwrap();
        assert!(text.contains(r#""change-id":"g/1""#), "{text}");
    }
}
