//! Whether an image was changed while no daemon served it.
//!
//! A daemon leaves three things behind that a look at the image is compared with:
//!
//! ```text
//! the stamp        in the superblock, of a disk that was closed: length, inode, time of change
//! the sample       beside it: checksums of some grains and of the change map, and which medium it was
//! the sign of life in the map's control page, once a second while it serves: the time, and the image's time of change
//! ```
//!
//! | left as | changed, if |
//! |---|---|
//! | closed | the stamp differs ([`crate::open`]), or a sampled grain, or the medium within one boot |
//! | serving, same boot | the time of change is earlier than noted, or later than the last sign of life by more than [`note::GRACE_NS`]; after a note of quiet also if it is any other |
//! | serving, another boot | the time of change lies in this boot, in which nobody served it |
//! | any | the operator says so |
//!
//! Invariant: a daemon's own writes never count as somebody else's. Up to its end it gives signs of life, so they
//! are within the grace; and before the first one after a note of quiet the note is taken back, in a mapped word
//! that outlives the process. A clock that is set back between the last sign of life and a `kill -9` is the
//! exception: it costs a full backup, and nothing else.
//! Absent: proof. A change within the grace, one that sets the time back and hits no sampled grain, and one
//! between a `kill -9` and a stop of the host are not told.

pub(crate) mod note;
pub(crate) mod sample;

use cbt::Cells;

use crate::error::Error;
use crate::format::{DiskState, MAP_FILE, Superblock};
use crate::open::{DiskOptions, ResetReason};
use crate::storage::Storage;
use crate::tracker::{Control, Identity};
use note::GRACE_NS;
use sample::{Found, MapSum, SAMPLE_FILE};

/// What the host says that tells whether an image was changed while nobody served it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meanwhile {
    /// The time of day, in nanoseconds since 1970.
    pub now_ns: i64,
    /// When this boot of the host began, in nanoseconds since 1970, if that is known.
    pub boot_began_ns: Option<i64>,
    /// What tells the image's medium from others within one boot: the file system's id, or what a device says of
    /// itself.
    pub medium: u64,
    /// Whether the image's time of change stays as it is once all changes were answered. It does not where a
    /// cache tells a device, or another host, later.
    pub settles: bool,
    /// The operator says that the image was changed.
    pub assume_changed: bool,
}

/// Why the image, or the map, may not be as it was left.
#[derive(Debug)]
pub(crate) struct Doubt {
    /// Why the new generation begins.
    pub(crate) reason: ResetReason,
    /// A stable code for programs that look from outside.
    pub(crate) code: &'static str,
    /// The file that says so.
    pub(crate) file: &'static str,
    pub(crate) what: String,
}

impl Doubt {
    fn changed(file: &'static str, what: impl Into<String>) -> Self {
        Self { reason: ResetReason::ImageChanged, code: "image-changed", file, what: what.into() }
    }

    fn damaged(code: &'static str, file: &'static str, what: &str) -> Self {
        Self { reason: ResetReason::Damaged, code, file, what: what.to_owned() }
    }
}

/// What an image's times say, of one that is the file that was left.
pub(crate) fn by_times<C: Cells>(
    found: &Superblock,
    words: Option<&Control<C>>,
    image: &Identity,
    boot: &[u8; 16],
    boot_began_ns: Option<i64>,
) -> Option<Doubt> {
    let changed = image.mtime_ns;
    if found.state.is_closed() || found.state == DiskState::HandedOver {
        return None;
    }
    if found.boot != *boot {
        // Nobody served it in this boot: the superblock would be of it.
        let began = boot_began_ns?;
        let is_later = changed > began.saturating_add(GRACE_NS);
        return is_later.then(|| {
            Doubt::changed(crate::format::SUPERBLOCK_FILE, "the image was changed since the host was started")
        });
    }
    if found.state == DiskState::Resetting && changed == found.identity.mtime_ns {
        // The note may be of the daemon before: nothing was served yet.
        return None;
    }
    let Some(note) = words?.note(boot) else {
        return Some(Doubt::damaged("damaged-note", MAP_FILE, "the last sign of life is damaged"));
    };
    note.tells_change(changed).then(|| {
        Doubt::changed(
            MAP_FILE,
            "the image was changed after the last sign of life of the daemon that served it",
        )
    })
}

/// Looks for changes of an image that is the file that was left, and of the map of a closed disk.
///
/// # Errors
/// Those of the files. What cannot be read of the image is not compared.
pub(crate) async fn look<S: Storage>(
    io: &S,
    options: &DiskOptions<S>,
    names: &[String],
    found: &Superblock,
    words: Option<&Control<S::Cells>>,
    map: Option<(&S::File, u64)>,
) -> Result<Option<Doubt>, Error> {
    let Meanwhile { boot_began_ns, medium, assume_changed, .. } = options.meanwhile;
    if assume_changed {
        let what = "the operator says that the image was changed".to_owned();
        let file = crate::format::SUPERBLOCK_FILE;
        return Ok(Some(Doubt { reason: ResetReason::AssumedChanged, code: "assumed-changed", file, what }));
    }
    let by_times = by_times(found, words, &options.identity, &options.boot, boot_began_ns);
    if by_times.is_some() || !found.state.is_closed() {
        return Ok(by_times);
    }
    let medium = (found.boot == options.boot).then_some(medium);
    let closed = Closed { dir: &options.dir, image: &options.image, names, found, map, medium };
    closed.compare(io).await
}

/// A disk that was closed, as it is now.
pub(crate) struct Closed<'a, S: Storage> {
    pub(crate) dir: &'a S::Dir,
    pub(crate) image: &'a S::File,
    pub(crate) names: &'a [String],
    pub(crate) found: &'a Superblock,
    /// The change map and its length, if there is one.
    pub(crate) map: Option<(&'a S::File, u64)>,
    /// What the image is on, if that can be compared.
    pub(crate) medium: Option<u64>,
}

impl<S: Storage> Closed<'_, S> {
    /// Compares image and map with the sample.
    pub(crate) async fn compare(&self, io: &S) -> Result<Option<Doubt>, Error> {
        let sample = match sample::load(io, self.dir, self.names, self.found).await? {
            Found::None => return Ok(None),
            Found::Damaged => return Ok(Some(sample_damaged())),
            Found::Sample(sample) => sample,
        };
        if let Some((file, len)) = self.map {
            // There is more if a resize was cut off.
            let sum = sample::sum_of_map(io, file, len.min(sample.map_len()))?;
            if let Some(doubt) = of_map(&sample, &sum) {
                return Ok(Some(doubt));
            }
        }
        let mut differ = Differing::default();
        for (place, then) in sample.places() {
            match crate::sample::checksum(io, self.image, place).await {
                Ok(now) => differ.compare(place.at, then, now),
                Err(error) => log::debug!("the sample at byte {} is not compared: {error}", place.at),
            }
        }
        Ok(of_image(&sample, &differ, self.medium))
    }
}

pub(crate) fn sample_damaged() -> Doubt {
    Doubt::damaged("damaged-sample", SAMPLE_FILE, "it is damaged, so what it would tell is not known")
}

/// Compares the map of a closed disk with what was stamped.
pub(crate) fn of_map(sample: &sample::Sample, sum: &MapSum) -> Option<Doubt> {
    let same = sample.is_of_map(sum);
    (!same).then(|| Doubt::damaged("damaged-map", MAP_FILE, "it is not as it was when the disk was closed"))
}

/// Sampled grains that are not as they were.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Differing {
    count: u64,
    compared: u64,
    first: u64,
}

impl Differing {
    pub(crate) fn compare(&mut self, at: u64, then: u32, now: u32) {
        self.compared += 1;
        if then != now {
            if self.count == 0 {
                self.first = at;
            }
            self.count += 1;
        }
    }
}

/// Judges what was compared of the image; `medium` is the one of now, if it can be compared.
pub(crate) fn of_image(sample: &sample::Sample, differ: &Differing, medium: Option<u64>) -> Option<Doubt> {
    if medium.is_some_and(|now| now != sample.medium) {
        return Some(Doubt::changed(SAMPLE_FILE, "the image is on another medium than when it was closed"));
    }
    let Differing { count, compared, first } = *differ;
    (count > 0).then(|| {
        let what =
            format!("{count} of {compared} sampled places of the image differ, the first at byte {first}");
        Doubt::changed(SAMPLE_FILE, what)
    })
}
