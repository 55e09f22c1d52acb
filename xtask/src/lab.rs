//! The lab: builds all it needs, then runs proxy-user's example `lab`.

use anyhow::Result;

use crate::build::{self, OBJECT_VARIABLE};
use crate::steps::{cargo, openly, target};

#[derive(clap::Args)]
pub struct Args {
    /// How the pods of a node are connected: one of bridge and routed
    #[arg(long, default_value = "bridge")]
    cni: String,

    /// Leave the lab up at the end and print commands to look around
    #[arg(long)]
    hold: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let object = build::ebpf_object()?;
    eprintln!("  building portal and the lab (minutes at the first time)");
    let mut build = cargo();
    build.args(["build", "--quiet", "--package", "proxy-user", "--features", "testing"]);
    build.args(["--bin", "portal", "--example", "lab"]);
    openly(build.env(OBJECT_VARIABLE, object))?;
    let mut lab = std::process::Command::new(target().join("debug/examples/lab"));
    lab.args(["--cni", &args.cni]).arg("--portal").arg(target().join("debug/portal"));
    if args.hold {
        lab.arg("--hold");
    }
    openly(&mut lab)
}
