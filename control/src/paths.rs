//! Where the daemon's sockets are when nobody says otherwise.
//!
//! The daemon and the command line ask here, so that they agree. Absent: creation of anything.

use std::ffi::OsString;
use std::path::PathBuf;

/// Names the control socket for the command line, as `--control` does.
pub const CONTROL_VARIABLE: &str = "EBBTIDE_CONTROL";

/// The directory of the sockets: `$XDG_RUNTIME_DIR/ebbtide`, else `/run/ebbtide`.
pub fn runtime_directory() -> PathBuf {
    directory_for(std::env::var_os("XDG_RUNTIME_DIR"))
}

/// The control socket that a daemon listens on by default.
pub fn control_socket() -> PathBuf {
    runtime_directory().join("control.sock")
}

/// The NBD socket that a daemon listens on by default.
pub fn nbd_socket() -> PathBuf {
    runtime_directory().join("nbd.sock")
}

/// The control socket that a client talks to: `option` if given, else `EBBTIDE_CONTROL`, else
/// the default.
pub fn control_socket_for_client(option: Option<PathBuf>) -> PathBuf {
    option
        .or_else(|| std::env::var_os(CONTROL_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from))
        .unwrap_or_else(control_socket)
}

/// A relative `XDG_RUNTIME_DIR` is ignored, as the XDG Base Directory specification asks.
fn directory_for(xdg_runtime_dir: Option<OsString>) -> PathBuf {
    xdg_runtime_dir
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| PathBuf::from("/run"))
        .join("ebbtide")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_directory_of_the_user_comes_first() {
        let directory = directory_for(Some("/run/user/7".into()));
        assert_eq!(directory, PathBuf::from("/run/user/7/ebbtide"));
    }

    #[test]
    fn without_a_usable_one_it_is_the_systems() {
        for unusable in [None, Some("".into()), Some("some/where".into())] {
            assert_eq!(directory_for(unusable), PathBuf::from("/run/ebbtide"));
        }
    }

    #[test]
    fn an_option_beats_everything() {
        let path = PathBuf::from("/x/y.sock");
        assert_eq!(control_socket_for_client(Some(path.clone())), path);
    }
}
