//! The command line: `portal run` and what looks at a running datapath.

mod list;
mod run;
mod table;

use std::path::PathBuf;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

/// Portal, a service load balancer for Kubernetes in eBPF: it replaces kube-proxy on any CNI.
///
/// `portal run` is the agent of a node. The other commands read the maps that it pins under
/// --bpffs-root, so they work whether it runs or not.
#[derive(Parser)]
#[command(name = "portal", version, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent of this node: follow the cluster, keep the kernel in step
    Run(Box<run::Args>),
    /// List Service ports: their VIPs and how many backends they have
    #[command(visible_aliases = ["service", "svc"])]
    Services(list::Args),
    /// List backends: the endpoints behind each Service port
    #[command(visible_aliases = ["backend", "endpoints"])]
    Backends(list::Args),
    /// List flows: who talks to which backend through which VIP
    #[command(visible_alias = "flow")]
    Flows(list::Args),
    /// Remove Portal from this node: programs, maps and pins
    Cleanup(Place),
    /// Print the version, and that of the contract between agent and kernel
    Version,
    /// Print a completion script for a shell, to be sourced by it
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Where the datapath is.
#[derive(clap::Args, Clone)]
pub struct Place {
    /// The folder for pinned maps and links, on a BPF file system
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/portal")]
    bpffs_root: PathBuf,
}

/// Parses the command line and does what it says.
///
/// # Errors
/// Says what went wrong and what to do.
pub fn main() -> Result<()> {
    match Args::parse().command {
        Command::Run(args) => args.run(),
        Command::Services(args) => list::services(&args),
        Command::Backends(args) => list::backends(&args),
        Command::Flows(args) => list::flows(&args),
        Command::Cleanup(place) => {
            crate::kernel::cleanup(&place.bpffs_root)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(crate::catch_all::remove(&place.bpffs_root))
        }
        Command::Version => {
            let object = if crate::kernel::has_object() { "inside" } else { "absent" };
            println!(
                "portal {} (contract {}, eBPF object {object})",
                env!("CARGO_PKG_VERSION"),
                proxy_common::abi::ABI
            );
            Ok(())
        }
        Command::Completions { shell } => {
            let mut command = Args::command();
            clap_complete::generate(shell, &mut command, "portal", &mut std::io::stdout());
            Ok(())
        }
    }
}
