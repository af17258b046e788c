//! What the operator says of one disk, on the command line or in a file, and what it means.
//!
//! Invariant: both forms go through one table of keys, so neither can know a key or a value that the
//! other does not. Absent: opening anything.

use std::path::{Path, PathBuf};

use cow_engine::AreaSpec;
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
    /// Where old content is kept; in the state directory if there is none.
    pub(crate) store: Vec<AreaSpec>,
    /// Bytes of old content of all its snapshots, if there is a limit.
    pub(crate) store_limit: Option<u64>,
    /// Seconds before its store is full at which that is told.
    pub(crate) low_space: u64,
    /// The image was changed while nobody served it, whatever it looks like.
    pub(crate) assume_changed: bool,
}

/// A disk while its keys are being read.
#[derive(Default)]
pub(crate) struct Keys {
    pairs: Vec<(String, String)>,
}

/// What `store=` takes.
const STORE_HELP: &str =
    "a directory, a file or a block device, with :SIZE of at least 1M behind it if it is not to grow";

/// Seconds before a store is full at which that is told, unless said otherwise.
const LOW_SPACE: u64 = 60;

/// Every key, with what it takes, for error texts.
const KEYS: [(&str, &str); 17] = [
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
    ("store", STORE_HELP),
    ("store-limit", "bytes, such as 10G"),
    ("low-space", "seconds, 0 to 86400"),
    ("assume-changed", "on or off"),
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
            if let (toml::Value::Array(values), "store") = (value, key.as_str()) {
                for value in values {
                    let text = value.as_str().ok_or("store: a list of texts in quotes is understood here")?;
                    keys.set(key, text.to_owned())?;
                }
                continue;
            }
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
        if self.get(key).is_some() && key != "store" {
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

    /// The areas that were named, in their order.
    fn areas(&self) -> Result<Vec<AreaSpec>, String> {
        let named = self.pairs.iter().filter(|(key, _)| key == "store");
        named.map(|(_, text)| area(text).map_err(|why| format!("store={text}: {why}"))).collect()
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
            store: self.areas()?,
            store_limit: self
                .value("store-limit", None, |text| size(text).filter(|limit| *limit > 0).map(Some))?,
            low_space: self.value("low-space", LOW_SPACE, |text| {
                text.parse().ok().filter(|seconds| *seconds <= 86_400)
            })?,
            assume_changed: self.value("assume-changed", false, switch)?,
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
            store: Vec::new(),
            store_limit: None,
            low_space: LOW_SPACE,
            assume_changed: false,
        })
    }
}

/// `PATH` or `PATH:SIZE`; a path that ends like a size has a colon more behind it.
fn area(text: &str) -> Result<AreaSpec, String> {
    let (path, bytes) = match text.rsplit_once(':') {
        Some((path, "")) => (path, None),
        Some((path, tail)) if size(tail).is_some() => (path, size(tail)),
        _ => (text, None),
    };
    if path.is_empty() || bytes.is_some_and(|bytes| bytes < 1 << 20) {
        return Err(format!("store is {STORE_HELP}"));
    }
    let path = std::path::absolute(path).map_err(|error| error.to_string())?;
    let path = path.to_str().ok_or("the path is no UTF-8")?.to_owned();
    Ok(AreaSpec { path, bytes })
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "true" => Some(true),
        "off" | "false" => Some(false),
        _ => None,
    }
}

/// A number of bytes, with K, M, G or T for powers of 1024.
pub(crate) fn size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1 << 10),
        b'm' | b'M' => (&text[..text.len() - 1], 1 << 20),
        b'g' | b'G' => (&text[..text.len() - 1], 1 << 30),
        b't' | b'T' => (&text[..text.len() - 1], 1 << 40),
        _ => (text, 1_u64),
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
    fn areas_are_named_one_by_one() {
        let disk = spec("name=vda,path=a,socket=s,store=/x,store=/y:2G,store=/z:10:,store-limit=1T").unwrap();
        let areas: Vec<_> = disk.store.iter().map(|one| (one.path.as_str(), one.bytes)).collect();
        assert_eq!(areas, [("/x", None), ("/y", Some(2 << 30)), ("/z:10", None)]);
        assert_eq!(disk.store_limit, Some(1 << 40));
        assert!(spec("name=vda,path=a,socket=s,store=/x:4096").unwrap_err().contains("1M"));
        let table: toml::Table = "name='vda'\npath='a'\nsocket='s'\nstore=['/x', '/y:2G']".parse().unwrap();
        let table = Keys::from_table(&table).unwrap().finish().unwrap();
        assert_eq!(table.store[1], AreaSpec { path: "/y".into(), bytes: Some(2 << 30) });
    }

    #[test]
    fn a_table_says_the_same_as_a_text() {
        let table: toml::Table =
            "name = 'vda'\npath = 'a.img'\nsocket = 's'\nqueues = 4\nread-only = true".parse().unwrap();
        let text = spec("name=vda,path=a.img,socket=s,queues=4,read-only").unwrap();
        assert_eq!(Keys::from_table(&table).unwrap().finish(), Ok(text));
    }
}
