//! The lab: builds all it needs, then runs proxy-user's example `lab`.

use std::process::Command;

use anyhow::Result;

use crate::build::{self, OBJECT_VARIABLE};
use crate::steps::{cargo, openly, quietly, target};

#[derive(clap::Args)]
pub struct Args {
    /// How the pods of a node are connected: bridge or routed
    #[arg(long, default_value = "bridge", value_parser = ["bridge", "routed"])]
    cni: String,

    /// Leave the lab up at the end and print commands to look around
    #[arg(long)]
    hold: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let object = build::ebpf_object()?;
    let mut build = cargo();
    build.args(["build", "--quiet", "--package", "proxy-user", "--features", "testing"]);
    build.args(["--bin", "portal", "--bin", "portal-probe", "--example", "lab"]);
    build.env(OBJECT_VARIABLE, object);
    quietly("building portal and the lab", "2 min at the first time", &mut build)?;
    let programs = target().join("debug");
    let mut lab = Command::new(programs.join("examples/lab"));
    lab.args(["--cni", &args.cni]).arg("--programs").arg(programs);
    if args.hold {
        lab.arg("--hold");
    }
    openly(&mut lab)
}
