//! The lab: one Service, four pods, two nodes, real packets. Run it with `cargo xtask lab`.
//!
//! Everything lives in network namespaces of its own; nothing reaches the machine's network, and
//! nothing stays behind.

mod scenes;
mod show;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use portal::testing::world;

use scenes::{changes, from_outside, from_the_node, one_connection, spread, udp};
use show::{Show, title, wait};
use stage::Stage;

/// Shows Portal at work: a Service, four pods, two nodes, real packets.
#[derive(Parser)]
struct Args {
    /// How the pods of a node are connected
    #[arg(long, value_enum, default_value = "bridge")]
    cni: Cni,

    /// Leave the lab up at the end and print commands to look around
    #[arg(long)]
    hold: bool,

    /// The folder with the programs `portal` and `portal-probe`
    #[arg(long)]
    programs: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Cni {
    /// As ports of a bridge, as docker0 and cni0 do it
    Bridge,
    /// Each by a link and a host route, as Calico does it
    Routed,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let (cni, shape) = match args.cni {
        Cni::Bridge => (world::Cni::Bridge, "bridge"),
        Cni::Routed => (world::Cni::Routed, "routed"),
    };
    let started = Instant::now();
    let mut show = Show::default();
    title(
        &format!("Portal's lab: a Service in the kernel ({shape} pods)"),
        "Two nodes, an agent on each, four web pods, one client. All in network namespaces.",
    );
    let mut stage = Stage::build(cni, &args.programs);
    stage.introduce();
    one_connection(&stage, &mut show);
    spread(&stage, &mut show);
    changes(&mut stage, &mut show);
    from_the_node(&stage, &mut show);
    from_outside(&stage, &mut show);
    udp(&mut stage, &mut show);
    if args.hold {
        stage.invite();
        wait();
    }
    stage.tear_down(&mut show);
    if show.curtain(started.elapsed()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
