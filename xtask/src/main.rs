//! Every command a developer of Portal runs: `cargo xtask <command>`.

mod build;
mod check;
mod node;
mod object;
mod steps;
mod test;
mod toolchain;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Portal's developer commands. Each builds what it needs, the eBPF toolchain included.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run all tests, or one tier of them
    Test(test::Args),
    /// Run the agent on this node, as `portal run` with the arguments given (needs root)
    Run(node::Args),
    /// Build the eBPF object and the `portal` binary
    Build(build::Args),
    /// Check format and lints, for the host and for eBPF
    Check,
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Test(args) => test::run(&args),
        Command::Run(args) => node::run(&args),
        Command::Build(args) => build::run(&args),
        Command::Check => check::run(),
    }
}
