//! Pictures of a disk by the age of its last changes: in the terminal, as a PNG, and the busiest regions.
//!
//! A cell has the colour of its newest block. Ages are counted in instants: 0 is what changed since the last
//! snapshot, 1 what changed between that and the one before, and so on.
//! Absent: what an age is in hours, which the map does not know.

mod font;
mod png;
mod terminal;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use anyhow::anyhow;
use control::commands::{CellCount, ChangeMap, ChangedCell, RECENT_EPOCHS};
use control::render::size;

use crate::args::Picture;

/// The first bytes of every PNG.
const PNG_BEGINS: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// Cells that a PNG is made of at most, and the list of regions.
const PNG_CELLS: usize = 8_192;
const TOP_CELLS: usize = 4_096;

/// Ages that are told apart, from the first to the last of each, the newest first.
const AGES: [(u64, u64); 6] =
    [(0, 0), (1, 1), (2, 2), (3, 4), (5, RECENT_EPOCHS as u64 - 1), (RECENT_EPOCHS as u64, u64::MAX)];

/// How many cells the picture needs.
pub(crate) fn cells(picture: &Picture) -> CellCount {
    let png = picture.png.as_ref().map_or(0, |_| PNG_CELLS);
    let top = picture.top.map_or(0, |_| TOP_CELLS);
    let map = if picture.map { terminal::Screen::of_stdout().cells() } else { 0 };
    CellCount::near(png.max(top).max(map))
}

/// Draws everything that is wanted; what belongs on the standard output is answered.
///
/// # Errors
/// If the PNG cannot be written.
pub(crate) fn draw(map: &ChangeMap, picture: &Picture) -> anyhow::Result<String> {
    let mut text = String::new();
    if picture.map {
        text += &terminal::draw(map, terminal::Screen::of_stdout());
    }
    if let Some(count) = picture.top {
        if picture.map {
            text.push('\n');
        }
        text += &top(map, count);
    }
    if let Some(path) = &picture.png {
        write_png(map, path)?;
        if text.is_empty() {
            text = format!("{}\n", path.display());
        }
    }
    Ok(text)
}

fn write_png(map: &ChangeMap, path: &Path) -> anyhow::Result<()> {
    let bytes = png::draw(map).map_err(|error| anyhow!("cannot make a PNG: {error}"))?;
    let written = open_picture(path).and_then(|mut file| file.write_all(&bytes));
    written.map_err(|error| anyhow!("cannot write {}: {error}", path.display()))
}

/// Opens a file to be written from its beginning, if nothing is lost by that.
///
/// Whoever mistypes the name of a disk's image must not lose the disk: what is replaced is empty or a PNG.
fn open_picture(path: &Path) -> std::io::Result<File> {
    let there = match std::fs::metadata(path) {
        Ok(metadata) => metadata.is_file() || metadata.file_type().is_block_device(),
        Err(_) => false,
    };
    if there {
        let mut begins = Vec::new();
        File::open(path)?.take(PNG_BEGINS.len() as u64).read_to_end(&mut begins)?;
        if !begins.is_empty() && begins != PNG_BEGINS {
            return Err(std::io::Error::other("it is there already, and no PNG"));
        }
    }
    File::create(path)
}

/// Which of [`AGES`] a newest epoch is of.
fn age_of(map: &ChangeMap, newest: u64) -> usize {
    let age = map.epoch.saturating_sub(newest);
    AGES.iter().position(|(first, last)| (*first..=*last).contains(&age)).unwrap_or(AGES.len() - 1)
}

/// What an age is, in words.
fn words(map: &ChangeMap, age: usize) -> String {
    let (first, last) = AGES[age];
    let end = map.epoch.saturating_sub(first);
    let named = |epoch: u64| map.snapshots.iter().find(|one| one.epoch == epoch).map(|one| one.name.as_str());
    if first == 0 {
        let since = end.saturating_sub(1);
        return match named(since) {
            _ if since == 0 => "since tracking began".to_owned(),
            Some(name) => format!("since {name}"),
            None => "since the last snapshot".to_owned(),
        };
    }
    let ago = match (first, last) {
        (1, 1) => "1 snapshot ago".to_owned(),
        (first, u64::MAX) => format!("{first} or more ago"),
        (first, last) if first == last => format!("{first} snapshots ago"),
        (first, last) => format!("{first} to {last} ago"),
    };
    named(end).map_or(ago.clone(), |name| format!("{ago}, before {name}"))
}

/// Bytes that changed last at each of the ages, as far as the map tells.
fn bytes_by_age(map: &ChangeMap) -> [u64; AGES.len()] {
    let mut bytes = [0_u64; AGES.len()];
    for cell in &map.changed {
        let mut older = cell.blocks;
        for (age, blocks) in (0..).zip(&cell.recent) {
            let at = AGES.iter().position(|(first, last)| (*first..=*last).contains(&age)).unwrap_or(0);
            bytes[at] = bytes[at].saturating_add(blocks.saturating_mul(map.block_size));
            older = older.saturating_sub(*blocks);
        }
        let last = &mut bytes[AGES.len() - 1];
        *last = last.saturating_add(older.saturating_mul(map.block_size));
    }
    bytes.map(|bytes| bytes.min(map.size))
}

/// A line that says what is drawn.
fn title(map: &ChangeMap) -> String {
    let changed: u64 = bytes_by_age(map).iter().sum();
    let about = if map.exact { "" } else { "about " };
    let (disk, all) = (printable(&map.disk), size(map.size));
    format!("{disk}, {all}: {about}{} changed since tracking began", size(changed.min(map.size)))
}

/// Cells joined so that there are at most `count`: which age, if any, and how much of each has changed, as a share.
struct Joined {
    cells: Vec<Option<(usize, f64)>>,
    /// Bytes of one.
    bytes: u64,
}

fn join(map: &ChangeMap, count: usize) -> Joined {
    let cells = usize::try_from(map.cells).unwrap_or(1).clamp(1, usize::from(u16::MAX));
    let factor = cells.div_ceil(count.max(1));
    let bytes = map.cell_size.saturating_mul(factor as u64);
    let mut newest = vec![(0_u64, 0_u64); cells.div_ceil(factor)];
    for cell in &map.changed {
        let at = usize::try_from(cell.cell).unwrap_or(usize::MAX) / factor;
        if let Some((epoch, blocks)) = newest.get_mut(at) {
            (*epoch, *blocks) = ((*epoch).max(cell.newest), blocks.saturating_add(cell.blocks));
        }
    }
    let share = |at: usize, blocks: u64| {
        let whole = map.size.saturating_sub(at as u64 * bytes).min(bytes).max(1);
        (blocks.saturating_mul(map.block_size) as f64 / whole as f64).clamp(0.0, 1.0)
    };
    let cells = newest
        .iter()
        .enumerate()
        .map(|(at, (epoch, blocks))| (*blocks > 0).then(|| (age_of(map, *epoch), share(at, *blocks))));
    Joined { cells: cells.collect(), bytes }
}

/// The regions in which most blocks changed since the instant in question.
fn top(map: &ChangeMap, count: usize) -> String {
    let mut busy: Vec<&ChangedCell> = map.changed.iter().filter(|cell| cell.blocks_since > 0).collect();
    busy.sort_by_key(|cell| {
        std::cmp::Reverse((cell.blocks_since, cell.newest, std::cmp::Reverse(cell.cell)))
    });
    let about = if map.exact { "" } else { ", estimated" };
    let since = since_words(map);
    if busy.is_empty() {
        return format!("nothing has changed on {} {since}\n", printable(&map.disk));
    }
    let mut text = format!(
        "Busiest regions of {}: most blocks changed {since}{about}, regions of {}, blocks of {}\n",
        printable(&map.disk),
        size(map.cell_size),
        size(map.block_size)
    );
    text += &format!(
        "{:>16}  {:>10}  {:>10}  {:>5}  {}\n",
        "OFFSET", "LENGTH", "CHANGED", "SHARE", "LAST CHANGE"
    );
    for cell in busy.into_iter().take(count) {
        let at = cell.cell.saturating_mul(map.cell_size);
        let len = map.size.saturating_sub(at).min(map.cell_size);
        let changed = cell.blocks_since.saturating_mul(map.block_size).min(len);
        let share = changed.saturating_mul(100) / len.max(1);
        let last = words(map, age_of(map, cell.newest));
        text += &format!(
            "{at:>16}  {:>10}  {:>10}  {share:>3} %  {}\n",
            size(len),
            size(changed),
            printable(&last)
        );
    }
    text
}

/// The instant since which blocks were counted.
fn since_words(map: &ChangeMap) -> String {
    let epoch = map.since.rsplit('/').next().and_then(|text| text.parse::<u64>().ok());
    let named = epoch.and_then(|epoch| map.snapshots.iter().find(|one| one.epoch == epoch));
    match (epoch, named) {
        (Some(0), _) => "since tracking began".to_owned(),
        (_, Some(one)) => format!("since {}", printable(&one.name)),
        _ => format!("since {}", printable(&map.since)),
    }
}

/// A text without what would steer a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use control::commands::MapInstant;

    use super::*;

    /// Ten epochs; the cells are of all ages.
    pub(super) fn example(cells: u64) -> ChangeMap {
        let cell = |cell: u64| {
            let newest = 1 + cell % 10;
            let mut recent = vec![0; RECENT_EPOCHS];
            if let Some(count) = usize::try_from(10 - newest).ok().and_then(|age| recent.get_mut(age)) {
                *count = 1 + cell % 16;
            }
            ChangedCell { cell, newest, blocks: 1 + cell % 16, blocks_since: u64::from(newest == 10), recent }
        };
        ChangeMap {
            disk: "vda".to_owned(),
            size: cells << 20,
            block_size: 64 << 10,
            change_id: "6f9619ff-8b86-4011-b42d-00c04fc964ff/9".to_owned(),
            epoch: 10,
            since: "6f9619ff-8b86-4011-b42d-00c04fc964ff/9".to_owned(),
            cells,
            cell_size: 1 << 20,
            snapshots: vec![MapInstant { name: "tuesday".to_owned(), epoch: 9 }],
            changed: (0..cells).filter(|n| n % 3 != 0).map(cell).collect(),
            exact: true,
        }
    }

    #[test]
    fn ages_have_words_and_names_where_there_are_some() {
        let map = example(100);
        assert_eq!(words(&map, 0), "since tuesday");
        assert_eq!(words(&map, 1), "1 snapshot ago, before tuesday");
        assert_eq!(words(&map, 3), "3 to 4 ago");
        assert_eq!(words(&map, 5), "8 or more ago");
        assert_eq!(words(&ChangeMap { epoch: 1, ..map.clone() }, 0), "since tracking began");
        assert_eq!(
            [10, 9, 8, 7, 6, 5, 3, 2, 1].map(|newest| age_of(&map, newest)),
            [0, 1, 2, 3, 3, 4, 4, 5, 5]
        );
    }

    #[test]
    fn joined_cells_have_the_newest_age() {
        let map = example(100);
        let joined = join(&map, 30);
        assert_eq!((joined.cells.len(), joined.bytes), (25, 4 << 20));
        // Of 0 to 3 the newest is 2, of epoch 3.
        assert_eq!(joined.cells[0].map(|(age, _)| age), Some(age_of(&map, 3)));
        assert!(join(&map, 1000).cells[0].is_none());
    }

    #[test]
    fn the_busiest_regions_come_first() {
        let map = example(100);
        let text = top(&map, 3);
        assert_eq!(text.lines().count(), 5);
        assert!(text.contains("since tuesday") && text.contains(&(19_u64 << 20).to_string()), "{text}");
        let quiet = ChangeMap { changed: Vec::new(), ..map };
        assert_eq!(top(&quiet, 3), "nothing has changed on vda since tuesday\n");
    }

    #[test]
    fn what_a_daemon_answers_cannot_harm() {
        let odd = ChangeMap {
            disk: "\u{1b}[2J".to_owned(),
            cells: u64::MAX,
            cell_size: u64::MAX,
            size: u64::MAX,
            block_size: u64::MAX,
            changed: vec![ChangedCell {
                cell: u64::MAX,
                newest: u64::MAX,
                blocks: u64::MAX,
                ..Default::default()
            }],
            ..example(10)
        };
        let screen = terminal::Screen { width: 80, colour: false };
        let text = terminal::draw(&odd, screen) + &top(&odd, 5);
        assert!(!text.contains('\u{1b}'));
        png::draw(&odd).unwrap();
        png::draw(&ChangeMap::default()).unwrap();
        terminal::draw(&ChangeMap::default(), screen);
    }
}
