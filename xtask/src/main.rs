//! Every command a developer of Portal runs: `cargo xtask <command>`.

mod apt;
mod bench;
mod build;
mod check;
mod fuzz;
mod lab;
mod node;
mod object;
mod steps;
mod test;
mod toolchain;
mod vm;

use std::process::ExitCode;

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
    /// Show Portal at work: two nodes in network namespaces, a Service, real packets (needs root)
    Lab(lab::Args),
    /// Run all tests, or one tier of them
    Test(test::Args),
    /// Run the agent on this node, as `portal run` with the arguments given (needs root)
    Run(node::Args),
    /// Build the eBPF object and the `portal` binary
    Build(build::Args),
    /// Run the kernel tier and a network scene on other kernels: Debian's, in qemu
    Vm(vm::Args),
    /// Measure connections, requests, datagrams and bulk through Portal and beside it (needs root)
    Bench(bench::Args),
    /// Search for packets that do not become what a model of a NAT says
    Fuzz(fuzz::Args),
    /// Check format and lints, for the host and for eBPF
    Check,
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Lab(args) => lab::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Run(args) => node::run(&args),
        Command::Build(args) => build::run(&args),
        Command::Vm(args) => vm::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Check => check::run(),
    }
}
