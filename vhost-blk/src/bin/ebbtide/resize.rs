//! `block_resize`: what can be checked on the host before the engine gives a disk another size.

use control::CommandError;
use control::commands::{BlockResize, BlockResized};
use control::service::{Answer, reason};
use cow_engine::group::{Admin, GATE_DEADLINE};

use crate::serve::Served;
use crate::service::on_ring;

/// Bytes of the change map for each tracked block.
const CELL_BYTES: u64 = 4;

/// Gives a disk another size and tells its front end.
pub(crate) fn resize(served: &Served, admin: &mut Admin, wanted: &BlockResize) -> Answer<BlockResized> {
    let (disk, name, size) = (&served.disk, &wanted.disk, wanted.size);
    let block = u64::from(served.spec.logical_block_bytes);
    if served.spec.read_only {
        let text = format!("Disk '{name}' is served for reading only and keeps its size");
        return Err(CommandError::generic(reason::READ_ONLY, text));
    }
    if !size.is_multiple_of(block) {
        let text = format!("{size} bytes are no whole number of logical blocks of {block} bytes");
        return Err(CommandError::generic(reason::BAD_ARGUMENT, text));
    }
    check_room(served, size)?;
    let before = disk.capacity();
    let done = on_ring(async |io| match wanted.shrink {
        true => disk.shrink(admin, &io, size, GATE_DEADLINE).await,
        false => disk.resize(admin, &io, size).await,
    });
    // Also after an error: the image may be cut by then.
    let announced = before != disk.capacity() && served.device.announce_size();
    done?;
    log::info!("{name}: resized from {before} to {size} bytes");
    Ok(BlockResized { disk: name.clone(), size, announced })
}

/// Refuses a size whose change map would fill the file system that the snapshots are on too.
fn check_room(served: &Served, size: u64) -> Answer<()> {
    let Some(grid) = served.disk.tracker_grid() else { return Ok(()) };
    let map_bytes = |size: u64| grid.count(size).saturating_mul(CELL_BYTES);
    let more = map_bytes(size).saturating_sub(map_bytes(served.disk.capacity()));
    let room = rustix::fs::statvfs(&served.state).map_err(|error| {
        let text = format!("Cannot ask for the free space of {}: {error}", served.state.display());
        CommandError::generic(reason::IO, text)
    })?;
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    if more <= free {
        return Ok(());
    }
    let text = format!(
        "The change map of a disk of {size} bytes would take {more} bytes more, and {} has {free} left",
        served.state.display()
    );
    Err(CommandError::generic(reason::IO, text))
}
