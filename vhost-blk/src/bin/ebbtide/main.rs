//! The program `ebbtide`: where the doors are joined.
//!
//! `serve` puts the engine's disks behind vhost-user, NBD and control sockets; the other commands talk to
//! a daemon that does.

#![deny(unsafe_code)]

#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
mod allocator;
mod args;
mod cache;
mod catalog;
mod checkpoints;
mod cli;
#[allow(unsafe_code)]
mod descriptor;
mod disk_spec;
mod inspect;
mod maintenance;
mod moves;
mod nbd;
mod offered;
mod output;
mod overlays;
mod picture;
mod pulse;
mod resize;
mod serve;
mod service;
mod space;
mod stop;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{BackendProgram, Cli, Command, Serve, TrackerCommand};
use crate::disk_spec::DiskSpec;
use crate::serve::{FrontEnd, Plan};

fn main() -> ExitCode {
    #[cfg(target_env = "gnu")]
    allocator::bound();
    // Whatever else is said (QEMU's vhost-user.rst, "Backend program conventions").
    if std::env::args_os().any(|argument| argument == "--print-capabilities") {
        return output::end_with(&format!("{}\n", args::CAPABILITIES));
    }
    let Cli { program, command } = Cli::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_target(false)
        .init();
    let plan = match command {
        Some(Command::Serve(serve)) => plan_of_serve(serve),
        Some(Command::Check(check)) => return inspect::check(&check),
        Some(Command::Dump(dump)) => return inspect::dump(&dump),
        Some(Command::Tracker(TrackerCommand::Export { state, file })) => {
            return moves::export_left(&state, &file);
        }
        Some(Command::Tracker(TrackerCommand::CancelExport { state })) => return moves::cancel(&state),
        Some(Command::Tracker(TrackerCommand::Import { file, image, state, replace })) => {
            return moves::import(&file, &image, state, replace);
        }
        Some(other) => return cli::run(other),
        None => plan_of_program(program),
    };
    let served = plan.map_err(|error| anyhow::anyhow!(error)).and_then(serve::run);
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where that goes may be full, which is no reason to panic.
            let _ = writeln!(std::io::stderr(), "ebbtide: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn plan_of_serve(serve: Serve) -> Result<Plan, String> {
    let mut serve = serve.with_config()?;
    serve.doors.control.get_or_insert_with(control::paths::control_socket);
    serve.doors.nbd.get_or_insert_with(control::paths::nbd_socket);
    let store_limit = serve.store_limit;
    if serve.assume_changed {
        serve.disks.iter_mut().for_each(|disk| disk.assume_changed = true);
    }
    Ok(Plan { disks: serve.disks, doors: serve.doors, front_end: FrontEnd::Sockets, store_limit })
}

/// A front end that starts its own back ends gets one disk and no other doors unless it says so: several
/// such programs would be in each other's way.
fn plan_of_program(program: BackendProgram) -> Result<Plan, String> {
    let Some(image) = &program.blk_file else {
        return Err(
            "no disk to serve: say --blk-file with --socket-path or --fd, or see 'ebbtide --help'".into()
        );
    };
    let front_end = match (&program.socket_path, program.fd) {
        (Some(_), None) => FrontEnd::Sockets,
        (None, Some(number)) => match descriptor::take(number) {
            Some(socket) => FrontEnd::of(socket)?,
            None => return Err(format!("--fd {number}: there is no such open descriptor")),
        },
        _ => return Err("say where the front end is: --socket-path or --fd, one of the two".into()),
    };
    let disk = DiskSpec::plain(image, program.socket_path.clone(), program.read_only)?;
    Ok(Plan { disks: vec![disk], doors: program.doors, front_end, store_limit: None })
}

/// Starts a named thread.
fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body)
}
