//! What the operator says of one disk, on the command line or in a file, and what it means.
//!
//! Invariant: both forms go through one table of keys, so neither can know a key or a value that the
//! other does not. Absent: opening anything.

use std::path::{Path, PathBuf};

use cow_engine::cbt::BlockGrid;

/// Bytes of a tracked block unless said otherwise.
const DEFAULT_BLOCK_BYTES: u64 = 64 << 10;

/// Queues offered unless said otherwise: QEMU asks for one per processor and refuses fewer.
const DEFAULT_QUEUES: u16 = 64;

/// One disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    /// Name by which verbs and exports know it.
    pub(crate) name: String,
    /// The image, a file or a block device.
    pub(crate) path: PathBuf,
    /// The vhost-user socket to listen on; none if the front end comes by descriptor.
    pub(crate) socket: Option<PathBuf>,
    /// The state directory; beside the image if not said.
    pub(crate) state: Option<PathBuf>,
    pub(crate) queues: u16,
    pub(crate) read_only: bool,
    pub(crate) serial: Option<String>,
    pub(crate) logical_block_bytes: u32,
    pub(crate) writeback: bool,
    pub(crate) discard: bool,
    pub(crate) direct: bool,
    pub(crate) tracking: Option<BlockGrid>,
}

/// A disk while its keys are being read.
#[derive(Default)]
pub(crate) struct Keys {
    pairs: Vec<(String, String)>,
}

/// Every key, with what it takes, for error texts.
const KEYS: [(&str, &str); 13] = [
    ("name", "a name"),
    ("path", "an image file or block device"),
    ("socket", "a path"),
    ("state", "a directory"),
    ("queues", "1 to 64"),
    ("read-only", "on or off"),
    ("serial", "up to 20 ASCII characters"),
    ("logical-block-size", "512 or 4096"),
    ("cache", "writeback or writethrough"),
    ("discard", "unmap or ignore"),
    ("direct", "on or off"),
    ("tracking", "on or off"),
    ("block-size", "a power of two from 4K to 64M"),
];

impl Keys {
    /// Reads `key=value,key=value,…`; a comma in a value is written twice, a switch needs no value.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Self::default();
        let mut parts: Vec<String> = vec![String::new()];
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.next() {
            match (c, parts.last_mut()) {
                (',', Some(last)) if rest.peek() == Some(&',') => {
                    rest.next();
                    last.push(',');
                }
                (',', _) => parts.push(String::new()),
                (c, Some(last)) => last.push(c),
                (_, None) => {}
            }
        }
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part.as_str(), "on"));
            keys.set(key, value.to_owned())?;
        }
        Ok(keys)
    }

    /// Reads a table of a configuration file.
    pub(crate) fn from_table(table: &toml::Table) -> Result<Self, String> {
        let mut keys = Self::default();
        for (key, value) in table {
            let value = match value {
                toml::Value::String(text) => text.clone(),
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(true) => "on".to_owned(),
                toml::Value::Boolean(false) => "off".to_owned(),
                other => return Err(format!("{key}: a {} is not understood here", other.type_str())),
            };
            keys.set(key, value)?;
        }
        Ok(keys)
    }

    fn set(&mut self, key: &str, value: String) -> Result<(), String> {
        if !KEYS.iter().any(|(known, _)| *known == key) {
            let known: Vec<_> = KEYS.iter().map(|(key, _)| *key).collect();
            return Err(format!("there is no key '{key}' of a disk; there are {}", known.join(", ")));
        }
        if self.get(key).is_some() {
            return Err(format!("{key} is said twice"));
        }
        self.pairs.push((key.to_owned(), value));
        Ok(())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(held, _)| held == key).map(|(_, value)| value.as_str())
    }

    /// The value of `key` through `read`, or `default` if it is not said.
    fn value<T>(&self, key: &str, default: T, read: impl Fn(&str) -> Option<T>) -> Result<T, String> {
        let Some(text) = self.get(key) else { return Ok(default) };
        let wanted = KEYS.iter().find(|(known, _)| *known == key).map_or("", |(_, wanted)| wanted);
        read(text).ok_or_else(|| format!("{key}={text}: {key} is {wanted}"))
    }

    /// The disk that the keys describe.
    pub(crate) fn finish(self) -> Result<DiskSpec, String> {
        let needed = |key: &str| match self.get(key) {
            Some("") | None => Err(format!("{key} is missing: a disk needs name=, path= and socket=")),
            Some(value) => Ok(value.to_owned()),
        };
        let name = needed("name")?;
        control::commands::check_name("name", &name).map_err(|error| error.desc)?;
        let path = PathBuf::from(needed("path")?);
        let socket = PathBuf::from(needed("socket")?);
        let tracking = self.value("tracking", true, switch)?;
        let block = self.value("block-size", DEFAULT_BLOCK_BYTES, size)?;
        let grid = BlockGrid::new(block).map_err(|error| format!("block-size: {error}"))?;
        Ok(DiskSpec {
            socket: Some(socket),
            state: self.get("state").map(PathBuf::from),
            queues: self.value("queues", DEFAULT_QUEUES, |text| {
                text.parse().ok().filter(|queues| (1..=DEFAULT_QUEUES).contains(queues))
            })?,
            read_only: self.value("read-only", false, switch)?,
            serial: self.value("serial", None, |text| {
                let fits = text.len() <= 20 && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
                fits.then(|| Some(text.to_owned()))
            })?,
            logical_block_bytes: self.value("logical-block-size", 512, |text| {
                text.parse().ok().filter(|size| [512, 4096].contains(size))
            })?,
            writeback: self.value("cache", true, |text| match text {
                "writeback" => Some(true),
                "writethrough" => Some(false),
                _ => None,
            })?,
            discard: self.value("discard", true, |text| match text {
                "unmap" => Some(true),
                "ignore" => Some(false),
                _ => None,
            })?,
            direct: self.value("direct", true, switch)?,
            tracking: tracking.then_some(grid),
            name,
            path,
        })
    }
}

impl DiskSpec {
    /// A disk with everything else as it is by default; for a front end that names only the image.
    pub(crate) fn plain(path: &Path, socket: Option<PathBuf>, read_only: bool) -> Result<Self, String> {
        let grid = BlockGrid::new(DEFAULT_BLOCK_BYTES).map_err(|error| error.to_string())?;
        Ok(Self {
            name: "disk0".to_owned(),
            path: path.to_owned(),
            socket,
            state: None,
            queues: DEFAULT_QUEUES,
            read_only,
            serial: None,
            logical_block_bytes: 512,
            writeback: true,
            discard: true,
            direct: true,
            tracking: Some(grid),
        })
    }
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "true" => Some(true),
        "off" | "false" => Some(false),
        _ => None,
    }
}

/// A number of bytes, with K or M for powers of 1024.
fn size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1 << 10),
        b'm' | b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<DiskSpec, String> {
        Keys::parse(text)?.finish()
    }

    #[test]
    fn a_disk_needs_three_keys_only() {
        let disk = spec("name=vda,path=a.img,socket=a.sock").unwrap();
        assert_eq!((disk.queues, disk.read_only, disk.writeback), (64, false, true));
        assert_eq!(disk.tracking.map(BlockGrid::bytes), Some(65536));
    }

    #[test]
    fn commas_in_values_are_doubled_and_switches_stand_alone() {
        let disk = spec("name=vda,path=a,,b.img,socket=s,read-only,block-size=1M").unwrap();
        assert_eq!(disk.path, Path::new("a,b.img"));
        assert!(disk.read_only);
        assert_eq!(disk.tracking.map(BlockGrid::bytes), Some(1 << 20));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, mention) in [
            ("name=vda,path=a", "socket"),
            ("name=vda,path=a,socket=s,colour=red", "colour"),
            ("name=vda,path=a,socket=s,queues=0", "queues=0"),
            ("name=vda,path=a,socket=s,queues=65", "1 to 64"),
            ("name=vda,path=a,socket=s,logical-block-size=1000", "512 or 4096"),
            ("name=vda,path=a,socket=s,cache=none", "writethrough"),
            ("name=vda,path=a,socket=s,block-size=3K", "power of two"),
            ("name=vda,path=a,socket=s,serial=123456789012345678901", "20"),
            ("name=vda,name=vdb,path=a,socket=s", "twice"),
            ("name=a/b,path=a,socket=s", "name"),
        ] {
            let error = spec(text).unwrap_err();
            assert!(error.contains(mention), "{text}: {error}");
        }
    }

    #[test]
    fn a_table_says_the_same_as_a_text() {
        let table: toml::Table =
            "name = 'vda'\npath = 'a.img'\nsocket = 's'\nqueues = 4\nread-only = true".parse().unwrap();
        let text = spec("name=vda,path=a.img,socket=s,queues=4,read-only").unwrap();
        assert_eq!(Keys::from_table(&table).unwrap().finish(), Ok(text));
    }
}
