//! The agent on this machine, as a node of a real cluster.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build;

#[derive(clap::Args)]
pub struct Args {
    /// Arguments of `portal run`, such as --kubeconfig FILE
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let portal = build::binary(true)?;
    let failure = Command::new(&portal).arg("run").args(&args.arguments).exec();
    Err(failure).with_context(|| format!("cannot run {}", portal.display()))
}
